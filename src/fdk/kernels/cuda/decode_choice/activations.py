"""How activations of eight and sixteen tokens come: in pieces, so that products begin with the first of them.

docs/findings.md: "What activations cost at eight and sixteen tokens", "The timeline at 4, 8 and 16 tokens", "Sixteen
rows of slices".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fdk.kernels.cuda.decode_choice.case import LOOKED_UP, Case, Share
from fdk.kernels.cuda.decode_config import INT, MAX_SHARED, PLAIN, Config, Shape


def pieces_of_slice(shape: Shape, config: Config, hopper: bool) -> int:
    """Pieces that a slice's activations come in; one where sums of them are needed first."""
    slices = config.cluster * config.phases * config.k_warps
    if config.tokens < 8 or config.phases > 1 or shape.zeros or shape.units % slices:
        return 1
    mine = shape.units // slices
    if config.tokens == 8 and not (hopper and _eight_take_pieces(shape, config, mine)):
        return 1
    # One bit adds up activations in the loop where a warp has few units, else before it.
    least = config.stage_units if config.tokens == 8 and shape.bits == 1 else 4
    return next((n for n in (4, 3, 2) if mine % (n * config.stage_units) == 0 and mine >= least * n), 1)


def _eight_take_pieces(shape: Shape, config: Config, mine: int) -> bool:
    """Whether eight tokens do, of whose slices a warp has `mine` units: at least 64 a CTA, as measured on an H200.

    Of less, activations are here before products begin.
    """
    if config.epilogue != PLAIN or shape.nested or shape.sparse or shape.subs > 1:
        return False
    few = shape.units < 64 * config.cluster
    if shape.bits == 1:
        return mine <= 16 and not (few and mine < 8)
    return not few


@dataclass(frozen=True)
class Pieces:
    """Pieces of activations that serve all warps of a slice of k, as measured for a share of a pair of CTAs.

    pieces  that they come in;  ahead: how many of them are asked for before the products, 0 for all
    """

    tokens: int
    bits: int
    units: int
    blocks: int
    pieces: int
    ahead: int


# At 4096^2 (32 units), 8192^2 and 28672 x 8192 (64 units; 2 blocks, 7), 14336 x 4096 (32; 4) and 4096 x 14336 (112; 1).
PIECES = (
    Pieces(tokens=8, bits=1, units=32, blocks=1, pieces=2, ahead=0),
    Pieces(tokens=8, bits=1, units=32, blocks=4, pieces=4, ahead=2),
    Pieces(tokens=8, bits=1, units=112, blocks=1, pieces=7, ahead=2),
    Pieces(tokens=8, bits=2, units=64, blocks=7, pieces=16, ahead=2),
    Pieces(tokens=8, bits=2, units=112, blocks=1, pieces=7, ahead=2),
    Pieces(tokens=8, bits=3, units=32, blocks=4, pieces=4, ahead=0),
    Pieces(tokens=8, bits=3, units=64, blocks=2, pieces=2, ahead=0),
    Pieces(tokens=8, bits=3, units=64, blocks=7, pieces=8, ahead=0),
    Pieces(tokens=8, bits=3, units=112, blocks=1, pieces=7, ahead=2),
    Pieces(tokens=8, bits=4, units=64, blocks=2, pieces=8, ahead=2),
    Pieces(tokens=8, bits=4, units=112, blocks=1, pieces=7, ahead=2),
    Pieces(tokens=8, bits=8, units=32, blocks=1, pieces=4, ahead=0),
    Pieces(tokens=8, bits=8, units=64, blocks=2, pieces=8, ahead=2),
    Pieces(tokens=8, bits=8, units=64, blocks=7, pieces=8, ahead=2),
    Pieces(tokens=8, bits=8, units=112, blocks=1, pieces=7, ahead=2),
    Pieces(tokens=16, bits=3, units=64, blocks=7, pieces=8, ahead=2),
)
_BY_SHARE = {(row.tokens, row.bits, row.units, row.blocks): row for row in PIECES}


def with_pieces(case: Case, config: Config) -> Config:
    """`config` with activations that arrive as its products go on, each piece for all warps, where that pays."""
    shape, share = case.shape, Share.of(case.shape, config)
    plain = shape.kind in LOOKED_UP and shape.subs == 1 and shape.k % 64 == 0
    if config.tokens not in (8, 16) or not plain or config.cluster != 2 or config.half_blocks:
        return config
    if config.tokens == 16 and shape.bits == 1 and config.phases == 1:
        # A row tile of four selected bit by bit leaves the look-ups of the others room.
        spills = config.row_warps > 4 and (share.units < 64 or shape.kind == INT)
        return replace(config, selected=0 if spills else 1, x_ahead=2 if share.units >= 64 else 0)
    if config.tokens == 16 and 2 <= shape.bits <= 4 and (share.units, share.blocks) == (112, 1):
        # At 4096 x 14336 phases as a ring.
        found = replace(config, k_warps=8, stage_units=2, stages=1, phases=7, x_buffers=4, x_chunks=1)
    elif row := _BY_SHARE.get((config.tokens, shape.bits, share.units, share.blocks)):
        found = replace(config, x_chunks=row.pieces, x_ahead=row.ahead)
        if shape.bits == 1:
            found = replace(found, octets=True, selected=1, x_sums=False)
    else:
        return config
    found = replace(found, interleaved=True, scales_once=False)
    slices = found.cluster * found.phases * found.k_warps * found.x_chunks
    whole = shape.units % (slices * found.stage_units) == 0
    whole &= shape.allows_stage_units(found.stage_units, slices)
    return found if whole and found.shared_bytes(shape) <= MAX_SHARED else config


def with_two_pieces(case: Case, config: Config) -> Config:
    """`config` with sixteen tokens' activations in two pieces, where warps of one block have four units each.

    At 2560 to 4096 rows of 4096 columns: 2 and 4 bits 0.96, and of 3 bits and slices, with a ring of two single units
    besides, 0.95 of the time on average. Fewer CTAs leave room for those of the next launch, and lost.
    """
    shape = case.shape
    four = shape.units == 4 * config.cluster * config.k_warps and config.phases == 1
    plain = shape.subs == 1 and shape.k % 64 == 0 and not (shape.zeros or shape.sparse)
    one_block = config.cluster == 2 and config.blocks == config.row_warps == 1
    if config.tokens != 16 or case.side_by_side or not (four and plain and one_block):
        return config
    if shape.bits == 3 or (shape.nested and shape.bits <= 6):
        return replace(config, stages=2, stage_units=1, x_chunks=2)
    if shape.nested:
        return config
    return replace(config, x_chunks=2) if shape.bits in (2, 4) else config
