"""Nested weights: bit planes turned into codes in registers, as many planes as the served width needs.

Importing this module imports triton; with TRITON_INTERPRET=1 set before that, the functions run on CPU tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdk.kernels.triton.source import rounded


@triton.jit
def transposed(octets):
    """uint64 words as 8 x 8 bits, byte i bit j to byte j bit i. Hacker's Delight, 7-3."""
    moved = (octets ^ (octets >> 7)) & 0x00AA00AA00AA00AA
    octets = octets ^ moved ^ (moved << 7)
    moved = (octets ^ (octets >> 14)) & 0x0000CCCC0000CCCC
    octets = octets ^ moved ^ (moved << 14)
    moved = (octets ^ (octets >> 28)) & 0x00000000F0F0F0F0
    return octets ^ moved ^ (moved << 28)


@triton.jit
def slice_values(master, half, shift, top, middle, step):
    """float32 values of master codes uint32 whose unread low bits are zero; see fdk.formats.Format.slice_values."""
    code = tl.minimum((master + half) >> shift, top)
    # 2^23 + code as a float is its exponent with the code as mantissa; a conversion has a quarter of the rate.
    return (((code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0) - middle) * step


# Only what decides the code is fixed when it is compiled, since there are many widths, groups and shapes.
@triton.jit(do_not_specialize=["m", "n", "groups", "group_size", "half", "shift", "top", "steps"])
def nested_product(
    x_ptr,
    planes_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    row_words,
    groups,
    group_size,
    half,
    shift,
    top,
    middle,
    step_size,
    steps,
    PLANES: tl.constexpr,
    BIAS: tl.constexpr,
    DOT: tl.constexpr,
    OCTETS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    STEPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out = x W^T + bias for BN rows of W and BM tokens (DOT) or one token, in `steps` blocks of BK along k.

    x [m, k]; planes [n, 8, row_words] words of OCTETS bytes, of which the PLANES leading planes are read; scales
    [n, groups]; bias [n]; out [m, n] in x's dtype. A slice is min((master + half) >> shift, top), and stands for
    (slice - middle) * step_size.
    """
    kind: tl.constexpr = x_ptr.dtype.element_ty
    UNITS: tl.constexpr = BK // (8 * OCTETS)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    # Rows past the end repeat the last one, so that no weight load needs a mask for them; they are never stored.
    safe_rows = tl.minimum(rows, n - 1).to(tl.int64)
    planes_row = planes_ptr + safe_rows[:, None] * (8 * row_words)
    scales_row = scales_ptr + safe_rows[:, None] * groups
    if DOT:
        tokens = tl.program_id(1) * BM + tl.arange(0, BM)
        x_row = x_ptr + tokens.to(tl.int64)[:, None] * k
        acc = tl.zeros([BM, BN], tl.float32)
    else:
        acc = tl.zeros([BN], tl.float32)

    # The interpreter counts to constants only.
    for step in tl.range(STEPS if INTERPRETED else steps):
        first = step * BK
        unit = step * UNITS + tl.arange(0, UNITS)
        octets = tl.zeros([BN, UNITS, OCTETS], tl.uint64)
        for plane in tl.static_range(PLANES):
            words = tl.load(planes_row + plane * row_words + unit[None, :], mask=(unit < row_words)[None, :], other=0)
            bytes = (words.to(tl.uint32)[:, :, None] >> (8 * tl.arange(0, OCTETS)).to(tl.uint32)[None, None, :]) & 0xFF
            octets |= bytes.to(tl.uint64) << (56 - 8 * plane)
        octets = transposed(octets).reshape(BN, BK // 8)
        master = (octets[:, :, None] >> (8 * tl.arange(0, 8)).to(tl.uint64)[None, None, :]) & 0xFF
        values = slice_values(master.to(tl.uint32), half, shift, top, middle, step_size)

        # An octet never crosses a group; past the end of k the last scale is as good as any: x is zero there.
        octet = first + tl.arange(0, BK // 8) * 8
        group = tl.minimum(octet // group_size, groups - 1)
        scales = tl.load(scales_row + group[None, :]).to(tl.float32)
        ks = first + tl.arange(0, BK)
        if DOT:
            weights = rounded((values * scales[:, :, None]).reshape(BN, BK), kind, INTERPRETED)
            x = tl.load(x_row + ks[None, :], mask=(tokens < m)[:, None] & (ks < k)[None, :], other=0.0)
            if INTERPRETED:
                # The interpreter would multiply the bit patterns of bfloat16.
                x, weights = x.to(tl.float32), weights.to(tl.float32)
            acc = tl.dot(x, weights.trans(), acc, input_precision="ieee")
        else:
            x = tl.load(x_ptr + ks, mask=ks < k, other=0.0).to(tl.float32).reshape(BK // 8, 8)
            acc += tl.sum(tl.sum(values * x[None, :, :], 2) * scales, 1)

    if BIAS:
        bias = tl.load(bias_ptr + safe_rows).to(tl.float32)
        acc = acc + bias[None, :] if DOT else acc + bias
    if DOT:
        where = tokens.to(tl.int64)[:, None] * n + rows[None, :]
        tl.store(out_ptr + where, rounded(acc, kind, INTERPRETED), mask=(tokens < m)[:, None] & (rows < n)[None, :])
    else:
        tl.store(out_ptr + rows, rounded(acc, kind, INTERPRETED), mask=rows < n)
