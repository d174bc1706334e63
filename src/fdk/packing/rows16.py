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

from fdk.packing.bits import pack_codes, unpack_codes
from fdk.packing.layouts import Geometry, Layout, Parts, check_canonical

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

    @property
    def super_bytes(self) -> int:
        return self.groups_per_super * ROWS * (self.scale_bytes + self.zero_bytes) + self.units * 64 * self.bits

    @property
    def block_bytes(self) -> int:
        return -(-self.supers * self.super_bytes // 64) * 64

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
    device = parts["codes"].device
    if device.type == "meta":
        return torch.empty(cut.blocks * cut.block_bytes, dtype=torch.uint8, device=device)
    rows = _block_rows(geometry, device)
    codes = _gather_rows(unpack_codes(parts["codes"], cut.bits, geometry.k), rows)
    codes = torch.nn.functional.pad(codes, (0, cut.k_padded - geometry.k))
    pairs = codes.view(cut.blocks, ROWS, cut.supers, cut.units, 16, 2).to(torch.int64)
    halves = pairs.new_zeros(cut.blocks, cut.supers, cut.units, cut.bits, ROWS, 2)
    for pair, pieces in enumerate(_places(cut.bits)):
        source = pairs[:, :, :, :, pair].permute(0, 2, 3, 1, 4)
        for first, width, line, bit in pieces:
            halves[:, :, :, line] |= (source >> first & (1 << width) - 1) << bit
    dwords = (halves[..., 0] | halves[..., 1] << 16).to(torch.int32).contiguous()
    pieces = [dwords.view(torch.uint8).reshape(cut.blocks, cut.supers, cut.units * 64 * cut.bits)]
    for tensor in (zeros, parts["scales"]):
        if tensor is None:
            continue
        padded = torch.nn.functional.pad(tensor, (0, cut.supers * cut.groups_per_super - geometry.groups))
        by_row = _gather_rows(padded, rows).view(cut.blocks, ROWS, cut.supers, cut.groups_per_super)
        lines = by_row.permute(0, 2, 3, 1).contiguous().view(torch.uint8)
        size = cut.groups_per_super * ROWS * tensor.element_size()
        pieces.insert(0, lines.reshape(cut.blocks, cut.supers, size))
    blocks = torch.cat(pieces, 2).view(cut.blocks, cut.supers * cut.super_bytes)
    return torch.nn.functional.pad(blocks, (0, cut.block_bytes - blocks.shape[1])).reshape(-1)


def unpack(geometry: Geometry, data: Tensor, zeros_dtype: torch.dtype | None) -> Parts:
    """Codes, scales and zeros of the canonical parts, bit for bit those that `pack` was given."""
    cut = sizes(geometry, zeros_dtype)
    device = data.device
    if device.type == "meta":
        row = geometry.format.code_bytes(1, geometry.k)
        parts = {"codes": torch.empty(geometry.n, row, dtype=torch.uint8, device=device)}
        parts["scales"] = torch.empty(geometry.n, geometry.groups, dtype=geometry.dtype, device=device)
        if zeros_dtype:
            parts["zeros"] = torch.empty(geometry.n, geometry.groups, dtype=zeros_dtype, device=device)
        return parts
    keep = _block_rows(geometry, device) < geometry.n
    blocks = data.view(cut.blocks, cut.block_bytes)[:, : cut.supers * cut.super_bytes]
    supers = blocks.reshape(cut.blocks, cut.supers, cut.super_bytes)
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
    dwords = supers[:, :, at:].contiguous().view(torch.int32)
    dwords = dwords.view(cut.blocks, cut.supers, cut.units, cut.bits, ROWS).to(torch.int64) & 0xFFFFFFFF
    codes = dwords.new_zeros(cut.blocks, ROWS, cut.supers, cut.units, 16, 2)
    for pair, pieces in enumerate(_places(cut.bits)):
        for first, width, line, bit in pieces:
            for parity in range(2):
                field = dwords[:, :, :, line] >> (bit + 16 * parity) & (1 << width) - 1
                codes[:, :, :, :, pair, parity] |= (field << first).permute(0, 3, 1, 2)
    flat = codes.view(cut.blocks * ROWS, cut.k_padded)[keep][:, : geometry.k]
    parts["codes"] = pack_codes(flat.to(torch.uint8).contiguous(), cut.bits)
    return parts


class Rows16(Layout):
    """Blocks of 16 rows as one stream each; see kernels/cpu/csrc/fdk_cpu.h for the bytes."""

    name = "rows16"
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
        return {name: found[name] for name in ("codes", "scales", "table", "zeros") if name in found}

    def pack_data(self, geometry: Geometry, parts: Parts) -> Tensor:
        """The `data` part; a subclass may make it another way, byte for byte the same."""
        return pack(geometry, parts)

    def unpack_data(self, geometry: Geometry, data: Tensor, zeros_dtype: torch.dtype | None) -> Parts:
        """Codes, scales and zeros out of the `data` part."""
        return unpack(geometry, data, zeros_dtype)
