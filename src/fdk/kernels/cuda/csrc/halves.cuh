// The product in bf16 or fp16: codes become A operands of mma.m16n8k16, exact table entries or small integers.
#pragma once
#include "activations.cuh"

namespace fdk {

// B operands of a unit for tokens 8*nt..8*nt+7: b[2s + i] of step s are columns 16s + 8i + 2t, +1. Lane i names the unit of
// column i % 8 of the operands, the same for all but a single token's sums.
__device__ __forceinline__ void load_activations(u32 (&b)[8], const char* x, int unit, int nt, int lane) {
    if constexpr (SPARSE) {
        // Columns 16t to 16t + 15, those at the outer end of their block of 32 first (sparse.cuh).
        const int t = lane % 4, token = M < 8 ? min(lane / 4, M - 1) : nt * 8 + lane / 4;
        const char* from = x + token * Smem::X_STRIDE + unit * 128 + t * 32;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32x4 v = *reinterpret_cast<const u32x4*>(from + (i ^ t % 2) * 16);
            b[4 * i] = v.x, b[4 * i + 1] = v.y, b[4 * i + 2] = v.z, b[4 * i + 3] = v.w;
        }
        return;
    }
    const int token = M < 8 ? min(lane % 8, M - 1) : nt * 8 + lane % 8;
    const u32 from = shared_address(x) + token * Smem::X_STRIDE + unit * 128 + lane / 8 * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) load_matrices(b[4 * i], b[4 * i + 1], b[4 * i + 2], b[4 * i + 3], from + i * 64);
}

// Per unit and scale change, sums[(unit * SUBS + sub) * SUM_KINDS + kind][SUM_COLUMNS]: sum(x), doubled for one bit whose
// values step by 2, and minus the contribution of all-zero codes, from which one-bit accumulators start. A single
// token leaves seven columns of an mma free, so that it sums eight units at once.
__device__ __forceinline__ void sum_activations(float* sums, const char* x, int units, int warp, int lane, const Lookup& lookup) {
    constexpr u32 ONE = BF16 ? (SPLIT_BIT ? 0x40004000u : 0x3f803f80u) : (SPLIT_BIT ? 0x40004000u : 0x3c003c00u);
    constexpr int AT_ONCE = M == 1 ? 8 : 1;
    const Share share = Share::of(units, warp, lane);
    const int end = share.first + share.units;
    for (int first = share.first + share.thread / 32 * AT_ONCE; first < end; first += SHARE_THREADS / 32 * AT_ONCE) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            u32 b[8], offsets[4][4] = {};
            load_activations(b, x, M == 1 ? min(first + lane % 8, end - 1) : first, nt, lane);
            if constexpr (SPLIT_BIT) {
                const u32 zero[4 * BITS] = {};
                dequantise<BITS, BF16, SELECT>(offsets, zero, 0, lookup);
            }
#pragma unroll
            for (int sub = 0; sub < SUBS; ++sub) {
                float sum[4] = {}, offset[4] = {};
#pragma unroll
                for (int s = sub * STEPS; s < (sub + 1) * STEPS; ++s) {
                    const u32 ones[4] = {ONE, ONE, ONE, ONE};
                    mma<BF16>(sum, ones, b[2 * s], b[2 * s + 1]);
                    if constexpr (SPLIT_BIT) mma<BF16>(offset, offsets[s], b[2 * s], b[2 * s + 1]);
                }
                if (lane < 4) {
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const int column = lane * 2 + c, unit = M == 1 ? first + column : first;
                        float* to = sums + (unit * SUBS + sub) * SUM_KINDS * SUM_COLUMNS + (M == 1 ? 0 : nt * 8 + column);
                        if (M > 1 || unit < end) {
                            to[0] = sum[c];
                            if constexpr (SPLIT_BIT) to[SUM_COLUMNS] = -offset[c], to[2 * SUM_COLUMNS] = -offset[2 + c];
                        }
                    }
                }
            }
        }
    }
}

// What a unit's scale change needs of the sums of tokens 8*nt + 2t, +1; see sum_activations.
struct XSums {
    f32x2 sum, start[2];
};

// The same without shared memory: a product whose rows g add up the first half of each step's columns, rows g + 8 the second.
__device__ __forceinline__ XSums x_sums(const u32 (&b)[8], int sub) {
    constexpr u32 ONE = BF16 ? 0x3f803f80u : 0x3c003c00u;
    constexpr float STEP = SPLIT_BIT ? 2.f : 1.f, BASE7 = BF16 ? 2.f : 16.f, BASE6 = BF16 ? 4.f : 32.f;
    const u32 halves[4] = {ONE, 0, 0, ONE};
    float x[4] = {};
#pragma unroll
    for (int s = sub * STEPS; s < (sub + 1) * STEPS; ++s) mma<BF16>(x, halves, b[2 * s], b[2 * s + 1]);
    XSums found = {{STEP * (x[0] + x[2]), STEP * (x[1] + x[3])}, {}};
    if constexpr (SPLIT_BIT) {
        found.start[0] = {fmaf(-BASE7, x[2], x[0]), fmaf(-BASE7, x[3], x[1])};
        found.start[1] = {-BASE6 * x[2], -BASE6 * x[3]};
    }
    return found;
}

// Sums of one block over a warp's slice: row 16*tile + 8*h + g, token 8*nt + 2*t + column.
struct Accumulator {
    float sum[4][NT][2][COLUMNS];
    float scaled_x[SPLIT_BIT && !ZEROS ? 4 : 1][NT][2][COLUMNS];  // one bit: sum of scale * 2 * sum(x)
};

// Row tiles whose A operands are live at once: all where many token tiles share them, else one.
constexpr int TILES = NT <= 2 ? 1 : HALF_BLOCKS ? 2 : 4;

// A unit in registers: it leaves the ring before it is used, so that the ring refills meanwhile.
struct Unit {
    u32 words[SPARSE ? 24 : 4 * BITS];
    Rows scales[SUBS];
    Zeros zeros[ZEROS ? SUBS : 1];
};

// Unit number `index` of a stage, its row tiles 0 to COUNT - 1; `k` is its first column. Of a half of the block (COUNT = 2)
// the stage holds what the operand's tiles 0 and 1 become, and `half` says which rows of scales are theirs.
template <int COUNT>
__device__ __forceinline__ void load_unit(Unit& u, const char* stage, StageGroups groups, int index, int k, int lane, int half, RowTiles<COUNT>) {
    const int g = lane / 4;
    constexpr int PIECES = SPARSE ? 6 : BITS, PIECE = Smem::CODE_BYTES / PIECES;
#pragma unroll
    for (int i = 0; i < PIECES * COUNT / 4; ++i) {
        const u32x4 v = *reinterpret_cast<const u32x4*>(stage + index * Smem::CODE_BYTES + i * PIECE + lane / (512 / PIECE) * 16);
        u.words[4 * i] = v.x, u.words[4 * i + 1] = v.y, u.words[4 * i + 2] = v.z, u.words[4 * i + 3] = v.w;
    }
#pragma unroll
    for (int sub = 0; sub < SUBS; ++sub) {
        int group = STAGE_GROUPS == 1 ? 0 : index * 64 / GROUP;
        if constexpr (SUBS > 1) group = (k + sub * (64 / SUBS)) / GROUP - stage_group(k / 64 - index);
        // Columns past k have no group of their own; any finite scale will do, because their activations are zero.
        if constexpr (SUBS > 1 && K % 64 != 0) group = min(group, STAGE_GROUPS - 1);
        u.scales[sub] = COUNT == 4 ? load_rows(groups.scales + group * 128, g) : half_of(load_rows(groups.scales + group * 128, g), half);
        if constexpr (ZEROS) {
            u.zeros[sub] = load_zeros(groups.zeros + group * Smem::GROUP_ZERO_BYTES, g);
            if constexpr (COUNT == 2) u.zeros[sub] = half_of(u.zeros[sub], half);
        }
    }
}

// The A operands of the four steps of a row tile.
__device__ __forceinline__ void make_operand(u32 (&a)[4][4], const Unit& u, int tile, const Lookup& lookup) {
    if (OCTETS && tile >= SELECTED)
        octets_to_operand(a, u.words[tile], lookup);
    else
        to_operand<KIND, BITS, FDK_SLICE, BF16, SELECT || OCTETS, WIDE>(a, u.words, tile, lookup);
}

// `unit` counts from the CTA's first; `operand(a, tile)` gives the A operands of a row tile.
template <int COUNT, class Operand>
__device__ __forceinline__ void multiply_operands(Accumulator& acc, const Unit& u, const char* smem, int unit, int lane, RowTiles<COUNT>, Operand operand) {
    const int t = lane % 4;
    const char* x = smem + Smem::X;
    u32 b[NT > 2 ? 1 : NT][8];
    if constexpr (NT <= 2) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) load_activations(b[nt], x, unit, nt, lane);
    }
    XSums own[NT > 2 ? 1 : NT][SUBS];
    if constexpr (X_SUMS && NT <= 2) {
#pragma unroll
        for (int i = 0; i < NT * SUBS; ++i) own[i / SUBS][i % SUBS] = x_sums(b[i / SUBS], i % SUBS);
    }
#pragma unroll
    for (int first = 0; first < COUNT; first += TILES) {
        u32 a[TILES][4][4];
#pragma unroll
        for (int i = 0; i < TILES; ++i) operand(a[i], first + i);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            u32 (&bt)[8] = b[NT > 2 ? 0 : nt];
            if constexpr (NT > 2) load_activations(bt, x, unit, nt, lane);
#pragma unroll
            for (int sub = 0; sub < SUBS; ++sub) {
                f32x2 sum_x = {}, start[2] = {};
                if constexpr (SUMS) {
                    const float* from = reinterpret_cast<const float*>(smem + Smem::SUM) + (unit * SUBS + sub) * SUM_KINDS * SUM_COLUMNS;
                    const auto pair = [&](int kind) -> f32x2 {
                        if constexpr (M == 1) return {from[kind], from[kind]};
                        return *reinterpret_cast<const f32x2*>(from + kind * SUM_COLUMNS + nt * 8 + t * 2);
                    };
                    sum_x = pair(0);
                    if constexpr (SPLIT_BIT) start[0] = pair(1), start[1] = pair(2);
                } else if constexpr (X_SUMS) {
                    const XSums found = NT > 2 ? x_sums(bt, sub) : own[NT > 2 ? 0 : nt][sub];
                    sum_x = found.sum, start[0] = found.start[0], start[1] = found.start[1];
                }
                // Neighbouring mma belong to different tiles, since each waits for the one before it on its own sums.
                float d[TILES][4];
#pragma unroll
                for (int i = 0; i < TILES; ++i) d[i][0] = start[0].x, d[i][1] = start[0].y, d[i][2] = start[1].x, d[i][3] = start[1].y;
#pragma unroll
                for (int s = sub * STEPS; s < (sub + 1) * STEPS; ++s)
#pragma unroll
                    for (int i = 0; i < TILES; ++i) mma<BF16>(d[i], a[i][s], bt[2 * s], bt[2 * s + 1]);
#pragma unroll
                for (int i = 0; i < TILES; ++i) {
                    const int tile = first + i;
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float scale = u.scales[sub].at(tile, h);
#pragma unroll
                        for (int c = 0; c < COLUMNS; ++c) {
                            float v = d[i][2 * h + c];
                            const float xs = c ? sum_x.y : sum_x.x;
                            if constexpr (ZEROS) v = fmaf(-u.zeros[sub].at(tile, h), xs, v);
                            acc.sum[tile][nt][h][c] = fmaf(scale, v, acc.sum[tile][nt][h][c]);
                            if constexpr (SPLIT_BIT && !ZEROS)
                                acc.scaled_x[tile][nt][h][c] = fmaf(scale, xs, acc.scaled_x[tile][nt][h][c]);
                        }
                    }
                }
            }
        }
    }
}

template <int COUNT>
__device__ __forceinline__ void multiply_units(Accumulator& acc, const Unit* units, const char* smem, int unit, int, int lane, const Lookup& lookup, RowTiles<COUNT> tiles) {
    multiply_operands(acc, *units, smem, unit, lane, tiles, [&](u32 (&a)[4][4], int tile) { make_operand(a, *units, tile, lookup); });
}

// The first unit of a warp with its operands, which need no activations: 64 registers.
struct MadeUnit {
    Unit u;
    u32 a[4][4][4];

    __device__ __forceinline__ void make(const Lookup& lookup) {
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) make_operand(a[tile], u, tile, lookup);
    }
    __device__ __forceinline__ void multiply(Accumulator& acc, const char* smem, int unit, int, int lane) const {
        multiply_operands(acc, u, smem, unit, lane, WholeBlock{}, [&](u32 (&to)[4][4], int tile) {
#pragma unroll
            for (int i = 0; i < 16; ++i) to[i / 4][i % 4] = a[tile][i / 4][i % 4];
        });
    }
};

// A warp's sums of a block to its slot [64 rows][M tokens], those of its first COUNT row tiles; `low` and `high` are the two
// table values of one bit.
template <int COUNT>
__device__ __forceinline__ void store_partial(float* slot, const Accumulator& acc, const char*, int lane, float low, float high, RowTiles<COUNT>) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int tile = 0; tile < COUNT; ++tile)
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float v[COLUMNS];
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    v[c] = acc.sum[tile][nt][h][c];
                    if constexpr (SPLIT_BIT && !ZEROS)
                        v[c] = 0.5f * fmaf(high, v[c], low * (acc.scaled_x[tile][nt][h][c] - v[c]));
                    else if constexpr (SPLIT_BIT)
                        v[c] *= 0.5f;
                }
                const int row = tile * 16 + h * 8 + g;
                float* to = slot + row * M;
                const int token = nt * 8 + t * 2;
                if constexpr (M % 2 == 0) {
                    if (M % 8 == 0 || token < M) *reinterpret_cast<f32x2*>(to + turned(row, token)) = {v[0], v[COLUMNS - 1]};
                } else {
#pragma unroll
                    for (int c = 0; c < COLUMNS; ++c)
                        if (token + c < M) to[turned(row, token + c)] = v[c];
                }
            }
}

// Brings the activations of the CTA's slice into shared memory, with what else the product needs of them.
__device__ __forceinline__ void prepare_activations(const Params& p, char* smem, Activations& x, Norms& norms, int phase, int first_unit, int units, int warp, int lane, const Lookup& lookup, bool busy) {
    stage_activations(p, smem, x, norms, phase, first_unit, units, warp, lane, busy);
    if constexpr (FDK_LATE) let_next_kernel_start();
    if constexpr (SUMS) {
        sum_activations(reinterpret_cast<float*>(smem + Smem::SUM), smem + Smem::X, units, warp, lane, lookup);
        Share::of(units, warp, lane).sync(warp);
    }
}
}  // namespace fdk
