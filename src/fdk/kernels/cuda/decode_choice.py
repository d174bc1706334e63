"""Which tile configuration the decode kernel takes for a weight and up to 64 tokens: rules, as measured on an H200."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from fdk.kernels.cuda.decode_config import (
    INT,
    MAX_SHARED,
    PLAIN,
    ROUNDED,
    SHARED_PER_CTA_EXTRA,
    TABLE,
    UINT_FLOAT,
    UINT_U8,
    Config,
    Epilogue,
    Shape,
    clusters_at_once,
    max_shared,
)


def token_tile(m: int) -> int:
    """Tokens that the kernel serving m is compiled for."""
    return next(tile for tile in (1, 2, 4, 8, 16, 32, 64) if m <= tile)


# Preference among cluster sizes at equal balance: sums travel further in larger ones, activations less far.
_CLUSTER_WORTH_FEW = {1: 1.0, 2: 0.97, 4: 0.5, 8: 0.45}

_CLUSTER_WORTH_MANY = {1: 0.9, 2: 1.0, 4: 0.66, 8: 0.55}


def _bytes_pay(shape: Shape, tokens: int, blocks: int, cta_units: int) -> bool:
    """Whether integer products of slices and of sparse integers, whose bytes are made from planes or masks, pay.

    Measured on an H200, 2026-11-22, at 4096^2 to 28672 x 8192: docs/findings.md.
    """
    if tokens > 1 or not shape.allows_digits:
        return False
    # Of fewer weights digits cost what bytes save.
    enough = _small_slices(shape, blocks, cta_units) or (cta_units * blocks >= 112 and blocks <= 8)
    return shape.sparse or (shape.nested and enough)


def _small_slices(shape: Shape, blocks: int, cta_units: int) -> bool:
    """Whether a CTA has one block of at most 32 units of slices, as at 4096^2, where they have been measured."""
    return shape.nested and blocks == 1 and cta_units <= 32 and shape.n * shape.k >= 1 << 24


def _few_codes_and_zeros(shape: Shape) -> bool:
    """Whether zeros and codes of a unit take few enough registers for 16 warps of two to eight tokens."""
    return shape.kind == UINT_U8 and 2 <= shape.bits <= 4 and shape.subs == 1


def _zeros_fill_16_warps(shape: Shape, config: Config, cta_units: int) -> bool:
    """Whether weights with zeros have work for 16 warps of two or four tokens: 8 to 16 units each."""
    fits = _few_codes_and_zeros(shape) and config.tokens in (2, 4) and config.cluster == 1 and config.blocks <= 2
    return fits and 112 <= cta_units * config.blocks <= 256


def _warps(shape: Shape, config: Config, cta_units: int, hopper: bool) -> tuple[int, int]:
    """(k_warps, row_warps): few tokens split k over warps, many give each block of rows warps of its own."""
    tokens, blocks = config.tokens, config.blocks
    if tokens <= 4:
        row_warps = 1 if blocks == 1 else 2 if blocks < 4 else 4
        warps = 8
        four_bits = shape.bits == 4 and shape.kind in (TABLE, INT) and tokens == shape.subs == 1
        if hopper and blocks == 5 and (four_bits or (shape.sparse and config.digits)):
            # Two steps would leave a quarter of the warps with the second one.
            warps, row_warps = 20, 5
        elif shape.nested and config.digits:
            warps, row_warps = 8 if _small_slices(shape, blocks, cta_units) else 16, 1
        elif shape.nested:
            # Codes that are computed hide no latency: more warps only keep more of few planes on their way.
            warps = 16 if tokens == 1 and shape.bits <= 4 and blocks == 1 and cta_units > 32 else 8
        elif (
            tokens == shape.subs == 1 and cta_units * blocks > 32 and (shape.bits >= 3 or (shape.zeros and blocks == 1))
        ):
            # Look-ups of one code each hide their latency better behind more warps than behind more units per warp. Two
            # blocks go at once where scales come in one piece.
            at_once = replace(config, k_warps=8, row_warps=2).allows_scales_once(shape)
            at_once &= config.digits or not shape.sparse
            in_turn = blocks == 2 and not shape.zeros and not (hopper and at_once and cta_units <= 64)
            warps, row_warps = 16, 1 if in_turn else row_warps
        elif _zeros_fill_16_warps(shape, config, cta_units):
            warps = 16
        return min(max(4, warps // row_warps), cta_units), row_warps
    row_warps = next(r for r in range(min(blocks, 8), 0, -1) if r == 1 or -(-blocks // r) * r <= blocks)
    # Each block of rows has warps of its own: where those leave room, two of them and more share its slice of k.
    few = tokens <= 16 and shape.lean and not shape.nested
    # One bit by look-ups, at sixteen tokens, would rather have four units a warp than twice as many warps.
    eight_do = (1, 2, 4) if config.octets else (1, 2) if tokens == 16 else (1,)
    narrow = (shape.bits == 1 and row_warps not in eight_do) or (shape.bits > 4 and tokens == 16 and row_warps == 4)
    # Zeros leave registers for 16 warps of eight tokens if codes take few.
    zeros = shape.zeros and shape.subs == 1 and tokens == 8 and shape.bits <= 4
    zeros &= 1 < row_warps <= (7 if shape.kind == UINT_U8 and shape.bits == 4 else 4)
    warps = 16 if zeros or (few and (row_warps > 4 or narrow)) else 8
    if few and not shape.sparse and (tokens, row_warps, config.cluster) == (8, 3, 2) and shape.bits in (3, 4, 8):
        warps = 12  # six are too few
    return max(1, min(warps // row_warps, cta_units)), row_warps


def _in_turn(shape: Shape, blocks: int, cta_units: int) -> bool:
    """Whether 16 warps take several blocks of a CTA one after the other in integer products of one token.

    Measured on an H200, 2026-11-22, at 14336 x 4096, 16384^2 and 28672 x 8192; at 20480 x 5120 eight warps do, but for
    4 bits without zeros: docs/findings.md.
    """
    if shape.kind not in (INT, UINT_U8) or shape.bits == 1:
        return False
    if (blocks, cta_units) == (2, 64):
        return shape.bits >= 3 and (shape.kind == INT or shape.bits not in (4, 8))
    if (blocks, cta_units) == (5, 40):
        return shape.zeros or shape.bits != 4
    return 2 <= blocks <= 7 and cta_units >= 64 and 384 <= cta_units * blocks <= 512


def _digits_pay(shape: Shape, cluster: int, blocks: int, cta_units: int, large: bool, hopper: bool) -> bool:
    """Whether integer products serve one token of a weight faster, outside of chains; where not measured, not."""
    if shape.bits == 1:
        return large or shape.kind in (TABLE, INT)
    if shape.bits not in (2, 4, 8):
        # Codes that lie across bytes: as those of 8 bits, where they have been measured.
        if not hopper or shape.kind not in (INT, UINT_U8) or shape.n * shape.k < 1 << 24:
            return False
        return (blocks == 1 and (large or cta_units <= 32)) or _in_turn(shape, blocks, cta_units)
    if hopper and large and _in_turn(shape, blocks, cta_units):
        return True
    if not large:
        if shape.kind == UINT_U8 and shape.bits < 8:
            return cta_units <= 32 and blocks == 1 and shape.n * shape.k >= 1 << 24
        if shape.bits == 4:
            return shape.kind == INT and cta_units <= 32
        return shape.kind == INT or shape.bits == 8
    if shape.kind not in (INT, UINT_U8):
        return False
    two_blocks = cluster == 1 and blocks == 2 and (cta_units <= 64 or (shape.bits == 8 and shape.zeros))
    if shape.bits == 4 and not shape.zeros and cta_units > 128:
        return False
    # Of more work look-ups of 4 and 8 bits wait for memory alone.
    return shape.bits == 2 or blocks == 1 or two_blocks


def _two_digits_pay(shape: Shape, cluster: int, blocks: int, cta_units: int) -> bool:
    """The same for two tokens, which fill the columns of a product; at 8192^2, 14336 x 4096 and 28672 x 8192."""
    one_bit = shape.bits == 1 and shape.kind in (TABLE, INT) and shape.subs == 1
    return one_bit and cta_units * blocks >= 128 and (cluster == 1 or blocks >= 4) and blocks <= 8


def _digit_warps(shape: Shape, blocks: int, cta_units: int, hopper: bool) -> tuple[int, int]:
    """(k_warps, row_warps) of integer products, outside of chains; 16 warps where they have work."""
    one_bit = shape.bits == 1 and shape.kind in (TABLE, INT)
    if blocks == 1:
        few = 128 if shape.bits <= 2 else 64
        even = 112 <= cta_units < 128 and (one_bit or shape.bits > 1)
        return (14 if even else 16 if cta_units >= few else min(8, cta_units)), 1
    if hopper and _in_turn(shape, blocks, cta_units):
        return 16 if cta_units % 16 == 0 else 8, 1
    row_warps = blocks if blocks <= (8 if one_bit else 4) else 4
    return min(16 // row_warps, cta_units), row_warps


def _chain_warps(config: Config, shape: Shape, cta_units: int) -> tuple[int, int]:
    """(k_warps, row_warps) in a chain, where a CTA has its multiprocessor to itself: 8 to 16 warps keep it busy.

    Measured in the step of custom-llama-4B on an H200, 2026-11-21; docs/findings.md.
    """
    tokens, blocks = config.tokens, config.blocks
    work, least = cta_units * blocks, 2 if config.epilogue.gated else 1
    if not config.alone:
        most = 8
    elif tokens <= 4:
        most = 16 if work > (64 if shape.bits == 1 else 32) else 8
    else:
        # Two sums of an output, scales inside a unit, zeros and planes leave registers for 12 warps of many tokens.
        light = shape.lean and not shape.nested and not config.epilogue.gated
        # One bit by look-ups of eight codes is as busy with 8 warps on two blocks, which have two stages each.
        few = config.octets and blocks <= 2 and work < 96
        most = 8 if work <= 64 or few else 16 if light else 12
    whole = [r for r in range(least, min(blocks, 8) + 1, least) if -(-blocks // r) * r <= blocks] or [least]
    row_warps = max(whole, key=lambda r: (most // r * r if tokens > 4 else 0, r))
    most = min(max(1, most // row_warps), cta_units)
    stage = 4 if shape.bits == 1 else 1
    if config.digits and most > 8 and (even := [w for w in range(most, 7, -1) if cta_units % (stage * w) == 0]):
        # Stages of four units are waited for a quarter as often.
        return even[0], row_warps
    # The fewest warps with which the longest share of k is as short.
    share = -(-cta_units // most)
    return -(-cta_units // share), row_warps


def _alone(shape: Shape, config: Config, cta_units: int) -> bool:
    """Whether CTAs of nested weights, which have no table, or of zeros need their multiprocessor to themselves.

    Where two fit, launches of large weights took 1.3 to 1.7 times as long: docs/findings.md.
    """
    large = cta_units * config.blocks > 64
    if shape.zeros:
        return large and config.tokens <= 8 and config.warps <= 8
    return shape.nested and large and config.tokens <= 4


def _rings_of_bytes(shape: Shape, config: Config) -> list[tuple[int, int]] | None:
    """(stage_units, stages) in order of preference of integers of one token by integer products, where measured.

    That is of blocks in turn, at 14336 x 4096, 16384^2, 28672 x 8192 and 20480 x 5120, and of 3 and 5 to 7 bits.
    """
    bits, aligned = shape.bits, shape.bits in (1, 2, 4, 8)
    if config.blocks > 1:
        if config.row_warps > 1 or bits == 1:
            return None
        if config.k_warps == 8:
            return [(1, 3), (1, 2), (1, 1)]
        whole_slices = config.cluster == 1 and not shape.zeros
        first = {2: [(4, 2), (2, 2)] if whole_slices else [(2, 2)], 3: [] if shape.zeros else [(2, 1)], 4: [(2, 2)]}
        return [*first.get(bits, []), (1, 2), (1, 1)]
    if aligned:
        return None
    if shape.zeros or (bits == 3 and config.k_warps == 14):
        few = shape.units <= 4 * config.cluster * config.k_warps
        return [*([(1, 4)] if few else []), (1, 2), (1, 1)]
    if config.k_warps > 14:
        return [(2, 1), (1, 2), (1, 1)] if bits == 3 else [(1, 3), (1, 2), (1, 1)]
    return [(2, 2), (1, 2), (1, 1)]


def _stages(shape: Shape, config: Config) -> list[tuple[int, int]]:
    """(stage_units, stages) in order of preference."""
    per_warp = config.steps * -(-shape.units // (config.cluster * config.k_warps))
    integers = config.digits and shape.kind in (INT, UINT_U8) and config.epilogue == PLAIN and config.tokens == 1
    if integers and (rings := _rings_of_bytes(shape, config)):
        return rings
    if config.indices:
        if shape.bits == 2 and (per_warp <= 4 or per_warp % 4):
            return [(2, 2)]
        # Where everything would be on its way from the start, half of it first is faster.
        return [(4, 2 if per_warp > 8 else 1)]
    if shape.zeros:
        if config.digits and config.epilogue == PLAIN and config.blocks == 1:
            few = config.k_warps > 14 and shape.bits != 4
            first = (2, 1) if few else (1, 2) if shape.bits in (1, 8) else (2, 2)
            return [first, (1, 2), (1, 1)]
        if _few_codes_and_zeros(shape) and config.tokens in (2, 4) and per_warp == 4 and config.epilogue == PLAIN:
            return [(1, 4 if shape.bits == 2 else 3), (1, 2), (1, 1)]
        if config.digits and config.epilogue.gated and config.warps <= 12:
            return [(1, 3), (1, 2), (1, 1)]
        if shape.subs > 1 or config.tokens > 8 or config.digits or config.epilogue != PLAIN:
            return [(1, 2), (1, 1)]
        if config.tokens == 1 and per_warp <= 4 and shape.bits <= 4:
            return [(1, 4), (1, 2), (1, 1)]  # everything is on its way before the launch in front has ended
        return [(1, 1)] if config.warps > 8 and config.steps == 1 else [(1, 2), (1, 1)]
    if config.digits and shape.nested:
        if _small_slices(shape, config.blocks, -(-shape.units // config.cluster)):
            return [(2, 2), (1, 2), (1, 1)] if shape.bits <= 5 else [(1, 2), (1, 1)]
        # Registers of 16 warps do not hold two units of seven planes beside where the next block starts.
        return [(2, 1), (1, 2), (1, 1)][shape.bits > 6 and config.steps > 1 :]
    if config.digits and not shape.sparse:
        if config.alone and shape.bits == 1 and config.epilogue.gated and per_warp > 12:
            # Several blocks a CTA: what is on its way for all of them at once delays their activations.
            return [(4, 1 if config.warps > 12 else 2), (2, 3), (1, 4), (1, 2), (1, 1)]
        if config.alone:
            found = [(4, 3), (2, 3), (1, 4), (1, 2), (1, 1)] if shape.bits == 1 else [(1, 3), (1, 2), (1, 1)]
            return found[config.warps > 12 :]
        single = config.blocks == 1 and config.k_warps > 8
        if shape.bits == 1 and config.tokens == 1:
            # More on its way before the launch in front has ended only delays activations.
            first = (2, 2) if single and config.cluster > 1 else (4, 2 if config.steps > 1 else 1)
            return [first, (2, 2), (1, 4), (1, 2), (1, 1)]
        if shape.bits == 1 and config.blocks > 1:
            return [(4, 1), (2, 1), (1, 2), (1, 1)]
        if single and (config.k_warps <= 14 or shape.bits == 4):
            return [(1 if shape.bits == 8 else 2, 2), (1, 2), (1, 1)]
        return [(2, 1) if single else (1, 3) if shape.bits == 4 else (2, 2), (1, 3), (1, 2), (1, 1)]
    if config.warps > 8 and (config.row_warps <= 2 or config.warps > 16) and (config.tokens == 1 or config.alone):
        return [(1, 1)]
    if config.warps > 12 and config.alone:
        # 128 registers are not enough for two units.
        return [(1, 2), (1, 1)]
    if config.tokens <= 4 and per_warp <= 4:
        # Everything is on its way before the launch in front has ended.
        if shape.bits == 1:
            return [(2, 2), (1, 4), (1, 2), (1, 1)]
        return [(1, {2: 4, 3: 4, 4: 3}.get(shape.bits, 1 if shape.nested else 2)), (1, 1)]
    two_blocks = config.cluster == config.row_warps == config.blocks == 2 and config.epilogue == PLAIN
    if shape.nested and config.tokens == 16 and two_blocks and shape.bits > 2 and shape.subs == 1:
        # Codes of so many tokens are computed for long, in which one stage of eight warps leaves memory idle.
        return [(2, 2), (2, 1), (1, 1)] if shape.bits <= 4 else [(1, 2), (1, 1)]
    if shape.nested and shape.bits > 4 and config.tokens == 1:
        return [(1, 3), (1, 2), (1, 1)] if config.alone else [(1, 1)]
    if shape.bits == 1:
        if config.tokens <= 4:
            return [(4, 1), (2, 1), (1, 2)]
        if config.octets and not config.alone:
            return [*([(4, 1)] if config.warps <= 8 else []), *([(2, 1)] if config.warps < 16 else []), (1, 2)]
        crowded = config.row_warps > 4 and config.tokens >= 16 and not config.alone
        # Two units beside the sums of 32 tokens are more than registers hold.
        crowded |= config.tokens == 32
        return [(1, 2)] if crowded else [(2, 1), (1, 2)]
    if shape.bits <= 4 and config.tokens <= 16:
        # Two units at once take more registers than 16 warps leave in these cases.
        wide = config.tokens == 16 or (shape.bits, config.tokens) in ((4, 1), (2, 8))
        wide |= (shape.bits, config.tokens, config.cluster) == (4, 8, 2) and config.warps > 12
        return [(1, 2), (1, 1)] if config.warps > 8 and wide and not config.alone else [(2, 1), (1, 2), (1, 1)]
    if _eight_bits_fill_up(shape, config) or (shape.bits == 8 and (config.tokens, config.row_warps) == (8, 3)):
        return [(1, 1)]  # and a wide table beside it
    return [(1, 2), (1, 1)] if config.tokens <= 4 or (config.tokens < 16 and config.warps > 8) else [(1, 1)]


def _eight_bits_fill_up(shape: Shape, config: Config) -> bool:
    """Whether eight tokens of 8 bits have as many warps as registers allow, outside of chains."""
    few = config.tokens == 8 and config.epilogue == PLAIN and shape.kind == TABLE and shape.subs == 1
    return few and shape.bits == 8 and config.warps > 12 and config.cluster == 2


def _x_chunks(shape: Shape, config: Config, hopper: bool) -> int:
    """Pieces that a slice's activations come in; one where sums of them are needed first.

    Of eight tokens at least 64 units a CTA, measured on an H200, 2026-11-22: less is here before products begin.
    """
    slices = config.cluster * config.phases * config.k_warps
    if config.tokens < 8 or config.phases > 1 or shape.zeros or shape.units % slices:
        return 1
    mine, least = shape.units // slices, 4
    if config.tokens == 8:
        # One bit adds up activations in the loop where a warp has few units, else before it.
        least = config.stage_units if shape.bits == 1 else 4
        few = shape.units < 64 * config.cluster
        if shape.bits == 1:
            few = mine > 16 or (few and mine < 8)
        if few or config.epilogue != PLAIN or shape.nested or shape.sparse or shape.subs > 1 or not hopper:
            return 1
    return next((n for n in (4, 3, 2) if mine % (n * config.stage_units) == 0 and mine >= least * n), 1)


def _with_loads(shape: Shape, config: Config) -> Config:
    """`config` with how its scales, codes and sums of activations come to its warps; on an H200: docs/findings.md."""
    if config.digits and (shape.nested or shape.sparse):
        small = _small_slices(shape, config.blocks, -(-shape.units // config.cluster))
        once = config.allows_scales_once(shape) and not small
        return replace(config, scales_once=once, bulk=not shape.sparse)
    if config.epilogue != PLAIN or config.digits or config.indices or config.tokens > 8:
        return config
    slices = config.cluster * config.phases * config.k_warps
    units_per_warp = config.steps * -(-shape.units // slices)
    # Four more products a unit cost less than a pass over x and a barrier of the CTA while a warp has few units.
    own_sums = shape.zeros or (shape.bits == 1 and shape.kind in (TABLE, INT))
    config = replace(config, x_sums=own_sums and shape.subs == 1 and units_per_warp <= 16)
    # Scales in one piece halve the copies of a warp that refills single units, which pays from the second refill on.
    refills = units_per_warp - config.stages if config.stage_units == 1 else 0
    pays = units_per_warp >= 8 and _few_codes_and_zeros(shape) if shape.zeros else True
    if pays and refills >= 2 and units_per_warp <= 16 and config.allows_scales_once(shape):
        # Without small copies, sparse weights come faster by cp.async, whose refills no fence holds up.
        return replace(config, scales_once=True, bulk=not shape.sparse or config.tokens > 1)
    return config


def _fill(shape: Shape, config: Config, capability: tuple[int, int]) -> Config | None:
    """`config` with the ring, phases and batch that shared memory allows, or None."""
    hopper, most_shared = capability >= (9, 0), max_shared(capability)
    batches = (config.steps, 1) if config.tokens == 1 else (1,)
    for phases in (1, 2, 4, 8, 16):
        if phases > 1 and (
            config.steps > 1 or config.digits or shape.units % (config.cluster * phases * config.k_warps)
        ):
            continue
        slices = config.cluster * phases * config.k_warps
        for stage_units, stages in _stages(shape, config):
            if not shape.allows_stage_units(stage_units, slices):
                continue
            for batch in batches:
                filled = replace(config, phases=phases, stage_units=stage_units, stages=stages, batch=batch)
                filled = replace(filled, x_chunks=_x_chunks(shape, filled, hopper))
                if hopper:
                    filled = _with_loads(shape, filled)
                shared = filled.shared_bytes(shape, hopper)
                if shared <= most_shared:
                    per_warp = config.steps * -(-shape.units // slices)
                    # Two CTAs of 16 warps would spill in 64 registers a thread, and zeros of several groups in 128.
                    crowded = config.warps > 8 or (shape.kind == UINT_FLOAT and shape.subs > 1)
                    # Beside it a CTA of the next launch can start.
                    half = (most_shared + SHARED_PER_CTA_EXTRA) // 2 - SHARED_PER_CTA_EXTRA
                    fits = shared <= half and not crowded and not config.alone
                    beside = hopper and config.tokens == 1 and per_warp <= 4 and fits
                    return replace(filled, min_ctas=2 if beside else 1)
    return None


def _allows_indices(shape: Shape, tokens: int, capability: tuple[int, int], equal_indices: bool) -> bool:
    """Whether sparse products have been measured to win: two bits from 2048 x 4096 on, one bit at 4096^2.

    At two bits they are bound by the tensor cores, at 60 clocks a unit against 86 of look-ups; at one bit integer
    products have fewer, once their digits are made.
    """
    if tokens > 1 or capability != (9, 0) or not shape.allows_indices or shape.kind not in (TABLE, INT):
        return False
    weights, large = shape.n * shape.k, 1 << 25
    if shape.bits == 2:
        return equal_indices and shape.kind == TABLE and weights >= large // 4
    return large // 2 <= weights < large


def _with_indices(shape: Shape, start: Config, cta_units: int) -> Config | None:
    """`start` with sparse products and their warps: whole stages of two or four units; None if those are few."""
    blocks = start.blocks
    row_warps = max(range(1, min(blocks, 8) + 1), key=lambda r: (blocks / -(-blocks // r) / r, r))
    stage = 2 if shape.bits == 2 and blocks == 1 else 4
    slices = [warps for warps in range(1, 16 // row_warps + 1) if cta_units % (stage * warps) == 0]
    k_warps = 8 if 8 in slices else max(slices, default=0)
    large = shape.n * shape.k >= 1 << 25
    if k_warps * row_warps < 8 or (shape.bits == 2 and not large and k_warps != 8):
        return None
    alone = large or (shape.bits == 2 and cta_units * blocks > 32)
    return replace(start, indices=True, k_warps=k_warps, row_warps=row_warps, alone=alone, uniform=large)


def _with_wide_table(shape: Shape, config: Config, capability: tuple[int, int]) -> Config:
    """`config` with a wide table where four tokens and more were measured to gain by it.

    That is where activations come in no more parts for it, or many blocks of rows share them; of fewer than sixteen
    tokens where a CTA has work for longer than the table takes to fill.
    """
    many = config.tokens == 16 and shape.bits in (4, 8) and shape.kind in (TABLE, INT)
    # Fourteen warps of one unit at 4 bits were measured with a wide table only, which integers fill like tables.
    crowded = (config.tokens, shape.bits, shape.kind) == (8, 4, INT) and config.warps > 12
    busy = -(-shape.units // config.cluster) * config.blocks >= 128 and (shape.kind == TABLE or crowded)
    most_blocks = {4: {4: 1}, 8: {2: 7, 4: 7, 8: 2}}.get(config.tokens, {}).get(shape.bits, 0)
    busy &= config.blocks <= most_blocks or _eight_bits_fill_up(shape, config)
    if not (many or busy) or shape.subs > 1 or capability < (9, 0):
        return config
    wide = _fill(shape, replace(config, wide=True), capability)
    if wide is None or (wide.stages, wide.stage_units) != (config.stages, config.stage_units):
        return config
    return wide if wide.phases == config.phases or config.row_warps > 4 else config


def _with_operands_ahead(shape: Shape, config: Config) -> Config:
    """`config` of one token whose warps make operands of their first units ahead of activations, where that pays.

    Measured on an H200, 2026-11-22: tables of 3, 4 and 8 bits at 8192^2, 14336 x 4096 and 4096 x 14336, sparse integers
    at 8192^2 and 20480 x 5120, slices of 2 and 4 bits at 8192^2; docs/findings.md.
    """
    one_stage = config.tokens == config.steps == config.stages == shape.subs == 1 and shape.k % 64 == 0
    busy = -(-shape.units // config.cluster) * config.blocks >= 112
    if not one_stage or not busy or config.indices or config.warps < 16:
        return config
    if shape.sparse:
        return replace(config, ahead=1) if config.digits and config.scales_once else config
    if shape.nested:
        fits = config.digits and config.cluster == config.blocks == 1 and shape.units == 128 and shape.bits <= 5
        return replace(config, ahead=2) if fits else config
    if config.digits or shape.zeros or shape.bits < 3 or not config.scales_once:
        return config
    return replace(config, uniform=True, ahead=3 if config.warps == 16 else 1)


_MOST_HOLD = 8000


def hold_clocks(shape: Shape) -> int:
    """Clocks for which CTAs without work keep their places: most of the time that the weights take to arrive.

    At least until the next launch has filled the others' places; kept for longer than a launch takes, they delay it.
    """
    code_bytes = shape.n * shape.k * shape.bits // 8
    clocks = 0.8 * (code_bytes + shape.groups * shape.n * 2) * _CLOCKS_PER_BYTE
    return min(max(2500, int(clocks)), _MOST_HOLD)


# At 1.75 GHz and 4.8 TB/s, those of an H200.
_CLOCKS_PER_BYTE = 1.75e9 / 4.8e12


def _beside(shape: Shape, config: Config, idle: int) -> Config:
    """`config` with a second CTA, of the next launch, beside one token's, where places that idle ones hold pay.

    idle: clusters that find no work. Measured on an H200, 2026-11-22, at 4096^2 and, for tables, 8192^2 and
    4096 x 14336.
    """
    if idle <= 0 or config.tokens > 1 or shape.kind not in (TABLE, UINT_U8) or shape.n * shape.k < 1 << 24:
        return config
    if config.digits and shape.zeros and shape.bits not in (1, 2, 4, 8):
        return replace(config, min_ctas=1)
    selected = shape.kind == TABLE and (config.digits or config.indices) and shape.allows_stage_units(4, 8)
    if selected and config.cluster == config.blocks == 1 and shape.units == 128:
        stages = 3 if config.digits else 2
        two = replace(config, k_warps=8, stages=stages, stage_units=4, alone=False, min_ctas=2)
        # With 1500 to 5000 clocks some launches took 1.25 to 1.5 times as long.
        return replace(two, hold=_MOST_HOLD)
    if selected and config.digits and (config.cluster, config.blocks, shape.units) == (2, 1, 224):
        return replace(config, k_warps=7, stages=3, stage_units=4, min_ctas=2, hold=4000)
    if config.min_ctas == 1 and (config.alone or not config.paired or shape.kind != TABLE):
        return config
    late = config.late or (shape.kind == TABLE and shape.bits > 4)
    return replace(config, hold=hold_clocks(shape), late=late)


def _with_two_places(shape: Shape, config: Config, blocks: int) -> Config:
    """`config` of one bit in a chain, beside a CTA of the next launch in the pair gate/up and *down* of 4096 x 14336.

    Measured in the step of custom-llama-12B on an H200, 2026-11-22: there only, since it loses in other pairs of
    launches, and at 6144 x 21504; docs/findings.md.
    """
    if not config.paired or shape.bits > 1:
        return config
    if shape.kind in (TABLE, INT) and (shape.units, blocks) == (64, 96) and config.epilogue.squares:
        # Query/key/value between *down*, whose places are held, and attention: beside either.
        return replace(config, alone=False)
    measured = shape.kind in (TABLE, INT) and (shape.units, blocks) in ((64, 448), (224, 64))
    if not measured or not shape.allows_stage_units(4, 14 if config.cluster == 2 else 4):
        return config
    beside = replace(config, stage_units=4, stages=2, alone=False, min_ctas=2, hold=2000)
    if config.epilogue.gated and config.cluster == 1:
        return replace(beside, k_warps=4, row_warps=2, batch=2)
    return replace(beside, k_warps=7) if config.epilogue.residual and config.cluster == 2 else config


def _kept_apart_by_registers(config: Config) -> Config:
    """`config` of one bit and one token in a chain, not alone by shared memory where registers see to that.

    That is where 11 warps and more have stages of four units, 88 to 96 registers a thread: gate/up begins beside the
    output product, query/key/value beside *down*. Measured in the steps of custom-llama-4B (0.96) and 31B (1.00) on an
    H200, 2026-11-22: docs/findings.md.
    """
    full = config.paired and config.warps >= 11 and config.stage_units == 4
    fits = full and (config.epilogue.gated or config.epilogue.residual)
    return replace(config, alone=False) if fits else config


def _with_operands_ahead_in_chain(shape: Shape, config: Config) -> Config:
    """`config` of a table of 4 bits and one token in a chain whose warps make first operands ahead of activations.

    Measured in the steps of custom-llama-4B (gate/up 0.957, output 0.986), 12B (0.963) and 31B (0.978) on an H200,
    2026-11-22: docs/findings.md.
    """
    single = config.steps == config.tokens == config.phases == shape.subs == 1 and shape.k % 64 == 0
    if not single or config.digits or (shape.bits, shape.kind) != (4, TABLE):
        return config
    if config.epilogue.gated:
        # Registers, 80 and 96 a thread, keep its CTAs apart, so that they begin beside the output product's.
        beside = replace(config, stage_units=1, alone=False)
        if config.warps == 16 and shape.units <= 64:
            return replace(beside, stages=1)
        few = config.warps == 12 and shape.units <= 16 * config.cluster * config.k_warps
        return replace(beside, stages=2, ahead=3) if few else config
    if not config.epilogue.residual or config.stage_units > 1 or config.k_warps not in (8, 16):
        return config
    # Seven units a warp were measured with scales beside each.
    once = replace(config, scales_once=True, ahead=3)
    few = once.allows_scales_once(shape) and (config.cluster == 1 or config.k_warps == 8)
    return once if few and once.shared_bytes(shape) <= MAX_SHARED else replace(config, ahead=3)


def _integers_pay_in_chain(shape: Shape, cluster: int, cta_units: int) -> bool:
    """Whether integer products serve one token of integers of 4 bits faster in a chain.

    Measured in the steps of custom-llama-4B (0.89, with zeros 0.87), 12B (0.99, 0.93) and 31B (1.007: not there) on an
    H200, 2026-11-22: docs/findings.md.
    """
    integers = shape.bits == 4 and shape.kind in (INT, UINT_U8, UINT_FLOAT)
    return integers and cta_units <= (64 if cluster == 1 else 112)


def _few_stages(shape: Shape, config: Config, blocks: int, at_once: int) -> Config:
    """`config` of one bit and one token in a chain with as few stages, and digits that a CTA makes, as pay.

    blocks: of rows, in all;  at_once: clusters of four. Measured in the steps of custom-llama-4B, 12B and 31B on an
    H200, 2026-11-22: docs/findings.md.
    """
    quarter = config.cluster == config.blocks == 1 and blocks % 4 == 0 and blocks // 4 <= at_once
    k_warps = 3 if shape.units >= 256 else 2
    if config.epilogue.residual and quarter and shape.units >= 96 and shape.allows_stage_units(4, 4 * k_warps):
        # Four blocks of a cluster need a quarter of the activations each.
        config = replace(config, cluster=4, blocks=4, row_warps=4, k_warps=k_warps, stage_units=4, stages=2, batch=1)
    elif config.epilogue.squares and not config.epilogue.gated and shape.units == 96 and config.k_warps == 12:
        config = replace(config, k_warps=8, stage_units=4, stages=1)
    elif config.epilogue.gated and config.stage_units == 4:
        config = replace(config, stages=1)
    a_warp = config.steps * -(-shape.units // (config.cluster * config.k_warps))
    return replace(config, stages=min(config.stages, -(-a_warp // config.stage_units)))


def _halves_pay(shape: Shape, config: Config, blocks: int, at_once: int) -> bool:
    """Whether clusters have half a block less each where every two share one.

    Measured on an H200, 2026-11-22, at 14336 x 4096: 8 tokens of 2, 4 and 8 bits, 16 of 8; 8 of 4 bits with three
    blocks (10240 x 4096) and five (18944 x 3584), too.
    """
    even = shape.bits in (2, 4, 8) and shape.kind in (TABLE, INT) and shape.subs == 1
    measured = config.tokens == 8 or (config.tokens, shape.bits) == (16, 8)
    counts = (3, 4, 5) if (config.tokens, shape.bits) == (8, 4) else (4,)
    one_step = config.cluster == 2 and config.row_warps == config.blocks in counts and config.phases == 1
    return even and measured and one_step and replace(config, half_blocks=True).clusters(blocks) <= at_once


def _many_digits_pay(shape: Shape, tokens: int, per_pair: int, cta_units: int) -> bool:
    """Whether integer products serve two or four tokens faster, outside of chains, with pairs of CTAs that split k.

    Measured on an H200, 2026-11-22, at 4096^2, 8192^2, 16384^2 and 28672 x 8192, slices with groups of 128:
    docs/findings.md.
    """
    small, middle = (per_pair, cta_units) == (1, 32), (per_pair, cta_units) == (2, 64)
    if tokens == 2 and middle and shape.kind == INT:
        return shape.bits > 1 and shape.subs == 1
    if shape.kind == INT:
        tall = 2 <= per_pair <= 7 and cta_units == 64
        wide = (shape.bits == 8 and (small or tall)) or (5 <= shape.bits <= 7 and middle)
        return tokens == 4 and wide and shape.subs == 1
    if not shape.nested or shape.group % 128:
        return False
    if small:
        return tokens == 4 or (shape.bits >= 5 and shape.n * shape.k >= 1 << 24)
    # Four planes of four tokens take as long either way.
    few = middle or (2 < per_pair <= 4 and 64 < cta_units <= 128)
    many = shape.bits >= 5 and 2 <= per_pair <= 7 and cta_units == 64
    return (few and shape.bits != 4) or many or (middle and tokens == 2)


def _with_many_digits(shape: Shape, config: Config, blocks: int, sms: int) -> Config:
    """`config` of two or four tokens by integer products where they pay: 16 warps on k, blocks of a pair in turn."""
    tokens = config.tokens
    per_pair, cta_units = -(-blocks // clusters_at_once(sms, 2)), -(-shape.units // 2)
    if tokens not in (2, 4) or not shape.allows_many_digits or not shape.allows_digits_of(tokens):
        return config
    if not _many_digits_pay(shape, tokens, per_pair, cta_units):
        return config
    digits = Config(tokens, 2, 8 if per_pair == 1 else 16, 1, 1, 2, per_pair, 1, 1, digits=True, paired=True)
    digits = replace(digits, uniform=True, alone=True, batch=per_pair if per_pair <= 2 else 1)
    if shape.kind == INT and 5 <= shape.bits <= 7:
        # Two units of codes that lie across bytes are more than registers hold beside the sums of four tokens.
        return replace(digits, stages=2, stage_units=1)
    digits = replace(digits, late=tokens == 2 and per_pair == 1)
    # What memory has no room for, and two planes of four blocks, go side by side.
    beside = replace(digits, k_warps=4, row_warps=per_pair, batch=1)
    # Two units of other slices are more than the 128 registers of 16 warps hold.
    light = tokens == 2 or shape.kind == INT or (shape.group == 128 and (shape.kind == ROUNDED or shape.bits < 5))
    two = per_pair == 1 or (light and per_pair <= 4 and (tokens == 4 or shape.bits < 8))
    for tried in [beside] if (shape.bits, per_pair) == (2, 4) else [digits, beside] if per_pair == 4 else [digits]:
        for stage_units in (2, 1) if two else (1,):
            found = replace(tried, stage_units=stage_units)
            slices = found.cluster * found.k_warps
            if shape.allows_stage_units(stage_units, slices) and found.shared_bytes(shape) <= MAX_SHARED:
                return found
    return config


# (tokens, bits, units of a CTA, blocks of a pair): pieces of activations that serve all warps of a slice of k, and how
# many of them are asked for before the products (0: all).
_PIECES = {
    (8, 1, 32, 1): (2, 0),
    (8, 1, 32, 4): (4, 2),
    (8, 1, 112, 1): (7, 2),
    (8, 2, 64, 7): (16, 2),
    (8, 2, 112, 1): (7, 2),
    (8, 3, 32, 4): (4, 0),
    (8, 3, 64, 2): (2, 0),
    (8, 3, 64, 7): (8, 0),
    (8, 3, 112, 1): (7, 2),
    (8, 4, 64, 2): (8, 2),
    (8, 4, 112, 1): (7, 2),
    (8, 8, 32, 1): (4, 0),
    (8, 8, 64, 2): (8, 2),
    (8, 8, 64, 7): (8, 2),
    (8, 8, 112, 1): (7, 2),
    (16, 3, 64, 7): (8, 2),
}


def _with_pieces(shape: Shape, config: Config) -> Config:
    """`config` of eight or sixteen tokens with activations that arrive as its products go on, where that pays.

    Measured on an H200, 2026-11-22, at 4096^2 to 28672 x 8192: docs/findings.md.
    """
    plain = shape.kind in (TABLE, INT) and shape.subs == 1 and shape.k % 64 == 0
    if not plain or config.cluster != 2 or config.half_blocks:
        return config
    tokens, bits, cta_units = config.tokens, shape.bits, -(-shape.units // 2)
    if tokens == 16 and bits == 1 and config.octets and config.phases == 1:
        # A row tile of four selected bit by bit leaves the look-ups of the others room.
        spills = config.row_warps > 4 and (cta_units < 64 or shape.kind == INT)
        return replace(config, selected=0 if spills else 1, x_ahead=2 if cta_units >= 64 else 0)
    found = config
    if tokens == 16 and 2 <= bits <= 4 and (cta_units, config.blocks) == (112, 1):
        found = replace(config, k_warps=8, stage_units=2, stages=1, phases=7, x_buffers=4, x_chunks=1)
    elif pieces := _PIECES.get((tokens, bits, cta_units, config.blocks)):
        found = replace(config, x_chunks=pieces[0], x_ahead=pieces[1])
        if bits == 1:
            found = replace(found, octets=True, selected=1, x_sums=False)
    else:
        return config
    found = replace(found, interleaved=True, scales_once=False)
    slices = found.cluster * found.phases * found.k_warps * found.x_chunks
    whole = shape.units % (slices * found.stage_units) == 0
    whole &= shape.allows_stage_units(found.stage_units, slices)
    return found if whole and found.shared_bytes(shape) <= MAX_SHARED else config


@lru_cache(maxsize=4096)
def choose_config(
    shape: Shape,
    m: int,
    blocks: int,
    sms: int,
    capability: tuple[int, int] = (9, 0),
    epilogue: Epilogue = PLAIN,
    equal_indices: bool = True,
) -> Config | None:
    """The configuration for m tokens of a weight with that many blocks of rows; None if none fits shared memory.

    equal_indices: whether the device multiplies by equal indices as csrc/indices.cuh needs it (decode.equal_indices).

    Measured on an H200 (CUDA 13.0), 2026-11-21, at 4096^2 to 28672 x 8192, 1 to 8 bits, m = 1 to 64: docs/findings.md.
    """
    hopper = capability >= (9, 0)
    tokens = token_tile(m)
    chained = epilogue != PLAIN
    # The registers that it saves are those by which 16 and more tokens spilled.
    uniform = hopper and tokens >= 16
    if shape.sparse and (tokens > 32 or epilogue.tables > 1):
        return None  # registers do not hold the words of a unit beside the sums of 64 tokens; one table of values
    if tokens > 32 and capability != (9, 0):
        return None  # registers do not hold the sums of 64 tokens; two launches of 32 have not been measured on 9.0
    coded = shape.nested or shape.sparse  # whose integer products have configurations of their own
    best = None
    for cluster in (1, 2, 4, 8) if hopper else (1,):
        at_once = clusters_at_once(sms, cluster)
        per_cluster = max(1, -(-blocks // at_once))
        if epilogue.gated:
            per_cluster += per_cluster % 2
        cta_units = -(-shape.units // cluster)
        alone = hopper and chained
        start = Config(tokens, cluster, 1, 1, 1, 1, per_cluster, 1, 1, epilogue=epilogue, alone=alone, uniform=uniform)
        if hopper and tokens == 16 and shape.bits == 1 and shape.kind in (TABLE, INT):
            start = replace(start, octets=True)
        if hopper and not chained and _bytes_pay(shape, tokens, per_cluster, cta_units):
            start = replace(start, digits=True, paired=True, uniform=shape.nested and per_cluster <= 2)
        elif tokens == 1 and shape.allows_digits and not coded:
            large = shape.n * shape.k >= 1 << 25
            if chained:
                digits = shape.bits == 1 or (shape.bits == 8 and not large)
                digits |= capability == (9, 0) and _integers_pay_in_chain(shape, cluster, cta_units)
            else:
                digits = _digits_pay(shape, cluster, per_cluster, cta_units, large, hopper)
            if digits:
                start = replace(start, digits=True, paired=shape.bits in (1, 4) or not chained)
                # Not where that lets more CTAs of small weights with zeros share a multiprocessor.
                uniform_pays = hopper and (large or not shape.zeros or shape.bits not in (1, 2, 4))
                start = start if chained else replace(start, uniform=uniform_pays, late=large)
        elif not chained and tokens == 2 and _two_digits_pay(shape, cluster, per_cluster, cta_units):
            start = replace(start, digits=True, paired=True, uniform=hopper, late=True)
        if chained:
            most, row_warps = _chain_warps(start, shape, cta_units)
        elif start.digits and not coded:
            most, row_warps = _digit_warps(shape, per_cluster, cta_units, hopper)
        else:
            most, row_warps = _warps(shape, start, cta_units, hopper)
        warps = sorted({most, *(w for w in (8, 7, 4, 2, 1) if w < most)}, reverse=True)
        tried = [replace(start, k_warps=k_warps, row_warps=row_warps) for k_warps in warps]
        if not chained and _allows_indices(shape, tokens, capability, equal_indices):
            selected = _with_indices(shape, replace(start, digits=False, paired=False, late=False), cta_units)
            # Groups that stages of two and four units cut have none.
            tried = [selected] if selected and _fill(shape, selected, capability) else tried
        for config in tried:
            k_warps = config.k_warps
            config = replace(config, alone=config.alone or (hopper and _alone(shape, config, cta_units)))
            filled = _fill(shape, config, capability)
            if filled is None:
                continue
            turns = filled.steps > 1 and filled.row_warps == 1
            if filled.paired and filled.min_ctas == 1 and (cluster == 1 or turns) and not coded:
                # Where CTAs of two launches fit beside each other, some launches took 1.4 times as long.
                filled = replace(filled, alone=hopper)
            score = blocks / (per_cluster * at_once)
            # In a chain more warps are worth more than an even share of k for each.
            score *= 1 if chained and k_warps == most else cta_units / k_warps / -(-cta_units // k_warps)
            if chained and tokens >= 8 and per_cluster == 1:
                # Activations of many tokens cost nearly as much as the weights of the one block that they are for.
                score /= 1.4
            score *= (_CLUSTER_WORTH_FEW if tokens <= 4 else _CLUSTER_WORTH_MANY)[cluster]
            # A CTA that goes through its activations more than once waits for them each time.
            score *= 0.9 ** (filled.phases - 1) * (0.25 + 0.09375 * min(8, filled.warps))
            if best is None or score > best[0]:
                best = (score, filled)
    if best and chained and hopper and tokens == 1:
        # Fewer instructions; here registers decide nothing about where CTAs run.
        config = replace(best[1], uniform=True, paired=best[1].digits and shape.bits in (1, 4))
        if config.paired and shape.bits == 1:
            config = _few_stages(shape, config, blocks, clusters_at_once(sms, 4))
        if capability != (9, 0) or sms != 132:
            return config
        config = _kept_apart_by_registers(_with_two_places(shape, config, blocks))
        return _with_operands_ahead_in_chain(shape, config)
    if best and chained and best[1].warps > 12:
        # 128 registers are not enough for what the compiler then keeps, but for one bit in look-ups of eight codes.
        return replace(best[1], uniform=best[1].octets)
    if best is None or chained or not hopper:
        return best and best[1]
    config = best[1]
    if tokens in (2, 4) and shape.zeros and not _zeros_fill_16_warps(shape, config, -(-shape.units // config.cluster)):
        # Fewer tokens took longer than eight where only those have 16 warps.
        eight = choose_config(shape, 8, blocks, sms, capability)
        if eight and eight.warps > 8 and eight.row_warps <= 4:
            return eight
    if tokens == 8 and shape.kind in (TABLE, INT) and shape.subs == 1:
        # Fewer instructions again, but for 14 warps and more of two units of wider codes, which spill.
        config = replace(config, uniform=shape.bits <= 2 or config.warps <= 12 or config.stage_units == 1)
    if capability == (9, 0):
        config = _with_many_digits(shape, config, blocks, sms)
    config = _with_wide_table(shape, config, capability)
    if capability == (9, 0) and _halves_pay(shape, config, blocks, clusters_at_once(sms, config.cluster)):
        return replace(config, half_blocks=True)
    if capability != (9, 0):
        # Registers of 10.0 do not hold what the compiler otherwise keeps for three bits in two steps.
        crowded = (tokens, shape.bits, config.steps, shape.kind) == (1, 3, 2, TABLE)
        return replace(config, uniform=config.uniform or crowded)
    if tokens in (8, 16):
        return _with_pieces(shape, config)
    return _with_operands_ahead(shape, _beside(shape, config, sms // config.cluster - -(-blocks // config.blocks)))
