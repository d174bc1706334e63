// 16:32 sparse weights, bf16, one row of x: a vector is a stretch of one row of W, and x is read as it lies. With AVX-512
// VBMI2 one instruction closes up the 16 activations that meet a row's kept values, so that the product takes half a vector,
// or spreads the values to their places among 32, which `dequantise` wants. Included after avx512.h.
#pragma once
#include "sparse.h"

namespace {

struct SparseRows {
    // bf16 values of the kept codes of a row.
    static FDK_INLINE __m256i values(const uint8_t* codes, __m256i table) {
        const __m256i shifts = _mm256_setr_epi64x(0x000c000800040000, 0x001c001800140010, 0x002c002800240020,
                                                  0x003c003800340030);
        const __m256i all = _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i*)codes));
        return _mm256_permutexvar_epi16(_mm256_multishift_epi64_epi8(shifts, all), table);
    }

    // Zero that depends on nothing: Zen 4 makes an expansion or compression wait for the register that it writes, even
    // where the mask clears it, and compilers reuse registers.
    static FDK_INLINE __m512i fresh() {
        __m512i zero;
        __asm__ volatile("vpxord %0, %0, %0" : "=v"(zero));
        return zero;
    }
    static FDK_INLINE __m512bh spread(__mmask32 m, __m256i v) {
        return (__m512bh)_mm512_mask_expand_epi16(fresh(), m, _mm512_castsi256_si512(v));
    }
    static FDK_INLINE __m256bh closed_up(__mmask32 m, __m512i x) {
        return (__m256bh)_mm512_castsi512_si256(_mm512_mask_compress_epi16(fresh(), m, x));
    }

    static FDK_INLINE __mmask32 mask(const uint8_t* unit, int row) {
        uint32_t m;
        memcpy(&m, unit + 4 * row, 4);
        return m;
    }

    // One row of x; totals :: [16 rows][8 lanes].
    template <bool ZEROS>
    static FDK_INLINE void block(const Call& call, float (*totals)[8]) {
        constexpr int R = ZEROS ? 8 : 16;  // rows at a time, as accumulators allow
        const fdk_weight& w = *call.w;
        const __m256i table = _mm256_loadu_si256((const __m256i*)call.range->value_bf16);
        const __m256bh ones = (__m256bh)_mm256_set1_epi16(0x3f80);
        const int64_t scales_size = FDK_ROWS * w.scale_bytes, zeros_size = FDK_ROWS * w.zero_bytes;
        const uint8_t *super = call.block, *x = (const uint8_t*)call.tile->x;
        for (int64_t s = 0; s < w.supers; s++, super += w.super_bytes, x += w.units * FDK_UNIT * 2) {
            float scale[16], zero[16];
            _mm512_storeu_ps(scale, Avx512::floats(super, w.dtype));
            if (ZEROS) _mm512_storeu_ps(zero, zeros_of<Avx512>(w, super + scales_size, 0));
            for (int row = 0; row < 16; row += R) {
                __m256 acc[R], kept[ZEROS ? R : 1];
                for (int i = 0; i < R; i++) acc[i] = _mm256_setzero_ps();
                for (int i = 0; i < (ZEROS ? R : 1); i++) kept[i] = _mm256_setzero_ps();
                const uint8_t* unit = super + scales_size + zeros_size;
                for (int64_t u = 0; u < w.units; u++, unit += SPARSE_UNIT) {
                    const __m512i xv = _mm512_loadu_si512(x + u * FDK_UNIT * 2);
                    if (row == 0)
                        for (int line = 0; line < 3; line++) _mm_prefetch((const char*)unit + 64 * line + 2048, _MM_HINT_T0);
                    unroll<0, R>([&](auto i) FDK_LAMBDA {
                        constexpr int I = decltype(i)::value;
                        const __m256bh meets = closed_up(mask(unit, row + I), xv);
                        acc[I] = _mm256_dpbf16_ps(acc[I], (__m256bh)values(unit + 64 + 8 * (row + I), table), meets);
                        if constexpr (ZEROS) kept[I] = _mm256_dpbf16_ps(kept[I], ones, meets);
                    });
                }
                unroll<0, R>([&](auto i) FDK_LAMBDA {
                    constexpr int I = decltype(i)::value;
                    const int r = row + I;
                    if constexpr (ZEROS) acc[I] = _mm256_fnmadd_ps(_mm256_set1_ps(zero[r]), kept[I], acc[I]);
                    const __m256 total = _mm256_load_ps(totals[r]);
                    _mm256_store_ps(totals[r], _mm256_fmadd_ps(acc[I], _mm256_broadcast_ss(scale + r), total));
                });
            }
        }
    }

    // The sums over lanes of 16 vectors, one in each lane.
    static FDK_INLINE __m512 sums(__m512i (&lanes)[16]) {
        Avx512::transpose(lanes);
        __m512 sum[16];
        for (int i = 0; i < 16; i++) sum[i] = _mm512_castsi512_ps(lanes[i]);
        for (int step = 8; step; step /= 2)
            for (int i = 0; i < step; i++) sum[i] = _mm512_add_ps(sum[i], sum[i + step]);
        return sum[0];
    }

    template <bool ZEROS>
    static void run_one(const fdk_job& job, int64_t block0, int64_t block1) {
        for_blocks(job, block0, block1, [&](Call& call) {
            set_tile(call, job, 0);
            alignas(32) float totals[16][8];
            memset(totals, 0, sizeof totals);
            block<ZEROS>(call, totals);
            __m512i lanes[16];
            for (int r = 0; r < 16; r++)
                lanes[r] = _mm512_zextsi256_si512(_mm256_castps_si256(_mm256_load_ps(totals[r])));
            const __m512 y = sums(lanes);
            finish<Avx512, 1>(call, &y);
        });
    }

    // 32 values of a row in order, bf16, zeros taken off; for dtype bf16 with integer zeros, which makes them exact.
    template <bool ZEROS>
    static FDK_INLINE __m512i unit_values(const uint8_t* unit, int row, __m256i table, __m512 zero) {
        const __mmask32 m = mask(unit, row);
        const __m512i v = (__m512i)spread(m, values(unit + 64 + 8 * row, table));
        if constexpr (!ZEROS) return v;
        const __m512i low = _mm512_castps_si512(_mm512_sub_ps(even(v), zero));
        const __m512i high = _mm512_castps_si512(_mm512_sub_ps(odd(v), zero));
        return _mm512_maskz_mov_epi16(m, _mm512_mask_mov_epi16(_mm512_srli_epi32(low, 16), 0xaaaaaaaau, high));
    }
    static FDK_INLINE __m512 even(__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
    static FDK_INLINE __m512 odd(__m512i v) {
        return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000u)));
    }

    template <bool ZEROS>
    static void rows(const fdk_weight& w, uint8_t* out, int64_t block0, int64_t block1) {
        for (int64_t b = block0; b < block1; b++) {
            const fdk_range* range = range_of(w, b);
            const __m256i table = _mm256_loadu_si256((const __m256i*)range->value_bf16);
            const int64_t left = range->row1 - range->row0 - (b - range->block0) * FDK_ROWS;
            const int count = left < FDK_ROWS ? (int)left : (int)FDK_ROWS;
            const uint8_t* super = w.data + b * w.block_bytes;
            for (int64_t s = 0; s < w.supers; s++, super += w.super_bytes) {
                const uint8_t *zeros = super + FDK_ROWS * w.scale_bytes, *units = zeros + FDK_ROWS * w.zero_bytes;
                for (int r = 0; r < count; r++) {
                    const __m512 scale = _mm512_set1_ps(load_float(super, r, w.dtype));
                    const __m512 zero = _mm512_set1_ps(zero_of(w, zeros, r));
                    for (int64_t u = 0; u < w.units; u++) {
                        const __m512i v = unit_values<ZEROS>(units + u * SPARSE_UNIT, r, table, zero);
                        const __m512i low = Avx512::round_bf16(_mm512_mul_ps(even(v), scale));
                        const __m512i high = Avx512::round_bf16(_mm512_mul_ps(odd(v), scale));
                        _mm512_storeu_si512(out + (r * w.k + (s * w.units + u) * FDK_UNIT) * 2,
                                            _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
                    }
                }
            }
            out += count * w.k * 2;
        }
    }

    // Weights whose values these functions hold exactly.
    static bool serves(const fdk_weight& w) { return w.storage == FDK_SPARSE && w.bf16_exact; }

    static void dequantise(const fdk_weight& w, void* out, int64_t block0, int64_t block1) {
        (w.zero_bytes ? rows<true> : rows<false>)(w, (uint8_t*)out, block0, block1);
    }
};

}  // namespace
