// A warpgroup's loop over the units of a tile: while one is multiplied, the next one is dequantised.
//
// In two forms, with the two halves of a unit prepared ahead of each other, and plain; the third, unrolled over the ring, is
// the kernel's own. What they are made of, the kernel gives them: load(operand, place, unit), from the ring to an operand;
// issue(operand, place, run, fresh), a run of wgmma; finish(), a wait for all of them; release(stage), which gives it back to
// the producer; announce(), see announce_sums. Where scales of groups multiply sums, fresh_at(unit): whether sums start anew,
// scaled_at(unit): whether they are added, add_scaled(operand, run).
//
// Scalars come by reference and these steps as lambdas, so that machine code is as if the loops stood in the kernel: passed
// otherwise, operands get other registers or a place on the stack (docs/findings.md).
#pragma once
#include "prefill_operand.cuh"
#include "prefill_sums.cuh"
#include "wgmma.cuh"

namespace fdk {

// Run `run` of wgmma of a unit, or of a part of it. `fresh` sums forget what they were.
__device__ __forceinline__ void multiply_run(Sums& d, const Consumer& me, const Barriers& barriers, Operand& u, const Turn& turn, const int& run,
                                             const bool& fresh) {
    const u64 x = UNROLLED ? b_descriptor(barriers.base) + turn.at / 16 : b_descriptor(barriers.base + turn.at);
    if constexpr (TURNS) named_barrier(FIRST_TURN + me.group_index, 256);
    wgmma_fence();
    constexpr int COUNT = 4 / (ISSUES * PARTS);
    const int first = PARTS == 1 ? run * COUNT : 0;
#pragma unroll
    for (int s = 0; s < COUNT; ++s) wgmma(d, u.a[first + s], x + 2 * (run * COUNT + s), !(fresh && s == 0));
    wgmma_commit();
    if constexpr (TURNS) named_barrier_arrive(FIRST_TURN + (me.group_index + 1) % WARPGROUPS, 256);
}

// The sums of a run, times the scales of their groups.
__device__ __forceinline__ void add_scaled_run(ScaledSums& acc, const Sums& d, const Operand& u, const int& run) {
    if constexpr (LATE) {
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) acc[i] = fmaf(u.scale[run][i / 2 % 2], d[i], acc[i]);
    }
}

// A warpgroup without a unit still passes its turn on.
__device__ __forceinline__ void pass_turns(const Consumer& me) {
#pragma unroll
    for (int i = 0; i < ISSUES; ++i) {
        named_barrier(FIRST_TURN + me.group_index, 256);
        named_barrier_arrive(FIRST_TURN + (me.group_index + 1) % WARPGROUPS, 256);
    }
}

template <class Load, class Issue, class Finish, class Release, class Announce>
__device__ __forceinline__ void run_halves(Operand (&units)[2], Codes& codes, const Lookup& lookup, Turn& turn, const int& begin, const int& end_unit,
                                           const Load& load, const Issue& issue, const Finish& finish, const Release& release,
                                           const Announce& announce) {
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
}

template <class Load, class Issue, class Finish, class Release, class Announce, class FreshAt, class ScaledAt, class AddScaled>
__device__ __forceinline__ void run_plain(Operand (&units)[2], Turn& turn, const int& begin, const int& end_unit, const Load& load, const Issue& issue,
                                          const Finish& finish, const Release& release, const Announce& announce, const FreshAt& fresh_at,
                                          const ScaledAt& scaled_at, const AddScaled& add_scaled) {
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

}  // namespace fdk
