// From the codes of 16:32 sparse integers to those of dense ones, both in the layout of fdk/packing/fragments.py: 4 bits a
// weight, with 8, which is zero, where the mask drops one. What follows is a dense product.
//
// A warp takes a unit at a time. Lane 16q + 2g + b has block b of 32 columns of rows g and g + 8 of row tiles 2q and 2q + 1:
// it spreads the codes of a row to its four bytes of mask, two nibbles a byte; brings together what a step's operand has
// of both rows, eight codes of each other lane of a quad; and a line leaves through the warp's own shared memory.
//
// Macros: FDK_SHARED_BYTES.
#pragma once
#include "sparse.cuh"

namespace fdk {

constexpr int WARPS = 8, THREADS = WARPS * 32, CTAS = 3;  // of a multiprocessor
constexpr int FROM_BYTES = 1536, TO_BYTES = 2048;         // of a unit
constexpr int ROW = 80, BUFFER = 32 * ROW;                // 64 bytes of two rows, eight of which start in different banks

struct Smem {
    static constexpr int WINDOW = FDK_HOPPER ? 1024 : 0;
    // A multiple of its size, counted from the start of the shared window; see shape.cuh.
    static constexpr int TABLE = WINDOW ? SELECTOR_BYTES - WINDOW : 0;
    static constexpr int BUFFERS = TABLE >= WARPS * BUFFER ? 0 : TABLE + SELECTOR_BYTES;
    static constexpr int BYTES = TABLE + SELECTOR_BYTES + (BUFFERS ? WARPS * BUFFER : 0);
};
static_assert(Smem::BYTES == FDK_SHARED_BYTES, "host and device disagree on the shared memory layout");

struct Params {
    const char* codes;  // [units, 6, 16, 4] words
    char* out;          // [units, 4, 32, 4] words
    int units;          // of all blocks of rows
    u32 zero;           // 0, which the compiler does not know
};

// What a lane needs to spread the codes of a row of a block.
struct Spreader {
    u32 bottom, top;  // shared addresses of the lane's entries of the table, by which end codes are counted from
    u32 turned;       // 8 in each byte

    __device__ __forceinline__ Spreader(u32 table, int lane, u32 zero)
        : bottom(table + lane % 8 * 16 ^ zero), top(table + lane % 8 * 16 + 8 ^ zero), turned(0x08080808u ^ zero) {}

    __device__ __forceinline__ static u32x2 entry(u32 row, u32 column) {
        u32x2 found;
        asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(found.x), "=r"(found.y) : "r"(combine<MASK_OR>(row, 0x7f80u, column)));
        return found;
    }
    // Eight columns, four bits each, from eight codes of which the selectors take some.
    __device__ __forceinline__ u32 eight(u32 codes, u32x2 selector) const {
        // Less eight, as a number of four bits, a dropped weight is a zero, which a selector makes of a byte below 128.
        const u32 even = combine<MASK_XOR>(codes, 0x0f0f0f0fu, turned), odd = combine<MASK_XOR>(codes >> 4, 0x0f0f0f0fu, turned);
        u32 low, high;
        asm("prmt.b32 %0, %1, %2, %3;" : "=r"(low) : "r"(even), "r"(odd), "r"(selector.x));
        asm("prmt.b32 %0, %1, %2, %3;" : "=r"(high) : "r"(even), "r"(odd), "r"(selector.y));
        return low ^ high << 4 ^ 0x88888888u;
    }
    __device__ __forceinline__ void operator()(u32 (&columns)[4], u32 mask, u32 low, u32 high) const {
        const u32x2 first = entry(mask << 7, bottom), last = entry(mask >> 17, top);
        columns[0] = eight(low, first);
        columns[1] = eight(__funnelshift_rc(low, high, first.x >> 16), entry(mask >> 1, bottom));
        columns[2] = eight(__funnelshift_rc(low, high, last.x >> 16), entry(mask >> 9, top));
        columns[3] = eight(high, last);
    }
};

// Byte t of each of four words, in order, for every t.
__device__ __forceinline__ void transpose_bytes(u32 (&to)[4], u32 a, u32 b, u32 c, u32 d) {
    const u32 ab = __byte_perm(a, b, 0x5140), cd = __byte_perm(c, d, 0x5140);
    const u32 ab_high = __byte_perm(a, b, 0x7362), cd_high = __byte_perm(c, d, 0x7362);
    to[0] = __byte_perm(ab, cd, 0x5410), to[1] = __byte_perm(ab, cd, 0x7632);
    to[2] = __byte_perm(ab_high, cd_high, 0x5410), to[3] = __byte_perm(ab_high, cd_high, 0x7632);
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) fdk_spread(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char smem[];
    if (((shared_address(smem) + Smem::TABLE) & (SELECTOR_BYTES - 1)) != 0) __trap();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u64 policy = evict_first_policy();
    u32x4 next[3];
    const auto fetch = [&](int unit) {
        if (unit >= p.units) return;
        const char* from = p.codes + i64(unit) * FROM_BYTES + lane / 16 * 768 + lane % 16 * 16;
#pragma unroll
        for (int i = 0; i < 3; ++i) next[i] = stream_16(from + i * 256, policy);
    };
    const int stride = gridDim.x * WARPS;
    int unit = blockIdx.x * WARPS + warp;
    fetch(unit);
    let_next_kernel_start();
    fill_selectors<WARPS, NEIGHBOURS>(smem + Smem::TABLE, warp, lane);
    __syncthreads();
    const Spreader spread(shared_address(smem) + Smem::TABLE, lane, p.zero);
    char* const buffer = smem + Smem::BUFFERS + warp * BUFFER;
    char* const put = buffer + (lane / 16 * 16 + lane % 16 / 2) * ROW + lane % 2 * 8;
    const char* const get = buffer + lane / 4 * ROW + lane % 4 * 16;
    wait_for_previous_kernel();
    for (; unit < p.units; unit += stride) {
        const u32 words[12] = {next[0].x, next[0].y, next[0].z, next[0].w, next[1].x, next[1].y,
                               next[1].z, next[1].w, next[2].x, next[2].y, next[2].z, next[2].w};
        fetch(unit + stride);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            u32 row[2][4];
#pragma unroll
            for (int h = 0; h < 2; ++h) spread(row[h], words[6 * tile + 3 * h], words[6 * tile + 3 * h + 1], words[6 * tile + 3 * h + 2]);
            u32 step[2][4];
#pragma unroll
            for (int s = 0; s < 2; ++s) transpose_bytes(step[s], row[0][2 * s], row[0][2 * s + 1], row[1][2 * s], row[1][2 * s + 1]);
#pragma unroll
            for (int t = 0; t < 4; ++t)
                *reinterpret_cast<u32x2*>(put + tile * 8 * ROW + t * 16) = {__funnelshift_l(step[0][t], step[0][t], 7), __funnelshift_l(step[1][t], step[1][t], 7)};
        }
        __syncwarp();
        char* const to = p.out + i64(unit) * TO_BYTES + lane * 16;
#pragma unroll
        for (int i = 0; i < 4; ++i) *reinterpret_cast<u32x4*>(to + i * 512) = *reinterpret_cast<const u32x4*>(get + i * 8 * ROW);
        __syncwarp();
    }
}

}  // namespace fdk
