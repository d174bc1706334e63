// 1 or 2 bits, one row of x: the codes of a nibble select one of 16 precomputed sums of their values times x, so that one
// look-up and one addition replace 4 / B multiply-adds. Included after kernels.h by the units whose traits have:
//   keep_table(table, sum)            stores the 16 sums of a nibble as add_nibbles reads them, in 64 bytes
//   add_nibbles(line, tables, acc)    adds what the 8 nibbles of every dword of a line select; acc :: [sets][16 / W], 4 in all
#pragma once
#include "tiles.h"

namespace {

// tables :: [ranges][k_padded / 32][B lines][8 nibbles][16] float32
template <class I, int B>
struct Nibbles {
    typedef typename I::vf vf;
    static constexpr int W = I::W, H = (int)FDK_ROWS / W, CODES = 4 / B;
    static constexpr int UNIT_TABLES = 128 * B;  // floats

    static bool plan(const fdk_weight& w, fdk_plan* plan) {
        // A thread's tables take it about as long as four blocks; each range of rows needs its own.
        if (w.bits != B || w.storage != FDK_PLAIN || w.split || w.blocks < 16 * w.ranges_count) return false;
        plan->algorithm = FDK_NIBBLES;
        plan->workspace = w.ranges_count * w.k_padded / FDK_UNIT * UNIT_TABLES * (int64_t)sizeof(float);
        return true;
    }

    static void prepare(const fdk_weight& w, const uint8_t* x, float* tables) {
        for (int64_t r = 0; r < w.ranges_count; r++) {
            vf value[CODES][H];
            for (int code = 0; code < CODES; code++) {
                float entries[16];
                for (int i = 0; i < 16; i++) entries[i] = w.ranges[r].value[i >> B * code];
                for (int h = 0; h < H; h++) value[code][h] = I::kept(entries + h * W);
            }
            for (int64_t k = 0; k < w.k_padded; k += FDK_UNIT) {
                float xs[FDK_UNIT];
                for (int c = 0; c < FDK_UNIT; c += W) {
                    const int64_t left = w.k - k - c;
                    const int lanes = left < 0 ? 0 : left < W ? (int)left : W;
                    I::keep(xs + c, I::floats_partial(x + (k + c) * w.scale_bytes, w.dtype, lanes));
                }
                for (int n = 0; n < 8 * B; n++, tables += 16) {
                    const int pair = n / 8 * (16 / B) + n % 4 * CODES, odd = n % 8 / 4;
                    const float* p = xs + 2 * pair + odd;
                    vf sum[H];
                    for (int h = 0; h < H; h++) sum[h] = I::mul(value[0][h], I::broadcast(p));
                    for (int code = 1; code < CODES; code++)
                        for (int h = 0; h < H; h++) sum[h] = I::fma(value[code][h], I::broadcast(p + 2 * code), sum[h]);
                    I::keep_table(tables, sum);
                }
            }
        }
    }

    // The tables do not fit the first-level cache, so BATCH blocks share a stretch of k whose tables do.
    static constexpr int64_t TABLE_BYTES = 16 << 10;

    // Every thread makes its own tables: fetching them from another core takes longer.
    static void run(const fdk_job& job, int64_t block0, int64_t block1, float* tables) {
        const fdk_weight& w = *job.w;
        prepare(w, (const uint8_t*)job.tiles[0].x, tables);
        const int64_t fit = TABLE_BYTES / (w.units * UNIT_TABLES * (int64_t)sizeof(float)), step = fit < 1 ? 1 : fit;
        for_batches(job, block0, block1, BATCH, [&](Call* calls, int64_t count) {
            vf totals[BATCH][H];
            for (int64_t b = 0; b < count; b++) {
                set_tile(calls[b], job, 0);
                for (int h = 0; h < H; h++) totals[b][h] = I::zero();
            }
            for (int64_t s = 0; s < w.supers; s += step) {
                const int64_t end = s + step < w.supers ? s + step : w.supers;
                for (int64_t b = 0; b < count; b++) {
                    // What is read next: the same stretch of the next block, the next stretch of the first, or the
                    // start of the next batch. And a batch later: the next stretch, or the start of the same block
                    // of the next batch.
                    const uint8_t* here = calls[b].block + s * w.super_bytes;
                    const uint8_t* next = b + 1 < count      ? calls[b + 1].block + s * w.super_bytes
                                          : end < w.supers ? calls[0].block + end * w.super_bytes
                                                           : calls[b].block + w.block_bytes;
                    const uint8_t* later = end < w.supers ? calls[b].block + end * w.super_bytes
                                                          : calls[b].block + BATCH * w.block_bytes;
                    stretch(calls[b], tables, s, end, next - here, later - here, totals[b]);
                }
            }
            for (int64_t b = 0; b < count; b++) finish<I, 1>(calls[b], totals[b]);
        });
    }

    // Reads what lies `near` and `far` behind it next, and after that.
    static void stretch(const Call& call, const float* tables, int64_t first, int64_t end, int64_t near, int64_t far,
                        vf (&total)[H]) {
        const fdk_weight& w = *call.w;
        const float* t = tables + (call.range_index * w.k_padded / FDK_UNIT + first * w.units) * UNIT_TABLES;
        const float* sums = call.tile->sums ? call.tile->sums + first : nullptr;
        const int64_t scales_size = FDK_ROWS * w.scale_bytes, zeros_size = FDK_ROWS * w.zero_bytes;
        const uint8_t* super = call.block + first * w.super_bytes;
        for (int64_t s = first; s < end; s++, super += w.super_bytes) {
            const uint8_t* zeros = zeros_size ? super + scales_size : nullptr;
            const uint8_t* line = super + scales_size + zeros_size;
            vf acc[4] = {I::zero(), I::zero(), I::zero(), I::zero()};
            I::prefetch(super + near);
            for (int64_t n = w.units * B; n; n--, line += 64, t += 128) {
                I::prefetch_far(line + far);
                I::prefetch(line + near);
                I::add_nibbles(line, t, acc);
            }
            unroll<0, 2>([&](auto level) FDK_LAMBDA {
                constexpr int step = H << decltype(level)::value;  // between the sets that are added
                unroll<0, 4>([&](auto i) FDK_LAMBDA {
                    constexpr int at = decltype(i)::value;
                    if constexpr (step < 4 && at % (2 * step) < H) acc[at] = I::add(acc[at], acc[at + step]);
                });
            });
            unroll<0, H>([&](auto h) FDK_LAMBDA {
                constexpr int at = decltype(h)::value;
                apply_scale<I, 1>(w, super, zeros, sums, at, acc + at, total + at);
            });
            if (sums) sums++;
        }
    }
};

}  // namespace
