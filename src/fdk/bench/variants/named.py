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
    "slices": Named(
        "Prefill: codes a unit earlier in four slices of three blocks, and these at other widths?",
        20,
        (
            Trial(problems("prefill", "lut4_g64", "5120x5120", "64 96 128"), ({"codes_ahead": True},)),
            Trial(
                problems("prefill", "lut2_g64 lut8_g64", "5120x5120", "64"),
                ({"blocks": 2, "split": 2, "k_groups": 2, "stages": 8, "wide": False},),
            ),
        ),
    ),
}
