"""Rows and columns of a weight's canonical parts: cut for tensor parallelism, joined for merged projections.

Along n (dim 0) every part is rows, and a table goes with the rows it serves. Along k (dim 1) codes, masks and planes
are streams of fields, scales and zeros follow the groups; one scale per row, and tables, belong to every column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdk.arguments import as_integer, shown
from fdk.errors import FormatError
from fdk.formats.spec import BLOCK, KEPT
from fdk.packing.bits import pack_codes, row_bytes, unpack_codes
from fdk.packing.layouts import Geometry

ROWS, COLUMNS = 0, 1


def check_dim(dim: int) -> None:
    """FormatError unless it is 0 or 1."""
    if not isinstance(dim, int) or dim not in (ROWS, COLUMNS):
        raise FormatError(f"dim = {shown(dim)} is no dimension of a weight [n, k]; use 0 for rows, 1 for columns")


def shard_bounds(geometry: Geometry, dim: int, rank: int, world: int) -> tuple[int, int]:
    """(start, stop) of the rows (dim 0) or columns (dim 1) that shard `rank` of `world` equal ones holds.

    FormatError, with the value and the remedy, if n or k cannot be cut so: columns are cut between groups only.
    """
    check_dim(dim)
    rank, world = as_integer(rank, "rank"), as_integer(world, "world")
    if world < 1 or not 0 <= rank < world:
        raise FormatError(f"rank = {rank} of world = {world} does not exist; ranks are 0 to world - 1")
    size, letter = (geometry.n, "n") if dim == ROWS else (geometry.k, "k")
    if size % world:
        raise FormatError(
            f"{letter} = {size} cannot be cut into {world} equal shards; use a number of shards that divides it"
        )
    share = size // world
    if dim == COLUMNS and share % geometry.format.k_multiple:
        raise FormatError(
            f"k / {world} = {share} columns a shard are not a multiple of the {geometry.format.k_multiple} "
            f"that {geometry.format} keeps together; {_remedy(geometry, world)}"
        )
    return rank * share, (rank + 1) * share


def _remedy(geometry: Geometry, world: int) -> str:
    fmt, k = geometry.format, geometry.k
    fewer = next(w for w in range(world - 1, 0, -1) if k % (w * fmt.k_multiple) == 0)
    share = k // world
    sizes = [g for g in (128, 64, 32, 16) if not fmt.sparse or g % BLOCK == 0]
    fitting = [g for g in sizes if fmt.group and g < fmt.group and share % g == 0]
    remedy = f"use {fewer} shard{'s' * (fewer > 1)}"
    return remedy + (f", or quantise with a group of {fitting[0]}" if fitting else "")


def cut_geometry(geometry: Geometry, dim: int, start: int, stop: int) -> Geometry:
    """The geometry of rows or columns start to stop; FormatError for a range that does not exist or splits a group."""
    check_dim(dim)
    start, stop = as_integer(start, "start"), as_integer(stop, "stop")
    size = geometry.n if dim == ROWS else geometry.k
    if not 0 <= start <= stop <= size:
        raise FormatError(f"{'rows' if dim == ROWS else 'columns'} {start} to {stop} do not exist; there are {size}")
    fmt = geometry.format
    if dim == ROWS:
        inside = [min(b, stop) - start for a, b in geometry.ranges if b > start and a < stop]
        return Geometry(fmt, stop - start, geometry.k, geometry.dtype, tuple(inside) or (0,))
    if start % fmt.k_multiple or stop % fmt.k_multiple:
        raise FormatError(
            f"columns {start} to {stop} split what {fmt} keeps together; cut at multiples of {fmt.k_multiple}"
        )
    return Geometry(fmt, geometry.n, stop - start, geometry.dtype, geometry.row_ends)


def cut_part(geometry: Geometry, name: str, part: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """Rows or columns start to stop of one canonical part of a weight of `geometry`; a view where bytes allow.

    The range is one that `cut_geometry` accepts.
    """
    if name == "table":
        if dim == COLUMNS or len(part) == 1:
            return part
        used = [i for i, (a, b) in enumerate(geometry.ranges) if b > start and a < stop] or [0]
        return part[used[0] : used[-1] + 1]
    if dim == ROWS:
        return part[start:stop]
    if name in ("scales", "zeros"):
        group = geometry.format.group
        return part if group is None else part[:, start // group : stop // group]
    bits, kept = _fields(geometry, name)
    return _cut_stream(part, bits, geometry.k * kept // BLOCK, start * kept // BLOCK, stop * kept // BLOCK)


def join_parts(geometries: Sequence[Geometry], name: str, parts: Sequence[Tensor], dim: int) -> Tensor:
    """Inverse of `cut_part`: one part of weights that stand below (dim 0) or beside (dim 1) each other."""
    if dim == ROWS:
        return torch.cat(list(parts))
    if name == "table" or (name in ("scales", "zeros") and geometries[0].format.group is None):
        return parts[0]
    if name in ("scales", "zeros"):
        return torch.cat(list(parts), 1)
    bits, kept = _fields(geometries[0], name)
    return _join_streams(parts, bits, [geometry.k * kept // BLOCK for geometry in geometries])


def _fields(geometry: Geometry, name: str) -> tuple[int, int]:
    """(bits of a field, fields in every 32 columns) of a stream."""
    if name in ("mask", "planes"):
        return 1, BLOCK
    return geometry.format.bits, KEPT if geometry.format.sparse else BLOCK


def _cut_stream(stream: Tensor, bits: int, count: int, start: int, stop: int) -> Tensor:
    """Fields start to stop of streams [..., bytes] of `count` fields; spare bits are zero."""
    if start * bits % 8 == 0 and (stop == count or stop * bits % 8 == 0):
        return stream[..., start * bits // 8 : row_bytes(stop, bits)]
    rows = stream.reshape(-1, stream.shape[-1])
    cut = pack_codes(unpack_codes(rows, bits, count)[:, start:stop].contiguous(), bits)
    return cut.view(*stream.shape[:-1], -1)


def _join_streams(streams: Sequence[Tensor], bits: int, counts: Sequence[int]) -> Tensor:
    if all(count * bits % 8 == 0 for count in counts[:-1]):
        return torch.cat(list(streams), -1)
    rows = [stream.reshape(-1, stream.shape[-1]) for stream in streams]
    codes = [unpack_codes(row, bits, count) for row, count in zip(rows, counts, strict=True)]
    return pack_codes(torch.cat(codes, 1), bits).view(*streams[0].shape[:-1], -1)
