// The product in integers (digits.cuh) for two, four or eight tokens: a product for every two, whose digits fill its columns.
//
// A code becomes a byte once for all tokens, so that what grows with them is products and sums. Those are kept few: pairs of
// digits are added up before they are scaled; two units of a group share an accumulator; and the middle code is not taken off
// what a unit sums up to, but is where its sums start: one more product of each step, of bytes that say -middle wherever the
// others have codes. That start, -middle * sum(x), is also what zero points and the half step of cut slices are added by.
#pragma once
#include "code_bytes.cuh"
#include "digit_words.cuh"

namespace fdk {

using Activations = Words;
constexpr bool IDLE_WARPS = Activations::BUSY_WARPS < SHARE_WARPS;  // while others make digits: the last among those of a share
constexpr bool X_MEANWHILE = false;
constexpr int MIDDLE = NESTED ? int(Planes::MIDDLE) : 1 << (BITS - 1);
constexpr bool OFF_CENTRE = ZEROS || KIND == kind::CUT;  // values are not code - MIDDLE, but by so much more
constexpr int PRODUCTS = M / 2;

__device__ __forceinline__ void wait_for_activations(const Params&, char*, int, int, int, int, int, int) {}
constexpr int PHASES_AHEAD = 0;
__device__ __forceinline__ u32 done_barrier(const char*, int) { return 0; }

// Sums of one block over a warp's slice, row 16*tile + 8*h + g, of token 2*product + t/2 those of digits 2*(t%2) and one more:
// of scale * (code - MIDDLE) * digits, and of scale * more * digits, as those of rows g.
struct Accumulator {
    float sum[4][2][PRODUCTS];
    float more[OFF_CENTRE ? 4 : 1][2][PRODUCTS];
};

struct Unit {
    u32 words[4 * BITS];
    Rows scales;
    Zeros zeros;
};

__device__ __forceinline__ void load_unit(Unit& u, const char* stage, StageGroups groups, int index, int, int lane, int, WholeBlock) {
    const int g = lane / 4, group = STAGE_GROUPS == 1 ? 0 : index * 64 / GROUP;
#pragma unroll
    for (int i = 0; i < BITS; ++i) {
        const u32x4 v = *reinterpret_cast<const u32x4*>(stage + index * Smem::CODE_BYTES + i * 512 + lane * 16);
        u.words[4 * i] = v.x, u.words[4 * i + 1] = v.y, u.words[4 * i + 2] = v.z, u.words[4 * i + 3] = v.w;
    }
    u.scales = load_rows(groups.scales + group * 128, g);
    if constexpr (ZEROS) u.zeros = load_zeros(groups.zeros + group * Smem::GROUP_ZERO_BYTES, g);
}

// As in digits.cuh; sums of two units are below 2^22, too.
constexpr u32 MAGIC = 0x4b400000u, NEXT = MAGIC + (8u << 23);

// What the sums of a product and unit start from, less MAGIC and NEXT, on top of d: those of rows g and g + 8, the same for all.
__device__ __forceinline__ void add_start(u32 (&d)[4], const u32x4& b) {
    u32 middle[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const auto at = [&](int byte) { return 0x00010001u * (u32(-MIDDLE << code_bit(i / 4, i % 4, byte)) & 0xff) << 8 * byte; };
        middle[i / 4][i % 4] = at(0) | at(1);
    }
    mma_bytes<true>(d, middle[0], b.x, b.y, d);
    mma_bytes<true>(d, middle[1], b.z, b.w, d);
}

__device__ __forceinline__ u32x4 digits_at(const char* smem, int unit, int product, int lane) {
    return *reinterpret_cast<const u32x4*>(smem + Smem::X + (unit * COLUMNS_USED + product * 8) * 64 + lane * 16);
}

// UNITS_AT_ONCE units of one group, the first of which is unit `unit` of the CTA.
__device__ __forceinline__ void multiply_units(Accumulator& acc, const Unit* units, const char* smem, int unit, int, int lane, const Lookup& lookup, WholeBlock) {
    const float both = __uint_as_float(MAGIC) + __uint_as_float(NEXT);
    const auto sum_of = [&](u32 low, u32 high) { return (__uint_as_float(high) - both) + __uint_as_float(low); };

    u32x4 b[UNITS_AT_ONCE][PRODUCTS];
    u32 start[PRODUCTS][4];
#pragma unroll
    for (int p = 0; p < PRODUCTS; ++p) {
        start[p][0] = start[p][2] = MAGIC, start[p][1] = start[p][3] = NEXT;
#pragma unroll
        for (int j = 0; j < UNITS_AT_ONCE; ++j) {
            b[j][p] = digits_at(smem, unit + j, p, lane);
            add_start(start[p], b[j][p]);
        }
    }
    float x[PRODUCTS];
#pragma unroll
    for (int p = 0; OFF_CENTRE && p < PRODUCTS; ++p) x[p] = sum_of(start[p][0], start[p][1]) * (KIND == kind::CUT ? -0.5f / MIDDLE : 1.f);
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
        u32 d[PRODUCTS][4];
#pragma unroll
        for (int j = 0; j < UNITS_AT_ONCE; ++j) {
            u32 a[2][4];
            code_bytes(a, units[j].words, tile, lookup);
#pragma unroll
            for (int p = 0; p < PRODUCTS; ++p) mma_bytes(d[p], a[0], b[j][p].x, b[j][p].y, j == 0 ? start[p] : d[p]);
#pragma unroll
            for (int p = 0; p < PRODUCTS; ++p) mma_bytes(d[p], a[1], b[j][p].z, b[j][p].w, d[p]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float scale = units->scales.at(tile, h);
            const float more = ZEROS ? scale * fmaf(units->zeros.at(tile, h), 1.f / MIDDLE, -1.f) : scale;
#pragma unroll
            for (int p = 0; p < PRODUCTS; ++p) {
                float& sum = acc.sum[tile][h][p];
                sum = fmaf(scale, sum_of(d[p][2 * h], d[p][2 * h + 1]), sum);
                if constexpr (OFF_CENTRE) acc.more[tile][h][p] = fmaf(more, x[p], acc.more[tile][h][p]);
            }
        }
    }
}

// A warp's sums of a block to its slot [64 rows][M tokens]. Of the two lanes that have parts of a sum, each finishes one row.
__device__ __forceinline__ void store_partial(float* slot, const Accumulator& acc, char* smem, int lane, float, float, WholeBlock) {
    const int g = lane / 4, t = lane % 4;
    const bool odd = t % 2;
#pragma unroll
    for (int p = 0; p < PRODUCTS; ++p) {
        const int token = 2 * p + t / 2;
        const float back = back_of(smem, token, OWN_X ? threadIdx.x / 32 % K_WARPS : 0);
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) {
            float part[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                constexpr float STEP = NESTED ? float(Planes::STEP) : 1.f;
                part[h] = acc.sum[tile][h][p] * (STEP / float(1 << row_shift(h)));
                if constexpr (OFF_CENTRE) part[h] = fmaf(acc.more[tile][h][p], STEP / float(1 << row_shift(0)), part[h]);
            }
            const float mine = odd ? part[1] : part[0], theirs = odd ? part[0] : part[1];
            const float given = __shfl_xor_sync(0xffffffffu, theirs, 1);
            const float v = odd ? fmaf(65536.f, mine, given) : fmaf(65536.f, given, mine);
            slot[(tile * 16 + odd * 8 + g) * M + token] = v * back;
        }
    }
}

}  // namespace fdk
