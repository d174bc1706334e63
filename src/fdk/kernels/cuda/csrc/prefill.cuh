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
//   prefill_shape.cuh      what the host fixes; shared memory; the argument
//   prefill_schedule.cuh   which tiles, and which of their units, are whose
//   prefill_producer.cuh   copies into the ring (prefill_ring.cuh)
//   prefill_units.cuh      steps and loops over units, dequantised by prefill_operand.cuh with the table of prefill_table.cuh
//   prefill_sums.cuh       where sums of slices of k and of shares of a tile meet
//   prefill_output.cuh     from sums to outputs
//
// Loops that stand in the kernel itself would become other machine code as functions (docs/findings.md).
#pragma once
#include "prefill_operand.cuh"
#include "prefill_output.cuh"
#include "prefill_producer.cuh"
#include "prefill_table.cuh"
#include "prefill_units.cuh"

namespace fdk {

extern "C" __global__ void __launch_bounds__(THREADS, 1) fdk_prefill(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) char smem[];
    const u32 base = shared_address(smem);
    if (base % 1024 != 0 || (Smem::TABLE_BYTES && ((base + Smem::TABLE) & (Smem::TABLE_BYTES - 1)) != 0)) __trap();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int rank = CLUSTER == 1 ? 0 : int(cluster_rank());
    const Barriers barriers = {base};
    u16 table_value = 0;  // of code lane % 2^BITS, asked for before anything is waited for
    if (LANE_TABLE && p.ranges == 1) table_value = load_2(p.table + lane % (1 << BITS));
    if (threadIdx.x == 0) barriers.init();
    let_next_kernel_start();
    if constexpr (CLUSTER > 1) cluster_arrive_relaxed();
    __syncthreads();
    if constexpr (PAIR > 1) cluster_wait();  // CTAs that split k need each other's barriers only at the end

    if (warp >= CONSUMERS / 32) {
        keep_registers<PRODUCER_REGISTERS, false>();
        const Producer producer = {p, barriers, rank};
        producer.run(warp - CONSUMERS / 32);
        // Nobody leaves while others may still write to its shared memory.
        if constexpr (PAIR > 1) cluster_arrive();
        if constexpr (CLUSTER > 1) cluster_wait();
    } else {
        keep_registers<CONSUMER_REGISTERS, true>();
        const Consumer me(warp, lane, rank);
        const WordOffsets offsets(me.r, lane);
        char* const staged = smem + Smem::OUT + me.group_index * Smem::CHUNK * Smem::OUT_STRIDE;
        Lookup lookup = empty_table(p, base, lane);
        int range_of_table = -1;
        Turn turn(me.k_group);
        expect_slices(me, barriers);
        if (TURNS && me.group_index == WARPGROUPS - 1) named_barrier_arrive(FIRST_TURN, 256);

        // Sums left in global memory are announced some units later, when they have arrived there.
        bool owes = false;
        const auto announce = [&] {
            if (STREAM && owes) {
                announce_sums(p, me);
                owes = false;
            }
        };
        Schedule schedule(p, rank);
        for (Work work; schedule.next(work);) {
            const int first_unit = work.first, end_unit = work.end;
            if (const int range = p.ranges == 1 ? 0 : tile_at(p, work.index, rank).range; range != range_of_table) {
                make_table(lookup, table_value, p, smem, range, range_of_table >= 0, warp, lane);
                range_of_table = range;
            }
            Sums d;
            ScaledSums acc;
            clear(d, acc);
            Operand units[2];
            Codes codes;

            const auto block_at = [&](const Turn& turn) { return smem + turn.at + Smem::CODES + me.row_block * Smem::BLOCK_BYTES; };
            const auto release = [&](int stage) { barriers.release(stage, lane); };
            const auto issue = [&](Operand& u, const Turn& turn, int run, bool fresh) { multiply_run(d, me, barriers, u, turn, run, fresh); };
            const auto fetch = [&](const Turn& at, int unit) {
                // Where a stage goes from one k group to another, this one may come before the other's copies have: parity
                // alone would take that for the round before. What the other gives back, it has waited for.
                if constexpr (STAGES % K_GROUPS != 0) barrier_wait(barriers.empty(at.stage), at.parity ^ 1);
                barrier_wait(barriers.full(at.stage), at.parity);
                load_codes(codes, block_at(at), offsets, unit, me.r, me.g);
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
            const auto add_scaled = [&](const Operand& u, int run) { add_scaled_run(acc, d, u, run); };
            const int begin = first_unit + me.k_group;

            if constexpr (UNROLLED) {
                // The places of this warpgroup's units in a round of the ring.
                constexpr int PLACES = STAGES / K_GROUPS;
                const auto place = [&](int i) {
                    Turn at(i * K_GROUPS + me.k_group);
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
                                    fetched = more(2) && barrier_over(barriers.full(later.stage), later.parity);
                                    if (more(1)) expand(other, codes, 0, lookup);
                                    if (fetched) load_codes(codes, block_at(later), offsets, current + 2 * K_GROUPS, me.r, me.g);
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
                run_halves(units, codes, lookup, turn, begin, end_unit, load, issue, finish, release, announce);
            } else if (begin < end_unit) {
                run_plain(units, turn, begin, end_unit, load, issue, finish, release, announce, fresh_at, scaled_at, add_scaled);
            }
            if constexpr (TURNS && K_GROUPS > 1) {
                // The last round may have fewer units than k groups.
                if ((end_unit - first_unit) % K_GROUPS != 0 && me.k_group >= (end_unit - first_unit) % K_GROUPS) pass_turns(me);
            }

            auto& sums = final_sums(d, acc);
            announce();
            if constexpr (STREAM) {
                const int share = schedule.share();
                const auto partial = [&](int share) { return Schedule::partial(p, share, rank, me.row_block) + me.thread; };
                const auto flag = [&](int share) { return Schedule::flag(p, share, rank, me.row_block); };
                if (first_unit > 0) {
                    // Whoever begins this tile adds it up.
                    wait_for_previous_kernel();
                    f32x4* const to = partial(share);
                    leave_sums(to, sums);
                    owes = true;
                    continue;
                }
                for (int other = share + 1; end_unit < UNITS && schedule.cut(other) < (work.index + 1) * UNITS; ++other) {
                    if (schedule.cut(other) == schedule.cut(other + 1)) continue;
                    if constexpr (FETCH_SUMS) {
                        add_share_from_ring(sums, me, smem, barriers, turn);
                        continue;
                    }
                    if (me.thread == 0) {
                        wait_for_previous_kernel();
                        while (read_flag(flag(other)) == 0) {
                        }
                        set_flag(flag(other), 0);
                    }
                    me.meet();
                    const f32x4* const from = partial(other);
                    constexpr int FREE = (CONSUMER_REGISTERS - TOKENS / 2 - 40) / 4, BATCH = FREE < 2 ? 2 : FREE > 16 ? 16 : FREE;
#pragma unroll
                    for (int first = 0; first < TOKEN_TILES; first += BATCH) {
                        f32x4 v[BATCH];
#pragma unroll
                        for (int j = first; j < first + BATCH && j < TOKEN_TILES; ++j) v[j - first] = load_partial(from + j * 128);
#pragma unroll
                        for (int j = first; j < first + BATCH && j < TOKEN_TILES; ++j) add_sums(sums, j, v[j - first]);
                    }
                }
            }
            const int slice = me.slice();
            if constexpr (SLICES > 1) {
                wait_for_loops(me, barriers);
                send_slices(sums, me, slice, smem, barriers);
                if constexpr (SPLIT == 1) named_barrier(WARPGROUPS + 1, CONSUMERS);
            }
            // Worked out here and not in front of the loop, whose registers are scarce.
            int index = work.index;
            asm volatile("" : "+r"(index));
            const Tile tile = tile_at(p, index, rank);
            const Range& range = p.range[tile.range];
            wait_for_previous_kernel();

            const int block = tile.block + me.row_block;
            float bias[2] = {}, scale[2] = {1.f, 1.f};
            load_row_terms(bias, scale, p, range, block, me);
            const int first_token = tile.token + (SLICES == 1 ? 0 : slice * Smem::SHARE_TILES * 8);
#pragma unroll
            for (int first = 0; first < MINE; first += CHUNK_TILES) {
                if (first > 0) me.meet();
                if constexpr (Smem::MEETING_BARRIERS > 0) barrier_wait(barriers.arrived(me.group_index, first / CHUNK_TILES), 0);
                if constexpr (SLICES > 1) {
                    // In the order of k; of two slices, which of them comes first makes no difference.
                    f32x4 total[CHUNK_TILES] = {};
#pragma unroll
                    for (int source = SLICES == 2; source < SLICES; ++source) {
                        const int other = SLICES == 2 ? 1 - slice : source;
                        f32x4 v[CHUNK_TILES];
#pragma unroll
                        for (int i = 0; i < CHUNK_TILES && first + i < MINE; ++i) {
                            const int j = 4 * (first + i), at = (me.k_group * SLICES + other) * Smem::SHARE_TILES + first + i;
                            if (SLICES > 2 && other == slice)
                                v[i] = {sums[j], sums[j + 1], sums[j + 2], sums[j + 3]};
                            else
                                v[i] = *reinterpret_cast<const f32x4*>(smem + Smem::RECEIVE + ((at * BLOCKS + me.row_block) * 128 + me.thread) * 16);
                        }
#pragma unroll
                        for (int i = 0; i < CHUNK_TILES && first + i < MINE; ++i)
                            total[i] = {total[i].x + v[i].x, total[i].y + v[i].y, total[i].z + v[i].z, total[i].w + v[i].w};
                    }
#pragma unroll
                    for (int i = 0; i < CHUNK_TILES && first + i < MINE; ++i) {
                        const int j = 4 * (first + i);
                        const auto put = [&](int c, float v) { sums[j + c] = SLICES == 2 ? sums[j + c] + v : v; };
                        put(0, total[i].x), put(1, total[i].y), put(2, total[i].z), put(3, total[i].w);
                    }
                }
                stage_outputs(sums, me, bias, scale, staged, first);
                me.meet();
                const int count = min(CHUNK_TILES, MINE - first) * 8;
                // The last share may be short.
                const bool even = TOKEN_TILES % SLICES == 0;
                const int limit = even ? count : tile.token + TOKENS - first_token - first * 8;
                write_block(p, range, block, staged, first_token + first * 8, min(count, limit), me.thread);
            }
            if constexpr (SLICES > 1) break;  // one tile
            me.meet();
        }
        announce();
        if constexpr (PAIR > 1) {
            cluster_arrive();
            cluster_wait();
        }
    }
}

}  // namespace fdk
