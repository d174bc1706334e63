// The warpgroup that fills the ring: x by a tensor map, codes, scales and zero points of each block of rows, and behind the
// units of a tile what other shares leave of its sums.
#pragma once
#include "prefill_ring.cuh"
#include "prefill_schedule.cuh"

namespace fdk {

// All lanes run the loop, so that addresses are uniform, and one of them issues the copies.
struct Producer {
    const Params& p;
    Barriers barriers;
    int rank;

    // fetch(tile, unit, stage) for every unit of every tile, once its stage is free; LATEST: and once what the kernel in front
    // writes may be read. fetch_sums(share, i, stage) for the stages of sums behind them.
    template <bool LATEST, class Fetch, class FetchSums>
    __device__ __forceinline__ void run_units(Fetch fetch, FetchSums fetch_sums) const {
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
                if (round > 0) barrier_wait(barriers.empty(turn.stage), turn.parity ^ 1);
                fetch(tile, unit, turn);
                turn.next();
                if (turn.stage == 0) round = 1;
            }
            if (FETCH_SUMS && work.first == 0) {
                for (int other = Schedule::share() + 1; work.end < UNITS && schedule.cut(other) < (work.index + 1) * UNITS; ++other) {
                    if (schedule.cut(other) == schedule.cut(other + 1)) continue;
                    for (int i = 0; i < SUM_STAGES; ++i) {
                        if (round > 0) barrier_wait(barriers.empty(turn.stage), turn.parity ^ 1);
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
        run_units<true>([&](const Tile& tile, int unit, const Turn& turn) {
            if (elected()) {
                const u32 barrier = barriers.full(turn.stage);
                barrier_expect(barrier, Smem::X_BYTES);
                copy_box<(PAIR > 1)>(barriers.base + turn.at + part * 128, p.x_map, unit * 64, tile.token + part, barrier, (1 << PAIR) - 1);
            }
        }, [&](int, int, const Turn& turn) {
            if (elected()) barrier_arrive(barriers.full(turn.stage));
        });
    }
    __device__ __forceinline__ void run_weights(int which) const {
        const u64 policy = evict_first_policy();
        run_units<FRESH>([&](const Tile& tile, int unit, const Turn& turn) {
            const int last = p.range[tile.range].end_block - 1;
            const int mine = BLOCKS % WEIGHT_WARPS == 0 ? BLOCKS / WEIGHT_WARPS : (BLOCKS - which + WEIGHT_WARPS - 1) / WEIGHT_WARPS;
            if (elected()) {
                const u32 barrier = barriers.full(turn.stage);
                barrier_expect(barrier, mine * Smem::BLOCK_BYTES);
#pragma unroll
                for (int i = 0; i < BLOCKS; i += WEIGHT_WARPS) {
                    const int w = which + i;
                    if (i > 0 && w >= BLOCKS) break;
                    // Past the last block its neighbour is repeated; nothing of it is written.
                    const i64 block = min(tile.block + w, last);
                    const u32 to = barriers.base + turn.at + Smem::CODES + w * Smem::BLOCK_BYTES;
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
                const u32 barrier = barriers.full(turn.stage), bytes = min(SUM_TILES, TOKEN_TILES - i * SUM_TILES) * 128 * 16;
                barrier_expect(barrier, bytes);
                const f32x4* const from = Schedule::partial(p, share, rank, which) + i * SUM_TILES * 128;
                copy_bulk(barriers.base + turn.at + which * SUM_TILES * 128 * 16, from, bytes, barrier, policy);
            }
        });
    }
    // Warp `role` of the producer.
    __device__ __forceinline__ void run(int role) const {
        if (role == 0) {
            run_x();
        } else if (role <= WEIGHT_WARPS) {
            run_weights(role - 1);
        }
        __syncwarp();
    }
};

}  // namespace fdk
