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
        "Eight tokens: activations in pieces, 12 warps and half blocks at sizes between those measured?",
        60,
        (
            Trial(problems("decode", "lut1_g64", "4096x4096", "8"), ({"x_chunks": 2},)),
            Trial(problems("decode", "lut1_g64", "4096x14336", "8"), ({"x_chunks": 7},)),
            Trial(problems("decode", "lut1_g64", "14336x4096", "8"), ({"x_chunks": 2}, {"x_chunks": 4})),
            Trial(problems("decode", "lut1_g64", "28672x8192", "8"), ({"x_sums": True, "x_chunks": 4},)),
            Trial(problems("decode", "lut2_g64 lut3_g64 lut8_g64", "8192x8192", "8"), ({"x_chunks": 1},)),
            Trial(
                problems("decode", "lut3_g64", "28672x8192", "8"),
                ({"x_chunks": 1}, {"uniform": True, "stage_units": 1, "stages": 2}),
            ),
            Trial(problems("decode", "lut2_g64", "28672x8192", "8"), ({"x_chunks": 1},)),
            Trial(problems("decode", "lut2_g64 lut3_g64 lut8_g64", "12288x4096", "8"), ({"k_warps": 4},)),
            Trial(problems("decode", "lut4_g64", "10240x4096 18944x3584 22528x3072", "8"), ({"half_blocks": True},)),
            Trial(problems("decode", "lut8_g64", "14336x4096", "8"), ({"wide": True},)),
            Trial(problems("decode", "lut3_g64", "14336x4096", "8"), ({"min_ctas": 2, "hold": 2700},)),
        ),
    ),
}
