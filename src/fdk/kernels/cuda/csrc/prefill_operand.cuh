// From a unit's stage to the A operand of wgmma: its codes in registers, and what they become.
#pragma once
#include "prefill_ring.cuh"

namespace fdk {

// A part of a unit as the A operand, with the scales of this lane's rows g and g + 8.
struct Operand {
    u32 a[4 / PARTS][4];
    float scale[LATE ? SUBS : 1][2];
};

// What a lane has of a unit: its codes, and scales and zero points of its two rows.
struct Codes {
    u32 words[4 * BITS];
    u32 scale[GROUPED ? SUBS : 1], zero[ZEROS ? SUBS : 1];
};

// A lane's words of row tile r lie at word r*BITS + i of the unit, four words to a piece of 512 bytes; those of planes at
// word r of every piece.
struct WordOffsets {
    static constexpr int WIDTH = NESTED ? 1 : BITS % 4 == 0 ? 4 : BITS % 2 == 0 ? 2 : 1, COUNT = BITS / WIDTH;
    u32 at[COUNT];
    __device__ __forceinline__ WordOffsets(int r, int lane) {
#pragma unroll
        for (int i = 0; i < COUNT && NESTED; ++i) at[i] = i * 512 + lane * 16 + r * 4;
#pragma unroll
        for (int i = 0; i < COUNT && !NESTED; ++i) at[i] = (r * BITS + i * WIDTH) / 4 * 512 + lane * 16 + (r * BITS + i * WIDTH) % 4 * 4;
    }
};

__device__ __forceinline__ void load_words(u32 (&words)[4 * BITS], const char* codes, const WordOffsets& offsets) {
#pragma unroll
    for (int i = 0; i < WordOffsets::COUNT; ++i) {
        const char* from = codes + offsets.at[i];
        if constexpr (WordOffsets::WIDTH == 4) {
            const u32x4 v = *reinterpret_cast<const u32x4*>(from);
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        } else if constexpr (WordOffsets::WIDTH == 2) {
            const u32x2 v = *reinterpret_cast<const u32x2*>(from);
            words[2 * i] = v.x, words[2 * i + 1] = v.y;
        } else {
            words[NESTED ? 4 * i : i] = *reinterpret_cast<const u32*>(from);
        }
    }
}

// Unit number `unit` of a block from its stage to registers.
__device__ __forceinline__ void load_codes(Codes& c, const char* block, const WordOffsets& offsets, int unit, int r, int g) {
    load_words(c.words, block, offsets);
    if constexpr (Smem::STAGED_GROUPS > 0) {
#pragma unroll
        for (int sub = 0; sub < SUBS; ++sub) {
            int group = 0;
            if constexpr (SUBS > 1) group = (unit * 64 + sub * (64 / SUBS)) / GROUP - staged_group(unit);
            // Columns past K have no group of their own; any finite scale will do, because their activations are zero.
            if constexpr (SUBS > 1 && K % 64 != 0) group = min(group, UNIT_GROUPS - 1);
            if constexpr (GROUPED) c.scale[sub] = *reinterpret_cast<const u32*>(block + Smem::SCALES + group * 128 + g * 16 + r * 4);
            if constexpr (ZEROS) c.zero[sub] = *reinterpret_cast<const u16*>(block + Smem::ZEROS_AT + group * 64 + g * 8 + r * 2);
        }
    }
}

// Part `part` of a unit's codes as values: of a table, or integers less their zero point; with ROUND times their scale.
__device__ __forceinline__ void expand(Operand& o, const Codes& c, int part, const Lookup& lookup) {
    constexpr int COUNT = 4 / PARTS;
    const int first = part * COUNT;
    u32 a[4][4];  // what other parts hold of it is not computed
    if constexpr (NESTED)
        dequantise_planes<BITS, FDK_SLICE, KIND == kind::CUT, BF16>(a, c.words, 0, lookup);
    else if constexpr (INTEGERS)
        to_integers<BITS, BF16>(a, c.words, 0);
    else
        dequantise<BITS, BF16, BITS == 1, WIDE>(a, c.words, 0, lookup);
#pragma unroll
    for (int s = 0; s < COUNT; ++s) {
        const int sub = (first + s) / STEPS;
        u32 zero[2] = {}, scale[2] = {};
        if constexpr (ZEROS) {
            // Differences of integers below 2^8 are exact in 16 bits.
            constexpr float CENTRE = INTEGERS ? 1 << (BITS - 1) : 0;
            zero[0] = round_half<BF16>(float(c.zero[sub] & 0xff) - CENTRE) * 0x10001u;
            zero[1] = round_half<BF16>(float(c.zero[sub] >> 8) - CENTRE) * 0x10001u;
        }
        if constexpr (GROUPED && ROUND)
            scale[0] = __byte_perm(c.scale[sub], 0, 0x1010), scale[1] = __byte_perm(c.scale[sub], 0, 0x3232);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 v = a[first + s][i];
            if constexpr (ZEROS) v = subtract_pair<BF16>(v, zero[i % 2]);
            if constexpr (GROUPED && ROUND) v = multiply_pair<BF16>(v, scale[i % 2]);
            o.a[s][i] = v;
        }
    }
    if constexpr (LATE) {
#pragma unroll
        for (int sub = 0; sub < SUBS; ++sub) o.scale[sub][0] = low_half<BF16>(c.scale[sub]), o.scale[sub][1] = high_half<BF16>(c.scale[sub]);
    }
}

}  // namespace fdk
