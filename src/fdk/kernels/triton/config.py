"""Tile shapes of the Triton product: a pure function of the problem, so that nothing is tuned at the first call."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Tile of `bm` tokens x `bn` rows x `bk` of k, for `warps` warps and `stages` tiles in flight.

    pack is the number of codes looked up at once; splits the number of parts of k, each summed by its own blocks.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    pack: int
    splits: int = 1


# (largest m, bm, bn, bk, warps, stages, blocks wanted). Fewer blocks than wanted, on a GPU of 132 multiprocessors, are
# split along k. Rows equal to 32 per warp give every lane one row of codes. The best of the measured tiles over widths
# of 1, 2, 4 and 8 bits: NVIDIA H200, 2026-11-20.
_TILES = (
    (16, 16, 128, 128, 4, 3, 528),
    (64, 64, 128, 64, 4, 3, 264),
    (256, 128, 128, 64, 4, 3, 264),
)
_LARGE = (256, 128, 64, 8, 3, 132)
_FLOAT32 = (16, 64, 32, 4, 2, 528)

# Codes looked up at once: as many as give a table that shared memory serves with few bank conflicts.
_PACK = {1: 2, 2: 2, 3: 2}


def choose(m: int, n: int, k: int, bits: int, lookup: bool, element_size: int) -> Config:
    """The tile for x [m, k] times W [n, k] of `bits` bits; element_size is that of x in bytes."""
    if element_size == 4:
        tile = _FLOAT32
    else:
        tile = next((tile for limit, *tile in _TILES if m <= limit), _LARGE)
    bm, bn, bk, warps, stages, wanted = tile
    blocks = -(-n // bn) * -(-m // bm)
    splits = split_count(-(-k // bk), wanted // max(1, blocks))
    pack = _PACK.get(bits, 1) if lookup and element_size == 2 else 1
    return Config(bm, bn, bk, warps, stages, pack, splits)


def split_count(steps: int, wanted: int) -> int:
    """Parts to cut `steps` blocks of k into: at most `wanted` and 16, at least two steps each, equal if possible."""
    most = max(1, min(wanted, steps // 2, 16))
    even = max(parts for parts in range(1, most + 1) if steps % parts == 0)
    # An uneven cut masks every load, but half of the wanted blocks leaves the GPU idle.
    return even if 2 * even >= most else -(-steps // -(-steps // most))


def choose_untuned(m: int, element_size: int, one_bk: int) -> tuple[int, int, int, int]:
    """(bm, bn, bk, warps) of nested and sparse weights, which no GPU has tuned; one_bk: bk of one token."""
    if m == 1:
        return 1, 4, one_bk, 4
    if element_size == 4:
        return 16, 32, 32, 4
    return (16 if m <= 16 else 64), 64, 64, 4


@dataclass(frozen=True)
class VectorConfig:
    """Blocks of the kernel for one token: `rows` rows x `bk` of k for `warps` warps, `run` codes of a row to a lane.

    pack codes are looked up at once; wide tables hold float32 instead of x's dtype.
    """

    rows: int
    bk: int
    run: int
    warps: int
    pack: int
    wide: bool


# (rows, run, pack, wide) for 1 to 8 bits, the best measured: NVIDIA H200, 2026-11-20. A narrow table needs an
# instruction more a weight, but has fewer bank conflicts at 8 bits, and fewer wavefronts for pairs.
_VECTOR = (
    (8, 32, 4, False),
    (8, 32, 2, False),
    (8, 32, 2, False),
    (8, 32, 1, True),
    (4, 16, 1, True),
    (4, 16, 1, False),
    (4, 16, 1, False),
    (8, 16, 1, False),
)


def choose_vector(n: int, k: int, bits: int, group: int, element_size: int) -> VectorConfig:
    """The blocks for one token x [1, k] times W [n, k] with a scale for every `group` weights."""
    rows, run, pack, wide = _VECTOR[bits - 1]
    # A lane's run shares its scale and takes at most four loads of x; its looked-up values fill at most 64 bits.
    run = min(run, group & -group, 64 // element_size)
    pack = min(pack, 8 // element_size)
    warps = next((warps for warps in (4, 2, 8) if k % (32 * warps * run) == 0), 4)
    bk = min(32 * warps * run, max(run, 1 << (k - 1).bit_length()))
    return VectorConfig(rows if n >= 4096 else 4, bk, run, warps, pack, wide)
