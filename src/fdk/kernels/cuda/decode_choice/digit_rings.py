"""Rings of integer products of one and two tokens, (stage_units, stages) in order of preference.

docs/findings.md: "Integers of every width by integer products", "Half the sums of integer products", "Integer products
for slices", "Chained products of larger models".
"""

from __future__ import annotations

from fdk.kernels.cuda.decode_choice.case import INTEGERS, Share
from fdk.kernels.cuda.decode_choice.digits import small_slices
from fdk.kernels.cuda.decode_config import PLAIN, Config, Shape

Ring = tuple[int, int]
Rings = list[Ring]

SINGLE, PAIR = (1, 1), (1, 2)
"""One stage of one unit, and two: what is left where nothing larger fits."""


def digit_rings(shape: Shape, config: Config, per_warp: int) -> Rings:
    """Rings of weights that are not sparse; per_warp: units that a warp goes through."""
    if shape.nested:
        return _of_slices(shape, config)
    plain = config.epilogue == PLAIN
    if plain and config.tokens == 1 and shape.kind in INTEGERS and (found := _of_bytes(shape, config)):
        return found
    if shape.zeros:
        return _with_zeros(shape, config)
    if config.alone:
        return _in_chain(shape, config, per_warp)
    one_bit = shape.bits == 1 and (config.tokens == 1 or config.blocks > 1)
    return _of_one_bit(config) if one_bit else _without_zeros(shape, config)


def _of_slices(shape: Shape, config: Config) -> Rings:
    if small_slices(shape, Share.of(shape, config)):
        # All that a warp goes through is on its way at once, or, of seven planes and more, most of it.
        return [(2, 2) if shape.bits <= 6 else (1, 3), PAIR, SINGLE]
    # Registers of 16 warps do not hold two units of seven planes beside where the next block starts.
    return [PAIR, SINGLE] if shape.bits > 6 and config.steps > 1 else [(2, 1), PAIR, SINGLE]


def _of_bytes(shape: Shape, config: Config) -> Rings | None:
    """Of integers of one token by codes of bytes, where measured.

    That is of blocks in turn, at 14336 x 4096, 16384^2, 28672 x 8192 and 20480 x 5120, and of 3 and 5 to 7 bits.
    """
    if config.blocks > 1:
        return None if config.row_warps > 1 or shape.bits == 1 else _of_blocks_in_turn(shape, config)
    if shape.bits in (1, 2, 4, 8):
        return None
    if shape.zeros or (shape.bits == 3 and config.k_warps == 14):
        few = shape.units <= 4 * config.cluster * config.k_warps
        return [*([(1, 4)] if few else []), PAIR, SINGLE]
    first = (2, 2) if config.k_warps <= 14 else (2, 1) if shape.bits == 3 else (1, 3)
    return [first, PAIR, SINGLE]


def _of_blocks_in_turn(shape: Shape, config: Config) -> Rings:
    if config.k_warps == 8:
        return [(1, 3), PAIR, SINGLE]
    first = {2: [(2, 2)], 3: [] if shape.zeros else [(2, 1)], 4: [(2, 2)]}.get(shape.bits, [])
    if shape.bits == 2 and config.cluster == 1 and not shape.zeros:
        first = [(4, 2), *first]
    return [*first, PAIR, SINGLE]


def _with_zeros(shape: Shape, config: Config) -> Rings:
    if config.epilogue == PLAIN and config.blocks == 1:
        few = config.k_warps > 14 and shape.bits != 4
        return [(2, 1) if few else PAIR if shape.bits in (1, 8) else (2, 2), PAIR, SINGLE]
    gated = config.epilogue.gated and config.warps <= 12
    return [(1, 3), PAIR, SINGLE] if gated else [PAIR, SINGLE]


def _in_chain(shape: Shape, config: Config, per_warp: int) -> Rings:
    """In a chain from Hopper on; of more than 12 warps all of the ring but its first choice."""
    if shape.bits > 1:
        return [PAIR, SINGLE] if config.warps > 12 else [(1, 3), PAIR, SINGLE]
    rest = [(2, 3), (1, 4), PAIR, SINGLE]
    if config.epilogue.gated and per_warp > 12:
        # Several blocks a CTA: what is on its way for all of them at once delays their activations.
        return [(4, 1 if config.warps > 12 else 2), *rest]
    return rest if config.warps > 12 else [(4, 3), *rest]


def _of_one_bit(config: Config) -> Rings:
    if config.tokens > 1:
        return [(4, 1), (2, 1), PAIR, SINGLE]
    # More on its way before the launch in front has ended only delays activations.
    split = config.blocks == 1 and config.k_warps > 8 and config.cluster > 1
    # Few warps wait for what is not on its way.
    two = config.steps > 1 or config.warps <= 10
    return [(2, 2) if split else (4, 2 if two else 1), (2, 2), (1, 4), PAIR, SINGLE]


def _without_zeros(shape: Shape, config: Config) -> Rings:
    """Of 2, 4 and 8 bits, and of two tokens of one bit where a CTA has one block."""
    single = config.blocks == 1 and config.k_warps > 8
    if single and (config.k_warps <= 14 or shape.bits == 4):
        return [(1 if shape.bits == 8 else 2, 2), PAIR, SINGLE]
    return [(2, 1) if single else (1, 3) if shape.bits == 4 else (2, 2), (1, 3), PAIR, SINGLE]
