// Nested weights: superblocks of bit planes of an 8-bit master, of which a product reads the `bits` leading ones.
// The bytes are described in fdk_cpu.h.
//
// Codes arrive as indices whose bit t is plane t, so the most significant bit of the master is bit 0; the tables of a
// nested weight are in that order.
#pragma once
#include "dequantise.h"
#include "units.h"

namespace {

// Lines of one unit: that of plane t at first + t * stride.
struct Lines {
    const uint8_t* first;
    int64_t stride;
};

FDK_INLINE Lines lines_of(const fdk_weight& w, const uint8_t* block, int64_t unit) {
    return {block + w.planes_at + 64 * unit, w.plane_bytes};
}

template <class I, int FROM, int TO>
FDK_INLINE typename I::vi moved(typename I::vi v) {
    if constexpr (FROM >= TO) return I::template shr<FROM - TO>(v);
    else return I::template shl<TO - FROM>(v);
}

// The codes of a unit in words of equal fields: B bits of every field are a code, the others garbage.
template <class I, int B>
struct Fields {
    typedef typename I::vi vi;
    static constexpr int WIDTH = B <= 2 ? 2 : B <= 4 ? 4 : 8;
    vi word[WIDTH];

    FDK_INLINE Fields(const Lines& lines, int offset) {
        auto line = [&](int t) FDK_LAMBDA { return I::load(lines.first + t * lines.stride + offset); };
        if constexpr (WIDTH == 2) {
            for (int i = 0; i < 2; i++) word[i] = line(i);
        } else {
            const vi pairs[2] = {line(0), line(1)}, third = line(2);
            vi fourth = third;
            if constexpr (B > 3) fourth = line(3);
            vi nibbles[4];
            unroll<0, 4>([&](auto i) FDK_LAMBDA {
                constexpr int J = decltype(i)::value;
                vi v = I::pick(I::template shr<2 * (J % 2)>(pairs[J / 2]), moved<I, J, 2>(third), 0x44444444u);
                if constexpr (B > 3) v = I::pick(v, moved<I, J, 3>(fourth), 0x88888888u);
                nibbles[J] = v;
            });
            if constexpr (WIDTH == 4) {
                for (int i = 0; i < 4; i++) word[i] = nibbles[i];
            } else {
                unroll<0, 8>([&](auto i) FDK_LAMBDA {
                    constexpr int J = decltype(i)::value;
                    word[J] = I::template shr<4 * (J % 2)>(nibbles[J / 2]);
                });
                unroll<4, B>([&](auto t) FDK_LAMBDA {
                    constexpr int T = decltype(t)::value;
                    const vi plane = line(T);
                    unroll<0, 8>([&](auto i) FDK_LAMBDA {
                        constexpr int J = decltype(i)::value;
                        word[J] = I::pick(word[J], moved<I, J, T>(plane), 0x01010101u << T);
                    });
                });
            }
        }
    }

    // The code of pair P at bit 0, or with BYTES in byte `place`.
    template <int P, bool BYTES = false>
    FDK_INLINE vi codes() const {
        constexpr int half = P / 8, f = P % 8;
        if constexpr (BYTES) return word[4 * half + 2 * (f % 2) + f / 2 % 2];
        if constexpr (WIDTH == 2) return I::template shr<2 * f>(word[half]);
        else if constexpr (WIDTH == 4) return I::template shr<4 * (f / 2)>(word[2 * half + f % 2]);
        else return I::template shr<8 * (f / 4)>(word[4 * half + 2 * (f % 2) + f / 2 % 2]);
    }
};

// The same, each word put together where it is used, which hides behind the products of the words before. For up to 5 planes and
// 32 registers: with more of either, all words first is faster (Zen 4).
template <class I, int B>
struct LateFields {
    typedef typename I::vi vi;
    static constexpr int WIDTH = Fields<I, B>::WIDTH;
    vi line[B];

    FDK_INLINE LateFields(const Lines& lines, int offset) {
        unroll<0, B>([&](auto t) FDK_LAMBDA {
            line[decltype(t)::value] = I::load(lines.first + decltype(t)::value * lines.stride + offset);
        });
    }

    template <int J>
    FDK_INLINE vi word() const {
        if constexpr (WIDTH == 2) return line[J];
        else if constexpr (WIDTH == 4) return nibbles<J>();
        else return I::pick(I::template shr<4 * (J % 2)>(nibbles<J / 2>()), moved<I, J, 4>(line[4]), 0x10101010u);
    }
    template <int J>
    FDK_INLINE vi nibbles() const {
        vi v = I::pick(I::template shr<2 * (J % 2)>(line[J / 2]), moved<I, J, 2>(line[2]), 0x44444444u);
        if constexpr (B > 3) v = I::pick(v, moved<I, J, 3>(line[3]), 0x88888888u);
        return v;
    }

    template <int P, bool = false>
    FDK_INLINE vi codes() const {
        constexpr int half = P / 8, f = P % 8;
        if constexpr (WIDTH == 2) return I::template shr<2 * f>(word<half>());
        else if constexpr (WIDTH == 4) return I::template shr<4 * (f / 2)>(word<2 * half + f % 2>());
        else return I::template shr<8 * (f / 4)>(word<4 * half + 2 * (f % 2) + f / 2 % 2>());
    }
    // Pairs of one word after those of the other.
    static constexpr int pair_at(int i) { return i / 8 * 8 + i % 8 / 4 + i % 4 / 2 * 2 + i % 2 * 4; }
};

template <class I, int B, bool LATE>
struct FieldsOf {
    typedef Fields<I, B> type;
    static constexpr int pair_at(int i) { return i; }
};
template <class I, int B>
struct FieldsOf<I, B, true> : LateFields<I, B> {
    typedef LateFields<I, B> type;
};

// One vector of rows of a unit, as units.h wants it.
template <class Path, int B>
struct NestedUnit {
    typedef typename Path::I I;
    typedef typename Path::template Values<B> Values;
    static constexpr bool ZEROS = false;
    struct Super {
        FDK_INLINE Super(const fdk_weight&, const uint8_t*) {}
    };
    typedef FieldsOf<I, B, Values::LATE> Found;
    typename Found::type fields;

    FDK_INLINE NestedUnit(const fdk_weight& w, const uint8_t* block, const Super&, int64_t s, int64_t u, int h)
        : fields(lines_of(w, block, s * w.units + u), 4 * I::W * h) {}
    template <int P>
    FDK_INLINE typename I::vi word() const { return Values::template nested<P>(fields); }
    template <int P>
    static constexpr int place() { return Values::template nested_place<P>(); }
    static constexpr int pair_at(int i) { return Found::pair_at(i); }

    // As fetch_ahead of codes.h, in each of the B leading planes; what lies ahead may be in the next block.
    static FDK_INLINE void fetch_ahead(const fdk_weight& w, const uint8_t* block, int64_t s, int64_t u) {
        const int64_t here = 64 * (s * w.units + u);
        const auto ahead = [&](int64_t distance) FDK_LAMBDA {
            const int64_t at = here + (distance < w.plane_bytes ? distance : w.plane_bytes), over = at - w.plane_bytes;
            return block + w.planes_at + (over < 0 ? at : w.block_bytes + over);
        };
        const uint8_t *near = ahead(512), *far = ahead(4 << 10);
        unroll<0, B>([&](auto t) FDK_LAMBDA {
            I::prefetch_far(far + decltype(t)::value * w.plane_bytes);
            I::prefetch(near + decltype(t)::value * w.plane_bytes);
        });
    }
};

// As Dequantise of dequantise.h.
template <class I, int B>
struct DequantiseNested {
    static constexpr int W = I::W, H = (int)FDK_ROWS / W;

    static void run(const fdk_weight& w, uint8_t* out, int64_t block0, int64_t block1) {
        for (int64_t b = block0; b < block1; b++) {
            const fdk_range* range = range_of(w, b);
            const int64_t left = range->row1 - range->row0 - (b - range->block0) * FDK_ROWS;
            const int rows = left < FDK_ROWS ? (int)left : (int)FDK_ROWS;
            block(w, *range, w.data + b * w.block_bytes, out, rows);
            out += rows * w.k * w.scale_bytes;
        }
    }

    static void block(const fdk_weight& w, const fdk_range& range, const uint8_t* data, uint8_t* out, int rows) {
        typedef typename I::template Values<B> Values;
        const Values values(range);
        const int64_t scales_size = FDK_ROWS * w.scale_bytes, S = w.split ? 2 : 1, group = w.units * FDK_UNIT / S;
        int64_t k = 0, unit = 0;
        for (int64_t s = 0; s < w.supers; s++) {
            const uint8_t* super = data + s * w.super_bytes;
            for (int64_t u = 0; u < w.units && k < w.k; u++, unit++, k += FDK_UNIT) {
                const Lines lines = lines_of(w, data, unit);
                typename I::Panel panel;
                for (int h = 0; h < H; h++) {
                    const Fields<I, B> fields(lines, 4 * W * h);
                    unroll<0, 2>([&](auto half) FDK_LAMBDA {
                        constexpr int P0 = decltype(half)::value * 8;
                        const int64_t g = (u * FDK_UNIT + 2 * P0) / group;
                        const typename I::vf scale = I::floats(super + g * scales_size + h * W * w.scale_bytes, w.dtype);
                        unroll<P0, P0 + 8>([&](auto p) FDK_LAMBDA {
                            typename I::vf even, odd;
                            constexpr int P = decltype(p)::value;
                            values.template pair<Values::template nested_place<P>()>(Values::template nested<P>(fields), even, odd);
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

#define FDK_NESTED(T, ...)                                                                                  \
    {nullptr, nullptr, T<__VA_ARGS__, 2>, T<__VA_ARGS__, 3>, T<__VA_ARGS__, 4>, T<__VA_ARGS__, 5>,            \
     T<__VA_ARGS__, 6>, T<__VA_ARGS__, 7>, T<__VA_ARGS__, 8>}

template <class Path, int M, bool SPLIT, int B>
void nested_tile(const Call& call, int64_t begin, int64_t end, float* totals) {
    UnitBlock<Path, NestedUnit<Path, B>, M, SPLIT>::run(call, begin, end, totals);
}

template <class Path, int B>
void nested_expand(const fdk_weight& w, const fdk_range& range, const uint8_t* super, int64_t supers, uint32_t* panel) {
    expand_units<Path, NestedUnit<Path, B>>(w, range, super, supers, panel);
}

template <class I, int B>
void nested_rows(const fdk_weight& w, uint8_t* out, int64_t block0, int64_t block1) {
    DequantiseNested<I, B>::run(w, out, block0, block1);
}

// Tiles of the widths WIDTHS decode for themselves, others go through panels; `tiles` are those of plain weights.
template <class Path, int... WIDTHS>
void nested_linear(const fdk_job& job, int64_t block0, int64_t block1, void* workspace,
                   const typename Panels<Path>::Tile* tiles) {
    static const typename Panels<Path>::ExpandFn expand[9] = FDK_NESTED(nested_expand, Path);
    if (job.plan->algorithm == FDK_PANELS) return run_panels<Path>(job, block0, block1, workspace, tiles, expand);
    static const BlockFn split[9] = FDK_NESTED(nested_tile, Path, 1, true);
    static const BlockFn whole[][9] = {FDK_NESTED(nested_tile, Path, WIDTHS, false)...};
    DirectFn direct[FDK_PANEL_WIDTH + 1] = {};
    int at = 0;
    ((direct[WIDTHS] = {whole[at++][job.w->bits], write_totals<typename Path::I, WIDTHS>}), ...);
    if (job.w->split) direct[1].run = split[job.w->bits];
    run_direct(job, block0, block1, workspace, direct);
}

template <class I>
void dequantise_nested(const fdk_weight& w, uint8_t* out, int64_t block0, int64_t block1) {
    static void (*const by_bits[9])(const fdk_weight&, uint8_t*, int64_t, int64_t) = FDK_NESTED(nested_rows, I);
    by_bits[w.bits](w, out, block0, block1);
}

}  // namespace
