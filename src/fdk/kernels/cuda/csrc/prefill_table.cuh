// The table that codes are looked up in: one at a time, that of the range of rows a CTA works on.
#pragma once
#include "prefill_ptx.cuh"
#include "prefill_shape.cuh"

namespace fdk {

// How a lane finds its column of the table, before there is one.
__device__ __forceinline__ Lookup empty_table(const Params& p, u32 base, int lane) {
    const u32 lane_offset = BITS == 2 ? lane % 16 * 8 : lane * 4;
    return {(base + Smem::TABLE + lane_offset) ^ p.zero, 0, 0, 0, 0, 0, p.zero};
}

// The table of a range, by all warps that multiply. `value`, with LANE_TABLE, is what code lane % 2^BITS stands for: it is there
// already where there is only one range. `replaces`: another range's table is in use.
__device__ __forceinline__ void make_table(Lookup& lookup, u16& value, const Params& p, char* smem, int range, bool replaces, int warp, int lane) {
    const u16* table = p.table + (range << BITS);
    if (LANE_TABLE && p.ranges > 1) value = load_2(table + lane % (1 << BITS));
    const auto entry = [&](int code) -> u16 {
        if constexpr (LANE_TABLE) return __shfl_sync(0xffffffffu, u32(value), code);
        if constexpr (TABLE) return table[code];
        return round_half<BF16>(float(KIND == kind::INT ? code - (1 << (BITS - 1)) : code));
    };
    if constexpr (BITS == 1) {
        lookup.low = entry(0) * 0x10001u, lookup.differ = u32(entry(0) ^ entry(1)) * 0x10001u;
    } else if constexpr (!NESTED && !INTEGERS) {
        if (replaces) named_barrier(WARPGROUPS + 1, CONSUMERS);
        if constexpr (LANE_TABLE)
            fill_table_from_lanes<BITS, CONSUMERS / 32, WIDE>(smem + Smem::TABLE, warp, lane, value);
        else
            fill_table<BITS, CONSUMERS / 32, WIDE>(smem + Smem::TABLE, warp, lane, entry);
        named_barrier(WARPGROUPS + 1, CONSUMERS);
    }
}

}  // namespace fdk
