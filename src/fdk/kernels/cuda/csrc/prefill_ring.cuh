// The ring of stages in shared memory that the producer fills and warpgroups empty: its places, and what says who is done.
#pragma once
#include "prefill_ptx.cuh"
#include "prefill_shape.cuh"

namespace fdk {

// Warps of the producer: the first one fetches x, each other one every WEIGHT_WARPS-th block of rows.
constexpr int WEIGHT_WARPS = BLOCKS < 3 ? BLOCKS : 3;

// A warp's arrival at the same barrier of each of `COUNT` CTAs.
template <int COUNT>
__device__ __forceinline__ void arrive_at_all(u32 barrier, int lane) {
    if constexpr (ARRIVALS == 1) {
        if (lane < COUNT) barrier_arrive_at(barrier, lane);
    } else {
        for (int rank = 0; rank < COUNT; ++rank) barrier_arrive_at(barrier, rank);
    }
}

// The barriers of a CTA, by their shared addresses.
struct Barriers {
    u32 base;  // of the CTA's shared memory

    __device__ __forceinline__ u32 full(int stage) const { return base + Smem::BARRIERS + stage * 8; }
    __device__ __forceinline__ u32 empty(int stage) const { return full(STAGES + stage); }
    // Of a cluster's slices of k: the end of all loops, and the sums that come for a chunk of a warpgroup's outputs.
    __device__ __forceinline__ u32 loops_done() const { return full(2 * STAGES); }
    __device__ __forceinline__ u32 arrived(int warpgroup, int chunk) const {
        return loops_done() + 8 + (warpgroup * Smem::OUT_CHUNKS + chunk) * 8;
    }

    __device__ __forceinline__ void init() const {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init_count(full(stage), 1 + WEIGHT_WARPS);
            barrier_init_count(empty(stage), PAIR * BLOCKS * 4 * ARRIVALS);
        }
        if constexpr (Smem::MEETING_BARRIERS > 0) {
            barrier_init_count(loops_done(), SPLIT * WARPGROUPS * 4 * ARRIVALS);
            for (int i = 0; i < WARPGROUPS * Smem::OUT_CHUNKS; ++i) barrier_init_count(arrived(0, i), 1);
        }
        barrier_init_fence();
    }
    // A warp gives a stage back, to all who fill it.
    __device__ __forceinline__ void release(int stage, int lane) const {
        __syncwarp();
        if constexpr (PAIR > 1) {
            arrive_at_all<PAIR>(empty(stage), lane);
        } else {
            if (lane < ARRIVALS) barrier_arrive(empty(stage));
        }
    }
};

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

// First group of a unit's stage, moved down where it would reach past the last group.
__device__ __forceinline__ int staged_group(int unit) {
    const int group = unit * 64 / GROUP;
    if constexpr (SUBS > 1 && 64 % GROUP != 0) return min(group, GROUPS - UNIT_GROUPS);
    return GROUPED ? group : 0;
}

}  // namespace fdk
