// Few rows, or narrow codes: every tile decodes for itself, in registers.
#pragma once
#include "tiles.h"

namespace {

// Superblocks [first, end) of one block times one tile. totals :: [16 / W][M] vectors, updated.
template <class Path, int B, int M, bool SPLIT>
struct Block {
    typedef typename Path::I I;
    typedef typename I::vf vf;
    static constexpr int W = I::W, H = (int)FDK_ROWS / W;
    static constexpr int PAIR = Path::words_per_pair * M;  // dwords of x per pair
    static constexpr int MOST = SPLIT ? 1 : Path::template together<B, M>(), T = MOST < H ? MOST : H;
    // Chains of dependent multiply-adds: enough of them to hide the latency when there are few rows.
    static constexpr int SETS = T * M <= 1 ? 4 : T * M <= 5 ? 2 : 1;
    typedef typename Path::template Values<B> Values;

    template <int P0, int P1>
    static FDK_INLINE void pairs(const Values& values, const uint8_t* unit, const uint32_t* x, vf (&acc)[SETS * T * M]) {
        constexpr int NEAR = Values::NEAR;
        unroll<P0 / NEAR, (P1 + NEAR - 1) / NEAR>([&](auto n) FDK_LAMBDA {
            constexpr int first = decltype(n)::value * NEAR < P0 ? P0 : decltype(n)::value * NEAR;
            constexpr int end = decltype(n)::value * NEAR + NEAR < P1 ? decltype(n)::value * NEAR + NEAR : P1;
            unroll<0, T>([&](auto t) FDK_LAMBDA {
                constexpr int at = decltype(t)::value;
                unroll<first, end>([&](auto p) FDK_LAMBDA {
                    constexpr int P = decltype(p)::value;
                    Path::template step<M, P, Values::template plain_place<P>()>(
                        values, Values::template plain<P>(unit + 4 * W * at), x, acc + (P % SETS * T + at) * M);
                });
            });
        });
    }

    static FDK_INLINE void flush(const fdk_weight& w, const uint8_t* scales, const uint8_t* zeros, const float* sums,
                                 int h, vf (&acc)[SETS * T * M], vf (*total)[M]) {
        unroll<1, SETS>([&](auto s) FDK_LAMBDA {
            unroll<0, T * M>([&](auto i) FDK_LAMBDA {
                constexpr int c = decltype(i)::value;
                acc[c] = I::add(acc[c], acc[decltype(s)::value * T * M + c]);
            });
        });
        unroll<0, T>([&](auto t) FDK_LAMBDA {
            constexpr int at = decltype(t)::value;
            apply_scale<I, M>(w, scales, zeros, sums, h + at, acc + at * M, total[h + at]);
        });
        unroll<0, SETS * T * M>([&](auto i) FDK_LAMBDA { acc[decltype(i)::value] = I::zero(); });
    }

    static void run(const Call& call, int64_t begin, int64_t end, float* totals) {
        const fdk_weight& w = *call.w;
        constexpr int S = SPLIT ? 2 : 1;
        const Values values(*call.range);
        vf total[H][M];
        for (int h = 0; h < H; h++)
            unroll<0, M>([&](auto i) FDK_LAMBDA {
                constexpr int c = decltype(i)::value;
                total[h][c] = I::kept(totals + (h * M + c) * W);
            });
        const uint8_t* super = call.block + begin * w.super_bytes;
        const uint32_t* x = (const uint32_t*)call.tile->x + begin * w.units * 16 * PAIR;
        const float* sums = call.tile->sums ? call.tile->sums + begin * S * M : nullptr;
        const int64_t units = w.units, scales_size = FDK_ROWS * w.scale_bytes, zeros_size = FDK_ROWS * w.zero_bytes;
        for (int64_t s = begin; s < end; s++) {
            const uint8_t* zeros = zeros_size ? super + S * scales_size : nullptr;
            const uint8_t* first = super + S * (scales_size + zeros_size);
            for (int h = 0; h < H; h += T) {
                vf acc[SETS * T * M];
                unroll<0, SETS * T * M>([&](auto i) FDK_LAMBDA { acc[decltype(i)::value] = I::zero(); });
                const uint8_t* unit = first + 4 * W * h;
                const uint32_t* xu = x;
                const int64_t whole = SPLIT ? units / 2 : units;
                for (int64_t u = 0; u < whole; u++, unit += 64 * B, xu += 16 * PAIR) {
                    fetch_ahead<I, B>(unit);
                    pairs<0, 16>(values, unit, xu, acc);
                }
                if constexpr (SPLIT) {
                    pairs<0, 8>(values, unit, xu, acc);
                    flush(w, super, zeros, sums, h, acc, total);
                    pairs<8, 16>(values, unit, xu, acc);
                    unit += 64 * B, xu += 16 * PAIR;
                    for (int64_t u = 0; u < whole; u++, unit += 64 * B, xu += 16 * PAIR)
                        pairs<0, 16>(values, unit, xu, acc);
                    flush(w, super + scales_size, zeros ? zeros + zeros_size : nullptr, sums + M, h, acc, total);
                } else {
                    flush(w, super, zeros, sums, h, acc, total);
                }
            }
            super += w.super_bytes;
            x += units * 16 * PAIR;
            if (sums) sums += S * M;
        }
        for (int h = 0; h < H; h++)
            unroll<0, M>([&](auto i) FDK_LAMBDA {
                constexpr int c = decltype(i)::value;
                I::keep(totals + (h * M + c) * W, total[h][c]);
            });
    }
};

// The kernels of a tile by its width.
struct DirectFn {
    BlockFn run;
    WriteFn write;
};

const int64_t TOTALS = FDK_PANEL_WIDTH * FDK_ROWS;  // floats of totals per tile

// One tile: block after block, as they lie. Several: a stretch of k of one tile serves BATCH blocks before it is left,
// since x of all tiles may not fit the second-level cache; the codes of the batch do.
FDK_INLINE void run_direct(const fdk_job& job, int64_t block0, int64_t block1, void* workspace, const DirectFn* by_width) {
    const fdk_weight& w = *job.w;
    if (job.tiles_count == 1) {
        const DirectFn fn = by_width[job.tiles[0].width];
        for_blocks(job, block0, block1, [&](Call& call) {
            float totals[TOTALS] = {0};
            set_tile(call, job, 0);
            fn.run(call, 0, w.supers, totals);
            fn.write(call, totals);
        });
        return;
    }
    const int64_t x_bytes = w.units * FDK_UNIT * job.plan->width * (job.plan->bf16_pairs ? 2 : 4);
    const int64_t fit = (64 << 10) / x_bytes, step = fit < 1 ? 1 : fit;
    float* totals = (float*)workspace;
    for_batches(job, block0, block1, BATCH, [&](Call* calls, int64_t count) {
        memset(totals, 0, count * job.tiles_count * TOTALS * sizeof(float));
        for (int64_t s = 0; s < w.supers; s += step)
            for (int64_t t = 0; t < job.tiles_count; t++)
                for (int64_t b = 0; b < count; b++) {
                    set_tile(calls[b], job, t);
                    by_width[job.tiles[t].width].run(calls[b], s, s + step < w.supers ? s + step : w.supers,
                                                     totals + (b * job.tiles_count + t) * TOTALS);
                }
        for (int64_t t = 0; t < job.tiles_count; t++)
            for (int64_t b = 0; b < count; b++) {
                set_tile(calls[b], job, t);
                by_width[job.tiles[t].width].write(calls[b], totals + (b * job.tiles_count + t) * TOTALS);
            }
    });
}

// For a plan whose rows have been cut into tiles.
FDK_INLINE void plan_direct(fdk_plan* plan) {
    const int64_t tiles = tiles_of(plan);
    plan->workspace = tiles > 1 ? BATCH * tiles * TOTALS * (int64_t)sizeof(float) : 0;
}

// By bits; one tile of M rows.
#define FDK_BY_BITS(PATH, M, SPLIT)                                                                          \
    {nullptr, Block<PATH, 1, M, SPLIT>::run, Block<PATH, 2, M, SPLIT>::run, Block<PATH, 3, M, SPLIT>::run,   \
     Block<PATH, 4, M, SPLIT>::run, Block<PATH, 5, M, SPLIT>::run, Block<PATH, 6, M, SPLIT>::run,           \
     Block<PATH, 7, M, SPLIT>::run, Block<PATH, 8, M, SPLIT>::run}
// The same for kernels that take wider codes through panels.
#define FDK_BY_SIX_BITS(PATH, M)                                                                                       \
    {nullptr, Block<PATH, 1, M, false>::run, Block<PATH, 2, M, false>::run, Block<PATH, 3, M, false>::run,              \
     Block<PATH, 4, M, false>::run, Block<PATH, 5, M, false>::run, Block<PATH, 6, M, false>::run, nullptr, nullptr}

}  // namespace
