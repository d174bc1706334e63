"""Marlin's packed tensors: symmetric int4, or its table variant, in the fragment order of its kernel.

B   int32 [k/16, 2n]    eight codes a word. With kk = 16 K + r along k and nn = 64 J + 16 j + c along n, the word is
                        B[K, 128 J + 4 i + j], i = 4 (c % 8) + (r % 8) // 2, and its nibble p, counted from the least
                        significant, holds e = 4 (c // 8) + 2 (r // 8) + r % 2, where [0, 2, 4, 6, 1, 3, 5, 7][p] = e
                        (int4) or [0, 1, 4, 5, 2, 3, 6, 7][p] = e (table)
s   half [k/group, n]   scales, columns permuted within every 64 (grouped) or 32 (one scale per column)

int4: value = (code - 8) * s. Table: value = table[code] * s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdk.arguments import check_tensors
from fdk.errors import FormatError
from fdk.formats import Format
from fdk.formats.registry import INT, LUT
from fdk.packing.bits import pack_codes, unpack_codes
from fdk.weight import QuantisedWeight

# e at nibble p of a word.
NIBBLES = {"int4": (0, 2, 4, 6, 1, 3, 5, 7), "lut4": (0, 1, 4, 5, 2, 3, 6, 7)}
_GROUPED = [i + 8 * j for i in range(8) for j in range(8)]
_PER_COLUMN = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


def from_marlin(B: Tensor, s: Tensor, table: Tensor | None = None, name: str = "weight") -> QuantisedWeight:
    """The weight [n, k] that Marlin stores as (B, s): int4, or lut4 if a `table` is given.

    table   [16], or the pair table [256, 2] whose entry v is (table[v & 15], table[v >> 4]); it also says that B has
            the nibble order of the table variant.
    The group is k over the rows of s; one row is one scale per output. FormatError, naming `name`, if shapes, dtypes or
    the pair table do not fit together.
    """
    check_tensors(name, B=B, s=s)
    if table is not None:
        check_tensors(name, table=table)
    if B.dtype != torch.int32 or B.dim() != 2 or B.shape[1] % 128:
        raise FormatError(f"{name}: B must be int32 [k/16, 2n] with n a multiple of 64, not {B.dtype} {list(B.shape)}")
    k, n = 16 * B.shape[0], B.shape[1] // 2
    if s.dim() != 2 or s.shape[1] != n or not s.shape[0] or k % s.shape[0]:
        raise FormatError(f"{name}: s must be [k/group, {n}] with rows that divide k = {k}, not {list(s.shape)}")
    kind = "int4" if table is None else "lut4"
    codes = _codes_of(B, kind)
    groups = s.shape[0]
    fmt = Format(INT if table is None else LUT, 4, None if groups == 1 else k // groups)
    order = torch.tensor(_scale_order(groups), device=s.device)
    scales = torch.empty_like(s).view(groups, -1, len(order))
    scales[:, :, order] = s.reshape(groups, -1, len(order))
    parts = {"codes": pack_codes(codes, 4), "scales": scales.view(groups, n).T.contiguous()}
    if table is not None:
        parts["table"] = single_table(table, name).to(s.dtype)
    return QuantisedWeight.from_parts(fmt, k, parts, name=name)


def to_marlin(weight: QuantisedWeight) -> dict[str, Tensor]:
    """Inverse of `from_marlin`: {B, s} and, of a lut4 weight, {table}; FormatError if Marlin has no such form.

    Marlin takes int4 or one table, n a multiple of 256, k of 128, groups of 128 (64 with a table) or one scale per row.
    """
    weight = weight.canonical()
    fmt, (n, k) = weight.format, weight.shape
    plain = fmt.storage == "plain" and fmt.bits == 4 and fmt.kind in (INT, LUT) and len(weight.geometry.row_ends) == 1
    if not plain or n % 256 or k % 128:
        raise FormatError(
            f"{weight!r} has no form in Marlin, which takes int4 or one table, n % 256 = 0 and k % 128 = 0"
        )
    kind = "int4" if fmt.kind is INT else "lut4"
    scales = weight.parts["scales"].T
    order = torch.tensor(_scale_order(len(scales)), device=scales.device)
    packed = {
        "B": _words_of(unpack_codes(weight.parts["codes"], 4, k), kind),
        "s": scales.reshape(len(scales), -1, len(order))[:, :, order].reshape(len(scales), n),
    }
    if fmt.kind is LUT:
        packed["table"] = weight.parts["table"][0].clone()
    return packed


def single_table(table: Tensor, name: str = "weight") -> Tensor:
    """The table [16] of a table [16] or of a pair table [256, 2]; FormatError if it is neither."""
    if table.shape == (16,):
        return table
    if table.shape != (256, 2):
        raise FormatError(f"{name}: a table of Marlin is [16] or, for pairs, [256, 2], not {list(table.shape)}")
    single = table[:16, 0]
    pairs = torch.stack([single.repeat(16), single.repeat_interleave(16)], 1)
    if not torch.equal(pairs, table):
        raise FormatError(
            f"{name}: entry v of the pair table is not (table[v % 16], table[v // 16]) of one table; "
            "check the source file"
        )
    return single.contiguous()


def _scale_order(groups: int) -> list[int]:
    """Position t within a stretch of columns holds the scale of this column."""
    return _PER_COLUMN if groups == 1 else _GROUPED


def _codes_of(B: Tensor, kind: str) -> Tensor:
    """uint8 [n, k] of words [k/16, 2n]."""
    places = torch.tensor([4 * NIBBLES[kind].index(e) for e in range(8)], dtype=torch.int32, device=B.device)
    nibbles = ((B[..., None] >> places) & 15).to(torch.uint8)
    # [K, J, c % 8, (r % 8) // 2, j, c // 8, r // 8, r % 2] to [J, j, c // 8, c % 8] x [K, r // 8, (r % 8) // 2, r % 2]
    parts = nibbles.view(B.shape[0], -1, 8, 4, 4, 2, 2, 2).permute(1, 4, 5, 2, 0, 6, 3, 7)
    return parts.reshape(B.shape[1] // 2, 16 * B.shape[0])


def _words_of(codes: Tensor, kind: str) -> Tensor:
    """Inverse of `_codes_of`."""
    n, k = codes.shape
    parts = codes.view(n // 64, 4, 2, 8, k // 16, 2, 4, 2).permute(4, 0, 3, 6, 1, 2, 5, 7).reshape(k // 16, 2 * n, 8)
    places = torch.tensor([4 * NIBBLES[kind].index(e) for e in range(8)], dtype=torch.int32, device=codes.device)
    return (parts.to(torch.int32) << places).sum(-1, dtype=torch.int32)
