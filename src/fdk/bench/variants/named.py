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


SETS: dict[str, Named] = {
    "sizes": Named(
        "Sizes that even shares leave out: one bit, two steps of few tokens on long k, two bits of one token?",
        15,
        (
            Trial(
                problems("decode", "lut1_g64", "5120x5120 10240x5120", "8"),
                each({"k_warps": 5}, {"k_warps": 4}, cluster=4, row_warps=3, x_chunks=1, x_ahead=0),
            ),
            Trial(
                problems("decode", "lut8_g64", "28672x8192", "2 4"),
                each({"stages": 1}, {"stages": 2}, cluster=2, blocks=7, row_warps=7, k_warps=2, stage_units=1, batch=1),
            ),
            Trial(
                problems("decode", "lut2_g64", "6144x4096 10240x5120", "1"),
                each({"cluster": 1}, {"cluster": 4}, stage_units=2, stages=2),
            ),
        ),
    ),
    "planes-ahead": Named(
        "One token of six planes and more at 4096^2 with more units on their way before the launch in front has ended?",
        15,
        (
            Trial(
                problems("decode", "trunc8s6_g128 nest8s6_g128 nest8_g128", "4096x4096", "1"),
                ({"stages": 2, "stage_units": 2}, {"stages": 3}, {"stages": 4}, {"stages": 3, "min_ctas": 1}),
            ),
        ),
    ),
}
