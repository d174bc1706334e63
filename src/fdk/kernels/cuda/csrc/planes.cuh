// From bit planes of nested codes to A fragments of mma.m16n8k16, without a table.
//
// Word `tile` of plane p holds bit 7 - p of a lane's 32 codes of a row tile, those of pair q = 4s + 2h + j/2 at bits q and 16 + q
// (fdk/packing/fragments.py), so that all 32 are worked on at once:
//
//   round    the plane behind the slice is added to the planes in front of it, bit by bit, but not where all of those are one
//   gather   planes become fields: two words exchange every other field of 1, 2, then 4 bits; a field holds a code of the slice
//   convert  a field is masked into the mantissa of 2^7 (bf16) or 2^10 (fp16), whose last bits then count in units of one;
//            a multiply-add takes the power of two and the middle code off, exactly
#pragma once
#include "dequantise.cuh"

// The 16-bit float of `value`, which it represents exactly, as a pair.
template <bool BF16>
__host__ __device__ constexpr u32 pair_of(double value) {
    if (value == 0) return 0;
    constexpr int MANTISSA = BF16 ? 7 : 10, BIAS = BF16 ? 127 : 15;
    const u32 sign = value < 0 ? 0x8000u : 0;
    double left = value < 0 ? -value : value;
    int exponent = 0;
    for (; left >= 2; left /= 2) ++exponent;
    for (; left < 1; left *= 2) --exponent;
    return (sign | u32(exponent + BIAS) << MANTISSA | u32((left - 1) * (1 << MANTISSA))) * 0x10001u;
}

// COUNT planes, the most significant first, to FIELD words: field i of word w in either half belongs to bit FIELD*i + w of the
// half of the planes. Bits of a field above COUNT are not zero.
template <int FIELD, int COUNT>
__device__ __forceinline__ void gather_planes(u32 (&fields)[FIELD], const u32* planes) {
    if constexpr (FIELD == 1) {
        fields[0] = planes[0];
    } else {
        constexpr int HALF = FIELD / 2, LOW = COUNT < HALF ? COUNT : HALF;
        u32 low[HALF];
        gather_planes<HALF, LOW>(low, planes + COUNT - LOW);
        if constexpr (COUNT <= HALF) {
#pragma unroll
            for (int w = 0; w < HALF; ++w) fields[w] = low[w], fields[w + HALF] = low[w] >> HALF;
        } else {
            constexpr u32 MASK = HALF == 1 ? 0x55555555u : HALF == 2 ? 0x33333333u : 0x0f0f0f0fu;
            u32 high[HALF];
            gather_planes<HALF, COUNT - HALF>(high, planes);
#pragma unroll
            for (int w = 0; w < HALF; ++w) {
                fields[w] = combine<CHOOSE>(low[w], high[w] << HALF, MASK);
                fields[w + HALF] = combine<CHOOSE>(low[w] >> HALF, high[w], MASK);
            }
        }
    }
}

// How a slice of SLICE bits becomes 16-bit floats step * (code - middle), cut ones half a step higher.
template <int SLICE, bool CUT, bool BF16>
struct Slice {
    static constexpr int FIELD = SLICE <= 2 ? 2 : SLICE <= 4 ? 4 : 8;
    static constexpr int MANTISSA = BF16 ? 7 : 10;
    static constexpr u32 BASE = BF16 ? 0x43004300u : 0x64006400u;  // 2^MANTISSA
    static constexpr double STEP = 1 << (8 - SLICE), MIDDLE = 1 << (SLICE - 1), POWER = 1 << MANTISSA;
    // 8 bits do not fit beside the power of two of bf16: the top bit chooses what is taken off.
    static constexpr bool SPLIT = BF16 && SLICE == 8;
    // One bit up the half of cut codes fits the addend, and step * 2^10 of two bits the range of fp16.
    static constexpr bool UP = CUT ? SLICE < MANTISSA : !BF16 && SLICE == 2;
    static constexpr bool HALF_APART = CUT && !UP;  // added by a second multiply-add
    static constexpr int LOWEST = UP ? 1 : 0;
    static constexpr int AT_ONCE = SPLIT ? 1 : (MANTISSA - LOWEST - SLICE) / FIELD + 1;  // fields that one shift brings into place

    __host__ __device__ static constexpr double factor(int at) { return (HALF_APART ? 1 : STEP) / (1 << at); }
    __host__ __device__ static constexpr double addend(int at) {
        return (HALF_APART ? 1 : STEP) * ((CUT && UP ? 0.5 : 0) - POWER / (1 << at) - MIDDLE);
    }
};

// Fields with the codes of row tile `tile` of a unit whose first PLANES planes are words[4*p + tile], those of a rounded slice
// one more than its bits.
template <int PLANES, int SLICE, int FIELD>
__device__ __forceinline__ void slice_fields(u32 (&fields)[FIELD], const u32 (&words)[4 * PLANES], int tile) {
    u32 planes[SLICE];
#pragma unroll
    for (int p = 0; p < SLICE; ++p) planes[p] = words[4 * p + tile];
    if constexpr (PLANES > SLICE) {
        u32 all = planes[0];
#pragma unroll
        for (int p = 1; p < SLICE; ++p) all &= planes[p];
        u32 carry = words[4 * SLICE + tile] & ~all;
#pragma unroll
        for (int p = SLICE - 1; p >= 0; --p) {
            const u32 before = planes[p];
            planes[p] = before ^ carry;
            carry &= before;
        }
    }
    gather_planes<FIELD, SLICE>(fields, planes);
}

// That row tile as A operands: a[s] is that of step s.
template <int PLANES, int SLICE, bool CUT, bool BF16>
__device__ __forceinline__ void dequantise_planes(u32 (&a)[4][4], const u32 (&words)[4 * PLANES], int tile, const Lookup& lookup) {
    using S = Slice<SLICE, CUT, BF16>;
    static_assert(PLANES == (CUT || SLICE == 8 ? SLICE : SLICE + 1));
    // Unknown to the compiler, which would split a lop3 of two constants in two.
    const u32 base = S::BASE ^ lookup.zero;
    u32 fields[S::FIELD];
    slice_fields<PLANES, SLICE>(fields, words, tile);
#pragma unroll
    for (int q = 0; q < 16; ++q) {
        const int w = q % S::FIELD, i = q / S::FIELD, in_group = i % S::AT_ONCE;
        const int shift = (i - in_group) * S::FIELD - S::LOWEST, at = S::LOWEST + in_group * S::FIELD;
        const u32 v = shift < 0 ? fields[w] << 1 : fields[w] >> shift;
        u32 pair;
        if constexpr (S::SPLIT) {
            const u32 off = combine<NOT_MASK_OR>(v, 0x00800080u, base ^ 0x80008000u);
            pair = multiply_add_pair<BF16>(combine<MASK_OR>(v, 0x007f007fu, base), pair_of<BF16>(1), off);
        } else {
            const u32 mask = ((1u << SLICE) - 1) * 0x10001u << at;
            pair = multiply_add_pair<BF16>(combine<MASK_OR>(v, mask, base), pair_of<BF16>(S::factor(at)), pair_of<BF16>(S::addend(at)));
        }
        if constexpr (S::HALF_APART) pair = multiply_add_pair<BF16>(pair, pair_of<BF16>(S::STEP), pair_of<BF16>(S::STEP / 2));
        a[q / 4][q / 2 % 2 + q % 2 * 2] = pair;
    }
}
