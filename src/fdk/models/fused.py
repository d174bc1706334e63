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
def rotated(pointer, cos, sin, HEAD_DIM: tl.constexpr, kind: tl.constexpr, INTERPRETED: tl.constexpr):
    """The vectors at `pointer` [..., 1] turned by the rotary angles, rounded to `kind`: channel i goes with i + d/2."""
    channel = tl.arange(0, HEAD_DIM)[None, :]
    own = tl.load(pointer + channel).to(tl.float32)
    other = tl.load(pointer + (channel + HEAD_DIM // 2) % HEAD_DIM).to(tl.float32)
    other = tl.where(channel < HEAD_DIM // 2, -other, other)
    return rounded(own * cos + other * sin, kind, INTERPRETED)


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
    TEAM: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Rotary embedding of a token's queries and key, its key and value into the cache, attention to all up to it.

    qkv [b, (g * HEADS + 2 * g) * d]: queries, keys, values; keys, values [b, g, length, d]; cos, sin [length, d];
    position [1]: tokens in the cache before this one; out [b, g * HEADS * d]; scale: 1/sqrt(d) times log2(e).
    Grid (teams, b * g, SPLITS): TEAM query heads of a key head, CHUNK positions. Each of a program's BLOCK places has a
    maximum and sums of its own, which meet at the end only: nothing in the loop waits for other warps. The last of a
    team's programs to arrive adds up their sums in the order of the chunks: partial [b * g * teams, SPLITS, TEAM,
    d + 2], arrived [b * g * teams], zero before and after.
    """
    kind: tl.constexpr = keys_ptr.dtype.element_ty
    head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = (head // KV_HEADS).to(tl.int64)
    group = head % KV_HEADS
    follow(PDL)
    position = tl.load(position_ptr)
    active = position // CHUNK + 1
    if split >= active:
        return
    channel = tl.arange(0, HEAD_DIM)[None, :]
    place = tl.arange(0, BLOCK)
    cos = tl.load(cos_ptr + position * HEAD_DIM + channel).to(tl.float32)
    sin = tl.load(sin_ptr + position * HEAD_DIM + channel).to(tl.float32)
    token = qkv_ptr + sequence * ((HEADS + 2) * KV_HEADS * HEAD_DIM)
    member = tl.program_id(0) * TEAM + tl.arange(0, TEAM)[:, None]
    # Members past the last head repeat it; they are never stored.
    query = token + (group * HEADS + tl.minimum(member, HEADS - 1)) * HEAD_DIM
    q = rotated(query, cos, sin, HEAD_DIM, kind, INTERPRETED).to(tl.float32) * scale
    cache = head.to(tl.int64) * length * HEAD_DIM

    top = tl.full([TEAM, BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([TEAM, BLOCK], tl.float32)
    acc = tl.zeros([TEAM, BLOCK, HEAD_DIM], tl.float32)
    end = tl.minimum((split + 1) * CHUNK, position)
    # The interpreter's range does not take a tensor.
    for step in range(CHUNK // BLOCK if INTERPRETED else tl.cdiv(end - split * CHUNK, BLOCK)):
        at = split * CHUNK + step * BLOCK + place
        there = at < end
        inside = there[:, None]
        keys = tl.load(keys_ptr + cache + at[:, None] * HEAD_DIM + channel, mask=inside, other=0)
        values = tl.load(values_ptr + cache + at[:, None] * HEAD_DIM + channel, mask=inside, other=0)
        scores = tl.sum(q[:, None, :] * keys.to(tl.float32)[None, :, :], 2)
        scores = tl.where(there[None, :], scores, float("-inf"))
        # A place that has seen no position yet keeps the maximum 0: minus infinity less itself is not a number.
        new_top = tl.maximum(top, scores)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        share = tl.exp2(scores - safe)
        shrink = tl.exp2(top - safe)
        total = total * shrink + share
        acc = acc * shrink[:, :, None] + share[:, :, None] * values.to(tl.float32)[None, :, :]
        top = new_top

    best = tl.max(top, 1)[:, None]
    new = split == active - 1
    key = rotated(token + (KV_HEADS * HEADS + group) * HEAD_DIM, cos, sin, HEAD_DIM, kind, INTERPRETED)
    value = tl.load(token + (KV_HEADS * (HEADS + 1) + group) * HEAD_DIM + channel)
    if new and tl.program_id(0) == 0:
        tl.store(keys_ptr + cache + position * HEAD_DIM + channel, key)
        tl.store(values_ptr + cache + position * HEAD_DIM + channel, value)
    score = tl.sum(q * key.to(tl.float32), 1)[:, None]
    score = tl.where(new, score, float("-inf"))
    best = tl.maximum(best, score)
    weight = tl.exp2(top - best)
    share = tl.exp2(score - best)
    total = tl.sum(total * weight, 1)[:, None] + share
    sums = tl.sum(acc * weight[:, :, None], 1) + share * value.to(tl.float32)

    out = out_ptr + (sequence * KV_HEADS + group) * (HEADS * HEAD_DIM) + member * HEAD_DIM + channel
    if SPLITS == 1:
        tl.store(out, rounded(sums / total, kind, INTERPRETED), mask=member < HEADS)
    else:
        team = head * tl.num_programs(0) + tl.program_id(0)
        slot = partial_ptr + team.to(tl.int64) * SPLITS * (TEAM * (HEAD_DIM + 2))
        mine = slot + split * (TEAM * (HEAD_DIM + 2))
        row = tl.arange(0, TEAM)[:, None]
        tl.store(mine + row * HEAD_DIM + channel, sums)
        tl.store(mine + TEAM * HEAD_DIM + row, best)
        tl.store(mine + TEAM * (HEAD_DIM + 1) + row, total)
        # All threads' stores come before the count by which the others know of them.
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + team, 1, sem="acq_rel") == active - 1:
            tl.debug_barrier()
            add_splits(slot, out, active, member < HEADS, kind, HEAD_DIM, TEAM, SPLITS, INTERPRETED)
            tl.store(arrived_ptr + team, 0)


@triton.jit
def add_splits(
    slot,
    out,
    active,
    stored,
    kind: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TEAM: tl.constexpr,
    SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out [TEAM, d] of a team's partial sums of `active` chunks, SPLITS at most."""
    size: tl.constexpr = TEAM * (HEAD_DIM + 2)
    PADDED: tl.constexpr = triton.next_power_of_2(SPLITS)
    split = tl.arange(0, PADDED)[:, None]
    row = tl.arange(0, TEAM)[None, :]
    there = split < active
    tops = tl.load(slot + split * size + TEAM * HEAD_DIM + row, mask=there, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(slot + split * size + TEAM * (HEAD_DIM + 1) + row, mask=there, other=0, cache_modifier=".cg")
    weight = tl.exp2(tops - tl.max(tops, 0)[None, :])
    total = tl.sum(totals * weight, 0)
    member = tl.arange(0, TEAM)[:, None]
    sums = tl.zeros([TEAM, HEAD_DIM], tl.float32)
    best = tl.max(tops, 0)[:, None]
    for other in range(SPLITS):
        theirs = slot + other * size
        inside = other < active
        top = tl.load(theirs + TEAM * HEAD_DIM + member, mask=inside, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            theirs + member * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :], mask=inside, other=0, cache_modifier=".cg"
        )
        sums += part * tl.exp2(top - best)
    value = sums / total[:, None]
    tl.store(out, rounded(value, kind, INTERPRETED), mask=stored)


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
