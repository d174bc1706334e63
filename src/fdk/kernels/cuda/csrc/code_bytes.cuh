// Codes as bytes, the A operand of mma.m16n8k32, and that product: what digits.cuh and digits_many.cuh share.
#pragma once
#include "fixed_point.cuh"

namespace fdk {

// Products of rows 8h + g carry this power of two.
__device__ constexpr int row_shift(int h) {
    if (SPARSE) return 4;
    if (NESTED) return MAX_SHIFT + (FIELD == 2 ? 2 * h : 0);
    return BITS == 1 ? 7 - h : BITS == 2 ? 2 + 4 * h : BITS == 4 ? 4 : 8 - BITS;
}

// The bit of its byte at which code_bytes leaves the code of byte `byte` of register `i` of step `step`.
__device__ constexpr int code_bit(int step, int i, int byte) {
    if (NESTED) return (step * 4 + i % 2 * 2 + i / 2) / FIELD * FIELD;
    if (BITS == 1) return 7 - i % 2 - 2 * (2 * step + i / 2);
    return BITS == 2 ? 4 * (i % 2) + 2 * (i / 2) : BITS == 4 ? 4 * (i / 2) : (1 - byte % 2) * MAX_SHIFT;
}

// Codes e and e + 1 of a row tile of 3 or 5 to 7 bits at bit `to`, others around them.
template <int WORDS>
__device__ __forceinline__ u32 two_codes(const u32 (&words)[WORDS], int tile, int e, int to) {
    const auto shifted = [](u32 w, int right) { return right < 0 ? w << -right : w >> right; };
    const u32* own = words + tile * BITS;
    if constexpr (BITS == 3) {
        // Five pairs of codes in a word, from its second bit on; the last pair's bits are what three words have left.
        if (e < 30) return shifted(own[e / 10], 1 + e % 10 * 3 - to);
        u32 codes = 0;
#pragma unroll
        for (int i = 0; i < 3; ++i) codes = combine<MASK_OR>(rotate_left(own[i], 1 + to + 2 * i), 3u << to << 2 * i, codes);
        return codes;
    } else {
        const int bit = e * BITS % 32, word = e * BITS / 32;
        return bit + 2 * BITS > 32 ? __funnelshift_r(own[word], own[word + 1], bit - to) : shifted(own[word], bit - to);
    }
}

// A operands of the two steps of a row tile, codes as bytes.
template <int WORDS>
__device__ __forceinline__ void code_bytes(u32 (&a)[2][4], const u32 (&words)[WORDS], int tile, const Lookup& lookup) {
    if constexpr (SPARSE) {
        const ByteExpansion expand(lookup);
        expand(a, words, tile);
    } else if constexpr (NESTED) {
        constexpr u32 MASK = 0x01010101u * ((1u << FDK_SLICE) - 1);
        u32 fields[FIELD];
        slice_fields<BITS, FDK_SLICE>(fields, words, tile);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int bit = i / 4 * 4 + i % 2 * 2 + i / 2 % 2;
            a[i / 4][i % 4] = FDK_SLICE == 8 ? fields[bit % FIELD] : fields[bit % FIELD] & MASK << bit / FIELD * FIELD;
        }
    } else {
        constexpr int BACK = 32 - 7;  // words are packed rotated left by 7
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            if constexpr (BITS == 1) {
                const u32 w = words[tile];
#pragma unroll
                for (int i = 0; i < 4; ++i) a[step][i] = w & (0x01010101u << (7 - i % 2 - 2 * (2 * step + i / 2)));
            } else if constexpr (BITS == 2) {
                const u32 w = rotate_left(words[tile * 2 + step], BACK);
                a[step][0] = w & 0x03030303u, a[step][1] = w & 0x30303030u;
                a[step][2] = w & 0x0c0c0c0cu, a[step][3] = w & 0xc0c0c0c0u;
            } else if constexpr (BITS == 4) {
                const u32 w0 = rotate_left(words[tile * 4 + 2 * step], BACK), w1 = rotate_left(words[tile * 4 + 2 * step + 1], BACK);
                const u32 low = __byte_perm(w0, w1, 0x5410), high = __byte_perm(w0, w1, 0x7632);
                a[step][0] = low & 0x0f0f0f0fu, a[step][1] = high & 0x0f0f0f0fu;
                a[step][2] = low & 0xf0f0f0f0u, a[step][3] = high & 0xf0f0f0f0u;
            } else if constexpr (BITS == 8) {
#pragma unroll
                for (int i = 0; i < 4; ++i) a[step][i] = rotate_left(words[tile * 8 + step * 4 + i], BACK);
            } else {
                // Neighbouring codes stay beside each other: the first at the top of its byte, the second at the bottom.
                constexpr u32 TWO = ((1u << 2 * BITS) - 1) << (8 - BITS);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int e = (step * 4 + i) * 4;
                    a[step][i] = combine<MASK_OR>(two_codes(words, tile, e, 8 - BITS), TWO, two_codes(words, tile, e + 2, 24 - BITS) & TWO << 16);
                }
            }
        }
    }
}

// d = a b + c for unsigned bytes a[16 x 32], or SIGNED ones as those of sparse weights, and signed bytes b[32 x 8].
template <bool SIGNED = SPARSE>
__device__ __forceinline__ void mma_bytes(u32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const u32 (&c)[4]) {
    if constexpr (SIGNED)
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
    else
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

}  // namespace fdk
