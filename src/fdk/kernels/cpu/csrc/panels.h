// Many rows of wide codes: a block is decoded once for all tiles.
#pragma once
#include "tiles.h"

namespace {

// The values of a block are expanded once, without scales, into a panel that stays in the second-level cache, and every
// tile multiplies the panel. panel :: [pairs][words_per_pair][16 rows].
template <class Path>
struct Panels {
    typedef typename Path::I I;
    typedef typename I::vf vf;
    static constexpr int W = I::W, H = (int)FDK_ROWS / W, WORDS = Path::words_per_pair;
    static constexpr int TOGETHER = W == 16 ? 1 : 2;  // vectors of rows that share one load of x
    // Of a block's panel, and of all panels of a batch: half of the second-level cache. Shorter panels, which would fit the
    // first-level cache, lose more by more calls of `multiply` than they gain.
    static constexpr int64_t BYTES = W == 16 ? 128 << 10 : 8 << 10, ALL_BYTES = 512 << 10;

    // Superblocks expanded at a time. A superblock is never cut: its zeros apply to sums over whole groups.
    static int64_t supers_at_once(const fdk_weight& w) {
        const int64_t one = w.units * 16 * WORDS * 64, fit = BYTES / one;
        return fit < 1 ? 1 : fit < w.supers ? fit : w.supers;
    }

    static int64_t panel_size(const fdk_weight& w) { return supers_at_once(w) * w.units * 16 * WORDS * 64; }

    static int64_t blocks_at_once(const fdk_weight& w) {
        const int64_t fit = ALL_BYTES / panel_size(w);
        return fit < 1 ? 1 : fit < BATCH ? fit : BATCH;
    }

    // Float32 products of codes round, so that taking zero * (sum of x) off their sum would leave a residue where code
    // and zero are equal; there the zeros are taken off the values. Products of 16-bit activations are exact.
    // Sparse weights take them off before anything is scattered, because dropped weights have none.
    static bool subtracts(const fdk_weight& w) {
        return w.zero_bytes && (w.storage == FDK_SPARSE || (WORDS == 2 && w.dtype == FDK_FP32));
    }

    static void subtract_zeros(const fdk_weight& w, const uint8_t* super, int64_t supers, float* panel) {
        const int S = w.split ? 2 : 1;
        const int64_t k = w.units * FDK_UNIT / S;
        for (int64_t s = 0; s < supers; s++, super += w.super_bytes)
            for (int i = 0; i < S; i++) {
                const uint8_t* zeros = super + FDK_ROWS * (S * w.scale_bytes + i * w.zero_bytes);
                for (int64_t c = 0; c < k; c++, panel += FDK_ROWS)
                    for (int h = 0; h < H; h++) I::keep(panel + h * W, I::sub(I::kept(panel + h * W), zeros_of<I>(w, zeros, h)));
            }
    }

    template <int B>
    static void expand(const fdk_weight& w, const fdk_range& range, const uint8_t* super, int64_t supers, uint32_t* __restrict panel) {
        typedef typename Path::template Values<B> Values;
        const Values values(range);
        const int S = w.split ? 2 : 1;
        for (int64_t s = 0; s < supers; s++, super += w.super_bytes) {
            const uint8_t* unit = super + S * FDK_ROWS * (w.scale_bytes + w.zero_bytes);
            for (int64_t u = 0; u < w.units; u++, unit += 64 * B, panel += 16 * WORDS * FDK_ROWS) {
                fetch_ahead<I, B>(unit);
                for (int h = 0; h < H; h++)
                    unroll<0, 16>([&](auto p) FDK_LAMBDA {
                        constexpr int P = decltype(p)::value;
                        Path::template expand<Values::template plain_place<P>()>(
                            values, Values::template plain<P>(unit + 4 * W * h), panel + P * WORDS * FDK_ROWS + h * W);
                    });
                Path::arrange(panel);
            }
        }
    }

    // totals :: [16 / W][M] vectors, updated with `supers` superblocks of a panel.
    template <int M>
    static void multiply(const fdk_weight& w, const uint8_t* super, int64_t supers, const uint32_t* panel,
                         const uint32_t* x, const float* sums, float* totals) {
        const int S = w.split ? 2 : 1;
        const int64_t scales_size = FDK_ROWS * w.scale_bytes, zeros_size = FDK_ROWS * w.zero_bytes;
        const int64_t eights = w.units * 2 / S;  // eight pairs, 16 k
        const bool correct = zeros_size && !subtracts(w);
        for (int h = 0; h < H; h += TOGETHER) {
            vf total[TOGETHER * M], acc[TOGETHER * M];
            unroll<0, TOGETHER * M>([&](auto i) FDK_LAMBDA {
                constexpr int c = decltype(i)::value;
                total[c] = I::kept(totals + (h * M + c) * W);
                acc[c] = I::zero();
            });
            const uint32_t *v = panel + h * W * Path::pairs_per_step, *xp = x;
            const float* sum = sums;
            const uint8_t* at = super;
            for (int64_t s = 0; s < supers; s++, at += w.super_bytes) {
                for (int i = 0; i < S; i++) {
                    for (int64_t e = 0; e < eights; e++, v += 8 * WORDS * FDK_ROWS, xp += 8 * WORDS * M)
                        unroll<0, 8 / Path::pairs_per_step>([&](auto p) FDK_LAMBDA {
                            Path::template multiply<TOGETHER, M, Path::pairs_per_step * decltype(p)::value>(v, xp, acc);
                        });
                    Path::template by_row<TOGETHER, M>(acc);
                    unroll<0, TOGETHER>([&](auto t) FDK_LAMBDA {
                        constexpr int T = decltype(t)::value;
                        const uint8_t* zeros = correct ? at + S * scales_size + i * zeros_size : nullptr;
                        apply_scale<I, M>(w, at + i * scales_size, zeros, sum, h + T, acc + T * M, total + T * M);
                    });
                    unroll<0, TOGETHER * M>([&](auto c) FDK_LAMBDA { acc[decltype(c)::value] = I::zero(); });
                    if (sum) sum += M;
                }
            }
            unroll<0, TOGETHER * M>([&](auto i) FDK_LAMBDA {
                constexpr int c = decltype(i)::value;
                I::keep(totals + (h * M + c) * W, total[c]);
            });
        }
    }

    typedef void (*ExpandFn)(const fdk_weight&, const fdk_range&, const uint8_t*, int64_t, uint32_t*);
    typedef void (*MultiplyFn)(const fdk_weight&, const uint8_t*, int64_t, const uint32_t*, const uint32_t*, const float*,
                               float*);
    struct Tile {
        MultiplyFn multiply;
        WriteFn write;
    };
};

// Through panels: a stretch of k of all rows of x serves a batch of blocks before it is left, so that it is not read
// from memory for every block. workspace :: a panel for each block, then totals [block][row of x][16].
template <class Path>
void run_panels(const fdk_job& job, int64_t block0, int64_t block1, void* workspace, const typename Panels<Path>::Tile* tiles,
                const typename Panels<Path>::ExpandFn* expand = nullptr) {
    typedef Panels<Path> P;
    static const typename P::ExpandFn plain[9] = {
        nullptr,
        P::template expand<1>, P::template expand<2>, P::template expand<3>, P::template expand<4>,
        P::template expand<5>, P::template expand<6>, P::template expand<7>, P::template expand<8>};
    if (!expand) expand = plain;
    const fdk_weight& w = *job.w;
    const fdk_tile &first = job.tiles[0], &last = job.tiles[job.tiles_count - 1];
    const int64_t step = P::supers_at_once(w), groups = w.split ? 2 : 1, panel_words = P::panel_size(w) / 4;
    const int64_t x_words = w.units * 16 * Path::words_per_pair, totals_words = (last.row - first.row + last.width) * FDK_ROWS;
    uint32_t* panels = (uint32_t*)workspace;
    float* totals = (float*)(panels + P::blocks_at_once(w) * panel_words);
    for_batches(job, block0, block1, P::blocks_at_once(w), [&](Call* calls, int64_t count) {
        memset(totals, 0, count * totals_words * sizeof(float));
        for (int64_t s = 0; s < w.supers; s += step) {
            const int64_t supers = w.supers - s < step ? w.supers - s : step;
            for (int64_t b = 0; b < count; b++) {
                const uint8_t* super = calls[b].block + s * w.super_bytes;
                uint32_t* panel = panels + b * panel_words;
                expand[w.bits](w, *calls[b].range, super, supers, panel);
                if (P::subtracts(w) && w.storage != FDK_SPARSE) P::subtract_zeros(w, super, supers, (float*)panel);
            }
            for (int64_t b = 0; b < count; b++)
                for (int64_t t = 0; t < job.tiles_count; t++) {
                    const fdk_tile& tile = job.tiles[t];
                    tiles[tile.width].multiply(w, calls[b].block + s * w.super_bytes, supers, panels + b * panel_words,
                                               (const uint32_t*)tile.x + s * x_words * tile.width,
                                               tile.sums ? tile.sums + s * groups * tile.width : nullptr,
                                               totals + b * totals_words + (tile.row - first.row) * FDK_ROWS);
                }
        }
        for (int64_t t = 0; t < job.tiles_count; t++)
            for (int64_t b = 0; b < count; b++) {
                set_tile(calls[b], job, t);
                tiles[job.tiles[t].width].write(calls[b], totals + b * totals_words + (job.tiles[t].row - first.row) * FDK_ROWS);
            }
    });
}

template <class Path>
FDK_INLINE void plan_panels(const fdk_weight& w, int64_t m, int64_t widest, fdk_plan* plan) {
    // Every block reads all rows of a chunk, so that they should stay in the third-level cache.
    const int64_t fit = (8 << 20) / (w.k_padded * 2 * Path::words_per_pair);
    plan->rows = rows_of_chunk(m, fit < 128 ? 128 : fit < FDK_CHUNK ? fit : FDK_CHUNK);
    cut_unevenly(widest, plan);
    plan->algorithm = FDK_PANELS;
    plan->workspace = Panels<Path>::blocks_at_once(w) *
                      (Panels<Path>::panel_size(w) + (plan->rows + widest) * FDK_ROWS * (int64_t)sizeof(float));
}

template <class Path, int M>
constexpr typename Panels<Path>::Tile panel_tile() {
    return {Panels<Path>::template multiply<M>, write_totals<typename Path::I, M>};
}
#define FDK_PANEL_TILE(PATH, M) panel_tile<PATH, M>()

// By width, as cut_unevenly(12) chooses them.
#define FDK_PANEL_TILES(PATH)                                                                                        \
    {{}, FDK_PANEL_TILE(PATH, 1), FDK_PANEL_TILE(PATH, 2), FDK_PANEL_TILE(PATH, 3), FDK_PANEL_TILE(PATH, 4),          \
     FDK_PANEL_TILE(PATH, 5), FDK_PANEL_TILE(PATH, 6), FDK_PANEL_TILE(PATH, 7), FDK_PANEL_TILE(PATH, 8), {}, {}, {}, \
     FDK_PANEL_TILE(PATH, 12)}

}  // namespace
