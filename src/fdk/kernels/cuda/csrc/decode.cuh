// out[m, n] = x[m, k] W[n, k]^T + bias for up to M tokens, W in the layout of fdk/packing/fragments.py.
//
// Work: a cluster of CLUSTER CTAs owns `blocks_per_cluster` blocks of 64 rows; each of its CTAs takes a slice of k.
// Inside a CTA, ROW_WARPS x K_WARPS warps: K_WARPS of them split the slice of one block, ROW_WARPS blocks go at once.
// Each warp streams its units (64 rows x 64 columns) through a private ring of cp.async stages; a lane copies the
// codes that it reads itself. The weights are the A operand (16 rows), the tokens the B operand (8 columns).
// Sums: over k inside a warp in float32 registers, scaled once per group; over K_WARPS through shared memory; over
// the cluster through distributed shared memory. All in a fixed order, so the result does not depend on timing.
//
// The host passes the shape as macros (see fdk/kernels/cuda/decode.py, whose Config.shared_bytes mirrors `Smem`):
//   FDK_N FDK_K FDK_BITS FDK_GROUP  FDK_BF16  FDK_KIND (0 table, 1 int, 2 uint with u8 zeros, 3 uint with 16-bit zeros)
//   FDK_M FDK_CLUSTER FDK_K_WARPS FDK_ROW_WARPS FDK_STAGES FDK_BATCH FDK_MIN_CTAS
#pragma once
#include "dequantise.cuh"

namespace fdk {

constexpr int K = FDK_K, BITS = FDK_BITS, GROUP = FDK_GROUP, M = FDK_M;
constexpr i64 N = FDK_N;
constexpr bool BF16 = FDK_BF16;
constexpr int KIND = FDK_KIND;
constexpr bool TABLE = KIND == 0, ZEROS = KIND >= 2;
constexpr int CLUSTER = FDK_CLUSTER, K_WARPS = FDK_K_WARPS, ROW_WARPS = FDK_ROW_WARPS, STAGES = FDK_STAGES;
constexpr int WARPS = K_WARPS * ROW_WARPS, THREADS = WARPS * 32;

constexpr int UNITS = (K + 63) / 64, GROUPS = (K + GROUP - 1) / GROUP;
constexpr int SUBS = GROUP % 64 == 0 || GROUPS == 1 ? 1 : GROUP % 32 == 0 ? 2 : 4;  // scale changes inside a unit
constexpr int STEPS = 4 / SUBS;                                                     // mma steps between them
constexpr int UNIT_GROUPS = SUBS == 1 ? 1 : GROUP < 64 && 64 % GROUP == 0 ? 64 / GROUP : (GROUP + 47) / GROUP + 1;
constexpr int NT = (M + 7) / 8;         // tiles of 8 tokens
constexpr int COLUMNS = M == 1 ? 1 : 2; // columns of an accumulator tile that a lane needs

// Affine values need sums of activations: a zero point subtracts zero * sum(x), one bit splits sum(x) in two.
constexpr bool SUMS = ZEROS || BITS == 1;
constexpr int SUM_KINDS = BITS == 1 ? 3 : 1;  // sum(x); for one bit also what all-zero codes give, in rows g and g+8
// Partial sums of that many row steps are kept before they are added up: all of them, or one at a time.
constexpr int BATCH = FDK_BATCH;
constexpr int BUFFERS = BATCH == 1 ? 2 : 1;

// Shared memory. The table starts at a multiple of its size, counted from the start of the shared window, whose first
// kilobyte the system keeps from compute capability 9.0 on; what fits goes in front of it.
struct Smem {
    static constexpr int CTA_UNITS = (UNITS + CLUSTER - 1) / CLUSTER;
    static constexpr int WINDOW = FDK_HOPPER ? 1024 : 0;
    static constexpr int TABLE_BYTES = Table<BITS>::BYTES;
    static constexpr int TABLE = WINDOW && TABLE_BYTES > WINDOW ? TABLE_BYTES - WINDOW : 0;

    static constexpr int X_BYTES = CTA_UNITS * M * 128;
    static constexpr int SUM_BYTES = SUMS ? CTA_UNITS * SUBS * SUM_KINDS * NT * 8 * 4 : 0;
    static constexpr int PARTIAL_BYTES = BUFFERS * BATCH * WARPS * 64 * M * 4;
    static constexpr int RECEIVE_BYTES = CLUSTER == 1 ? 0 : BUFFERS * BATCH * ROW_WARPS * 64 * M * 4;
    static constexpr int HEAD_BYTES = X_BYTES + SUM_BYTES + PARTIAL_BYTES + RECEIVE_BYTES;

    static constexpr int CODE_BYTES = BITS * 512;
    static constexpr int SCALE_BYTES = UNIT_GROUPS * 128;
    static constexpr int ZERO_BYTES = KIND == 2 ? UNIT_GROUPS * 64 : KIND == 3 ? UNIT_GROUPS * 128 : 0;
    static constexpr int STAGE = CODE_BYTES + SCALE_BYTES + ZERO_BYTES;
    static constexpr int RING_BYTES = STAGES * STAGE;

    static constexpr int LOW_HEAD = HEAD_BYTES <= TABLE ? HEAD_BYTES : 0;
    static constexpr int FITTING = (TABLE - LOW_HEAD) / RING_BYTES;
    static constexpr int LOW_RINGS = FITTING < WARPS ? FITTING : WARPS;
    static constexpr int X = LOW_HEAD ? 0 : TABLE + TABLE_BYTES;
    static constexpr int SUM = X + X_BYTES, PARTIAL = SUM + SUM_BYTES, RECEIVE = PARTIAL + PARTIAL_BYTES;
    static constexpr int HIGH_RINGS = TABLE + TABLE_BYTES + (LOW_HEAD ? 0 : HEAD_BYTES);
    static constexpr int BYTES = HIGH_RINGS + (WARPS - LOW_RINGS) * RING_BYTES;

    __device__ static __forceinline__ int ring(int warp) {
        return warp < LOW_RINGS ? LOW_HEAD + warp * RING_BYTES : HIGH_RINGS + (warp - LOW_RINGS) * RING_BYTES;
    }
};
static_assert(Smem::BYTES == FDK_SHARED_BYTES, "host and device disagree on the shared memory layout");
static_assert(64 / CLUSTER * M % 4 == 0 && CLUSTER <= 16, "a CTA's share of a block's sums is whole 16-byte pieces");

constexpr int MAX_RANGES = 16;
struct Range {
    int first_cluster, first_block, end_block, pad;
    i64 first_row, end_row;
};
struct Params {
    const char* codes;   // [B, UNITS, BITS, 32, 4] words
    const char* scales;  // [B, GROUPS, 64]
    const char* zeros;   // [B, GROUPS, 64]
    const u16* table;    // [tables, 2^BITS]
    const u16* x;        // [m, K]
    const u16* bias;     // [N] or null
    u16* out;            // [m, N]
    int m, ranges, blocks_per_cluster;
    u32 one_bit[3];      // see Lookup; the pairs of 1, base7, base6
    u32 zero;            // 0, which the compiler does not know
    Range range[MAX_RANGES];
};

// Where a warp stands in its stream of units; the codes of one block's slice are contiguous.
struct Cursor {
    int step, unit;
    const char* codes;
};

struct Warp {
    const Params& p;
    char* ring;
    int lane, first_block, steps, first_unit, end_unit;  // units counted from the CTA's first
    int cta_unit;
    u64 policy;

    __device__ __forceinline__ Cursor start() const {
        return {0, first_unit, p.codes + unit_offset(0, first_unit) + lane * 16};
    }
    __device__ __forceinline__ i64 unit_offset(int step, int unit) const {
        return (i64(first_block + step * ROW_WARPS) * UNITS + cta_unit + unit) * Smem::CODE_BYTES;
    }
    __device__ __forceinline__ void advance(Cursor& c) const {
        c.codes += Smem::CODE_BYTES;
        if (++c.unit == end_unit) {
            c.unit = first_unit;
            c.step += 1;
            c.codes += i64(ROW_WARPS * UNITS - (end_unit - first_unit)) * Smem::CODE_BYTES;
        }
    }
    // Every call commits a group, also past the end, so that the number of pending groups stays known.
    __device__ __forceinline__ void prefetch(Cursor& c, int stage) const {
        if (c.step < steps) {
            char* to = ring + stage * Smem::STAGE;
            const u32 address = shared_address(to) + lane * 16;
#pragma unroll
            for (int i = 0; i < BITS; ++i) copy_async(address + i * 512, c.codes + i * 512, policy);
            const i64 row = i64(first_block + c.step * ROW_WARPS) * GROUPS;
            const int group = (cta_unit + c.unit) * 64 / GROUP;
            if (lane < UNIT_GROUPS * 8) {
                const i64 g = row + min(group + lane / 8, GROUPS - 1);
                copy_async(address + Smem::CODE_BYTES, p.scales + g * 128 + lane % 8 * 16, policy);
                if constexpr (KIND == 3)
                    copy_async(address + Smem::CODE_BYTES + Smem::SCALE_BYTES, p.zeros + g * 128 + lane % 8 * 16, policy);
            }
            if (KIND == 2 && lane < UNIT_GROUPS * 4) {
                const i64 g = row + min(group + lane / 4, GROUPS - 1);
                copy_async(address + Smem::CODE_BYTES + Smem::SCALE_BYTES, p.zeros + g * 64 + lane % 4 * 16, policy);
            }
            advance(c);
        }
        copy_commit();
    }
};

// Scales or zeros of a lane's eight rows (16r + 8h + g at 2r + h) of one group.
struct Rows {
    u32 pairs[4];
    __device__ __forceinline__ float at(int tile, int h) const {
        return h ? high_half<BF16>(pairs[tile]) : low_half<BF16>(pairs[tile]);
    }
};

__device__ __forceinline__ Rows load_rows(const char* from, int g) {
    const u32x4 v = *reinterpret_cast<const u32x4*>(from + g * 16);
    return {{v.x, v.y, v.z, v.w}};
}

__device__ __forceinline__ float zero_at(const char* from, int g, int tile, int h) {
    if constexpr (KIND == 2) return float(reinterpret_cast<const u8*>(from)[g * 8 + tile * 2 + h]);
    const u16 bits = reinterpret_cast<const u16*>(from)[g * 8 + tile * 2 + h];
    return low_half<BF16>(bits);
}

// Activations of the CTA's slice, once: x[unit][half][token][t] holds columns 32*half + 4t + (0..3) and 16 beyond
// them, the B operands of two steps. Columns past K are zero, tokens past m repeat the last one.
__device__ __forceinline__ void stage_activations(const Params& p, char* to, int first_unit, int units) {
    for (int i = threadIdx.x; i < units * M * 8; i += THREADS) {
        const int t = i % 4, half = i / 4 % 2, unit = i / 8 % units, token = i / 8 / units;
        const u16* row = p.x + i64(min(token, p.m - 1)) * K;
        const int column = (first_unit + unit) * 64 + half * 32 + t * 4;
        u32x2 piece[2] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int from = column + j * 16;
            if constexpr (K % 4 == 0) {
                if (K % 64 == 0 || from < K) piece[j] = load_8(row + from);
            } else {
                u32 e[4];
#pragma unroll
                for (int q = 0; q < 4; ++q) e[q] = from + q < K ? load_2(row + from + q) : 0;
                piece[j] = {e[0] | e[1] << 16, e[2] | e[3] << 16};
            }
        }
        *reinterpret_cast<u32x4*>(to + ((unit * 2 + half) * M + token) * 64 + t * 16) =
            u32x4{piece[0].x, piece[0].y, piece[1].x, piece[1].y};
    }
}

// B operands of a unit for tokens 8*nt..8*nt+7: b[2s], b[2s+1] of step s.
__device__ __forceinline__ void load_activations(u32 (&b)[8], const char* x, int unit, int nt, int lane) {
    const int token = M < 8 ? min(lane / 4, M - 1) : nt * 8 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32x4 v = *reinterpret_cast<const u32x4*>(x + ((unit * 2 + half) * M + token) * 64 + lane % 4 * 16);
        b[4 * half] = v.x, b[4 * half + 1] = v.y, b[4 * half + 2] = v.z, b[4 * half + 3] = v.w;
    }
}

// Per unit and scale change, sums[(unit * SUBS + sub) * SUM_KINDS + kind][8 * NT tokens]: sum(x), doubled for one bit
// whose values step by 2, and minus the contribution of all-zero codes, from which one-bit accumulators start.
__device__ __forceinline__ void sum_activations(float* sums, const char* x, int units, int warp, int lane, const Lookup& lookup) {
    constexpr u32 ONE = BF16 ? (BITS == 1 ? 0x40004000u : 0x3f803f80u) : (BITS == 1 ? 0x40004000u : 0x3c003c00u);
    for (int unit = warp; unit < units; unit += WARPS) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            u32 b[8], offsets[4][4] = {};
            load_activations(b, x, unit, nt, lane);
            if constexpr (BITS == 1) {
                const u32 zero[4 * BITS] = {};
                dequantise<BITS, BF16>(offsets, zero, 0, lookup);
            }
#pragma unroll
            for (int sub = 0; sub < SUBS; ++sub) {
                float sum[4] = {}, offset[4] = {};
#pragma unroll
                for (int s = sub * STEPS; s < (sub + 1) * STEPS; ++s) {
                    const u32 ones[4] = {ONE, ONE, ONE, ONE};
                    mma<BF16>(sum, ones, b[2 * s], b[2 * s + 1]);
                    if constexpr (BITS == 1) mma<BF16>(offset, offsets[s], b[2 * s], b[2 * s + 1]);
                }
                if (lane < 4) {
                    float* to = sums + (unit * SUBS + sub) * SUM_KINDS * NT * 8 + nt * 8 + lane * 2;
                    *reinterpret_cast<f32x2*>(to) = {sum[0], sum[1]};
                    if constexpr (BITS == 1) {
                        *reinterpret_cast<f32x2*>(to + NT * 8) = {-offset[0], -offset[1]};
                        *reinterpret_cast<f32x2*>(to + NT * 16) = {-offset[2], -offset[3]};
                    }
                }
            }
        }
    }
}

// Sums of one block over a warp's slice: row 16*tile + 8*h + g, token 8*nt + 2*t + column.
struct Accumulator {
    float sum[4][NT][2][COLUMNS];
    float scaled_x[BITS == 1 && !ZEROS ? 4 : 1][NT][2][COLUMNS];  // one bit: sum of scale * 2 * sum(x)
};

// Row tiles whose A operands are live at once: all four where many token tiles share them, else one.
constexpr int TILES = NT > 2 ? 4 : 1;

__device__ __forceinline__ void multiply_unit(Accumulator& acc, const char* stage, const char* smem, int unit, int first_group_offset,
                                              int lane, const Lookup& lookup) {
    const int g = lane / 4, t = lane % 4;
    u32 words[4 * BITS];
#pragma unroll
    for (int i = 0; i < BITS; ++i) {
        const u32x4 v = *reinterpret_cast<const u32x4*>(stage + i * 512 + lane * 16);
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
    int group[SUBS];
    Rows scales[SUBS];
#pragma unroll
    for (int sub = 0; sub < SUBS; ++sub) {
        group[sub] = SUBS == 1 ? 0 : (first_group_offset + sub * (64 / SUBS)) / GROUP;
        scales[sub] = load_rows(stage + Smem::CODE_BYTES + group[sub] * 128, g);
    }
    const char* x = smem + Smem::X;
    u32 b[NT > 2 ? 1 : NT][8];
    if constexpr (NT <= 2) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) load_activations(b[nt], x, unit, nt, lane);
    }
#pragma unroll
    for (int first = 0; first < 4; first += TILES) {
        u32 a[TILES][4][4];
#pragma unroll
        for (int i = 0; i < TILES; ++i) dequantise<BITS, BF16>(a[i], words, first + i, lookup);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            u32 (&bt)[8] = b[NT > 2 ? 0 : nt];
            if constexpr (NT > 2) load_activations(bt, x, unit, nt, lane);
#pragma unroll
            for (int sub = 0; sub < SUBS; ++sub) {
                f32x2 sum_x = {}, start[2] = {};
                if constexpr (SUMS) {
                    const float* from = reinterpret_cast<const float*>(smem + Smem::SUM) +
                                        (unit * SUBS + sub) * SUM_KINDS * NT * 8 + nt * 8 + t * 2;
                    sum_x = *reinterpret_cast<const f32x2*>(from);
                    if constexpr (BITS == 1) {
                        start[0] = *reinterpret_cast<const f32x2*>(from + NT * 8);
                        start[1] = *reinterpret_cast<const f32x2*>(from + NT * 16);
                    }
                }
#pragma unroll
                for (int i = 0; i < TILES; ++i) {
                    const int tile = first + i;
                    float d[4] = {start[0].x, start[0].y, start[1].x, start[1].y};
#pragma unroll
                    for (int s = sub * STEPS; s < (sub + 1) * STEPS; ++s) mma<BF16>(d, a[i][s], bt[2 * s], bt[2 * s + 1]);
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float scale = scales[sub].at(tile, h);
                        float zero = 0;
                        if constexpr (ZEROS)
                            zero = zero_at(stage + Smem::CODE_BYTES + Smem::SCALE_BYTES + group[sub] * (KIND == 2 ? 64 : 128), g,
                                           tile, h);
#pragma unroll
                        for (int c = 0; c < COLUMNS; ++c) {
                            float v = d[2 * h + c];
                            const float xs = c ? sum_x.y : sum_x.x;
                            if constexpr (ZEROS) v = fmaf(-zero, xs, v);
                            acc.sum[tile][nt][h][c] = fmaf(scale, v, acc.sum[tile][nt][h][c]);
                            if constexpr (BITS == 1 && !ZEROS)
                                acc.scaled_x[tile][nt][h][c] = fmaf(scale, xs, acc.scaled_x[tile][nt][h][c]);
                        }
                    }
                }
            }
        }
    }
}

// A warp's sums of a block to its slot [64 rows][M tokens]; `low` and `high` are the two table values of one bit.
__device__ __forceinline__ void store_partial(float* slot, const Accumulator& acc, int lane, float low, float high) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int tile = 0; tile < 4; ++tile)
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float v[COLUMNS];
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    v[c] = acc.sum[tile][nt][h][c];
                    if constexpr (BITS == 1 && !ZEROS)
                        v[c] = 0.5f * fmaf(high, v[c], low * (acc.scaled_x[tile][nt][h][c] - v[c]));
                    else if constexpr (BITS == 1)
                        v[c] *= 0.5f;
                }
                float* to = slot + (tile * 16 + h * 8 + g) * M;
                const int token = nt * 8 + t * 2;
                if constexpr (M % 2 == 0) {
                    if (M % 8 == 0 || token < M) *reinterpret_cast<f32x2*>(to + token) = {v[0], v[COLUMNS - 1]};
                } else {
#pragma unroll
                    for (int c = 0; c < COLUMNS; ++c)
                        if (token + c < M) to[token + c] = v[c];
                }
            }
}

__device__ __forceinline__ void write_output(const Params& p, const Range& range, int block, int row, int token, float value) {
    const i64 n = range.first_row + i64(block - range.first_block) * 64 + row;
    if (block >= range.end_block || n >= range.end_row || token >= p.m) return;
    if (p.bias) value += low_half<BF16>(p.bias[n]);
    p.out[i64(token) * N + n] = round_half<BF16>(value);
}

extern "C" __global__ void __launch_bounds__(THREADS, FDK_MIN_CTAS) fdk_decode(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char smem[];
    if (Smem::TABLE_BYTES && ((shared_address(smem) + Smem::TABLE) & (Smem::TABLE_BYTES - 1)) != 0) __trap();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row_warp = warp / K_WARPS, k_warp = warp % K_WARPS;
    const int rank = CLUSTER == 1 ? 0 : int(cluster_rank()), cluster = blockIdx.x / CLUSTER;

    int which = 0;
    while (which + 1 < p.ranges && cluster >= p.range[which + 1].first_cluster) ++which;
    const Range& range = p.range[which];
    const int first_block = range.first_block + (cluster - range.first_cluster) * p.blocks_per_cluster;
    const int blocks = min(p.blocks_per_cluster, range.end_block - first_block);
    const int steps = (blocks + ROW_WARPS - 1) / ROW_WARPS;  // the same for all warps of a cluster

    const int cta_unit = UNITS * rank / CLUSTER, units = UNITS * (rank + 1) / CLUSTER - cta_unit;
    const int first_unit = units * k_warp / K_WARPS, end_unit = units * (k_warp + 1) / K_WARPS;
    const Warp w = {p,
                    smem + Smem::ring(warp),
                    lane,
                    first_block + row_warp,
                    first_unit == end_unit ? 0 : (blocks - row_warp + ROW_WARPS - 1) / ROW_WARPS,
                    first_unit,
                    end_unit,
                    cta_unit,
                    evict_first_policy()};

    // Everything up to the dependency wait reads weights only.
    Cursor ahead = w.start();
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) w.prefetch(ahead, stage);
    let_next_kernel_start();
    if constexpr (CLUSTER > 1) cluster_arrive();
    const u16* table = p.table + (which << BITS);
    float low = -1.f, high = 0.f;
    if constexpr (BITS == 1) {
        if constexpr (TABLE) low = low_half<BF16>(table[0]), high = low_half<BF16>(table[1]);
    } else {
        fill_table<BITS, WARPS>(smem + Smem::TABLE, warp, lane, [&](int code) -> u16 {
            if constexpr (TABLE) return table[code];
            return round_half<BF16>(float(KIND == 1 ? code - (1 << (BITS - 1)) : code));
        });
    }

    wait_for_previous_kernel();
    stage_activations(p, smem + Smem::X, cta_unit, units);
    __syncthreads();
    const u32 lane_offset = BITS == 2 ? lane % 16 * 8 : lane * 4;
    const Lookup lookup = {(shared_address(smem) + Smem::TABLE + lane_offset) ^ p.zero, p.one_bit[0], p.one_bit[1], p.one_bit[2]};
    float* sums = reinterpret_cast<float*>(smem + Smem::SUM);
    if constexpr (SUMS) {
        sum_activations(sums, smem + Smem::X, units, warp, lane, lookup);
        __syncthreads();
    }

    float* partial = reinterpret_cast<float*>(smem + Smem::PARTIAL);
    float* receive = reinterpret_cast<float*>(smem + Smem::RECEIVE);
    constexpr int SLOT = 64 * M, SHARE = SLOT / CLUSTER, SHARE_ROWS = 64 / CLUSTER;
    const auto slots = [&](int step) { return (BATCH == 1 ? step % 2 : step) * ROW_WARPS; };

    // Add the K_WARPS partial sums of a step; without a cluster that is the result, else each CTA gets its rows.
    const auto reduce = [&](int step) {
        if constexpr (CLUSTER == 1) {
            for (int i = threadIdx.x; i < ROW_WARPS * SLOT; i += THREADS) {
                const int row = i % 64, token = i / 64 % M, rw = i / SLOT;
                const float* from = partial + (slots(step) + rw) * K_WARPS * SLOT + row * M + token;
                float sum = from[0];
#pragma unroll
                for (int kw = 1; kw < K_WARPS; ++kw) sum += from[kw * SLOT];
                write_output(p, range, first_block + step * ROW_WARPS + rw, row, token, sum);
            }
        } else {
            for (int i = threadIdx.x; i < ROW_WARPS * SLOT / 4; i += THREADS) {
                const int rw = i / (SLOT / 4), at = i % (SLOT / 4) * 4;
                const float* from = partial + (slots(step) + rw) * K_WARPS * SLOT + at;
                f32x4 sum = *reinterpret_cast<const f32x4*>(from);
#pragma unroll
                for (int kw = 1; kw < K_WARPS; ++kw) {
                    const f32x4 v = *reinterpret_cast<const f32x4*>(from + kw * SLOT);
                    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
                }
                const float* to = receive + ((slots(step) + rw) * CLUSTER + rank) * SHARE + at % SHARE;
                store_remote(shared_address(to), at / SHARE, sum);
            }
        }
    };
    const auto finish = [&](int step) {
        for (int i = threadIdx.x; i < ROW_WARPS * SHARE; i += THREADS) {
            const int row = i % SHARE_ROWS, token = i / SHARE_ROWS % M, rw = i / SHARE;
            const float* from = receive + (slots(step) + rw) * SLOT + row * M + token;
            float sum = from[0];
#pragma unroll
            for (int source = 1; source < CLUSTER; ++source) sum += from[source * SHARE];
            write_output(p, range, first_block + step * ROW_WARPS + rw, rank * SHARE_ROWS + row, token, sum);
        }
    };

    int stage = 0;
    for (int step = 0; step < steps; ++step) {
        Accumulator acc = {};
        if (step < w.steps) {
            for (int unit = first_unit; unit < end_unit; ++unit) {
                copy_wait<STAGES - 1>();
                __syncwarp();
                char* at = w.ring + stage * Smem::STAGE;
                multiply_unit(acc, at, smem, unit, SUBS == 1 ? 0 : (cta_unit + unit) * 64 % GROUP, lane, lookup);
                __syncwarp();
                w.prefetch(ahead, stage);
                stage = stage + 1 == STAGES ? 0 : stage + 1;
            }
        }
        store_partial(partial + ((slots(step) + row_warp) * K_WARPS + k_warp) * SLOT, acc, lane, low, high);
        if constexpr (BATCH == 1) {
            __syncthreads();
            if constexpr (CLUSTER > 1) {
                cluster_wait();
                if (step > 0) finish(step - 1);
            }
            reduce(step);
            if constexpr (CLUSTER > 1) cluster_arrive();
        }
    }
    if constexpr (BATCH > 1) {
        __syncthreads();
        if constexpr (CLUSTER > 1) cluster_wait();
        for (int step = 0; step < steps; ++step) reduce(step);
        if constexpr (CLUSTER > 1) cluster_arrive();
    }
    if constexpr (CLUSTER > 1) {
        cluster_wait();
        if constexpr (BATCH == 1) {
            if (steps > 0) finish(steps - 1);
        } else {
            for (int step = 0; step < steps; ++step) finish(step);
        }
    }
}

}  // namespace fdk
