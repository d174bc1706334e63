// What all kernels share: a tile of x on a block, the scales of a group, the walk over blocks, the cutting of rows.
#pragma once
#include "codes.h"

namespace {

// One tile on one block: out[row .. row + rows, col .. col + lanes] = x . W^T + bias, columns = rows of the block.
struct Call {
    const fdk_weight* w;
    const fdk_range* range;
    const uint8_t* block;
    const fdk_tile* tile;
    const uint8_t* bias;  // at col, or null
    uint8_t* out;         // at [row, col]
    int64_t col;
    int lanes;
    int range_index;
};
typedef void (*BlockFn)(const Call&, int64_t begin, int64_t end, float* totals);
typedef void (*WriteFn)(const Call&, const float* totals);

// Zeros of vector h of rows, relative to what the values of the range have already taken off.
template <class I>
FDK_INLINE typename I::vf zeros_of(const fdk_weight& w, const uint8_t* zeros, int h) {
    if (w.family == FDK_UINT_U8) return I::sub_scalar(I::bytes(zeros + h * I::W), (float)(1 << (w.bits - 1)));
    return I::floats(zeros + h * I::W * w.zero_bytes, w.dtype);
}

// total += scale * (acc - zero * sum of x): scales are applied to sums over whole groups.
template <class I, int M>
FDK_INLINE void apply_scale(const fdk_weight& w, const uint8_t* scales, const uint8_t* zeros, const float* sums, int h,
                            typename I::vf* acc, typename I::vf* total) {
    const typename I::vf scale = I::floats(scales + h * I::W * w.scale_bytes, w.dtype);
    if (zeros) {
        const typename I::vf zero = zeros_of<I>(w, zeros, h);
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            acc[c] = I::fnma(zero, I::broadcast(sums + c), acc[c]);
        });
    }
    unroll<0, M>([&](auto i) FDK_LAMBDA {
        constexpr int c = decltype(i)::value;
        total[c] = I::fma(acc[c], scale, total[c]);
    });
}

// Rounds the totals of 16 rows of W and M rows of x, with the bias, into out.
template <class I, int M>
FDK_INLINE void finish(const Call& call, const typename I::vf* total) {
    const fdk_weight& w = *call.w;
    for (int h = 0; h < (int)FDK_ROWS / I::W; h++) {
        int lanes = call.lanes - h * I::W;
        if (lanes <= 0) break;
        if (lanes > I::W) lanes = I::W;
        typename I::vf bias = I::zero();
        if (call.bias) bias = I::floats_partial(call.bias + h * I::W * w.scale_bytes, w.dtype, lanes);
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            if (c < call.tile->rows) {
                const typename I::vf y = total[h * M + c];
                I::store(call.out + (c * w.n + h * I::W) * w.scale_bytes, w.dtype, call.bias ? I::add(y, bias) : y, lanes);
            }
        });
    }
}

template <class I, int M>
void write_totals(const Call& call, const float* totals) {
    typename I::vf total[FDK_ROWS / I::W * M];
    for (int i = 0; i < (int)FDK_ROWS / I::W * M; i++) total[i] = I::kept(totals + i * I::W);
    finish<I, M>(call, total);
}

FDK_INLINE const fdk_range* range_of(const fdk_weight& w, int64_t block) {
    const fdk_range* r = w.ranges;
    while (block >= r->block1) r++;
    return r;
}

// visit(call) for every block of [block0, block1), everything but the tile filled in.
template <class Visit>
FDK_INLINE void for_blocks(const fdk_job& job, int64_t block0, int64_t block1, Visit&& visit) {
    const fdk_weight& w = *job.w;
    if (block0 >= block1) return;
    const fdk_range* range = range_of(w, block0);
    for (int64_t b = block0; b < block1; b++) {
        while (b >= range->block1) range++;
        const int64_t col = range->row0 + (b - range->block0) * FDK_ROWS, left = range->row1 - col;
        Call call;
        call.w = &w;
        call.range = range;
        call.range_index = (int)(range - w.ranges);
        call.block = w.data + b * w.block_bytes;
        call.bias = job.bias ? (const uint8_t*)job.bias + col * w.scale_bytes : nullptr;
        call.lanes = left < FDK_ROWS ? (int)left : (int)FDK_ROWS;
        call.col = col;
        visit(call);
    }
}

FDK_INLINE void set_tile(Call& call, const fdk_job& job, int64_t tile) {
    call.tile = job.tiles + tile;
    call.out = (uint8_t*)job.out + (call.tile->row * call.w->n + call.col) * call.w->scale_bytes;
}

const int64_t BATCH = 8;  // blocks that share a stretch of x

// visit(calls, count) for `most` blocks at a time, at most BATCH of them, fewer at the end.
template <class Visit>
FDK_INLINE void for_batches(const fdk_job& job, int64_t block0, int64_t block1, int64_t most, Visit&& visit) {
    Call calls[BATCH];
    int64_t count = 0, left = block1 - block0;
    for_blocks(job, block0, block1, [&](Call& call) {
        calls[count++] = call;
        left--;
        if (count < most && left) return;
        visit(calls, count);
        count = 0;
    });
}

// Cuts m rows into chunks of at most `most` that are as even as they can be, and returns the rows of a chunk.
FDK_INLINE int64_t rows_of_chunk(int64_t m, int64_t most) {
    const int64_t chunks = (m + most - 1) / most;
    return (m + chunks - 1) / chunks;
}

// One width for all tiles of the rows of a plan, at most `widest`.
FDK_INLINE void cut_evenly(int64_t widest, fdk_plan* plan) {
    const int64_t tiles = (plan->rows + widest - 1) / widest;
    plan->width = plan->rest_width = (int32_t)((plan->rows + tiles - 1) / tiles);
    plan->wide_tiles = tiles;
}

// Tiles of `widest` rows first, then even ones of at most two thirds of that.
FDK_INLINE void cut_unevenly(int64_t widest, fdk_plan* plan) {
    // Fewer rows do not hide the latency of a multiply-add, so they take as long as this many.
    const int64_t least = widest / 2, narrow = widest * 2 / 3, whole = plan->rows / widest;
    int64_t best = INT64_MAX;
    for (int64_t wide = whole + 1; wide >= 0 && wide >= whole - 2; wide--) {
        const int64_t left = plan->rows < wide * widest ? 0 : plan->rows - wide * widest, tiles = (left + narrow - 1) / narrow;
        const int64_t width = tiles ? (left + tiles - 1) / tiles : 0;
        const int64_t cost = wide * widest + tiles * (width < least ? least : width);
        if (cost >= best) continue;
        best = cost;
        plan->wide_tiles = wide;
        plan->width = (int32_t)(wide ? widest : width);
        plan->rest_width = (int32_t)width;
    }
}

FDK_INLINE int64_t tiles_of(const fdk_plan* plan) {
    const int64_t left = plan->rows - plan->wide_tiles * plan->width;
    return plan->wide_tiles + (left > 0 ? (left + plan->rest_width - 1) / plan->rest_width : 0);
}

}  // namespace
