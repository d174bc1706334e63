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


def bytes_of(
    k_warps: int, cluster: int, blocks: int, *rings: tuple[int, int], **other: int | bool
) -> tuple[Change, ...]:
    """One token by integer products, blocks of a CTA in turn; rings: (stages, units of each)."""
    fields = {"k_warps": k_warps, "row_warps": 1, "cluster": cluster, "blocks": blocks, "batch": blocks, "min_ctas": 1}
    fields |= {"digits": True, "paired": True, "uniform": True, "alone": True, "late": True, "scales_once": False}
    fields |= {"ahead": 0, "bulk": True, "x_sums": False, "hold": 0, **other}
    return tuple({**fields, "stages": stages, "stage_units": units} for stages, units in rings)


SETS: dict[str, Named] = {
    "odd-widths": Named(
        "One token of integers of 3 and 5 to 7 bits by integer products?",
        45,
        (
            Trial(problems("decode", "int6_g128", "8192x8192", "1"), bytes_of(16, 1, 1, (1, 2), (2, 1), (3, 1))),
            Trial(problems("decode", "int3_g128", "8192x8192", "1"), bytes_of(16, 1, 1, (1, 2), (2, 2), (3, 1))),
            Trial(problems("decode", "int6_g128", "16384x16384", "1"), bytes_of(16, 1, 2, (1, 2), (2, 1), (3, 1))),
            Trial(problems("decode", "int3_g128", "16384x16384", "1"), bytes_of(16, 1, 2, (1, 2), (2, 2), (3, 1))),
            Trial(problems("decode", "int3_g128 int6_g128", "28672x8192", "1"), bytes_of(16, 2, 7, (2, 1), (3, 1))),
            Trial(
                problems("decode", "int3_g128 int6_g128", "4096x4096", "1"),
                bytes_of(8, 2, 1, (2, 2), (4, 1), alone=False, late=False, min_ctas=2),
            ),
            Trial(problems("decode", "int3_g64 int6_g64", "14336x4096", "1"), bytes_of(16, 1, 2, (1, 2), (2, 1))),
            Trial(problems("decode", "int3_g64 int6_g64", "4096x14336", "1"), bytes_of(14, 2, 1, (2, 2), (2, 1))),
            Trial(problems("decode", "uint3_g64 uint6_g64", "8192x8192", "1"), bytes_of(16, 1, 1, (2, 1))),
            Trial(problems("decode", "int5_g64 int7_g64", "8192x8192", "1"), bytes_of(16, 1, 1, (2, 1))),
            Trial(problems("decode", "int3_g128", "8192x8192", "2 4"), bytes_of(16, 2, 2, (1, 2), late=False)),
            Trial(problems("decode", "int6_g128", "8192x8192", "2 4"), bytes_of(16, 2, 2, (2, 1), late=False)),
        ),
    ),
    "large-integers": Named(
        "One token of large integers by integer products, blocks in turn by 16 warps as slices have them?",
        45,
        (
            Trial(
                problems("decode", "int8_g128", "16384x16384", "1"),
                bytes_of(16, 1, 2, (2, 1)) + bytes_of(16, 1, 2, (2, 1), late=False),
            ),
            Trial(problems("decode", "int2_g128", "16384x16384", "1"), bytes_of(16, 1, 2, (1, 2), (2, 2), (2, 4))),
            Trial(problems("decode", "int4_g128", "16384x16384", "1"), bytes_of(16, 1, 2, (1, 2), (2, 2), (3, 1))),
            Trial(problems("decode", "uint2_g64", "16384x16384", "1"), bytes_of(16, 1, 2, (2, 1), (2, 2))),
            Trial(problems("decode", "uint4_g64 uint8_g64", "16384x16384", "1"), bytes_of(16, 1, 2, (2, 1))),
            Trial(problems("decode", "int8_g64 uint8_g64", "28672x8192", "1"), bytes_of(16, 2, 7, (2, 1))),
            Trial(
                problems("decode", "int4_g64 int2_g64 uint4_g64 uint2_g64", "28672x8192", "1"),
                bytes_of(16, 2, 7, (2, 1), (2, 2)),
            ),
            Trial(
                problems("decode", "int8_g64 int4_g64 int2_g64", "20480x5120", "1"),
                bytes_of(8, 2, 5, (2, 1), (3, 1)) + bytes_of(10, 2, 5, (2, 1)),
            ),
        ),
    ),
    "small-slices": Named(
        "One and two tokens of slices at 4096^2 by integer products, whose digits cost less since they come in pairs?",
        30,
        (
            Trial(
                problems("decode", "trunc8s2_g128 nest8s2_g128 nest8s4_g128", "4096x4096", "1"),
                bytes_of(8, 2, 1, (2, 2), alone=False, late=False)
                + bytes_of(8, 2, 1, (2, 2), (4, 1), alone=False, late=False, min_ctas=2)
                + bytes_of(8, 2, 1, (2, 2), alone=False, late=False, min_ctas=2, hold=2500),
            ),
            Trial(
                problems("decode", "nest8s6_g128 nest8_g128", "4096x4096", "1"),
                bytes_of(8, 2, 1, (2, 2), (2, 1), alone=False, late=False)
                + bytes_of(8, 2, 1, (2, 1), alone=False, late=False, min_ctas=2),
            ),
            Trial(
                problems("decode", "nest8s2_g128 nest8s4_g128 nest8_g128 int4_g128", "4096x4096", "2"),
                bytes_of(8, 2, 1, (1, 2), (2, 2)),
            ),
            Trial(
                problems("decode", "trunc8s2_g128", "8192x8192", "1"),
                ({"stages": 2}, {"stages": 2, "stage_units": 1}, {"late": True}, {"ahead": 3}),
            ),
            Trial(problems("decode", "nest8_g128", "16384x16384", "4"), bytes_of(8, 2, 4, (2, 1), batch=1, late=False)),
            Trial(
                problems("decode", "int8_g128", "4096x4096", "1"),
                bytes_of(8, 2, 1, (2, 1), (4, 1), alone=False, late=False)
                + bytes_of(8, 2, 1, (2, 1), alone=False, late=False, min_ctas=2, hold=2500),
            ),
        ),
    ),
}
