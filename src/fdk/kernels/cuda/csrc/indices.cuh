// The product by sparse mma, for one or two tokens and tables of two or four values.
//
// A sparse mma multiplies each kept element of A by the row of B, one of four, that two bits of an index name. Here the
// elements are activations, the indices are codes, and the four rows of B are the table: what selects a value for each
// weight is the tensor core, and words of codes are its operand all but as they lie. There are no look-ups.
//
// Its eight columns of B would all say the same; each is zero but for some of the rows of weights and one of the units,
// so that sums of four units, which have scales of their own, lie in different lanes and are scaled all at once.
//
//   2 bits   A nibble holds two neighbours of a row: words are indices as they are. Equal ones, which PTX calls undefined,
//            select the same row of B twice on compute capability 9.0; the host asks each device before it relies on that
//            (decode.py, equal_indices). Nibbles belong to rows 8h + g in turn, columns 2 slot + h of B to one of them.
//   1 bit    Bits 0 and 2 of a nibble (1 and 3, shifted) are those of two steps in the same row: with bit 1 cleared and
//            bit 3 set they are indices into T[0], T[1], T[0], T[1].
//
// Zero points take sums of activations: of the same operands, with ones as B.
#pragma once
#include "activations.cuh"

namespace fdk {

constexpr int SLOTS = STAGE_UNITS;  // units whose sums lie side by side

// Table values that a lane has of B's rows 2t and 2t+1 of eight: in its column of 2 bits, of every other four rows. They are
// asked for in front of the ring.
struct LaneValues {
    u16 values[2];

    __device__ static __forceinline__ LaneValues of(const u16* table, int lane) {
        const int first = BITS == 1 ? 0 : lane % 2 * 2;
        const auto value = [&](int code) { return TABLE ? load_2(table + code) : round_half<BF16>(float(code - (KIND == kind::INT ? 1 << (BITS - 1) : 0))); };
        return {{value(first), value(first + 1)}};
    }
    __device__ __forceinline__ u32 pair(int lane) const {
        const int g = lane / 4, t = lane % 4;
        return BITS == 2 && t / 2 != g % 2 ? 0 : arrived(values[0]) | u32(arrived(values[1])) << 16;
    }
};

// Sums of one block over a warp's slice: row 16*tile + 8*h + g, of units t, t + SLOTS, .. of each stage.
// d: sums of the stage that are not scaled yet, in two parts.
struct Accumulator {
    float sum[M][4][2];
    float d[M][4][4];
    float x[M][4];  // likewise the sums of activations, the same for each row
};

// A unit in registers; the last of a stage brings the scales of the unit that the lane has sums of.
struct Unit {
    u32 words[4 * BITS];
    Rows scales;
    Zeros zeros;
};

__device__ __forceinline__ void load_unit(Unit& u, const char* stage, StageGroups groups, int index, int, int lane, int, WholeBlock) {
#pragma unroll
    for (int i = 0; i < BITS; ++i) {
        const u32x4 v = *reinterpret_cast<const u32x4*>(stage + index * Smem::CODE_BYTES + i * 512 + lane * 16);
        u.words[4 * i] = v.x, u.words[4 * i + 1] = v.y, u.words[4 * i + 2] = v.z, u.words[4 * i + 3] = v.w;
    }
    if (index == STAGE_UNITS - 1) {
        const int group = STAGE_GROUPS == 1 ? 0 : lane % SLOTS * 64 / GROUP;
        u.scales = load_rows(groups.scales + group * 128, lane / 4);
        if constexpr (ZEROS) u.zeros = load_zeros(groups.zeros + group * Smem::GROUP_ZERO_BYTES, lane / 4);
    }
}

// The unit's activations of one token. 2 bits: a[i][pair] are those of word i; 1 bit: a[0][pair].
template <int WORDS>
__device__ __forceinline__ void load_activations(u32 (&a)[WORDS][2][4], const char* from, int lane) {
    const int t = lane % 4;
    const auto eight = [&](int step, int half) { return *reinterpret_cast<const u32x4*>(from + step * 32 + half * 16); };
    if constexpr (BITS == 1) {
        const int step = 3 - 2 * (t % 2), half = 1 - t / 2;
        const u32x4 odd = eight(step, half), even = eight(step - 1, half);
        const u32 o[4] = {odd.x, odd.y, odd.z, odd.w}, e[4] = {even.x, even.y, even.z, even.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) a[0][i / 4][i % 4] = __byte_perm(o[i / 4 * 2 + i % 4 / 2], e[i / 4 * 2 + i % 4 / 2], i % 2 ? 0x7632 : 0x5410);
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            const u32x4 v = eight(2 * i, t / 2), w = eight(2 * i + 1, t / 2);
            a[i][0][0] = v.x, a[i][0][1] = w.x, a[i][0][2] = v.y, a[i][0][3] = w.y;
            a[i][1][0] = v.z, a[i][1][1] = w.z, a[i][1][2] = v.w, a[i][1][3] = w.w;
        }
    }
}

__device__ __forceinline__ void multiply_units(Accumulator& acc, const Unit* units, const char* smem, int unit, int index, int lane, const Lookup& lookup, WholeBlock) {
    const Unit& u = *units;
    const int g = lane / 4;
#pragma unroll
    for (int token = 0; token < M; ++token) {
        const char* x = smem + Smem::X + token * Smem::X_STRIDE + unit * 128;
        float (&d)[4][4] = acc.d[token];
        u32 a[BITS][2][4];
        load_activations(a, x, lane);
        if constexpr (ZEROS) {
            // Of two bits, each activation is there for rows g and for rows g + 8.
            const u32 ones = g / 2 == index && (BITS == 1 || lane % 4 < 2) ? BF16 ? 0x3f803f80u : 0x3c003c00u : 0;
#pragma unroll
            for (int i = 0; i < BITS; ++i) {
                mma_sparse<BF16, 0>(acc.x[token], a[i][0], ones, 0x44444444u);
                mma_sparse<BF16, 1>(acc.x[token], a[i][1], ones, 0x44444444u);
            }
        }
        if constexpr (BITS == 1) {
            // The compiler splits a lop3 whose constants it both knows.
            const u32 upper = 0x88888888u ^ lookup.zero;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const u32 b = g == 2 * index + h ? lookup.pair : 0;
                u32 indices[4];
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) indices[tile] = combine<MASK_OR>(u.words[tile] >> (1 - h), 0x55555555u, upper);
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) mma_sparse<BF16, 0>(d[tile], a[0][0], b, indices[tile]);
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) mma_sparse<BF16, 1>(d[tile], a[0][1], b, indices[tile]);
            }
        } else {
            const u32 b = g / 2 == index ? lookup.pair : 0;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                u32 indices[4];
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) indices[tile] = rotate_left(u.words[tile * 2 + i], 32 - 7);  // they are packed rotated left by 7
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) mma_sparse<BF16, 0>(d[tile], a[i][0], b, indices[tile]);
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) mma_sparse<BF16, 1>(d[tile], a[i][1], b, indices[tile]);
            }
        }
        if (index == STAGE_UNITS - 1) {
#pragma unroll
            for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float v = d[tile][h] + d[tile][2 + h];
                    if constexpr (ZEROS) v = fmaf(-u.zeros.at(tile, h), acc.x[token][h] + acc.x[token][2 + h], v);
                    acc.sum[token][tile][h] = fmaf(u.scales.at(tile, h), v, acc.sum[token][tile][h]);
                }
                d[tile][0] = d[tile][1] = d[tile][2] = d[tile][3] = 0;
            }
            if constexpr (ZEROS) acc.x[token][0] = acc.x[token][1] = acc.x[token][2] = acc.x[token][3] = 0;
        }
    }
}

// A warp's sums of a block to its slot [64 rows][M tokens].
__device__ __forceinline__ void store_partial(float* slot, const Accumulator& acc, const char*, int lane, float, float, WholeBlock) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int token = 0; token < M; ++token)
#pragma unroll
        for (int tile = 0; tile < 4; ++tile)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float v = acc.sum[token][tile][h];
#pragma unroll
                for (int other = SLOTS / 2; other; other /= 2) v += __shfl_xor_sync(0xffffffffu, v, other);
                if (t == 0) slot[(tile * 16 + h * 8 + g) * M + token] = v;
            }
}

// Brings the activations of the CTA's slice into shared memory.
__device__ __forceinline__ void prepare_activations(const Params& p, char* smem, Activations& x, Norms& norms, int phase, int first_unit, int units, int warp, int lane, const Lookup&) {
    stage_activations(p, smem, x, norms, phase, first_unit, units, warp, lane);
    if constexpr (FDK_LATE) let_next_kernel_start();
}

}  // namespace fdk
