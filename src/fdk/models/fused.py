"""What a decoding step does between its matrix products, as Triton functions: norm, gate, attention, choice of token.

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
    token_ptr,
    position_ptr,
    size,
    eps,
    EMBED: tl.constexpr,
    ADD: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out = weight * x / sqrt(mean(x^2) + eps), a program for each row of x [b, size].

    ADD: first x += y. EMBED: first x = y[token], with token [b] and y [tokens, size]. COUNT: position += 1.
    """
    kind: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < size
    weight = tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float32)
    follow(PDL)
    if EMBED:
        stored = tl.load(y_ptr + tl.load(token_ptr + row) * size + column, mask=inside, other=0)
        tl.store(x_ptr + row * size + column, stored, mask=inside)
        x = stored.to(tl.float32)
    else:
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
def multiply_row(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    n,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out [n] = weight [n, K] x + bias [n] (if BIAS) for one dense row x [K]; a program for ROWS outputs.

    Weights are no other kernel's, so that their first block is asked for before the wait for x.
    """
    kind: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < n)[:, None]
    at = weight_ptr + row.to(tl.int64)[:, None] * K + column[None, :]
    if PDL:
        gdc_launch_dependents()
    weight = tl.load(at, mask=inside & (column < K)[None, :], other=0, eviction_policy="evict_first")
    if PDL:
        gdc_wait()
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        behind = start + BLOCK
        ahead = tl.load(
            at + behind, mask=inside & (behind + column < K)[None, :], other=0, eviction_policy="evict_first"
        )
        x = tl.load(x_ptr + start + column, mask=start + column < K, other=0)
        acc += weight.to(tl.float32) * x.to(tl.float32)[None, :]
        weight = ahead
    total = tl.sum(acc, 1)
    if BIAS:
        total += tl.load(bias_ptr + row, mask=row < n, other=0).to(tl.float32)
    tl.store(out_ptr + row, rounded(total, kind, INTERPRETED), mask=row < n)


@triton.jit
def multiply_rows(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    count,
    n,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out [count, n] = x [count, K] weight [n, K]^T + bias [n] (if BIAS) with dense weights; a program for ROWS of n.

    TOKENS: count padded to what a tensor core multiplies.
    """
    kind: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    token = tl.arange(0, TOKENS)
    follow(PDL)
    weights = weight_ptr + row.to(tl.int64)[:, None] * K + column[None, :]
    xs = x_ptr + token[None, :] * K + column[:, None]
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, K, BLOCK):
        there = start + column < K
        weight = tl.load(weights + start, mask=(row < n)[:, None] & there[None, :], other=0)
        x = tl.load(xs + start, mask=there[:, None] & (token < count)[None, :], other=0)
        if INTERPRETED:
            acc += tl.dot(weight.to(tl.float32), x.to(tl.float32))
        else:
            acc = tl.dot(weight, x, acc)
    if BIAS:
        acc += tl.load(bias_ptr + row, mask=row < n, other=0).to(tl.float32)[:, None]
    out = out_ptr + token[None, :].to(tl.int64) * n + row[:, None]
    tl.store(out, rounded(acc, kind, INTERPRETED), mask=(row < n)[:, None] & (token < count)[None, :])


@triton.jit
def rotated(
    pointer,
    cos,
    sin,
    norm_ptr,
    eps,
    NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    kind: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The vectors at `pointer` [..., 1] turned by the rotary angles, rounded to `kind`: channel i goes with i + d/2.

    If NORM, each of them is first normed, with the weight at `norm_ptr` [d].
    """
    channel = tl.arange(0, HEAD_DIM)[None, :]
    partner = (channel + HEAD_DIM // 2) % HEAD_DIM
    own = tl.load(pointer + channel).to(tl.float32)
    other = tl.load(pointer + partner).to(tl.float32)
    if NORM:
        size = 1.0 / tl.sqrt(tl.sum(own * own, 1)[:, None] / HEAD_DIM + eps)
        own = own * size * tl.load(norm_ptr + channel).to(tl.float32)
        other = other * size * tl.load(norm_ptr + partner).to(tl.float32)
    other = tl.where(channel < HEAD_DIM // 2, -other, other)
    return rounded(own * cos + other * sin, kind, INTERPRETED)


@triton.jit
def multiply(a, b, acc, INTERPRETED: tl.constexpr):
    """acc + a b; the interpreter would multiply the bit patterns of bfloat16."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def absorb(q, keys, values, there, top, total, acc, scale, INTERPRETED: tl.constexpr):
    """Running maximum, sum and weighted values of q [rows, d] after a block of keys [d, block], values [block, d]."""
    scores = multiply(q, keys, tl.zeros([q.shape[0], keys.shape[1]], tl.float32), INTERPRETED)
    scores = tl.where(there[None, :], scores * scale, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1)[:, None])
    share = tl.exp2(scores - new_top)
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(share, 1)[:, None]
    acc = multiply(rounded(share, values.dtype, INTERPRETED), values, acc * shrink, INTERPRETED)
    return new_top, total, acc


@triton.jit
def attend(
    qkv_ptr,
    keys_ptr,
    values_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    position_ptr,
    partial_ptr,
    arrived_ptr,
    out_ptr,
    length,
    eps,
    scale,
    NORM: tl.constexpr,
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

    qkv [b, (g * HEADS + 2 * g) * d]: queries, keys, values, the first two normed with q_norm, k_norm [d] if NORM;
    keys, values [b, g, length, d]; cos, sin [length, d]; position [1]: tokens in the cache before this one; out
    [b, g * HEADS * d]; scale: 1/sqrt(d) times log2(e).
    Grid (b * g, SPLITS): a program takes CHUNK positions of a key head. The last of a head's programs to arrive adds up
    their sums in the order of the chunks: partial [b * g, SPLITS, ROWS, d + 2], arrived [b * g], zero before and after.
    ROWS: HEADS padded to what a tensor core multiplies. Position and cache come from earlier steps, before a kernel
    that waited for all others, so they are read before this kernel's own wait.
    """
    kind: tl.constexpr = keys_ptr.dtype.element_ty
    head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = (head // KV_HEADS).to(tl.int64)
    group = head % KV_HEADS
    if PDL:
        gdc_launch_dependents()
    position = tl.load(position_ptr)
    active = position // CHUNK + 1
    if split >= active:
        return
    channel = tl.arange(0, HEAD_DIM)[None, :]
    cos = tl.load(cos_ptr + position * HEAD_DIM + channel).to(tl.float32)
    sin = tl.load(sin_ptr + position * HEAD_DIM + channel).to(tl.float32)
    cache = head.to(tl.int64) * length * HEAD_DIM
    end = tl.minimum((split + 1) * CHUNK, position)
    place = split * CHUNK + tl.arange(0, BLOCK)
    keys_at = keys_ptr + cache + tl.arange(0, HEAD_DIM)[:, None]
    values_at = values_ptr + cache + channel
    keys = tl.load(keys_at + place[None, :] * HEAD_DIM, mask=(place < end)[None, :], other=0)
    values = tl.load(values_at + place[:, None] * HEAD_DIM, mask=(place < end)[:, None], other=0)
    if PDL:
        gdc_wait()
    token = qkv_ptr + sequence * ((HEADS + 2) * KV_HEADS * HEAD_DIM)
    row = tl.arange(0, ROWS)[:, None]
    # Padding rows repeat the last query; they are never stored.
    query = token + (group * HEADS + tl.minimum(row, HEADS - 1)) * HEAD_DIM
    q = rotated(query, cos, sin, q_norm_ptr, eps, NORM, HEAD_DIM, kind, INTERPRETED)
    own = token + (KV_HEADS * HEADS + group) * HEAD_DIM
    key = rotated(own, cos, sin, k_norm_ptr, eps, NORM, HEAD_DIM, kind, INTERPRETED)
    value = tl.load(token + (KV_HEADS * (HEADS + 1) + group) * HEAD_DIM + channel)
    new = split == active - 1
    if new:
        tl.store(keys_ptr + cache + position * HEAD_DIM + channel, key)
        tl.store(values_ptr + cache + position * HEAD_DIM + channel, value)

    # The new token comes first; a chunk without it starts from a weight of zero.
    top = tl.sum(q.to(tl.float32) * key.to(tl.float32), 1)[:, None] * scale
    total = tl.where(new, 1.0, 0.0) + tl.zeros([ROWS, 1], tl.float32)
    acc = total * value.to(tl.float32)
    top, total, acc = absorb(q, keys, values, place < end, top, total, acc, scale, INTERPRETED)
    # The interpreter's range does not take a tensor.
    for step in range(1, CHUNK // BLOCK if INTERPRETED else tl.cdiv(end - split * CHUNK, BLOCK)):
        at = place + step * BLOCK
        keys = tl.load(keys_at + at[None, :] * HEAD_DIM, mask=(at < end)[None, :], other=0)
        values = tl.load(values_at + at[:, None] * HEAD_DIM, mask=(at < end)[:, None], other=0)
        top, total, acc = absorb(q, keys, values, at < end, top, total, acc, scale, INTERPRETED)

    out = out_ptr + (sequence * KV_HEADS + group) * (HEADS * HEAD_DIM) + row * HEAD_DIM + channel
    if SPLITS == 1:
        tl.store(out, rounded(acc / total, kind, INTERPRETED), mask=row < HEADS)
    else:
        slot = partial_ptr + head.to(tl.int64) * SPLITS * (ROWS * (HEAD_DIM + 2))
        mine = slot + split * (ROWS * (HEAD_DIM + 2))
        tl.store(mine + row * HEAD_DIM + channel, acc, mask=row < HEADS)
        tl.store(mine + ROWS * HEAD_DIM + row, top)
        tl.store(mine + ROWS * (HEAD_DIM + 1) + row, total)
        # All threads' stores come before the count by which the others know of them.
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel") == active - 1:
            tl.debug_barrier()
            add_splits(slot, out, active, kind, HEADS, HEAD_DIM, ROWS, SPLITS, INTERPRETED)
            tl.store(arrived_ptr + head, 0)


@triton.jit
def add_splits(
    slot,
    out,
    active,
    kind: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out [HEADS, d] of a key head's partial sums of `active` chunks, SPLITS at most."""
    row = tl.arange(0, ROWS)[:, None]
    stored = row < HEADS
    top = tl.full([ROWS, 1], float("-inf"), tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for split in range(SPLITS if INTERPRETED else active):
        mine = slot + split * (ROWS * (HEAD_DIM + 2))
        there = stored & (split < active)
        own_top = tl.load(mine + ROWS * HEAD_DIM + row, mask=there, other=-1e30, cache_modifier=".cg")
        own_total = tl.load(mine + ROWS * (HEAD_DIM + 1) + row, mask=there, other=0, cache_modifier=".cg")
        channel = tl.arange(0, HEAD_DIM)[None, :]
        own = tl.load(mine + row * HEAD_DIM + channel, mask=there, other=0, cache_modifier=".cg")
        new_top = tl.maximum(top, own_top)
        shrink = tl.exp2(top - new_top)
        grow = tl.exp2(own_top - new_top)
        total = total * shrink + own_total * grow
        acc = acc * shrink + own * grow
        top = new_top
    tl.store(out, rounded(acc / total, kind, INTERPRETED), mask=stored)


@triton.jit
def best_of_blocks(
    logits_ptr,
    value_ptr,
    index_ptr,
    size,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Largest of each block of logits [b, size] and where it is: value, index [b, blocks]; grid (blocks, b)."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    follow(PDL)
    logits = tl.load(logits_ptr + row * size + column, mask=column < size, other=float("-inf")).to(tl.float32)
    value, index = tl.max(logits, 0, return_indices=True)
    to = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(value_ptr + to, value)
    tl.store(index_ptr + to, tl.program_id(0) * BLOCK + index)


@triton.jit
def best(
    value_ptr,
    index_ptr,
    token_ptr,
    blocks,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """token [b]: the index that goes with the largest of value [b, blocks], the first of equals; a program a row."""
    row = tl.program_id(0)
    block = tl.arange(0, BLOCK)
    follow(PDL)
    value = tl.load(value_ptr + row * blocks + block, mask=block < blocks, other=float("-inf"))
    _, where = tl.max(value, 0, return_indices=True)
    tl.store(token_ptr + row, tl.load(index_ptr + row * blocks + where).to(tl.int64))
