// The path of bf16 dot products and matrix products of ARM, on the traits of NEON or SVE. Included after bytes.h.
//   dot_at<AT>(acc, v, x)      acc + both products of the pairs v with pair AT of x
//   matrix(acc, v, x)          in every 128 bits: acc [2][2] + v [2 rows][4 k] . x [2 rows][4 k]^T
//   quad(x)                    128 bits of x in every 128 bits
//   zip<HIGH>, even_words, odd_words     of two vectors of words
#pragma once
#include "bytes.h"

namespace {

template <class Traits>
struct ArmDotPath : PlainPath {
    typedef Traits I;
    typedef typename I::vi vi;
    typedef typename I::vf vf;
    static constexpr int words_per_pair = 1, pairs_per_step = 2;
    template <int B>
    using Values = ByteValues<I, B, 2>;
    // 32 registers hold 16 sums, or 8 and the tables of 6 bits.
    template <int B, int M>
    static constexpr int together() { return B <= 5 && M <= 4 ? 4 : 2; }

    template <int M, int P, int PLACE, class Values>
    static FDK_INLINE void step(const Values& values, vi word, const uint32_t* x, vf* acc) {
        const vi value = values.template at<PLACE>(word);
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            acc[c] = I::template dot_at<P * M + c>(acc[c], value, x);
        });
    }

    template <int PLACE, class Values>
    static FDK_INLINE void expand(const Values& values, vi word, uint32_t* panel) {
        I::keep_words(panel, values.template at<PLACE>(word));
    }

    // panel :: [8 times two pairs][16 rows][2 pairs], four k of two rows being an operand of the matrix product.
    static FDK_INLINE void arrange(uint32_t* panel) {
        constexpr int W = I::W, H = (int)FDK_ROWS / W;
        for (int p = 0; p < 8; p++, panel += 2 * FDK_ROWS) {
            vi first[H], second[H];
            for (int h = 0; h < H; h++) first[h] = I::kept_words(panel + h * W), second[h] = I::kept_words(panel + FDK_ROWS + h * W);
            for (int h = 0; h < H; h++) {
                I::keep_words(panel + 2 * h * W, I::template zip<0>(first[h], second[h]));
                I::keep_words(panel + (2 * h + 1) * W, I::template zip<1>(first[h], second[h]));
            }
        }
    }

    // x :: [k / 4][M][4 k]; M is even. acc [t][2c] and [t][2c + 1] are the first and the second half of the rows of vector t,
    // each with columns 2c and 2c + 1, until by_row.
    template <int T, int M, int P>
    static FDK_INLINE void multiply(const uint32_t* panel, const uint32_t* x, vf* acc) {
        vi value[2 * T];
        unroll<0, 2 * T>([&](auto t) FDK_LAMBDA {
            value[decltype(t)::value] = I::kept_words(panel + P * FDK_ROWS + decltype(t)::value * I::W);
        });
        unroll<0, M / 2>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            const vi xs = I::quad(x + P * M + 4 * c);
            unroll<0, 2 * T>([&](auto t) FDK_LAMBDA {
                constexpr int half = decltype(t)::value, at = half / 2 * M + 2 * c + half % 2;
                acc[at] = I::matrix(acc[at], value[half], xs);
            });
        });
    }

    template <int T, int M, class V>
    static FDK_INLINE void by_row(V* acc) {
        unroll<0, T * M / 2>([&](auto i) FDK_LAMBDA {
            constexpr int at = 2 * decltype(i)::value;
            const V first = acc[at], second = acc[at + 1];
            acc[at] = I::even_words(first, second);
            acc[at + 1] = I::odd_words(first, second);
        });
    }
};

// What the units of bf16 instructions share: weights whose values those do not take exactly go to NEON, and one row at 1 bit,
// where sums looked up by nibbles take fewer instructions unless vectors are longer.
template <class I>
struct ArmDot {
    typedef ArmDotPath<I> Path;

    static void linear(const fdk_job* job, int64_t block0, int64_t block1, void* workspace) {
        const fdk_weight& w = *job->w;
        if (!w.bf16_exact || job->plan->algorithm == FDK_NIBBLES) return fdk_ops_neon()->linear(job, block0, block1, workspace);
        static const BlockFn by_width[9][2][9] = {
            {{nullptr}, {nullptr}},
            {FDK_BY_BITS(Path, 1, false), FDK_BY_BITS(Path, 1, true)},
            {FDK_BY_SIX_BITS(Path, 2), {nullptr}},
            {{nullptr}, {nullptr}},
            {FDK_BY_SIX_BITS(Path, 4), {nullptr}},
            {{nullptr}, {nullptr}},
            {{nullptr}, {nullptr}},
            {{nullptr}, {nullptr}},
            {FDK_BY_SIX_BITS(Path, 8), {nullptr}}};
        static const typename Panels<Path>::Tile tiles[13] = {
            {}, {}, FDK_PANEL_TILE(Path, 2), {}, FDK_PANEL_TILE(Path, 4), {}, FDK_PANEL_TILE(Path, 6), {},
            FDK_PANEL_TILE(Path, 8), {}, {}, {}, FDK_PANEL_TILE(Path, 12)};
        static const WriteFn write[9] = {nullptr, write_totals<I, 1>, write_totals<I, 2>, nullptr, write_totals<I, 4>,
                                         nullptr, nullptr,            nullptr,            write_totals<I, 8>};
        if (w.storage == FDK_SPARSE) return sparse_linear<Path>(*job, block0, block1, workspace, tiles);
        if (w.storage == FDK_NESTED_PLANES) return nested_linear<Path, 1>(*job, block0, block1, workspace, tiles);
        if (job->plan->algorithm == FDK_PANELS) return run_panels<Path>(*job, block0, block1, workspace, tiles);
        DirectFn direct[9];
        for (int i = 0; i < 9; i++) direct[i] = DirectFn{by_width[i][w.split][w.bits], write[i]};
        run_direct(*job, block0, block1, workspace, direct);
    }

    static void plan(const fdk_weight* w, int64_t m, fdk_plan* plan) {
        if (!w->bf16_exact) return fdk_ops_neon()->plan(w, m, plan);
        *plan = fdk_plan{1, 0, 1, 1, 1, FDK_DIRECT, 0};
        if (m == 1 && I::W == Neon::W && Nibbles<Neon, 1>::plan(*w, plan)) return;
        const int64_t direct = w->storage == FDK_SPARSE ? 0 : w->split || w->storage == FDK_NESTED_PLANES || w->bits > 6 ? 1 : 8;
        const int32_t width = m <= 2 ? (int32_t)m : m <= 4 ? 4 : 8;
        *plan = fdk_plan{m, 0, 1, width, width, FDK_DIRECT, 1};
        if (m <= direct) return;
        plan_panels<Path>(*w, m, 12, plan);
        plan->width += plan->width % 2;
        plan->rest_width += plan->rest_width % 2;
    }

    static void pack(const fdk_weight* w, const fdk_plan* plan, const void* x, const fdk_tile* tile) {
        if (!plan->bf16_pairs || !tile->x) return fdk_ops_neon()->pack(w, plan, x, tile);
        (plan->algorithm == FDK_PANELS ? pack_bf16_pairs<Neon, 2> : pack_bf16_pairs<Neon, 1>)(*w, (const uint16_t*)x, *tile);
    }

    static int64_t multiply(int32_t dtype, int64_t steps, float* sink) {
        return dtype == FDK_BF16 ? multiply_chains<Path>(steps, sink) : fdk_ops_neon()->multiply(dtype, steps, sink);
    }

    static void dequantise(const fdk_weight* w, void* out, int64_t block0, int64_t block1) {
        fdk_ops_neon()->dequantise(w, out, block0, block1);
    }
};

}  // namespace
