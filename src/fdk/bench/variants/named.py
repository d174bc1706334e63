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
    "bytes-between": Named(
        "One token of middle sizes by integer products, which small and large weights have, and with operands ahead?",
        35,
        (
            Trial(
                problems("decode", "int3_g128 int6_g128", "8192x8192", "1"),
                ({"ahead": 1}, {"ahead": 2}, {"ahead": 2, "late": False}),
            ),
            Trial(
                problems("decode", "int3_g128 int4_g64 int6_g128", "5120x5120", "1"),
                bytes_of(16, 1, 1, (2, 1)) + bytes_of(10, 1, 1, (2, 2)),
            ),
            Trial(
                problems("decode", "nest8s2_g128 nest8s4_g128 nest8_g128", "5120x5120", "1"),
                bytes_of(16, 1, 1, (2, 1), late=False) + bytes_of(10, 1, 1, (2, 2), late=False),
            ),
            Trial(
                problems("decode", "nest8s2_g128 nest8s4_g128", "4096x11008", "1"),
                bytes_of(16, 2, 1, (2, 1), (3, 1), late=False),
            ),
            Trial(
                problems("decode", "nest8s4_g128 int4_g64 int6_g128", "6144x4096", "1"),
                bytes_of(16, 1, 1, (2, 1), late=False) + bytes_of(8, 1, 1, (2, 2), late=False),
            ),
        ),
    ),
    "thirty-two": Named(
        "32 rows of 2 and 3 bits: loops unrolled where tiles have four blocks or one?",
        25,
        (
            Trial(
                problems("prefill", "lut2_g64 lut3_g64", "28672x8192", "32 16"),
                ({"stages": 8, "unrolled": True},),
            ),
            Trial(
                problems("prefill", "lut2_g64 lut3_g64", "4096x14336 4096x4096", "32"),
                each({"stages": 8}, {"stages": 12}, {"stages": 16}, unrolled=True),
            ),
        ),
    ),
}
