"""Integer products of one token, and of two of one bit, outside of chains: where they pay, and their warps.

csrc/digits.cuh. Measured on an H200 at 4096^2 to 28672 x 8192; docs/findings.md: "Half the sums of integer products",
"Integers of every width by integer products", "What is chosen since the open sets were answered", "Integer products for
slices", "Integer products for 16:32 sparse integers".
"""

from __future__ import annotations

from dataclasses import replace

from fdk.kernels.cuda.decode_choice.case import INTEGERS, LARGE, LOOKED_UP, MIDDLE, Case, Share, coded, weights
from fdk.kernels.cuda.decode_config import INT, UINT_U8, Config, Shape


def with_digits(case: Case, share: Share, start: Config) -> Config:
    """`start` of one or two tokens, outside of chains, by integer products where they pay."""
    shape, hopper = case.shape, case.hopper
    if coded(shape):
        if hopper and case.tokens == 1 and shape.allows_digits and _pay_by_bytes(shape, share):
            return replace(start, digits=True, paired=True, uniform=shape.nested and share.blocks <= 2)
    elif case.tokens == 1 and shape.allows_digits and _pay(case, share):
        # Not where that lets more CTAs of small weights with zeros share a multiprocessor.
        uniform = hopper and (case.large or not shape.zeros or shape.bits not in (1, 2, 4))
        return replace(start, digits=True, paired=True, uniform=uniform, late=case.large)
    elif case.tokens == 2 and _pay_for_two(shape, share):
        return replace(start, digits=True, paired=True, uniform=hopper, late=True)
    return start


def small_slices(shape: Shape, share: Share) -> bool:
    """Whether a CTA has one block of at most 32 units of slices, as at 4096^2, where they have been measured."""
    return shape.nested and share.blocks == 1 and share.units <= 32 and weights(shape) >= MIDDLE


def _pay_by_bytes(shape: Shape, share: Share) -> bool:
    """Whether they pay for slices and sparse integers, whose bytes are made from planes or masks."""
    # Of fewer weights digits cost what bytes save.
    return shape.sparse or small_slices(shape, share) or (share.work >= 112 and share.blocks <= 8)


def _pay(case: Case, share: Share) -> bool:
    """Whether they pay for one token of one bit or of integers; where not measured, not."""
    shape = case.shape
    if shape.bits == 1:
        return case.large or shape.kind in LOOKED_UP
    if shape.bits not in (2, 4, 8):
        return case.hopper and _unaligned_pay(shape, share)
    if case.large:
        return (case.hopper and in_turn(shape, share)) or _large_pay(shape, share)
    return _small_pay(shape, share)


def _unaligned_pay(shape: Shape, share: Share) -> bool:
    """The same for codes that lie across bytes: as those of 8 bits, where they have been measured."""
    if shape.kind not in INTEGERS or weights(shape) < MIDDLE:
        return False
    one_block = share.blocks == 1 and (weights(shape) >= LARGE or share.units <= 32)
    return one_block or in_turn(shape, share)


def _large_pay(shape: Shape, share: Share) -> bool:
    """The same for 2, 4 and 8 bits of large weights, of which look-ups of much work wait for memory alone."""
    if shape.kind not in INTEGERS or (shape.kind == INT and shape.bits == 4 and share.units > 128):
        return False
    side_by_side = share.cluster == 1 and share.blocks == 2
    side_by_side &= share.units <= 64 or (shape.kind == UINT_U8 and shape.bits == 8)
    return shape.bits == 2 or share.blocks == 1 or side_by_side


def _small_pay(shape: Shape, share: Share) -> bool:
    """The same for 2, 4 and 8 bits of smaller weights."""
    if shape.bits == 8:
        return True
    if shape.kind == INT:
        return shape.bits == 2 or share.units <= 32
    return shape.kind == UINT_U8 and share.units <= 32 and share.blocks == 1 and weights(shape) >= MIDDLE


def _pay_for_two(shape: Shape, share: Share) -> bool:
    """The same for two tokens of one bit, which fill the columns of a product: from 128 units a CTA on."""
    one_bit = shape.bits == 1 and shape.kind in LOOKED_UP and shape.subs == 1
    return one_bit and share.work >= 128 and (share.cluster == 1 or share.blocks >= 4) and share.blocks <= 8


# (blocks, units) of a CTA where fewer than 384 units in all gained, at 14336 x 4096 and, by eight warps, 20480 x 5120;
# of each kind the bits that did.
IN_TURN = {
    (2, 64): {INT: (3, 4, 5, 6, 7, 8), UINT_U8: (3, 5, 6, 7)},
    (5, 40): {INT: (2, 3, 5, 6, 7, 8), UINT_U8: (2, 3, 4, 5, 6, 7, 8)},
}


def in_turn(shape: Shape, share: Share) -> bool:
    """Whether 16 warps take several blocks of a CTA one after the other in integer products of one token.

    Besides `IN_TURN` at 16384^2 and 28672 x 8192: 384 to 512 units in two to seven blocks, of 2 bits and more.
    """
    if shape.kind not in INTEGERS:
        return False
    if measured := IN_TURN.get((share.blocks, share.units)):
        return shape.bits in measured[shape.kind]
    return shape.bits > 1 and 2 <= share.blocks <= 7 and share.units >= 64 and 384 <= share.work <= 512


def digit_warps(shape: Shape, share: Share, hopper: bool) -> tuple[int, int]:
    """(k_warps, row_warps) of what is neither nested nor sparse, outside of chains; 16 warps where they have work."""
    blocks, units = share.blocks, share.units
    one_bit = shape.bits == 1 and shape.kind in LOOKED_UP
    if blocks == 1:
        if 112 <= units < 128 and (one_bit or shape.bits > 1):
            return 14, 1  # of seven or eight units, not 16 of seven and less
        return 16 if units >= (128 if shape.bits <= 2 else 64) else min(8, units), 1
    if hopper and in_turn(shape, share):
        return 16 if units % 16 == 0 else 8, 1
    row_warps = blocks if blocks <= (8 if one_bit else 4) else 4
    return min(16 // row_warps, units), row_warps
