"""Products of 16-bit values that are looked up or converted: their warps, outside of chains.

csrc/halves.cuh; of slices and sparse integers by integer products too, which share a CTA's work in the same way.
"""

from __future__ import annotations

from dataclasses import replace

from fdk.kernels.cuda.decode_choice.case import LOOKED_UP, Case, Share, few_codes_and_zeros
from fdk.kernels.cuda.decode_choice.digits import small_slices
from fdk.kernels.cuda.decode_config import TABLE, UINT_U8, Config, Shape


def lookup_warps(case: Case, share: Share, start: Config) -> tuple[int, int]:
    """(k_warps, row_warps): few tokens split k over warps, many give each block of rows warps of its own."""
    if case.tokens <= 4:
        if whole := _whole_steps(case, share):
            return whole
        warps, row_warps = _few_tokens(case, share, start)
        return min(max(4, warps // row_warps), share.units), row_warps
    warps, row_warps = _many_tokens(case.shape, share, start)
    return max(1, min(warps // row_warps, share.units)), row_warps


def _whole_steps(case: Case, share: Share) -> tuple[int, int] | None:
    """The same of two and four tokens, where steps of four of seven or nine blocks would leave warps without one."""
    shape = case.shape
    if not case.hopper or case.tokens == 1 or shape.nested or shape.sparse or shape.zeros or share.units < 8:
        return None
    if share.blocks == 9 and shape.bits > (4 if case.tokens == 2 else 2):
        return 4, 3
    # Seven at once leave two slices of k: enough for look-ups that take long, if k is.
    seven = share.blocks == 7 and share.cluster == 2 and share.units >= 64
    return (2, 7) if seven and (shape.bits, case.tokens) in ((8, 2), (7, 4)) else None


def _few_tokens(case: Case, share: Share, start: Config) -> tuple[int, int]:
    """(warps, row_warps) of up to four tokens: eight, but where more were measured to win."""
    shape, blocks = case.shape, share.blocks
    row_warps = 1 if blocks == 1 else 2 if blocks < 4 else 4
    single = case.tokens == shape.subs == 1
    if case.hopper and blocks == 5:
        four_bits = single and shape.bits == 4 and shape.kind in LOOKED_UP
        if four_bits or (shape.sparse and start.digits):
            return 20, 5  # two steps would leave a quarter of the warps with the second one
    if shape.nested:
        return _slices(case, share, start, row_warps)
    if single and share.work > 32 and (shape.bits >= 3 or (shape.zeros and blocks == 1)):
        # Look-ups of one code each hide their latency better behind more warps than behind more units per warp. Two
        # blocks go at once where scales come in one piece.
        at_once = replace(start, k_warps=8, row_warps=2).allows_scales_once(shape)
        at_once &= start.digits or not shape.sparse
        in_turn = blocks == 2 and not shape.zeros and not (case.hopper and at_once and share.units <= 64)
        return 16, 1 if in_turn else row_warps
    return 16 if zeros_fill_16_warps(shape, case.tokens, share) else 8, row_warps


def _slices(case: Case, share: Share, start: Config, row_warps: int) -> tuple[int, int]:
    """The same of slices, whose integer products take blocks in turn."""
    if start.digits:
        return 8 if small_slices(case.shape, share) else 16, 1
    # Codes that are computed hide no latency: more warps only keep more of few planes on their way.
    few_planes = case.tokens == 1 and case.shape.bits <= 4
    return 16 if few_planes and share.blocks == 1 and share.units > 32 else 8, row_warps


def zeros_fill_16_warps(shape: Shape, tokens: int, share: Share) -> bool:
    """Whether weights with zeros have work for 16 warps of two or four tokens: 8 to 16 units each."""
    fits = few_codes_and_zeros(shape) and tokens in (2, 4) and share.cluster == 1 and share.blocks <= 2
    return fits and 112 <= share.work <= 256


def _many_tokens(shape: Shape, share: Share, start: Config) -> tuple[int, int]:
    """(warps, row_warps) of eight tokens and more: each block of rows has warps of its own.

    Where those leave room, two of them and more share its slice of k.
    """
    tokens, blocks, bits = start.tokens, share.blocks, shape.bits
    row_warps = next(r for r in range(min(blocks, 8), 0, -1) if r == 1 or -(-blocks // r) * r <= blocks)
    few = tokens <= 16 and shape.lean and not shape.nested
    if few and not shape.sparse and (tokens, row_warps, share.cluster) == (8, 3, 2) and bits in (3, 4, 8):
        return 12, row_warps  # six are too few
    if few and (row_warps > 4 or _narrow(bits, row_warps, start)):
        return 16, row_warps
    # Zeros leave registers for 16 warps of eight tokens if codes take few.
    most_rows = 7 if shape.kind == UINT_U8 and bits == 4 else 4
    zeros = tokens == 8 and shape.zeros and shape.subs == 1 and bits <= 4 and 1 < row_warps <= most_rows
    return 16 if zeros else 8, row_warps


def _narrow(bits: int, row_warps: int, start: Config) -> bool:
    """Whether eight warps are too few although they have up to four blocks of rows at once."""
    if bits == 1:
        # By look-ups, at sixteen tokens, it would rather have four units a warp than twice as many warps.
        return row_warps not in ((1, 2, 4) if start.octets else (1, 2) if start.tokens == 16 else (1,))
    return bits > 4 and start.tokens == 16 and row_warps == 4


def within_registers_of_blackwell(case: Case, config: Config) -> Config:
    """`config` for which registers suffice on 10.0, where the compiler keeps too much for three bits in two steps."""
    crowded = (config.tokens, case.shape.bits, config.steps, case.shape.kind) == (1, 3, 2, TABLE)
    return replace(config, uniform=config.uniform or crowded)
