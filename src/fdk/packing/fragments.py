"""The layout of the CUDA kernels: codes in the order of tensor-core fragments, exactly `bits` bits per weight.

Rows are cut into blocks of 64 and k into units of 64 (both padded with zeros); a unit is what one warp reads with
`bits` 16-byte loads per lane. Lane = 4*g + t holds 128 weights of it, 32 for each of four row tiles r:

    e = 8*s + 4*h + j  ->  row 16*r + 8*h + g of the block, column 16*s + 8*(j // 2) + 2*t + j % 2 of the unit

so step s of a row tile is the A operand of one mma.m16n8k16, or a quarter of that of one wgmma, whose k position p is
column 16*s + p: the other operand's columns stay as they lie in memory, where the copy engine can bring them from.

Parts of an [n, k] weight with B blocks, U units and G groups:
    codes   int32 [B, U, bits, 32, 4]  the words of a lane are [r, word] in order, four to a 16-byte load
            int32 [B, U, 8, 32, 4]     nested formats: the planes of the master codes, the most significant first;
                                       word r of a lane is row tile r, code e at bit 16*(e % 2) + e // 2. The leading
                                       planes of a unit, which are all that a slice reads, are one piece
            int32 [B, U, 6, 16, 4]     16:32 sparse formats: lanes 2i and 2i + 1 share 24 words, (mask, low codes, high
                                       codes) of block i % 2 of 32 columns of row 16*r + 8*h + i // 2 at 6*r + 3*h
    scales  [B*G + spare, 64]          row 16*r + 8*h + g at g*8 + r*2 + h: one 16-byte load per lane
    zeros   [B*G + spare, 64]          in the order of the scales
    table   [tables, 2^bits]           as canonical; every table's range of rows starts a block of its own
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from fdk.formats.spec import BLOCK as SPARSE_BLOCK
from fdk.packing.bits import pack_codes, pack_planes, unpack_codes, unpack_planes
from fdk.packing.layouts import Geometry, Layout, Parts, register_layout

BLOCK = 64
"""Rows of a block."""
UNIT = 64
"""Columns of a unit."""

# A kernel masks a field out of a word and uses it as an offset into a table of 128-byte rows, so fields start at bit 7.
ROTATION = 7

# Kernels copy the groups of whole stages, up to four units of four groups each; where k ends inside a unit that reaches
# past the last block's groups, and whatever lay there would be multiplied by zero: NaN if it is one.
_SPARE = 16

# Codes expanded to 32 bits at a time: bounds the scratch memory of packing.
_CHUNK = 1 << 26

Piece = tuple[int, int, int, int, int]


def _before_rotation(bits: int) -> list[int]:
    """First bit of each of a lane's 32 codes of 2, 4 or 8 bits, before the words are rotated."""
    if bits == 2:
        # A byte indexes a table of four values: two neighbours of row g, then of row g+8, a register pair each.
        return [8 * (e // 8 * 2 + e // 2 % 2) + 4 * (e // 4 % 2) + 2 * (e % 2) for e in range(32)]
    return [e * bits for e in range(32)]


def _bit_positions(bits: int) -> list[list[int]]:
    """Bit [e][i] of a lane's 32 codes in their `bits` words: where bit i of code e lies."""
    if bits == 1:
        # Halves of a register pair lie 16 bits apart; shifts by 0, 2, 4, 6 bring each to bit 15, 14, 7 or 6.
        return [[16 * (e % 2) + 15 - (e // 4) % 2 - 8 * ((e // 2) % 2) - 2 * (e // 8)] for e in range(32)]
    if bits in (2, 4, 8):
        return [[p // 32 * 32 + (p % 32 + i + ROTATION) % 32 for i in range(bits)] for p in _before_rotation(bits)]
    if bits == 3:
        # Five 6-bit pairs in bits 1 to 30 of each word; the sixteenth pair takes bits 31 and 0 of all three.
        positions = []
        for e in range(32):
            pair, first = divmod(e, 2)
            for_pair = (
                [pair // 5 * 32 + 1 + pair % 5 * 6 + i for i in range(6)] if pair < 15 else [31, 0, 63, 32, 95, 64]
            )
            positions.append(for_pair[3 * first : 3 * first + 3])
        return positions
    return [[e * bits + i for i in range(bits)] for e in range(32)]


@cache
def pieces(bits: int) -> tuple[Piece, ...]:
    """Runs of bits that move together: (code e, first bit of the code, width, word, first bit of the word)."""
    found: list[list[int]] = []
    for e, positions in enumerate(_bit_positions(bits)):
        for i, position in enumerate(positions):
            word, bit = divmod(position, 32)
            last = found[-1] if found else None
            if last and i and last[3] == word and last[4] + last[2] == bit:
                last[2] += 1
            else:
                found.append([e, i, 1, word, bit])
    return tuple(tuple(piece) for piece in found)


def _rotate(words: Tensor, by: int) -> Tensor:
    """Words rotated left by `by` bits; the right shift of a negative word smears its sign, so it is masked."""
    return words << by | (words >> (32 - by) & ((1 << by) - 1))


def _shifts(bits: int, device: torch.device) -> Tensor:
    first = [positions[0] for positions in _bit_positions(1)] if bits == 1 else _before_rotation(bits)[: 32 // bits]
    return torch.tensor(first, dtype=torch.int32, device=device)


def _words_from_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., 32] in the order of e to int32 [..., bits]."""
    if 32 % bits == 0:
        per = codes.reshape(*codes.shape[:-1], bits, 32 // bits).to(torch.int32)
        words = (per << _shifts(bits, codes.device)).sum(-1, dtype=torch.int32)
        return words if bits == 1 else _rotate(words, ROTATION)
    words = [torch.zeros(codes.shape[:-1], dtype=torch.int32, device=codes.device) for _ in range(bits)]
    planes = codes.to(torch.int32).unbind(-1)
    for e, first, width, word, bit in pieces(bits):
        words[word] |= (planes[e] >> first & ((1 << width) - 1)) << bit
    return torch.stack(words, -1)


def _codes_from_words(words: Tensor, bits: int) -> Tensor:
    """Inverse of `_words_from_codes`."""
    if 32 % bits == 0:
        straight = words if bits == 1 else _rotate(words, 32 - ROTATION)
        codes = straight[..., None] >> _shifts(bits, words.device) & ((1 << bits) - 1)
        return codes.to(torch.uint8).flatten(-2)
    planes = words.unbind(-1)
    codes = [torch.zeros_like(planes[0]) for _ in range(32)]
    for e, first, width, word, bit in pieces(bits):
        codes[e] |= (planes[word] >> bit & ((1 << width) - 1)) << first
    return torch.stack(codes, -1).to(torch.uint8)


def block_counts(geometry: Geometry) -> tuple[int, ...]:
    """Blocks of 64 rows of each table's range of rows."""
    return tuple(-(-(end - start) // BLOCK) for start, end in geometry.ranges)


def units(k: int) -> int:
    """Units of 64 columns, the last one padded."""
    return -(-k // UNIT)


def _pad_ranges(rows: Tensor, geometry: Geometry) -> Tensor:
    """[n, ...] to [B*64, ...]: every range of rows padded with zeros to whole blocks."""
    if len(geometry.row_ends) == 1:
        return pad(rows, (0, 0, 0, -rows.shape[0] % BLOCK))
    return torch.cat([pad(rows[a:b], (0, 0, 0, (a - b) % BLOCK)) for a, b in geometry.ranges])


def _unpad_ranges(rows: Tensor, geometry: Geometry) -> Tensor:
    """Inverse of `_pad_ranges`."""
    if len(geometry.row_ends) == 1:
        return rows[: geometry.n].contiguous()
    parts, offset = [], 0
    for (start, end), blocks in zip(geometry.ranges, block_counts(geometry), strict=True):
        parts.append(rows[offset : offset + end - start])
        offset += blocks * BLOCK
    return torch.cat(parts)


def _lane_codes(codes: Tensor) -> Tensor:
    """uint8 [b*64, k] to [b, U, 32, 4, 32]: by lane, row tile and e, with zeros past k."""
    codes = pad(codes, (0, -codes.shape[1] % UNIT))
    b, u = codes.shape[0] // BLOCK, codes.shape[1] // UNIT
    # [b, r, h, g, u, s, j // 2, t, j % 2] to [b, u, g, t, r, s, h, j // 2, j % 2]
    return codes.view(b, 4, 2, 8, u, 4, 2, 4, 2).permute(0, 4, 3, 7, 1, 5, 2, 6, 8).reshape(b, u, 32, 4, 32)


def _row_codes(codes: Tensor, k: int) -> Tensor:
    """Inverse of `_lane_codes`."""
    b, u = codes.shape[:2]
    rows = codes.view(b, u, 8, 4, 4, 4, 2, 2, 2).permute(0, 4, 6, 2, 1, 5, 7, 3, 8)
    return rows.reshape(b * BLOCK, u * UNIT)[:, :k].contiguous()


def _pack_block_codes(stream: Tensor, bits: int, k: int) -> Tensor:
    """Canonical codes uint8 [b*64, ...] to int32 [b, U, bits, 32, 4]."""
    words = _words_from_codes(_lane_codes(unpack_codes(stream, bits, k)), bits)
    return words.view(*words.shape[:3], bits, 4).transpose(2, 3).contiguous()


def _unpack_block_codes(packed: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of `_pack_block_codes`."""
    b, u = packed.shape[:2]
    words = packed.transpose(2, 3).reshape(b, u, 32, 4, bits)
    return pack_codes(_row_codes(_codes_from_words(words, bits), k), bits)


def _plane_shifts(device: torch.device) -> Tensor:
    """Bit of each of a lane's 32 codes in the words of every plane."""
    return torch.tensor([16 * (e % 2) + e // 2 for e in range(32)], dtype=torch.int32, device=device)


def _pack_block_planes(planes: Tensor, bits: int, k: int) -> Tensor:
    """Canonical planes uint8 [b*64, bits * ...] of all `bits` planes of a row to int32 [b, U, bits, 32, 4]."""
    codes = _lane_codes(unpack_planes(planes.unflatten(1, (bits, planes.shape[1] // bits)), k))
    shifts = _plane_shifts(planes.device)
    words = [((codes >> (bits - 1 - p) & 1).int() << shifts).sum(-1, dtype=torch.int32) for p in range(bits)]
    return torch.stack(words, 2)


def _unpack_block_planes(packed: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of `_pack_block_planes`."""
    shifts = _plane_shifts(packed.device)
    codes = torch.zeros((*packed.shape[:2], 32, 4, 32), dtype=torch.uint8, device=packed.device)
    for p, words in enumerate(packed.unbind(2)):
        codes |= (words[..., None] >> shifts & 1).to(torch.uint8) << (bits - 1 - p)
    return pack_planes(_row_codes(codes, k)).flatten(1)


def _pack_block_kept(stream: Tensor, bits: int, k: int) -> Tensor:
    """Masks and codes uint8 [b*64, 12 * ...] of blocks of 32 weights, 12 bytes each, to int32 [b, U, 6, 16, 4]."""
    records = stream.reshape(-1).view(torch.int32).view(len(stream), k // SPARSE_BLOCK, 3)
    records = pad(records, (0, 0, 0, records.shape[1] % 2))
    b, u = len(stream) // BLOCK, units(k)
    # [b, r, h, g, u, block, word] to [b, u, g, block, r, h, word]
    words = records.view(b, 4, 2, 8, u, 2, 3).permute(0, 4, 3, 5, 1, 2, 6).reshape(b, u, 16, 6, 4)
    return words.transpose(2, 3).contiguous()


def _unpack_block_kept(packed: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of `_pack_block_kept`."""
    b, u = packed.shape[:2]
    words = packed.transpose(2, 3).reshape(b, u, 8, 2, 4, 2, 3).permute(0, 4, 5, 2, 1, 3, 6)
    records = words.reshape(b * BLOCK, u * 2, 3)[:, : k // SPARSE_BLOCK]
    return records.reshape(-1).view(torch.uint8).view(b * BLOCK, k // SPARSE_BLOCK * 12)


_PACKERS = {
    "plain": (_pack_block_codes, _unpack_block_codes),
    "nested": (_pack_block_planes, _unpack_block_planes),
    "sparse": (_pack_block_kept, _unpack_block_kept),
}


def _stored(geometry: Geometry, parts: Parts) -> Tensor:
    """uint8 [n, bytes]: the parts that hold the codes, a row's bytes in the order that packing takes them."""
    if geometry.format.is_nested:
        return parts["planes"].flatten(1)
    if geometry.format.sparse:
        blocks = geometry.k // SPARSE_BLOCK
        records = (parts["mask"].unflatten(1, (blocks, 4)), parts["codes"].unflatten(1, (blocks, 8)))
        return torch.cat(records, 2).flatten(1)
    return parts["codes"]


def _canonical(geometry: Geometry, rows: Tensor) -> Parts:
    """Inverse of `_stored`."""
    if geometry.format.is_nested:
        return {"planes": rows.unflatten(1, (geometry.format.bits, rows.shape[1] // geometry.format.bits))}
    if geometry.format.sparse:
        records = rows.unflatten(1, (geometry.k // SPARSE_BLOCK, 12))
        return {"codes": records[:, :, 4:].flatten(1), "mask": records[:, :, :4].flatten(1)}
    return {"codes": rows}


def spare_groups(geometry: Geometry) -> int:
    """Rows of zeros behind the scales, and behind the zeros."""
    return _SPARE if geometry.k % UNIT else 0


def _pack_groups(values: Tensor, geometry: Geometry) -> Tensor:
    """[n, G] to [B*G + spare, 64]."""
    padded = _pad_ranges(values, geometry)
    rows = padded.view(-1, 4, 2, 8, geometry.groups).permute(0, 4, 3, 1, 2).reshape(-1, BLOCK)
    return pad(rows, (0, 0, 0, spare_groups(geometry)))


def _unpack_groups(values: Tensor, geometry: Geometry) -> Tensor:
    """Inverse of `_pack_groups`."""
    stored = values[: len(values) - spare_groups(geometry)]
    rows = stored.view(-1, geometry.groups, 8, 4, 2).permute(0, 3, 4, 2, 1).reshape(-1, geometry.groups)
    return _unpad_ranges(rows, geometry)


class Fragments(Layout):
    """See the module; works on any device, the CPU and meta included."""

    name = "fragments"
    storages = ("plain", "nested", "sparse")

    def supports(self, geometry: Geometry) -> str | None:
        fmt = geometry.format
        if fmt.sparse and fmt.has_zeros:
            return f"its layout {self.name} holds no sparse codes with zero points"
        if fmt.sparse and fmt.group is not None and fmt.group % UNIT:
            return f"its layout {self.name} holds sparse codes in groups of a multiple of {UNIT}, not {fmt.group}"
        return super().supports(geometry)

    def pack(self, geometry: Geometry, parts: Parts) -> Parts:
        fmt, k = geometry.format, geometry.k
        pack_block, _ = _PACKERS[fmt.storage]
        stream = _pad_ranges(_stored(geometry, parts), geometry)
        b, u = stream.shape[0] // BLOCK, units(k)
        shape = (6, 16, 4) if fmt.sparse else (fmt.bits, 32, 4)
        codes = torch.empty((b, u, *shape), dtype=torch.int32, device=stream.device)
        step = max(1, _CHUNK // max(1, BLOCK * u * UNIT))
        for i in range(0, b, step):
            codes[i : i + step] = pack_block(stream[i * BLOCK : (i + step) * BLOCK], fmt.bits, k)
        packed = {"codes": codes, "scales": _pack_groups(parts["scales"], geometry)}
        if "zeros" in parts:
            packed["zeros"] = _pack_groups(parts["zeros"], geometry)
        if "table" in parts:
            packed["table"] = parts["table"]
        return packed

    def unpack(self, geometry: Geometry, parts: Parts) -> Parts:
        fmt, k, codes = geometry.format, geometry.k, parts["codes"]
        _, unpack_block = _PACKERS[fmt.storage]
        step = max(1, _CHUNK // max(1, BLOCK * units(k) * UNIT))
        rows = torch.cat([unpack_block(chunk, fmt.bits, k) for chunk in codes.split(step)])
        canonical = _canonical(geometry, _unpad_ranges(rows, geometry))
        canonical["scales"] = _unpack_groups(parts["scales"], geometry)
        if "table" in parts:
            canonical["table"] = parts["table"]
        if "zeros" in parts:
            canonical["zeros"] = _unpack_groups(parts["zeros"], geometry)
        return canonical


FRAGMENTS = register_layout(Fragments())
