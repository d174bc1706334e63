// From a warpgroup's sums to the outputs of its block: scales of rows, bias, rounding, and 8 rows of a token at a time.
#pragma once
#include "prefill_sums.cuh"

namespace fdk {

// Staged outputs of a block for `count` tokens from `token` on to global memory.
__device__ __forceinline__ void write_block(const Params& p, const Range& range, int block, const char* staged, int token, int count,
                                            int thread) {
    const i64 row = range.first_row + i64(block - range.first_block) * 64;
    const int rows = block < range.end_block ? int(min(i64(64), range.end_row - row)) : 0;
    const bool whole = N % 8 == 0 && row % 8 == 0 && reinterpret_cast<u64>(p.out) % 16 == 0;
    if (whole && rows == 64 && token + count <= p.m) {
        constexpr int PIECES = (Smem::CHUNK + 15) / 16;
        const int t = thread / 8, first = thread % 8 * 8;
        const char* const from = staged + t * Smem::OUT_STRIDE + first * 2;
        u16* const to = p.out + i64(token + t) * N + row + first;
        u32x4 v[PIECES];
#pragma unroll
        for (int i = 0; i < PIECES; ++i)
            if (t + i * 16 < count) v[i] = *reinterpret_cast<const u32x4*>(from + i * 16 * Smem::OUT_STRIDE);
#pragma unroll
        for (int i = 0; i < PIECES; ++i)
            if (t + i * 16 < count) *reinterpret_cast<u32x4*>(to + i * 16 * N) = v[i];
        return;
    }
    for (int i = thread; i < count * 8; i += 128) {
        const int t = i / 8, first = i % 8 * 8;
        if (token + t >= p.m || first >= rows) continue;
        const u16* from = reinterpret_cast<const u16*>(staged + t * Smem::OUT_STRIDE + first * 2);
        u16* to = p.out + i64(token + t) * N + row + first;
        if (whole && first + 8 <= rows) {
            *reinterpret_cast<u32x4*>(to) = *reinterpret_cast<const u32x4*>(from);
        } else {
            for (int e = 0; e < 8 && first + e < rows; ++e) to[e] = from[e];
        }
    }
}

// What the sums of a lane's two rows, g and g + 8 of the warp's row tile, are multiplied by, and what is added. Rows past the
// range are computed and not written.
__device__ __forceinline__ void load_row_terms(float (&bias)[2], float (&scale)[2], const Params& p, const Range& range, const int& block,
                                               const Consumer& me) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const i64 row = range.first_row + i64(block - range.first_block) * 64 + me.r * 16 + h * 8 + me.g;
        if (p.bias && block < range.end_block && row < range.end_row) bias[h] = low_half<BF16>(p.bias[row]);
        if constexpr (!GROUPED) {
            const i64 stored = min(block, range.end_block - 1);
            const u16 bits = reinterpret_cast<const u16*>(p.scales)[stored * 64 + me.g * 8 + me.r * 2 + h];
            scale[h] = low_half<BF16>(bits);
        }
    }
}

// A chunk of outputs from tile `first` on, rounded, in shared memory: rows of OUT_STRIDE bytes for each token.
__device__ __forceinline__ void stage_outputs(const Sums& sums, const Consumer& me, const float (&bias)[2], const float (&scale)[2], char* staged,
                                              const int& first) {
#pragma unroll
    for (int j = first; j < first + CHUNK_TILES && j < MINE; ++j) {
        const int at = 4 * (j % TOKEN_TILES);
        const u32 upper = round_pair<BF16>(fmaf(sums[at], scale[0], bias[0]), fmaf(sums[at + 1], scale[0], bias[0]));
        const u32 lower = round_pair<BF16>(fmaf(sums[at + 2], scale[1], bias[1]), fmaf(sums[at + 3], scale[1], bias[1]));
        const u32 to = shared_address(staged) + ((j - first) * 8 + me.lane % 8) * Smem::OUT_STRIDE;
        store_transposed(to + me.r * 32 + me.lane / 8 % 2 * 16, upper, lower);
    }
}

}  // namespace fdk
