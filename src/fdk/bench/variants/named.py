"""Named sets of problems and configurations: what to time next, and what it is expected to show.

A set stays while its question is open; its outcome goes into docs/findings.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from fdk.bench.variants.configurations import Change, Problem


@dataclass(frozen=True)
class Trial:
    """Changes to the chosen configuration, tried on each of some problems."""

    problems: tuple[Problem, ...]
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Named:
    """Trials that answer one question.

    seconds  that they take on an H200 with 16 cores beside it, estimated
    """

    question: str
    seconds: int
    trials: tuple[Trial, ...]


def problems(kernel: str, formats: str, shapes: str, ms: str) -> tuple[Problem, ...]:
    """All combinations of blank-separated formats, shapes "NxK" and ms."""
    sizes = [tuple(int(size) for size in shape.split("x")) for shape in shapes.split()]
    return tuple(
        Problem(kernel, format, n, k, int(m)) for format in formats.split() for n, k in sizes for m in ms.split()
    )


def each(*changes: Change, **fixed: int | bool) -> tuple[Change, ...]:
    """The changes, each with `fixed` on top."""
    return tuple({**fixed, **change} for change in changes)


SIXTEEN = "16384x16384"
BYTES: Change = {
    "digits": True,
    "paired": True,
    "row_warps": 1,
    "k_warps": 16,
    "stages": 1,
    "stage_units": 1,
    "scales_once": False,
}


def beside(hold: int, *changes: Change, **fixed: int | bool) -> tuple[Change, ...]:
    """Two CTAs a multiprocessor, of launches in turn: with the places of idle CTAs held, and without."""
    two = {"alone": False, "min_ctas": 2, **fixed}
    first = changes[:1]
    return each(*changes, hold=hold, **two) + each(*first, **two) + each(*first, hold=hold, late=True, **two)


INDICES = {
    "8192x8192": (
        {"k_warps": 8, "stages": 1},
        {"k_warps": 8, "stages": 2, "uniform": False},
        {"k_warps": 8, "stages": 2, "scales_once": True},
        {"k_warps": 8, "stages": 3},
        {"k_warps": 8, "stages": 4, "stage_units": 2},
    ),
    "14336x4096": (
        {"k_warps": 4, "stages": 1},
        {"k_warps": 4, "stages": 2},
        {"k_warps": 8, "stages": 2},
        {"k_warps": 8, "stages": 2, "stage_units": 2},
    ),
    "4096x14336": (
        {"k_warps": 7, "stages": 2},
        {"k_warps": 8, "stages": 2, "stage_units": 2},
        {"k_warps": 14, "stages": 2, "stage_units": 2},
    ),
    "28672x8192": (
        {"k_warps": 2, "row_warps": 7, "stages": 1},
        {"k_warps": 2, "row_warps": 7, "stages": 3},
        {"k_warps": 4, "row_warps": 4, "stages": 1},
        {"k_warps": 16, "row_warps": 1, "stages": 1, "batch": 7},
    ),
}
INDICES_4096 = each(
    {"stages": 1, "stage_units": 4},
    {"stages": 2, "stage_units": 2},
    {"stages": 1, "stage_units": 4, "uniform": True},
    indices=True,
)


DIGITS: Change = {"digits": True, "paired": True, "uniform": True, "late": True, "x_sums": False, "scales_once": False}

ENDS: Change = {"early": True, "counted": True, "bursts": True}

SETS: dict[str, Named] = {
    "two-bit": Named(
        "Two bits whose codes are the indices of sparse products: which rings, and do they win at 4096 x 4096 too?",
        40,
        (
            *(Trial(problems("decode", "lut2_g64", size, "1"), each(*tried)) for size, tried in INDICES.items()),
            Trial(problems("decode", "lut2_g64", "4096x4096 2048x4096", "1"), INDICES_4096),
            Trial(
                problems("decode", "lut1_g64", "2048x4096", "1"),
                each(*INDICES_4096, x_sums=False, digits=False, late=False),
            ),
        ),
    ),
    "zeros": Named(
        "Zero points: scales and zeros in one piece each, integer products, and 16 warps of two and four tokens, where "
        "16 warps and sums in the loop have won at one and eight?",
        75,
        (
            Trial(
                problems("decode", "uint4_g64 uint2_g64 uint8_g64", "8192x8192", "1")
                + problems("decode", "uint4_g64", "4096x14336 14336x4096", "1"),
                ({"scales_once": True},),
            ),
            *(
                Trial(
                    problems("decode", "uint4_g64 uint2_g64", "8192x8192", str(m)),
                    each({}, {"scales_once": True}, tokens=m, cluster=1, k_warps=16, row_warps=1),
                )
                for m in (2, 4)
            ),
            Trial(problems("decode", "uint4_g64 uint2_g64", "8192x8192", "8"), ({"scales_once": True},)),
            Trial(
                problems("decode", "uint4_g64", "14336x4096", "2"),
                ({"tokens": 2, "cluster": 1, "k_warps": 8, "row_warps": 2},),
            ),
            Trial(problems("decode", "uint4_g64", "28672x8192", "8"), ({"k_warps": 2, "stages": 1}, {"alone": False})),
            Trial(problems("decode", "uint4_g64 uint2_g64", "4096x4096", "2 4"), ({"stages": 4}, {"stages": 3})),
            Trial(problems("decode", "uint4_g64", "4096x4096", "8"), ({"stages": 4},)),
            Trial(problems("decode", "uint4_g64 uint2_g64", "14336x4096", "16"), ({"x_sums": True}, {"alone": True})),
        ),
    ),
    "loads": Named(
        "Sums of activations in the loop for one bit: where a warp has 32 units, and where nobody measured them?",
        25,
        (
            Trial(problems("decode", "lut1_g64", "28672x8192", "8"), ({"x_sums": True},)),
            Trial(problems("decode", "lut1_g64", "4096x4096", "2 4"), ({"x_sums": False},)),
            Trial(problems("decode", "lut1_g64", "14336x4096", "8"), ({"x_sums": False},)),
        ),
    ),
    "wide": Named(
        "Rows of the table 256 bytes apart won 3 % for 4 bits and eight tokens at 8192 x 8192 and lost at one: where "
        "does it turn?",
        60,
        (
            Trial(problems("decode", "lut4_g64", "8192x8192", "2 4"), ({"wide": True},)),
            Trial(problems("decode", "lut4_g64", "4096x4096 14336x4096", "8"), ({"wide": True},)),
            Trial(problems("decode", "lut2_g64 lut8_g64", "8192x8192", "8"), ({"wide": True},)),
            Trial(problems("decode", "lut2_g64", "28672x8192", "8"), ({"wide": True},)),
        ),
    ),
    "nested": Named(
        "One token: five planes and more at 16384 x 16384, and do integer products of slices pay where a CTA has more "
        "than two blocks, or fewer than 2^26 weights?",
        40,
        (
            Trial(
                problems("decode", "nest8s4_g128 nest8s6_g128 nest8_g128", SIXTEEN, "1"),
                (
                    {"stage_units": 1, "stages": 1},
                    {"stage_units": 1, "stages": 2},
                    {"digits": False, "paired": False, "k_warps": 4, "row_warps": 2, "stage_units": 1, "stages": 3},
                ),
            ),
            Trial(
                problems("decode", "nest8s2_g128 nest8s4_g128", "14336x4096", "1"),
                each({}, {"stage_units": 2}, {"row_warps": 2, "k_warps": 8, "batch": 1}, **BYTES, batch=2),
            ),
            Trial(
                problems("decode", "nest8s2_g128 nest8s4_g128", "4096x14336", "1"),
                each({"stages": 2}, {"k_warps": 14, "stage_units": 2}, {"k_warps": 8, "stages": 2}, **BYTES),
            ),
            Trial(
                problems("decode", "nest8s2_g128 nest8s4_g128", "28672x8192", "1"),
                each({}, {"stages": 2}, {"stage_units": 2}, **BYTES, batch=7),
            ),
            Trial(
                problems("decode", "nest8s2_g128 nest8s4_g128", "20480x5120", "1"),
                each({"k_warps": 10}, {"k_warps": 8, "stages": 2}, **BYTES, batch=5),
            ),
        ),
    ),
    "beside": Named(
        "One token: two CTAs on a multiprocessor, of launches that follow each other, if those without work keep their "
        "places until the others end, so that every multiprocessor has one of each launch?",
        120,
        (
            Trial(
                problems("decode", "lut1_g64", "8192x8192", "1"),
                beside(5000, {"k_warps": 8, "stages": 3}, {"k_warps": 8, "stages": 2}, {"k_warps": 8, "stages": 4}, {})
                + each({"hold": 3000}, {"hold": 8000}, k_warps=8, stages=3, alone=False, min_ctas=2),
            ),
            Trial(
                problems("decode", "lut2_g64", "8192x8192", "1"),
                beside(8000, {}, {"k_warps": 8, "stages": 1}, {"k_warps": 8, "stages": 3}, {"k_warps": 4, "stages": 4}),
            ),
            Trial(
                problems("decode", "lut4_g64 lut3_g64", "8192x8192", "1"),
                beside(
                    11000,
                    {"k_warps": 8, "stages": 2, "scales_once": False},
                    {"k_warps": 8, "stages": 3, "scales_once": False},
                    {"k_warps": 8, "stages": 4, "scales_once": False},
                    {"k_warps": 8, "stages": 2, "scales_once": True},
                ),
            ),
            Trial(
                problems("decode", "lut8_g64 int8_g64", "8192x8192", "1"),
                beside(
                    20000,
                    {"k_warps": 8, "row_warps": 1, "stages": 1, "stage_units": 1, "scales_once": False},
                    {"k_warps": 8, "row_warps": 1, "stages": 1, "stage_units": 1, "scales_once": True},
                    {"k_warps": 8, "row_warps": 1, "stages": 2, "stage_units": 1, "scales_once": False},
                ),
            ),
            Trial(
                problems("decode", "lut4_g64 lut8_g64", "14336x4096", "1"),
                beside(
                    11000,
                    {"k_warps": 8, "row_warps": 1, "stages": 1, "stage_units": 1, "batch": 2},
                    {"k_warps": 8, "row_warps": 1, "stages": 2, "stage_units": 1, "batch": 2},
                    {"k_warps": 4, "row_warps": 2, "stages": 2, "stage_units": 1, "batch": 1},
                ),
            ),
            Trial(
                problems("decode", "lut1_g64 lut2_g64", "14336x4096", "1"),
                beside(6000, {"k_warps": 4, "stages": 2}, {"k_warps": 4, "stages": 3}),
            ),
            Trial(
                problems("decode", "lut1_g64 lut4_g64", "4096x14336", "1"),
                beside(6000, {"k_warps": 7, "stages": 2}, {"k_warps": 7, "stages": 3}, {"k_warps": 7, "stages": 4}),
            ),
            Trial(
                problems("decode", "lut1_g64 lut2_g64 lut4_g64 lut8_g64", "4096x4096", "1"),
                each({"hold": 2500}, {"hold": 4500}, {"hold": 2500, "late": True}),
            ),
        ),
    ),
    "one-bit": Named(
        "One bit: do fewer warps with more stages hold at 8192 x 8192 what they have reached at times, alone on their "
        "multiprocessor or beside the next launch, and do integer products serve two tokens at other sizes?",
        20,
        (
            Trial(
                problems("decode", "lut1_g64", "8192x8192", "1"),
                (
                    {"k_warps": 8},
                    {"k_warps": 8, "stages": 2},
                    {"k_warps": 8, "stages": 3},
                    {"k_warps": 8, "stages": 3, "min_ctas": 2, "alone": False},
                    {"stages": 3, "stage_units": 2},
                    {"stages": 3, "stage_units": 2, "min_ctas": 2, "alone": False},
                ),
            ),
            Trial(problems("decode", "lut1_g64", "4096x14336", "1"), ({"alone": True}, {"stages": 1})),
            Trial(
                problems("decode", "lut1_g64", "14336x4096", "2"),
                each({"stage_units": 2}, {"stage_units": 4}, k_warps=8, stages=1, **DIGITS),
            ),
            Trial(
                problems("decode", "lut1_g64", "28672x8192", "2"),
                each({}, {"stage_units": 4}, row_warps=7, k_warps=2, stages=1, stage_units=2, batch=1, **DIGITS),
            ),
        ),
    ),
    "integers": Named(
        "One token: do integer products beat look-ups of integers where that has not been measured?",
        30,
        (
            Trial(
                problems("decode", "uint4_g64 uint2_g64 uint8_g64 int8_g64", "14336x4096", "1"),
                each({}, {"stages": 2}, row_warps=2, k_warps=8, stages=1, stage_units=1, batch=1, **DIGITS),
            ),
            Trial(
                problems("decode", "uint4_g64 uint2_g64 int2_g64", "4096x14336", "1"),
                each({}, {"stage_units": 2}, k_warps=14, stages=2, stage_units=1, **DIGITS),
            ),
            Trial(
                problems("decode", "uint8_g64 int8_g64", "4096x14336", "1"),
                each({"stages": 1}, {"stages": 2}, k_warps=14, stage_units=1, **DIGITS),
            ),
            Trial(
                problems("decode", "uint4_g64 uint2_g64", "4096x4096", "1"),
                each({}, {"stage_units": 2}, stages=2, stage_units=1, x_sums=False, digits=True, paired=True),
            ),
            Trial(
                problems("decode", "uint2_g64", "28672x8192", "1"),
                each({}, row_warps=4, k_warps=4, stages=2, stage_units=1, **DIGITS),
            ),
        ),
    ),
    "uniform": Named(
        "One and eight tokens: what do fewer instructions a copy save, and one bit by look-ups of eight codes?",
        60,
        (
            Trial(
                problems("decode", "lut4_g64 lut2_g64 lut8_g64", "4096x4096 8192x8192", "1"),
                ({"uniform": True}, {"uniform": True, "scales_once": True}),
            ),
            Trial(
                problems("decode", "lut4_g64 lut8_g64", "28672x8192", "1"),
                ({"uniform": True},),
            ),
            Trial(
                problems("decode", "lut4_g64 lut2_g64 lut8_g64", "8192x8192", "8")
                + problems("decode", "lut2_g64", "28672x8192", "8"),
                ({"uniform": False},),
            ),
            Trial(
                problems("decode", "lut1_g64", "4096x4096 8192x8192 28672x8192", "8"),
                each(
                    {},
                    {"octets": True, "x_sums": False},
                    {"octets": True, "x_sums": False, "stage_units": 1, "stages": 2},
                    uniform=True,
                ),
            ),
        ),
    ),
    "sixteen": Named(
        "Sixteen tokens: where do unrolled loops of the prefill kernel beat decoding at widths other than 4 bits, and "
        "which of the two a wide table more?",
        60,
        (
            Trial(
                problems("prefill", "lut1_g64 lut8_g64 int8_g64", "8192x8192 14336x4096 22528x3072", "16")
                + problems("prefill", "lut1_g64", "28672x8192 4096x14336", "16"),
                ({"unrolled": False},),
            ),
            Trial(
                problems("prefill", "lut2_g64 lut3_g64", "8192x8192 14336x4096", "16 32"),
                ({"stages": 16, "unrolled": True},),
            ),
            Trial(problems("prefill", "lut4_g64", "28672x8192 4096x4096 4096x14336", "16"), ({"wide": False},)),
            Trial(
                problems("decode", "lut1_g64", "14336x4096", "16"),
                ({"k_warps": 2, "stage_units": 4, "stages": 1, "x_chunks": 4},),
            ),
            Trial(
                problems("decode", "lut1_g64 lut2_g64 lut4_g64 lut8_g64", "8192x8192 14336x4096 22528x3072", "16"),
                ({"uniform": False},),
            ),
        ),
    ),
    "prefill-ends": Named(
        "What do launches of the prefill kernel gain by an earlier start, sums of slices that are counted where they "
        "arrive, and outputs that are loaded together; alone and all at once?",
        60,
        (
            Trial(
                problems("prefill", "lut4_g64", "8192x8192", "64 128 256")
                + problems("prefill", "lut4_g64", "4096x4096", "384 512"),
                ({"early": True}, {"counted": True}, {"bursts": True}, ENDS),
            ),
            Trial(
                problems("prefill", "lut4_g64", "14336x4096", "256 384 768 1024")
                + problems("prefill", "lut4_g64", "4096x14336", "192 256")
                + problems("prefill", "lut4_g64", "8192x8192", "512")
                + problems("prefill", "lut8_g64 int8_g64", "8192x8192", "1024"),
                ({"bursts": True}, ENDS),
            ),
        ),
    ),
}
