"""dequantise and linear in plain torch: the definition of correct, and the last fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from fdk.formats.spec import BLOCK, KEPT
from fdk.packing.bits import unpack_codes, unpack_planes
from fdk.packing.layouts import Geometry, Parts
from fdk.packing.sparse import spread_kept, unpack_mask
from fdk.weight import QuantisedWeight

ROW_CHUNK_WEIGHTS = 1 << 22


def dequantise(weight: QuantisedWeight, dtype: torch.dtype | None = None, rows: slice = slice(None)) -> Tensor:
    """The dense weight [n, k] (or its `rows`), in `dtype` (default: the weight's).

    The value is the float32 product scale * table[code], scale * (code - zero), or for nested formats the scale times
    the value that `Format.slice_values` gives the leading bits of the master code, rounded once to `dtype`;
    for float64 the product itself is exact. That value is what every kernel is held to.
    """
    weight = weight.canonical()
    geometry, parts = weight.geometry, weight.parts
    fmt, k = geometry.format, geometry.k
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    start, stop, _ = rows.indices(geometry.n)
    groups, size = geometry.groups, geometry.group_size
    codes = leading_codes(geometry, parts, start, stop)
    if fmt.is_nested:
        table = torch.tensor(fmt.slice_values(), dtype=compute, device=codes.device)
        values = table[codes.int()].view(-1, groups, size)
    elif fmt.is_table:
        values = torch.empty(codes.shape, dtype=compute, device=codes.device)
        table = parts["table"].to(compute)
        for entries, (first, last) in zip(table, geometry.ranges, strict=True):
            inside = slice(max(first, start) - start, max(min(last, stop), start) - start)
            values[inside] = entries[codes[inside].int()]
        values = values.view(-1, groups, size)
    else:
        values = codes.to(compute).view(-1, groups, size)
        values -= parts["zeros"][start:stop].to(compute).unsqueeze(2) if fmt.has_zeros else fmt.offset
    values *= parts["scales"][start:stop].to(compute).unsqueeze(2)
    if fmt.sparse:
        values.view(-1, k).masked_fill_(~unpack_mask(parts["mask"][start:stop], k), 0)
    return values.view(-1, k).to(dtype or geometry.dtype)


def leading_codes(geometry: Geometry, parts: Parts, start: int, stop: int) -> Tensor:
    """uint8 [stop - start, k] of canonical parts: the codes (0 where dropped), or the leading bits of nested ones."""
    fmt, k = geometry.format, geometry.k
    if fmt.is_nested:
        return unpack_planes(parts["planes"][start:stop], k, fmt.read_bits)
    if fmt.sparse:
        keep = unpack_mask(parts["mask"][start:stop], k)
        return spread_kept(unpack_codes(parts["codes"][start:stop], fmt.bits, k * KEPT // BLOCK), keep)
    return unpack_codes(parts["codes"][start:stop], fmt.bits, k)


def linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x [m, k] @ dequantise(weight).T + bias -> [m, n], accumulated in float32 and rounded once to x.dtype.

    Dequantises a bounded chunk of rows at a time. Float64 activations are computed in float64.
    """
    n, k = weight.shape
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.new_empty(x.shape[0], n) if out is None else out
    wide = x.to(compute)
    canonical = weight.canonical()
    chunk = max(1, ROW_CHUNK_WEIGHTS // max(1, k))
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        y = wide @ dequantise(canonical, compute, rows).T
        out[:, rows] = y if bias is None else y + bias[rows].to(compute)
    return out
