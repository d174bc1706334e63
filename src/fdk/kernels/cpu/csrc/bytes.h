// Tables on ARM, where one instruction looks up bytes. The bytes of a value are looked up apart, for all codes of a vector
// that lie in bytes or nibbles at the same place, and transposed back into values. Included after kernels.h by the units
// whose traits have:
//   bytes_of<N>                table of N bytes: bytes_of(const uint8_t*), at(index), indices below N
//   upper_nibbles(v)           every byte shifted right by 4
//   transpose<HIGH>(a, b), transpose_halves<HIGH>(a, b)   bytes or 16-bit elements HIGH of a and of b next to each other
#pragma once
#include "kernels.h"

namespace {

// PLACE of a look-up: the bit of the code in its half where nibbles are looked up, or AT_BYTE + the byte of the half.
const int AT_BYTE = 16;

// SIZE bytes of every value: 4 for float32, or the upper 2, which are the value if it is a bf16 number.
template <class I, int B, int SIZE>
struct ByteValues {
    typedef typename I::vi vi;
    typedef typename I::vf vf;
    static constexpr bool DENSE = B == 1 || B == 2 || B == 4 || B == 8;  // codes never straddle bytes
    // A nibble holds that many codes, each with tables of its own.
    static constexpr int CODES = B <= 2 ? 4 / B : 1, ENTRIES = B <= 4 ? 16 : 1 << B;
    static constexpr int NEAR = DENSE ? 16 / B : 2;  // pairs whose look-ups are shared
    static constexpr bool LATE = false;  // words of nested units are put together before the first is used
    typedef typename I::template bytes_of<ENTRIES> Table;
    Table table[CODES][SIZE];

    FDK_INLINE explicit ByteValues(const fdk_range& r) {
        unroll<0, CODES>([&](auto code) FDK_LAMBDA {
            unroll<0, SIZE>([&](auto byte) FDK_LAMBDA {
                constexpr int C = decltype(code)::value, BYTE = decltype(byte)::value + 4 - SIZE;
                uint8_t entries[ENTRIES];
                for (int i = 0; i < ENTRIES; i++) entries[i] = (uint8_t)(bits_of(r.value[i >> B * C]) >> 8 * BYTE);
                table[C][BYTE + SIZE - 4] = Table(entries);
            });
        });
    }

    template <int P>
    static constexpr int plain_place() { return !DENSE ? AT_BYTE + P % 2 : B == 8 ? AT_BYTE + P % 2 : B * (P % (16 / B)); }
    template <int P>
    static FDK_INLINE vi plain(const uint8_t* unit) {
        if constexpr (DENSE) return I::load(unit + 64 * (P / (16 / B)));
        else return I::template transpose<0>(pair_codes<I, B, P & ~1>(unit), pair_codes<I, B, P | 1>(unit));
    }
    template <int P>
    static constexpr int nested_place() {
        return B <= 2 ? 2 * (P % 8) : B <= 4 ? P % 8 / 2 * 4 : AT_BYTE + P % 8 / 4;
    }
    template <int P, class Fields>
    static FDK_INLINE vi nested(const Fields& fields) {
        constexpr int half = P / 8, f = P % 8;
        return fields.word[B <= 2 ? half : B <= 4 ? 2 * half + f % 2 : 4 * half + 2 * (f % 2) + f / 2 % 2];
    }

    // Byte by byte, the values of the codes at PLACE.
    template <int PLACE>
    FDK_INLINE void look_up(vi word, vi (&found)[SIZE]) const {
        constexpr bool nibbles = PLACE < AT_BYTE;
        constexpr int HIGH = nibbles ? PLACE / 8 : PLACE - AT_BYTE, C = nibbles ? PLACE % 4 / B : 0;
        constexpr uint32_t mask = ENTRIES - 1;
        vi index = word;
        if constexpr (nibbles && PLACE / 4 % 2) index = I::upper_nibbles(word);
        else if constexpr (mask < 255) index = I::and_mask(word, mask * 0x01010101u);
        vi bytes[SIZE];
        unroll<0, SIZE>([&](auto i) FDK_LAMBDA { bytes[decltype(i)::value] = table[C][decltype(i)::value].at(index); });
        unroll<0, SIZE / 2>([&](auto i) FDK_LAMBDA {
            constexpr int J = 2 * decltype(i)::value;
            found[J / 2] = I::template transpose<HIGH>(bytes[J], bytes[J + 1]);
        });
    }
    // Both values of a pair in the halves of a word.
    template <int PLACE>
    FDK_INLINE vi at(vi word) const {
        vi found[SIZE];
        look_up<PLACE>(word, found);
        return found[0];
    }
    template <int PLACE>
    FDK_INLINE void pair(vi word, vf& even, vf& odd) const {
        vi found[SIZE];
        look_up<PLACE>(word, found);
        if constexpr (SIZE == 2) {
            even = I::as_floats(I::template shl<16>(found[0]));
            odd = I::as_floats(I::and_mask(found[0], 0xffff0000u));
        } else {
            even = I::as_floats(I::template transpose_halves<0>(found[0], found[1]));
            odd = I::as_floats(I::template transpose_halves<1>(found[0], found[1]));
        }
    }
};

}  // namespace
