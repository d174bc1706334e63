// out[m, n] = x[m, k] W[n, k]^T + bias for many tokens on Hopper, W in the layout of fdk/packing/fragments.py.
//
// The transposed problem: a warpgroup owns a block of 64 rows of W and FDK_TOKENS tokens. Codes become the A operand of
// wgmma in its registers; x comes to shared memory as the B operand. One more warpgroup fills a ring of stages, one unit of
// 64 columns each, by the copy engine. BLOCKS blocks of rows share a stage of x; K_GROUPS warpgroups share a block of rows
// and take its units in turn. While a unit is multiplied, its warpgroup dequantises its next one.
//
// Scales of groups: on the sums of each group in float32, which costs registers and a multiply-add per sum and group; or,
// with ROUND, on the weights, rounded to 16 bits as dense weights are. A single scale per row waits for the end.
//
// CTAs take tiles (BLOCKS blocks x FDK_TOKENS tokens) in turn, and the copies run ahead into the next tile. In a cluster CTAs
// either share x (PAIR: neighbouring rows, each fetches a part for both) or split k (SPLIT). Slices of k, of a cluster or of
// a CTA, add their sums up through shared memory in the order of k, one tile per CTA. With STREAM the first tiles are cut
// along k into equal shares, one per cluster, so that all clusters are busy to the end: whoever begins a tile adds what
// others leave of it in global memory, in the order of k. No result depends on timing.
//
// The host passes macros (see fdk/kernels/cuda/prefill.py, whose Config.shared_bytes mirrors `Smem`):
//   FDK_N FDK_K FDK_BITS FDK_GROUP FDK_BF16 FDK_KIND FDK_SLICE  as for decode.cuh (not UINT_FLOAT, not sparse)
//   FDK_TOKENS FDK_TOKEN_TILES (= tokens / 8) FDK_BLOCKS FDK_K_GROUPS FDK_STAGES FDK_PAIR FDK_SPLIT
//   FDK_CODES_AHEAD FDK_PARTS FDK_TURNS FDK_ROUND FDK_STREAM FDK_FETCH_SUMS FDK_WIDE FDK_UNROLLED FDK_FRESH
#pragma once
#include "operand.cuh"
#include "wgmma.cuh"

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

// --- barriers and copies ---------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init_count(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier), "r"(rank) : "memory");
}

// racecheck takes an arrival to speak for its own thread alone, whatever has brought the warp together before it. With
// FDK_ALL_ARRIVE, for its sake, each lane arrives (tests/kernels/cuda/sanitize.py).
#ifdef FDK_ALL_ARRIVE
constexpr int ARRIVALS = 32;
#else
constexpr int ARRIVALS = 1;  // of a warp
#endif

// A warp's arrival at the same barrier of each of `COUNT` CTAs.
template <int COUNT>
__device__ __forceinline__ void arrive_at_all(u32 barrier, int lane) {
    if constexpr (ARRIVALS == 1) {
        if (lane < COUNT) barrier_arrive_at(barrier, lane);
    } else {
        for (int rank = 0; rank < COUNT; ++rank) barrier_arrive_at(barrier, rank);
    }
}

// Whether a phase is over, for all lanes of a warp.
__device__ __forceinline__ bool barrier_over(u32 barrier, u32 parity) {
    u32 over;
    asm volatile("{\n.reg .pred over;\nmbarrier.test_wait.parity.shared::cta.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
                 : "=r"(over) : "r"(barrier), "r"(parity) : "memory");
    return __all_sync(0xffffffffu, over);
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// A box of x at (column, token) into shared memory; with a mask, to the same place in every CTA of it.
template <bool MULTICAST>
__device__ __forceinline__ void copy_box(u32 to, const void* map, int column, int token, u32 barrier, u16 mask) {
    if constexpr (MULTICAST)
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
            "l"(map), "r"(column), "r"(token), "r"(barrier), "h"(mask)
            : "memory");
    else
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                     "l"(map), "r"(column), "r"(token), "r"(barrier)
                     : "memory");
}

__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers of this warpgroup's threads from here on: more than at the launch, or fewer.
template <int COUNT, bool MORE>
__device__ __forceinline__ void keep_registers() {
    if constexpr (MORE)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
    else
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Place in the ring.
struct Turn {
    int stage;
    u32 parity;
    int at;  // offset of the stage in shared memory: x, then codes
    __device__ __forceinline__ explicit Turn(int stage = 0, u32 parity = 0) : stage(stage), parity(parity), at(Smem::stage(stage)) {}
    __device__ __forceinline__ void next(int by = 1) {
        stage += by;
        if (stage >= STAGES) stage -= STAGES, parity ^= 1;
        at = Smem::stage(stage);
    }
};

// What a CTA works on: tokens from `token` on, and the blocks of rows from `block` on.
struct Tile {
    int range, block, token;
};

__device__ __forceinline__ Tile tile_at(const Params& p, int index, int rank) {
    // A division takes a hundred clocks, so none that need not be.
    int first = 0, in = index, width = p.token_tiles;
    if (width > p.band) {
        const u32 whole = p.band * p.row_tiles, band = u32(index) / whole;
        first = band * p.band, in -= band * whole, width = min(p.band, width - first);
    }
    const int row = width > 1 ? u32(in) / u32(width) : in;
    int range = 0;
    while (range + 1 < p.ranges && row >= p.range[range + 1].first_tile) ++range;
    const int block = p.range[range].first_block + ((row - p.range[range].first_tile) * PAIR + (PAIR > 1 ? rank : 0)) * BLOCKS;
    return {range, block, (first + in - row * width) * TOKENS};
}

// A run of units of a tile, the whole of it or a part.
struct Work {
    int index, first, end;
};

// What a cluster works on: its share of the tiles that are cut along k, then whole tiles in turn, or its slice of them.
// It counts in one number and works out the rest each time, because registers are scarce.
struct Schedule {
    const Params& p;
    int rank, done;  // units of its share, then whole tiles

    __device__ __forceinline__ Schedule(const Params& p, int rank) : p(p), rank(rank), done(0) {}
    __device__ __forceinline__ static int cluster() { return int(blockIdx.x) / CLUSTER; }
    __device__ __forceinline__ static int clusters() { return int(gridDim.x) / CLUSTER; }
    // Shares run against the order of clusters, so that a CTA waits only for those that were started before it.
    __device__ __forceinline__ static int share() { return clusters() - 1 - cluster(); }
    // First unit of a share, counted over all tiles; a cut close to the end of a tile is moved there.
    __device__ __forceinline__ int cut(int share) const {
        constexpr int LEAST = 4, STEP = UNROLLED ? STAGES : 1;
        const int even = u32(p.streamed * UNITS) * u32(share) / u32(clusters()) / STEP * STEP, over = even % UNITS;
        return over < LEAST ? even - over : over > UNITS - LEAST ? even - over + UNITS : even;
    }
    __device__ __forceinline__ bool next(Work& w) {
        int whole = done;
        if constexpr (STREAM) {
            const int first = cut(share()), end = cut(share() + 1), at = first + done;
            if (at < end) {
                w.index = at / UNITS, w.first = at % UNITS, w.end = min(UNITS, w.first + end - at);
                done += w.end - w.first;
                return true;
            }
            whole = at - end;
        }
        w.index = (STREAM ? p.streamed : 0) + cluster() + whole * clusters();
        w.first = SPLIT == 1 ? 0 : UNITS * rank / SPLIT, w.end = SPLIT == 1 ? UNITS : UNITS * (rank + 1) / SPLIT;
        ++done;
        return w.index < p.row_tiles * p.token_tiles;
    }
    // Sums that a share leaves of a block, and the flag that says so.
    __device__ __forceinline__ static f32x4* partial(const Params& p, int share, int rank, int row_block) {
        return p.partial + (i64(share * PAIR + rank) * BLOCKS + row_block) * TOKEN_TILES * 128;
    }
    __device__ __forceinline__ static u32* flag(const Params& p, int share, int rank, int row_block) {
        return p.flags + (share * PAIR + rank) * BLOCKS + row_block;
    }
};

// First group of a unit's stage, moved down where it would reach past the last group.
__device__ __forceinline__ int staged_group(int unit) {
    const int group = unit * 64 / GROUP;
    if constexpr (SUBS > 1 && 64 % GROUP != 0) return min(group, GROUPS - UNIT_GROUPS);
    return GROUPED ? group : 0;
}

// Sums that wait in global memory past L1, which does not see what other multiprocessors write.
__device__ __forceinline__ f32x4 load_partial(const f32x4* from) {
    f32x4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ void set_flag(u32* flag, u32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ u32 read_flag(const u32* flag) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

// Between what threads write to global memory and what the copy engine reads of it.
__device__ __forceinline__ void global_copies_fence() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// --- producer --------------------------------------------------------------------------------------------------

// Warps of the producer: the first one fetches x, each other one every WEIGHT_WARPS-th block of rows. All lanes run
// the loop, so that addresses are uniform, and one of them issues the copies.
constexpr int WEIGHT_WARPS = BLOCKS < 3 ? BLOCKS : 3;

struct Producer {
    const Params& p;
    u32 smem;
    int rank;

    __device__ __forceinline__ u32 full(int stage) const { return smem + Smem::BARRIERS + stage * 8; }
    __device__ __forceinline__ u32 empty(int stage) const { return full(STAGES + stage); }

    // fetch(tile, unit, stage) for every unit of every tile, once its stage is free; LATEST: and once what the kernel in front
    // writes may be read. fetch_sums(share, i, stage) for the stages of sums behind them.
    template <bool LATEST, class Fetch, class FetchSums>
    __device__ __forceinline__ void run(Fetch fetch, FetchSums fetch_sums) const {
        Turn turn;
        u32 round = 0;
        Schedule schedule(p, rank);
        for (Work work; schedule.next(work);) {
            Tile tile = tile_at(p, work.index, rank);
            if constexpr (LATEST) {
                asm volatile("" : "+r"(tile.token));  // before the wait
                wait_for_previous_kernel();
            }
            for (int unit = work.first; unit < work.end; ++unit) {
                if (round > 0) barrier_wait(empty(turn.stage), turn.parity ^ 1);
                fetch(tile, unit, turn);
                turn.next();
                if (turn.stage == 0) round = 1;
            }
            if (FETCH_SUMS && work.first == 0) {
                for (int other = Schedule::share() + 1; work.end < UNITS && schedule.cut(other) < (work.index + 1) * UNITS; ++other) {
                    if (schedule.cut(other) == schedule.cut(other + 1)) continue;
                    for (int i = 0; i < SUM_STAGES; ++i) {
                        if (round > 0) barrier_wait(empty(turn.stage), turn.parity ^ 1);
                        fetch_sums(other, i, turn);
                        turn.next();
                        if (turn.stage == 0) round = 1;
                    }
                }
            }
        }
    }
    __device__ __forceinline__ void run_x() const {
        constexpr int PART = TOKENS / PAIR;
        const int part = PAIR > 1 ? rank * PART : 0;
        run<true>([&](const Tile& tile, int unit, const Turn& turn) {
            if (elected()) {
                const u32 barrier = full(turn.stage);
                barrier_expect(barrier, Smem::X_BYTES);
                copy_box<(PAIR > 1)>(smem + turn.at + part * 128, p.x_map, unit * 64, tile.token + part, barrier, (1 << PAIR) - 1);
            }
        }, [&](int, int, const Turn& turn) {
            if (elected()) barrier_arrive(full(turn.stage));
        });
    }
    __device__ __forceinline__ void run_weights(int which) const {
        const u64 policy = evict_first_policy();
        run<FRESH>([&](const Tile& tile, int unit, const Turn& turn) {
            const int last = p.range[tile.range].end_block - 1;
            const int mine = BLOCKS % WEIGHT_WARPS == 0 ? BLOCKS / WEIGHT_WARPS : (BLOCKS - which + WEIGHT_WARPS - 1) / WEIGHT_WARPS;
            if (elected()) {
                const u32 barrier = full(turn.stage);
                barrier_expect(barrier, mine * Smem::BLOCK_BYTES);
#pragma unroll
                for (int i = 0; i < BLOCKS; i += WEIGHT_WARPS) {
                    const int w = which + i;
                    if (i > 0 && w >= BLOCKS) break;
                    // Past the last block its neighbour is repeated; nothing of it is written.
                    const i64 block = min(tile.block + w, last);
                    const u32 to = smem + turn.at + Smem::CODES + w * Smem::BLOCK_BYTES;
                    const char* const from = p.codes + (block * UNITS + unit) * Smem::UNIT_STRIDE;
                    copy_bulk(to, from, Smem::CODE_BYTES, barrier, policy);
                    if constexpr (Smem::STAGED_GROUPS > 0) {
                        const i64 group = block * GROUPS + staged_group(unit);
                        copy_bulk(to + Smem::SCALES, p.scales + group * 128, Smem::STAGED_GROUPS * 128, barrier, policy);
                        if constexpr (ZEROS)
                            copy_bulk(to + Smem::ZEROS_AT, p.zeros + group * 64, Smem::STAGED_GROUPS * 64, barrier, policy);
                    }
                }
            }
        }, [&](int share, int i, const Turn& turn) {
            static_assert(!FETCH_SUMS || WEIGHT_WARPS == BLOCKS, "each of these warps has one block");
            if (elected()) {
                if (i == 0) {
                    wait_for_previous_kernel();
                    u32* const left = Schedule::flag(p, share, rank, which);
                    while (read_flag(left) == 0) {
                    }
                    set_flag(left, 0);
                    global_copies_fence();
                }
                const u32 barrier = full(turn.stage), bytes = min(SUM_TILES, TOKEN_TILES - i * SUM_TILES) * 128 * 16;
                barrier_expect(barrier, bytes);
                const f32x4* const from = Schedule::partial(p, share, rank, which) + i * SUM_TILES * 128;
                copy_bulk(smem + turn.at + which * SUM_TILES * 128 * 16, from, bytes, barrier, policy);
            }
        });
    }
};

// --- consumers -------------------------------------------------------------------------------------------------

// A part of a unit as the A operand, with the scales of this lane's rows g and g + 8.
struct Operand {
    u32 a[4 / PARTS][4];
    float scale[LATE ? SUBS : 1][2];
};

// What a lane has of a unit: its codes, and scales and zero points of its two rows.
struct Codes {
    u32 words[4 * BITS];
    u32 scale[GROUPED ? SUBS : 1], zero[ZEROS ? SUBS : 1];
};

// A lane's words of row tile r lie at word r*BITS + i of the unit, four words to a piece of 512 bytes; those of planes at
// word r of every piece.
struct WordOffsets {
    static constexpr int WIDTH = NESTED ? 1 : BITS % 4 == 0 ? 4 : BITS % 2 == 0 ? 2 : 1, COUNT = BITS / WIDTH;
    u32 at[COUNT];
    __device__ __forceinline__ WordOffsets(int r, int lane) {
#pragma unroll
        for (int i = 0; i < COUNT && NESTED; ++i) at[i] = i * 512 + lane * 16 + r * 4;
#pragma unroll
        for (int i = 0; i < COUNT && !NESTED; ++i) at[i] = (r * BITS + i * WIDTH) / 4 * 512 + lane * 16 + (r * BITS + i * WIDTH) % 4 * 4;
    }
};

__device__ __forceinline__ void load_words(u32 (&words)[4 * BITS], const char* codes, const WordOffsets& offsets) {
#pragma unroll
    for (int i = 0; i < WordOffsets::COUNT; ++i) {
        const char* from = codes + offsets.at[i];
        if constexpr (WordOffsets::WIDTH == 4) {
            const u32x4 v = *reinterpret_cast<const u32x4*>(from);
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        } else if constexpr (WordOffsets::WIDTH == 2) {
            const u32x2 v = *reinterpret_cast<const u32x2*>(from);
            words[2 * i] = v.x, words[2 * i + 1] = v.y;
        } else {
            words[NESTED ? 4 * i : i] = *reinterpret_cast<const u32*>(from);
        }
    }
}

__device__ __forceinline__ u32 multiply_pair(u32 a, u32 b) {
    u32 d;
    if constexpr (BF16)
        asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    else
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// Unit number `unit` of a block from its stage to registers.
__device__ __forceinline__ void load_codes(Codes& c, const char* block, const WordOffsets& offsets, int unit, int r, int g) {
    load_words(c.words, block, offsets);
    if constexpr (Smem::STAGED_GROUPS > 0) {
#pragma unroll
        for (int sub = 0; sub < SUBS; ++sub) {
            int group = 0;
            if constexpr (SUBS > 1) group = (unit * 64 + sub * (64 / SUBS)) / GROUP - staged_group(unit);
            // Columns past K have no group of their own; any finite scale will do, because their activations are zero.
            if constexpr (SUBS > 1 && K % 64 != 0) group = min(group, UNIT_GROUPS - 1);
            if constexpr (GROUPED) c.scale[sub] = *reinterpret_cast<const u32*>(block + Smem::SCALES + group * 128 + g * 16 + r * 4);
            if constexpr (ZEROS) c.zero[sub] = *reinterpret_cast<const u16*>(block + Smem::ZEROS_AT + group * 64 + g * 8 + r * 2);
        }
    }
}

// Part `part` of a unit's codes as values: of a table, or integers less their zero point; with ROUND times their scale.
__device__ __forceinline__ void expand(Operand& o, const Codes& c, int part, const Lookup& lookup) {
    constexpr int COUNT = 4 / PARTS;
    const int first = part * COUNT;
    u32 a[4][4];  // what other parts hold of it is not computed
    if constexpr (NESTED)
        dequantise_planes<BITS, FDK_SLICE, KIND == kind::CUT, BF16>(a, c.words, 0, lookup);
    else if constexpr (INTEGERS)
        to_integers<BITS, BF16>(a, c.words, 0);
    else
        dequantise<BITS, BF16, BITS == 1, WIDE>(a, c.words, 0, lookup);
#pragma unroll
    for (int s = 0; s < COUNT; ++s) {
        const int sub = (first + s) / STEPS;
        u32 zero[2] = {}, scale[2] = {};
        if constexpr (ZEROS) {
            // Differences of integers below 2^8 are exact in 16 bits.
            constexpr float CENTRE = INTEGERS ? 1 << (BITS - 1) : 0;
            zero[0] = round_half<BF16>(float(c.zero[sub] & 0xff) - CENTRE) * 0x10001u;
            zero[1] = round_half<BF16>(float(c.zero[sub] >> 8) - CENTRE) * 0x10001u;
        }
        if constexpr (GROUPED && ROUND)
            scale[0] = __byte_perm(c.scale[sub], 0, 0x1010), scale[1] = __byte_perm(c.scale[sub], 0, 0x3232);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 v = a[first + s][i];
            if constexpr (ZEROS) v = subtract_pair<BF16>(v, zero[i % 2]);
            if constexpr (GROUPED && ROUND) v = multiply_pair(v, scale[i % 2]);
            o.a[s][i] = v;
        }
    }
    if constexpr (LATE) {
#pragma unroll
        for (int sub = 0; sub < SUBS; ++sub) o.scale[sub][0] = low_half<BF16>(c.scale[sub]), o.scale[sub][1] = high_half<BF16>(c.scale[sub]);
    }
}

// Two tiles of 8 rows x 8 tokens, transposed: 8 rows of one token are contiguous. Lanes 0 to 15 name the tokens' places.
__device__ __forceinline__ void store_transposed(u32 to, u32 a, u32 b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}

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

extern "C" __global__ void __launch_bounds__(THREADS, 1) fdk_prefill(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) char smem[];
    const u32 base = shared_address(smem);
    if (base % 1024 != 0 || (Smem::TABLE_BYTES && ((base + Smem::TABLE) & (Smem::TABLE_BYTES - 1)) != 0)) __trap();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int rank = CLUSTER == 1 ? 0 : int(cluster_rank());
    const u32 full = base + Smem::BARRIERS, empty = full + STAGES * 8, loops_done = empty + STAGES * 8;
    const auto arrived = [&](int warpgroup, int chunk) { return loops_done + 8 + (warpgroup * Smem::OUT_CHUNKS + chunk) * 8; };
    u16 table_value = 0;  // of code lane % 2^BITS
    if (LANE_TABLE && p.ranges == 1) table_value = load_2(p.table + lane % (1 << BITS));
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init_count(full + stage * 8, 1 + WEIGHT_WARPS);
            barrier_init_count(empty + stage * 8, PAIR * BLOCKS * 4 * ARRIVALS);
        }
        if constexpr (Smem::MEETING_BARRIERS > 0) {
            barrier_init_count(loops_done, SPLIT * WARPGROUPS * 4 * ARRIVALS);
            for (int i = 0; i < WARPGROUPS * Smem::OUT_CHUNKS; ++i) barrier_init_count(arrived(0, i), 1);
        }
        barrier_init_fence();
    }
    let_next_kernel_start();
    if constexpr (CLUSTER > 1) cluster_arrive_relaxed();
    __syncthreads();
    if constexpr (PAIR > 1) cluster_wait();  // CTAs that split k need each other's barriers only at the end

    if (warp >= CONSUMERS / 32) {
        keep_registers<PRODUCER_REGISTERS, false>();
        const Producer producer = {p, base, rank};
        const int role = warp - CONSUMERS / 32;
        if (role == 0) {
            producer.run_x();
        } else if (role <= WEIGHT_WARPS) {
            producer.run_weights(role - 1);
        }
        __syncwarp();
        // Nobody leaves while others may still write to its shared memory.
        if constexpr (PAIR > 1) cluster_arrive();
        if constexpr (CLUSTER > 1) cluster_wait();
    } else {
        keep_registers<CONSUMER_REGISTERS, true>();
        const int group_index = warp / 4, k_group = group_index / BLOCKS, row_block = group_index % BLOCKS;
        const int r = warp % 4, g = lane / 4, thread = threadIdx.x % 128;
        const WordOffsets offsets(r, lane);
        char* const staged = smem + Smem::OUT + group_index * Smem::CHUNK * Smem::OUT_STRIDE;
        const u32 lane_offset = BITS == 2 ? lane % 16 * 8 : lane * 4;
        Lookup lookup = {(base + Smem::TABLE + lane_offset) ^ p.zero, 0, 0, 0, 0, 0, p.zero};
        int range_of_table = -1;
        Turn turn(k_group);
        if constexpr (Smem::MEETING_BARRIERS > 0) {
            // What comes before is counted, too.
            if (thread < Smem::OUT_CHUNKS) {
                const int share = rank * K_GROUPS + k_group, first = thread * (Smem::CHUNK / 8);
                const int tiles = min(Smem::SHARE_TILES, TOKEN_TILES - share * Smem::SHARE_TILES) - first;
                barrier_expect(arrived(group_index, thread), max(0, min(tiles, Smem::CHUNK / 8)) * (SLICES - 1) * 128 * 16);
            }
        }
        if (TURNS && group_index == WARPGROUPS - 1) named_barrier_arrive(FIRST_TURN, 256);

        // Sums left in global memory are announced some units later, when they have arrived there.
        bool owes = false;
        const auto announce = [&] {
            if (STREAM && owes) {
                __threadfence();
                if constexpr (FETCH_SUMS) global_copies_fence();
                named_barrier(1 + group_index, 128);
                if (thread == 0) set_flag(Schedule::flag(p, Schedule::share(), rank, row_block), 1);
                owes = false;
            }
        };
        Schedule schedule(p, rank);
        for (Work work; schedule.next(work);) {
            const int first_unit = work.first, end_unit = work.end;
            if (const int range = p.ranges == 1 ? 0 : tile_at(p, work.index, rank).range; range != range_of_table) {
                const u16* table = p.table + (range << BITS);
                if (LANE_TABLE && p.ranges > 1) table_value = load_2(table + lane % (1 << BITS));
                const auto entry = [&](int code) -> u16 {
                    if constexpr (LANE_TABLE) return __shfl_sync(0xffffffffu, u32(table_value), code);
                    if constexpr (TABLE) return table[code];
                    return round_half<BF16>(float(KIND == kind::INT ? code - (1 << (BITS - 1)) : code));
                };
                if constexpr (BITS == 1) {
                    lookup.low = entry(0) * 0x10001u, lookup.differ = u32(entry(0) ^ entry(1)) * 0x10001u;
                } else if constexpr (!NESTED && !INTEGERS) {
                    if (range_of_table >= 0) named_barrier(WARPGROUPS + 1, CONSUMERS);
                    if constexpr (LANE_TABLE)
                        fill_table_from_lanes<BITS, CONSUMERS / 32, WIDE>(smem + Smem::TABLE, warp, lane, table_value);
                    else
                        fill_table<BITS, CONSUMERS / 32, WIDE>(smem + Smem::TABLE, warp, lane, entry);
                    named_barrier(WARPGROUPS + 1, CONSUMERS);
                }
                range_of_table = range;
            }
            float d[TOKENS / 2], acc[LATE ? TOKENS / 2 : 1];
#pragma unroll
            for (int i = 0; i < (LATE ? TOKENS / 2 : 1); ++i) acc[i] = 0.f;
            if constexpr (!LATE) {
#pragma unroll
                for (int i = 0; i < TOKENS / 2; ++i) d[i] = 0.f;
            }
            Operand units[2];
            Codes codes;

            const auto block_at = [&](const Turn& turn) { return smem + turn.at + Smem::CODES + row_block * Smem::BLOCK_BYTES; };
            const auto release = [&](int stage) {
                __syncwarp();
                if constexpr (PAIR > 1) {
                    arrive_at_all<PAIR>(empty + stage * 8, lane);
                } else {
                    if (lane < ARRIVALS) barrier_arrive(empty + stage * 8);
                }
            };
            const auto issue = [&](Operand& u, const Turn& turn, int run, bool fresh) {
                const u64 x = UNROLLED ? b_descriptor(base) + turn.at / 16 : b_descriptor(base + turn.at);
                if constexpr (TURNS) named_barrier(FIRST_TURN + group_index, 256);
                wgmma_fence();
                constexpr int COUNT = 4 / (ISSUES * PARTS);
                const int first = PARTS == 1 ? run * COUNT : 0;
#pragma unroll
                for (int s = 0; s < COUNT; ++s) wgmma(d, u.a[first + s], x + 2 * (run * COUNT + s), !(fresh && s == 0));
                wgmma_commit();
                if constexpr (TURNS) named_barrier_arrive(FIRST_TURN + (group_index + 1) % WARPGROUPS, 256);
            };
            const auto add_scaled = [&](const Operand& u, int run) {
                if constexpr (LATE) {
#pragma unroll
                    for (int i = 0; i < TOKENS / 2; ++i) acc[i] = fmaf(u.scale[run][i / 2 % 2], d[i], acc[i]);
                }
            };
            const auto fetch = [&](const Turn& at, int unit) {
                // Where a stage goes from one k group to another, this one may come before the other's copies have: parity
                // alone would take that for the round before. What the other gives back, it has waited for.
                if constexpr (STAGES % K_GROUPS != 0) barrier_wait(empty + at.stage * 8, at.parity ^ 1);
                barrier_wait(full + at.stage * 8, at.parity);
                load_codes(codes, block_at(at), offsets, unit, r, g);
            };
            const auto load = [&](Operand& u, const Turn& at, int unit) {
                fetch(at, unit);
                expand(u, codes, 0, lookup);
            };
            const auto finish = [&] {
                wgmma_wait<0>();
                pin(d);
            };
            // With several k groups neighbouring units are other warpgroups'.
            const auto fresh_at = [&](int unit) {
                return LATE && (K_GROUPS > 1 || SUBS > 1 || unit % GROUP_UNITS == 0 || unit == first_unit);
            };
            const auto scaled_at = [&](int unit) {
                return GROUP_UNITS == 1 || K_GROUPS > 1 || unit + 1 == end_unit || unit % GROUP_UNITS == GROUP_UNITS - 1;
            };
            const int begin = first_unit + k_group;

            if constexpr (UNROLLED) {
                // The places of this warpgroup's units in a round of the ring.
                constexpr int PLACES = STAGES / K_GROUPS;
                const auto place = [&](int i) {
                    Turn at(i * K_GROUPS + k_group);
                    at.parity = turn.parity;
                    return at;
                };
                load(units[0], place(0), begin);
                bool fetched = false;  // whether `codes` are those of the next unit already
                for (int unit = begin; unit < end_unit; unit += STAGES) {
#pragma unroll
                    for (int i = 0; i < PLACES; ++i) {
                        const int current = unit + i * K_GROUPS, next = (i + 1) % PLACES;
                        Operand &now = units[PARTS == 1 && i % 2], &other = units[PARTS == 2 || i % 2 == 0];
#pragma unroll
                        for (int run = 0; run < ISSUES; ++run) {
                            issue(now, place(i), run, fresh_at(current));
                            if (run == 0) {
                                // Without sums to scale, the next unit is queued behind this one.
                                if constexpr (!LATE) {
                                    wgmma_wait<1>();
                                    if (i > 0 || unit > begin) release(place((i + PLACES - 1) % PLACES).stage);
                                }
                                if constexpr (PARTS == 2) {
                                    expand(other, codes, 1, lookup);
                                    issue(other, place(i), 1, false);
                                    wgmma_wait<1>();
                                }
                                if (i == PLACES - 1) turn.parity ^= 1;
                                const auto more = [&](int by) {
                                    return RAGGED ? current + by * K_GROUPS < end_unit : i + by < PLACES || unit + STAGES < end_unit;
                                };
                                if constexpr (CODES_AHEAD) {
                                    if (more(1) && !fetched) fetch(place(next), current + K_GROUPS);
                                    Turn later = place((i + 2) % PLACES);
                                    if (i == PLACES - 2) later.parity ^= 1;
                                    // Asked before the look-ups and known behind them; what is not there yet is waited for in its turn.
                                    fetched = more(2) && barrier_over(full + later.stage * 8, later.parity);
                                    if (more(1)) expand(other, codes, 0, lookup);
                                    if (fetched) load_codes(codes, block_at(later), offsets, current + 2 * K_GROUPS, r, g);
                                } else if (more(1)) {
                                    load(PARTS == 1 ? other : now, place(next), current + K_GROUPS);
                                }
                            }
                            if constexpr (LATE) {
                                finish();
                                if (scaled_at(current)) add_scaled(now, run);
                            }
                        }
                        if constexpr (LATE) release(place(i).stage);
                        if (RAGGED && current + K_GROUPS >= end_unit) break;
                    }
                    if (unit > begin) announce();
                }
                if constexpr (!LATE) {
                    finish();
                    if constexpr (!RAGGED) release(place(PLACES - 1).stage);
                }
            } else if constexpr (PARTS == 2) {
                if (begin < end_unit) load(units[0], turn, begin);
                int last_stage = -1;  // of the unit before this one, not yet given back
                for (int unit = begin; unit < end_unit; unit += K_GROUPS) {
                    if (unit == begin + 4) announce();
                    issue(units[0], turn, 0, false);
                    wgmma_wait<1>();
                    if (last_stage >= 0) release(last_stage);
                    expand(units[1], codes, 1, lookup);
                    issue(units[1], turn, 1, false);
                    wgmma_wait<1>();
                    last_stage = turn.stage;
                    turn.next(K_GROUPS);
                    if (unit + K_GROUPS < end_unit) load(units[0], turn, unit + K_GROUPS);
                }
                finish();
                if (last_stage >= 0) release(last_stage);
            } else if (begin < end_unit) {
                load(units[0], turn, begin);
                int last_stage = -1;  // of the unit before this one, not yet given back
                const auto multiply = [&](Operand& u, Operand& other, int unit) {
                    Turn next = turn;
                    next.next(K_GROUPS);
                    const bool more = unit + K_GROUPS < end_unit;
#pragma unroll
                    for (int run = 0; run < ISSUES; ++run) {
                        issue(u, turn, run, fresh_at(unit));
                        if (run == 0) {
                            // Without sums to scale, the next unit is queued behind this one.
                            if constexpr (!LATE) wgmma_wait<1>();
                            if (last_stage >= 0) release(last_stage);
                            if (more) load(other, next, unit + K_GROUPS);
                        }
                        if constexpr (LATE) {
                            finish();
                            if (scaled_at(unit)) add_scaled(u, run);
                        }
                    }
                    last_stage = turn.stage;
                    turn = next;
                };
                for (int unit = begin; unit < end_unit; unit += 2 * K_GROUPS) {
                    if (unit == begin + 4) announce();
                    multiply(units[0], units[1], unit);
                    if (unit + K_GROUPS < end_unit) multiply(units[1], units[0], unit + K_GROUPS);
                }
                finish();
                release(last_stage);
            }
            if constexpr (TURNS && K_GROUPS > 1) {
                // A warpgroup without a unit in the last round still passes its turn on.
                if ((end_unit - first_unit) % K_GROUPS != 0 && k_group >= (end_unit - first_unit) % K_GROUPS) {
#pragma unroll
                    for (int i = 0; i < ISSUES; ++i) {
                        named_barrier(FIRST_TURN + group_index, 256);
                        named_barrier_arrive(FIRST_TURN + (group_index + 1) % WARPGROUPS, 256);
                    }
                }
            }

            const auto sum = [&](int i) -> float& { return LATE ? acc[LATE ? i : 0] : d[i]; };
            announce();
            if constexpr (STREAM) {
                const int share = schedule.share();
                const auto partial = [&](int share) { return Schedule::partial(p, share, rank, row_block) + thread; };
                const auto flag = [&](int share) { return Schedule::flag(p, share, rank, row_block); };
                if (first_unit > 0) {
                    // Whoever begins this tile adds it up.
                    wait_for_previous_kernel();
                    f32x4* const to = partial(share);
#pragma unroll
                    for (int j = 0; j < TOKEN_TILES; ++j) {
                        const int at = 4 * j;
                        to[j * 128] = {sum(at), sum(at + 1), sum(at + 2), sum(at + 3)};
                    }
                    owes = true;
                    continue;
                }
                for (int other = share + 1; end_unit < UNITS && schedule.cut(other) < (work.index + 1) * UNITS; ++other) {
                    if (schedule.cut(other) == schedule.cut(other + 1)) continue;
                    if constexpr (FETCH_SUMS) {
#pragma unroll
                        for (int i = 0; i < SUM_STAGES; ++i) {
                            if constexpr (UNROLLED) turn = Turn(i % STAGES, turn.parity);
                            barrier_wait(full + turn.stage * 8, turn.parity);
                            const f32x4* const from = reinterpret_cast<const f32x4*>(smem + turn.at) + row_block * SUM_TILES * 128 + thread;
#pragma unroll
                            for (int j = i * SUM_TILES; j < (i + 1) * SUM_TILES && j < TOKEN_TILES; ++j) {
                                const f32x4 v = from[(j - i * SUM_TILES) * 128];
                                const int at = 4 * (j % TOKEN_TILES);
                                sum(at) += v.x, sum(at + 1) += v.y, sum(at + 2) += v.z, sum(at + 3) += v.w;
                            }
                            pin(d);  // added up before more of them are loaded
                            release(turn.stage);
                            if constexpr (!UNROLLED)
                                turn.next();
                            else if (i % STAGES == STAGES - 1)
                                turn = Turn(0, turn.parity ^ 1);
                        }
                        continue;
                    }
                    if (thread == 0) {
                        wait_for_previous_kernel();
                        while (read_flag(flag(other)) == 0) {
                        }
                        set_flag(flag(other), 0);
                    }
                    named_barrier(1 + group_index, 128);
                    const f32x4* const from = partial(other);
                    constexpr int FREE = (CONSUMER_REGISTERS - TOKENS / 2 - 40) / 4, BATCH = FREE < 2 ? 2 : FREE > 16 ? 16 : FREE;
#pragma unroll
                    for (int first = 0; first < TOKEN_TILES; first += BATCH) {
                        f32x4 v[BATCH];
#pragma unroll
                        for (int j = first; j < first + BATCH && j < TOKEN_TILES; ++j) v[j - first] = load_partial(from + j * 128);
#pragma unroll
                        for (int j = first; j < first + BATCH && j < TOKEN_TILES; ++j) {
                            const int at = 4 * j;
                            sum(at) += v[j - first].x, sum(at + 1) += v[j - first].y;
                            sum(at + 2) += v[j - first].z, sum(at + 3) += v[j - first].w;
                        }
                    }
                }
            }
            const int slice = rank * K_GROUPS + k_group;
            if constexpr (SLICES > 1) {
                // Nobody's ring is in use any more.
                if constexpr (SPLIT > 1) {
                    __syncwarp();
                    cluster_wait();  // since the start: others have their barriers
                    arrive_at_all<SPLIT>(loops_done, lane);
                    barrier_wait(loops_done, 0);
                } else {
                    named_barrier(WARPGROUPS + 1, CONSUMERS);
                }
#pragma unroll
                for (int me = 0; me < SLICES; ++me) {
                    if (slice != me) continue;
#pragma unroll
                    for (int j = 0; j < TOKEN_TILES; ++j) {
                        const int to = j / Smem::SHARE_TILES, in = j % Smem::SHARE_TILES, chunk = in / (Smem::CHUNK / 8);
                        if (to == me) continue;
                        const int at = (to % K_GROUPS * SLICES + me) * Smem::SHARE_TILES + in;
                        const int offset = Smem::RECEIVE + ((at * BLOCKS + row_block) * 128 + thread) * 16;
                        const f32x4 v = {sum(4 * j), sum(4 * j + 1), sum(4 * j + 2), sum(4 * j + 3)};
                        if constexpr (SPLIT > 1)
                            store_counted(base + offset, arrived(to % K_GROUPS * BLOCKS + row_block, chunk), to / K_GROUPS, v);
                        else
                            *reinterpret_cast<f32x4*>(smem + offset) = v;
                    }
                    // Its own share from here on at the same place in every slice.
#pragma unroll
                    for (int i = 0; i < 4 * Smem::SHARE_TILES && me * 4 * Smem::SHARE_TILES + i < TOKENS / 2; ++i)
                        sum(i) = sum(me * 4 * Smem::SHARE_TILES + i);
                }
                if constexpr (SPLIT == 1) named_barrier(WARPGROUPS + 1, CONSUMERS);
            }
            // Worked out here and not in front of the loop, whose registers are scarce.
            int index = work.index;
            asm volatile("" : "+r"(index));
            const Tile tile = tile_at(p, index, rank);
            const Range& range = p.range[tile.range];
            wait_for_previous_kernel();

            const int block = tile.block + row_block;
            // Rows g and g + 8 of the warp's row tile; rows past the range are computed and not written.
            float bias[2] = {}, scale[2] = {1.f, 1.f};
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const i64 row = range.first_row + i64(block - range.first_block) * 64 + r * 16 + h * 8 + g;
                if (p.bias && block < range.end_block && row < range.end_row) bias[h] = low_half<BF16>(p.bias[row]);
                if constexpr (!GROUPED) {
                    const i64 stored = min(block, range.end_block - 1);
                    const u16 bits = reinterpret_cast<const u16*>(p.scales)[stored * 64 + g * 8 + r * 2 + h];
                    scale[h] = low_half<BF16>(bits);
                }
            }
            constexpr int MINE = SLICES == 1 ? TOKEN_TILES : Smem::SHARE_TILES, CHUNK_TILES = Smem::CHUNK / 8;
            const int first_token = tile.token + (SLICES == 1 ? 0 : slice * Smem::SHARE_TILES * 8);
#pragma unroll
            for (int first = 0; first < MINE; first += CHUNK_TILES) {
                if (first > 0) named_barrier(1 + group_index, 128);
                if constexpr (Smem::MEETING_BARRIERS > 0) barrier_wait(arrived(group_index, first / CHUNK_TILES), 0);
                if constexpr (SLICES > 1) {
                    // In the order of k; of two slices, which of them comes first makes no difference.
                    f32x4 total[CHUNK_TILES] = {};
#pragma unroll
                    for (int source = SLICES == 2; source < SLICES; ++source) {
                        const int other = SLICES == 2 ? 1 - slice : source;
                        f32x4 v[CHUNK_TILES];
#pragma unroll
                        for (int i = 0; i < CHUNK_TILES && first + i < MINE; ++i) {
                            const int j = 4 * (first + i), at = (k_group * SLICES + other) * Smem::SHARE_TILES + first + i;
                            if (SLICES > 2 && other == slice)
                                v[i] = {sum(j), sum(j + 1), sum(j + 2), sum(j + 3)};
                            else
                                v[i] = *reinterpret_cast<const f32x4*>(smem + Smem::RECEIVE + ((at * BLOCKS + row_block) * 128 + thread) * 16);
                        }
#pragma unroll
                        for (int i = 0; i < CHUNK_TILES && first + i < MINE; ++i)
                            total[i] = {total[i].x + v[i].x, total[i].y + v[i].y, total[i].z + v[i].z, total[i].w + v[i].w};
                    }
#pragma unroll
                    for (int i = 0; i < CHUNK_TILES && first + i < MINE; ++i) {
                        const int j = 4 * (first + i);
                        const auto put = [&](int c, float v) { sum(j + c) = SLICES == 2 ? sum(j + c) + v : v; };
                        put(0, total[i].x), put(1, total[i].y), put(2, total[i].z), put(3, total[i].w);
                    }
                }
#pragma unroll
                for (int j = first; j < first + CHUNK_TILES && j < MINE; ++j) {
                    const int at = 4 * (j % TOKEN_TILES);
                    const u32 upper = round_pair<BF16>(fmaf(sum(at), scale[0], bias[0]), fmaf(sum(at + 1), scale[0], bias[0]));
                    const u32 lower = round_pair<BF16>(fmaf(sum(at + 2), scale[1], bias[1]), fmaf(sum(at + 3), scale[1], bias[1]));
                    const u32 to = shared_address(staged) + ((j - first) * 8 + lane % 8) * Smem::OUT_STRIDE;
                    store_transposed(to + r * 32 + lane / 8 % 2 * 16, upper, lower);
                }
                named_barrier(1 + group_index, 128);
                const int count = min(CHUNK_TILES, MINE - first) * 8;
                // The last share may be short.
                const bool even = TOKEN_TILES % SLICES == 0;
                const int limit = even ? count : tile.token + TOKENS - first_token - first * 8;
                write_block(p, range, block, staged, first_token + first * 8, min(count, limit), thread);
            }
            if constexpr (SLICES > 1) break;  // one tile
            named_barrier(1 + group_index, 128);
        }
        announce();
        if constexpr (PAIR > 1) {
            cluster_arrive();
            cluster_wait();
        }
    }
}

}  // namespace fdk
