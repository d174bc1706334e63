"""The packed bytes of the source project: block-scaled table weights, most significant bits first.

weight_data  uint8 [n, k*bits/8], bits 1, 2, 4 or 8: element e of a byte (k = byte*E + e, E = 8/bits) is its
             bits [8 - bits*(e+1), 8 - bits*e), so that an even k has the high nibble of 4 bits
scale        [n, k/group] in the activation dtype
lut          ascending table of at most 2^bits values; a shorter one repeats its last
byte_lut     [256, E]: the E values of every byte; holds the same table
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdk.arguments import check_tensors
from fdk.errors import FormatError
from fdk.formats import Format
from fdk.formats.registry import LUT
from fdk.packing.bits import pack_codes, unpack_codes
from fdk.weight import QuantisedWeight

BITS = (1, 2, 4, 8)


def table_of(byte_lut: Tensor, name: str = "weight") -> Tensor:
    """The table [2^bits] behind a byte table [256, 8/bits]; FormatError if the two do not agree."""
    check_tensors(name, byte_lut=byte_lut)
    per_byte = byte_lut.shape[-1] if byte_lut.dim() == 2 else 0
    if byte_lut.dim() != 2 or byte_lut.shape[0] != 256 or per_byte not in (1, 2, 4, 8):
        raise FormatError(
            f"{name}: byte_lut must be [256, 1, 2, 4 or 8], not {list(byte_lut.shape)}; check the source file"
        )
    bits = 8 // per_byte
    # The last element of byte v < 2^bits is code v itself.
    table = byte_lut[: 1 << bits, -1].contiguous()
    if not torch.equal(table[_byte_codes(bits, byte_lut.device).long()], byte_lut):
        raise FormatError(f"{name}: byte_lut is not the byte form of one table of {bits} bits; check the source file")
    return table


def _byte_codes(bits: int, device: torch.device) -> Tensor:
    """uint8 [256, 8/bits]: the codes in every byte, in order of k."""
    shifts = torch.arange(8 - bits, -1, -bits, device=device)
    return ((torch.arange(256, device=device)[:, None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8)


def from_source(weight_data: Tensor, scale: Tensor, lut: Tensor, name: str = "weight") -> QuantisedWeight:
    """The weight [n, k] that the source project stores as (weight_data, scale, lut or byte_lut).

    lut: the byte table [256, 8/bits], which says how many bits there are, or a plain table [2^bits] whose full length
    does. FormatError, naming `name`, if shapes, dtypes or the table do not fit together.
    """
    check_tensors(name, weight_data=weight_data, scale=scale, lut=lut)
    if weight_data.dtype != torch.uint8 or weight_data.dim() != 2:
        raise FormatError(
            f"{name}: weight_data must be uint8 [n, k*bits/8], not {weight_data.dtype} {list(weight_data.shape)}"
        )
    if lut.dim() == 2:
        lut = table_of(lut, name)
    bits = int(lut.numel()).bit_length() - 1
    if lut.dim() != 1 or bits not in BITS or lut.numel() != 1 << bits:
        raise FormatError(f"{name}: a table of the source project has 2, 4, 16 or 256 values, not {list(lut.shape)}")
    n, row = weight_data.shape
    k = row * (8 // bits)
    if scale.dim() != 2 or scale.shape[0] != n or not scale.shape[1] or k % scale.shape[1]:
        raise FormatError(f"{name}: scale must be [{n}, groups] with groups dividing k = {k}, not {list(scale.shape)}")
    fmt = Format(LUT, bits, k // scale.shape[1])
    codes = _byte_codes(bits, weight_data.device)[weight_data.long()].view(n, k)
    parts = {"codes": pack_codes(codes, bits), "scales": scale.clone(), "table": lut.to(scale.dtype, copy=True)}
    return QuantisedWeight.from_parts(fmt, k, parts, name=name)


def to_source(weight: QuantisedWeight) -> dict[str, Tensor]:
    """Inverse of `from_source`: {weight_data, scale, lut, byte_lut}; FormatError if the source has no such form."""
    weight = weight.canonical()
    fmt, (n, k) = weight.format, weight.shape
    if not fmt.is_table or fmt.bits not in BITS or len(weight.geometry.row_ends) != 1 or k * fmt.bits % 8:
        raise FormatError(f"{weight!r} has no form in the source project, which has one table of 1, 2, 4 or 8 bits")
    codes = unpack_codes(weight.parts["codes"], fmt.bits, k).view(n, -1, 8 // fmt.bits)
    shifts = torch.arange(8 - fmt.bits, -1, -fmt.bits, device=codes.device)
    data = (codes.int() << shifts).sum(-1).to(torch.uint8)
    table = weight.parts["table"][0]
    byte_lut = table[_byte_codes(fmt.bits, codes.device).long()]
    return {"weight_data": data, "scale": weight.parts["scales"].clone(), "lut": table.clone(), "byte_lut": byte_lut}
