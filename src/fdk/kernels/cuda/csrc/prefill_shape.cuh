// What the host fixes of the prefill kernel at compile time, the shared-memory layout that follows from it, its argument.
//
// The host passes macros (see fdk/kernels/cuda/prefill_config.py, whose Config.shared_bytes mirrors `Smem`):
//   FDK_N FDK_K FDK_BITS FDK_GROUP FDK_BF16 FDK_KIND FDK_SLICE  as for decode.cuh (not UINT_FLOAT, not sparse)
//   FDK_TOKENS FDK_TOKEN_TILES (= tokens / 8) FDK_BLOCKS FDK_K_GROUPS FDK_STAGES FDK_PAIR FDK_SPLIT
//   FDK_CODES_AHEAD FDK_PARTS FDK_TURNS FDK_ROUND FDK_STREAM FDK_FETCH_SUMS FDK_WIDE FDK_UNROLLED FDK_FRESH
#pragma once
#include "operand.cuh"

namespace fdk {

constexpr int K = FDK_K, BITS = FDK_BITS, GROUP = FDK_GROUP;
constexpr i64 N = FDK_N;
constexpr bool BF16 = FDK_BF16;
constexpr int KIND = FDK_KIND;
constexpr bool TABLE = KIND == kind::TABLE, ZEROS = KIND == kind::UINT_U8, NESTED = kind::is_nested(KIND);
constexpr bool WIDE = FDK_WIDE;
constexpr bool INTEGERS = (KIND == kind::INT || KIND == kind::UINT_U8) && BITS >= 5 && !WIDE;  // become floats by arithmetic, not by look-ups
constexpr int TOKENS = FDK_TOKENS, TOKEN_TILES = FDK_TOKEN_TILES, BLOCKS = FDK_BLOCKS, K_GROUPS = FDK_K_GROUPS;
constexpr int STAGES = FDK_STAGES, PAIR = FDK_PAIR, SPLIT = FDK_SPLIT;
constexpr bool CODES_AHEAD = FDK_CODES_AHEAD, ROUND = FDK_ROUND, STREAM = FDK_STREAM;
constexpr bool FETCH_SUMS = FDK_FETCH_SUMS;  // the sums that other shares leave of a tile come through the ring, behind its units
constexpr int PARTS = FDK_PARTS;  // parts of a unit that are dequantised and multiplied one after the other
constexpr int WARPGROUPS = BLOCKS * K_GROUPS, CLUSTER = PAIR * SPLIT, CONSUMERS = WARPGROUPS * 128, THREADS = CONSUMERS + 128;
// Registers of a thread: what a CTA starts with is all that its warpgroups can share out among themselves, and asking for
// more would wait for ever.
constexpr int FIRST_REGISTERS = 65536 / THREADS / 8 * 8 < 248 ? 65536 / THREADS / 8 * 8 : 248, PRODUCER_REGISTERS = WARPGROUPS == 2 ? 24 : 32;
constexpr int SHARED_OUT = (FIRST_REGISTERS * (WARPGROUPS + 1) - PRODUCER_REGISTERS) / WARPGROUPS / 8 * 8;
constexpr int CONSUMER_REGISTERS = SHARED_OUT < 240 ? SHARED_OUT : 240;
constexpr int SLICES = SPLIT * K_GROUPS;  // parts of k whose sums are added up at the end
// The loop over units is unrolled over the ring, whose places are constants then: fewer instructions stand beside wgmma.
constexpr bool UNROLLED = FDK_UNROLLED;
constexpr bool FRESH = FDK_FRESH;  // the kernel in front writes the codes
constexpr bool LANE_TABLE = KIND == kind::TABLE && BITS <= 5;  // each lane has one value of the table
static_assert(TOKENS == 8 * TOKEN_TILES);
static_assert(!STREAM || SLICES == 1, "tiles are cut along k in one way");
// Warpgroups multiply in turn: left alone they fall into step, and all scale their sums while the tensor cores idle.
constexpr bool TURNS = FDK_TURNS && WARPGROUPS > 1;
constexpr int FIRST_TURN = 8;
static_assert(WARPGROUPS <= (TURNS ? 6 : 7), "named barriers 1 to 15: one of a warpgroup, one of all, one of each turn");
static_assert(SLICES == 1 || PAIR == 1, "CTAs that share x take many tiles");
static_assert(PAIR == 1 || SPLIT == 1, "a cluster either shares x or splits k");
static_assert(TOKENS % (8 * PAIR) == 0, "x is fetched in atoms of 8 tokens");
static_assert(KIND != kind::UINT_FLOAT, "fractional zero points are not served");

constexpr int UNITS = (K + 63) / 64, GROUPS = (K + GROUP - 1) / GROUP;
constexpr int SUBS = GROUP % 64 == 0 || GROUPS == 1 ? 1 : GROUP % 32 == 0 ? 2 : 4;  // scale changes inside a unit
constexpr int STEPS = 4 / SUBS;                                                     // wgmma steps between them
constexpr int TOUCHED = SUBS == 1 ? 1 : GROUP < 64 && 64 % GROUP == 0 ? 64 / GROUP : (GROUP + 47) / GROUP + 1;
constexpr int UNIT_GROUPS = TOUCHED < GROUPS ? TOUCHED : GROUPS;  // groups that a unit touches
constexpr bool GROUPED = GROUPS > 1, LATE = GROUPED && !ROUND;
static_assert(PARTS == 1 || (PARTS == 2 && !LATE && !TURNS), "halves of a unit are prepared ahead of each other");
// Slices of k that take no whole rounds of the ring leave the unrolled loop where they end: one tile, after which no stage is used.
constexpr bool RAGGED = UNROLLED && SPLIT > 1 && UNITS % (STAGES * SPLIT) != 0;
static_assert(!UNROLLED || RAGGED || UNITS % STAGES == 0, "runs of units take whole rounds of the ring");
static_assert(!RAGGED || PARTS == 1, "halves of a unit are prepared ahead of each other");
static_assert(!UNROLLED || STAGES % (2 * K_GROUPS) == 0, "units or their halves alternate between two operands");
static_assert(!CODES_AHEAD || (UNROLLED && PARTS == 1 && STAGES >= 3 * K_GROUPS), "two units are prepared beside the one multiplied");
// Stages that the sums of a tile take: f32x4 of SUM_TILES token tiles of every thread where else x lies.
constexpr int SUM_TILES = FETCH_SUMS ? TOKENS / (16 * BLOCKS) : 1, SUM_STAGES = (TOKEN_TILES + SUM_TILES - 1) / SUM_TILES;
static_assert(!FETCH_SUMS || (STREAM && !LATE), "sums are left where tiles are cut");
static_assert(!FETCH_SUMS || !UNROLLED || SUM_STAGES % STAGES == 0, "sums take whole rounds of the ring");
constexpr int ISSUES = LATE ? SUBS : 1;                          // runs of wgmma of a unit
constexpr int GROUP_UNITS = SUBS == 1 && LATE ? GROUP / 64 : 1;  // units that share a scale

struct Smem {
    static constexpr int WINDOW = 1024;  // what the system keeps in front
    static constexpr int TABLE_BYTES = NESTED || INTEGERS ? 0 : Table<BITS>::BYTES * (WIDE ? 2 : 1);
    static constexpr int TABLE = TABLE_BYTES > WINDOW ? TABLE_BYTES - WINDOW : 0;
    static constexpr int X_BYTES = TOKENS * 128;
    static constexpr int CODE_BYTES = BITS * 512, UNIT_STRIDE = NESTED ? 8 * 512 : CODE_BYTES;  // read, and stored
    static constexpr int GROUP_ZERO_BYTES = ZEROS ? 64 : 0;
    static constexpr int STAGED_GROUPS = GROUPED || ZEROS ? UNIT_GROUPS : 0;
    static constexpr int SCALES = CODE_BYTES, ZEROS_AT = SCALES + STAGED_GROUPS * 128;
    static constexpr int BLOCK_BYTES = ZEROS_AT + STAGED_GROUPS * GROUP_ZERO_BYTES;  // of one block of rows
    static constexpr int CODES = X_BYTES;
    static constexpr int STAGE = (X_BYTES + BLOCKS * BLOCK_BYTES + 1023) / 1024 * 1024;

    // Rows of staged outputs are 16 bytes apart in their banks, so that eight tokens are written without conflicts.
    static constexpr int CHUNK = TOKENS < 64 ? TOKENS : 64, OUT_STRIDE = 144;
    static constexpr int OUT_BYTES = WARPGROUPS * CHUNK * OUT_STRIDE;
    static constexpr int SHARE_TILES = (TOKEN_TILES + SLICES - 1) / SLICES;  // tokens / 8 that a slice adds up
    // Of a cluster's slices: one barrier for the end of all loops, one for each chunk of a warpgroup's outputs.
    static constexpr int OUT_CHUNKS = (SHARE_TILES * 8 + CHUNK - 1) / CHUNK;
    static constexpr int MEETING_BARRIERS = SPLIT > 1 ? 1 + WARPGROUPS * OUT_CHUNKS : 0;
    static constexpr int BARRIER_BYTES = ((2 * STAGES + MEETING_BARRIERS) * 8 + 15) / 16 * 16;
    static constexpr int HEAD_BYTES = (OUT_BYTES + BARRIER_BYTES + 1023) / 1024 * 1024;
    static constexpr int LOW_HEAD = HEAD_BYTES <= TABLE ? HEAD_BYTES : 0;
    static constexpr int FITTING = (TABLE - LOW_HEAD) / STAGE;
    static constexpr int LOW_STAGES = FITTING < STAGES ? FITTING : STAGES;
    static constexpr int OUT = LOW_HEAD ? 0 : TABLE + TABLE_BYTES;
    static constexpr int HIGH_STAGES = TABLE + TABLE_BYTES + (LOW_HEAD ? 0 : HEAD_BYTES);
    static constexpr int RING_END = HIGH_STAGES + (STAGES - LOW_STAGES) * STAGE;
    // Sums of k slices replace the ring: each slice adds up its share of the tokens.
    static constexpr int RECEIVE = HIGH_STAGES;
    static constexpr int RECEIVE_BYTES = SLICES == 1 ? 0 : K_GROUPS * SLICES * SHARE_TILES * BLOCKS * 128 * 16;
    static constexpr int BARRIERS = OUT + OUT_BYTES;
    static constexpr int BYTES = RING_END > RECEIVE + RECEIVE_BYTES ? RING_END : RECEIVE + RECEIVE_BYTES;

    __device__ static __forceinline__ int stage(int i) {
        return i < LOW_STAGES ? LOW_HEAD + i * STAGE : HIGH_STAGES + (i - LOW_STAGES) * STAGE;
    }
};
static_assert(Smem::BYTES == FDK_SHARED_BYTES, "host and device disagree on the shared memory layout");

constexpr int MAX_RANGES = 16;
struct Range {
    int first_tile, first_block, end_block, pad;  // tiles of PAIR * BLOCKS blocks
    i64 first_row, end_row;
};
struct __align__(64) Params {
    u64 x_map[16];       // tensor map of x[m, K] with boxes of 64 columns x TOKENS / PAIR tokens
    const char* codes;   // [B, UNITS, BITS (nested: 8), 32, 4] words
    const char* scales;  // [B * GROUPS + spare, 64]
    const char* zeros;   // [B * GROUPS + spare, 64]
    const u16* table;    // [tables, 2^BITS]
    const u16* bias;     // [N] or null
    u16* out;            // [m, N]
    int m, ranges, row_tiles, token_tiles;
    int band;            // token tiles that neighbouring rows take before the next ones
    int streamed;        // tiles that are cut along k (STREAM)
    u32 zero;            // 0, which the compiler does not know
    f32x4* partial;      // [CTAs, BLOCKS, TOKEN_TILES, 128]: sums of the tile that a share ends, of each thread (STREAM)
    u32* flags;          // [CTAs, BLOCKS]: 1 while they wait to be added up; 0 before and after a launch
    Range range[MAX_RANGES];
};

}  // namespace fdk
