"""Integer products of one token at sizes that no rule of digits.py names: a CTA's blocks of rows one after the other.

csrc/digits.cuh; docs/findings.md: "Sizes of models".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fdk.kernels.cuda.decode_choice.case import INTEGERS, Case, Share, weights
from fdk.kernels.cuda.decode_choice.digit_rings import SINGLE, Ring
from fdk.kernels.cuda.decode_config import MAX_SHARED, Config, Shape

# From 2560 x 4096 on they were faster at every size that was measured, with 2 to 8 bits.
_LEAST_WEIGHTS = 1 << 23


def with_blocks_in_turn(case: Case, config: Config) -> Config:
    """`config` of one token of integers or slices by integer products, where it has look-ups or planes made values.

    Measured with 2, 3, 4, 6 and 8 bits, with zeros, and with slices of 2, 4 and 8 planes, at ten sizes of layers from
    2560 x 4096 to 34816 x 5120: 0.40 to 0.99 of the time.
    """
    shape = case.shape
    of_bytes = shape.nested or (shape.kind in INTEGERS and shape.bits > 1)
    if case.tokens > 1 or config.digits or not of_bytes or shape.subs > 1 or weights(shape) < _LEAST_WEIGHTS:
        return config
    for found in _arrangements(shape, config):
        slices = found.cluster * found.k_warps
        if shape.allows_stage_units(found.stage_units, slices) and found.shared_bytes(shape) <= MAX_SHARED:
            return found
    return config


def _arrangements(shape: Shape, config: Config) -> Iterator[Config]:
    """Configurations of the same share, most preferred first."""
    units = Share.of(shape, config).units
    k_warps = _warps(units)
    digits = replace(config, k_warps=k_warps, row_warps=1, digits=True, paired=True, uniform=True, alone=True)
    digits = replace(digits, min_ctas=1, hold=0, ahead=0, scales_once=False, x_sums=False, wide=False)
    digits = replace(digits, late=not shape.nested)
    for batch in (config.blocks, 1):
        for stage_units, stages in _rings(shape, config.blocks, units, k_warps):
            yield replace(digits, batch=batch, stages=stages, stage_units=stage_units)


def _warps(units: int) -> int:
    """Warps that split so many units: those that get as many each, fours of them before other numbers."""
    whole = [warps for warps in (16, 14, 12, 10, 8) if units % warps == 0]
    fours = [warps for warps in whole if warps > 8 and units // warps % 4 == 0]
    if units >= 128 and 16 in whole:
        return 16
    return next(iter(fours or whole), min(16 if units >= 40 else 8, units))


def _rings(shape: Shape, blocks: int, units: int, k_warps: int) -> list[Ring]:
    """(stage_units, stages), most preferred first."""
    each, rest = divmod(units, k_warps)
    if each == 2 and not rest:
        return [(1, 3), SINGLE]
    # Two units of more than 4 bits are more than the registers of 16 warps hold; one block is there before they gain.
    crowded = k_warps == 16 and (shape.bits > 4 or (blocks == 1 and each == 4))
    return [(1, 2), SINGLE] if rest or each % 2 or crowded else [(2, 2), (1, 2), SINGLE]
