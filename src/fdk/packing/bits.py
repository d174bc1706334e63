"""Dense little-endian bit streams: `bits` bits per code, no padding inside a row.

Code j of a row occupies stream bits [j*bits, (j+1)*bits); stream bit i is bit i%8 of byte i//8. Eight codes
make `bits` bytes, so a group of eight is packed as one 64-bit word by folding neighbouring lanes together
three times: 8-bit lanes to 2*bits, 16-bit lanes to 4*bits, 32-bit lanes to 8*bits.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn.functional import pad

from fdk.errors import FormatError

if sys.byteorder != "little":
    raise ImportError("fdk stores little-endian bit streams and has no big-endian path; use a little-endian machine")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _lane_mask(lane: int, width: int, first: int) -> int:
    """Ones in `width` bits from bit `first` of every pair of lanes of `lane` bits, as a signed 64-bit integer."""
    ones = (1 << width) - 1
    return _signed(sum(ones << start for start in range(first, 64, 2 * lane)))


def row_bytes(k: int, bits: int) -> int:
    """Bytes of one packed row of k codes."""
    return -(-k * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 [n, k] (each < 2^bits) into a stream uint8 [n, ceil(k*bits/8)]; spare bits are zero."""
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise FormatError(f"codes must be uint8 [n, k], not {codes.dtype} {list(codes.shape)}")
    n, k = codes.shape
    if bits == 8:
        return codes.clone(memory_format=torch.contiguous_format)
    octets = -(-k // 8)
    words = pad(codes, (0, -k % 8)).reshape(-1).view(torch.int64)
    for lane in (8, 16, 32):
        width = bits * lane // 8
        # A right shift of a negative word smears its sign, so the odd lanes are masked after it.
        high = (words >> (lane - width)) & _lane_mask(lane, width, first=width)
        words = (words & _lane_mask(lane, width, first=0)) | high
    stream = words.view(torch.uint8).reshape(n, octets, 8)[:, :, :bits]
    return stream.reshape(n, octets * bits)[:, : row_bytes(k, bits)].contiguous()


def _transpose_octets(words: Tensor) -> Tensor:
    """int64 words as 8 x 8 bits, byte i bit j to byte j bit i; its own inverse. Hacker's Delight, 7-3."""
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        moved = (words ^ (words >> shift)) & mask
        words = words ^ moved ^ (moved << shift)
    return words


def pack_planes(codes: Tensor) -> Tensor:
    """Bit planes uint8 [n, 8, ceil(k/8)] of codes uint8 [n, k], the most significant first; spare bits are zero.

    Plane p holds bit 7 - p of every code: that of code j is bit j % 8 of byte j // 8.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise FormatError(f"codes must be uint8 [n, k], not {codes.dtype} {list(codes.shape)}")
    n, k = codes.shape
    words = pad(codes, (0, -k % 8)).reshape(-1).view(torch.int64)
    planes = _transpose_octets(words).view(torch.uint8).view(n, -(-k // 8), 8)
    return planes.flip(2).transpose(1, 2).contiguous()


def unpack_planes(planes: Tensor, k: int, count: int = 8) -> Tensor:
    """The `count` leading bits of every code, uint8 [n, k] below 2^count, from planes uint8 [n, 8, ceil(k/8)]."""
    if planes.dtype != torch.uint8 or planes.dim() != 3 or planes.shape[1:] != (8, row_bytes(k, 1)):
        raise FormatError(
            f"bit planes with k = {k} must be uint8 [n, 8, {row_bytes(k, 1)}], not {planes.dtype} {list(planes.shape)}"
        )
    n, _, octets = planes.shape
    leading = pad(planes[:, :count].transpose(1, 2).flip(2), (8 - count, 0)).contiguous()
    codes = _transpose_octets(leading.view(-1).view(torch.int64)).view(torch.uint8).view(n, octets * 8)
    return (codes[:, :k] >> (8 - count)).contiguous()


def unpack_codes(stream: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of `pack_codes`: stream uint8 [n, ceil(k*bits/8)] to codes uint8 [n, k]."""
    if stream.dtype != torch.uint8 or stream.dim() != 2 or stream.shape[1] != row_bytes(k, bits):
        raise FormatError(
            f"packed codes of {bits} bits with k = {k} must be uint8 [n, {row_bytes(k, bits)}], "
            f"not {stream.dtype} {list(stream.shape)}"
        )
    n = stream.shape[0]
    if bits == 8:
        return stream.clone(memory_format=torch.contiguous_format)
    octets = -(-k // 8)
    words = pad(stream, (0, octets * bits - stream.shape[1])).reshape(n, octets, bits)
    words = pad(words, (0, 8 - bits)).reshape(-1).view(torch.int64)
    for lane in (32, 16, 8):
        width = bits * lane // 8
        high = (words & _lane_mask(lane, width, first=width)) << (lane - width)
        words = (words & _lane_mask(lane, width, first=0)) | high
    return words.view(torch.uint8).reshape(n, octets * 8)[:, :k].contiguous()
