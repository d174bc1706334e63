"""Integer products of two and four tokens, outside of chains, by pairs of CTAs that split k.

csrc/digits_many.cuh; docs/findings.md: "Integer products for four and eight tokens", "Integers of every width by
integer products".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fdk.kernels.cuda.decode_choice.case import Case, Share
from fdk.kernels.cuda.decode_choice.digit_rings import Ring
from fdk.kernels.cuda.decode_config import CUT, INT, MAX_SHARED, ROUNDED, UINT_U8, Config, Shape, shared_of_two


@dataclass(frozen=True)
class Gain:
    """Where they were faster on an H200: of a pair of CTAs first and last count of blocks, and of units of each CTA."""

    tokens: tuple[int, ...]
    bits: tuple[int, ...]
    blocks: tuple[int, int]
    units: tuple[int, int]

    def holds(self, shape: Shape, tokens: int, share: Share) -> bool:
        inside = self.blocks[0] <= share.blocks <= self.blocks[1] and self.units[0] <= share.units <= self.units[1]
        return inside and tokens in self.tokens and shape.bits in self.bits


_ALL = (2, 3, 4, 5, 6, 7, 8)

# One block of 32 units is 4096^2 and fewer rows, two of 64 are 8192^2, seven of 64 28672 x 8192, four of 128 16384^2.
_SMALL = Gain(tokens=(2, 4), bits=_ALL, blocks=(1, 1), units=(32, 32))
OF_INTEGERS = (
    _SMALL,
    Gain(tokens=(2,), bits=_ALL, blocks=(2, 2), units=(64, 64)),
    Gain(tokens=(4,), bits=(5, 6, 7), blocks=(2, 2), units=(64, 64)),
    Gain(tokens=(4,), bits=(8,), blocks=(2, 7), units=(64, 64)),
)

# Of groups of 128. Four planes of four tokens take as long either way.
OF_SLICES = (
    _SMALL,
    Gain(tokens=(2,), bits=_ALL, blocks=(2, 2), units=(64, 64)),
    Gain(tokens=(4,), bits=(2, 3, 5, 6, 7, 8), blocks=(2, 2), units=(64, 64)),
    Gain(tokens=(2, 4), bits=(5, 6, 7, 8), blocks=(2, 7), units=(64, 64)),
    Gain(tokens=(2, 4), bits=(2, 3, 5, 6, 7, 8), blocks=(3, 4), units=(65, 128)),
)

OF_ZEROS = (Gain(tokens=(2,), bits=_ALL, blocks=(1, 1), units=(32, 32)),)


def with_many_digits(case: Case, config: Config) -> Config:
    """`config` of two or four tokens by integer products where they pay and fit shared memory."""
    shape, tokens, share = case.shape, config.tokens, case.share(2)
    if tokens not in (2, 4) or not shape.allows_many_digits or not shape.allows_digits_of(tokens):
        return config
    slices = OF_SLICES if shape.nested and shape.group % 128 == 0 else ()
    gains = {INT: OF_INTEGERS, UINT_U8: OF_ZEROS}.get(shape.kind, slices)
    if not any(gain.holds(shape, tokens, share) for gain in gains):
        return config
    if share.blocks == 1:
        fewest = _FEWEST_BLOCKS[(shape.kind, shape.bits, tokens) == (INT, 3, 4)]
        return _of_one_block(case) if case.blocks >= fewest else config
    for tried in _arrangements(shape, tokens, share):
        parts = tried.cluster * tried.k_warps
        if shape.allows_stage_units(tried.stage_units, parts) and tried.shared_bytes(shape) <= MAX_SHARED:
            return tried
    return config


# 1024 rows, of integers of 3 bits and four tokens 2048. Of fewer, look-ups have more CTAs at work, in larger clusters.
_FEWEST_BLOCKS = (16, 32)

# Rings for the four units of a warp, (stage_units, stages): all of them, most, or half.
_ALL_UNITS, _MOST_UNITS, _HALF = (2, 2), (1, 3), (2, 1)
HOLD = 4000
"""Clocks for which CTAs without work keep their places, where one block of a pair takes about as long."""

# Bits, of four tokens, that spill in the registers of two CTAs.
_SPILL = {
    _ALL_UNITS: {INT: (7,), CUT: (5, 6, 7, 8)},
    _HALF: {INT: (7,), ROUNDED: (8,), CUT: (4,)},
}


def _of_one_block(case: Case) -> Config:
    """Of a pair with one block of 32 units: eight warps, beside whose CTA there is a place for one of the next launch.

    Its codes are on their way before the launch in front has ended; idle CTAs hold places for `HOLD` clocks, so that no
    multiprocessor gets two of one launch. docs/findings.md: "Two places for two and four rows".
    """
    shape = case.shape
    start = Config(case.tokens, 2, 8, 1, 1, 1, 1, 1, 1, digits=True, paired=True, uniform=True)
    shared = _full(case) and (case.tokens == 4 or shape.nested)
    most = shared_of_two(case.capability) if shared else MAX_SHARED
    rings, hold = _rings_of_two_places(case)
    for ring in rings:
        stage_units, stages = ring
        found = replace(start, stage_units=stage_units, stages=stages, hold=hold)
        if shape.allows_stage_units(stage_units, 16) and found.shared_bytes(shape) <= most:
            spills = case.tokens == 4 and shape.bits in _SPILL.get(ring, {}).get(shape.kind, ())
            return found if spills else replace(found, min_ctas=2)
    return replace(start, stage_units=2 if shape.allows_stage_units(2, 16) else 1, alone=True)


def _full(case: Case) -> bool:
    """Whether pairs for each block take nearly all multiprocessors."""
    return 2 * case.blocks > 0.9 * case.sms


def side_by_side(case: Case) -> bool:
    """Whether CTAs of two launches, pairs for each block, have multiprocessors of their own."""
    return 4 * case.blocks <= case.sms


def _rings_of_two_places(case: Case) -> tuple[tuple[Ring, ...], int]:
    """Rings, most preferred first, and clocks for which idle CTAs hold places, as measured at 1024 to 4096 rows."""
    shape = case.shape
    heavy = shape.kind == INT and shape.bits > 3
    if case.tokens == 2:
        # By look-ups integers of 4 bits take less than their neighbours, so that a ring of fewer units gains most.
        return ((_ALL_UNITS, _MOST_UNITS), HOLD) if shape.bits < 5 and not heavy else ((_MOST_UNITS,), 0)
    if side_by_side(case):
        return (_HALF if (shape.kind, shape.bits) == (INT, 3) else _ALL_UNITS, _MOST_UNITS), 0
    if shape.kind == CUT and shape.bits > 4:
        return (_MOST_UNITS,), HOLD
    if not _full(case):
        return (_HALF, _MOST_UNITS), HOLD  # more would be on its way to a few multiprocessors for both launches
    return (_MOST_UNITS, _HALF) if heavy else (_ALL_UNITS, _MOST_UNITS, _HALF), HOLD


def _arrangements(shape: Shape, tokens: int, share: Share) -> Iterator[Config]:
    """Configurations of a pair's blocks, most preferred first: 16 warps on k, blocks in turn or side by side."""
    blocks = share.blocks
    start = Config(tokens, 2, 16, 1, 1, 2, blocks, 1, 1, digits=True, paired=True)
    in_turn = replace(start, uniform=True, alone=True, batch=blocks if blocks <= 2 else 1)
    if shape.kind == INT and 5 <= shape.bits <= 7:
        # Two units of codes that lie across bytes are more than registers hold beside the sums of four tokens.
        yield replace(in_turn, stages=2, stage_units=1)
        return
    # What memory has no room for, and two planes of four blocks, go side by side.
    beside = replace(in_turn, k_warps=4, row_warps=blocks, batch=1)
    if blocks != 4:
        tried = [in_turn]
    else:
        tried = [beside] if shape.bits == 2 else [in_turn, beside]
    # Two units of other slices are more than the 128 registers of 16 warps hold.
    light = tokens == 2 or shape.kind == INT or (shape.group == 128 and (shape.kind == ROUNDED or shape.bits < 5))
    two = light and blocks <= 4 and (tokens == 4 or shape.bits < 8)
    for config in tried:
        for stage_units in (2, 1) if two else (1,):
            yield replace(config, stage_units=stage_units)
