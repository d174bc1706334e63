// A packed weight as the dense one.
#pragma once
#include "tiles.h"

namespace {

// Blocks to rows: values times scales, rounded once, row-major. out :: [rows of the blocks][k].
template <class I, int B>
struct Dequantise {
    typedef typename I::vf vf;
    typedef typename I::template Values<B> Values;
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
        const Values values(range);
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
                        const vf zero = zeros_size ? zeros_of<I>(w, zeros + g * zeros_size, h) : I::zero();
                        unroll<P0, P0 + 8>([&](auto p) FDK_LAMBDA {
                            constexpr int P = decltype(p)::value;
                            vf even, odd;
                            values.template pair<Values::template plain_place<P>()>(
                                Values::template plain<P>(unit + 4 * W * h), even, odd);
                            if (w.zero_bytes) even = I::sub(even, zero), odd = I::sub(odd, zero);
                            panel.put(P, h, w.dtype, I::mul(even, scale), I::mul(odd, scale));
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

template <class I>
void dequantise_blocks(const fdk_weight* w, void* out, int64_t block0, int64_t block1) {
    static void (*const by_bits[9])(const fdk_weight&, uint8_t*, int64_t, int64_t) = {
        nullptr,
        Dequantise<I, 1>::run, Dequantise<I, 2>::run, Dequantise<I, 3>::run, Dequantise<I, 4>::run,
        Dequantise<I, 5>::run, Dequantise<I, 6>::run, Dequantise<I, 7>::run, Dequantise<I, 8>::run};
    if (block0 < block1) by_bits[w->bits](*w, (uint8_t*)out, block0, block1);
}

}  // namespace
