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


def tile(tokens: int, blocks: int, stages: int, split: int = 1, **other: int | bool) -> Change:
    """Every field of the prefill kernel's configuration that says how work is cut, so that nothing chosen is left."""
    fields = {"tokens": tokens, "blocks": blocks, "stages": stages, "split": split}
    plain = {"k_groups": 1, "pair": 1, "parts": 1, "ahead": True, "codes_ahead": False, "turns": False, "wide": False}
    plain |= {"stream": False, "fetch_sums": False}
    return {**plain, "unrolled": True, **fields, **other}


SETS: dict[str, Named] = {
    "fourths": Named(
        "Prefill: k in four slices of three blocks, of which 27 clusters are resident where 40 of three CTAs are not?",
        50,
        (
            Trial(
                problems("prefill", "lut4_g64", "5120x5120", "32"), (tile(32, 3, 8, 4), tile(32, 3, 8, 4, wide=True))
            ),
            Trial(
                problems("prefill", "lut4_g64", "5120x5120", "64"),
                (tile(64, 3, 8, 4), tile(64, 3, 8, 4, wide=True), tile(64, 4, 8, 5)),
            ),
            Trial(
                problems("prefill", "lut4_g64", "5120x5120", "96"), (tile(96, 3, 8, 4), tile(96, 3, 6, 4, wide=True))
            ),
            Trial(
                problems("prefill", "lut4_g64 int4_g64", "5120x5120", "128"),
                (
                    tile(128, 3, 6, 4),
                    tile(128, 3, 4, 4, wide=True),
                    tile(128, 3, 5, 4, wide=True, unrolled=False),
                    tile(128, 3, 7, 4, unrolled=False),
                ),
            ),
            Trial(
                problems("prefill", "lut4_g64", "5120x5120", "160"),
                (tile(160, 3, 6, 4), tile(160, 3, 6, 4, unrolled=False)),
            ),
            Trial(
                problems("prefill", "lut4_g64", "5120x5120", "192"),
                (tile(192, 3, 5, 4, parts=2, unrolled=False), tile(192, 3, 4, 4, parts=2)),
            ),
            Trial(
                problems("prefill", "lut4_g64", "5120x5120", "224"),
                (tile(112, 3, 4, 2, wide=True), tile(112, 3, 5, 2, wide=True, unrolled=False)),
            ),
            Trial(
                problems("prefill", "lut4_g64", "5120x5120", "256"), (tile(128, 3, 4, 2, wide=True), tile(128, 3, 6, 2))
            ),
            Trial(problems("prefill", "lut4_g64", "5120x5120", "512"), (tile(176, 2, 4, wide=True),)),
            Trial(
                problems("prefill", "lut4_g64", "5120x17408", "128"),
                (tile(128, 3, 4, 4, wide=True), tile(128, 3, 6, 4)),
            ),
            Trial(
                problems("prefill", "lut4_g64", "3584x18944", "64"),
                (tile(64, 2, 8, 4, k_groups=2), tile(64, 2, 8, 4, k_groups=2, wide=True)),
            ),
            Trial(problems("prefill", "lut4_g64", "3584x18944", "128"), (tile(128, 2, 6, 4, wide=True),)),
            Trial(problems("prefill", "lut4_g64", "2560x9728", "64"), (tile(64, 2, 8, 5, k_groups=2),)),
            Trial(problems("prefill", "lut4_g64", "2560x9728", "128"), (tile(128, 2, 6, 5, wide=True),)),
            Trial(
                problems("prefill", "lut4_g64", "4096x14336", "192"),
                (tile(192, 3, 5, 5, parts=2, unrolled=False),),
            ),
            Trial(problems("prefill", "lut2_g64 lut8_g64", "5120x5120", "128"), (tile(128, 3, 4, 4),)),
            # 36 clusters of three, which are resident.
            Trial(problems("prefill", "lut4_g64", "4608x4096", "64"), (tile(64, 2, 8, 3, k_groups=2),)),
            Trial(problems("prefill", "lut4_g64", "4608x4096", "128"), (tile(128, 2, 6, 3, wide=True),)),
            Trial(problems("prefill", "lut4_g64", "4608x4096", "256"), (tile(256, 2, 4, 3),)),
        ),
    ),
}
