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

}  // namespace
