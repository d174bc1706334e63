"""The two Triton functions: a product with weights dequantised in registers, and the sum over its splits along k.

Importing this module imports triton; with TRITON_INTERPRET=1 set before that, the functions run on CPU tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_units(codes_row, unit, row_words, BITS: tl.constexpr, MASK: tl.constexpr):
    """Units [rows, units] of whole codes: one word each at 1, 2, 4, 8 bits, else the BITS bytes of eight codes."""
    if BITS == 1 or BITS == 2 or BITS == 4 or BITS == 8:
        if MASK:
            return tl.load(codes_row + unit[None, :], mask=(unit < row_words)[None, :], other=0).to(tl.uint32)
        else:
            return tl.load(codes_row + unit[None, :]).to(tl.uint32)
    else:
        wide: tl.constexpr = tl.uint32 if BITS == 3 else tl.uint64
        units = tl.zeros([codes_row.shape[0], unit.shape[0]], wide)
        for i in tl.static_range(BITS):
            byte = unit * BITS + i
            if MASK:
                part = tl.load(codes_row + byte[None, :], mask=(byte < row_words)[None, :], other=0)
            else:
                part = tl.load(codes_row + byte[None, :])
            units |= part.to(wide) << (8 * i)
        return units


@triton.jit
def rounded(value, kind: tl.constexpr, INTERPRETED: tl.constexpr):
    """Float32 values rounded to nearest in `kind`; by hand where the interpreter would truncate to bfloat16."""
    if INTERPRETED and kind == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(kind)


@triton.jit
def packed_table(
    table_ptr,
    kind: tl.constexpr,
    BITS: tl.constexpr,
    PACK: tl.constexpr,
    OFFSET: tl.constexpr,
    STORED: tl.constexpr,
):
    """[2^(BITS * PACK)] words that hold the bit patterns of the values of PACK neighbouring codes.

    A format without a stored table gets the table of code - OFFSET, which every dtype holds exactly.
    """
    width: tl.constexpr = kind.primitive_bitwidth
    pattern: tl.constexpr = tl.uint16 if width == 16 else tl.uint32
    entry: tl.constexpr = pattern if PACK == 1 else (tl.uint32 if width * PACK == 32 else tl.uint64)
    index = tl.arange(0, 1 << (BITS * PACK))
    packed = tl.zeros([1 << (BITS * PACK)], entry)
    for i in tl.static_range(PACK):
        code = (index >> (BITS * i)) & ((1 << BITS) - 1)
        if STORED:
            value = tl.load(table_ptr + code)
        else:
            value = (code - OFFSET).to(tl.float32).to(kind)
        packed |= value.to(pattern, bitcast=True).to(entry) << (width * i)
    return packed


@triton.jit
def product(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    table_ptr,
    bias_ptr,
    tiles_ptr,
    out_ptr,
    m,
    n,
    k,
    row_words,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    STORED: tl.constexpr,
    LOOKUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    CODES: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    STEPS: tl.constexpr,
    PACK: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out = x W^T for BM tokens, BN rows of W and STEPS blocks of BK along k; EVEN_K if no block passes its end.

    x [m, k]; codes [n, row_words] words of CODES codes (bytes at 3, 5, 6, 7 bits); scales, zeros [n, groups];
    table [tables, 2^BITS]; bias [n]; out [m, n] in x's dtype, or float32 [splits, m, n] without the bias if SPLIT.
    GROUP 0 is one scale per row. tiles [row tiles, 3] int32 holds first row, end and table of each tile of rows, for
    weights with several tables.
    """
    kind: tl.constexpr = x_ptr.dtype.element_ty
    width: tl.constexpr = kind.primitive_bitwidth
    UNITS: tl.constexpr = BK // CODES
    # Weights of one run surely share a scale: it is the largest power of two that divides the group.
    RUN: tl.constexpr = BK if GROUP == 0 or (GROUP & -GROUP) > BK else GROUP & -GROUP

    if TILES:
        tile = tiles_ptr + 3 * tl.program_id(0)
        first_row = tl.load(tile)
        end_row = tl.load(tile + 1)
        table_ptr += tl.load(tile + 2) * (1 << BITS)
    else:
        first_row = tl.program_id(0) * BN
        end_row = n
    split = tl.program_id(2)
    rows = first_row + tl.arange(0, BN)
    # Rows past the end repeat the last one, so that no weight load needs a mask for them; they are never stored.
    safe_rows = tl.minimum(rows, end_row - 1).to(tl.int64)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    ks = tl.arange(0, BK)
    x_row = x_ptr + tokens.to(tl.int64)[:, None] * k
    codes_row = codes_ptr + safe_rows[:, None] * row_words
    scales_row = scales_ptr + safe_rows[:, None, None] * groups
    zeros_row = zeros_ptr + safe_rows[:, None, None] * groups
    if LOOKUP:
        table = packed_table(table_ptr, kind, BITS, PACK, OFFSET, STORED)

    acc = tl.zeros([BM, BN], tl.float32)
    for i in tl.range(STEPS, num_stages=STAGES):
        step = split * STEPS + i
        first = step * BK
        units = load_units(codes_row, step * UNITS + tl.arange(0, UNITS), row_words, BITS, not EVEN_K)
        shifts = (tl.arange(0, CODES // PACK) * (BITS * PACK)).to(units.dtype)
        codes = ((units[:, :, None] >> shifts[None, None, :]) & ((1 << (BITS * PACK)) - 1)).to(tl.int32)
        if LOOKUP:
            # A gather in one dimension goes through shared memory; more dimensions would replicate the table.
            found = tl.gather(table, codes.reshape(BN * BK // PACK), 0).reshape(BN, UNITS, CODES // PACK)
            if PACK > 1:
                halves = (tl.arange(0, PACK) * width).to(found.dtype)
                found = (found[:, :, :, None] >> halves[None, None, None, :]).reshape(BN, UNITS, CODES)
                found = found.to(tl.uint16 if width == 16 else tl.uint32)
            values = found.to(kind, bitcast=True).to(tl.float32)
        else:
            # 2^23 + code as a float is its exponent with the code as mantissa; a conversion has a quarter of the rate.
            values = (codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)

        # One address per run, broadcast to its weights: it is loaded once, and it makes a lane own a row of codes.
        run = first + tl.arange(0, BK // RUN) * RUN
        # Past the end of k the last scale is as good as any: x is zero there.
        group = tl.minimum(run // GROUP, groups - 1) if GROUP else run * 0
        group = tl.broadcast_to(group[:, None], (BK // RUN, RUN // CODES)).reshape(UNITS)
        group = tl.broadcast_to(group[None, :, None], (1, UNITS, CODES))
        if ZEROS:
            values -= tl.load(zeros_row + group).to(tl.float32)
        scales = tl.load(scales_row + group).to(tl.float32)
        # Rounded after the reshape: Triton 3.6 fails to compile a wgmma operand that is itself a reshape of few codes.
        weights = rounded((values * scales).reshape(BN, BK), kind, INTERPRETED)

        inside = (tokens < m)[:, None]
        if not EVEN_K:
            inside = inside & (first + ks < k)[None, :]
        x = tl.load(x_row + (first + ks)[None, :], mask=inside, other=0.0)
        if INTERPRETED:
            # The interpreter would multiply the bit patterns of bfloat16.
            x, weights = x.to(tl.float32), weights.to(tl.float32)
        acc = tl.dot(x, weights.trans(), acc, input_precision="ieee")

    where = tokens.to(tl.int64)[:, None] * n + rows[None, :]
    stored = (tokens < m)[:, None] & (rows < end_row)[None, :]
    if SPLIT:
        tl.store(out_ptr + split.to(tl.int64) * m * n + where, acc, mask=stored)
    else:
        if BIAS:
            bias = tl.load(bias_ptr + safe_rows).to(tl.float32)[None, :]
            # A plain addition would become the first term of the dot product, and k roundings of its size.
            acc = tl.fma(acc, tl.full([BM, BN], 1.0, tl.float32), bias.broadcast_to(BM, BN))
        tl.store(out_ptr + where, rounded(acc, kind, INTERPRETED), mask=stored)


@triton.jit
def add_splits(
    partial_ptr,
    bias_ptr,
    out_ptr,
    size,
    n,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out [m, n] = partial [SPLITS, m, n] float32 summed over splits, always in the same order, plus bias [n]."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + split * size + index, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + index % n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + index, rounded(total, out_ptr.dtype.element_ty, INTERPRETED), mask=inside)
