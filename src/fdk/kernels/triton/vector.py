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
def load_below(pointer, index, end, CHECK: tl.constexpr):
    """pointer[index]; 0 where index is not below `end`, if CHECK."""
    if CHECK:
        return tl.load(pointer + index, mask=index < end, other=0)
    else:
        return tl.load(pointer + index)


@triton.jit
def load_part(x_ptr, ks, k, inside, CHECK: tl.constexpr, EVEN_RUNS: tl.constexpr):
    """x[ks] in float32; 0 where ks is not below k, if CHECK, or where not `inside`, if EVEN_RUNS."""
    x = load_below(x_ptr, ks, k, CHECK).to(tl.float32)
    if EVEN_RUNS:
        x = tl.where(inside, x, 0.0)
    return x


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
    CHECK: tl.constexpr,
    EVEN_RUNS: tl.constexpr,
    CODES: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    STEPS: tl.constexpr,
    PACK: tl.constexpr,
    WIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out [n] = W x [k] + bias [n]: ROWS rows a program, in STEPS blocks of BK along k.

    codes [n, row_words] words of CODES codes (bytes at 3, 5, 6, 7 bits, where BITS of them hold CODES = 8 codes);
    scales, zeros [n, groups]; table [tables, 2^BITS]; GROUP 0 is one scale per row. RUN codes of a row that share a
    scale are summed by one lane. PACK codes are looked up at once, in a table of float32 if WIDE, else of x's dtype.
    tiles: see source.product. If blocks pass the end of k: EVEN_RUNS if no run crosses it, else CHECK.
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
    if STORED:
        table = value_table(table_ptr, kind, BITS, PACK)

    acc = tl.zeros([RUNS, ROWS], tl.float32)
    for step in tl.range(STEPS):
        # All loads come before the first look-up: none is moved across its barrier.
        first = step * BK + run * RUN
        first_word = step * (BK // CODES) + run * WORDS
        start = first
        if EVEN_RUNS:
            # Runs past the end repeat the first one with x zero: loads with masks are not merged between rows.
            start = tl.where(first < k, first, 0)
            first_word = tl.where(first < k, first_word, 0)
        words = first_word[:, None, None] + tl.arange(0, WORDS)[None, None, :]
        if BITS == 1 or BITS == 2 or BITS == 4 or BITS == 8:
            units = load_below(codes_row, words, row_words, CHECK).to(tl.uint32)
        else:
            wide: tl.constexpr = tl.uint32 if BITS == 3 else tl.uint64
            units = tl.zeros([RUNS, ROWS, WORDS], wide)
            for i in tl.static_range(BITS):
                units |= load_below(codes_row, words * BITS + i, row_words, CHECK).to(wide) << (8 * i)
        # Past the end of k the last scale is as good as any: x is zero there.
        group = tl.minimum(first // GROUP, groups - 1) if GROUP else run * 0
        scales = tl.load(scales_row + group[:, None])
        if ZEROS:
            zeros = tl.load(zeros_row + group[:, None]).to(tl.float32)[:, :, None, None]
        # Read as often as there are rows, which the compiler reduces to once: so x arrives in the lanes of the codes.
        ks = (start[:, None, None] + tl.arange(0, PART)[None, None, :]).broadcast_to(RUNS, ROWS, PART)
        inside = (first < k)[:, None, None]
        x_0 = load_part(x_ptr, ks, k, inside, CHECK, EVEN_RUNS)
        if PARTS > 1:
            x_1 = load_part(x_ptr, ks + PART, k, inside, CHECK, EVEN_RUNS)
        if PARTS > 2:
            x_2 = load_part(x_ptr, ks + 2 * PART, k, inside, CHECK, EVEN_RUNS)
            x_3 = load_part(x_ptr, ks + 3 * PART, k, inside, CHECK, EVEN_RUNS)

        LOOKED: tl.constexpr = PACK if STORED else 1
        shifts = (tl.arange(0, CODES // LOOKED) * (BITS * LOOKED)).to(units.dtype)[None, None, None, :]
        codes = ((units[:, :, :, None] >> shifts) & ((1 << (BITS * LOOKED)) - 1)).to(tl.uint32)
        if not STORED:
            # 2^23 + code as a float is its exponent with the code as mantissa; a conversion has a quarter of the rate.
            values = (codes | 0x4B000000).to(tl.float32, bitcast=True)
            if ZEROS:
                if zeros_ptr.dtype.element_ty == tl.uint8:
                    values -= 8388608.0 + zeros
                else:
                    values = (values - 8388608.0) - zeros
            else:
                values -= 8388608.0 + OFFSET
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

        values = values.reshape(RUNS, ROWS, PARTS, PART).permute(0, 1, 3, 2)
        if PARTS == 1:
            products = values.reshape(RUNS, ROWS, PART) * x_0
        elif PARTS == 2:
            values_0, values_1 = tl.split(values)
            products = tl.fma(values_1, x_1, values_0 * x_0)
        else:
            tl.static_assert(PARTS == 4)
            even, odd = tl.split(values.reshape(RUNS, ROWS, PART, 2, 2))
            values_0, values_2 = tl.split(even)
            values_1, values_3 = tl.split(odd)
            products = tl.fma(values_1, x_1, values_0 * x_0)
            products = tl.fma(values_2, x_2, products)
            products = tl.fma(values_3, x_3, products)
        acc += tl.sum(products, 2) * scales.to(tl.float32)

    total = tl.sum(acc, 0)
    if BIAS:
        total += tl.load(bias_ptr + safe_rows).to(tl.float32)
    tl.store(out_ptr + rows, rounded(total, narrow, INTERPRETED), mask=rows < end_row)
