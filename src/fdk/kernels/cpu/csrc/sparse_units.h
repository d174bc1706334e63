// 16:32 sparse weights, in bf16 more than one row of x: with AVX-512 VBMI2 the codes of two rows at a time, a byte each, are
// spread to their places among 2 x 32 by the rows' masks, and the bytes of 16 rows are transposed, so that lanes are rows as in
// plain weights. Included after avx512.h.
#pragma once
#include "sparse_rows.h"
#include "units.h"

namespace {

// A byte is 16 + code, or 0 where a weight was dropped; with zeros it is code - zero, of which the look-up takes five bits.
// The value of byte i, i from 0 to 31.
template <bool ZEROS>
float sparse_value(const fdk_range& r, int i) {
    if (ZEROS) return (float)(i < 16 ? i : i - 32);
    return i < 16 ? 0 : r.value[i - 16];
}

// Pairs of bf16, or float32 one by one.
template <bool ZEROS, int WORDS>
struct SparseValues {
    __m512i table;
    FDK_INLINE explicit SparseValues(const fdk_range& r) {
        uint16_t t[32];
        for (int i = 0; i < 32; i++) t[i] = to_bf16(sparse_value<ZEROS>(r, i));
        table = _mm512_loadu_si512(t);
    }
    template <int>
    FDK_INLINE __m512i at(__m512i codes) const { return _mm512_permutexvar_epi16(codes, table); }
};
template <bool ZEROS>
struct SparseValues<ZEROS, 2> {
    __m512 low, high;
    FDK_INLINE explicit SparseValues(const fdk_range& r) {
        float t[32];
        for (int i = 0; i < 32; i++) t[i] = sparse_value<ZEROS>(r, i);
        low = _mm512_loadu_ps(t), high = _mm512_loadu_ps(t + 16);
    }
    template <int>
    FDK_INLINE void pair(__m512i codes, __m512& even, __m512& odd) const {
        even = _mm512_permutex2var_ps(low, codes, high);
        odd = _mm512_permutex2var_ps(low, _mm512_srli_epi32(codes, 16), high);
    }
};

template <class Path, bool HAS_ZEROS>
struct SparseUnit {
    static constexpr bool ZEROS = HAS_ZEROS;
    static constexpr int LARGEST = 16;  // zero that five bits have room for; of larger ones the rest is taken off the sums

    struct Super {
        __m128i zero;
        __m512i nibble = _mm512_set1_epi8(15);
        __m512 rest;
        bool any = false;
        FDK_INLINE Super(const fdk_weight& w, const uint8_t* super) {
            if constexpr (ZEROS) {
                const __m128i all = _mm_loadu_si128((const __m128i*)(super + FDK_ROWS * w.scale_bytes));
                zero = _mm_min_epu8(all, _mm_set1_epi8(LARGEST));
                const __m128i left = _mm_sub_epi8(all, zero);
                any = !_mm_testz_si128(left, left);
                rest = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(left));
            }
        }
        FDK_INLINE bool more() const { return any; }
        FDK_INLINE __m512 zeros() const { return rest; }
        FDK_INLINE Super ones() const {
            Super s = *this;
            s.zero = _mm_set1_epi8(-1), s.nibble = _mm512_setzero_si512();
            return s;
        }
    };

    typedef SparseValues<ZEROS, Path::words_per_pair> Values;

    __m512i two[8];  // bytes of 32 columns of rows 2i and 2i + 1

    FDK_INLINE SparseUnit(const fdk_weight& w, const uint8_t* block, const Super& super, int64_t s, int64_t u, int) {
        const uint8_t* unit = block + s * w.super_bytes + FDK_ROWS * (w.scale_bytes + w.zero_bytes) + u * SPARSE_UNIT;
        unroll<0, 4>([&](auto i) FDK_LAMBDA {
            constexpr int R = 4 * decltype(i)::value;
            // Codes 2b and 2b + 1 are the nibbles of byte b: of a word of it and that word shifted by 4, one in each byte.
            const __m512i low = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(unit + 64 + 8 * R)));
            const __m512i high = _mm512_slli_epi16(low, 4);
            __m512i bytes;
            if constexpr (ZEROS) {
                const __m512i zero = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(super.zero), row_of_byte(R));
                bytes = _mm512_sub_epi8(_mm512_ternarylogic_epi32(low, high, super.nibble, 0xa8), zero);
            } else {
                bytes = _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8(16), 0xfe);
            }
            two[R / 2] = spread(unit, R, bytes);
            two[R / 2 + 1] = spread(unit, R + 2, _mm512_castsi256_si512(_mm512_extracti64x4_epi64(bytes, 1)));
        });
    }

    static FDK_INLINE __m512i row_of_byte(int row) {
        const __m512i first = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_setr_m128i(_mm_set1_epi8(0), _mm_set1_epi8(1))),
                                                 _mm256_setr_m128i(_mm_set1_epi8(2), _mm_set1_epi8(3)), 1);
        return _mm512_add_epi8(first, _mm512_set1_epi8((char)row));
    }

    // 32 bytes of two rows, where their masks have a bit.
    static FDK_INLINE __m512i spread(const uint8_t* unit, int row, __m512i bytes) {
        uint64_t kept;
        memcpy(&kept, unit + 4 * row, 8);
        return _mm512_mask_expand_epi8(SparseRows::fresh(), kept, bytes);
    }

    // Where the dwords of four rows come from, row r of them in dword r of lane d: columns 4 * (d + FIRST) and following, the
    // middle two swapped, so that a half of the dword has one of each pair.
    template <int FIRST>
    struct Places {
        alignas(64) uint8_t from[64];
        constexpr Places() : from() {
            for (int i = 0; i < 64; i++) {
                const int d = i / 16, r = i / 4 % 4, b = i % 4;
                from[i] = (uint8_t)(32 * r + 4 * (d + FIRST) + b / 2 + b % 2 * 2);
            }
        }
    };
    template <int FIRST>
    static FDK_INLINE __m512i four_columns(__m512i a, __m512i b) {
        static constexpr Places<FIRST> places;
        return _mm512_permutex2var_epi8(a, _mm512_load_si512(places.from), b);
    }
    // Columns 4J to 4J + 3 of all rows.
    template <int J>
    FDK_INLINE __m512i columns() const {
        constexpr int FIRST = J / 4 * 4, UPPER = J / 2 % 2 ? 0xee : 0x44;
        __m512i eight[2];
        unroll<0, 2>([&](auto i) FDK_LAMBDA {
            constexpr int T = 4 * decltype(i)::value;
            eight[T / 4] = _mm512_shuffle_i32x4(four_columns<FIRST>(two[T], two[T + 1]),
                                                four_columns<FIRST>(two[T + 2], two[T + 3]), UPPER);
        });
        return _mm512_shuffle_i32x4(eight[0], eight[1], J % 2 ? 0xdd : 0x88);
    }

    template <int P>
    FDK_INLINE __m512i word() const { return Avx512::shr<P % 2 * 8>(columns<P / 2>()); }
    template <int P>
    static constexpr int place() { return 0; }
    static constexpr int pair_at(int i) { return i; }

    static FDK_INLINE void fetch_ahead(const fdk_weight& w, const uint8_t* block, int64_t s, int64_t u) {
        const uint8_t* unit = block + s * w.super_bytes + FDK_ROWS * (w.scale_bytes + w.zero_bytes) + u * SPARSE_UNIT;
        ::fetch_ahead<Avx512, 3>(unit);
    }
};

// As Panels::expand.
template <class Path, bool ZEROS>
void expand_sparse_units(const fdk_weight& w, const fdk_range& range, const uint8_t* super, int64_t supers, uint32_t* panel) {
    typedef SparseUnit<Path, ZEROS> Unit;
    for (int64_t s = 0; ZEROS && s < supers; s++)
        if (typename Unit::Super(w, super + s * w.super_bytes).more())
            return expand_sparse<Path>(w, range, super, supers, panel);
    expand_units<Path, Unit>(w, range, super, supers, panel);
}

// Tiles of the widths WIDTHS decode for themselves.
template <class Path, bool ZEROS, int... WIDTHS>
void sparse_tiles(const fdk_job& job, int64_t block0, int64_t block1, void* workspace) {
    DirectFn direct[FDK_PANEL_WIDTH + 1] = {};
    ((direct[WIDTHS] = {UnitBlock<Path, SparseUnit<Path, ZEROS>, WIDTHS, false>::run, write_totals<Avx512, WIDTHS>}), ...);
    run_direct(job, block0, block1, workspace, direct);
}

// One row in bf16 goes its own way; tiles of the widths WIDTHS decode for themselves, others go through panels.
template <class Path, int... WIDTHS>
void sparse_units_linear(const fdk_job& job, int64_t block0, int64_t block1, void* workspace,
                        const typename Panels<Path>::Tile* tiles) {
    const bool zeros = job.w->zero_bytes != 0;
    if (job.plan->algorithm == FDK_SPARSE_ROWS)
        return (zeros ? SparseRows::run_one<true> : SparseRows::run_one<false>)(job, block0, block1);
    if (job.plan->algorithm == FDK_PANELS) {
        static const typename Panels<Path>::ExpandFn by_zeros[2][9] = {
            {nullptr, nullptr, nullptr, nullptr, expand_sparse_units<Path, false>},
            {nullptr, nullptr, nullptr, nullptr, expand_sparse_units<Path, true>}};
        return run_panels<Path>(job, block0, block1, workspace, tiles, by_zeros[zeros]);
    }
    (zeros ? sparse_tiles<Path, true, WIDTHS...> : sparse_tiles<Path, false, WIDTHS...>)(job, block0, block1, workspace);
}

}  // namespace
