// 16:32 sparse weights, bf16: a vector is a stretch of one row of W, and x is read as it lies. With AVX-512 VBMI2 one
// instruction spreads a row's 16 kept values to their places among 32, or closes up the 16 activations that meet them,
// which is cheaper for one row of x: the product then takes half a vector. Included after avx512.h and sparse.h.
#pragma once
#include "sparse.h"

namespace {

struct SparseRows {
    static constexpr int MOST = 4;  // rows of x at a time
    static constexpr int FEW = 8;   // more rows are multiplied through panels, whose transposition takes as long as six

    static void plan(int64_t m, fdk_plan* plan) {
        const int32_t rows = m < MOST ? (int32_t)m : MOST;
        const int32_t width = rows <= 2 ? rows : MOST;
        *plan = fdk_plan{rows, 0, 1, width, width, FDK_SPARSE_ROWS, 1};
    }

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

    // M rows of x; totals :: [16 rows][M][16 lanes].
    template <int M, bool ZEROS>
    static FDK_INLINE void block(const Call& call, float (*totals)[M][16]) {
        constexpr int R = (ZEROS ? 8 : 16) / M;
        const fdk_weight& w = *call.w;
        const __m256i table = _mm256_loadu_si256((const __m256i*)call.range->value_bf16);
        const __m512i ones = _mm512_set1_epi16(0x3f80);
        const int64_t scales_size = FDK_ROWS * w.scale_bytes, zeros_size = FDK_ROWS * w.zero_bytes;
        const uint8_t *super = call.block, *row_of_x[M];
        // A tile that is wider than its rows reads the last one again.
        for (int c = 0; c < M; c++)
            row_of_x[c] = (const uint8_t*)call.tile->x + (c < call.tile->rows ? c : call.tile->rows - 1) * w.k * 2;
        for (int64_t s = 0; s < w.supers; s++, super += w.super_bytes) {
            float scale[16], zero[16];
            _mm512_storeu_ps(scale, Avx512::floats(super, w.dtype));
            if (ZEROS) _mm512_storeu_ps(zero, zeros_of<Avx512>(w, super + scales_size, 0));
            for (int row = 0; row < 16; row += R) {
                __m512 acc[R * M], kept[ZEROS ? R * M : 1];
                for (int i = 0; i < R * M; i++) acc[i] = _mm512_setzero_ps();
                for (int i = 0; i < (ZEROS ? R * M : 1); i++) kept[i] = _mm512_setzero_ps();
                const uint8_t* unit = super + scales_size + zeros_size;
                for (int64_t u = 0; u < w.units; u++, unit += SPARSE_UNIT) {
                    const int64_t at = (s * w.units + u) * FDK_UNIT * 2;
                    if (row == 0)
                        for (int line = 0; line < 3; line++) _mm_prefetch((const char*)unit + 64 * line + 2048, _MM_HINT_T0);
                    unroll<0, R>([&](auto i) FDK_LAMBDA {
                        constexpr int I = decltype(i)::value;
                        const __mmask32 m = mask(unit, row + I);
                        const __m512bh v = spread(m, values(unit + 64 + 8 * (row + I), table));
                        const __m512bh one = (__m512bh)_mm512_maskz_mov_epi16(m, ones);
                        unroll<0, M>([&](auto c) FDK_LAMBDA {
                            constexpr int C = decltype(c)::value;
                            const __m512bh xv = (__m512bh)_mm512_loadu_si512(row_of_x[C] + at);
                            acc[I * M + C] = _mm512_dpbf16_ps(acc[I * M + C], v, xv);
                            if constexpr (ZEROS) kept[I * M + C] = _mm512_dpbf16_ps(kept[I * M + C], one, xv);
                        });
                    });
                }
                unroll<0, R * M>([&](auto i) FDK_LAMBDA {
                    constexpr int I = decltype(i)::value;
                    const int r = row + I / M;
                    if constexpr (ZEROS) acc[I] = _mm512_fnmadd_ps(_mm512_set1_ps(zero[r]), kept[I], acc[I]);
                    float* total = totals[r][I % M];
                    _mm512_store_ps(total, _mm512_fmadd_ps(acc[I], _mm512_set1_ps(scale[r]), _mm512_load_ps(total)));
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

    template <int M, bool ZEROS>
    static void run(const fdk_job& job, int64_t block0, int64_t block1) {
        for_blocks(job, block0, block1, [&](Call& call) {
            set_tile(call, job, 0);
            alignas(64) float totals[16][M][16];
            memset(totals, 0, sizeof totals);
            block<M, ZEROS>(call, totals);
            __m512 y[M];
            for (int c = 0; c < M; c++) {
                __m512i lanes[16];
                for (int r = 0; r < 16; r++) lanes[r] = _mm512_load_si512(totals[r][c]);
                y[c] = sums(lanes);
            }
            finish<Avx512, M>(call, y);
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

    // As Panels::expand for the bf16 dot: a row of 16 pairs is a line, so 16 rows are a unit of the panel, transposed.
    template <bool ZEROS>
    static void expand(const fdk_weight& w, const fdk_range& range, const uint8_t* super, int64_t supers, uint32_t* panel) {
        const __m256i table = _mm256_loadu_si256((const __m256i*)range.value_bf16);
        for (int64_t s = 0; s < supers; s++, super += w.super_bytes) {
            float zero[16] = {0};
            const uint8_t *zeros = super + FDK_ROWS * w.scale_bytes, *unit = zeros + FDK_ROWS * w.zero_bytes;
            if (ZEROS) _mm512_storeu_ps(zero, zeros_of<Avx512>(w, zeros, 0));
            for (int64_t u = 0; u < w.units; u++, unit += SPARSE_UNIT, panel += 16 * FDK_ROWS) {
                __m512i lines[16];
                unroll<0, 16>([&](auto i) FDK_LAMBDA {
                    constexpr int I = decltype(i)::value;
                    lines[I] = unit_values<ZEROS>(unit, I, table, _mm512_set1_ps(zero[I]));
                });
                Avx512::transpose(lines);
                for (int i = 0; i < 16; i++) _mm512_storeu_si512(panel + 16 * i, lines[i]);
            }
        }
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

    template <class Path>
    static void linear(const fdk_job& job, int64_t block0, int64_t block1, void* workspace,
                       const typename Panels<Path>::Tile* tiles) {
        static void (*const by_rows[2][MOST + 1])(const fdk_job&, int64_t, int64_t) = {
            {nullptr, run_one<false>, run<2, false>, nullptr, run<4, false>},
            {nullptr, run_one<true>, run<2, true>, nullptr, run<4, true>}};
        static const typename Panels<Path>::ExpandFn by_zeros[2][9] = {
            {nullptr, nullptr, nullptr, nullptr, expand<false>}, {nullptr, nullptr, nullptr, nullptr, expand<true>}};
        const bool zeros = job.w->zero_bytes != 0;
        if (job.plan->algorithm == FDK_PANELS)
            return run_panels<Path>(job, block0, block1, workspace, tiles, by_zeros[zeros]);
        by_rows[zeros][job.plan->width](job, block0, block1);
    }
};

}  // namespace
