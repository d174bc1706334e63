// What becomes of a warpgroup's sums of a tile before they are outputs: shares of the tile meet through global memory, slices of
// k through shared memory, both in the order of k.
#pragma once
#include "prefill_ring.cuh"
#include "prefill_schedule.cuh"
#include "wgmma.cuh"

namespace fdk {

// Of a lane: sums[4j + 2h + c] is row g + 8h of the warp's row tile, token 2t + c of tile j, as in wgmma.cuh.
using Sums = float[TOKENS / 2];

// What scaled sums are added to where scales of groups multiply sums, else not used.
using ScaledSums = float[LATE ? TOKENS / 2 : 1];

__device__ __forceinline__ void clear(Sums& d, ScaledSums& acc) {
#pragma unroll
    for (int i = 0; i < (LATE ? TOKENS / 2 : 1); ++i) acc[i] = 0.f;
    if constexpr (!LATE) {
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) d[i] = 0.f;
    }
}

// The sums of the tile once all its units are multiplied.
__device__ __forceinline__ auto& final_sums(Sums& d, ScaledSums& acc) {
    if constexpr (LATE)
        return acc;
    else
        return d;
}

__device__ __forceinline__ void add_sums(Sums& sums, const int& tile, const f32x4& v) {
    const int at = 4 * tile;
    sums[at] += v.x, sums[at + 1] += v.y, sums[at + 2] += v.z, sums[at + 3] += v.w;
}

// --- shares of a tile, through global memory -------------------------------------------------------------------

// What whoever began the tile adds.
__device__ __forceinline__ void leave_sums(f32x4* const& to, const Sums& sums) {
#pragma unroll
    for (int j = 0; j < TOKEN_TILES; ++j) {
        const int at = 4 * j;
        to[j * 128] = {sums[at], sums[at + 1], sums[at + 2], sums[at + 3]};
    }
}

// Says that they are there: some units after they were left, when they have arrived.
__device__ __forceinline__ void announce_sums(const Params& p, const Consumer& me) {
    __threadfence();
    if constexpr (FETCH_SUMS) global_copies_fence();
    me.meet();
    if (me.thread == 0) set_flag(Schedule::flag(p, Schedule::share(), me.rank, me.row_block), 1);
}

// What another share has left of the tile, as the producer brings it behind the tile's units.
__device__ __forceinline__ void add_share_from_ring(Sums& sums, const Consumer& me, const char* const& smem, const Barriers& barriers,
                                                    Turn& turn) {
#pragma unroll
    for (int i = 0; i < SUM_STAGES; ++i) {
        if constexpr (UNROLLED) turn = Turn(i % STAGES, turn.parity);
        barrier_wait(barriers.full(turn.stage), turn.parity);
        const f32x4* const from = reinterpret_cast<const f32x4*>(smem + turn.at) + me.row_block * SUM_TILES * 128 + me.thread;
#pragma unroll
        for (int j = i * SUM_TILES; j < (i + 1) * SUM_TILES && j < TOKEN_TILES; ++j) {
            const f32x4 v = from[(j - i * SUM_TILES) * 128];
            add_sums(sums, j % TOKEN_TILES, v);
        }
        pin(sums);  // added up before more of them are loaded
        barriers.release(turn.stage, me.lane);
        if constexpr (!UNROLLED)
            turn.next();
        else if (i % STAGES == STAGES - 1)
            turn = Turn(0, turn.parity ^ 1);
    }
}

// --- slices of k, through shared memory ------------------------------------------------------------------------

// Tiles of 8 tokens that a warpgroup writes, and how many of them at a time.
constexpr int MINE = SLICES == 1 ? TOKEN_TILES : Smem::SHARE_TILES, CHUNK_TILES = Smem::CHUNK / 8;

// Before the first unit: how many bytes each chunk of this warpgroup's outputs waits for.
__device__ __forceinline__ void expect_slices(const Consumer& me, const Barriers& barriers) {
    if constexpr (Smem::MEETING_BARRIERS > 0) {
        // What comes before is counted, too.
        if (me.thread < Smem::OUT_CHUNKS) {
            const int share = me.slice(), first = me.thread * (Smem::CHUNK / 8);
            const int tiles = min(Smem::SHARE_TILES, TOKEN_TILES - share * Smem::SHARE_TILES) - first;
            barrier_expect(barriers.arrived(me.group_index, me.thread), max(0, min(tiles, Smem::CHUNK / 8)) * (SLICES - 1) * 128 * 16);
        }
    }
}

// Nobody's ring is in use any more behind this.
__device__ __forceinline__ void wait_for_loops(const Consumer& me, const Barriers& barriers) {
    if constexpr (SPLIT > 1) {
        __syncwarp();
        cluster_wait();  // since the start: others have their barriers
        arrive_at_all<SPLIT>(barriers.loops_done(), me.lane);
        barrier_wait(barriers.loops_done(), 0);
    } else {
        named_barrier(WARPGROUPS + 1, CONSUMERS);
    }
}

// Each slice gets all others' sums of its share of the tokens.
__device__ __forceinline__ void send_slices(Sums& sums, const Consumer& me, const int& slice, char* smem, const Barriers& barriers) {
#pragma unroll
    for (int mine = 0; mine < SLICES; ++mine) {
        if (slice != mine) continue;
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j) {
            const int to = j / Smem::SHARE_TILES, in = j % Smem::SHARE_TILES, chunk = in / (Smem::CHUNK / 8);
            if (to == mine) continue;
            const int at = (to % K_GROUPS * SLICES + mine) * Smem::SHARE_TILES + in;
            const int offset = Smem::RECEIVE + ((at * BLOCKS + me.row_block) * 128 + me.thread) * 16;
            const f32x4 v = {sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]};
            if constexpr (SPLIT > 1)
                store_counted(barriers.base + offset, barriers.arrived(to % K_GROUPS * BLOCKS + me.row_block, chunk), to / K_GROUPS, v);
            else
                *reinterpret_cast<f32x4*>(smem + offset) = v;
        }
        // Its own share from here on at the same place in every slice.
#pragma unroll
        for (int i = 0; i < 4 * Smem::SHARE_TILES && mine * 4 * Smem::SHARE_TILES + i < TOKENS / 2; ++i)
            sums[i] = sums[mine * 4 * Smem::SHARE_TILES + i];
    }
}

}  // namespace fdk
