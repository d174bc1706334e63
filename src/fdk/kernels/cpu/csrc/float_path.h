// The path of float32 multiply-adds.
#pragma once
#include "codes.h"

namespace {

// Float path: float32 activations x :: [k][M], one multiply-add per weight.
template <class Traits>
struct FloatPath : PlainPath {
    typedef Traits I;
    static constexpr int words_per_pair = 2;  // dwords of x per pair and row
    template <int B>
    using Values = typename I::template Values<B>;

    // Pair P of a unit; x that of the unit.
    template <int M, int P, int PLACE, class Values>
    static FDK_INLINE void step(const Values& values, typename I::vi codes, const uint32_t* x, typename I::vf* acc) {
        typename I::vf even, odd;
        values.template pair<PLACE>(codes, even, odd);
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            acc[c] = I::template fma_at<2 * P * M + c>(even, x, acc[c]);
        });
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            acc[c] = I::template fma_at<(2 * P + 1) * M + c>(odd, x, acc[c]);
        });
    }

    template <int PLACE, class Values>
    static FDK_INLINE void expand(const Values& values, typename I::vi codes, uint32_t* panel) {
        typename I::vf even, odd;
        values.template pair<PLACE>(codes, even, odd);
        I::keep((float*)panel, even);
        I::keep((float*)panel + FDK_ROWS, odd);
    }

    // acc :: [T][M]: T vectors of rows next to each other, M rows of x. Pair P of a panel and of its x.
    template <int T, int M, int P>
    static FDK_INLINE void multiply(const uint32_t* panel, const uint32_t* x, typename I::vf* acc) {
        unroll<0, 2>([&](auto parity) FDK_LAMBDA {
            constexpr int K = decltype(parity)::value;
            typename I::vf value[T];
            unroll<0, T>([&](auto t) FDK_LAMBDA {
                value[decltype(t)::value] = I::kept((const float*)panel + (2 * P + K) * FDK_ROWS + decltype(t)::value * I::W);
            });
            unroll<0, M>([&](auto i) FDK_LAMBDA {
                constexpr int c = decltype(i)::value;
                unroll<0, T>([&](auto t) FDK_LAMBDA {
                    constexpr int at = decltype(t)::value * M + c;
                    acc[at] = I::template fma_at<(2 * P + K) * M + c>(value[decltype(t)::value], x, acc[at]);
                });
            });
        });
    }
};

}  // namespace
