// Activations in the order in which the kernels read them.
#pragma once
#include "codes.h"

namespace {

// Activations of one tile: x :: rows `row ..` of [m, k] -> dst :: [k_padded][width] float32, sums :: [groups][width].
// Rows beyond `rows` and k beyond w.k become zeros.
template <class I>
void pack_floats(const fdk_weight& w, const uint8_t* x, const fdk_tile& tile, float* dst) {
    const int rows = tile.rows, width = tile.width;
    float* sums = tile.sums;
    const int size = w.scale_bytes;
    const int64_t groups = w.supers * (w.split ? 2 : 1), group = w.group;
    for (int i = 0; i < width; i++) {
        const uint8_t* src = x + i * w.k * size;
        const int64_t k = i < rows ? w.k : 0;
        float chunk[256];
        if (dst) {
            for (int64_t at = 0; at < w.k_padded; at += 256) {
                int64_t have = k - at < 0 ? 0 : k - at < 256 ? k - at : 256;
                int64_t want = w.k_padded - at < 256 ? w.k_padded - at : 256;
                float* to = width == 1 ? dst + at : chunk;
                for (int64_t c = 0; c < have; c += I::W) {
                    int lanes = have - c < I::W ? (int)(have - c) : I::W;
                    I::keep_partial(to + c, I::floats_partial(src + (at + c) * size, w.dtype, lanes), lanes);
                }
                for (int64_t c = have; c < want; c++) to[c] = 0;
                if (width > 1)
                    for (int64_t c = 0; c < want; c++) dst[(at + c) * width + i] = chunk[c];
            }
        }
        if (sums) {
            for (int64_t g = 0; g < groups; g++) {
                typename I::vf sum = I::zero();
                int64_t end = (g + 1) * group < k ? (g + 1) * group : k;
                for (int64_t c = g * group; c < end; c += I::W)
                    sum = I::add(sum, I::floats_partial(src + c * size, w.dtype, end - c < I::W ? (int)(end - c) : I::W));
                float lanes[I::W], all = 0;
                I::keep(lanes, sum);
                for (int l = 0; l < I::W; l++) all += lanes[l];
                sums[g * width + i] = all;
            }
        }
    }
}

// The same for bf16 instructions: dst :: [k_padded / 2 / TOGETHER][width][TOGETHER] pairs of bf16.
template <class I, int TOGETHER = 1>
void pack_bf16_pairs(const fdk_weight& w, const uint16_t* x, const fdk_tile& tile) {
    const int64_t pairs = w.k_padded / 2, width = tile.width;
    // A stretch at a time, so that what every row writes into is in the first-level cache.
    for (int64_t first = 0; first < pairs; first += 128) {
        const int64_t end = first + 128 < pairs ? first + 128 : pairs;
        for (int i = 0; i < width; i++) {
            const uint16_t* src = x + i * w.k;
            const int64_t have = i < tile.rows ? w.k / 2 : 0, whole = have < end ? have : end;
            uint32_t* dst = (uint32_t*)tile.x;
            const auto at = [=](int64_t p) { return (p / TOGETHER * width + i) * TOGETHER + p % TOGETHER; };
            int64_t p = first;
            for (; p < whole; p++) memcpy(dst + at(p), src + 2 * p, 4);
            if (i < tile.rows && w.k % 2 && p < end && p == have) dst[at(p++)] = src[w.k - 1];
            for (; p < end; p++) dst[at(p)] = 0;
        }
    }
    if (tile.sums) pack_floats<I>(w, (const uint8_t*)x, tile, nullptr);
}

}  // namespace
