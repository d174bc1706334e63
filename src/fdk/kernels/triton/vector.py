"""One token: each weight is looked up in registers and multiplied in float32, scales once per group.

The tiles of source.py spend most of a single token's time on storing weights for tensor cores that it cannot fill.
Importing this module imports triton; with TRITON_INTERPRET=1 set before that, the function runs on CPU tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdk.kernels.triton.source import rounded


@triton.jit
def value_table(
    table_ptr,
    kind: tl.constexpr,
    BITS: tl.constexpr,
    PACK: tl.constexpr,
):
    """[2^(BITS * PACK)] words that hold the bit patterns, as `kind`, of the values of PACK neighbouring codes."""
    width: tl.constexpr = kind.primitive_bitwidth
    pattern: tl.constexpr = tl.uint16 if width == 16 else tl.uint32
    entry: tl.constexpr = pattern if PACK == 1 else (tl.uint32 if width * PACK == 32 else tl.uint64)
    index = tl.arange(0, 1 << (BITS * PACK))
    packed = tl.zeros([1 << (BITS * PACK)], entry)
    for i in tl.static_range(PACK):
        value = tl.load(table_ptr + ((index >> (BITS * i)) & ((1 << BITS) - 1))).to(kind)
        packed |= value.to(pattern, bitcast=True).to(entry) << (width * i)
    return packed


@triton.jit
def multiply_add(values, x_ptr, ks, k, total, EVEN_K: tl.constexpr):
    """total [rows, runs, part] + values * x[ks], x read as [runs, part]."""
    ks = ks.broadcast_to(values.shape)
    if EVEN_K:
        x = tl.load(x_ptr + ks)
    else:
        x = tl.load(x_ptr + ks, mask=ks < k, other=0.0)
    return tl.fma(values, x.to(tl.float32), total)


@triton.jit
def vector_product(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    table_ptr,
    bias_ptr,
    tiles_ptr,
    out_ptr,
    n,
    k,
    row_words,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    STORED: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    TILES: tl.constexpr,
    EVEN_K: tl.constexpr,
    CODES: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    STEPS: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out [n] = W x [k] + bias [n]: ROWS rows a program, in STEPS blocks of BK along k; EVEN_K if none passes its end.

    codes [n, row_words] words of CODES codes; scales, zeros [n, groups]; table [tables, 2^BITS]; GROUP 0 is one scale
    per row. RUN codes of a row that share a scale are summed by one lane. PACK codes are looked up at once, 0 selects
    between the 2^BITS values instead; the table holds float32 if WIDE, else x's dtype. tiles: see source.product.
    """
    narrow: tl.constexpr = x_ptr.dtype.element_ty
    kind: tl.constexpr = tl.float32 if WIDE else narrow
    width: tl.constexpr = kind.primitive_bitwidth
    WORDS: tl.constexpr = RUN // CODES
    RUNS: tl.constexpr = BK // RUN
    PART: tl.constexpr = min(RUN, 128 // narrow.primitive_bitwidth)
    PARTS: tl.constexpr = RUN // PART

    if TILES:
        tile = tiles_ptr + 3 * tl.program_id(0)
        first_row = tl.load(tile)
        end_row = tl.load(tile + 1)
        table_ptr += tl.load(tile + 2) * (1 << BITS)
    else:
        first_row = tl.program_id(0) * ROWS
        end_row = n
    rows = first_row + tl.arange(0, ROWS)
    # Rows past the end repeat the last one, so that no weight load needs a mask for them; they are never stored.
    safe_rows = tl.minimum(rows, end_row - 1).to(tl.int64)
    codes_row = codes_ptr + safe_rows[None, :, None] * row_words
    scales_row = scales_ptr + safe_rows[None, :] * groups
    zeros_row = zeros_ptr + safe_rows[None, :] * groups
    run = tl.arange(0, RUNS)
    word = (run[:, None] * WORDS + tl.arange(0, WORDS)[None, :])[:, None, :]
    if STORED and PACK > 0:
        table = value_table(table_ptr, kind, BITS, PACK)

    acc = tl.zeros([RUNS, ROWS], tl.float32)
    for step in tl.range(STEPS):
        words = step * (BK // CODES) + word
        if EVEN_K:
            units = tl.load(codes_row + words).to(tl.uint32)
        else:
            units = tl.load(codes_row + words, mask=words < row_words, other=0).to(tl.uint32)
        group = step * BK + run * RUN
        # Past the end of k the last scale is as good as any: x is zero there.
        group = tl.minimum(group // GROUP, groups - 1) if GROUP else run * 0

        LOOKED: tl.constexpr = PACK if PACK > 0 and STORED else 1
        shifts = (tl.arange(0, CODES // LOOKED) * (BITS * LOOKED)).to(tl.uint32)[None, None, None, :]
        codes = (units[:, :, :, None] >> shifts) & ((1 << (BITS * LOOKED)) - 1)
        if not STORED:
            # 2^23 + code as a float is its exponent with the code as mantissa; a conversion has a quarter of the rate.
            values = (codes | 0x4B000000).to(tl.float32, bitcast=True)
            if ZEROS:
                zeros = tl.load(zeros_row + group[:, None]).to(tl.float32)[:, :, None, None]
                if zeros_ptr.dtype.element_ty == tl.uint8:
                    values -= 8388608.0 + zeros
                else:
                    values = (values - 8388608.0) - zeros
            else:
                values -= 8388608.0 + OFFSET
        elif PACK == 0:
            values = tl.where(
                (codes & 1) != 0, tl.load(table_ptr + 1).to(tl.float32), tl.load(table_ptr).to(tl.float32)
            )
            if BITS == 2:
                high = tl.where(
                    (codes & 1) != 0, tl.load(table_ptr + 3).to(tl.float32), tl.load(table_ptr + 2).to(tl.float32)
                )
                values = tl.where((codes & 2) != 0, high, values)
        else:
            # A gather in one dimension goes through shared memory; more dimensions would replicate the table.
            size: tl.constexpr = ROWS * BK // PACK
            found = tl.gather(table, codes.to(tl.int32).reshape(size), 0).reshape(RUNS, ROWS, WORDS, CODES // PACK)
            if PACK > 1:
                halves = (tl.arange(0, PACK) * width).to(found.dtype)
                found = found[:, :, :, :, None] >> halves[None, None, None, None, :]
                found = found.reshape(RUNS, ROWS, WORDS, CODES)
            if kind == tl.bfloat16:
                # Moving the bits up takes one instruction, a conversion from 16 bits two.
                values = (found.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
            else:
                found = found.to(tl.uint16 if width == 16 else tl.uint32)
                values = found.to(kind, bitcast=True).to(tl.float32)

        # Parts of as many codes as one load of x has: then x arrives in the lanes that hold the codes.
        values = values.reshape(RUNS, ROWS, PARTS, PART).permute(0, 1, 3, 2)
        ks = step * BK + (run[:, None] * RUN + tl.arange(0, PART)[None, :])[:, None, :]
        products = tl.zeros([RUNS, ROWS, PART], tl.float32)
        if PARTS == 1:
            products = multiply_add(values.reshape(RUNS, ROWS, PART), x_ptr, ks, k, products, EVEN_K)
        elif PARTS == 2:
            values_0, values_1 = tl.split(values)
            products = multiply_add(values_0, x_ptr, ks, k, products, EVEN_K)
            products = multiply_add(values_1, x_ptr, ks + PART, k, products, EVEN_K)
        else:
            tl.static_assert(PARTS == 4)
            even, odd = tl.split(values.reshape(RUNS, ROWS, PART, 2, 2))
            values_0, values_2 = tl.split(even)
            values_1, values_3 = tl.split(odd)
            products = multiply_add(values_0, x_ptr, ks, k, products, EVEN_K)
            products = multiply_add(values_1, x_ptr, ks + PART, k, products, EVEN_K)
            products = multiply_add(values_2, x_ptr, ks + 2 * PART, k, products, EVEN_K)
            products = multiply_add(values_3, x_ptr, ks + 3 * PART, k, products, EVEN_K)
        acc += tl.sum(products, 2) * tl.load(scales_row + group[:, None]).to(tl.float32)

    total = tl.sum(acc, 0)
    if BIAS:
        total += tl.load(bias_ptr + safe_rows).to(tl.float32)
    tl.store(out_ptr + rows, rounded(total, narrow, INTERPRETED), mask=rows < end_row)
