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


SETS: dict[str, Named] = {
    "rings": Named(
        "Are the rings of one token the best since x and clusters changed? Half to twice as many units on their way.",
        40,
        (
            Trial(
                problems("decode", "lut2_g64 lut3_g64 lut4_g64", "8192x8192", "1"),
                tuple(
                    {"k_warps": warps, "stage_units": unit, "stages": stages}
                    for warps in (8, 16)
                    for unit, stages in ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2))
                ),
            ),
        ),
    ),
    "prefill-unrolled": Named(
        "Does a third fewer instructions beside wgmma bring 512 rows and more to 1.00 of cuBLAS?",
        90,
        (
            Trial(
                problems("prefill", "lut4_g64", "8192x8192 4096x4096 14336x4096", "1024 4096 512")
                + problems("prefill", "lut2_g64", "8192x8192", "1024"),
                ({"unrolled": True}, {"unrolled": True, "apart": True, "wide": True}),
            ),
        ),
    ),
    "prefill-middle": Named(
        "The same for 256 to 768 rows, whose tiles are smaller or cut along k.",
        70,
        (
            Trial(
                problems("prefill", "lut4_g64", "8192x8192 14336x4096", "256 384 768")
                + problems("prefill", "lut4_g64", "4096x4096", "384 768"),
                ({"stages": 4, "unrolled": True},),
            ),
        ),
    ),
    "prefill-eight": Named(
        "The same for 8 bits, where shared memory is the bound of tables and arithmetic that of integers.",
        50,
        (
            Trial(
                problems("prefill", "int8_g64 lut8_g64", "8192x8192 14336x4096", "1024 4096"),
                ({"stages": 4}, {"stages": 4, "unrolled": True}),
            ),
        ),
    ),
    "prefill-prepared": Named(
        "Is a product of weights dequantised once, to memory, no slower than cuBLAS, so that hiding that pays?",
        70,
        (
            Trial(
                problems("prefill", "lut4_g64 lut8_g64", "8192x8192", "2048 4096 8192")
                + problems("prefill", "lut8_g64", "14336x4096", "4096"),
                tuple(
                    {"prepared": True, "unrolled": True, "wide": False, "stages": 4, "pair": pair, "stream": stream}
                    for pair, stream in ((1, False), (1, True), (2, True))
                ),
            ),
        ),
    ),
    "prefill-raster": Named(
        "Where x is larger than the second-level cache, do fewer tokens a band save power?",
        40,
        (
            Trial(
                problems("prefill", "lut4_g64", "4096x14336", "2048 4096 8192")
                + problems("prefill", "lut4_g64", "8192x8192", "8192"),
                ({"band": 4}, {"band": 16}, {"pair": 1}, {"pair": 2}, {"pair": 2, "band": 4}),
            ),
        ),
    ),
}
