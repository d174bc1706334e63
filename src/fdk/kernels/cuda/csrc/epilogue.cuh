// What becomes of a product's sums: the output alone, or what a decoding step needs next (fdk/models/chain.py), so that
// neither norm nor gate nor residual sum takes a launch of its own.
//
//   plain         out[m, n] = sum + bias
//   FDK_SQUARES   x was multiplied by the weight of an RMS norm, but not divided by the root of the mean square: every sum
//                 is, by that of the FDK_SQUARES partial sums of squares that the kernel before left for its token
//   FDK_GATED     out[m, n / 2] = silu(gate) * up, with gate in rows 0.. and up in rows n / 2..
//   FDK_RESIDUAL  residual += sum + bias; out = residual * gamma, and the partial sums of squares of residual
#pragma once
#include "shape.cuh"

namespace fdk {

// Rows of a block that one CTA finishes, and that one partial sum of squares covers: a warp at most.
constexpr int SHARE_ROWS = 64 / CLUSTER, SQUARE_ROWS = SHARE_ROWS < 32 ? SHARE_ROWS : 32;
constexpr i64 SQUARES_OUT = (N + 63) / 64 * 64 / SQUARE_ROWS;

// Where a slot of partial sums [64 rows][M tokens] has a token of a row: rows are turned, in pairs of tokens, so that 32 rows of
// a token, which a warp reads at once, lie in 16 banks and not in 32 / M of them. Fewer tokens gained nothing by it.
constexpr bool TURNED = M >= 16;
__device__ __forceinline__ int turned(int row, int token) {
    if constexpr (!TURNED) return token;
    constexpr int EIGHTS = TURNED ? M / 8 : 1;
    const int turn = row / (M < 32 ? 32 / M : 1);
    return token ^ (turn * 8 % M + turn / EIGHTS % 4 * 2);
}

// Block of rows of the weight that row warp `row_warp` starts with, where its CTA starts with `first` of those that its
// cluster counts: a gated product takes gate and up in turn.
__device__ __forceinline__ int block_of(int first, int row_warp) {
    return GATED ? first / 2 + row_warp / 2 + row_warp % 2 * int(N / 128) : first + row_warp;
}

// 1 / sqrt(mean(h^2) + eps) of each token, to floats[M] at Smem::NORMS, by the warps 1, 2, ... and, of one token, by the
// last. One token's partial sums take as long to come as its activations, so they are only asked for at first where digits
// are made of those; look-ups of 4 bits lost by it.
struct Norms {
    static constexpr bool LATER = SQUARES > 0 && M == 1 && DIGITS;
    static constexpr int TOKENS = (M + WARPS - 1) / WARPS, PIECES = SQUARES > 32 ? (SQUARES + 31) / 32 : 1;  // of a warp, a lane
    float piece[TOKENS][PIECES];
    const float* squares;  // of this lane, of one token

    __device__ static __forceinline__ int token(int i, int warp) {
        return LATER ? WARPS - 1 - warp : (warp + WARPS - 1) % WARPS + i * WARPS;
    }
    // Before the dependency wait.
    __device__ __forceinline__ void find(const Params& p, int lane) {
        if constexpr (LATER) {
            squares = p.squares + lane;
            keep_ahead(squares);
        }
    }
    __device__ __forceinline__ void fetch(const Params& p, int warp, int lane) {
        if constexpr (SQUARES > 0) {
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) {
                const float* from = LATER ? squares : p.squares + i64(min(token(i, warp), p.m - 1)) * SQUARES + lane;
#pragma unroll
                for (int j = 0; j < PIECES; ++j)
                    piece[i][j] = token(i, warp) < M && j * 32 + lane < SQUARES ? load_latest_float(from + j * 32) : 0.f;
            }
        }
    }
    __device__ __forceinline__ void finish(const Params& p, char* smem, int warp, int lane) const {
        if constexpr (SQUARES > 0) {
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) {
                if (token(i, warp) >= M) break;
                float sum = piece[i][0];
#pragma unroll
                for (int j = 1; j < PIECES; ++j) sum += piece[i][j];
#pragma unroll
                for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
                if (lane == 0) reinterpret_cast<float*>(smem + Smem::NORMS)[token(i, warp)] = rsqrtf(sum * (1.f / K) + p.eps);
            }
        }
    }
    __device__ __forceinline__ void read(const Params& p, char* smem, int warp, int lane) {
        fetch(p, warp, lane);
        if constexpr (!LATER) finish(p, smem, warp, lane);
    }
};

// The outputs of a row step: ROW_WARPS blocks, of each SHARE_ROWS rows from `share` on, all tokens.
struct Outputs {
    static constexpr int PER_ROW = GATED ? 2 : 1;  // sums of an output
    static constexpr int COUNT = ROW_WARPS / PER_ROW * SHARE_ROWS * M, TRIPS = (COUNT + THREADS - 1) / THREADS;
    static constexpr bool EARLY = RESIDUAL && STEPS_PER_CTA == 1 && TRIPS <= 4;
    static constexpr int KEPT = EARLY ? TRIPS : 1;

    const Params& p;
    const Range& range;
    const char* smem;
    int share;
    // Of this thread's outputs, fetched while the product runs; as they come, or the warp would wait for them at once.
    u16 residual[KEPT], gamma[KEPT];
    static constexpr bool COMES_LATER = M > 1 || DIGITS || AHEAD;
    // Where those lie, null outside of the matrix: found before the dependency wait, for one token.
    static constexpr bool PLACED = EARLY && M == 1 && DIGITS;
    const u16 *residual_at[KEPT], *gamma_at[KEPT];

    struct Place {
        int row_warp, row, token;
        i64 n;                 // of the output
        bool written, inside;  // whether it belongs to this thread, and to the matrix
    };
    __device__ __forceinline__ Place place(int trip, int block, int end_block) const {
        const int i = trip * THREADS + threadIdx.x, row = i % SHARE_ROWS, token = i / SHARE_ROWS % M;
        const int row_warp = ROW_WARPS == PER_ROW ? 0 : i / (SHARE_ROWS * M) * PER_ROW;
        const i64 n = GATED ? i64(block + row_warp) / 2 * 64 + share + row
                            : range.first_row + i64(block + row_warp - range.first_block) * 64 + share + row;
        const bool written = (COUNT % THREADS == 0 || i < COUNT) && block + row_warp < end_block && token < p.m;
        // Of the block that two clusters share, the first has the first half of the rows.
        const bool second = HALF_BLOCKS && (blockIdx.x / CLUSTER - range.first_cluster) % 2;
        const bool others = HALF_BLOCKS && row_warp == (second ? 0 : ROW_WARPS - 1) && (share + row < 32) == second;
        return {row_warp, row, token, n, written, written && !others && n < (GATED ? N / 2 : range.end_row)};
    }
    __device__ __forceinline__ void fetch(const Place& at, int slot) {
        residual[slot] = gamma[slot] = 0;
        if (at.inside) {
            residual[slot] = load_latest_2(p.residual + i64(at.token) * N + at.n);
            gamma[slot] = load_latest_2(p.gamma + at.n);
        }
    }
    __device__ __forceinline__ void find(int block, int end_block) {
        if constexpr (PLACED) {
#pragma unroll
            for (int trip = 0; trip < TRIPS; ++trip) {
                const Place at = place(trip, block, end_block);
                residual_at[trip] = at.inside ? p.residual + at.n : nullptr, gamma_at[trip] = p.gamma + at.n;
                keep_ahead(residual_at[trip]), keep_ahead(gamma_at[trip]);
            }
        }
    }
    // Behind the dependency wait: the residual may come from any kernel before.
    __device__ __forceinline__ void prepare(int block, int end_block) {
        if constexpr (EARLY) {
#pragma unroll
            for (int trip = 0; trip < TRIPS; ++trip) {
                if constexpr (!PLACED) {
                    fetch(place(trip, block, end_block), trip);
                } else {
                    residual[trip] = gamma[trip] = 0;
                    if (residual_at[trip]) residual[trip] = load_latest_2(residual_at[trip]), gamma[trip] = load_latest_2(gamma_at[trip]);
                }
            }
        }
    }

    // total(row_warp, row, token): the sum over k.
    template <class Total>
    __device__ __forceinline__ void write(int block, int end_block, Total total) {
#pragma unroll(TRIPS <= 4 ? TRIPS : 1)
        for (int trip = 0; trip < TRIPS; ++trip) {
            const Place at = place(trip, block, end_block);
            float value[PER_ROW] = {};
            if (COUNT % THREADS == 0 || trip * THREADS + int(threadIdx.x) < COUNT) {
#pragma unroll
                for (int i = 0; i < PER_ROW; ++i) {
                    value[i] = total(at.row_warp + i, at.row, at.token);
                    if constexpr (SQUARES > 0) value[i] *= reinterpret_cast<const float*>(smem + Smem::NORMS)[at.token];
                    if (p.bias && at.inside) value[i] += low_half<BF16>(p.bias[at.n + i * (N / 2)]);
                }
            }
            const i64 to = i64(at.token) * (GATED ? N / 2 : N) + at.n;
            if constexpr (RESIDUAL) {
                const int slot = EARLY ? trip : 0;
                if constexpr (!EARLY) fetch(at, slot);
                const u16 stored = round_half<BF16>(value[0] + low_half<BF16>(COMES_LATER ? arrived(residual[slot]) : residual[slot]));
                const float sum = low_half<BF16>(stored);
                if (at.inside) {
                    p.residual[to] = stored;
                    p.out[to] = round_half<BF16>(sum * low_half<BF16>(COMES_LATER ? arrived(gamma[slot]) : gamma[slot]));
                }
                float square = at.inside ? sum * sum : 0.f;
#pragma unroll
                for (int other = SQUARE_ROWS / 2; other; other /= 2) square += __shfl_xor_sync(0xffffffffu, square, other);
                // Rows past n count as zeros: the next product reads the sums of whole blocks.
                const int row = share + at.row;
                if (row % SQUARE_ROWS == 0 && at.written)
                    p.squares_out[at.token * SQUARES_OUT + (block + at.row_warp) * (64 / SQUARE_ROWS) + row / SQUARE_ROWS] = square;
            } else if (at.inside) {
                float result = value[0];
                if constexpr (GATED) result = result / (1.f + __expf(-result)) * value[PER_ROW - 1];
                p.out[to] = round_half<BF16>(result);
            }
        }
    }
};

}  // namespace fdk
