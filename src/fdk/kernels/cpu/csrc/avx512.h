// Traits and kernels that both AVX-512 units share. Included after kernels.h; internal linkage like everything there.
#pragma once
#include <immintrin.h>

#include "kernels.h"
#include "nibbles.h"

namespace {

struct Avx512 {
    static constexpr int W = 16;
    typedef __m512 vf;
    typedef __m512i vi;

    // A line of codes is loaded once: GCC would fold the load into every shift of it, and a 64-byte load takes a cycle.
    static FDK_INLINE vi load(const uint8_t* p) {
        vi line = _mm512_loadu_si512(p);
        __asm__("" : "+v"(line));
        return line;
    }
    template <int S>
    static FDK_INLINE vi shr(vi v) {
        if constexpr (S == 0) return v;
        else return _mm512_srli_epi32(v, S);
    }
    template <int S>
    static FDK_INLINE vi shl(vi v) { return _mm512_slli_epi32(v, S); }
    static FDK_INLINE vi pick(vi a, vi b, uint32_t m) {
        return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi32((int)m), 0xd8);
    }
    static FDK_INLINE vi zero_words() { return _mm512_setzero_si512(); }
    static FDK_INLINE vi and_mask(vi v, uint32_t m) { return _mm512_and_si512(v, _mm512_set1_epi32((int)m)); }
    static FDK_INLINE vi or_and(vi a, vi b, uint32_t m) {
        return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi32((int)m), 0xf8);
    }

    // 2^B entries of 16 bits by the low B bits of every 16-bit half.
    template <int B>
    struct Words {
        static constexpr int N = B <= 5 ? 1 : 1 << (B - 5);
        vi t[N];
        FDK_INLINE explicit Words(const uint16_t* table) {
            for (int i = 0; i < N; i++) t[i] = _mm512_loadu_si512(table + 32 * i);
        }
        FDK_INLINE vi get(vi index) const {
            if constexpr (B <= 5) {
                return _mm512_permutexvar_epi16(index, t[0]);
            } else if constexpr (B == 6) {
                return _mm512_permutex2var_epi16(t[0], index, t[1]);
            } else if constexpr (B == 7) {
                const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(0x40));
                return _mm512_mask_mov_epi16(_mm512_permutex2var_epi16(t[0], index, t[1]), upper,
                                             _mm512_permutex2var_epi16(t[2], index, t[3]));
            } else {
                const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(0x40));
                const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(0x80));
                const vi low = _mm512_mask_mov_epi16(_mm512_permutex2var_epi16(t[0], index, t[1]), bit6,
                                                     _mm512_permutex2var_epi16(t[2], index, t[3]));
                const vi high = _mm512_mask_mov_epi16(_mm512_permutex2var_epi16(t[4], index, t[5]), bit6,
                                                      _mm512_permutex2var_epi16(t[6], index, t[7]));
                return _mm512_mask_mov_epi16(low, bit7, high);
            }
        }
    };

    // Up to 5 bits one or two registers hold the float32 table; above, its upper and lower halves are looked up
    // for both k of a pair at once, which takes half the registers.
    template <int B, bool SMALL = B <= 5>
    struct Values : Halves<Avx512, B> {
        vf t[B <= 4 ? 1 : 2];
        FDK_INLINE explicit Values(const fdk_range& r) {
            for (int i = 0; i < (B <= 4 ? 1 : 2); i++) t[i] = _mm512_loadu_ps(r.value + 16 * i);
        }
        FDK_INLINE vf get(vi index) const {
            if constexpr (B <= 4) return _mm512_permutexvar_ps(index, t[0]);
            else return _mm512_permutex2var_ps(t[0], index, t[1]);
        }
        template <int>
        FDK_INLINE void pair(vi codes, vf& even, vf& odd) const {
            even = get(codes);
            odd = get(shr<16>(codes));
        }
    };
    template <int B>
    struct Values<B, false> : Halves<Avx512, B> {
        Words<B> high, low;
        FDK_INLINE explicit Values(const fdk_range& r) : high(r.value_high), low(r.value_low) {}
        template <int>
        FDK_INLINE void pair(vi codes, vf& even, vf& odd) const {
            const vi h = high.get(codes), l = low.get(codes);
            even = _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaau, l, _mm512_slli_epi32(h, 16)));
            odd = _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaau, shr<16>(l), h));
        }
    };

    static FDK_INLINE vf zero() { return _mm512_setzero_ps(); }
    static FDK_INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
    static FDK_INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
    static FDK_INLINE vf sub_scalar(vf a, float b) { return _mm512_sub_ps(a, _mm512_set1_ps(b)); }
    static FDK_INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
    static FDK_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
    static FDK_INLINE vf fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
    static FDK_INLINE vf broadcast(const void* p) { return _mm512_set1_ps(*(const float*)p); }
    template <int AT>
    static FDK_INLINE vf fma_at(vf a, const uint32_t* x, vf c) { return fma(a, broadcast(x + AT), c); }
    static FDK_INLINE void keep(float* p, vf v) { _mm512_storeu_ps(p, v); }
    static FDK_INLINE vf kept(const float* p) { return _mm512_loadu_ps(p); }
    static FDK_INLINE void keep_partial(float* p, vf v, int lanes) {
        _mm512_mask_storeu_ps(p, (__mmask16)((1u << lanes) - 1), v);
    }
    static FDK_INLINE vf widen(__m256i h, int dtype) {
        return dtype == FDK_BF16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)) : _mm512_cvtph_ps(h);
    }
    static FDK_INLINE vf floats(const uint8_t* p, int dtype) {
        if (dtype == FDK_FP32) return _mm512_loadu_ps(p);
        return widen(_mm256_loadu_si256((const __m256i*)p), dtype);
    }
    static FDK_INLINE vf floats_partial(const uint8_t* p, int dtype, int lanes) {
        const __mmask16 m = (__mmask16)((1u << lanes) - 1);
        if (dtype == FDK_FP32) return _mm512_maskz_loadu_ps(m, p);
        return widen(_mm256_maskz_loadu_epi16(m, p), dtype);
    }
    static FDK_INLINE vf bytes(const uint8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
    }
    // bf16 in the low halves. Integer rounding, because the conversion instruction flushes subnormals.
    static FDK_INLINE vi round_bf16(vf v) {
        const vi u = _mm512_castps_si512(v);
        const vi even = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        const vi r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, even), _mm512_set1_epi32(0x7fff)), 16);
        return _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    }
    static FDK_INLINE __m256i narrow(vf v, int dtype) {
        if (dtype == FDK_BF16) return _mm512_cvtepi32_epi16(round_bf16(v));
        return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    static FDK_INLINE void store(uint8_t* p, int dtype, vf v, int lanes) {
        const __mmask16 m = (__mmask16)((1u << lanes) - 1);
        if (dtype == FDK_FP32) _mm512_mask_storeu_ps(p, m, v);
        else _mm256_mask_storeu_epi16(p, m, narrow(v, dtype));
    }
    static FDK_INLINE void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
    static FDK_INLINE void prefetch_far(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

    // Tables of nibbles.h; consecutive ones add into different sums.
    static FDK_INLINE void keep_table(float* table, const vf (&sum)[1]) { _mm512_store_ps(table, sum[0]); }
    static FDK_INLINE void add_nibbles(const uint8_t* line, const float* tables, vf (&acc)[4]) {
        const vi codes = load(line);
        unroll<0, 8>([&](auto n) FDK_LAMBDA {
            constexpr int N = decltype(n)::value;
            acc[N % 4] = add(acc[N % 4], _mm512_permutexvar_ps(shr<4 * N>(codes), _mm512_load_ps(tables + 16 * N)));
        });
    }

    // 16 x 16 dwords, rows become columns.
    static FDK_INLINE void transpose(vi (&v)[16]) {
        vi t[16];
        for (int i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        for (int i = 0; i < 4; i++) {
            t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
            t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
            t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
            t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
        }
        for (int i = 0; i < 8; i++) {
            v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
            v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        }
    }

    // A unit on its way to row-major memory: 16-bit values leave as pairs, one dword per row and pair.
    struct Panel {
        vi first[16], second[16];  // float32: even and odd k
        FDK_INLINE void put(int pair, int, int dtype, vf even, vf odd) {
            if (dtype == FDK_FP32) {
                first[pair] = _mm512_castps_si512(even);
                second[pair] = _mm512_castps_si512(odd);
            } else if (dtype == FDK_BF16) {
                first[pair] = _mm512_or_si512(round_bf16(even), _mm512_slli_epi32(round_bf16(odd), 16));
            } else {
                const vi low = _mm512_cvtepu16_epi32(narrow(even, dtype)), high = _mm512_cvtepu16_epi32(narrow(odd, dtype));
                first[pair] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
            }
        }
        FDK_INLINE void write(uint8_t* out, int64_t stride, int dtype, int rows, int columns) {
            transpose(first);
            if (dtype != FDK_FP32) {
                const __mmask32 m = columns == 32 ? 0xffffffffu : (1u << columns) - 1;
                for (int r = 0; r < rows; r++) _mm512_mask_storeu_epi16(out + r * stride, m, first[r]);
                return;
            }
            transpose(second);
            const vi low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            const vi high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
            const uint32_t m = columns == 32 ? 0xffffffffu : (1u << columns) - 1;
            for (int r = 0; r < rows; r++) {
                _mm512_mask_storeu_epi32(out + r * stride, (__mmask16)m, _mm512_permutex2var_epi32(first[r], low, second[r]));
                _mm512_mask_storeu_epi32(out + r * stride + 64, (__mmask16)(m >> 16),
                                         _mm512_permutex2var_epi32(first[r], high, second[r]));
            }
        }
    };
};

typedef FloatPath<Avx512> Avx512Path;

}  // namespace
