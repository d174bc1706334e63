"""Launches sparse.py: tile shapes and arguments."""

from __future__ import annotations

from torch import Tensor

from fdk.kernels.triton.config import choose_untuned
from fdk.kernels.triton.tiles import row_tiles
from fdk.weight import QuantisedWeight

# Columns at once where there is one token.
_ONE_BK = 512


def launch_sparse(x: Tensor, weight: QuantisedWeight, bias: Tensor | None, out: Tensor, interpreted: bool) -> None:
    """out [m, n] = x [m, k] W^T + bias for a 16:32 sparse weight in the canonical layout, k > 0."""
    from fdk.kernels.triton.sparse import sparse_product

    geometry, parts, fmt = weight.geometry, weight.parts, weight.format
    (m, k), n = x.shape, geometry.n
    dot = m > 1
    bm, bn, bk, warps = choose_untuned(m, x.element_size(), _ONE_BK)
    several = fmt.is_table and len(geometry.row_ends) > 1
    tiles = row_tiles(geometry, bn, x.device) if several else parts["codes"]
    sparse_product[(tiles.shape[0] if several else -(-n // bn), -(-m // bm) if dot else 1)](
        x,
        parts["codes"],
        parts["mask"],
        parts["scales"],
        parts.get("zeros", parts["codes"]),
        parts.get("table", x),
        x if bias is None else bias,
        tiles,
        out,
        m,
        n,
        k,
        geometry.groups,
        geometry.group_size,
        -(-k // bk),
        BITS=fmt.bits,
        OFFSET=0 if fmt.is_table or fmt.has_zeros else fmt.offset,
        STORED=fmt.is_table,
        ZEROS=fmt.has_zeros,
        BIAS=bias is not None,
        TILES=several,
        DOT=dot,
        BN=bn,
        BM=bm,
        BK=bk,
        STEPS=-(-k // bk) if interpreted else 0,
        INTERPRETED=interpreted,
        num_warps=warps,
    )
