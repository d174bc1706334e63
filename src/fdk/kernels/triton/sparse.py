"""16:32 sparse weights: the rank of a weight among the kept ones of its block says where its code lies.

Importing this module imports triton; with TRITON_INTERPRET=1 set before that, the functions run on CPU tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdk.kernels.triton.source import rounded


@triton.jit
def ones(words):
    """Number of ones in each uint32. Hacker's Delight, 5-1."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    return (words + (words >> 16)) & 0x3F


# Only what decides the code is fixed when it is compiled.
@triton.jit(do_not_specialize=["m", "n", "groups", "group_size", "steps"])
def sparse_product(
    x_ptr,
    codes_ptr,
    mask_ptr,
    scales_ptr,
    zeros_ptr,
    table_ptr,
    bias_ptr,
    tiles_ptr,
    out_ptr,
    m,
    n,
    k,
    groups,
    group_size,
    steps,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    STORED: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    TILES: tl.constexpr,
    DOT: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    STEPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out = x W^T + bias for BN rows of W and BM tokens (DOT) or one token, in `steps` blocks of BK along k.

    x [m, k]; codes [n, k/32 * 2*BITS] bytes; mask [n, k/32 * 4] bytes; scales, zeros [n, groups]; table
    [tables, 2^BITS]; bias [n]; out [m, n] in x's dtype. tiles: see source.product.
    """
    kind: tl.constexpr = x_ptr.dtype.element_ty
    BLOCKS: tl.constexpr = BK // 32
    if TILES:
        tile = tiles_ptr + 3 * tl.program_id(0)
        first_row = tl.load(tile)
        end_row = tl.load(tile + 1)
        table_ptr += tl.load(tile + 2) * (1 << BITS)
    else:
        first_row = tl.program_id(0) * BN
        end_row = n
    rows = first_row + tl.arange(0, BN)
    # Rows past the end repeat the last one, so that no weight load needs a mask for them; they are never stored.
    safe_rows = tl.minimum(rows, end_row - 1).to(tl.int64)
    blocks_of_k = k // 32
    mask_row = mask_ptr + safe_rows[:, None] * (4 * blocks_of_k)
    codes_row = codes_ptr + safe_rows[:, None, None] * (2 * BITS * blocks_of_k)
    scales_row = scales_ptr + safe_rows[:, None] * groups
    zeros_row = zeros_ptr + safe_rows[:, None] * groups
    if DOT:
        tokens = tl.program_id(1) * BM + tl.arange(0, BM)
        x_row = x_ptr + tokens.to(tl.int64)[:, None] * k
        acc = tl.zeros([BM, BN], tl.float32)
    else:
        acc = tl.zeros([BN], tl.float32)
    place = tl.arange(0, 32).to(tl.uint32)

    # The interpreter counts to constants only.
    for step in tl.range(STEPS if INTERPRETED else steps):
        first = step * BK
        block = step * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < blocks_of_k
        kept = tl.zeros([BN, BLOCKS], tl.uint32)
        for i in tl.static_range(4):
            byte = tl.load(mask_row + (4 * block + i)[None, :], mask=inside[None, :], other=0)
            kept |= byte.to(tl.uint32) << (8 * i)
        bits = kept[:, :, None] >> place[None, None, :]
        keep = (bits & 1) != 0
        # Bits below a weight's own: shifting up by one at a time keeps the shift of the first weight below 32.
        below = kept[:, :, None] & ((1 << place) - 1)[None, None, :]
        rank = ones(below).to(tl.int32)
        at = (block * (2 * BITS))[None, :, None] + rank * BITS // 8
        byte = tl.load(codes_row + at, mask=keep & inside[None, :, None], other=0).to(tl.int32)
        code = (byte >> (rank * BITS % 8)) & ((1 << BITS) - 1)
        if STORED:
            values = tl.load(table_ptr + code).to(tl.float32)
        else:
            values = (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)

        # A block never crosses a group; past the end of k nothing is kept.
        start = first + tl.arange(0, BLOCKS) * 32
        group = tl.minimum(start // group_size, groups - 1)
        if ZEROS:
            values -= tl.load(zeros_row + group[None, :]).to(tl.float32)[:, :, None]
        values = tl.where(keep, values, 0.0)
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
            x = tl.load(x_ptr + ks, mask=ks < k, other=0.0).to(tl.float32).reshape(BLOCKS, 32)
            acc += tl.sum(tl.sum(values * x[None, :, :], 2) * scales, 1)

    if BIAS:
        bias = tl.load(bias_ptr + safe_rows).to(tl.float32)
        acc = acc + bias[None, :] if DOT else acc + bias
    if DOT:
        where = tokens.to(tl.int64)[:, None] * n + rows[None, :]
        stored = (tokens < m)[:, None] & (rows < end_row)[None, :]
        tl.store(out_ptr + where, rounded(acc, kind, INTERPRETED), mask=stored)
    else:
        tl.store(out_ptr + rows, rounded(acc, kind, INTERPRETED), mask=rows < end_row)
