// Hundreds of rows in bf16: panels of scaled weights, rounded as `dequantise` rounds them.
#pragma once
#include "panels.h"

namespace {

// Scales on float32 sums cost 16 multiply-adds a tile, row and group, 3 % of all at groups of 64. With hundreds of rows it
// is cheaper to scale the weights of a panel; their products then need nothing between the first and the last k.
template <class Path>
struct ScaledPanels {
    typedef typename Path::I I;
    typedef typename I::vf vf;
    typedef Panels<Path> Sizes;

    // Superblocks to panel :: [pairs][16 rows].
    template <int B>
    static void expand(const fdk_weight& w, const fdk_range& range, const uint8_t* super, int64_t supers, uint32_t* panel) {
        const typename Path::template Values<B> values(range);
        const int S = w.split ? 2 : 1;
        const int64_t scales_size = FDK_ROWS * w.scale_bytes, zeros_size = FDK_ROWS * w.zero_bytes, halves = w.units * 2 / S;
        for (int64_t s = 0; s < supers; s++, super += w.super_bytes) {
            const uint8_t *zeros = super + S * scales_size, *unit = zeros + S * zeros_size;
            for (int64_t u = 0; u < w.units; u++, unit += 64 * B, panel += 16 * FDK_ROWS) {
                fetch_ahead<I, B>(unit);
                unroll<0, 2>([&](auto half) FDK_LAMBDA {
                    constexpr int P0 = decltype(half)::value * 8;
                    const int64_t g = (2 * u + decltype(half)::value) / halves;
                    const vf scale = I::floats(super + g * scales_size, w.dtype);
                    const vf zero = zeros_size ? zeros_of<I>(w, zeros + g * zeros_size, 0) : I::zero();
                    unroll<P0, P0 + 8>([&](auto p) FDK_LAMBDA {
                        constexpr int P = decltype(p)::value, SHARE = Path::template Values<B>::SHARE;
                        Path::template expand_scaled<place<B, P, SHARE>()>(values, pair_codes<I, B, P, SHARE>(unit), scale,
                                                                              zero, panel + P * FDK_ROWS);
                    });
                });
            }
        }
    }

    // T blocks times one tile of M rows: panels `apart` words, totals :: [M] vectors `totals_apart` floats from each other.
    template <int T, int M>
    static void multiply(const uint32_t* panel, int64_t apart, const uint32_t* x, int64_t pairs, float* totals, int64_t totals_apart) {
        vf acc[M][T];
        unroll<0, M * T>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value / T, t = decltype(i)::value % T;
            acc[c][t] = I::kept(totals + t * totals_apart + c * I::W);
        });
        for (; pairs > 0; pairs -= 4, panel += 4 * FDK_ROWS, x += 4 * M)
            unroll<0, 4>([&](auto p) FDK_LAMBDA {
                constexpr int P = decltype(p)::value;
                Path::template multiply_panels<T, M>(panel + P * FDK_ROWS, apart, x + P * M, acc);
            });
        unroll<0, M * T>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value / T, t = decltype(i)::value % T;
            I::keep(totals + t * totals_apart + c * I::W, acc[c][t]);
        });
    }

    typedef void (*MultiplyFn)(const uint32_t*, int64_t, const uint32_t*, int64_t, float*, int64_t);
    struct Tile {
        MultiplyFn one, two;
        WriteFn write;
    };

    static void run(const fdk_job& job, int64_t block0, int64_t block1, void* workspace, const Tile* tiles) {
        static void (*const by_bits[9])(const fdk_weight&, const fdk_range&, const uint8_t*, int64_t, uint32_t*) = {
            nullptr, expand<1>, expand<2>, expand<3>, expand<4>, expand<5>, expand<6>, expand<7>, expand<8>};
        const fdk_weight& w = *job.w;
        const fdk_tile &first = job.tiles[0], &last = job.tiles[job.tiles_count - 1];
        const int64_t step = Sizes::supers_at_once(w), apart = Sizes::panel_size(w) / 4, most = Sizes::blocks_at_once(w);
        const int64_t totals_apart = (last.row - first.row + last.width) * FDK_ROWS;
        uint32_t* panels = (uint32_t*)workspace;
        float* totals = (float*)(panels + most * apart);
        for_batches(job, block0, block1, most, [&](Call* calls, int64_t count) {
            memset(totals, 0, count * totals_apart * sizeof(float));
            for (int64_t s = 0; s < w.supers; s += step) {
                const int64_t supers = w.supers - s < step ? w.supers - s : step, pairs = supers * w.units * 16;
                for (int64_t b = 0; b < count; b++)
                    by_bits[w.bits](w, *calls[b].range, calls[b].block + s * w.super_bytes, supers, panels + b * apart);
                for (int64_t b = 0; b < count; b += 2)
                    for (int64_t t = 0; t < job.tiles_count; t++) {
                        const fdk_tile& tile = job.tiles[t];
                        const MultiplyFn multiply = b + 1 < count ? tiles[tile.width].two : tiles[tile.width].one;
                        multiply(panels + b * apart, apart, (const uint32_t*)tile.x + s * w.units * 16 * tile.width, pairs,
                                 totals + b * totals_apart + (tile.row - first.row) * FDK_ROWS, totals_apart);
                    }
            }
            for (int64_t t = 0; t < job.tiles_count; t++)
                for (int64_t b = 0; b < count; b++) {
                    set_tile(calls[b], job, t);
                    tiles[job.tiles[t].width].write(calls[b], totals + b * totals_apart + (job.tiles[t].row - first.row) * FDK_ROWS);
                }
        });
    }
};

#define FDK_SCALED_TILE(PATH, M) \
    {ScaledPanels<PATH>::multiply<1, M>, ScaledPanels<PATH>::multiply<2, M>, write_totals<PATH::I, M>}

}  // namespace
