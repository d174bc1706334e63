// What the host fixes at compile time, the shared-memory layout that follows from it, and a warp's stream of units.
//
// The host passes the shape as macros (see fdk/kernels/cuda/decode_config.py, whose Config.shared_bytes mirrors `Smem`):
//   FDK_N FDK_K FDK_BITS FDK_GROUP FDK_BF16, FDK_KIND and FDK_SLICE (kinds.cuh)
//   FDK_M FDK_DIGITS FDK_MANY_DIGITS FDK_CLUSTER FDK_K_WARPS FDK_ROW_WARPS FDK_PHASES FDK_STAGES FDK_HOLD FDK_STAGE_UNITS FDK_STEPS
//   FDK_X_CHUNKS FDK_BATCH FDK_MIN_CTAS FDK_LATE FDK_BULK FDK_SCALES_ONCE FDK_X_SUMS FDK_WIDE FDK_OCTETS
//   FDK_UNIFORM FDK_PAIRED FDK_INDICES FDK_HALF_BLOCKS FDK_AHEAD FDK_INTERLEAVED FDK_X_AHEAD FDK_X_BUFFERS
//   FDK_SELECTED, and FDK_SQUARES FDK_GATED FDK_TABLES FDK_RESIDUAL (epilogue.cuh)
#pragma once
#include "operand.cuh"

namespace fdk {

constexpr int K = FDK_K, BITS = FDK_BITS, GROUP = FDK_GROUP, M = FDK_M;
constexpr i64 N = FDK_N;
constexpr bool BF16 = FDK_BF16;
constexpr int KIND = FDK_KIND;
constexpr bool TABLE = KIND == kind::TABLE, ZEROS = kind::has_zeros(KIND), NESTED = kind::is_nested(KIND);
constexpr bool SPARSE = kind::is_sparse(KIND), SPARSE_TABLE = KIND == kind::SPARSE_TABLE;
constexpr int CLUSTER = FDK_CLUSTER, K_WARPS = FDK_K_WARPS, ROW_WARPS = FDK_ROW_WARPS, STAGES = FDK_STAGES;
constexpr int STAGE_UNITS = FDK_STAGE_UNITS, STEPS_PER_CTA = FDK_STEPS, PHASES = FDK_PHASES;
constexpr int WARPS = K_WARPS * ROW_WARPS, THREADS = WARPS * 32;
constexpr bool BULK = FDK_HOPPER && FDK_BULK;  // rings are filled by bulk copies, else by cp.async
constexpr bool UNIFORM = FDK_UNIFORM;  // the compiler knows that a warp's lanes agree on what their warp copies
static_assert(!UNIFORM || BULK, "with cp.async, an H200 met an illegal instruction");

constexpr int UNITS = (K + 63) / 64, GROUPS = (K + GROUP - 1) / GROUP;
constexpr int SUBS = GROUP % 64 == 0 || GROUPS == 1 ? 1 : GROUP % 32 == 0 ? 2 : 4;  // scale changes inside a unit
constexpr int STEPS = 4 / SUBS;                                                     // mma steps between them
constexpr int UNIT_GROUPS_BOUND = SUBS == 1 ? 1 : GROUP < 64 && 64 % GROUP == 0 ? 64 / GROUP : (GROUP + 47) / GROUP + 1;
constexpr int UNIT_GROUPS = UNIT_GROUPS_BOUND < GROUPS ? UNIT_GROUPS_BOUND : GROUPS;  // groups that a unit touches
constexpr int STAGE_GROUPS = STAGE_UNITS == 1 ? UNIT_GROUPS : STAGE_UNITS * 64 > GROUP ? STAGE_UNITS * 64 / GROUP : 1;
static_assert(STAGE_UNITS == 1 || GROUPS == 1 || (STAGE_UNITS * 64) % GROUP == 0 || GROUP % (STAGE_UNITS * 64) == 0,
              "a stage of several units holds whole groups or lies inside one");
static_assert(UNITS % (CLUSTER * K_WARPS * STAGE_UNITS) == 0 || STAGE_UNITS == 1, "slices are whole stages");
constexpr int X_CHUNKS = FDK_X_CHUNKS;  // pieces of a warp's slice of k that activations arrive in, one after the other
static_assert(X_CHUNKS == 1 || UNITS % (CLUSTER * PHASES * K_WARPS * X_CHUNKS * STAGE_UNITS) == 0, "chunks are whole stages");
static_assert(PHASES == 1 || (STEPS_PER_CTA == 1 && UNITS % (CLUSTER * PHASES * K_WARPS * STAGE_UNITS) == 0),
              "phases are whole, and follow each other within one step");
constexpr int SQUARES = FDK_SQUARES;  // partial sums of squares per token that scale the product
constexpr bool GATED = FDK_GATED, RESIDUAL = FDK_RESIDUAL;
constexpr int TABLES = FDK_TABLES;  // tables that a CTA looks codes up in: gate and up may have their own
constexpr bool WIDE = FDK_WIDE;  // the table has rows 256 bytes apart, see dequantise.cuh
static_assert(!WIDE || (!NESTED && !SPARSE && !FDK_DIGITS && TABLES == 1 && (BITS == 2 || BITS == 4 || BITS == 8)), "one table, 64 KB of it");
constexpr int ROW_STRIDE = ROW_WARPS / (GATED ? 2 : 1);  // blocks from one step of a row warp to the next
static_assert(!GATED || (ROW_WARPS % 2 == 0 && N % 128 == 0 && !RESIDUAL), "gate and up are whole blocks, side by side");
// With few tokens the warps of a slice of k bring its activations themselves, by plain loads, and wait for no others.
constexpr bool OWN_X = (M <= 2 || FDK_DIGITS) && PHASES == 1 && (ROW_WARPS == 1 || K_WARPS < 16);
// A warp's scales and zeros arrive in one piece each with its first stage, instead of with each stage its own.
constexpr bool SCALES_ONCE = FDK_SCALES_ONCE;
constexpr int SLICE = UNITS / (CLUSTER * K_WARPS), SLICE_GROUPS = GROUPS == 1 || GROUP > SLICE * 64 ? 1 : SLICE * 64 / GROUP;
static_assert(!SCALES_ONCE || (SUBS == 1 && STEPS_PER_CTA == 1 && PHASES == 1 && UNITS % (CLUSTER * K_WARPS) == 0 &&
                               (GROUPS == 1 || (SLICE * 64) % GROUP == 0 || GROUP % (SLICE * 64) == 0)),
              "a warp has one slice of k, of whole groups or inside one");
constexpr bool DIGITS = FDK_DIGITS;     // integer products, see digits.cuh and, with FDK_MANY_DIGITS, digits_many.cuh
constexpr bool PAIRED = FDK_PAIRED;     // their sums are made and scaled two for one
constexpr int TILES_SHARING = PAIRED && M == 1 ? 2 : 1;  // row tiles that share an accumulator
static_assert(!PAIRED || DIGITS, "see digits.cuh");
// Units of a stage that are multiplied together: two with the same scales where integer sums have room for both.
constexpr int UNITS_AT_ONCE = FDK_MANY_DIGITS && STAGE_UNITS / STAGE_GROUPS % 2 == 0 ? 2 : 1;
constexpr bool INDICES = FDK_INDICES;   // codes as the indices of sparse products, see indices.cuh
// Two clusters share a block of rows: each has ROW_WARPS - 1 of its own, and half of one behind or in front of them.
constexpr bool HALF_BLOCKS = FDK_HALF_BLOCKS;
static_assert(!HALF_BLOCKS || (BITS % 2 == 0 && !NESTED && !SPARSE && STEPS_PER_CTA == 1 && PHASES == 1 && BULK && !DIGITS && !INDICES && !GATED && !RESIDUAL),
              "whole planes of codes are half a block's, in one step");
// Operands of a warp's first unit are made while its activations are on their way (1), or before the dependency wait: the
// stage is then refilled behind it (2) or at once (3).
constexpr int AHEAD = FDK_AHEAD;
static_assert(!AHEAD || (M == 1 && OWN_X && K % 64 == 0 && SUBS == 1 && !INDICES && !HALF_BLOCKS && !(DIGITS && (SQUARES || RESIDUAL))), "operands need nothing else");
// Warps that split a slice of k take its stages in turn, so that few large pieces of activations serve all of them.
constexpr bool INTERLEAVED = FDK_INTERLEAVED;
constexpr int UNIT_STEP = (INTERLEAVED ? K_WARPS : 1) * STAGE_UNITS;
static_assert(!INTERLEAVED || (!SCALES_ONCE && !DIGITS && !INDICES && UNITS % (CLUSTER * PHASES * UNIT_STEP) == 0), "turns are whole, each with its scales");
// Row tiles of a block that a warp multiplies.
template <int COUNT>
struct RowTiles {};
using WholeBlock = RowTiles<4>;
constexpr int NT = (M + 7) / 8;         // tiles of 8 tokens
constexpr int COLUMNS = M == 1 ? 1 : 2; // columns of an accumulator tile that a lane needs

// Affine values need sums of activations per unit and scale change: floats[SUM_KINDS][SUM_COLUMNS] of each.
constexpr bool OCTETS = FDK_OCTETS;  // one bit by look-ups of eight codes, see dequantise.cuh
static_assert(!OCTETS || (BITS == 1 && (KIND == kind::TABLE || KIND == kind::INT) && !DIGITS && !FDK_X_SUMS), "values of two codes, as they are");
constexpr int SELECTED = OCTETS ? FDK_SELECTED : 0;  // row tiles whose operands are selected bit by bit instead
constexpr bool SELECT = BITS == 1 && !ZEROS && M >= 16 && !FDK_X_SUMS && !OCTETS;  // see dequantise.cuh
constexpr bool SPLIT_BIT = BITS == 1 && !SELECT && !OCTETS && !DIGITS && !INDICES;
// A warp adds up the activations of a unit itself, by one more product of each step, or finds them in shared memory.
constexpr bool X_SUMS = FDK_X_SUMS && (ZEROS || SPLIT_BIT) && !DIGITS && !INDICES;
constexpr bool SUMS = (DIGITS ? !FDK_MANY_DIGITS : ZEROS || SPLIT_BIT) && !X_SUMS && !INDICES;
// Phases whose activations are in shared memory at once: those of the next arrive under the products of this one.
constexpr int X_BUFFERS = FDK_X_BUFFERS ? FDK_X_BUFFERS : PHASES > 1 && FDK_HOPPER && K % 64 == 0 && !SUMS ? 2 : 1;
// Their buffers are a ring: a warp that is done with a phase goes on, and whoever asks for a later one waits for all of them.
constexpr bool STREAMED = FDK_X_BUFFERS > 0;
static_assert(!STREAMED || (INTERLEAVED && PHASES >= X_BUFFERS && X_BUFFERS > 1 && X_CHUNKS == 1 && K_WARPS > 1), "phases are pieces of all warps");
constexpr int SUM_COLUMNS = DIGITS || M == 1 ? M : NT * 8;
constexpr int SUM_KINDS = SPLIT_BIT ? 3 : 1;

// Partial sums of that many row steps are kept before they are added up: all of them, or one at a time.
constexpr int BATCH = FDK_BATCH;
constexpr int BUFFERS = BATCH == 1 && STEPS_PER_CTA > 1 ? 2 : 1;

// Shared memory. The table starts at a multiple of its size, counted from the start of the shared window, whose first
// kilobyte the system keeps from compute capability 9.0 on; what fits goes in front of it.
struct Smem {
    static constexpr int CTA_UNITS = (UNITS + CLUSTER * PHASES - 1) / (CLUSTER * PHASES);  // of one phase
    static constexpr int WINDOW = FDK_HOPPER ? 1024 : 0;
    static constexpr int TABLE_ALIGNED = OCTETS ? OCTET_TABLE_BYTES : (DIGITS && !SPARSE) || INDICES || NESTED ? 0 : SPARSE ? SELECTOR_BYTES : Table<BITS>::BYTES * (WIDE ? 2 : 1);
    static constexpr int TABLE_BYTES = TABLE_ALIGNED + (SPARSE_TABLE ? KEPT_VALUES_BYTES : 0);
    static constexpr int TABLE = WINDOW && TABLE_ALIGNED > WINDOW ? TABLE_ALIGNED - WINDOW : 0, TABLE_END = TABLE + TABLES * TABLE_BYTES;

    static constexpr int SUM_BYTES = SUMS ? (CTA_UNITS * SUBS * SUM_KINDS * SUM_COLUMNS * 4 + 15) / 16 * 16 : 0;
    static constexpr int BARRIER_BYTES = (WARPS * STAGES * 8 + 8 + X_BUFFERS * K_WARPS * X_CHUNKS * 8 + 15) / 16 * 16;  // rings, sums, x
    static constexpr int CODE_BYTES = BITS * 512, UNIT_STRIDE = (NESTED ? 8 : BITS) * 512;  // read, and stored
    static constexpr int GROUP_ZERO_BYTES = KIND == kind::UINT_U8 ? 64 : KIND == kind::UINT_FLOAT ? 128 : 0;
    static constexpr int SCALES = STAGE_UNITS * CODE_BYTES, ZEROS_AT = SCALES + (SCALES_ONCE ? 0 : STAGE_GROUPS * 128);
    static constexpr int STAGE = ZEROS_AT + (SCALES_ONCE ? 0 : STAGE_GROUPS * GROUP_ZERO_BYTES);
    static constexpr int SLICE_SCALES = STAGES * STAGE, SLICE_ZEROS = SLICE_SCALES + SLICE_GROUPS * 128;  // in a ring
    static constexpr int SLICE_BYTES = SCALES_ONCE ? SLICE_GROUPS * (128 + GROUP_ZERO_BYTES) : 0;
    static constexpr int RING_BYTES = SLICE_SCALES + SLICE_BYTES;

    // A CTA with a single step needs neither its ring nor its activations once it has its sums: each warp's partial sums
    // go to its own ring if they fit, else over the activations, and so do the sums that other CTAs send. That takes one
    // more wait for the cluster, which few tokens, whose sums are small, do without.
    static constexpr bool SINGLE = STEPS_PER_CTA == 1 && M >= 8;
    static constexpr bool PARTIAL_IN_RING = STEPS_PER_CTA == 1 && RING_BYTES >= 64 * M * 4;
    static constexpr int PARTIAL_BYTES = PARTIAL_IN_RING ? 0 : BUFFERS * BATCH * WARPS * 64 * M * 4;
    static constexpr int RECEIVE_BYTES = CLUSTER == 1 ? 0 : BUFFERS * BATCH * ROW_WARPS * 64 * M * 4;
    static constexpr int SUM_TOTAL = PARTIAL_BYTES + RECEIVE_BYTES;
    // Rows of activations are 16 bytes apart in their banks, so that eight tokens' pieces are read without conflicts; for
    // four 32 bytes do, at which the copy engine writes faster.
    static constexpr int DIGIT_BYTES = CTA_UNITS * M * 256;
    // Zeros in the place of digits, where the units of a stage are read one after the other.
    static constexpr int NO_DIGIT_BYTES = TILES_SHARING > 1 ? (STAGE_UNITS - 1) * 256 + 16 : 0;
    static constexpr int X_STRIDE = CTA_UNITS * 128 + (M >= 8 ? 16 : 32);
    static constexpr int X_BUFFER = M * X_STRIDE, X_ONLY_BYTES = DIGITS ? DIGIT_BYTES + NO_DIGIT_BYTES : X_BUFFERS * X_BUFFER;
    static constexpr int X_BYTES = SINGLE && SUM_TOTAL > X_ONLY_BYTES ? SUM_TOTAL : X_ONLY_BYTES;
    static constexpr int SUMS_BARRIER = WARPS * STAGES * 8, X_BARRIERS = SUMS_BARRIER + 8;  // counted from BARRIERS
    static constexpr int MAXIMA_BYTES = DIGITS ? (M * (WARPS + K_WARPS) * 4 + 15) / 16 * 16 : 0;
    static constexpr int NORM_BYTES = SQUARES ? (M * 4 + 15) / 16 * 16 : 0;
    static constexpr int HEAD_BYTES = X_BYTES + SUM_BYTES + (SINGLE ? 0 : SUM_TOTAL) + BARRIER_BYTES + MAXIMA_BYTES + NORM_BYTES;

    static constexpr int LOW_HEAD = HEAD_BYTES <= TABLE ? HEAD_BYTES : 0;
    static constexpr int FITTING = (TABLE - LOW_HEAD) / RING_BYTES;
    static constexpr int LOW_RINGS = FITTING < WARPS ? FITTING : WARPS;
    static constexpr int X = LOW_HEAD ? 0 : TABLE_END;
    static constexpr int NO_DIGITS = X + DIGIT_BYTES;
    static constexpr int SUM = X + X_BYTES, BARRIERS = SUM + SUM_BYTES, MAXIMA = BARRIERS + BARRIER_BYTES;
    static constexpr int NORMS = MAXIMA + MAXIMA_BYTES;
    static constexpr int PARTIAL = SINGLE ? X : NORMS + NORM_BYTES, RECEIVE = PARTIAL + PARTIAL_BYTES;
    static constexpr int HIGH_RINGS = TABLE_END + (LOW_HEAD ? 0 : HEAD_BYTES);
    static constexpr int BYTES = HIGH_RINGS + (WARPS - LOW_RINGS) * RING_BYTES;

    __device__ static __forceinline__ int ring(int warp) {
        if constexpr (LOW_RINGS == 0) return HIGH_RINGS + warp * RING_BYTES;
        return warp < LOW_RINGS ? LOW_HEAD + warp * RING_BYTES : HIGH_RINGS + (warp - LOW_RINGS) * RING_BYTES;
    }
};
static_assert(Smem::BYTES == FDK_SHARED_BYTES, "host and device disagree on the shared memory layout");
static_assert(!DIGITS || (SUBS == 1 && M <= 8 && (!TABLE || BITS == 1) && !SPARSE_TABLE), "see digits.cuh");
static_assert(!FDK_MANY_DIGITS || (PAIRED && !TABLE && !SPARSE && K % 2 == 0), "see digits_many.cuh");
static_assert(!INDICES || (BITS <= 2 && !NESTED && !SPARSE && SUBS == 1 && M <= 2 && STAGE_UNITS <= 4 && !DIGITS && !WIDE && !OCTETS), "see indices.cuh");
static_assert(64 / CLUSTER * M % 4 == 0 && CLUSTER <= 16, "a CTA's share of a block's sums is whole 16-byte pieces");

constexpr int MAX_RANGES = 16;
struct Range {
    int first_cluster, first_block, end_block, pad;
    i64 first_row, end_row;
};
struct Params {
    const char* codes;   // [B, UNITS, BITS (nested: 8), 32, 4] words
    const char* scales;  // [B * GROUPS + spare, 64]
    const char* zeros;   // [B * GROUPS + spare, 64]
    const u16* table;    // [tables, 2^BITS]
    const u16* x;        // [m, K]
    const u16* bias;     // [N] or null
    u16* out;            // [m, N]
    int m, ranges, blocks_per_cluster;
    u32 one_bit[3];      // see Lookup; the pairs of 1, base7, base6
    u32 zero;            // 0, which the compiler does not know
    const float* squares;  // [m, SQUARES], see epilogue.cuh
    float* squares_out;    // [m, SQUARES_OUT]
    u16* residual;         // [m, N]
    const u16* gamma;      // [N]
    float eps;
    Range range[MAX_RANGES];
};

// Where a warp stands in its stream of units; the codes of one block's slice are contiguous. Units count from the
// CTA's first; a CTA with several phases has one step, and `step` counts the phases.
struct Cursor {
    int step, unit;
    const char* codes;
    i64 group_row;  // first group of the block, counted over all blocks
};

// First group of the stage that starts at `unit`, moved down where a stage would reach past the last group.
__device__ __forceinline__ int stage_group(int unit) {
    const int group = unit * 64 / GROUP;
    if constexpr (SUBS > 1 && 64 % GROUP != 0) return min(group, GROUPS - STAGE_GROUPS);
    return GROUPS == 1 ? 0 : group;
}

// Where the scales and zeros of a stage's first group lie.
struct StageGroups {
    const char *scales, *zeros;
};

struct Warp {
    const Params& p;
    char* ring;
    u32 barriers;
    int lane, steps, first_unit, end_unit;  // units counted from the CTA's first
    int cta_unit;
    i64 first_block;
    u64 policy;
    int half;  // of the block that it takes, or -1: all of it

    __device__ __forceinline__ Cursor start() const {
        return {0, first_unit, p.codes + (first_block * UNITS + cta_unit + first_unit) * Smem::UNIT_STRIDE,
                first_block * GROUPS};
    }
    __device__ __forceinline__ void advance(Cursor& c) const {
        c.codes += UNIT_STEP * Smem::UNIT_STRIDE;
        c.unit += UNIT_STEP;
        const int last = INTERLEAVED ? first_unit + Smem::CTA_UNITS : end_unit;
        if (STEPS_PER_CTA > 1 && c.unit == last) {
            c.unit = first_unit;
            c.step += 1;
            c.codes += (ROW_STRIDE * UNITS - (last - first_unit)) * i64(Smem::UNIT_STRIDE);
            c.group_row += ROW_STRIDE * GROUPS;
        }
        if (PHASES > 1 && c.unit == c.step * Smem::CTA_UNITS + last) {
            const int skipped = Smem::CTA_UNITS - (last - first_unit);
            c.unit += skipped;
            c.step += 1;
            c.codes += skipped * Smem::UNIT_STRIDE;
        }
    }
    __device__ __forceinline__ bool more(const Cursor& c) const {
        return STEPS_PER_CTA > 1 || PHASES > 1 ? c.step < steps : c.unit < end_unit;
    }
    template <int COUNT>
    __device__ __forceinline__ void prefetch(Cursor& c, int stage, bool first, RowTiles<COUNT>) const {
        if (more(c)) {
            const i64 group = c.group_row + stage_group(cta_unit + c.unit);
            const u32 to = shared_address(ring) + stage * Smem::STAGE;
            // Planes that are not read lie between the units.
            constexpr int PIECES = NESTED ? STAGE_UNITS : 1, PIECE = STAGE_UNITS * Smem::CODE_BYTES / PIECES;
            constexpr int HALF = Smem::CODE_BYTES / 2;
            if constexpr (BULK) {
                if (UNIFORM ? elected() : lane == 0) {
                    const u32 barrier = barriers + stage * 8;
                    constexpr bool halved = COUNT == 2;
                    barrier_expect(barrier, Smem::STAGE + (first ? Smem::SLICE_BYTES : 0) - (halved ? STAGE_UNITS * HALF : 0));
                    if constexpr (halved) {
#pragma unroll
                        for (int i = 0; i < STAGE_UNITS; ++i)
                            copy_bulk(to + i * Smem::CODE_BYTES, c.codes + i * Smem::UNIT_STRIDE + half * HALF, HALF, barrier, policy);
                    } else {
#pragma unroll
                        for (int i = 0; i < PIECES; ++i) copy_bulk(to + i * PIECE, c.codes + i * Smem::UNIT_STRIDE, PIECE, barrier, policy);
                    }
                    if constexpr (!SCALES_ONCE) {
                        copy_bulk(to + Smem::SCALES, p.scales + group * 128, STAGE_GROUPS * 128, barrier, policy);
                        if constexpr (ZEROS)
                            copy_bulk(to + Smem::ZEROS_AT, p.zeros + group * Smem::GROUP_ZERO_BYTES,
                                      STAGE_GROUPS * Smem::GROUP_ZERO_BYTES, barrier, policy);
                    } else if (first) {
                        copy_bulk(shared_address(ring) + Smem::SLICE_SCALES, p.scales + group * 128, SLICE_GROUPS * 128, barrier, policy);
                        if constexpr (ZEROS)
                            copy_bulk(shared_address(ring) + Smem::SLICE_ZEROS, p.zeros + group * Smem::GROUP_ZERO_BYTES,
                                      SLICE_GROUPS * Smem::GROUP_ZERO_BYTES, barrier, policy);
                    }
                }
            } else {
#pragma unroll
                for (int i = 0; i < PIECES; ++i) copy_lanes<PIECE>(to + i * PIECE, c.codes + i * Smem::UNIT_STRIDE);
                if constexpr (!SCALES_ONCE) {
                    copy_lanes<STAGE_GROUPS * 128>(to + Smem::SCALES, p.scales + group * 128);
                    if constexpr (ZEROS)
                        copy_lanes<STAGE_GROUPS * Smem::GROUP_ZERO_BYTES>(to + Smem::ZEROS_AT, p.zeros + group * Smem::GROUP_ZERO_BYTES);
                } else if (first) {
                    copy_lanes<SLICE_GROUPS * 128>(shared_address(ring) + Smem::SLICE_SCALES, p.scales + group * 128);
                    if constexpr (ZEROS)
                        copy_lanes<SLICE_GROUPS * Smem::GROUP_ZERO_BYTES>(shared_address(ring) + Smem::SLICE_ZEROS,
                                                                          p.zeros + group * Smem::GROUP_ZERO_BYTES);
                }
            }
            advance(c);
        }
        // Every call commits a group, also past the end, so that the number of pending groups stays known.
        if constexpr (!BULK) copy_commit();
    }
    template <int BYTES>
    __device__ __forceinline__ void copy_lanes(u32 to, const char* from) const {
#pragma unroll
        for (int i = 0; i < BYTES; i += 512)
            if (i + 512 <= BYTES || lane * 16 < BYTES - i) copy_async(to + i + lane * 16, from + i + lane * 16, policy);
    }
    // `stage` was read and takes what comes next.
    template <int COUNT>
    __device__ __forceinline__ void refill(Cursor& c, int stage, RowTiles<COUNT> tiles) const {
        if (!BULK || more(c)) {
            if constexpr (BULK) order_before_bulk_copies();
            __syncwarp();
            prefetch(c, stage, false, tiles);
        }
    }
    // Of a stage that starts at unit `unit`.
    __device__ __forceinline__ StageGroups groups(int stage, int unit) const {
        if constexpr (!SCALES_ONCE) return {ring + stage * Smem::STAGE + Smem::SCALES, ring + stage * Smem::STAGE + Smem::ZEROS_AT};
        const int group = stage_group(cta_unit + unit) - stage_group(cta_unit + first_unit);
        return {ring + Smem::SLICE_SCALES + group * 128, ring + Smem::SLICE_ZEROS + group * Smem::GROUP_ZERO_BYTES};
    }
    __device__ __forceinline__ void wait(int stage, u32 parity) const {
        if constexpr (BULK) {
            barrier_wait(barriers + stage * 8, parity);
        } else {
            copy_wait<STAGES - 1>();
            __syncwarp();
        }
    }
};

// Scales or zeros of a lane's eight rows (16r + 8h + g at 2r + h) of one group.
struct Rows {
    u32 pairs[4];
    __device__ __forceinline__ float at(int tile, int h) const {
        return h ? high_half<BF16>(pairs[tile]) : low_half<BF16>(pairs[tile]);
    }
};

// The rows of one half of a block as those of its first two row tiles.
__device__ __forceinline__ Rows half_of(const Rows& rows, int half) {
    return {{half ? rows.pairs[2] : rows.pairs[0], half ? rows.pairs[3] : rows.pairs[1]}};
}

// `share`: of lanes that share accumulators, digits.cuh.
__device__ __forceinline__ Rows load_rows(const char* from, int g, int share = 0) {
    if constexpr (TILES_SHARING > 1) {
        const u32x2 v = *reinterpret_cast<const u32x2*>(from + g * 16 + share * 8);
        return {{v.x, v.y}};
    }
    const u32x4 v = *reinterpret_cast<const u32x4*>(from + g * 16);
    return {{v.x, v.y, v.z, v.w}};
}

// Zeros of those rows as they are stored: bytes, or halves like the scales.
struct ByteRows {
    u32 words[2];
    __device__ __forceinline__ float at(int tile, int h) const {
        return float(words[tile / 2] >> (tile % 2 * 16 + h * 8) & 0xff);
    }
};

__device__ __forceinline__ ByteRows half_of(const ByteRows& rows, int half) { return {{half ? rows.words[1] : rows.words[0]}}; }

__device__ __forceinline__ auto load_zeros(const char* from, int g, int share = 0) {
    if constexpr (KIND == kind::UINT_U8) {
        if constexpr (TILES_SHARING > 1)
            return ByteRows{{*reinterpret_cast<const u32*>(from + g * 8 + share * 4)}};
        const u32x2 v = *reinterpret_cast<const u32x2*>(from + g * 8);
        return ByteRows{{v.x, v.y}};
    } else {
        return load_rows(from, g, share);
    }
}
// Who brings which activations: `units` units from `first` on, counted from the CTA's first, by SHARE_THREADS threads.
struct Share {
    int first, units, thread;

    // The warps of one slice of k, or all of the CTA.
    __device__ static __forceinline__ Share of(int units, int warp, int lane) {
        if constexpr (!OWN_X) return {0, units, warp * 32 + lane};
        const int k_warp = warp % K_WARPS, first = units * k_warp / K_WARPS;
        return {first, units * (k_warp + 1) / K_WARPS - first, warp / K_WARPS * 32 + lane};
    }
    __device__ __forceinline__ void sync(int warp) const {
        if constexpr (!OWN_X)
            __syncthreads();
        else if constexpr (ROW_WARPS == 1)
            __syncwarp();
        else
            sync_some(1 + warp % K_WARPS, ROW_WARPS * 32);
    }
};
constexpr int SHARE_UNITS = OWN_X ? (Smem::CTA_UNITS + K_WARPS - 1) / K_WARPS : Smem::CTA_UNITS;
constexpr int SHARE_THREADS = OWN_X ? ROW_WARPS * 32 : THREADS;
constexpr bool EVEN_SHARES = UNITS % (CLUSTER * PHASES * (OWN_X ? K_WARPS : 1)) == 0;

using Zeros = decltype(load_zeros(nullptr, 0));

}  // namespace fdk
