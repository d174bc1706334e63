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

// Dwords whose 16-bit halves hold the codes of pair P of a unit, B bits from bit B * place<B, P, SHARE>(); garbage above
// and below. SHARE neighbouring codes are left in one shifted word, so that they share its shift.
template <int B, int P, int SHARE>
constexpr int place() {
    return P < B * (16 / B) ? P % (16 / B) % SHARE : 0;
}

template <class I, int B, int P, int SHARE = 1>
FDK_INLINE typename I::vi pair_codes(const uint8_t* unit) {
    constexpr int q = 16 / B, rest = 16 % B, direct = B * q;
    if constexpr (P < direct) {
        return I::template shr<B * (P % q - place<B, P, SHARE>())>(I::load(unit + 64 * (P / q)));
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
    struct Values : I::template Values<B> {
        static constexpr int SHARE = 1;
        FDK_INLINE explicit Values(const fdk_range& r) : I::template Values<B>(r) {}
    };

    template <int B, int M, int>
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

    template <int B>
    static FDK_INLINE void expand(const Values<B>& values, typename I::vi codes, uint32_t* panel) {
        typename I::vf even, odd;
        values.pair(codes, even, odd);
        I::keep((float*)panel, even);
        I::keep((float*)panel + FDK_ROWS, odd);
    }

    // acc :: [T][M]: T vectors of rows next to each other, M rows of x.
    template <int T, int M>
    static FDK_INLINE void multiply(const uint32_t* panel, const uint32_t* x, typename I::vf* acc) {
        unroll<0, 2>([&](auto parity) FDK_LAMBDA {
            constexpr int K = decltype(parity)::value;
            typename I::vf value[T];
            unroll<0, T>([&](auto t) FDK_LAMBDA {
                value[decltype(t)::value] = I::kept((const float*)panel + K * FDK_ROWS + decltype(t)::value * I::W);
            });
            unroll<0, M>([&](auto i) FDK_LAMBDA {
                constexpr int c = decltype(i)::value;
                const typename I::vf xs = I::broadcast(x + K * M + c);
                unroll<0, T>([&](auto t) FDK_LAMBDA {
                    constexpr int at = decltype(t)::value * M + c;
                    acc[at] = I::fma(value[decltype(t)::value], xs, acc[at]);
                });
            });
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
    int64_t col;
    int lanes;
    int range_index;
};
typedef void (*BlockFn)(const Call&, int64_t begin, int64_t end, float* totals);
typedef void (*WriteFn)(const Call&, const float* totals);

// Zeros of vector h of rows, relative to what the values of the range have already taken off.
template <class I>
FDK_INLINE typename I::vf zeros_of(const fdk_weight& w, const uint8_t* zeros, int h) {
    if (w.family == FDK_UINT_U8) return I::sub_scalar(I::bytes(zeros + h * I::W), (float)(1 << (w.bits - 1)));
    return I::floats(zeros + h * I::W * w.zero_bytes, w.dtype);
}

// total += scale * (acc - zero * sum of x): scales are applied to sums over whole groups.
template <class I, int M>
FDK_INLINE void apply_scale(const fdk_weight& w, const uint8_t* scales, const uint8_t* zeros, const float* sums, int h,
                            typename I::vf* acc, typename I::vf* total) {
    const typename I::vf scale = I::floats(scales + h * I::W * w.scale_bytes, w.dtype);
    if (zeros) {
        const typename I::vf zero = zeros_of<I>(w, zeros, h);
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            acc[c] = I::fnma(zero, I::broadcast(sums + c), acc[c]);
        });
    }
    unroll<0, M>([&](auto i) FDK_LAMBDA {
        constexpr int c = decltype(i)::value;
        total[c] = I::fma(acc[c], scale, total[c]);
    });
}

// Rounds the totals of 16 rows of W and M rows of x, with the bias, into out.
template <class I, int M>
FDK_INLINE void finish(const Call& call, const typename I::vf* total) {
    const fdk_weight& w = *call.w;
    for (int h = 0; h < (int)FDK_ROWS / I::W; h++) {
        int lanes = call.lanes - h * I::W;
        if (lanes <= 0) break;
        if (lanes > I::W) lanes = I::W;
        typename I::vf bias = I::zero();
        if (call.bias) bias = I::floats_partial(call.bias + h * I::W * w.scale_bytes, w.dtype, lanes);
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            if (c < call.tile->rows) {
                const typename I::vf y = total[h * M + c];
                I::store(call.out + (c * w.n + h * I::W) * w.scale_bytes, w.dtype, call.bias ? I::add(y, bias) : y, lanes);
            }
        });
    }
}

// Superblocks [first, end) of one block times one tile. totals :: [16 / W][M] vectors, updated.
template <class Path, int B, int M, bool SPLIT>
struct Block {
    typedef typename Path::I I;
    typedef typename I::vf vf;
    static constexpr int W = I::W, H = (int)FDK_ROWS / W;
    static constexpr int PAIR = Path::words_per_pair * M;  // dwords of x per pair
    // Chains of dependent multiply-adds: enough of them to hide the latency when there are few rows.
    static constexpr int SETS = M == 1 ? 4 : M <= 5 ? 2 : 1;
    typedef typename Path::template Values<B> Values;

    template <int P0, int P1>
    static FDK_INLINE void pairs(const Values& values, const uint8_t* unit, const uint32_t* x, vf (&acc)[SETS * M]) {
        unroll<P0, P1>([&](auto p) FDK_LAMBDA {
            constexpr int P = decltype(p)::value;
            constexpr int SHARE = Values::SHARE;
            Path::template step<B, M, place<B, P, SHARE>()>(values, pair_codes<I, B, P, SHARE>(unit), x + P * PAIR,
                                                            acc + (P % SETS) * M);
        });
    }

    static FDK_INLINE void flush(const fdk_weight& w, const uint8_t* scales, const uint8_t* zeros, const float* sums,
                                 int h, vf (&acc)[SETS * M], vf (&total)[M]) {
        unroll<1, SETS>([&](auto s) FDK_LAMBDA {
            unroll<0, M>([&](auto i) FDK_LAMBDA {
                constexpr int c = decltype(i)::value;
                acc[c] = I::add(acc[c], acc[decltype(s)::value * M + c]);
            });
        });
        apply_scale<I, M>(w, scales, zeros, sums, h, acc, total);
        unroll<0, SETS * M>([&](auto i) FDK_LAMBDA { acc[decltype(i)::value] = I::zero(); });
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
        for (int h = 0; h < H; h++)
            unroll<0, M>([&](auto i) FDK_LAMBDA {
                constexpr int c = decltype(i)::value;
                I::keep(totals + (h * M + c) * W, total[h][c]);
            });
    }
};

template <class I, int M>
void write_totals(const Call& call, const float* totals) {
    typename I::vf total[FDK_ROWS / I::W * M];
    for (int i = 0; i < (int)FDK_ROWS / I::W * M; i++) total[i] = I::kept(totals + i * I::W);
    finish<I, M>(call, total);
}

// Many rows of x: the values of a block are expanded once, without scales, into a panel that stays in the first-level
// cache, and every tile multiplies the panel. panel :: [pairs][words_per_pair][16 rows].
template <class Path>
struct Panels {
    typedef typename Path::I I;
    typedef typename I::vf vf;
    static constexpr int W = I::W, H = (int)FDK_ROWS / W, WORDS = Path::words_per_pair;
    static constexpr int TOGETHER = W == 16 ? 1 : 2;  // vectors of rows that share one load of x
    static constexpr int64_t BYTES = 8 << 10;

    // Superblocks expanded at a time. A superblock is never cut: its zeros apply to sums over whole groups.
    static int64_t supers_at_once(const fdk_weight& w) {
        const int64_t one = w.units * 16 * WORDS * 64, fit = BYTES / one;
        return fit < 1 ? 1 : fit < w.supers ? fit : w.supers;
    }

    static int64_t panel_size(const fdk_weight& w) { return supers_at_once(w) * w.units * 16 * WORDS * 64; }

    // Float32 products of codes round, so that taking zero * (sum of x) off their sum would leave a residue where code
    // and zero are equal; there the zeros are taken off the values. Products of 16-bit activations are exact.
    static bool subtracts(const fdk_weight& w) { return WORDS == 2 && w.zero_bytes && w.dtype == FDK_FP32; }

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
    static void expand(const fdk_weight& w, const fdk_range& range, const uint8_t* super, int64_t supers, uint32_t* panel) {
        const typename Path::template Values<B> values(range);
        const int S = w.split ? 2 : 1;
        for (int64_t s = 0; s < supers; s++, super += w.super_bytes) {
            const uint8_t* unit = super + S * FDK_ROWS * (w.scale_bytes + w.zero_bytes);
            for (int64_t u = 0; u < w.units; u++, unit += 64 * B, panel += 16 * WORDS * FDK_ROWS) {
                unroll<0, B>([&](auto line) FDK_LAMBDA { I::prefetch(unit + 64 * decltype(line)::value + 2048); });
                for (int h = 0; h < H; h++)
                    unroll<0, 16>([&](auto p) FDK_LAMBDA {
                        constexpr int P = decltype(p)::value;
                        Path::template expand<B>(values, pair_codes<I, B, P>(unit + 4 * W * h),
                                                 panel + P * WORDS * FDK_ROWS + h * W);
                    });
            }
        }
    }

    // totals :: [16 / W][M] vectors, updated with `groups` groups of a panel.
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
            const uint32_t *v = panel + h * W, *xp = x;
            const float* sum = sums;
            const uint8_t* at = super;
            for (int64_t s = 0; s < supers; s++, at += w.super_bytes) {
                for (int i = 0; i < S; i++) {
                    for (int64_t e = 0; e < eights; e++, v += 8 * WORDS * FDK_ROWS, xp += 8 * WORDS * M)
                        unroll<0, 8>([&](auto p) FDK_LAMBDA {
                            constexpr int P = decltype(p)::value;
                            Path::template multiply<TOGETHER, M>(v + P * WORDS * FDK_ROWS, xp + P * WORDS * M, acc);
                        });
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



FDK_INLINE const fdk_range* range_of(const fdk_weight& w, int64_t block) {
    const fdk_range* r = w.ranges;
    while (block >= r->block1) r++;
    return r;
}

// visit(call) for every block of [block0, block1), everything but the tile filled in.
template <class Visit>
FDK_INLINE void for_blocks(const fdk_job& job, int64_t block0, int64_t block1, Visit&& visit) {
    const fdk_weight& w = *job.w;
    if (block0 >= block1) return;
    const fdk_range* range = range_of(w, block0);
    for (int64_t b = block0; b < block1; b++) {
        while (b >= range->block1) range++;
        const int64_t col = range->row0 + (b - range->block0) * FDK_ROWS, left = range->row1 - col;
        Call call;
        call.w = &w;
        call.range = range;
        call.range_index = (int)(range - w.ranges);
        call.block = w.data + b * w.block_bytes;
        call.bias = job.bias ? (const uint8_t*)job.bias + col * w.scale_bytes : nullptr;
        call.lanes = left < FDK_ROWS ? (int)left : (int)FDK_ROWS;
        call.col = col;
        visit(call);
    }
}

FDK_INLINE void set_tile(Call& call, const fdk_job& job, int64_t tile) {
    call.tile = job.tiles + tile;
    call.out = (uint8_t*)job.out + (call.tile->row * call.w->n + call.col) * call.w->scale_bytes;
}

const int64_t BATCH = 8, TOTALS = FDK_PANEL_WIDTH * FDK_ROWS;  // blocks that share x; floats of totals per tile

// Tiles decode for themselves. One tile: block after block, as they lie. Several: a stretch of k of one tile, short
// enough for the first-level cache, serves BATCH blocks before it is left, since x of all tiles may not fit the
// second-level cache; the codes of the batch do.
FDK_INLINE void run_direct(const fdk_job& job, int64_t block0, int64_t block1, void* workspace, BlockFn run, WriteFn write) {
    const fdk_weight& w = *job.w;
    if (job.tiles_count == 1) {
        for_blocks(job, block0, block1, [&](Call& call) {
            float totals[TOTALS] = {0};
            set_tile(call, job, 0);
            run(call, 0, w.supers, totals);
            write(call, totals);
        });
        return;
    }
    const int64_t x_bytes = w.units * FDK_UNIT * job.plan->width * (job.plan->bf16_pairs ? 2 : 4);
    const int64_t fit = (64 << 10) / x_bytes, step = fit < 1 ? 1 : fit;
    float* totals = (float*)workspace;
    Call calls[BATCH];
    int64_t count = 0, left = block1 - block0;
    for_blocks(job, block0, block1, [&](Call& call) {
        calls[count++] = call;
        left--;
        if (count < BATCH && left) return;
        memset(totals, 0, count * job.tiles_count * TOTALS * sizeof(float));
        for (int64_t s = 0; s < w.supers; s += step)
            for (int64_t t = 0; t < job.tiles_count; t++)
                for (int64_t b = 0; b < count; b++) {
                    set_tile(calls[b], job, t);
                    run(calls[b], s, s + step < w.supers ? s + step : w.supers, totals + (b * job.tiles_count + t) * TOTALS);
                }
        for (int64_t t = 0; t < job.tiles_count; t++)
            for (int64_t b = 0; b < count; b++) {
                set_tile(calls[b], job, t);
                write(calls[b], totals + (b * job.tiles_count + t) * TOTALS);
            }
        count = 0;
    });
}

// The same through panels. workspace :: panel, then totals of every tile.
template <class Path>
void run_panels(const fdk_job& job, int64_t block0, int64_t block1, void* workspace, const typename Panels<Path>::Tile* tiles) {
    typedef Panels<Path> P;
    static const typename P::ExpandFn expand[9] = {
        nullptr,
        P::template expand<1>, P::template expand<2>, P::template expand<3>, P::template expand<4>,
        P::template expand<5>, P::template expand<6>, P::template expand<7>, P::template expand<8>};
    const fdk_weight& w = *job.w;
    const int64_t step = P::supers_at_once(w), groups = w.split ? 2 : 1;
    uint32_t* panel = (uint32_t*)workspace;
    float* totals = (float*)((uint8_t*)workspace + P::panel_size(w));
    for_blocks(job, block0, block1, [&](Call& call) {
        memset(totals, 0, job.tiles_count * FDK_PANEL_WIDTH * FDK_ROWS * sizeof(float));
        for (int64_t s = 0; s < w.supers; s += step) {
            const int64_t count = w.supers - s < step ? w.supers - s : step;
            const uint8_t* super = call.block + s * w.super_bytes;
            expand[w.bits](w, *call.range, super, count, panel);
            if (P::subtracts(w)) P::subtract_zeros(w, super, count, (float*)panel);
            for (int64_t t = 0; t < job.tiles_count; t++) {
                const fdk_tile& tile = job.tiles[t];
                tiles[tile.width].multiply(w, super, count, panel,
                                           (const uint32_t*)tile.x + s * w.units * 16 * Path::words_per_pair * tile.width,
                                           tile.sums ? tile.sums + s * groups * tile.width : nullptr,
                                           totals + t * FDK_PANEL_WIDTH * FDK_ROWS);
            }
        }
        for (int64_t t = 0; t < job.tiles_count; t++) {
            set_tile(call, job, t);
            tiles[call.tile->width].write(call, totals + t * FDK_PANEL_WIDTH * FDK_ROWS);
        }
    });
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
                        const vf zero = zeros_size ? zeros_of<I>(w, zeros + g * zeros_size, h) : I::zero();
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

// Cuts m rows into chunks of at most `most`, and a chunk into tiles of at most `widest`, all as even as they can be.
FDK_INLINE void cut_rows(int64_t m, int64_t most, int64_t widest, fdk_plan* plan) {
    const int64_t chunks = (m + most - 1) / most;
    plan->rows = (m + chunks - 1) / chunks;
    const int64_t tiles = (plan->rows + widest - 1) / widest;
    plan->width = (int32_t)((plan->rows + tiles - 1) / tiles);
}

FDK_INLINE void plan_direct(int64_t m, int64_t widest, fdk_plan* plan) {
    cut_rows(m, 32 * widest, widest, plan);
    const int64_t tiles = (plan->rows + plan->width - 1) / plan->width;
    plan->workspace = tiles > 1 ? BATCH * tiles * TOTALS * (int64_t)sizeof(float) : 0;
}

template <class Path>
FDK_INLINE void plan_panels(const fdk_weight& w, int64_t m, int64_t widest, fdk_plan* plan) {
    cut_rows(m, 32 * widest, widest, plan);
    const int64_t tiles = (plan->rows + plan->width - 1) / plan->width;
    plan->algorithm = FDK_PANELS;
    plan->workspace = Panels<Path>::panel_size(w) + tiles * FDK_PANEL_WIDTH * FDK_ROWS * (int64_t)sizeof(float);
}

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
uint64_t read_lines(const void* p, int64_t size) {
    typename I::vi seen[4] = {I::zero_words(), I::zero_words(), I::zero_words(), I::zero_words()};
    const uint8_t* at = (const uint8_t*)p;
    for (int64_t i = 0; i + 256 <= size; i += 256, at += 256)
        unroll<0, 4>([&](auto n) FDK_LAMBDA {
            constexpr int line = decltype(n)::value;
            I::prefetch(at + 64 * line + 2048);
            unroll<0, 16 / I::W>([&](auto h) FDK_LAMBDA {
                seen[line] = I::or_and(seen[line], I::load(at + 64 * line + 4 * I::W * decltype(h)::value), 0xffffffffu);
            });
        });
    for (int n = 1; n < 4; n++) seen[0] = I::or_and(seen[0], seen[n], 0xffffffffu);
    uint64_t first;
    memcpy(&first, &seen[0], 8);
    return first;
}

// Independent chains, as many as hide the latency, on the operands in sink :: [16]; returns the operations of one step.
template <class Path>
int64_t multiply_chains(int64_t steps, float* sink) {
    typedef typename Path::I I;
    uint32_t panel[2 * FDK_ROWS], x[2 * 12];
    for (int i = 0; i < 2 * FDK_ROWS; i++) memcpy(&panel[i], &sink[i % FDK_ROWS], 4);
    for (int i = 0; i < 2 * 12; i++) memcpy(&x[i], &sink[i % FDK_ROWS], 4);
    typename I::vf acc[12];
    for (int i = 0; i < 12; i++) acc[i] = I::zero();
    for (int64_t s = 0; s < steps; s++) Path::template multiply<1, 12>(panel, x, acc);
    for (int i = 1; i < 12; i++) acc[0] = I::add(acc[0], acc[i]);
    I::keep(sink, acc[0]);
    return 12 * 2 * 2 * I::W;
}

template <class I>
void dequantise_blocks(const fdk_weight* w, void* out, int64_t block0, int64_t block1) {
    static void (*const by_bits[9])(const fdk_weight&, uint8_t*, int64_t, int64_t) = {
        nullptr,
        Dequantise<I, 1>::run, Dequantise<I, 2>::run, Dequantise<I, 3>::run, Dequantise<I, 4>::run,
        Dequantise<I, 5>::run, Dequantise<I, 6>::run, Dequantise<I, 7>::run, Dequantise<I, 8>::run};
    if (block0 < block1) by_bits[w->bits](*w, (uint8_t*)out, block0, block1);
}

// Widths of even cuts into tiles of at most 12.
#define FDK_PANEL_TILES(PATH)                                                                              \
    {{}, FDK_PANEL_TILE(PATH, 1), FDK_PANEL_TILE(PATH, 2), FDK_PANEL_TILE(PATH, 3), FDK_PANEL_TILE(PATH, 4), \
     FDK_PANEL_TILE(PATH, 5),                                                                              \
     FDK_PANEL_TILE(PATH, 6), FDK_PANEL_TILE(PATH, 7), FDK_PANEL_TILE(PATH, 8), FDK_PANEL_TILE(PATH, 9),   \
     FDK_PANEL_TILE(PATH, 10), FDK_PANEL_TILE(PATH, 11), FDK_PANEL_TILE(PATH, 12)}

#define FDK_PANEL_TILE(PATH, M) {Panels<PATH>::multiply<M>, write_totals<PATH::I, M>}

#define FDK_BY_BITS(PATH, M, SPLIT)                                                                         \
    {nullptr, Block<PATH, 1, M, SPLIT>::run, Block<PATH, 2, M, SPLIT>::run, Block<PATH, 3, M, SPLIT>::run,   \
     Block<PATH, 4, M, SPLIT>::run, Block<PATH, 5, M, SPLIT>::run, Block<PATH, 6, M, SPLIT>::run,           \
     Block<PATH, 7, M, SPLIT>::run, Block<PATH, 8, M, SPLIT>::run}

}  // namespace
