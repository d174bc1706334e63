// Part of a weight in the layout of fdk/packing/fragments.py as a dense row-major matrix of 16-bit floats, each value the
// float32 product of scale and table entry (or code minus zero), rounded once.
//
// A CTA takes a block of 64 rows and one unit of 64 columns per warp at a time. A row tile goes from fragment order
// through the warp's own shared memory to rows, which leave as whole lines of 128 bytes. Bytes written are the cost, so
// an item is loaded while the one before it is written, as far as registers allow, and nothing else overlaps.
//
// Macros: FDK_BITS FDK_GROUP (0: one scale per row) FDK_BF16 FDK_KIND FDK_SLICE (as in shape.cuh) FDK_SHARED_BYTES.
#pragma once
#include "operand.cuh"

namespace fdk {

constexpr int BITS = FDK_BITS, GROUP = FDK_GROUP, KIND = FDK_KIND;
constexpr bool BF16 = FDK_BF16, ZEROS = kind::has_zeros(KIND), NESTED = kind::is_nested(KIND);
constexpr bool SPARSE = kind::is_sparse(KIND), SPARSE_TABLE = KIND == kind::SPARSE_TABLE;
constexpr int WARPS = 8, THREADS = WARPS * 32;
constexpr int SUBS = GROUP % 64 == 0 ? 1 : GROUP % 32 == 0 ? 2 : 4;  // scale changes inside a unit, at most
constexpr int ROW = 144, BUFFER = 16 * ROW;                           // rows start in different banks

struct Smem {
    static constexpr int WINDOW = FDK_HOPPER ? 1024 : 0;
    static constexpr int TABLE_ALIGNED = NESTED ? 0 : SPARSE ? SELECTOR_BYTES : Table<BITS>::BYTES;
    static constexpr int TABLE_BYTES = TABLE_ALIGNED + (SPARSE_TABLE ? KEPT_VALUES_BYTES : 0);
    // A multiple of its size, counted from the start of the shared window; see shape.cuh.
    static constexpr int TABLE = WINDOW && TABLE_ALIGNED > WINDOW ? TABLE_ALIGNED - WINDOW : 0;
    static constexpr int BUFFERS = TABLE >= WARPS * BUFFER ? 0 : TABLE + TABLE_BYTES;
    static constexpr int END = TABLE + TABLE_BYTES;
    static constexpr int BYTES = END > BUFFERS + WARPS * BUFFER ? END : BUFFERS + WARPS * BUFFER;
};
static_assert(Smem::BYTES == FDK_SHARED_BYTES, "host and device disagree on the shared memory layout");

constexpr int MAX_RANGES = 16;
struct Range {
    int first_cluster, first_block, end_block, pad;
    i64 first_row, end_row;
};
struct Params {
    const char* codes;   // [B, units, BITS (nested: 8), 32, 4] words
    const char* scales;  // [B * groups + spare, 64]
    const char* zeros;   // [B * groups + spare, 64]
    const u16* table;    // [tables, 2^BITS]
    u16* out;            // [rows, stride], where `origin` is row 0 and unit `first_unit` starts column 0; operands: all
    i64 stride, origin;
    int units, groups;   // of the weight
    int first_block, end_block, first_unit, end_unit;
    int ranges;
    u32 zero;            // 0, which the compiler does not know
    Range range[MAX_RANGES];
};

struct Rows {
    u32x4 pairs;
    __device__ __forceinline__ float at(int tile, int h) const {
        const u32 pair = tile == 0 ? pairs.x : tile == 1 ? pairs.y : tile == 2 ? pairs.z : pairs.w;
        return h ? high_half<BF16>(pair) : low_half<BF16>(pair);
    }
};

// A lane's part of a unit, in registers.
struct Unit {
    static constexpr int PIECES = SPARSE ? 6 : BITS, PIECE = BITS * 512 / PIECES;
    u32 words[4 * PIECES];
    Rows scales[SUBS];
    u32x4 zeros[ZEROS ? SUBS : 1];  // bytes in x and y, or halves like the scales

    __device__ __forceinline__ void load(const Params& p, int block, int unit, int lane, u64 policy) {
        const char* from = p.codes + (i64(block) * p.units + unit) * ((NESTED ? 8 : BITS) * 512) + lane / (512 / PIECE) * 16;
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const u32x4 v = stream_16(from + i * PIECE, policy);
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
#pragma unroll
        for (int sub = 0; sub < SUBS; ++sub) {
            const int group = GROUP == 0 ? 0 : min((unit * 64 + sub * (64 / SUBS)) / (GROUP ? GROUP : 1), p.groups - 1);
            const i64 at = (i64(block) * p.groups + group) * 64 + lane / 4 * 8;
            scales[sub].pairs = stream_16(p.scales + at * 2, policy);
            if constexpr (KIND == kind::UINT_U8) {
                const u32x2 v = *reinterpret_cast<const u32x2*>(p.zeros + at);
                zeros[sub] = {v.x, v.y, 0, 0};
            } else if constexpr (KIND == kind::UINT_FLOAT) {
                zeros[sub] = stream_16(p.zeros + at * 2, policy);
            }
        }
    }
    __device__ __forceinline__ float zero(int sub, int tile, int h) const {
        if constexpr (KIND == kind::UINT_U8) return float((tile < 2 ? zeros[sub].x : zeros[sub].y) >> (tile % 2 * 16 + h * 8) & 0xff);
        return Rows{zeros[sub]}.at(tile, h);
    }
};

// Words of the next item that registers hold beside this one; gathering planes takes some, and most on Blackwell.
constexpr int HELD = 4 * Unit::PIECES + SUBS * (ZEROS ? 8 : 4);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool AHEAD = NESTED ? BITS <= 4 : HELD < 48;
#else
constexpr bool AHEAD = HELD < (NESTED ? 44 : 48);
#endif

// The next (block, columns) that a CTA takes, columns in groups of one unit per warp.
struct Item {
    int block, unit;
    __device__ __forceinline__ Item(const Params& p, i64 index) {
        const int across = (p.end_unit - p.first_unit + WARPS - 1) / WARPS;
        block = p.first_block + int(index / across);
        unit = p.first_unit + int(index % across) * WARPS;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2) fdk_dequantise(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char smem[];
    if (Smem::TABLE_BYTES && ((shared_address(smem) + Smem::TABLE) & (Smem::TABLE_ALIGNED - 1)) != 0) __trap();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u64 policy = evict_first_policy();
    char* buffer = smem + Smem::BUFFERS + warp * BUFFER;
    const i64 items = i64(p.end_block - p.first_block) * ((p.end_unit - p.first_unit + WARPS - 1) / WARPS);
    const u32 lane_offset = BITS == 2 ? lane % 16 * 8 : lane * 4;
    Lookup lookup = {(shared_address(smem) + Smem::TABLE + lane_offset) ^ p.zero, 0, 0, 0, 0, 0, p.zero};

    int which = -1;
    const auto fetch = [&](Unit& unit, i64 index) {
        if (index >= items) return;
        const Item item(p, index);
        if (item.unit + warp < p.end_unit) unit.load(p, item.block, item.unit + warp, lane, policy);
    };
    Unit next;
    if constexpr (AHEAD) fetch(next, blockIdx.x);
    wait_for_previous_kernel();
    for (i64 index = blockIdx.x; index < items; index += gridDim.x) {
        const Item item(p, index);
        const int unit = item.unit + warp;
        int now = max(which, 0);
        while (item.block >= p.range[now].end_block) ++now;
        if (now != which) {
            which = now;
            const u16* table = p.table + (which << (SPARSE ? 4 : BITS));
            const auto entry = [&](int code) -> u16 {
                if constexpr (KIND == kind::TABLE) return table[code];
                return round_half<BF16>(float(KIND == kind::INT ? code - (1 << (BITS - 1)) : code));
            };
            if constexpr (BITS == 1) {
                lookup.low = entry(0) * 0x10001u, lookup.differ = u32(entry(0) ^ entry(1)) * 0x10001u;
            } else if constexpr (SPARSE) {
                __syncthreads();
                fill_selectors<WARPS>(smem + Smem::TABLE, warp, lane);
                if constexpr (SPARSE_TABLE)
                    fill_kept_values<WARPS>(smem + Smem::TABLE + SELECTOR_BYTES, warp, lane, [&](int code) { return u32(table[code]); });
                __syncthreads();
            } else if constexpr (!NESTED) {
                __syncthreads();
                fill_table<BITS, WARPS>(smem + Smem::TABLE, warp, lane, entry);
                __syncthreads();
            }
        }
        if constexpr (!AHEAD) fetch(next, index);
        const Unit u = next;
        if constexpr (AHEAD) fetch(next, index + gridDim.x);
        if (unit >= p.end_unit) continue;
        const Range& range = p.range[which];
        const i64 row = range.first_row + i64(item.block - range.first_block) * 64;
        const int rows = int(min(i64(64), range.end_row - row));
        u16* to = p.out + (row - p.origin) * p.stride + i64(unit - p.first_unit) * 64 + lane % 8 * 8;
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) {
            u32 a[4][4];
            to_operand<KIND, BITS, FDK_SLICE, BF16, BITS == 1>(a, u.words, tile, lookup);
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                const int sub = s * SUBS / 4;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float scale = u.scales[sub].at(tile, i % 2);
                    float low = low_half<BF16>(a[s][i]), high = high_half<BF16>(a[s][i]);
                    if constexpr (ZEROS) {
                        const float zero = u.zero(sub, tile, i % 2);
                        low -= zero, high -= zero;
                    }
                    a[s][i] = round_pair<BF16>(scale * low, scale * high);
                }
                if constexpr (!SPARSE) store_matrices(buffer + s * 32, ROW, lane, a[s]);
            }
            if constexpr (SPARSE) {
                // Rows g and g + 8, columns 16t to 16t + 15, those at the outer end of their block of 32 first (sparse.cuh).
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int h = i / 2, s = i % 2 * 2;
                    *reinterpret_cast<u32x4*>(buffer + (lane / 4 + 8 * h) * ROW + (2 * (lane % 4) + (i ^ lane) % 2) * 16) =
                        u32x4{a[s][h], a[s][h + 2], a[s + 1][h], a[s + 1][h + 2]};
                }
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = i * 4 + lane / 8;
                const u32x4 v = *reinterpret_cast<const u32x4*>(buffer + r * ROW + lane % 8 * 16);
                if (tile * 16 + r < rows) *reinterpret_cast<u32x4*>(to + (tile * 16 + r) * p.stride) = v;
            }
            __syncwarp();
        }
    }
}

}  // namespace fdk
