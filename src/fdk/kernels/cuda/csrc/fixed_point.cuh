// Activations as fixed-point numbers in base 256, see digits.cuh: what a digit stands for, and where it lies.
//
// Shared memory at X: digits[unit][4 * token + digit][t][16 bytes], the B operands of both steps of a lane; at SUM:
// sum(x)[unit][token]; at MAXIMA: the largest |x| of each warp, and 2^-shift. digit_pairs.cuh and digit_columns.cuh fill it.
#pragma once
#include "epilogue.cuh"

namespace fdk {

constexpr int COLUMNS_USED = 4 * M;
// Nested weights: bits of the fields that planes become (planes.cuh), a byte of which holds codes of rows g and g + 8.
using Planes = Slice<NESTED ? FDK_SLICE : 2, KIND == kind::CUT, BF16>;
constexpr int FIELD = Planes::FIELD;
constexpr int MAX_SHIFT = SPARSE ? 0 : NESTED ? (FIELD < 8 ? 4 : 0) : BITS == 1 ? 6 : BITS == 2 ? 2 : BITS == 4 ? 4 : 8 - BITS;

// Byte `byte` of register `half` (columns 4t.. or 16+4t.. of the mma) of step S holds column 16s + 8(j/2) + 2t + j%2 of
// the unit, sparse: 16t + 4s + j with the two halves exchanged for odd t (sparse.cuh), with x scaled by 2^shift.
struct Element {
    int s, j, shift;
};
__device__ constexpr Element element(int step, int half, int byte) {
    if (SPARSE) return {2 * step + half, byte % 3 ? 3 - byte : byte, 0};
    if (NESTED) return {2 * (byte % 2) + step, 2 * half + byte / 2, MAX_SHIFT * (1 - step)};
    if (BITS == 1) return {2 * step + half, byte == 0 ? 2 : byte == 1 ? 0 : byte == 2 ? 3 : 1, 2 * (2 * step + half)};
    if (BITS != 2 && BITS != 4) return {2 * step + half, byte, byte % 2 * MAX_SHIFT};
    return {2 * step + byte / 2, 2 * (byte % 2) + half, BITS * (1 - half)};
}

// Of one token a lane makes digits of pairs of neighbouring columns, else of 16 columns.
constexpr int SHARE_WARPS = SHARE_THREADS / 32, SHARE_MOST_UNITS = (SHARE_UNITS + SHARE_WARPS - 1) / SHARE_WARPS;
constexpr bool IN_PAIRS = M == 1 && K % 2 == 0 && SHARE_MOST_UNITS <= 32;

// 2^-shift of a token in a warp's slice of k.
__device__ __forceinline__ float& back_of(char* smem, int token, int k_warp) {
    return reinterpret_cast<float*>(smem + Smem::MAXIMA)[M * WARPS + token * K_WARPS + k_warp];
}

// 2^shift and 2^-shift of a token whose largest |x| is `most`, as the bits of a float.
struct Fixed {
    float scale, back;
    __device__ static __forceinline__ Fixed of(u32 most) {
        const int exponent = int(most >> 23);  // biased; 255 for NaN and infinity
        // Finite also with the shift of an element; a slice below 2^-97 has fewer digits.
        const int biased = min(29 - MAX_SHIFT + 2 * 127 - exponent, 254 - MAX_SHIFT);
        const float back = __uint_as_float(u32(254 - biased) << 23);
        return {__uint_as_float(u32(biased) << 23), exponent == 255 ? __uint_as_float(0x7fc00000u) : back};
    }
};

// Of each token, from the largest |x| of each lane as two halves, that of the share as the bits of a float; only the share's
// first BUSY warps have any. own: the warp's number in the share.
template <int BUSY>
__device__ __forceinline__ void find_largest(u32 (&largest)[M], char* smem, const Share& share, int own, int k_warp, int warp, int lane) {
    u32* maxima = reinterpret_cast<u32*>(smem + Smem::MAXIMA);
#pragma unroll
    for (int k = 0; k < M; ++k) {
        largest[k] = __reduce_max_sync(0xffffffffu, max(largest[k] & 0xffffu, largest[k] >> 16));
        largest[k] = __float_as_uint(low_half<BF16>(largest[k]));
        if (BUSY > 1 && lane == 0) maxima[k * WARPS + k_warp * SHARE_WARPS + own] = largest[k];
    }
    if constexpr (BUSY > 1) {
        share.sync(warp);
#pragma unroll
        for (int k = 0; k < M; ++k)
#pragma unroll
            for (int i = 0; i < BUSY; ++i) largest[k] = max(largest[k], maxima[k * WARPS + k_warp * SHARE_WARPS + i]);
    }
}

// Half a digit added to the lower three lets them carry into the next; what remains is signed.
__device__ __forceinline__ u32 fixed_point(float value, float power) {
    constexpr u32 HALVES = 0x00808080u;
    // The sum of a 16-bit float and HALVES loses no more than the one rounding to an integer.
    return PAIRED ? u32(__float2int_rn(fmaf(value, power, float(HALVES)))) : u32(__float2int_rn(value * power)) + HALVES;
}

}  // namespace fdk
