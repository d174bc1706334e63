"""Rings of a warp, (stage_units, stages) in order of preference: the first that shared memory holds is taken.

Those of integer products are in digit_rings.py. docs/findings.md: "Zero points, and two CTAs on a multiprocessor",
"What is chosen since the open sets were answered", "What bounds the rows that stay open", "Rings asked again".
"""

from __future__ import annotations

from fdk.kernels.cuda.decode_choice.case import few_codes_and_zeros
from fdk.kernels.cuda.decode_choice.digit_rings import PAIR, SINGLE, Ring, Rings, digit_rings
from fdk.kernels.cuda.decode_config import PLAIN, TABLE, Config, Shape


def rings(shape: Shape, config: Config) -> Rings:
    """Rings of the warps of `config`, most preferred first."""
    # Units that a warp goes through, all blocks of its rows together.
    per_warp = config.steps * -(-shape.units // (config.cluster * config.k_warps))
    if config.indices:
        return [_of_indices(shape, config, per_warp)]
    if config.digits and not shape.sparse:
        return digit_rings(shape, config, per_warp)
    return _with_zeros(shape, config, per_warp) if shape.zeros else _without_zeros(shape, config, per_warp)


def _of_indices(shape: Shape, config: Config, per_warp: int) -> Ring:
    if shape.bits == 2 and config.steps == 1:
        # Sixteen warps ask for more at once than they need.
        return 2, 1 if config.warps == 16 else 2
    return 4, 2 if per_warp > 8 else 1


def _with_zeros(shape: Shape, config: Config, per_warp: int) -> Rings:
    """By look-ups, with zeros."""
    plain = config.epilogue == PLAIN
    if plain and per_warp == 4 and few_codes_and_zeros(shape) and config.tokens in (2, 4):
        return [(1, 4 if shape.bits == 2 else 3), PAIR, SINGLE]
    if shape.subs > 1 or config.tokens > 8 or not plain:
        return [PAIR, SINGLE]
    if config.tokens == 1 and per_warp <= 4 and shape.bits <= 4:
        return [(1, 4), PAIR, SINGLE]  # everything is on its way before the launch in front has ended
    return [SINGLE] if config.warps > 8 and config.steps == 1 else [PAIR, SINGLE]


# Bits: stages of one unit, of up to four tokens where that is all or most of what a warp goes through.
_ALL_AT_ONCE = {2: 4, 3: 4, 4: 3}


def _without_zeros(shape: Shape, config: Config, per_warp: int) -> Rings:
    """By look-ups, or of sparse integers by integer products, without zeros."""
    full = config.warps > 8 and (config.row_warps <= 2 or config.warps > 16)
    if full and (config.tokens == 1 or config.alone):
        return [SINGLE]
    if config.warps > 12 and config.alone:
        return [PAIR, SINGLE]  # 128 registers are not enough for two units
    if config.tokens <= 4 and per_warp <= 4:
        # Everything is on its way before the launch in front has ended.
        if shape.bits == 1:
            return [(2, 2), (1, 4), PAIR, SINGLE]
        if (shape.bits, config.tokens) == (4, 1):
            return [(1, 4), SINGLE]
        return [(1, _ALL_AT_ONCE.get(shape.bits, 1 if shape.nested else 2)), SINGLE]
    if shape.nested and (found := _of_slices(shape, config)):
        return found
    if shape.bits == 1:
        return _of_one_bit(config)
    if shape.bits <= 4 and config.tokens <= 16:
        return _of_few_bits(shape, config)
    if config.row_warps == 3 and shape.bits > 4 and (config.tokens == 4 or (config.tokens == 2 and shape.bits < 8)):
        return [SINGLE]
    if eight_bits_fill_up(shape, config) or (shape.bits == 8 and (config.tokens, config.row_warps) == (8, 3)):
        return [SINGLE]  # and a wide table beside it
    two = config.tokens <= 4 or (config.tokens < 16 and config.warps > 8)
    return [PAIR, SINGLE] if two else [SINGLE]


def _of_slices(shape: Shape, config: Config) -> Rings | None:
    """Of slices as measured; None where they are as other codes."""
    two_blocks = config.cluster == config.row_warps == config.blocks == 2 and config.epilogue == PLAIN
    if config.tokens == 16 and two_blocks and shape.bits > 2 and shape.subs == 1:
        # Codes of so many tokens are computed for long, in which one stage of eight warps leaves memory idle.
        return [(2, 2), (2, 1), SINGLE] if shape.bits <= 4 else [PAIR, SINGLE]
    if config.tokens == 1 and shape.bits > 4:
        return [(1, 3), PAIR, SINGLE] if config.alone else [SINGLE]
    return None


def _of_one_bit(config: Config) -> Rings:
    if config.tokens <= 4:
        return [(4, 1), (2, 1), PAIR]
    if config.octets and not config.alone:
        most = 4 if config.warps <= 8 else 2 if config.warps < 16 else 0
        return [*((units, 1) for units in (4, 2) if units <= most), PAIR]
    # Two units beside the sums of 32 tokens are more than registers hold.
    crowded = config.tokens == 32 or (config.row_warps > 4 and config.tokens >= 16 and not config.alone)
    return [PAIR] if crowded else [(2, 1), PAIR]


def _of_few_bits(shape: Shape, config: Config) -> Rings:
    """Of 2 to 4 bits of up to 16 tokens: two units at once, but where registers of more than 8 warps hold no two."""
    wide = config.tokens == 16 or (shape.bits, config.tokens) in ((4, 1), (2, 8))
    wide |= (shape.bits, config.tokens, config.cluster) == (4, 8, 2) and config.warps > 12
    return [PAIR, SINGLE] if config.warps > 8 and wide and not config.alone else [(2, 1), PAIR, SINGLE]


def eight_bits_fill_up(shape: Shape, config: Config) -> bool:
    """Whether eight tokens of 8 bits have as many warps as registers allow, outside of chains."""
    few = config.tokens == 8 and config.epilogue == PLAIN and shape.kind == TABLE and shape.subs == 1
    return few and shape.bits == 8 and config.warps > 12 and config.cluster == 2
