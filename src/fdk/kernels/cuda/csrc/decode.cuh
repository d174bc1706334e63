// out[m, n] = x[m, k] W[n, k]^T + bias for up to M tokens, W in the layout of fdk/packing/fragments.py.
//
// Work: a cluster of CLUSTER CTAs owns `blocks_per_cluster` blocks of 64 rows; each of its CTAs takes a slice of k.
// Inside a CTA, ROW_WARPS x K_WARPS warps: K_WARPS of them split the slice of one block, ROW_WARPS blocks go at once.
// Each warp streams its units (64 rows x 64 columns) through a private ring in shared memory, filled by bulk copies on
// Hopper and by cp.async before it, so that a warp waits for nobody but its own data. The weights are the A operand (16 rows), the tokens the B operand (8 columns).
// Sums: over k inside a warp in float32 registers, scaled once per group; over K_WARPS through shared memory; over
// the cluster through distributed shared memory. All in a fixed order, so the result does not depend on timing.
#pragma once
#include "epilogue.cuh"
#if FDK_MANY_DIGITS
#include "digits_many.cuh"
#elif FDK_DIGITS
#include "digits.cuh"
#elif FDK_INDICES
#include "indices.cuh"
#else
#include "halves.cuh"
#endif

namespace fdk {

// Where no buffer is used twice, sums from other CTAs are counted as they arrive; the cluster's barrier would make every
// thread wait until all its stores, those to global memory included, are seen by the whole GPU.
constexpr bool COUNTED_SUMS = CLUSTER > 1 && (STEPS_PER_CTA == 1 || BATCH > 1);
// Then the other CTAs need only have begun, which they have before the kernel in front has ended.
constexpr bool MET_EARLY = COUNTED_SUMS && !Smem::SINGLE;

#if FDK_INDICES
// Activations are asked for behind the ring: there is no table to make first, and no barrier of the CTA for it.
constexpr bool X_FIRST = FDK_HOPPER && Activations::FIT && !SQUARES && !RESIDUAL;
#else
constexpr bool X_FIRST = false;
#endif

// Where one CTA of a token fills a multiprocessor, a launch waits for those that begin last, and a shorter way to their first
// copies was measured to win, a little; where two do, to lose (docs/findings.md).
constexpr bool SHORT_START = FDK_HOPPER && M == 1 && FDK_MIN_CTAS == 1 && !SPARSE && !SQUARES && !GATED && !RESIDUAL;

// What a table holds is asked for in front of the ring, whose bytes it would come behind, where that is faster (docs/findings.md).
constexpr bool VALUES_FIRST = FDK_HOPPER && TABLE && !INDICES && !DIGITS && (BITS == 4 || (BITS == 8 && M == 1));

extern "C" __global__ void __launch_bounds__(THREADS, FDK_MIN_CTAS) fdk_decode(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char smem[];
    if (Smem::TABLE_BYTES && ((shared_address(smem) + Smem::TABLE) & (Smem::TABLE_ALIGNED - 1)) != 0) __trap();
    const int warp = UNIFORM ? __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) : threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row_warp = warp / K_WARPS, k_warp = warp % K_WARPS;
    const int rank = CLUSTER == 1 ? 0 : int(cluster_rank()), cluster = blockIdx.x / CLUSTER;

    int which = 0;
    // Constants of a launch come a line at a time, and slowly: that of the pointers is asked for together with those of the ranges.
    if constexpr (SHORT_START) which = (p.ranges > 1) & (cluster >= p.range[1].first_cluster) & (reinterpret_cast<u64>(p.codes) != 1);
    if (!SHORT_START || which > 0)
        while (which + 1 < p.ranges && cluster >= p.range[which + 1].first_cluster) ++which;
    const Range& range = p.range[which];
    const int first_half = HALF_BLOCKS ? (cluster - range.first_cluster) * (2 * ROW_WARPS - 1) : 0;
    const int first_block = range.first_block + (HALF_BLOCKS ? first_half / 2 : (cluster - range.first_cluster) * p.blocks_per_cluster);
    const int blocks = max(0, min(p.blocks_per_cluster, range.end_block - first_block));
    const int end_block = min(first_block + p.blocks_per_cluster, range.end_block);
    const int steps = (blocks + ROW_WARPS - 1) / ROW_WARPS;  // the same for all warps of a cluster

    if (FDK_HOLD > 0 && blocks == 0) return hold_place(FDK_HOLD);

    const int cta_unit = UNITS * rank / CLUSTER;
    const int units = UNITS % (CLUSTER * PHASES) == 0 ? UNITS / (CLUSTER * PHASES) : UNITS * (rank + 1) / CLUSTER - cta_unit;
    const int first_unit = INTERLEAVED ? k_warp * STAGE_UNITS : units * k_warp / K_WARPS;
    const bool mine = row_warp < blocks;
    const int busy = max(1, min(ROW_WARPS, blocks)) * K_WARPS;  // warps, the first ones; not none, since it divides
    const int end_unit = !mine ? first_unit : INTERLEAVED ? units : units * (k_warp + 1) / K_WARPS;
    TableValues<BITS, WARPS> values[VALUES_FIRST ? TABLES : 1];
    if constexpr (VALUES_FIRST) {
#pragma unroll
        for (int i = 0; i < TABLES; ++i) values[i].load(p.table + ((which + i) << BITS), warp, lane);
    }
    const int own_table = TABLES > 1 ? row_warp % 2 : 0;
#if FDK_INDICES
    const LaneValues lane_values = LaneValues::of(p.table + ((which + own_table) << BITS), lane);
#endif
    const u32 sums_barrier = shared_address(smem) + Smem::BARRIERS + Smem::SUMS_BARRIER;
    const Warp w = {p,
                    smem + Smem::ring(warp),
                    shared_address(smem) + Smem::BARRIERS + warp * STAGES * 8,
                    lane,
                    first_unit == end_unit ? 0 : PHASES > 1 ? PHASES : (blocks - row_warp + ROW_WARPS - 1) / ROW_WARPS,
                    first_unit,
                    end_unit,
                    cta_unit,
                    block_of(first_block, row_warp),
                    evict_first_policy(),
                    HALF_BLOCKS && row_warp == (first_half % 2 ? 0 : ROW_WARPS - 1) ? first_half % 2 : -1};
    if (FDK_HOPPER && lane == 0) {
        for (int stage = 0; stage < STAGES; ++stage) barrier_init(w.barriers + stage * 8);
        if (warp == 0) {
            if constexpr (!X_FIRST && !(SHORT_START && (OWN_X || DIGITS)))
                for (int i = 0; i < X_BUFFERS * K_WARPS * X_CHUNKS; ++i) {
                    const int count = STREAMED ? i % K_WARPS ? busy * ARRIVALS : min(busy, M) : INTERLEAVED ? min(WARPS, M) : ROW_WARPS;
                    barrier_init(shared_address(smem) + Smem::BARRIERS + Smem::X_BARRIERS + i * 8, max(count, 1));
                }
            barrier_init(sums_barrier);
            if constexpr (COUNTED_SUMS) barrier_expect(sums_barrier, (STEPS_PER_CTA == 1 ? 1 : steps) * ROW_WARPS * 64 * M * 4);
        }
        barrier_init_fence();
    }
    __syncwarp();

    // Everything up to the dependency wait reads weights only.
    Cursor ahead = w.start();
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
#if FDK_HALF_BLOCKS
        if (w.half >= 0)
            w.prefetch(ahead, stage, stage == 0, RowTiles<2>{});
        else
#endif
            w.prefetch(ahead, stage, stage == 0, WholeBlock{});
    }
    if constexpr (!FDK_LATE) let_next_kernel_start();
    // Waited for before the first store to another CTA.
    if constexpr (CLUSTER > 1 && !Smem::SINGLE) cluster_arrive_relaxed();
#if FDK_INDICES
    auto activations = Activations::of(p, cta_unit, units, warp, lane);
    if constexpr (X_FIRST) {
        wait_for_previous_kernel();
        activations.load();
    }
#endif
    const u16* table = p.table + (which << (SPARSE ? 4 : BITS));
    float low = -1.f, high = 0.f;
    u32 pair = 0;
#if FDK_INDICES
    pair = lane_values.pair(lane);
#endif
    if constexpr (BITS == 1 || (DIGITS && !SPARSE)) {
        if constexpr (TABLE) low = low_half<BF16>(table[own_table << BITS]), high = low_half<BF16>(table[(own_table << BITS) + 1]);
        if constexpr (OCTETS) {
            for (int i = 0; i < TABLES; ++i) {
                const auto value = [&](int code) -> u32 { return TABLE ? table[2 * i + code] : round_half<BF16>(code - 1.f); };
                fill_octets<WARPS>(smem + Smem::TABLE + i * Smem::TABLE_BYTES, warp, lane, value(0), value(1));
            }
        }
    } else if constexpr (SPARSE) {
        fill_selectors<WARPS, DIGITS ? HALVED : WHOLE>(smem + Smem::TABLE, warp, lane);
        if constexpr (SPARSE_TABLE)
            fill_kept_values<WARPS>(smem + Smem::TABLE + SELECTOR_BYTES, warp, lane, [&](int code) { return u32(table[code]); });
    } else if constexpr (VALUES_FIRST) {
#pragma unroll
        for (int i = 0; i < TABLES; ++i) values[i].template fill<WIDE>(smem + Smem::TABLE + i * Smem::TABLE_BYTES, warp, lane);
    } else if constexpr (!NESTED && !INDICES) {
        for (int i = 0; i < TABLES; ++i)
            fill_table<BITS, WARPS, WIDE>(smem + Smem::TABLE + i * Smem::TABLE_BYTES, warp, lane, [&](int code) -> u16 {
                if constexpr (TABLE) return table[(i << BITS) + code];
                return round_half<BF16>(float(KIND == kind::INT ? code - (1 << (BITS - 1)) : code));
            });
    }

#if !FDK_INDICES
    auto activations = Activations::of(p, cta_unit, units, warp, lane);
#endif
    if constexpr (Smem::NO_DIGIT_BYTES > 0) {
#pragma unroll 1
        for (int i = threadIdx.x; i < Smem::NO_DIGIT_BYTES / 16; i += THREADS) *reinterpret_cast<u32x4*>(smem + Smem::NO_DIGITS + i * 16) = {};
    }
    Outputs outputs = {p, range, smem, rank * SHARE_ROWS, {}, {}, {}, {}};
    outputs.find(first_block, end_block);
    Norms norms;
    norms.find(p, lane);
    if constexpr (!X_FIRST) __syncthreads();  // table and barriers are ready
    if constexpr (MET_EARLY) cluster_wait();
    if constexpr (AHEAD < 2 && !X_FIRST) wait_for_previous_kernel();
    const u32 lane_offset = OCTETS ? lane % 8 * 16 : BITS == 2 || (SPARSE && DIGITS) ? lane % 16 * 8 : lane * 4;
    const u32 table_at = shared_address(smem) + Smem::TABLE + own_table * Smem::TABLE_BYTES;
    const Lookup lookup = {(table_at + lane_offset) ^ p.zero, p.one_bit[0], p.one_bit[1], p.one_bit[2],
                           round_half<BF16>(low) * 0x10001u, u32(round_half<BF16>(low) ^ round_half<BF16>(high)) * 0x10001u, p.zero, pair};
    const auto prepare_phase = [&](int phase) {
#if FDK_DIGITS || FDK_INDICES
        if (blocks > 0 && phase < PHASES) prepare_activations(p, smem, activations, norms, phase, cta_unit + phase * units, units, warp, lane, lookup);
#else
        if (STREAMED && mine) ask_for_phase(p, smem, phase, cta_unit, busy, warp, lane);
        if (!STREAMED && blocks > 0 && phase < PHASES) prepare_activations(p, smem, activations, norms, phase, cta_unit + phase * units, units, warp, lane, lookup, mine);
#endif
    };
#if FDK_AHEAD
    MadeUnit made[STAGE_UNITS];
    const bool some = first_unit < end_unit;
    const auto make_first = [&] {
        w.wait(0, 0);
#pragma unroll
        for (int i = 0; i < STAGE_UNITS; ++i)
            load_unit(made[i].u, w.ring, w.groups(0, first_unit), i, (cta_unit + first_unit + i) * 64, lane, w.half, WholeBlock{});
        if constexpr (AHEAD != 2) w.refill(ahead, 0, WholeBlock{});
#pragma unroll
        for (int i = 0; i < STAGE_UNITS; ++i) made[i].make(lookup);
    };
    if constexpr (AHEAD > 1) {
        if (some) make_first();
        wait_for_previous_kernel();
    }
    const auto meanwhile = [&] {
        if (!some) return;
        if constexpr (AHEAD == 1) make_first();
        if constexpr (AHEAD == 2) w.refill(ahead, 0, WholeBlock{});
    };
#if FDK_DIGITS
    static_assert(IN_PAIRS, "see digit_pairs.cuh");
    make_digits(p, smem, activations, norms, warp, lane, meanwhile);
#else
    norms.fetch(p, warp, lane);
    activations.load();
    outputs.prepare(first_block, end_block);
    meanwhile();
    norms.finish(p, smem, warp, lane);
    activations.store(smem, warp);
    if constexpr (FDK_LATE) let_next_kernel_start();
#endif
#else
    // Whatever takes longer to come is asked for first.
    if constexpr (!X_MEANWHILE) outputs.prepare(first_block, end_block);
#if FDK_INDICES
    if constexpr (X_FIRST) {
        activations.store(smem, warp);
        if constexpr (FDK_LATE) let_next_kernel_start();
    } else
#endif
        for (int phase = 0; phase < (STREAMED ? PHASES_AHEAD : X_BUFFERS); ++phase) prepare_phase(phase);
    if constexpr (X_MEANWHILE) outputs.prepare(first_block, end_block);
#endif

    float* partial = reinterpret_cast<float*>(smem + Smem::PARTIAL);
    float* receive = reinterpret_cast<float*>(smem + Smem::RECEIVE);
    constexpr int SLOT = 64 * M, SHARE = SLOT / CLUSTER;
    const auto slots = [&](int step) { return (BUFFERS == 2 ? step % 2 : step) * ROW_WARPS; };
    const auto slot = [&](int step, int rw, int kw) {
        if constexpr (Smem::PARTIAL_IN_RING) return reinterpret_cast<float*>(smem + Smem::ring(rw * K_WARPS + kw));
        return partial + ((slots(step) + rw) * K_WARPS + kw) * SLOT;
    };

    // Add the K_WARPS partial sums of a step; without a cluster that is the result, else each CTA gets its rows.
    const auto reduce = [&](int step) {
        if constexpr (CLUSTER == 1) {
            outputs.write(first_block + step * ROW_WARPS, end_block, [&](int rw, int row, int token) {
                const int at = turned(row, token);
                float sum = slot(step, rw, 0)[row * M + at];
#pragma unroll
                for (int kw = 1; kw < K_WARPS; ++kw) sum += slot(step, rw, kw)[row * M + at];
                return sum;
            });
        } else {
            constexpr int PIECES = ROW_WARPS * SLOT / 4, TRIPS = (PIECES + THREADS - 1) / THREADS;
#pragma unroll(TRIPS <= 4 ? TRIPS : 1)
            for (int trip = 0; trip < TRIPS; ++trip) {
                const u32 i = trip * THREADS + threadIdx.x;
                if (PIECES % THREADS != 0 && i >= PIECES) break;
                const int rw = ROW_WARPS == 1 ? 0 : i / (SLOT / 4), at = i % (SLOT / 4) * 4;
                f32x4 sum = *reinterpret_cast<const f32x4*>(slot(step, rw, 0) + at);
#pragma unroll
                for (int kw = 1; kw < K_WARPS; ++kw) {
                    const f32x4 v = *reinterpret_cast<const f32x4*>(slot(step, rw, kw) + at);
                    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
                }
                const float* to = receive + ((slots(step) + rw) * CLUSTER + rank) * SHARE + at % SHARE;
                if constexpr (COUNTED_SUMS)
                    store_counted(shared_address(to), sums_barrier, at / SHARE, sum);
                else
                    store_remote(shared_address(to), at / SHARE, sum);
            }
        }
    };
    const auto finish = [&](int step) {
        outputs.write(first_block + step * ROW_WARPS, end_block, [&](int rw, int row, int token) {
            const float* from = receive + (slots(step) + rw) * SLOT + row * M + (TURNED ? turned(rank * SHARE_ROWS + row, token) : token);
            float sum = from[0];
#pragma unroll
            for (int source = 1; source < CLUSTER; ++source) sum += from[source * SHARE];
            return sum;
        });
    };

    int stage = 0;
    u32 parity = 0;
#if FDK_AHEAD
    Accumulator begun = {};
    if (some) {
#pragma unroll
        for (int i = 0; i < STAGE_UNITS; ++i) made[i].multiply(begun, smem, first_unit + i, i, lane);
    }
    stage = STAGES == 1 ? 0 : 1, parity = STAGES == 1;
    int from = first_unit + STAGE_UNITS;
#endif
    for (int step = 0; step < (STEPS_PER_CTA == 1 ? 1 : steps); ++step) {
        Accumulator acc = {};
#if FDK_AHEAD
        acc = begun;
#else
        const int from = first_unit;
#endif
        for (int phase = 0; phase < PHASES; ++phase) {
            if (STREAMED) prepare_phase(phase + PHASES_AHEAD);
            if (phase > 0 && !STREAMED) {
                order_before_bulk_copies();
                __syncthreads();
                prepare_phase(phase + X_BUFFERS - 1);
            }
            const char* buffer = smem + phase % X_BUFFERS * Smem::X_BUFFER;
            if (STEPS_PER_CTA == 1 || step < w.steps) {
#if FDK_HALF_BLOCKS
                const auto multiply = [&](auto tiles) {
#else
                constexpr WholeBlock tiles;
#endif
#pragma unroll 1
                for (int unit = from; unit < end_unit; unit += UNIT_STEP) {
                    w.wait(stage, parity);
                    wait_for_activations(p, smem, phase, unit - first_unit, cta_unit + phase * units, units, warp, lane);
                    Unit loaded[STAGE_UNITS];
#pragma unroll
                    for (int i = 0; i < STAGE_UNITS; ++i)
                        load_unit(loaded[i], w.ring + stage * Smem::STAGE, w.groups(stage, unit),
                                  i, (cta_unit + phase * units + unit + i) * 64, lane, w.half, tiles);
                    w.refill(ahead, stage, tiles);
#pragma unroll
                    for (int i = 0; i < STAGE_UNITS; i += UNITS_AT_ONCE) multiply_units(acc, loaded + i, buffer, unit + i, i, lane, lookup, tiles);
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                }
#if FDK_HALF_BLOCKS
                };
                if (w.half >= 0)
                    multiply(RowTiles<2>{});
                else
                    multiply(WholeBlock{});
#endif
                if constexpr (STREAMED) {
                    order_before_bulk_copies();
                    __syncwarp();
                    if (lane < ARRIVALS) barrier_expect(done_barrier(smem, phase), 0);
                }
            }
        }
#if FDK_AHEAD
        begun = {}, from = first_unit;
#endif
        if constexpr (Norms::LATER && !IDLE_WARPS)
            if (step == 0 && blocks > 0) norms.finish(p, smem, warp, lane);
        if constexpr (Smem::SINGLE && !Smem::PARTIAL_IN_RING) __syncthreads();
        // The other lanes have read the ring that becomes the slot. Not UNIFORM, the compiler brings lanes together in front
        // of each product, and this would cost its loop instructions.
        if constexpr (Smem::PARTIAL_IN_RING && UNIFORM) __syncwarp();
#if FDK_HALF_BLOCKS
        if (w.half >= 0)
            store_partial(slot(step, row_warp, k_warp) + w.half * 32 * M, acc, smem, lane, low, high, RowTiles<2>{});
        else
#endif
            store_partial(slot(step, row_warp, k_warp), acc, smem, lane, low, high, WholeBlock{});
        if constexpr (BATCH == 1) {
            __syncthreads();
            if constexpr (CLUSTER > 1) {
                if constexpr (Smem::SINGLE) cluster_arrive_relaxed();  // no CTA needs its activations any more
                if (!MET_EARLY && (!COUNTED_SUMS || step == 0)) cluster_wait();
                if (!COUNTED_SUMS && step > 0) finish(step - 1);
            }
            reduce(step);
            if constexpr (CLUSTER > 1 && !COUNTED_SUMS) cluster_arrive();
        }
    }
    if constexpr (BATCH > 1) {
        __syncthreads();
        if constexpr (CLUSTER > 1 && !MET_EARLY) cluster_wait();
        for (int step = 0; step < steps; ++step) reduce(step);
    }
    if constexpr (CLUSTER > 1) {
        if constexpr (COUNTED_SUMS)
            barrier_wait(sums_barrier, 0);
        else
            cluster_wait();
        if constexpr (BATCH == 1) {
            if (STEPS_PER_CTA == 1 || steps > 0) finish(STEPS_PER_CTA == 1 ? 0 : steps - 1);
        } else {
            for (int step = 0; step < steps; ++step) finish(step);
        }
    }
}

}  // namespace fdk
