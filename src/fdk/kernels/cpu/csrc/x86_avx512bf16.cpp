// AVX-512 with BF16: bf16 activations are multiplied as they are, in pairs, by vdpbf16ps.
#include "avx512.h"
#include "scaled_panels.h"
#include "sparse_units.h"

namespace {

// Bf16 path: activations x :: [k / 2][M] pairs of bf16; one instruction multiplies and adds both k of a pair, exactly
// but for the float32 rounding of the sums.
struct DotPath : PlainPath {
    typedef Avx512 I;
    static constexpr int words_per_pair = 1;
    // A look-up reads 5 bits of an index, with two registers 6: enough for several narrow codes. One table for each
    // place of a code among them saves the shifts, which compete with look-ups for the same ports.
    template <int B, bool WIDE = (B > 6)>
    struct Values : Avx512::Words<B>, Halves<Avx512, B, B == 1 ? 5 : B <= 3 ? 2 : 1> {
        using Halves<Avx512, B, B == 1 ? 5 : B <= 3 ? 2 : 1>::SHARE;
        static constexpr int REGISTERS = B == 3 ? 2 : 1;
        __m512i placed[SHARE][REGISTERS];
        FDK_INLINE explicit Values(const fdk_range& r) : Avx512::Words<B>(r.value_bf16) {
            uint16_t count[64];
            for (int i = 0; i < 64; i++) count[i] = (uint16_t)i;
            unroll<1, SHARE>([&](auto place) FDK_LAMBDA {
                for (int i = 0; i < REGISTERS; i++)
                    placed[decltype(place)::value][i] = _mm512_permutexvar_epi16(
                        _mm512_srli_epi16(_mm512_loadu_si512(count + 32 * i), B * decltype(place)::value), this->t[0]);
            });
        }
        template <int PLACE>
        FDK_INLINE __m512i at(__m512i codes) const {
            if constexpr (PLACE == 0) return this->get(codes);
            else if constexpr (REGISTERS == 1) return _mm512_permutexvar_epi16(codes, placed[PLACE][0]);
            else return _mm512_permutex2var_epi16(placed[PLACE][0], codes, placed[PLACE][1]);
        }
    };
    // 7 and 8 bits: the bytes of all four codes of a dword are looked up at once, upper and lower bytes of the values
    // apart. The compiler shares this between the two pairs of a word.
    template <int B>
    struct Values<B, true> : Halves<Avx512, B, 2> {
        static constexpr int N = 1 << (B - 6);
        __m512i upper[N], lower[N];
        FDK_INLINE explicit Values(const fdk_range& r) {
            uint8_t byte[2][64 * N];
            for (int i = 0; i < 64 * N; i++) byte[0][i] = (uint8_t)r.value_bf16[i], byte[1][i] = (uint8_t)(r.value_bf16[i] >> 8);
            for (int i = 0; i < N; i++) {
                lower[i] = _mm512_loadu_si512(byte[0] + 64 * i);
                upper[i] = _mm512_loadu_si512(byte[1] + 64 * i);
            }
        }
        static FDK_INLINE __m512i bytes_at(const __m512i (&t)[N], __m512i index) {
            const __m512i low = _mm512_permutex2var_epi8(t[0], index, t[1]);
            if constexpr (B == 7) return low;
            else return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, _mm512_permutex2var_epi8(t[2], index, t[3]));
        }
        // PLACE: 0 and 1 the codes of a word of plain weights, + 2 where each has a byte of its own.
        template <int PLACE>
        FDK_INLINE __m512i at(__m512i codes) const {
            const __m512i low_bytes = _mm512_set1_epi16(0x00ff);
            if constexpr (B == 7 && PLACE < 2)  // the second code moves up to the second byte
                codes = _mm512_ternarylogic_epi32(low_bytes, codes, _mm512_slli_epi16(codes, 1), 0xca);
            const __m512i h = bytes_at(upper, codes), l = bytes_at(lower, codes);
            if constexpr (PLACE % 2 == 0) return _mm512_ternarylogic_epi32(low_bytes, l, _mm512_slli_epi16(h, 8), 0xca);
            else return _mm512_ternarylogic_epi32(low_bytes, _mm512_srli_epi16(l, 8), h, 0xca);
        }
    };

    template <int M, int P, int PLACE, class Values>
    static FDK_INLINE void step(const Values& values, __m512i codes, const uint32_t* x, __m512* acc) {
        __m512i looked_up = values.template at<PLACE>(codes);
        // Keeps GCC 12 from mixing the chains of neighbouring pairs, which costs it register copies.
        __asm__("" : "+v"(looked_up));
        const __m512bh value = (__m512bh)looked_up;
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            acc[c] = _mm512_dpbf16_ps(acc[c], value, (__m512bh)_mm512_set1_epi32((int)x[P * M + c]));
        });
    }

    template <int PLACE, class Values>
    static FDK_INLINE void expand(const Values& values, __m512i codes, uint32_t* panel) {
        _mm512_storeu_si512(panel, values.template at<PLACE>(codes));
    }

    // Pairs of (value - zero) * scale, rounded to nearest.
    template <int PLACE, class Values>
    static FDK_INLINE void expand_scaled(const Values& values, __m512i codes, __m512 scale, __m512 zero, uint32_t* panel) {
        const __m512i pair = values.template at<PLACE>(codes);
        __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
        __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000)));
        even = _mm512_mul_ps(_mm512_sub_ps(even, zero), scale), odd = _mm512_mul_ps(_mm512_sub_ps(odd, zero), scale);
        const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                                    23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        _mm512_storeu_si512(panel, _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
    }

    // T panels, `apart` words from each other.
    template <int T, int M>
    static FDK_INLINE void multiply_panels(const uint32_t* panel, int64_t apart, const uint32_t* x, __m512 (&acc)[M][T]) {
        __m512bh value[T];
        unroll<0, T>([&](auto t) FDK_LAMBDA {
            value[decltype(t)::value] = (__m512bh)_mm512_loadu_si512(panel + decltype(t)::value * apart);
        });
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            const __m512bh xs = (__m512bh)_mm512_set1_epi32((int)x[c]);
            unroll<0, T>([&](auto t) FDK_LAMBDA {
                acc[c][decltype(t)::value] = _mm512_dpbf16_ps(acc[c][decltype(t)::value], value[decltype(t)::value], xs);
            });
        });
    }

    template <int T, int M, int P>
    static FDK_INLINE void multiply(const uint32_t* panel, const uint32_t* x, __m512* acc) {
        const __m512bh value = (__m512bh)_mm512_loadu_si512(panel + P * FDK_ROWS);
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            acc[c] = _mm512_dpbf16_ps(acc[c], value, (__m512bh)_mm512_set1_epi32((int)x[P * M + c]));
        });
    }
};

#define DOT(M, SPLIT) FDK_BY_BITS(DotPath, M, SPLIT)

// Other sparse weights take this unit's instructions too, unless a zero may be any float.
bool sparse_floats(const fdk_weight& w) {
    return w.storage == FDK_SPARSE && !w.bf16_exact && w.family != FDK_UINT_FLOAT;
}

void linear(const fdk_job* job, int64_t block0, int64_t block1, void* workspace) {
    if (sparse_floats(*job->w)) {
        static const Panels<Avx512Path>::Tile tiles[13] = FDK_PANEL_TILES(Avx512Path);
        return sparse_units_linear<Avx512Path, 1, 2, 4, 6, 8>(*job, block0, block1, workspace, tiles);
    }
    if (!job->w->bf16_exact) return fdk_ops_avx512()->linear(job, block0, block1, workspace);
    static const BlockFn by_width[13][2][9] = {
        {{nullptr}, {nullptr}},     {DOT(1, false), DOT(1, true)}, {DOT(2, false), {nullptr}},
        {DOT(3, false), {nullptr}}, {DOT(4, false), {nullptr}},    {DOT(5, false), {nullptr}},
        {DOT(6, false), {nullptr}}, {DOT(7, false), {nullptr}},    {DOT(8, false), {nullptr}},
        {{nullptr}, {nullptr}},     {{nullptr}, {nullptr}},        {{nullptr}, {nullptr}},
        {DOT(12, false), {nullptr}},
    };
    static const Panels<DotPath>::Tile tiles[13] = FDK_PANEL_TILES(DotPath);
    if (job->w->storage == FDK_SPARSE)
        return sparse_units_linear<DotPath, 2, 3, 4, 5, 6, 7, 8>(*job, block0, block1, workspace, tiles);
    if (job->w->storage == FDK_NESTED_PLANES)
        return nested_linear<DotPath, 1, 2, 3, 4, 5, 6, 7, 8>(*job, block0, block1, workspace, tiles);
    if (job->plan->algorithm == FDK_SCALED_PANELS) {
        static const ScaledPanels<DotPath>::Tile scaled[13] = {
            {}, FDK_SCALED_TILE(DotPath, 1), FDK_SCALED_TILE(DotPath, 2), FDK_SCALED_TILE(DotPath, 3),
            FDK_SCALED_TILE(DotPath, 4), FDK_SCALED_TILE(DotPath, 5), FDK_SCALED_TILE(DotPath, 6),
            FDK_SCALED_TILE(DotPath, 7), FDK_SCALED_TILE(DotPath, 8), {}, {}, {}, FDK_SCALED_TILE(DotPath, 12)};
        return ScaledPanels<DotPath>::run(*job, block0, block1, workspace, scaled);
    }
    if (job->plan->algorithm == FDK_PANELS) return run_panels<DotPath>(*job, block0, block1, workspace, tiles);
    if (job->plan->algorithm == FDK_NIBBLES) return Nibbles<Avx512, 1>::run(*job, block0, block1, (float*)workspace);
    DirectFn direct[13];
    for (int i = 0; i < 13; i++) direct[i] = DirectFn{by_width[i][job->w->split][job->w->bits], tiles[i].write};
    run_direct(*job, block0, block1, workspace, direct);
}

void plan(const fdk_weight* w, int64_t m, fdk_plan* plan) {
    if (sparse_floats(*w) && m <= 8) {
        const int32_t width = (int32_t)(m <= 2 ? m : m + m % 2);
        *plan = fdk_plan{m, 0, 1, width, width, FDK_DIRECT, 0};
        return;
    }
    if (!w->bf16_exact) return fdk_ops_avx512()->plan(w, m, plan);
    // Up to 6 bits (two table registers) decoding hides behind the multiplications of a tile; above that it pays to
    // decode once into a panel. Measured on Zen 4 with m = 16, 32, 64, 256. Planes and sparse codes take more to decode:
    // measured there with m = 8, 9, 12, 16, 24.
    const bool plain = w->storage == FDK_PLAIN;
    const int64_t of_plain = w->bits <= 6 ? m : 32, of_others = w->storage == FDK_NESTED_PLANES && w->bits <= 5 ? 16 : 8;
    const int64_t direct = w->split ? 1 : plain ? of_plain : of_others;
    *plan = fdk_plan{1, 0, 1, 1, 1, m == 1 && w->storage == FDK_SPARSE ? FDK_SPARSE_ROWS : FDK_DIRECT, 1};
    if (m == 1 && Nibbles<Avx512, 1>::plan(*w, plan)) return;
    if (plain && m > FDK_EXACT_ROWS) {
        plan_panels<DotPath>(*w, m, 12, plan);
        if (plan->rows > FDK_EXACT_ROWS) plan->algorithm = FDK_SCALED_PANELS;
        if (plan->algorithm == FDK_SCALED_PANELS || m > direct) return;
    }
    if (m > direct) return plan_panels<DotPath>(*w, m, 12, plan);
    plan->rows = rows_of_chunk(m, 32 * 12);
    if (plain) cut_unevenly(12, plan);
    else cut_evenly(8, plan);
    plan_direct(plan);
}

void pack(const fdk_weight* w, const fdk_plan* plan, const void* x, const fdk_tile* tile) {
    if (!plan->bf16_pairs || !tile->x) return fdk_ops_avx512()->pack(w, plan, x, tile);
    pack_bf16_pairs<Avx512>(*w, (const uint16_t*)x, *tile);
}

void dequantise(const fdk_weight* w, void* out, int64_t block0, int64_t block1) {
    if (SparseRows::serves(*w)) return SparseRows::dequantise(*w, out, block0, block1);
    dequantise_any<Avx512>(w, out, block0, block1);
}

int64_t multiply(int32_t dtype, int64_t steps, float* sink) {
    return dtype == FDK_BF16 ? multiply_chains<DotPath>(steps, sink) : multiply_chains<Avx512Path>(steps, sink);
}

const fdk_ops ops = {plan, pack, linear, dequantise, read_lines<Avx512>, multiply};

}  // namespace

const fdk_ops* fdk_ops_avx512bf16(void) { return &ops; }
