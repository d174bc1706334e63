// Who works on what: which tiles are a CTA's and which of their units, where shares of a tile leave their sums, and which
// rows and units are a warpgroup's.
#pragma once
#include "prefill_ptx.cuh"
#include "prefill_shape.cuh"

namespace fdk {

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

// A thread that multiplies: where its warpgroup stands in the CTA, and it in its warpgroup.
struct Consumer {
    int warp, lane, rank;                 // in the CTA; of the CTA in its cluster
    int group_index, k_group, row_block;  // which units of which block of rows are the warpgroup's
    int r, g, thread;                     // row tile of the warp, row of the lane; in the warpgroup

    __device__ __forceinline__ Consumer(int warp, int lane, int rank)
        : warp(warp), lane(lane), rank(rank), group_index(warp / 4), k_group(group_index / BLOCKS), row_block(group_index % BLOCKS),
          r(warp % 4), g(lane / 4), thread(threadIdx.x % 128) {}
    // Slice of k, of all in the cluster.
    __device__ __forceinline__ int slice() const { return rank * K_GROUPS + k_group; }
    // All threads of the warpgroup.
    __device__ __forceinline__ void meet() const { named_barrier(1 + group_index, 128); }
};

}  // namespace fdk
