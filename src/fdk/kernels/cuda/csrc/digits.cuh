// The product in integers, for one or two tokens of formats that are affine in their codes (int, uint, nested, sparse int, any one bit).
//
// An mma has eight columns and one token fills one of them; here it fills four, one for each digit of its activations:
// x * 2^shift is rounded to 32-bit fixed point, the largest |x| of the CTA's slice just below 2^30, and written in
// base 256 with digits in [-128, 127]. Codes enter mma.m16n8k32 as bytes, four for one `and`, and sums are exact.
// An `and` leaves a code at some bit of its byte; activations are scaled by the missing power of two (element_shift),
// and what differs between rows g and g+8 is taken out of the sums (row_shift).
//
// A code thus costs a quarter of an instruction or less, where dequantising to bf16 costs half a lop3 per weight at
// one bit and a table look-up's share of shared-memory bandwidth above. Zero points enter through sums of x.
//
// FDK_PAIRED: one token's digits fill only half of the columns, so two row tiles share an accumulator, each with the
// digits in its own half of the columns and zeros in the other. A lane then has half as many sums to scale.
#pragma once
#include "code_bytes.cuh"
#include "digit_columns.cuh"
#include "digit_pairs.cuh"

namespace fdk {

// A lane has the sums of row tiles LANE_TILES * share_of(lane) + 0.. and, of each, of columns 2t and 2t + 1.
constexpr int LANE_TILES = 4 / TILES_SHARING;
__device__ __forceinline__ int share_of(int lane) {
    return TILES_SHARING == 1 ? 0 : lane % 4 / 2;
}

template <bool IN_PAIRS>
struct Chosen {
    using Type = Columns;
};
template <>
struct Chosen<true> {
    using Type = Pairs;
};
using Activations = Chosen<IN_PAIRS>::Type;
constexpr bool IDLE_WARPS = Activations::BUSY_WARPS < SHARE_WARPS;  // while others make digits: the last among those of a share
constexpr bool X_MEANWHILE = false;

__device__ __forceinline__ void wait_for_activations(const Params&, char*, int, int, int, int, int, int) {}
constexpr int PHASES_AHEAD = 0;
__device__ __forceinline__ u32 done_barrier(const char*, int) { return 0; }

// Sums of one block over a warp's slice, row 16*tile + 8*h + g: of scale * digits for columns 2t and 2t+1, that is
// digits 2*(t%2) and one more of token t/2 (one token, not sharing: t < 2 only), and of scale * (zero *) sum(x) of that
// token. PAIRED: digits are added up before they are scaled.
struct Accumulator {
    float sum[LANE_TILES][2][PAIRED ? 1 : 2];
    float scaled_x[LANE_TILES][2];
};

struct Unit {
    u32 words[SPARSE ? 24 : 4 * BITS];
    Rows scales;
    Zeros zeros;
};

__device__ __forceinline__ void load_unit(Unit& u, const char* stage, StageGroups groups, int index, int, int lane, int, WholeBlock) {
    const int g = lane / 4, share = share_of(lane), group = STAGE_GROUPS == 1 ? 0 : index * 64 / GROUP;
    constexpr int PIECES = SPARSE ? 6 : BITS, PIECE = Smem::CODE_BYTES / PIECES;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const u32x4 v = *reinterpret_cast<const u32x4*>(stage + index * Smem::CODE_BYTES + i * PIECE + lane / (512 / PIECE) * 16);
        u.words[4 * i] = v.x, u.words[4 * i + 1] = v.y, u.words[4 * i + 2] = v.z, u.words[4 * i + 3] = v.w;
    }
    u.scales = load_rows(groups.scales + group * 128, g, share);
    if constexpr (ZEROS) u.zeros = load_zeros(groups.zeros + group * Smem::GROUP_ZERO_BYTES, g, share);
}

// Unit `unit` of the CTA, which is unit `index` of its stage; `operand(a, tile)` gives the A operands of a row tile.
template <class Operand>
__device__ __forceinline__ void multiply_operands(Accumulator& acc, const Unit& u, const char* smem, int unit, int index, int lane, Operand operand) {
    // Sums start at 1.5 * 2^23, so that their bits read as a float are that number plus the sum, which is below 2^22;
    // a start of 256 times as much makes them count 256 each.
    constexpr u32 MAGIC = 0x4b400000u, NEXT = PAIRED ? MAGIC + (8u << 23) : MAGIC;
    const float magic = __uint_as_float(MAGIC), both = __uint_as_float(MAGIC) + __uint_as_float(NEXT);
    const u32 start[4] = {MAGIC, NEXT, MAGIC, NEXT};
    const int t = lane % 4, column = lane / 4;
    u32x4 b[TILES_SHARING];
#pragma unroll
    for (int i = 0; i < TILES_SHARING; ++i) {
        const int digits = Smem::X + ((unit - index) * COLUMNS_USED + column % COLUMNS_USED) * 64 + t * 16;
        const bool zeros = TILES_SHARING > 1 && column / COLUMNS_USED != i;
        b[i] = *reinterpret_cast<const u32x4*>(smem + (zeros ? Smem::NO_DIGITS : digits) + index * COLUMNS_USED * 64);
    }
    const float x = reinterpret_cast<const float*>(smem + Smem::SUM)[unit * M + (M == 2 ? t / 2 : 0)];
#pragma unroll
    for (int tile = 0; tile < LANE_TILES; ++tile) {
        u32 a[2][4], d[4] = {start[0], start[1], start[2], start[3]};
#pragma unroll
        for (int i = 0; i < TILES_SHARING; ++i) {
            operand(a, tile + i * LANE_TILES);
            mma_bytes(d, a[0], b[i].x, b[i].y, d);
            mma_bytes(d, a[1], b[i].z, b[i].w, d);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float scale = u.scales.at(tile, h), low = __uint_as_float(d[2 * h]), high = __uint_as_float(d[2 * h + 1]);
            auto& sum = acc.sum[tile][h];
            if constexpr (PAIRED) {
                sum[0] = fmaf(scale, (high - both) + low, sum[0]);
            } else {
                sum[0] = fmaf(scale, low - magic, sum[0]);
                sum[1] = fmaf(scale, high - magic, sum[1]);
            }
            if constexpr (!SPARSE) acc.scaled_x[tile][h] = fmaf(ZEROS ? scale * u.zeros.at(tile, h) : scale, x, acc.scaled_x[tile][h]);
        }
    }
}

__device__ __forceinline__ void multiply_units(Accumulator& acc, const Unit* units, const char* smem, int unit, int index, int lane, const Lookup& lookup, WholeBlock) {
    multiply_operands(acc, *units, smem, unit, index, lane, [&](u32 (&a)[2][4], int tile) { code_bytes(a, units->words, tile, lookup); });
}

// A unit of a warp's first stage with its operands, which need no activations: 32 registers.
struct MadeUnit {
    Unit u;
    u32 a[4][2][4];

    __device__ __forceinline__ void make(const Lookup& lookup) {
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) code_bytes(a[tile], u.words, tile, lookup);
    }
    __device__ __forceinline__ void multiply(Accumulator& acc, const char* smem, int unit, int index, int lane) const {
        multiply_operands(acc, u, smem, unit, index, lane, [&](u32 (&to)[2][4], int tile) {
#pragma unroll
            for (int i = 0; i < 8; ++i) to[i / 4][i % 4] = a[tile][i / 4][i % 4];
        });
    }
};

// A warp's sums of a block to its slot [64 rows][M tokens]; `low` and `high` are the two table values of one bit.
__device__ __forceinline__ void store_partial(float* slot, const Accumulator& acc, char* smem, int lane, float low, float high, WholeBlock) {
    const int g = lane / 4, t = lane % 4, token = M == 2 ? t / 2 : 0;
    const float back = back_of(smem, token, OWN_X ? threadIdx.x / 32 % K_WARPS : 0);
#pragma unroll
    for (int tile = 0; tile < LANE_TILES; ++tile)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const auto& sum = acc.sum[tile][h];
            float v = (PAIRED ? sum[0] : fmaf(256.f, sum[PAIRED ? 0 : 1], sum[0])) * (t % 2 ? 65536.f : 1.f);
            v += __shfl_xor_sync(0xffffffffu, v, 1);
            v *= back * (1.f / float(1 << row_shift(h)));
            const float x = acc.scaled_x[tile][h];
            if constexpr (TABLE)
                v = fmaf(high, v, low * (x - v));
            else if constexpr (NESTED)
                v = float(Planes::STEP) * (v - float(Planes::MIDDLE - (KIND == kind::CUT ? 0.5 : 0)) * x);
            else if constexpr (!SPARSE)
                v -= ZEROS ? x : float(1 << (BITS - 1)) * x;
            const int row = (share_of(lane) * LANE_TILES + tile) * 16 + h * 8 + g;
            if (t % 2 == 0 && (TILES_SHARING > 1 || t / 2 < M)) slot[row * M + token] = v;
        }
}

}  // namespace fdk
