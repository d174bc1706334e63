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
    "near": Named(
        "What a search around one token's choices found beside its rules: does it hold on another card?",
        10,
        (
            Trial(problems("decode", "lut2_g64", "14336x4096", "1"), each({"hold": 4000}, {"hold": 6000})),
            Trial(problems("decode", "lut1_g64", "14336x4096", "1"), each({"stage_units": 2})),
            Trial(problems("decode", "lut1_g64", "4096x14336", "1"), each({"scales_once": True})),
            Trial(problems("decode", "lut8_g64", "4096x14336", "1"), each({"k_warps": 12})),
        ),
    ),
}
