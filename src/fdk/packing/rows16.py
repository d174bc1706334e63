"""rows16: the layout that the CPU kernels read, in plain torch.

The bytes are defined at the top of kernels/cpu/csrc/fdk_cpu.h. This file is their definition in torch: it serves
machines without the compiled library, the meta device, and the tests that hold the library's packing to it.

Parts:
    data    uint8 [blocks * block_bytes]   blocks of 16 rows, scales and zeros interleaved with codes
    table   [tables, 2^bits]               table formats, as in the canonical parts
    zeros   [0]                            zero-point formats: no elements; its dtype is that of the zeros in `data`
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdk.formats import Format
from fdk.packing.bits import pack_codes, pack_planes, unpack_codes, unpack_planes
from fdk.packing.layouts import Geometry, Layout, Parts, canonical_dtypes, canonical_shapes, check_canonical

ROWS = 16
UNIT = 32


@dataclass(frozen=True)
class Sizes:
    """How a weight of some geometry is cut up; the names are those of fdk_cpu.h."""

    blocks: int
    supers: int
    units: int
    groups_per_super: int
    scale_bytes: int
    zero_bytes: int
    bits: int
    lines: int
    """Lines of 16 dwords of a unit."""
    apart: bool
    """Nested: scales and planes of a block stand apart, so that a superblock is its scales."""

    @property
    def super_bytes(self) -> int:
        scales = self.groups_per_super * ROWS * (self.scale_bytes + self.zero_bytes)
        return scales + (0 if self.apart else self.units * 64 * self.lines)

    @property
    def planes_at(self) -> int:
        return -(-self.supers * self.super_bytes // 64) * 64

    @property
    def block_bytes(self) -> int:
        return self.planes_at + (self.supers * self.units * 64 * self.lines if self.apart else 0)

    @property
    def k_padded(self) -> int:
        return self.supers * self.units * UNIT


def sizes(geometry: Geometry, zeros_dtype: torch.dtype | None) -> Sizes:
    """The cut of a weight; `zeros_dtype` is None for formats without zeros."""
    fmt, k = geometry.format, geometry.k
    together = 2 if fmt.group and fmt.group % UNIT else 1
    units = together * fmt.group // UNIT if fmt.group else -(-k // UNIT)
    return Sizes(
        blocks=sum(-(-(end - start) // ROWS) for start, end in geometry.ranges),
        supers=-(-geometry.groups // together),
        units=units,
        groups_per_super=together,
        scale_bytes=geometry.dtype.itemsize,
        zero_bytes=zeros_dtype.itemsize if zeros_dtype else 0,
        bits=fmt.bits,
        lines=1 + fmt.bits // 2 if fmt.sparse else fmt.bits,
        apart=fmt.is_nested,
    )


def _places(bits: int) -> list[list[tuple[int, int, int, int]]]:
    """For every pair of a unit: (first bit of the code, bits, line, bit in the 16-bit half) of its pieces."""
    per_line, rest = 16 // bits, 16 % bits
    direct = bits * per_line
    places = []
    for pair in range(16):
        if pair < direct:
            places.append([(0, bits, pair // per_line, bits * (pair % per_line))])
        else:
            stream = [(pair - direct) * bits + i for i in range(bits)]
            places.append([(i, 1, at // rest, direct + at % rest) for i, at in enumerate(stream)])
    return places


def _plane_places(pair: int) -> list[tuple[int, int]]:
    """(line, bit in the 16-bit half) of bit 7, 6, ... 0 of the master codes of a pair, see fdk_cpu.h."""
    half, f = divmod(pair, 8)
    places = [(half, 2 * f), (half, 2 * f + 1)]
    places += [(line, 4 * (f // 2) + 2 * half + f % 2) for line in (2, 3)]
    return places + [(line, 8 * (f // 4) + 4 * half + 2 * (f % 2) + f // 2 % 2) for line in (4, 5, 6, 7)]


def _code_pieces(format: Format) -> list[list[tuple[int, int, int, int]]]:
    """`_places` of a format."""
    if format.is_nested:
        return [[(7 - t, 1, *place) for t, place in enumerate(_plane_places(pair))] for pair in range(16)]
    return _places(format.bits)


def _block_rows(geometry: Geometry, device: torch.device) -> Tensor:
    """Row of the weight for every row of every block; n where the block is padding."""
    rows = []
    for start, end in geometry.ranges:
        padded = torch.arange(start, start + -(-(end - start) // ROWS) * ROWS, device=device)
        rows.append(torch.where(padded < end, padded, geometry.n))
    return torch.cat(rows)


def _gather_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """tensor [n, c] by block row, zeros for padding rows: [len(rows), c]."""
    return torch.cat([tensor, tensor.new_zeros(1, tensor.shape[1])])[rows]


def pack(geometry: Geometry, parts: Parts) -> Tensor:
    """The `data` bytes of canonical parts."""
    zeros = parts.get("zeros")
    cut = sizes(geometry, None if zeros is None else zeros.dtype)
    fmt, device = geometry.format, parts["scales"].device
    if device.type == "meta" or not cut.blocks:
        return torch.empty(cut.blocks * cut.block_bytes, dtype=torch.uint8, device=device)
    rows = _block_rows(geometry, device)
    if fmt.sparse:
        units = _sparse_units(cut, _gather_rows(parts["mask"], rows), _gather_rows(parts["codes"], rows))
        return _assemble(geometry, parts, cut, rows, units)
    if fmt.is_nested:
        stored = unpack_planes(parts["planes"], geometry.k)
    else:
        stored = unpack_codes(parts["codes"], cut.bits, geometry.k)
    codes = _gather_rows(stored, rows)
    codes = torch.nn.functional.pad(codes, (0, cut.k_padded - geometry.k))
    pairs = codes.view(cut.blocks, ROWS, cut.supers, cut.units, 16, 2).to(torch.int64)
    halves = pairs.new_zeros(cut.blocks, cut.supers, cut.units, cut.lines, ROWS, 2)
    for pair, pieces in enumerate(_code_pieces(fmt)):
        source = pairs[:, :, :, :, pair].permute(0, 2, 3, 1, 4)
        for first, width, line, bit in pieces:
            halves[:, :, :, line] |= (source >> first & (1 << width) - 1) << bit
    dwords = (halves[..., 0] | halves[..., 1] << 16).to(torch.int32).contiguous()
    units = dwords.view(torch.uint8).reshape(cut.blocks, cut.supers * cut.units, 64 * cut.lines)
    return _assemble(geometry, parts, cut, rows, units)


def _sparse_sizes(cut: Sizes) -> tuple[int, int]:
    """Bytes of mask and of kept codes of a row of a unit."""
    return UNIT // 8, UNIT // 2 * cut.bits // 8


def _sparse_units(cut: Sizes, mask: Tensor, codes: Tensor) -> Tensor:
    """Units uint8 [blocks, units of a row, bytes] of the masks and kept codes of all block rows."""
    pieces = [
        part.view(cut.blocks, ROWS, cut.supers * cut.units, size).transpose(1, 2).flatten(2)
        for part, size in zip((mask, codes), _sparse_sizes(cut), strict=True)
    ]
    return torch.cat(pieces, 2)


def _assemble(geometry: Geometry, parts: Parts, cut: Sizes, rows: Tensor, units: Tensor) -> Tensor:
    """The `data` bytes of units uint8 [blocks, units of a row, bytes] with the scales and zeros of `parts`."""
    zeros = parts.get("zeros")
    pieces = [] if cut.apart else [units.reshape(cut.blocks, cut.supers, cut.units * 64 * cut.lines)]
    for tensor in (zeros, parts["scales"]):
        if tensor is None:
            continue
        padded = torch.nn.functional.pad(tensor, (0, cut.supers * cut.groups_per_super - geometry.groups))
        by_row = _gather_rows(padded, rows).view(cut.blocks, ROWS, cut.supers, cut.groups_per_super)
        lines = by_row.permute(0, 2, 3, 1).contiguous().view(torch.uint8)
        size = cut.groups_per_super * ROWS * tensor.element_size()
        pieces.insert(0, lines.reshape(cut.blocks, cut.supers, size))
    blocks = torch.cat(pieces, 2).view(cut.blocks, cut.supers * cut.super_bytes)
    blocks = torch.nn.functional.pad(blocks, (0, cut.planes_at - blocks.shape[1]))
    if cut.apart:
        planes = units.view(cut.blocks, -1, cut.lines, 64).transpose(1, 2)
        blocks = torch.cat([blocks, planes.reshape(cut.blocks, -1)], 1)
    return blocks.reshape(-1)


def unpack(geometry: Geometry, data: Tensor, zeros_dtype: torch.dtype | None) -> Parts:
    """Codes, scales and zeros of the canonical parts, bit for bit those that `pack` was given."""
    cut = sizes(geometry, zeros_dtype)
    device = data.device
    if device.type == "meta" or not cut.blocks:
        dtypes = canonical_dtypes(geometry, zeros_dtype or torch.uint8)
        shapes = {name: shape for name, shape in canonical_shapes(geometry).items() if name != "table"}
        return {name: torch.empty(shape, dtype=dtypes[name], device=device) for name, shape in shapes.items()}
    keep = _block_rows(geometry, device) < geometry.n
    whole = data.view(cut.blocks, cut.block_bytes)
    supers = whole[:, : cut.supers * cut.super_bytes].reshape(cut.blocks, cut.supers, cut.super_bytes)
    parts, at = {}, 0
    for name, dtype in (("scales", geometry.dtype), ("zeros", zeros_dtype)):
        if dtype is None:
            continue
        size = cut.groups_per_super * ROWS * dtype.itemsize
        lines = supers[:, :, at : at + size].contiguous().view(dtype)
        by_row = lines.view(cut.blocks, cut.supers, cut.groups_per_super, ROWS).permute(0, 3, 1, 2)
        padded = by_row.reshape(cut.blocks * ROWS, cut.supers * cut.groups_per_super)
        parts[name] = padded[keep][:, : geometry.groups].contiguous()
        at += size
    if geometry.format.sparse:
        count, (mask, codes) = cut.supers * cut.units, _sparse_sizes(cut)
        units = supers[:, :, at:].reshape(cut.blocks, count, ROWS * (mask + codes))
        pieces = units.split((ROWS * mask, ROWS * codes), 2)
        for name, size, piece in zip(("mask", "codes"), (mask, codes), pieces, strict=True):
            by_row = piece.unflatten(2, (ROWS, size)).transpose(1, 2).reshape(cut.blocks * ROWS, count * size)
            parts[name] = by_row[keep].contiguous()
        return parts
    if cut.apart:
        planes = whole[:, cut.planes_at :].contiguous().view(torch.int32)
        dwords = planes.view(cut.blocks, cut.lines, cut.supers * cut.units, ROWS).transpose(1, 2)
    else:
        dwords = supers[:, :, at:].contiguous().view(torch.int32)
    dwords = dwords.reshape(cut.blocks, cut.supers, cut.units, cut.lines, ROWS).to(torch.int64) & 0xFFFFFFFF
    codes = dwords.new_zeros(cut.blocks, ROWS, cut.supers, cut.units, 16, 2)
    for pair, pieces in enumerate(_code_pieces(geometry.format)):
        for first, width, line, bit in pieces:
            for parity in range(2):
                field = dwords[:, :, :, line] >> (bit + 16 * parity) & (1 << width) - 1
                codes[:, :, :, :, pair, parity] |= (field << first).permute(0, 3, 1, 2)
    flat = codes.view(cut.blocks * ROWS, cut.k_padded)[keep][:, : geometry.k]
    flat = flat.to(torch.uint8).contiguous()
    if geometry.format.is_nested:
        parts["planes"] = pack_planes(flat)
    else:
        parts["codes"] = pack_codes(flat, cut.bits)
    return parts


class Rows16(Layout):
    """Blocks of 16 rows as one stream each; see kernels/cpu/csrc/fdk_cpu.h for the bytes."""

    name = "rows16"
    storages = ("plain", "nested", "sparse")
    devices = ("cpu", "meta")

    def pack(self, geometry: Geometry, parts: Parts) -> Parts:
        check_canonical(geometry, parts)
        packed = {"data": self.pack_data(geometry, parts)}
        if "table" in parts:
            packed["table"] = parts["table"]
        if "zeros" in parts:
            packed["zeros"] = parts["zeros"].new_empty(0)
        return packed

    def unpack(self, geometry: Geometry, parts: Parts) -> Parts:
        zeros_dtype = parts["zeros"].dtype if "zeros" in parts else None
        found = self.unpack_data(geometry, parts["data"], zeros_dtype)
        if "table" in parts:
            found["table"] = parts["table"]
        return {name: found[name] for name in canonical_shapes(geometry)}

    def pack_data(self, geometry: Geometry, parts: Parts) -> Tensor:
        """The `data` part; a subclass may make it another way, byte for byte the same."""
        return pack(geometry, parts)

    def unpack_data(self, geometry: Geometry, data: Tensor, zeros_dtype: torch.dtype | None) -> Parts:
        """Codes, scales and zeros out of the `data` part."""
        return unpack(geometry, data, zeros_dtype)
