"""Two to eight tokens of weights of which a pair of CTAs has one block, so that two launches share multiprocessors.

4096 rows of 4096 columns and fewer, outside of chains. docs/findings.md: "Two places for two and four rows".
"""

from __future__ import annotations

from dataclasses import replace

from fdk.kernels.cuda.decode_choice.case import LOOKED_UP, Case
from fdk.kernels.cuda.decode_choice.digit_rings import Ring
from fdk.kernels.cuda.decode_config import CUT, INT, MAX_SHARED, ROUNDED, UINT_U8, Config, shared_of_two

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


def enough_blocks(case: Case) -> bool:
    """Whether integer products of a pair with one block pay."""
    return case.blocks >= _FEWEST_BLOCKS[(case.shape.kind, case.shape.bits, case.tokens) == (INT, 3, 4)]


def of_one_block(case: Case) -> Config:
    """Of a pair with one block of 32 units: eight warps, beside whose CTA there is a place for one of the next launch.

    Its codes are on their way before the launch in front has ended; idle CTAs hold places for `HOLD` clocks, so that no
    multiprocessor gets two of one launch.
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


def _rings_of_two_places(case: Case) -> tuple[tuple[Ring, ...], int]:
    """Rings, most preferred first, and clocks for which idle CTAs hold places, as measured at 1024 to 4096 rows."""
    shape = case.shape
    if case.tokens == 2:
        # Integers of 4 bits were measured to gain more by fewer units.
        few = shape.bits < 5 and (shape.kind, shape.bits) != (INT, 4)
        return ((_ALL_UNITS, _MOST_UNITS), HOLD) if few else ((_MOST_UNITS,), 0)
    if case.side_by_side:
        return (_HALF if (shape.kind, shape.bits) == (INT, 3) else _ALL_UNITS, _MOST_UNITS), 0
    if shape.kind == CUT and shape.bits > 4:
        return (_MOST_UNITS,), HOLD
    if not _full(case):
        return (_HALF, _MOST_UNITS), HOLD  # more would be on its way to a few multiprocessors for both launches
    heavy = shape.kind == INT and shape.bits > 2
    return (_MOST_UNITS, _HALF) if heavy else (_ALL_UNITS, _MOST_UNITS, _HALF), HOLD


def held_for_few(case: Case, config: Config) -> Config:
    """`config` of two to eight tokens of one block by look-ups, whose idle CTAs hold places, where that pays.

    Zeros 0.83 to 1.0 of the time at 2560 to 4096 rows of 4096 columns, eight tokens of other codes but 3 bits 0.98;
    more columns and rows neither gain nor lose.
    """
    shape = case.shape
    idle = case.sms // config.cluster - config.clusters(case.blocks)
    one_block = config.cluster == 2 and config.blocks == 1 and not case.side_by_side
    if idle <= 0 or not one_block or config.digits or config.tokens not in (2, 4, 8) or config.hold:
        return config
    pays = shape.kind == UINT_U8 or (config.tokens == 8 and shape.kind in LOOKED_UP and shape.bits != 3)
    return replace(config, hold=HOLD) if pays else config
