// The kernels, once, as templates over an instruction set. Each unit includes this file after defining its traits;
// everything has internal linkage, because the units are compiled with different flags.
//
// Traits I (see generic.cpp for the plainest example):
//   W                          dword lanes of a vector: 4, 8 or 16
//   vf, vi                     W float32, W uint32
//   load, shr<S>, and_mask, or_and(a, b, mask) = a | (b & mask)
//   Values<B>                  values of a table: pair(codes, even, odd) looks up the low B bits of both halves
//   zero, add, sub, mul, fma(a, b, c) = a * b + c, fnma(a, b, c) = c - a * b, broadcast(float*)
//   floats(p, dtype), bytes(p) W values of a dtype or uint8, as float32
//   store(p, dtype, v, lanes)  first `lanes` lanes, rounded once to nearest even
#pragma once
#include "scalar.h"

namespace {

template <int N>
struct Int {
    static constexpr int value = N;
};

template <int A, int E, class F>
FDK_INLINE void unroll(F&& f) {
    if constexpr (A < E) {
        f(Int<A>{});
        unroll<A + 1, E>(f);
    }
}

#define FDK_LAMBDA __attribute__((always_inline))

// Dwords whose 16-bit halves hold, in their low B bits, the codes of pair p of a unit; garbage above.
template <class I, int B, int P>
FDK_INLINE typename I::vi pair_codes(const uint8_t* unit) {
    constexpr int q = 16 / B, rest = 16 % B, direct = B * q;
    if constexpr (P < direct) {
        return I::template shr<B * (P % q)>(I::load(unit + 64 * (P / q)));
    } else {
        constexpr int first = (P - direct) * B;  // of this code in the stream of left-over bits
        typename I::vi code = I::zero_words();
        unroll<0, B>([&](auto line) FDK_LAMBDA {
            constexpr int at = decltype(line)::value * rest - first;  // where this line's bits land in the code
            if constexpr (at > -rest && at < B) {
                constexpr uint32_t ones = (1u << rest) - 1, all = (1u << B) - 1;
                constexpr uint32_t m = (at < 0 ? ones >> -at : ones << at) & all;
                auto bits = I::template shr<B * q - at>(I::load(unit + 64 * decltype(line)::value));
                if constexpr (at <= 0) code = I::and_mask(bits, m | m << 16);
                else code = I::or_and(code, bits, m | m << 16);
            }
        });
        return code;
    }
}

// Float path: float32 activations x :: [k][M], one multiply-add per weight.
template <class Traits>
struct FloatPath {
    typedef Traits I;
    static constexpr int words_per_pair = 2;  // dwords of x per pair and row
    template <int B>
    using Values = typename I::template Values<B>;

    template <int B, int M>
    static FDK_INLINE void step(const Values<B>& values, typename I::vi codes, const uint32_t* x, typename I::vf* acc) {
        typename I::vf even, odd;
        values.pair(codes, even, odd);
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            acc[c] = I::fma(even, I::broadcast(x + c), acc[c]);
        });
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            acc[c] = I::fma(odd, I::broadcast(x + M + c), acc[c]);
        });
    }
};

// One tile on one block: out[row .. row + rows, col .. col + lanes] = x . W^T + bias, columns = rows of the block.
struct Call {
    const fdk_weight* w;
    const fdk_range* range;
    const uint8_t* block;
    const fdk_tile* tile;
    const uint8_t* bias;  // at col, or null
    uint8_t* out;         // at [row, col]
    int lanes;
    int range_index;
};

// x :: packed tile (see fdk_tile); totals :: [16 rows][M] float32 in registers.
template <class Path, int B, int M, bool SPLIT>
struct Block {
    typedef typename Path::I I;
    typedef typename I::vf vf;
    static constexpr int W = I::W, H = (int)FDK_ROWS / W;
    static constexpr int PAIR = Path::words_per_pair * M;  // dwords of x per pair
    // Chains of dependent multiply-adds: enough of them to hide the latency when there are few rows.
    static constexpr int SETS = M == 1 ? 4 : M <= 3 ? 2 : 1;
    typedef typename Path::template Values<B> Values;

    template <int P0, int P1>
    static FDK_INLINE void pairs(const Values& values, const uint8_t* unit, const uint32_t* x, vf (&acc)[SETS * M]) {
        unroll<P0, P1>([&](auto p) FDK_LAMBDA {
            constexpr int P = decltype(p)::value;
            Path::template step<B, M>(values, pair_codes<I, B, P>(unit), x + P * PAIR, acc + (P % SETS) * M);
        });
    }

    // total += scale * (acc - zero * sum of x), the only place where scales and zeros are applied.
    static FDK_INLINE void flush(const fdk_weight& w, const uint8_t* scales, const uint8_t* zeros, const float* sums,
                                 int h, vf (&acc)[SETS * M], vf (&total)[M]) {
        unroll<1, SETS>([&](auto s) FDK_LAMBDA {
            unroll<0, M>([&](auto i) FDK_LAMBDA {
                constexpr int c = decltype(i)::value;
                acc[c] = I::add(acc[c], acc[decltype(s)::value * M + c]);
            });
        });
        vf scale = I::floats(scales + h * W * w.scale_bytes, w.dtype);
        if (zeros) {
            vf zero = w.family == FDK_UINT_U8 ? I::sub_scalar(I::bytes(zeros + h * W), (float)(1 << (B - 1)))
                                              : I::floats(zeros + h * W * w.zero_bytes, w.dtype);
            unroll<0, M>([&](auto i) FDK_LAMBDA {
                constexpr int c = decltype(i)::value;
                acc[c] = I::fnma(zero, I::broadcast(sums + c), acc[c]);
            });
        }
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            total[c] = I::fma(acc[c], scale, total[c]);
        });
        unroll<0, SETS * M>([&](auto i) FDK_LAMBDA { acc[decltype(i)::value] = I::zero(); });
    }

    static void run(const Call& call) {
        const fdk_weight& w = *call.w;
        constexpr int S = SPLIT ? 2 : 1;
        const Values values(*call.range);
        vf total[H][M];
        for (int h = 0; h < H; h++)
            unroll<0, M>([&](auto i) FDK_LAMBDA { total[h][decltype(i)::value] = I::zero(); });
        const uint8_t* super = call.block;
        const uint32_t* x = (const uint32_t*)call.tile->x;
        const float* sums = call.tile->sums;
        const int64_t units = w.units, scales_size = FDK_ROWS * w.scale_bytes, zeros_size = FDK_ROWS * w.zero_bytes;
        for (int64_t s = 0; s < w.supers; s++) {
            const uint8_t* zeros = zeros_size ? super + S * scales_size : nullptr;
            const uint8_t* first = super + S * (scales_size + zeros_size);
            for (int h = 0; h < H; h++) {
                vf acc[SETS * M];
                unroll<0, SETS * M>([&](auto i) FDK_LAMBDA { acc[decltype(i)::value] = I::zero(); });
                const uint8_t* unit = first + 4 * W * h;
                const uint32_t* xu = x;
                const int64_t whole = SPLIT ? units / 2 : units;
                for (int64_t u = 0; u < whole; u++, unit += 64 * B, xu += 16 * PAIR) {
                    unroll<0, B>([&](auto line) FDK_LAMBDA { I::prefetch(unit + 64 * decltype(line)::value + 2048); });
                    pairs<0, 16>(values, unit, xu, acc);
                }
                if constexpr (SPLIT) {
                    pairs<0, 8>(values, unit, xu, acc);
                    flush(w, super, zeros, sums, h, acc, total[h]);
                    pairs<8, 16>(values, unit, xu, acc);
                    unit += 64 * B, xu += 16 * PAIR;
                    for (int64_t u = 0; u < whole; u++, unit += 64 * B, xu += 16 * PAIR)
                        pairs<0, 16>(values, unit, xu, acc);
                    flush(w, super + scales_size, zeros ? zeros + zeros_size : nullptr, sums + M, h, acc, total[h]);
                } else {
                    flush(w, super, zeros, sums, h, acc, total[h]);
                }
            }
            super += w.super_bytes;
            x += units * 16 * PAIR;
            if (sums) sums += S * M;
        }
        finish<M>(call, total);
    }

    template <int ROWS>
    static FDK_INLINE void finish(const Call& call, vf (&total)[H][ROWS]) {
        const fdk_weight& w = *call.w;
        for (int h = 0; h < H; h++) {
            int lanes = call.lanes - h * W;
            if (lanes <= 0) break;
            if (lanes > W) lanes = W;
            vf bias = I::zero();
            if (call.bias) bias = I::floats_partial(call.bias + h * W * w.scale_bytes, w.dtype, lanes);
            unroll<0, ROWS>([&](auto i) FDK_LAMBDA {
                constexpr int c = decltype(i)::value;
                if (c < call.tile->rows) {
                    vf y = call.bias ? I::add(total[h][c], bias) : total[h][c];
                    I::store(call.out + (c * w.n + h * W) * w.scale_bytes, w.dtype, y, lanes);
                }
            });
        }
    }
};

typedef void (*BlockFn)(const Call&);

FDK_INLINE const fdk_range* range_of(const fdk_weight& w, int64_t block) {
    const fdk_range* r = w.ranges;
    while (block >= r->block1) r++;
    return r;
}

// Runs all tiles on blocks [block0, block1): blocks outside, so that a block is read from memory once.
template <class Pick>
FDK_INLINE void run_job(const fdk_job& job, int64_t block0, int64_t block1, Pick&& pick) {
    const fdk_weight& w = *job.w;
    if (block0 >= block1) return;
    const fdk_range* range = range_of(w, block0);
    for (int64_t b = block0; b < block1; b++) {
        while (b >= range->block1) range++;
        int64_t col = range->row0 + (b - range->block0) * FDK_ROWS, left = range->row1 - col;
        Call call;
        call.w = &w;
        call.range = range;
        call.range_index = (int)(range - w.ranges);
        call.block = w.data + b * w.block_bytes;
        call.bias = job.bias ? (const uint8_t*)job.bias + col * w.scale_bytes : nullptr;
        call.lanes = left < FDK_ROWS ? (int)left : (int)FDK_ROWS;
        for (int64_t t = 0; t < job.tiles_count; t++) {
            call.tile = job.tiles + t;
            call.out = (uint8_t*)job.out + (call.tile->row * w.n + col) * w.scale_bytes;
            pick(call)(call);
        }
    }
}

// Blocks to rows: values times scales, rounded once, row-major. out :: [rows of the blocks][k].
template <class I, int B>
struct Dequantise {
    typedef typename I::vf vf;
    static constexpr int W = I::W, H = (int)FDK_ROWS / W;

    static void run(const fdk_weight& w, uint8_t* out, int64_t block0, int64_t block1) {
        const fdk_range* range = range_of(w, block0);
        for (int64_t b = block0; b < block1; b++) {
            while (b >= range->block1) range++;
            int64_t left = range->row1 - range->row0 - (b - range->block0) * FDK_ROWS;
            int rows = left < FDK_ROWS ? (int)left : (int)FDK_ROWS;
            block(w, *range, w.data + b * w.block_bytes, out, rows);
            out += rows * w.k * w.scale_bytes;
        }
    }

    static void block(const fdk_weight& w, const fdk_range& range, const uint8_t* super, uint8_t* out, int rows) {
        const typename I::template Values<B> values(range);
        const int S = w.split ? 2 : 1;
        const int64_t scales_size = FDK_ROWS * w.scale_bytes, zeros_size = FDK_ROWS * w.zero_bytes;
        const int64_t group = w.split ? w.units * FDK_UNIT / 2 : w.units * FDK_UNIT;
        int64_t k = 0;
        for (int64_t s = 0; s < w.supers; s++, super += w.super_bytes) {
            const uint8_t* zeros = super + S * scales_size;
            const uint8_t* unit = zeros + S * zeros_size;
            for (int64_t u = 0; u < w.units; u++, unit += 64 * B, k += FDK_UNIT) {
                if (k >= w.k) return;
                typename I::Panel panel;
                for (int h = 0; h < H; h++) {
                    unroll<0, 2>([&](auto half) FDK_LAMBDA {
                        constexpr int P0 = decltype(half)::value * 8;
                        const int64_t g = (u * FDK_UNIT + 2 * P0) / group;
                        vf scale = I::floats(super + g * scales_size + h * W * w.scale_bytes, w.dtype);
                        vf zero = I::zero();
                        if (w.family == FDK_UINT_U8)
                            zero = I::sub_scalar(I::bytes(zeros + g * zeros_size + h * W), (float)(1 << (B - 1)));
                        else if (w.family == FDK_UINT_FLOAT)
                            zero = I::floats(zeros + g * zeros_size + h * W * w.zero_bytes, w.dtype);
                        unroll<P0, P0 + 8>([&](auto p) FDK_LAMBDA {
                            typename I::vi codes = pair_codes<I, B, decltype(p)::value>(unit + 4 * W * h);
                            vf even, odd;
                            values.pair(codes, even, odd);
                            if (w.zero_bytes) even = I::sub(even, zero), odd = I::sub(odd, zero);
                            panel.put(decltype(p)::value, h, w.dtype, I::mul(even, scale), I::mul(odd, scale));
                        });
                    });
                }
                panel.write(out + k * w.scale_bytes, w.k * w.scale_bytes, w.dtype, rows,
                            (int)(w.k - k < FDK_UNIT ? w.k - k : FDK_UNIT));
            }
        }
    }
};

// A unit of 16 rows on its way to row-major memory, the plain way.
template <class I>
struct PlainPanel {
    float value[FDK_UNIT][FDK_ROWS];
    FDK_INLINE void put(int pair, int h, int, typename I::vf even, typename I::vf odd) {
        I::keep(&value[2 * pair][h * I::W], even);
        I::keep(&value[2 * pair + 1][h * I::W], odd);
    }
    FDK_INLINE void write(uint8_t* out, int64_t stride, int dtype, int rows, int columns) {
        for (int r = 0; r < rows; r++) {
            float row[FDK_UNIT];
            for (int c = 0; c < FDK_UNIT; c++) row[c] = value[c][r];
            for (int c = 0; c < FDK_UNIT; c += I::W) {
                int lanes = columns - c;
                if (lanes <= 0) break;
                I::store(out + r * stride + c * (dtype == FDK_FP32 ? 4 : 2), dtype, I::kept(row + c),
                         lanes < I::W ? lanes : I::W);
            }
        }
    }
};

// Activations of one tile: x :: rows `row ..` of [m, k] -> dst :: [k_padded][width] float32, sums :: [groups][width].
// Rows beyond `rows` and k beyond w.k become zeros.
template <class I>
void pack_floats(const fdk_weight& w, const uint8_t* x, int rows, int width, float* dst, float* sums) {
    const int size = w.scale_bytes;
    const int64_t groups = w.supers * (w.split ? 2 : 1), group = w.group;
    for (int i = 0; i < width; i++) {
        const uint8_t* src = x + i * w.k * size;
        const int64_t k = i < rows ? w.k : 0;
        float chunk[256];
        if (dst) {
            for (int64_t at = 0; at < w.k_padded; at += 256) {
                int64_t have = k - at < 0 ? 0 : k - at < 256 ? k - at : 256;
                int64_t want = w.k_padded - at < 256 ? w.k_padded - at : 256;
                float* to = width == 1 ? dst + at : chunk;
                for (int64_t c = 0; c < have; c += I::W) {
                    int lanes = have - c < I::W ? (int)(have - c) : I::W;
                    I::keep_partial(to + c, I::floats_partial(src + (at + c) * size, w.dtype, lanes), lanes);
                }
                for (int64_t c = have; c < want; c++) to[c] = 0;
                if (width > 1)
                    for (int64_t c = 0; c < want; c++) dst[(at + c) * width + i] = chunk[c];
            }
        }
        if (sums) {
            for (int64_t g = 0; g < groups; g++) {
                typename I::vf sum = I::zero();
                int64_t end = (g + 1) * group < k ? (g + 1) * group : k;
                for (int64_t c = g * group; c < end; c += I::W)
                    sum = I::add(sum, I::floats_partial(src + c * size, w.dtype, end - c < I::W ? (int)(end - c) : I::W));
                float lanes[I::W], all = 0;
                I::keep(lanes, sum);
                for (int l = 0; l < I::W; l++) all += lanes[l];
                sums[g * width + i] = all;
            }
        }
    }
}

// The same for the bf16 dot instruction: dst :: [k_padded / 2][width] pairs of bf16.
template <class I>
void pack_bf16_pairs(const fdk_weight& w, const uint16_t* x, int rows, int width, uint32_t* dst, float* sums) {
    const int64_t pairs = w.k_padded / 2;
    for (int i = 0; i < width; i++) {
        const uint16_t* src = x + i * w.k;
        int64_t whole = i < rows ? w.k / 2 : 0, p = 0;
        for (; p < whole; p++) {
            uint32_t both;
            memcpy(&both, src + 2 * p, 4);
            dst[p * width + i] = both;
        }
        if (i < rows && w.k % 2) dst[p++ * width + i] = src[w.k - 1];
        for (; p < pairs; p++) dst[p * width + i] = 0;
    }
    if (sums) pack_floats<I>(w, (const uint8_t*)x, rows, width, nullptr, sums);
}

template <class I>
void dequantise_blocks(const fdk_weight* w, void* out, int64_t block0, int64_t block1) {
    static void (*const by_bits[9])(const fdk_weight&, uint8_t*, int64_t, int64_t) = {
        nullptr,
        Dequantise<I, 1>::run, Dequantise<I, 2>::run, Dequantise<I, 3>::run, Dequantise<I, 4>::run,
        Dequantise<I, 5>::run, Dequantise<I, 6>::run, Dequantise<I, 7>::run, Dequantise<I, 8>::run};
    if (block0 < block1) by_bits[w->bits](*w, (uint8_t*)out, block0, block1);
}

#define FDK_BY_BITS(PATH, M, SPLIT)                                                                         \
    {nullptr, Block<PATH, 1, M, SPLIT>::run, Block<PATH, 2, M, SPLIT>::run, Block<PATH, 3, M, SPLIT>::run,   \
     Block<PATH, 4, M, SPLIT>::run, Block<PATH, 5, M, SPLIT>::run, Block<PATH, 6, M, SPLIT>::run,           \
     Block<PATH, 7, M, SPLIT>::run, Block<PATH, 8, M, SPLIT>::run}

}  // namespace
