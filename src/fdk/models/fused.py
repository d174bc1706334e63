"""What a decoding step does between its matrix products, in three Triton functions.

Shapes: b sequences of one new token each, g key/value heads with HEADS query heads each, d = HEAD_DIM, a power of 2.
All arithmetic is float32, rounded once on the way out. Every function first lets the next kernel start and then waits
for the one before (programmatic dependent launch, if PDL), so that products read their weights meanwhile.
Importing this module imports triton; with TRITON_INTERPRET=1 set before that, the functions run on CPU tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fdk.kernels.triton.source import rounded


@triton.jit
def follow(PDL: tl.constexpr):
    """Take this kernel's place in a chain of dependent launches."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def add_norm(
    x_ptr,
    y_ptr,
    weight_ptr,
    out_ptr,
    position_ptr,
    size,
    eps,
    ADD: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """x [b, size] += y, if ADD; out = weight * x / sqrt(mean(x^2) + eps); position += 1, if COUNT. A program a row."""
    kind: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < size
    weight = tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float32)
    follow(PDL)
    x = tl.load(x_ptr + row * size + column, mask=inside, other=0).to(tl.float32)
    if ADD:
        x += tl.load(y_ptr + row * size + column, mask=inside, other=0).to(tl.float32)
        stored = rounded(x, kind, INTERPRETED)
        tl.store(x_ptr + row * size + column, stored, mask=inside)
        x = stored.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / size + eps)
    tl.store(out_ptr + row * size + column, rounded(x * scale * weight, kind, INTERPRETED), mask=inside)
    if COUNT and row == 0:
        tl.store(position_ptr, tl.load(position_ptr) + 1)


@triton.jit
def gate(
    pair_ptr,
    out_ptr,
    size,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out [b, size] = silu(pair[:, :size]) * pair[:, size:]; grid (blocks of columns, b)."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    follow(PDL)
    first = tl.load(pair_ptr + row * 2 * size + column, mask=inside, other=0).to(tl.float32)
    second = tl.load(pair_ptr + row * 2 * size + size + column, mask=inside, other=0).to(tl.float32)
    value = first / (1.0 + tl.exp(-first)) * second
    tl.store(out_ptr + row * size + column, rounded(value, out_ptr.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def rotated(pointer, cos, sin, HALF: tl.constexpr):
    """The two halves of the vectors at `pointer` [..., 1], turned by the rotary angles: channel i goes with i + d/2."""
    half = tl.arange(0, HALF)[None, :]
    first = tl.load(pointer + half).to(tl.float32)
    second = tl.load(pointer + HALF + half).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def multiply(a, b, acc, INTERPRETED: tl.constexpr):
    """acc + a b; the interpreter would multiply the bit patterns of bfloat16."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def attend(
    qkv_ptr,
    keys_ptr,
    values_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    partial_ptr,
    arrived_ptr,
    out_ptr,
    length,
    scale,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Rotary embedding of a token's queries and key, its key and value into the cache, attention to all up to it.

    qkv [b, (g * HEADS + 2 * g) * d]: queries, keys, values; keys, values [b, g, length, d]; cos, sin [length, d], of
    which the first d/2 are read; position [1]: tokens in the cache before this one; out [b, g * HEADS * d]; scale:
    1/sqrt(d) times log2(e).
    Grid (b * g, SPLITS): a program takes CHUNK positions of a head. The last of a head's programs to arrive adds up
    their sums in the order of the chunks: partial [b * g, SPLITS, ROWS, d + 2], arrived [b * g], zero before and after.
    ROWS: HEADS padded to what a tensor core multiplies.
    """
    kind: tl.constexpr = keys_ptr.dtype.element_ty
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = head // KV_HEADS
    group = head % KV_HEADS
    follow(PDL)
    position = tl.load(position_ptr)
    active = position // CHUNK + 1
    if split >= active:
        return
    half = tl.arange(0, HALF)[None, :]
    channel = tl.arange(0, HEAD_DIM)[None, :]
    cos = tl.load(cos_ptr + position * HEAD_DIM + half).to(tl.float32)
    sin = tl.load(sin_ptr + position * HEAD_DIM + half).to(tl.float32)
    token = qkv_ptr + sequence.to(tl.int64) * ((HEADS + 2) * KV_HEADS * HEAD_DIM)
    row = tl.arange(0, ROWS)[:, None]
    # Padding rows repeat the last query; they are never stored.
    query = token + (group * HEADS + tl.minimum(row, HEADS - 1)) * HEAD_DIM
    q1, q2 = rotated(query, cos, sin, HALF)
    q1 = rounded(q1, kind, INTERPRETED)
    q2 = rounded(q2, kind, INTERPRETED)
    cache = head.to(tl.int64) * length * HEAD_DIM

    top = tl.full([ROWS, 1], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    if split == active - 1:
        key = token + (KV_HEADS * HEADS + group) * HEAD_DIM + tl.zeros([1, 1], tl.int32)
        k1, k2 = rotated(key, cos, sin, HALF)
        k1 = rounded(k1, kind, INTERPRETED)
        k2 = rounded(k2, kind, INTERPRETED)
        value = tl.load(token + (KV_HEADS * (HEADS + 1) + group) * HEAD_DIM + channel)
        tl.store(keys_ptr + cache + position * HEAD_DIM + half, k1)
        tl.store(keys_ptr + cache + position * HEAD_DIM + HALF + half, k2)
        tl.store(values_ptr + cache + position * HEAD_DIM + channel, value)
        dot = q1.to(tl.float32) * k1.to(tl.float32) + q2.to(tl.float32) * k2.to(tl.float32)
        top = tl.sum(dot, 1)[:, None] * scale
        total += 1.0
        acc += value.to(tl.float32)

    end = tl.minimum((split + 1) * CHUNK, position)
    for step in range(CHUNK // BLOCK):
        place = split * CHUNK + step * BLOCK + tl.arange(0, BLOCK)
        there = place < end
        keys = keys_ptr + cache + place[None, :] * HEAD_DIM + tl.arange(0, HALF)[:, None]
        k1 = tl.load(keys, mask=there[None, :], other=0)
        k2 = tl.load(keys + HALF, mask=there[None, :], other=0)
        values = tl.load(values_ptr + cache + place[:, None] * HEAD_DIM + channel, mask=there[:, None], other=0)
        scores = multiply(q1, k1, tl.zeros([ROWS, BLOCK], tl.float32), INTERPRETED)
        scores = multiply(q2, k2, scores, INTERPRETED)
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1)[:, None])
        share = tl.exp2(scores - new_top)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(share, 1)[:, None]
        acc = multiply(rounded(share, kind, INTERPRETED), values, acc * shrink, INTERPRETED)
        top = new_top

    out = out_ptr + (sequence.to(tl.int64) * KV_HEADS + group) * (HEADS * HEAD_DIM) + row * HEAD_DIM + channel
    if SPLITS == 1:
        tl.store(out, rounded(acc / total, kind, INTERPRETED), mask=row < HEADS)
    else:
        slot = partial_ptr + (head.to(tl.int64) * SPLITS) * (ROWS * (HEAD_DIM + 2))
        mine = slot + split * (ROWS * (HEAD_DIM + 2))
        sums = ROWS * HEAD_DIM + tl.arange(0, ROWS)[:, None]
        tl.store(mine + row * HEAD_DIM + channel, acc)
        tl.store(mine + sums, top)
        tl.store(mine + sums + ROWS, total)
        # All threads' stores come before the count by which the others know of them.
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel") == active - 1:
            tl.debug_barrier()
            top = tl.full([ROWS, 1], float("-inf"), tl.float32)
            total = tl.zeros([ROWS, 1], tl.float32)
            acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
            for other in range(SPLITS):
                theirs = slot + other * (ROWS * (HEAD_DIM + 2))
                there = other < active
                their_top = tl.load(theirs + sums, mask=there, other=float("-inf"), cache_modifier=".cg")
                their_total = tl.load(theirs + sums + ROWS, mask=there, other=0, cache_modifier=".cg")
                their_acc = tl.load(theirs + row * HEAD_DIM + channel, mask=there, other=0, cache_modifier=".cg")
                new_top = tl.maximum(top, their_top)
                shrink = tl.exp2(top - new_top)
                grow = tl.exp2(their_top - new_top)
                total = total * shrink + their_total * grow
                acc = acc * shrink + their_acc * grow
                top = new_top
            tl.store(out, rounded(acc / total, kind, INTERPRETED), mask=row < HEADS)
            tl.store(arrived_ptr + head, 0)
