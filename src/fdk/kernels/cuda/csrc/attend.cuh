// A new token of every sequence: rotary embedding, its key and value into the cache, attention to all up to it.
//
// A cluster of CTAs serves one key/value head of one sequence, with its HEADS query heads. A warp takes 32 / LANES
// positions at a time, LANES lanes each, of which every one holds 16 channels: 8 of the first half of the head and the
// 8 that the rotary embedding pairs them with. Keys and values of earlier tokens come by bulk copies through a ring of the
// warp's own; the first are on their way before the wait for the previous kernel, which leaves the queries behind it. Sums of warps go to the CTAs that own their share of
// the outputs, counted by a barrier, and are added in the order of warps and CTAs, so that results do not depend on timing.
//
// With SPLITS a head has so many clusters, which leave their sums in global memory; the last of them to arrive adds up what
// lies there, in the order of clusters. Clusters without a position of their own leave at once.
//
// The host passes (see fdk/kernels/cuda/attend.py): FDK_BF16 FDK_HEAD_DIM FDK_HEADS FDK_HEAD_WARPS FDK_WARPS FDK_CLUSTER
// FDK_STAGES FDK_SPLITS, and FDK_NORM where queries and keys are normed over their channels before they are turned.
#pragma once
#include "ptx.cuh"

namespace fdk {

constexpr bool BF16 = FDK_BF16, NORM = FDK_NORM;
constexpr int D = FDK_HEAD_DIM, HEADS = FDK_HEADS, CLUSTER = FDK_CLUSTER, SPLITS = FDK_SPLITS;
constexpr int HEAD_WARPS = FDK_HEAD_WARPS, WARPS = FDK_WARPS;  // warps that share the heads, and the positions
constexpr int OWN = (HEADS + HEAD_WARPS - 1) / HEAD_WARPS;     // heads of a warp
constexpr int LANES = D / 16, ROWS = 32 / LANES, THREADS = HEAD_WARPS * WARPS * 32;
constexpr int PASSES = 2, TILE = PASSES * ROWS;  // of ROWS positions; positions of a warp's turn
constexpr int SPAN = CLUSTER * WARPS * TILE;     // positions of a cluster's turn
constexpr int STAGES = FDK_STAGES, HALF = TILE * D * 2, STAGE = 2 * HALF;  // of a ring: keys, then values
constexpr int SOURCES = CLUSTER * WARPS;       // warps whose sums make an output
constexpr int SHARE = HEADS * D / 4 / CLUSTER;  // quadruples of channels that a CTA owns
static_assert(D % 32 == 0 && D >= 32 && D <= 256 && (D & (D - 1)) == 0 && HEADS * D / 4 % CLUSTER == 0, "see attend.py");

struct Params {
    const u16* qkv;  // [b, (groups * HEADS + 2 * groups) * D]: queries, keys, values
    u16* keys;       // [b, groups, length, D]
    u16* values;     // [b, groups, length, D]
    const u16* cos;  // [length, D]
    const u16* sin;  // [length, D]
    const int* position;  // tokens in the cache before this one
    u16* out;        // [b, groups * HEADS * D]
    const u16* query_norm;  // [D]
    const u16* key_norm;    // [D]
    i64 length;
    int groups;
    float eps;
    float scale;  // 1 / sqrt(D) times log2(e)
    f32x4* partial;  // [b, groups, SPLITS, HEADS * D / 4, 2]: sums of a split; their largest score and sum of weights
    u32* arrived;    // [b, groups, CLUSTER]: splits that have left theirs; 0 before and after a launch
};

struct Shared {
    f32x4 sums[SOURCES][SHARE];
    f32x4 tops[SOURCES][HEADS];  // largest score and sum of weights of a warp's positions
    u64 barrier, full[THREADS / 32][STAGES];
    u32 arrived;
};
static_assert(THREADS / 32 * STAGES * STAGE + sizeof(Shared) <= FDK_SHARED_BYTES, "host and device disagree on the shared memory");

// Sixteen channels of a lane as they lie in memory: 8 at 8 * lane, 8 at D / 2 + 8 * lane.
struct Channels {
    u32x4 low, high;
    __device__ __forceinline__ void floats(float (&v)[16]) const {
        const u32 words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) v[2 * i] = low_half<BF16>(words[i]), v[2 * i + 1] = high_half<BF16>(words[i]);
    }
};

__device__ __forceinline__ u32x4 load_16(const u16* from) {
    u32x4 v;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}
__device__ __forceinline__ Channels load_channels(const u16* head, int lane) {
    return {load_16(head + lane * 8), load_16(head + D / 2 + lane * 8)};
}
__device__ __forceinline__ void store_channels(u16* head, int lane, const Channels& c) {
    *reinterpret_cast<u32x4*>(head + lane * 8) = c.low;
    *reinterpret_cast<u32x4*>(head + D / 2 + lane * 8) = c.high;
}

__device__ __forceinline__ float dot(const float (&q)[16], const float (&k)[16]) {
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) sum[i % 2] = fmaf(q[i], k[i], sum[i % 2]);
    float s = sum[0] + sum[1];
#pragma unroll
    for (int other = LANES / 2; other; other /= 2) s += __shfl_xor_sync(0xffffffffu, s, other);
    return s;
}

// Normed if so asked, turned by the rotary angles, rounded to 16 bits as the cache holds them.
__device__ __forceinline__ Channels rotated(const Channels& c, const Channels& norm, float eps, const float (&cos)[8], const float (&sin)[8]) {
    float v[16];
    c.floats(v);
    if constexpr (NORM) {
        float weight[16];
        norm.floats(weight);
        const float size = rsqrtf(dot(v, v) * (1.f / D) + eps);
#pragma unroll
        for (int i = 0; i < 16; ++i) v[i] *= size * weight[i];
    }
    u32 words[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float a[2] = {v[2 * i], v[2 * i + 1]}, b[2] = {v[8 + 2 * i], v[9 + 2 * i]};
        const float c0 = cos[2 * i], c1 = cos[2 * i + 1], s0 = sin[2 * i], s1 = sin[2 * i + 1];
        words[i] = round_pair<BF16>(a[0] * c0 - b[0] * s0, a[1] * c1 - b[1] * s1);
        words[4 + i] = round_pair<BF16>(b[0] * c0 + a[0] * s0, b[1] * c1 + a[1] * s1);
    }
    return {{words[0], words[1], words[2], words[3]}, {words[4], words[5], words[6], words[7]}};
}

__device__ __forceinline__ void eight(float (&v)[8], const u32x4& c) {
    const u32 words[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) v[2 * i] = low_half<BF16>(words[i]), v[2 * i + 1] = high_half<BF16>(words[i]);
}

// To the same place in the CTA `rank` of the cluster; a launch without clusters has no such instruction.
__device__ __forceinline__ void send(f32x4& to, u32 barrier, int rank, f32x4 v) {
    if constexpr (CLUSTER > 1)
        store_counted(shared_address(&to), barrier, rank, v);
    else
        to = v;
}

// One more arrival: how many there were before. What this CTA stored is seen by whoever reads a later count, and the
// other way round.
__device__ __forceinline__ u32 count_arrival(u32* arrived) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
    return before;
}

__device__ __forceinline__ f32x4 load_latest_16(const f32x4* from) {
    f32x4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ void write_output(const Params& p, int head, int quadruple, f32x4 v, float sum) {
    const float scale = 1.f / sum;
    *reinterpret_cast<u32x2*>(p.out + i64(head) * HEADS * D + quadruple * 4) = {round_pair<BF16>(v.x * scale, v.y * scale),
                                                                                  round_pair<BF16>(v.z * scale, v.w * scale)};
}

extern "C" __global__ void __launch_bounds__(THREADS) fdk_attend(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char smem[];
    Shared& shared = *reinterpret_cast<Shared*>(smem + THREADS / 32 * STAGES * STAGE);
    const int warp = threadIdx.x / 32 % WARPS, first_head = threadIdx.x / 32 / WARPS * OWN;
    const int lane = threadIdx.x % LANES, row = threadIdx.x % 32 / LANES;
    const int rank = CLUSTER == 1 ? 0 : int(cluster_rank()), head = blockIdx.x / (CLUSTER * SPLITS);
    const i64 sequence = head / p.groups, group = head % p.groups;
    const u32 barrier = shared_address(&shared.barrier), full = shared_address(&shared.full[threadIdx.x / 32]);
    char* ring = smem + threadIdx.x / 32 * (STAGES * STAGE);
    if (threadIdx.x % 32 == 0) {
        for (int stage = 0; stage < STAGES; ++stage) barrier_init(full + stage * 8);
        barrier_init_fence();
    }
    __syncwarp();
    if constexpr (CLUSTER > 1) {
        if (threadIdx.x == 0) {
            barrier_init(barrier);
            barrier_init_fence();
        }
        __syncwarp();
        if (threadIdx.x == 0) barrier_expect(barrier, SOURCES * (SHARE + HEADS) * 16);
        __syncthreads();
        cluster_arrive_relaxed();
    }
    let_next_kernel_start();

    // Position and cache come from earlier steps, before a kernel that waited for all others.
    const int position = *p.position, split = SPLITS == 1 ? 0 : int(blockIdx.x) / CLUSTER % SPLITS;
    const int active = SPLITS == 1 ? 1 : max(1, min(SPLITS, (position + SPAN - 1) / SPAN));
    if (SPLITS > 1 && split >= active) return;
    u16* keys = p.keys + i64(head) * p.length * D;
    u16* values = p.values + i64(head) * p.length * D;
    const int first = split * SPAN + (rank * WARPS + warp) * TILE, stride = SPLITS * SPAN;
    const int turns = first < position ? (position - first + stride - 1) / stride : 0;
    const auto fetch = [&](int turn, int stage) {
        if (turn >= turns || threadIdx.x % 32 != 0) return;
        const i64 at = first + i64(turn) * stride;
        const u32 bytes = min(i64(TILE), p.length - at) * (D * 2), to = shared_address(ring) + stage * STAGE;
        barrier_expect(full + stage * 8, 2 * bytes);
        copy_bulk_shared(to, keys + at * D, bytes, full + stage * 8);
        copy_bulk_shared(to + HALF, values + at * D, bytes, full + stage * 8);
    };
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) fetch(stage, stage);
    float cos[8], sin[8];
    eight(cos, load_16(p.cos + i64(position) * D + lane * 8));
    eight(sin, load_16(p.sin + i64(position) * D + lane * 8));
    Channels query_norm = {}, key_norm = {};
    if constexpr (NORM) query_norm = load_channels(p.query_norm, lane), key_norm = load_channels(p.key_norm, lane);
    wait_for_previous_kernel();

    const u16* token = p.qkv + sequence * ((HEADS + 2) * i64(p.groups) * D);
    Channels query[OWN];
#pragma unroll
    for (int h = 0; h < OWN; ++h)
        query[h] = load_channels(token + (group * HEADS + min(first_head + h, HEADS - 1)) * D, lane);
    // The new token comes first, at the warp that has least to do; all others start from a weight of zero.
    const bool newest = split == active - 1 && rank == CLUSTER - 1 && warp == WARPS - 1;
    float q[OWN][16], top[OWN], total[OWN], acc[OWN][16] = {};
    Channels key = {}, value = {};
    if (newest) {
        key = load_channels(token + (i64(p.groups) * HEADS + group) * D, lane);
        value = load_channels(token + (i64(p.groups) * (HEADS + 1) + group) * D, lane);
    }
#pragma unroll
    for (int h = 0; h < OWN; ++h) rotated(query[h], query_norm, p.eps, cos, sin).floats(q[h]), top[h] = -1e30f, total[h] = 0;
    if (newest) {
        key = rotated(key, key_norm, p.eps, cos, sin);
        if (row == 0 && first_head == 0) {
            store_channels(keys + i64(position) * D, lane, key);
            store_channels(values + i64(position) * D, lane, value);
        }
        float k[16], v[16];
        key.floats(k), value.floats(v);
#pragma unroll
        for (int h = 0; h < OWN; ++h) {
            const float score = dot(q[h], k) * p.scale;
            if (row == 0) {
                top[h] = score, total[h] = 1;
#pragma unroll
                for (int i = 0; i < 16; ++i) acc[h][i] = v[i];
            }
        }
    }
    int stage = 0;
    u32 parity = 0;
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
        barrier_wait(full + stage * 8, parity);
        // Positions that are not there repeat the last one, with a weight of zero.
        const int there = position - first - turn * stride;
        const auto channels = [&](int half, int pass) -> Channels {
            const char* at = ring + stage * STAGE + half * HALF + (min(pass * ROWS + row, there - 1) * D + lane * 8) * 2;
            return {*reinterpret_cast<const u32x4*>(at), *reinterpret_cast<const u32x4*>(at + D)};
        };
        float scores[PASSES][OWN], highest[OWN];
#pragma unroll
        for (int h = 0; h < OWN; ++h) highest[h] = top[h];
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            float k[16];
            channels(0, pass).floats(k);
#pragma unroll
            for (int h = 0; h < OWN; ++h) {
                scores[pass][h] = dot(q[h], k) * p.scale;
                if (pass * ROWS + row >= there) scores[pass][h] = __uint_as_float(0xff800000u);
                highest[h] = fmaxf(highest[h], scores[pass][h]);
            }
        }
#pragma unroll
        for (int h = 0; h < OWN; ++h) {
            const float shrink = exp2f(top[h] - highest[h]);
            top[h] = highest[h], total[h] *= shrink;
#pragma unroll
            for (int i = 0; i < 16; ++i) acc[h][i] *= shrink;
        }
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            float v[16];
            channels(1, pass).floats(v);
#pragma unroll
            for (int h = 0; h < OWN; ++h) {
                const float share = exp2f(scores[pass][h] - top[h]);
                total[h] += share;
#pragma unroll
                for (int i = 0; i < 16; ++i) acc[h][i] = fmaf(share, v[i], acc[h][i]);
            }
        }
        if (turn + STAGES < turns) {
            order_before_bulk_copies();
            __syncwarp();
            fetch(turn + STAGES, stage);
        }
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }

    // Over the rows of the warp: each lane keeps four channels of each head, and their rows' lanes the others.
    if constexpr (CLUSTER > 1) cluster_wait();
    const int source = rank * WARPS + warp;
#pragma unroll
    for (int h = 0; h < OWN; ++h) {
        float highest = top[h];
#pragma unroll
        for (int other = LANES; other < 32; other *= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, other));
        const float shrink = exp2f(top[h] - highest);
        total[h] *= shrink;
#pragma unroll
        for (int i = 0; i < 16; ++i) acc[h][i] *= shrink;
        int channel = lane * 8, count = 16;
        bool first = true;
#pragma unroll
        for (int other = LANES; other < 32; other *= 2) {
            const bool upper = row & (other / LANES);
            total[h] += __shfl_xor_sync(0xffffffffu, total[h], other);
            if (count > 4) {
                count /= 2;
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    if (i < count) {
                        const float mine = upper ? acc[h][i + count] : acc[h][i], theirs = upper ? acc[h][i] : acc[h][i + count];
                        acc[h][i] = mine + __shfl_xor_sync(0xffffffffu, theirs, other);
                    }
                if (upper) channel += count == 8 ? D / 2 : 4;
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[h][i] += __shfl_xor_sync(0xffffffffu, acc[h][i], other);
                first = first && !upper;
            }
        }
        if (first_head + h >= HEADS) continue;
#pragma unroll
        for (int i = 0; i < 8; i += 4)
            if (i < count && first) {
                const int at = ((first_head + h) * D + channel + i) / 4;
                send(shared.sums[source][at % SHARE], barrier, at / SHARE, {acc[h][i], acc[h][i + 1], acc[h][i + 2], acc[h][i + 3]});
            }
        const int peer = threadIdx.x % 32;
        if (peer < CLUSTER) send(shared.tops[source][first_head + h], barrier, peer, {highest, total[h], 0.f, 0.f});
    }
    if constexpr (CLUSTER > 1)
        barrier_wait(barrier, 0);
    else
        __syncthreads();

    // Eight lanes share a quadruple of channels, each takes some of the warps that have sums for it.
    constexpr int TOGETHER = SOURCES < 8 ? SOURCES : 8;
    for (int base = 0; base < SHARE * TOGETHER; base += THREADS) {
        const int i = base + threadIdx.x, at = min(i / TOGETHER, SHARE - 1), h = (rank * SHARE + at) * 4 / D;
        float highest = -1e30f;
        for (int s = i % TOGETHER; s < SOURCES; s += TOGETHER) highest = fmaxf(highest, shared.tops[s][h].x);
#pragma unroll
        for (int other = TOGETHER / 2; other; other /= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, other));
        float sum = 0;
        f32x4 v = {};
        for (int s = i % TOGETHER; s < SOURCES; s += TOGETHER) {
            const f32x4 part = shared.tops[s][h], from = shared.sums[s][at];
            const float weight = exp2f(part.x - highest);
            sum = fmaf(weight, part.y, sum);
            v = {fmaf(weight, from.x, v.x), fmaf(weight, from.y, v.y), fmaf(weight, from.z, v.z), fmaf(weight, from.w, v.w)};
        }
#pragma unroll
        for (int other = TOGETHER / 2; other; other /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, other);
            v.x += __shfl_xor_sync(0xffffffffu, v.x, other), v.y += __shfl_xor_sync(0xffffffffu, v.y, other);
            v.z += __shfl_xor_sync(0xffffffffu, v.z, other), v.w += __shfl_xor_sync(0xffffffffu, v.w, other);
        }
        if (i % TOGETHER == 0 && i < SHARE * TOGETHER) {
            if (SPLITS == 1 || active == 1) {
                write_output(p, head, rank * SHARE + at, v, sum);
            } else {
                f32x4* const to = p.partial + ((i64(head) * SPLITS + split) * (HEADS * D / 4) + rank * SHARE + at) * 2;
                to[0] = v, to[1] = {highest, sum, 0.f, 0.f};
            }
        }
    }
    if (SPLITS == 1 || active == 1) return;

    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared.arrived = count_arrival(p.arrived + i64(head) * CLUSTER + rank);
    __syncthreads();
    if (int(shared.arrived) != active - 1) return;
    __threadfence();
    for (int at = threadIdx.x; at < SHARE; at += THREADS) {
        const f32x4* const from = p.partial + (i64(head) * SPLITS * (HEADS * D / 4) + rank * SHARE + at) * 2;
        // The sums of so many splits are fetched at once.
        constexpr int BATCH = SPLITS < 8 ? SPLITS : 8;
        float highest = -1e30f, sum = 0;
        f32x4 v = {};
        for (int base = 0; base < active; base += BATCH) {
            f32x4 parts[BATCH], sums[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const f32x4* const part = from + i64(min(base + i, active - 1)) * (HEADS * D / 2);
                sums[i] = load_latest_16(part), parts[i] = load_latest_16(part + 1);
            }
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                if (base + i >= active) continue;
                const float higher = fmaxf(highest, parts[i].x), shrink = exp2f(highest - higher), weight = exp2f(parts[i].x - higher);
                highest = higher, sum = fmaf(weight, parts[i].y, sum * shrink);
                v = {fmaf(weight, sums[i].x, v.x * shrink), fmaf(weight, sums[i].y, v.y * shrink),
                     fmaf(weight, sums[i].z, v.z * shrink), fmaf(weight, sums[i].w, v.w * shrink)};
            }
        }
        write_output(p, head, rank * SHARE + at, v, sum);
    }
    if (threadIdx.x == 0) p.arrived[i64(head) * CLUSTER + rank] = 0;
}

}  // namespace fdk
