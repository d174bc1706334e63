// Storages whose codes are brought into words before they are looked up, a unit at a time: nested planes, sparse codes.
//
// Unit<Path>, one vector of rows of a unit:
//   Values(range)              the table, as Path::Values
//   Super(w, super)            what its units need of the scales and zeros in front of superblock `super`
//   ZEROS                      whether they take zeros off; if so,
//     super.zeros()            what is left of the zeros of the 16 rows after that, if super.more()
//     super.ones()             the same superblock with kept weights of 1
//   Unit(w, block, super, s, u, h)      unit u of superblock s
//   word<P>(), place<P>()      the word with the codes of pair P, and where in it they are: PLACE of the look-up
//   pair_at(i)                 a good order of the 16 pairs, those of either half of a unit together
//   fetch_ahead(w, block, s, u)
#pragma once
#include "direct.h"
#include "panels.h"

namespace {

// Like Block of direct.h: superblocks [begin, end) of one block times one tile, every unit brought into words once for all
// rows of x.
template <class Path, class Unit, int M, bool SPLIT>
struct UnitBlock {
    typedef typename Path::I I;
    typedef typename I::vf vf;
    static constexpr int W = I::W, H = (int)FDK_ROWS / W;
    static constexpr int PAIR = Path::words_per_pair * M;  // dwords of x per pair
    static constexpr int SETS = M <= 2 ? 4 : M <= 4 ? 2 : 1;  // chains of dependent multiply-adds
    typedef typename Unit::Values Values;
    typedef typename Unit::Super Super;

    template <int P0, int P1>
    static FDK_INLINE void pairs(const Values& values, const Unit& unit, const uint32_t* x, vf (&acc)[SETS * M]) {
        unroll<P0, P1>([&](auto i) FDK_LAMBDA {
            constexpr int P = Unit::pair_at(decltype(i)::value);
            Path::template step<M, P, Unit::template place<P>()>(values, unit.template word<P>(), x,
                                                                 acc + decltype(i)::value % SETS * M);
        });
    }

    static FDK_INLINE void clear(vf (&acc)[SETS * M]) {
        unroll<0, SETS * M>([&](auto i) FDK_LAMBDA { acc[decltype(i)::value] = I::zero(); });
    }

    // The totals stay in memory: with the sums, the tables and the codes there are no registers left for them.
    static FDK_INLINE void flush(const fdk_weight& w, const uint8_t* scales, int h, vf (&acc)[SETS * M], float* totals) {
        vf total[M];
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            unroll<1, SETS>([&](auto s) FDK_LAMBDA { acc[c] = I::add(acc[c], acc[decltype(s)::value * M + c]); });
            total[c] = I::kept(totals + (h * M + c) * W);
        });
        apply_scale<I, M>(w, scales, nullptr, nullptr, h, acc, total);
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            I::keep(totals + (h * M + decltype(i)::value) * W, total[decltype(i)::value]);
        });
        clear(acc);
    }

    static void run(const Call& call, int64_t begin, int64_t end, float* totals) {
        const fdk_weight& w = *call.w;
        constexpr int S = SPLIT ? 2 : 1;
        const Values values(*call.range);
        const uint8_t* scales = call.block + begin * w.super_bytes;
        const uint32_t* x = (const uint32_t*)call.tile->x + begin * w.units * 16 * PAIR;
        const int64_t scales_size = FDK_ROWS * w.scale_bytes;
        for (int64_t s = begin; s < end; s++, scales += w.super_bytes, x += w.units * 16 * PAIR) {
            I::prefetch(scales + w.block_bytes);
            const Super super(w, scales);
            for (int h = 0; h < H; h++) {
                vf acc[SETS * M];
                clear(acc);
                const uint32_t* xu = x;
                for (int64_t u = 0; u < w.units; u++, xu += 16 * PAIR) {
                    Unit::fetch_ahead(w, call.block, s, u);
                    const Unit unit(w, call.block, super, s, u, h);
                    pairs<0, 8>(values, unit, xu, acc);
                    if (SPLIT && u == w.units / 2) flush(w, scales, h, acc, totals);
                    pairs<8, 16>(values, unit, xu, acc);
                }
                if constexpr (Unit::ZEROS)
                    if (super.more()) {
                        vf kept[SETS * M];
                        clear(kept);
                        const Super ones = super.ones();
                        for (int64_t u = 0; u < w.units; u++)
                            pairs<0, 16>(values, Unit(w, call.block, ones, s, u, h), x + u * 16 * PAIR, kept);
                        for (int i = 0; i < SETS * M; i++) acc[i] = I::fnma(super.zeros(), kept[i], acc[i]);
                    }
                flush(w, scales + (S - 1) * scales_size, h, acc, totals);
            }
        }
    }
};

// As Panels::expand; `super` are the scales of the first superblock.
template <class Path, class Unit>
void expand_units(const fdk_weight& w, const fdk_range& range, const uint8_t* super, int64_t supers,
                  uint32_t* __restrict panel) {
    typedef typename Path::I I;
    constexpr int W = I::W, H = (int)FDK_ROWS / W, WORDS = Path::words_per_pair;
    const typename Unit::Values values(range);
    const uint8_t* block = w.data + (super - w.data) / w.block_bytes * w.block_bytes;
    const int64_t first = (super - block) / w.super_bytes;
    for (int64_t s = first; s < first + supers; s++, super += w.super_bytes) {
        const typename Unit::Super in_front(w, super);
        for (int64_t u = 0; u < w.units; u++, panel += 16 * WORDS * FDK_ROWS) {
            Unit::fetch_ahead(w, block, s, u);
            for (int h = 0; h < H; h++) {
                const Unit unit(w, block, in_front, s, u, h);
                unroll<0, 16>([&](auto i) FDK_LAMBDA {
                    constexpr int P = Unit::pair_at(decltype(i)::value);
                    Path::template expand<Unit::template place<P>()>(values, unit.template word<P>(),
                                                                        panel + P * WORDS * FDK_ROWS + h * W);
                });
            }
            Path::arrange(panel);
        }
    }
}

}  // namespace
