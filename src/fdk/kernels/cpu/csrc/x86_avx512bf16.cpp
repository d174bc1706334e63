// AVX-512 with BF16: bf16 activations are multiplied as they are, in pairs, by vdpbf16ps.
#include "avx512.h"

namespace {

// Bf16 path: activations x :: [k / 2][M] pairs of bf16; one instruction multiplies and adds both k of a pair, exactly
// but for the float32 rounding of the sums.
struct DotPath {
    typedef Avx512 I;
    static constexpr int words_per_pair = 1;
    // A look-up reads 5 bits of an index, with two registers 6: enough for several narrow codes. One table for each
    // place of a code among them saves the shifts, which compete with look-ups for the same ports.
    template <int B>
    struct Values : Avx512::Words<B> {
        static constexpr int SHARE = B == 1 ? 5 : B <= 3 ? 2 : 1;
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

    template <int B, int M, int PLACE>
    static FDK_INLINE void step(const Values<B>& values, __m512i codes, const uint32_t* x, __m512* acc) {
        __m512i looked_up = values.template at<PLACE>(codes);
        // Keeps GCC 12 from mixing the chains of neighbouring pairs, which costs it register copies.
        __asm__("" : "+v"(looked_up));
        const __m512bh value = (__m512bh)looked_up;
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            acc[c] = _mm512_dpbf16_ps(acc[c], value, (__m512bh)_mm512_set1_epi32((int)x[c]));
        });
    }

    template <int B>
    static FDK_INLINE void expand(const Values<B>& values, __m512i codes, uint32_t* panel) {
        _mm512_storeu_si512(panel, values.get(codes));
    }

    template <int T, int M>
    static FDK_INLINE void multiply(const uint32_t* panel, const uint32_t* x, __m512* acc) {
        const __m512bh value = (__m512bh)_mm512_loadu_si512(panel);
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            acc[c] = _mm512_dpbf16_ps(acc[c], value, (__m512bh)_mm512_set1_epi32((int)x[c]));
        });
    }
};

#define DOT(M, SPLIT) FDK_BY_BITS(DotPath, M, SPLIT)

void linear(const fdk_job* job, int64_t block0, int64_t block1, void* workspace) {
    if (!job->w->bf16_exact) return fdk_ops_avx512()->linear(job, block0, block1, workspace);
    static const BlockFn by_width[9][2][9] = {
        {{nullptr}, {nullptr}},     {DOT(1, false), DOT(1, true)}, {DOT(2, false), {nullptr}},
        {DOT(3, false), {nullptr}}, {DOT(4, false), {nullptr}},    {DOT(5, false), {nullptr}},
        {DOT(6, false), {nullptr}}, {DOT(7, false), {nullptr}},    {DOT(8, false), {nullptr}},
    };
    static const Panels<DotPath>::Tile tiles[13] = FDK_PANEL_TILES(DotPath);
    if (job->plan->algorithm == FDK_PANELS) return run_panels<DotPath>(*job, block0, block1, workspace, tiles);
    if (job->plan->algorithm == FDK_NIBBLES) return Nibbles::run(*job, block0, block1, (float*)workspace);
    static const WriteFn write[] = {nullptr, write_totals<Avx512, 1>, write_totals<Avx512, 2>,
                                    write_totals<Avx512, 3>, write_totals<Avx512, 4>, write_totals<Avx512, 5>,
                                    write_totals<Avx512, 6>, write_totals<Avx512, 7>, write_totals<Avx512, 8>};
    const BlockFn fn = by_width[job->plan->width][job->w->split][job->w->bits];
    run_direct(*job, block0, block1, workspace, fn, write[job->plan->width]);
}

void plan(const fdk_weight* w, int64_t m, fdk_plan* plan) {
    if (!w->bf16_exact) return fdk_ops_avx512()->plan(w, m, plan);
    // Up to 6 bits (two table registers) decoding hides behind the multiplications of a tile; above that it pays to
    // decode once into a panel. Measured on Zen 4 with m = 8, 16, 64, 256.
    const int64_t direct = w->split ? 1 : w->bits <= 6 ? m : w->bits == 7 ? 40 : 8;
    *plan = fdk_plan{1, 0, 1, FDK_DIRECT, 1};
    if (m == 1 && Nibbles::plan(*w, plan)) return;
    if (m > direct) plan_panels<DotPath>(*w, m, 12, plan);
    else plan_direct(m, 8, plan);
}

void pack(const fdk_weight* w, const fdk_plan* plan, const void* x, int32_t rows, void* dst, float* sums) {
    if (!plan->bf16_pairs || !dst) return fdk_ops_avx512()->pack(w, plan, x, rows, dst, sums);
    pack_bf16_pairs<Avx512>(*w, (const uint16_t*)x, rows, plan->width, (uint32_t*)dst, sums);
}

int64_t multiply(int32_t dtype, int64_t steps, float* sink) {
    return dtype == FDK_BF16 ? multiply_chains<DotPath>(steps, sink) : multiply_chains<Avx512Path>(steps, sink);
}

const fdk_ops ops = {plan, pack, linear, dequantise_blocks<Avx512>, read_lines<Avx512>, multiply};

}  // namespace

const fdk_ops* fdk_ops_avx512bf16(void) { return &ops; }
