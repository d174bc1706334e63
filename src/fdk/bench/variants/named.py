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


ONE_UNIT = {"uniform": True, "stage_units": 1, "stages": 2}

SETS: dict[str, Named] = {
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
    "eight": Named(
        "Eight and sixteen tokens: do activations wait in the copy engine's queue, or are they too many bytes?",
        50,
        (
            Trial(
                problems("decode", "lut4_g64 lut1_g64", "8192x8192", "8"),
                (
                    *({"x_chunks": 2}, {"x_chunks": 4}, {"x_async": True}),
                    *each({"x_chunks": 2}, {"x_chunks": 4}, x_async=True),
                ),
            ),
            Trial(
                problems("decode", "lut4_g64", "4096x4096", "8"),
                ({"x_chunks": 2}, {"x_async": True}, {"x_async": True, "x_chunks": 2}),
            ),
            Trial(
                problems("decode", "lut4_g64", "14336x4096", "8"),
                (
                    *({"x_chunks": 4}, {"x_async": True}, {"x_async": True, "x_chunks": 4}),
                    *each({}, {"x_async": True, "x_chunks": 4}, stages=2),
                ),
            ),
            Trial(problems("decode", "lut4_g64", "12288x4096", "8"), ({"k_warps": 4}, {"k_warps": 4, "wide": True})),
            Trial(problems("decode", "lut4_g64", "16384x4096", "8"), ({"x_chunks": 4, "x_async": True},)),
            Trial(
                problems("decode", "lut4_g64", "4096x14336", "8"),
                ({"x_chunks": 7}, {"x_async": True}, {"x_async": True, "x_chunks": 7}),
            ),
            Trial(
                problems("decode", "lut8_g64", "8192x8192", "16"),
                ({"x_async": True}, {"x_chunks": 8}, {"x_async": True, "x_chunks": 8}),
            ),
            Trial(problems("decode", "lut4_g64", "4096x14336", "16"), ({"x_async": True},)),
            Trial(
                problems("decode", "lut1_g64", "14336x4096", "16"),
                each({}, {"x_async": True}, k_warps=2, stages=1, stage_units=4, x_chunks=4),
            ),
        ),
    ),
    "eight-warps": Named(
        "Eight tokens: twice as many warps of as many units, and two CTAs, where no registers are spilled?",
        30,
        (
            Trial(
                problems("decode", "lut3_g64", "8192x8192", "8"),
                (
                    *({"k_warps": 8}, {"k_warps": 8, "x_async": True, "x_chunks": 2}),
                    *each({"hold": 4000}, {"hold": 8000}, min_ctas=2),
                ),
            ),
            Trial(
                problems("decode", "lut3_g64", "14336x4096", "8"),
                ({"k_warps": 4}, {"k_warps": 4, "x_async": True, "x_chunks": 2}, {"min_ctas": 2, "hold": 4000}),
            ),
            Trial(
                problems("decode", "lut2_g64", "8192x8192", "8"),
                each({}, {"x_async": True, "x_chunks": 2}, k_warps=8, wide=False),
            ),
            Trial(
                problems("decode", "lut8_g64", "14336x4096", "8"),
                ({"x_async": True, "x_chunks": 4}, {"k_warps": 4}, {"k_warps": 4, "x_async": True, "x_chunks": 2}),
            ),
        ),
    ),
    "halves": Named(
        "Three and a half blocks of rows for each pair of CTAs, not four for some and none for others?",
        20,
        (
            Trial(
                problems("decode", "lut4_g64", "14336x4096", "8"),
                each({}, {"x_async": True, "x_chunks": 4}, {"wide": False}, half_blocks=True),
            ),
            Trial(problems("decode", "lut8_g64", "14336x4096", "8 16"), ({"half_blocks": True},)),
            Trial(problems("decode", "lut2_g64", "14336x4096", "8"), ({"half_blocks": True},)),
            Trial(
                problems("decode", "lut4_g64", "14336x4096", "1"),
                each(
                    {},
                    {"half_blocks": True},
                    {"half_blocks": True, "uniform": True},
                    **{"cluster": 2, "blocks": 4, "row_warps": 4, "k_warps": 4, "batch": 1},
                ),
            ),
        ),
    ),
    "eight-rings": Named(
        "Eight tokens at 28672 x 8192: other rings of 14 warps, a wide table, and activations as in the set eight?",
        25,
        (
            Trial(
                problems("decode", "lut4_g64", "28672x8192", "8"),
                (
                    *({"x_async": True}, ONE_UNIT, {**ONE_UNIT, "stages": 3}),
                    *each({}, {"x_chunks": 4}, {"x_chunks": 4, "x_async": True}, wide=True, **ONE_UNIT),
                ),
            ),
            Trial(
                problems("decode", "lut8_g64", "28672x8192", "8"),
                each({}, {"x_chunks": 4}, {"x_async": True, "x_chunks": 4}, uniform=True, stages=1, wide=True),
            ),
        ),
    ),
}
