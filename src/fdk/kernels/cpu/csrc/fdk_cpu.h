// The C ABI of the CPU kernels and the rows16 layout they read. No torch, no Python, no STL.
//
// rows16. Rows are taken in blocks of 16; each range of rows that has its own table starts a new block, so a block
// never straddles two tables. A block is one sequential stream of superblocks:
//
//     superblock = scales[S][16] | zeros[S][16] | units            S = 1, or 2 when group / 16 is odd
//     unit       = 32 consecutive k of 16 rows = `bits` lines of 16 dwords; dword lane = row
//
// Inside a unit, pair p (0..15) is k = 2p and 2p + 1; even k live in the low 16 bits of a dword, odd k in the high 16.
// With q = 16 / bits, pairs p < bits * q sit in line p / q at bit bits * (p % q). The 16 % bits bits left over at the
// top of each half, concatenated over the lines, are one more little-endian stream that holds the remaining pairs.
// So every width from 1 to 8 takes exactly `bits` bits, and the bytes are the same for every instruction set.
//
// A block of a nested weight is all its scales, padded to a line, then 8 planes of one line per unit: plane t is bit
// 7 - t of the master, for the same halves and pairs. Stretches of 8 KiB at k = 4096 matter: with the planes of 1 to 32
// units next to each other, gaps between what is read halve the memory's rate. In a half, pair p = 8l + f has
//     planes 0 and 1   line l, bits 2f and 2f + 1
//     planes 2 and 3   bit 4(f / 2) + 2l + f % 2
//     planes 4 to 7    bit 8(f / 4) + 4l + 2(f % 2) + f / 2 % 2
// which puts planes next to each other with one shift and one selection for several pairs at once.
//
// A unit of a 16:32 sparse weight is a line of masks, a dword per row, bit c for column c, and two lines of codes, 8 bytes
// per row: its 16 kept codes of 4 bits in order.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define FDK_EXPORT extern "C" __attribute__((visibility("default")))
#define FDK_INLINE inline __attribute__((always_inline))
#else
#define FDK_EXPORT extern "C"
#define FDK_INLINE inline
#endif

enum { FDK_ABI = 3 };
enum fdk_dtype { FDK_BF16 = 0, FDK_FP16 = 1, FDK_FP32 = 2 };
enum fdk_family { FDK_TABLE = 0, FDK_INT = 1, FDK_UINT_U8 = 2, FDK_UINT_FLOAT = 3 };
enum fdk_storage { FDK_PLAIN = 0, FDK_NESTED_PLANES = 1, FDK_SPARSE = 2 };
enum fdk_isa {
    FDK_GENERIC = 0, FDK_AVX2 = 1, FDK_AVX512 = 2, FDK_AVX512BF16 = 3, FDK_NEON = 4, FDK_NEONBF16 = 5, FDK_SVE = 6, FDK_ISAS = 7
};
static const int64_t FDK_ROWS = 16, FDK_UNIT = 32;
static const int64_t FDK_PLANES = 8;  // of nested weights
static const int64_t FDK_PANEL_WIDTH = 12;  // widest tile of any kernel
static const int64_t FDK_CHUNK = 512;        // most rows of x that are packed at a time
static const int64_t FDK_EXACT_ROWS = 128;   // up to here scales are always applied to float32 sums

// A range of rows with one table. Values are expanded to 256 entries (repeated), so that an index whose bits above
// the code are garbage still finds its value and kernels need no masks.
struct fdk_range {
    int64_t row0, row1;      // rows of the weight
    int64_t block0, block1;  // blocks of the layout
    float value[256];        // table value, or code - offset
    uint16_t value_bf16[256];
    uint16_t value_high[256];  // upper and lower halves of the float32 bits
    uint16_t value_low[256];
};

// Where the pieces of a packed weight lie: everything a kernel needs besides activations.
struct fdk_weight {
    const uint8_t* data;
    int64_t n, k;
    int64_t group;        // weights per scale along k (chan: k)
    int64_t groups;       // scales per row
    int64_t k_padded;     // k rounded up to whole superblocks
    int64_t supers;       // superblocks per block
    int64_t units;        // units per superblock
    int64_t super_bytes, block_bytes;
    int64_t planes_at, plane_bytes;  // nested: offset of plane 0 in a block; super_bytes counts scales only
    int64_t blocks;
    int64_t ranges_count;
    int32_t bits, dtype, family;
    int32_t split;        // 1: two groups per superblock, the boundary in the middle of a unit
    int32_t scale_bytes;  // of one scale
    int32_t zero_bytes;   // of one zero, 0 without zeros
    int32_t bf16_exact;   // every table value survives the bf16 dot instruction (bf16 weight, no subnormal value)
    int32_t bf16_values;  // every table value is a bf16 number, whatever the weight's dtype
    int32_t storage;      // enum fdk_storage; nested: `bits` is what a product reads of the 8 that are stored
    struct fdk_range ranges[1];
};

// One tile of activations, packed for a kernel: `rows` rows of x, stored [k_padded / 2][width] bf16 pairs
// (bf16 dot) or [k_padded][width] float32.
struct fdk_tile {
    void* x;
    float* sums;  // [groups padded][width] sums of x over each group; null unless the weight has zeros
    int64_t row;           // first row of x
    int32_t rows, width;
};

struct fdk_job {
    const struct fdk_weight* w;
    const struct fdk_plan* plan;
    const struct fdk_tile* tiles;
    int64_t tiles_count;
    const void* bias;  // [n] of the weight's dtype, or null
    void* out;         // [m, n] of the weight's dtype
};

enum fdk_algorithm {
    FDK_DIRECT = 0,   // every tile decodes
    FDK_PANELS = 1,   // decoded once into a panel in the workspace
    FDK_NIBBLES = 2,  // 1 or 2 bits, one row: sums for each nibble in the workspace; x is read as it lies
    FDK_SPARSE_ROWS = 3,  // 16:32 sparse, bf16, one row: the vector is a row of W; x is read as it lies
    FDK_SCALED_PANELS = 4,  // as FDK_PANELS, scales multiplied into the values, which are rounded to bf16
};

// How the rows of x are cut for one call.
struct fdk_plan {
    int64_t rows;        // rows of x packed at a time
    int64_t workspace;   // bytes for each thread
    int64_t wide_tiles;  // how many tiles have `width` rows; those after them have `rest_width`
    int32_t width;
    int32_t rest_width;
    int32_t algorithm;   // enum fdk_algorithm
    int32_t bf16_pairs;  // activations are packed as bf16 pairs, else as float32
};

// What one instruction set provides.
struct fdk_ops {
    void (*plan)(const struct fdk_weight*, int64_t m, struct fdk_plan*);
    // Rows of x into a tile's x and sums, either of which may be null.
    void (*pack)(const struct fdk_weight*, const struct fdk_plan*, const void* x, const struct fdk_tile* tile);
    void (*linear)(const struct fdk_job*, int64_t block0, int64_t block1, void* workspace);
    // Rows of blocks [block0, block1) scaled and rounded to the weight's dtype; out points at row 0 of block0.
    void (*dequantise)(const struct fdk_weight*, void* out, int64_t block0, int64_t block1);
    // Probes for benchmarks: reads every cache line of [p, p + size); runs `steps` rounds of independent multiply-adds
    // of the kind the kernels use for this dtype and returns the operations of one round.
    uint64_t (*read)(const void* p, int64_t size);
    int64_t (*multiply)(int32_t dtype, int64_t steps, float* sink);
};

#ifdef __cplusplus
extern "C" {
#endif
// fn(context, part, parts) on `threads` threads of the OpenMP runtime that torch runs on; on the caller if there is none.
void fdk_parallel(void (*fn)(void*, int64_t part, int64_t parts), void* context, int32_t threads);
const struct fdk_ops* fdk_ops_generic(void);
const struct fdk_ops* fdk_ops_avx2(void);
const struct fdk_ops* fdk_ops_avx512(void);
const struct fdk_ops* fdk_ops_avx512bf16(void);
const struct fdk_ops* fdk_ops_neon(void);
const struct fdk_ops* fdk_ops_neonbf16(void);
const struct fdk_ops* fdk_ops_sve128(void);
const struct fdk_ops* fdk_ops_sve256(void);
const struct fdk_ops* fdk_ops_sve512(void);
#ifdef __cplusplus
}
#endif
