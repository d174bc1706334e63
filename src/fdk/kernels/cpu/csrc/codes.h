// Compile-time loops, and the codes of a pair of k from the bytes of a unit.
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

// What lies behind the lines of a unit, asked for in two steps, the farther one first. The first-level cache waits for few
// lines at a time, fewer than memory needs to deliver all it can; the second-level cache, asked well before, for more.
template <class I, int LINES>
FDK_INLINE void fetch_ahead(const uint8_t* unit) {
    unroll<0, LINES>([&](auto line) FDK_LAMBDA {
        I::prefetch_far(unit + 64 * decltype(line)::value + (16 << 10));
        I::prefetch(unit + 64 * decltype(line)::value + (4 << 10));
    });
}

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

// How tables get the codes of a pair, for tables that look up the low bits of both halves. Of pair P,
//     plain<P>(unit), nested<P>(fields)      the word that holds its codes; equal words of several pairs are one
//     plain_place<P>(), nested_place<P>()    where in that word they are: PLACE of the look-up
template <class I, int B, int SHARED = 1>
struct Halves {
    static constexpr int SHARE = SHARED;
    static constexpr int NEAR = 16;  // pairs that are decoded before those of the next vector of rows
    static constexpr bool BYTES = B > 6 && SHARE == 2;  // look-ups serve all bytes of a word at once
    static constexpr bool LATE = I::W == 16 && B <= 5;  // words of nested units are put together where they are used
    template <int P>
    static constexpr int plain_place() { return place<B, P, SHARE>(); }
    template <int P>
    static constexpr int nested_place() { return BYTES ? 2 + P % 8 / 4 : 0; }
    template <int P>
    static FDK_INLINE typename I::vi plain(const uint8_t* unit) { return pair_codes<I, B, P, SHARE>(unit); }
    template <int P, class Fields>
    static FDK_INLINE typename I::vi nested(const Fields& fields) { return fields.template codes<P, BYTES>(); }
};

// What a path may do otherwise: how many vectors of rows are decoded together for M rows of x, how many pairs a step of
// `multiply` takes, in what order a panel holds a unit, and in what order the accumulators of a panel's product are.
struct PlainPath {
    template <int B, int M>
    static constexpr int together() { return 1; }
    static constexpr int pairs_per_step = 1;
    static FDK_INLINE void arrange(uint32_t*) {}
    template <int T, int M, class V>
    static FDK_INLINE void by_row(V*) {}
};

}  // namespace
