"""Named sets of problems and configurations: what to time next, and what it is expected to show.

A set stays while its question is open; its outcome goes into docs/findings.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from fdk.bench.variants.configurations import Change, Problem
from fdk.kernels.cuda.decode_choice import hold_clocks


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


def held(found: tuple[Problem, ...], *changes: Change) -> tuple[Trial, ...]:
    """What is chosen for each problem, and each change, with places held as `hold_clocks` says and with none held."""
    return tuple(
        Trial((problem,), each({}, *changes, hold=hold_clocks(problem.shape)) + each({}, *changes, hold=0))
        for problem in found
    )


def two(**more: int | bool) -> tuple[Change, ...]:
    """Integer products by two CTAs on a multiprocessor, of launches in turn: the next one let go late, and at once."""
    digits = {"digits": True, "paired": True, "uniform": True, "x_sums": False, "scales_once": False, "batch": 1}
    return each({"late": True}, {"late": False}, alone=False, min_ctas=2, stage_units=1, **digits, **more)


ENDS: Change = {"early": True, "counted": True, "bursts": True}

SETS: dict[str, Named] = {
    "beside": Named(
        "CTAs without work hold their places, so that every multiprocessor has one of each launch: what does that gain "
        "in chosen configurations, and do two CTAs then serve integer products, or weights that come late?",
        70,
        (
            *held(problems("decode", "lut1_g64 lut2_g64 lut4_g64 lut8_g64 int8_g64 uint4_g64", "4096x4096", "1")),
            *held(problems("decode", "nest8s4_g128 int4_g64_sp16of32", "4096x4096", "1")),
            *held(problems("decode", "lut1_g64 lut4_g64 lut8_g64", "5120x5120", "1")),
            *held(problems("decode", "lut4_g64 uint4_g64", "4096x4096", "2 4 8")),
            *held(problems("decode", "lut1_g64", "4096x4096 14336x4096", "2 8")),
            *held(problems("decode", "lut4_g64 int4_g64_sp16of32", "14336x4096", "4")),
            *held(problems("decode", "lut4_g64", "28672x8192 20480x5120", "8")),
            *held(problems("decode", "int2_g64 uint2_g64 int4_g64", "8192x8192", "1"), *two(k_warps=8, stages=3)),
            *held(problems("decode", "uint8_g64", "8192x8192", "1"), *two(k_warps=8, stages=2)),
            *held(
                problems("decode", "int2_g64 uint2_g64 int4_g64", "14336x4096", "1"),
                *two(k_warps=4, row_warps=2, stages=3),
            ),
            *held(problems("decode", "int8_g64 uint8_g64", "14336x4096", "1"), *two(k_warps=4, row_warps=2, stages=2)),
            *held(problems("decode", "nest8s4_g128", "8192x8192", "1"), *two(k_warps=8, stages=2)),
            *held(
                problems("decode", "lut8_g64 lut3_g64", "4096x4096 4096x14336", "1"), {"late": True}, {"late": False}
            ),
            Trial(
                problems("decode", "lut1_g64", "8192x8192", "1"),
                each({"hold": 1500}, {"hold": 3000}, {"hold": 4500}, {"hold": 8000})
                + each({"stages": 6, "stage_units": 2}, {"stages": 5, "stage_units": 2}, hold=3000),
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
