"""int4matmul's tensors: integers of 2, 3 or 4 bits with zero points, its exponent modes, and 16:32 sparsity at 4 bits.

qweight  int32 [K*bits/32, N]   a little-endian stream along K for every output; sparse: [K/16, N], the 16 kept codes of
                                every 32 in order
zeros    half [K/group, N]      not packed, may be fractional
scales   half [K/group, N]
mask     int32 [K/32, N]        sparse: bit k % 32 of a word, 1 if weight k is kept

linear       value = (q - zero) * scale
exponent     value = +-2^e * scale + zero: the top bit of q is the sign, the others are e
dynamic      linear where the scale is positive, exponent with its absolute value where it is negative

The exponent modes become tables. Exactly, because a power of two, and the difference of a small integer and an integer
zero, are numbers of any float dtype, and a table entry times a scale is formed in float32, where it is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdk.arguments import as_integer, check_name, check_tensors
from fdk.errors import FormatError, UnsupportedError
from fdk.formats import Format
from fdk.formats.registry import LUT, UINT
from fdk.packing.bits import pack_codes, unpack_codes
from fdk.weight import QuantisedWeight

BITS = (2, 3, 4)
MODES = ("linear", "exponent", "dynamic")


def from_int4matmul(
    bits: int,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    mask: Tensor | None = None,
    mode: str = "linear",
    name: str = "weight",
) -> QuantisedWeight:
    """The weight [N, K] that int4matmul stores so. Tensors and modes: see the module.

    linear: a uint weight; zeros that are all integers from 0 to 255 become uint8, others keep the scales' dtype.
    exponent: a lut weight of the same bits; dynamic: one of as many bits as its distinct values need. FormatError,
    naming `name`, for shapes or dtypes that do not fit; UnsupportedError for exponents with a zero that is not 0, and
    in dynamic mode for fractional zeros or a mask: no table says those.
    """
    check_tensors(name, qweight=qweight, scales=scales, zeros=zeros)
    if mask is not None:
        check_tensors(name, mask=mask)
    bits = as_integer(bits, f"{name}: bits")
    if bits not in BITS:
        raise FormatError(f"{name}: int4matmul has 2, 3 and 4 bits, not {bits}")
    check_name(mode, "mode", MODES, name)
    if qweight.dtype != torch.int32 or qweight.dim() != 2:
        raise FormatError(f"{name}: qweight must be int32 [rows, N], not {qweight.dtype} {list(qweight.shape)}")
    if mask is not None and bits != 4:
        raise FormatError(f"{name}: int4matmul has 16:32 sparsity at 4 bits only, not {bits}")
    rows, n = qweight.shape
    per_k = 32 if mask is None else 64
    k = rows * per_k // bits
    if rows * per_k % bits or k % 32:
        raise FormatError(f"{name}: qweight has {rows} rows, which hold no whole blocks of 32 weights of {bits} bits")
    if mask is not None and (mask.dtype != torch.int32 or mask.shape != (k // 32, n)):
        raise FormatError(f"{name}: mask must be int32 [{k // 32}, {n}], not {mask.dtype} {list(mask.shape)}")
    for what, tensor in (("scales", scales), ("zeros", zeros)):
        fits = tensor.dim() == 2 and tensor.shape[1] == n and tensor.shape[0] and k % tensor.shape[0] == 0
        if not fits or tensor.shape != scales.shape:
            raise FormatError(f"{name}: {what} must be [K/group, {n}] with K = {k}, not {list(tensor.shape)}")
    groups = len(scales)
    group = None if groups == 1 else k // groups
    parts = {"codes": _by_output(qweight), "scales": scales.T.contiguous()}
    if mask is not None:
        parts["mask"] = _by_output(mask)
    zeros = zeros.T
    if mode == "linear":
        parts["zeros"] = _stored_zeros(zeros, scales.dtype)
        return QuantisedWeight.from_parts(Format(UINT, bits, group, sparse=mask is not None), k, parts, name=name)
    exponent = torch.ones_like(parts["scales"], dtype=torch.bool) if mode == "exponent" else parts["scales"] < 0
    if (zeros[exponent] != 0).any():
        row, column = (exponent & (zeros != 0)).nonzero()[0].tolist()
        raise UnsupportedError(
            f"{name}: zeros[{column}, {row}] = {zeros[row, column].item()} is added to powers of two, which a table of "
            "values times a scale cannot say; fdk imports exponents with zeros of 0"
        )
    magnitude = 2.0 ** torch.arange(1 << (bits - 1))
    powers = torch.cat([magnitude, -magnitude])
    if mode == "exponent":
        parts["table"] = powers.to(scales.dtype)
        return QuantisedWeight.from_parts(Format(LUT, bits, group, sparse=mask is not None), k, parts, name=name)
    if mask is not None:
        raise UnsupportedError(f"{name}: fdk does not import the dynamic mode with a mask: sparse tables have 4 bits")
    if (zeros != zeros.round()).any():
        raise UnsupportedError(f"{name}: dynamic mode with fractional zeros has no table; fdk imports integer zeros")
    codes = unpack_codes(parts["codes"], bits, k).view(n, groups, -1)
    values = torch.where(
        exponent.unsqueeze(2), powers.to(codes.device)[codes.int()], codes.float() - zeros.float().unsqueeze(2)
    )
    table, index = values.unique(return_inverse=True)
    if len(table) > 256:
        raise UnsupportedError(f"{name}: dynamic mode with {len(table)} distinct values; a table holds 256")
    width = max(1, (len(table) - 1).bit_length())
    parts["codes"] = pack_codes(index.view(n, k).to(torch.uint8), width)
    parts["scales"], parts["table"] = parts["scales"].abs(), table.to(scales.dtype)
    return QuantisedWeight.from_parts(Format(LUT, width, group), k, parts, name=name)


def to_int4matmul(weight: QuantisedWeight) -> dict[str, Tensor]:
    """Inverse of `from_int4matmul` in linear mode: {qweight, scales, zeros} and, of a sparse weight, {mask}.

    FormatError for weights that int4matmul has no form of: other than uint of 2, 3 or 4 bits, k no multiple of 32,
    scales that are not float16.
    """
    weight = weight.canonical()
    fmt, (_, k) = weight.format, weight.shape
    if fmt.kind is not UINT or fmt.bits not in BITS or k % 32 or weight.dtype != torch.float16:
        raise FormatError(
            f"{weight!r} has no form in int4matmul, which takes float16 uint weights of 2 to 4 bits, k % 32 = 0"
        )
    parts = weight.parts
    found = {
        "qweight": _words_by_row(parts["codes"]),
        "scales": parts["scales"].T.contiguous(),
        "zeros": parts["zeros"].T.to(torch.float16).contiguous(),
    }
    if fmt.sparse:
        found["mask"] = _words_by_row(parts["mask"])
    return found


def _by_output(words: Tensor) -> Tensor:
    """int32 [rows, N] as bytes uint8 [N, 4 * rows]: a word's least significant byte first, so streams stay streams."""
    return words.T.contiguous().view(torch.uint8)


def _words_by_row(stream: Tensor) -> Tensor:
    """Inverse of `_by_output`."""
    return stream.contiguous().view(torch.int32).T.contiguous()


def _stored_zeros(zeros: Tensor, dtype: torch.dtype) -> Tensor:
    whole = (zeros == zeros.round()) & (zeros >= 0) & (zeros <= 255)
    return zeros.to(torch.uint8 if whole.all() else dtype).contiguous()
