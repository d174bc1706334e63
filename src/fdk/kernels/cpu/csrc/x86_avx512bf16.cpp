// AVX-512 with BF16: bf16 activations are multiplied as they are, in pairs, by vdpbf16ps.
#include "avx512.h"

namespace {

// Bf16 path: activations x :: [k / 2][M] pairs of bf16; one instruction multiplies and adds both k of a pair, exactly
// but for the float32 rounding of the sums.
struct DotPath {
    typedef Avx512 I;
    static constexpr int words_per_pair = 1;
    template <int B>
    struct Values : Avx512::Words<B> {
        FDK_INLINE explicit Values(const fdk_range& r) : Avx512::Words<B>(r.value_bf16) {}
    };

    template <int B, int M>
    static FDK_INLINE void step(const Values<B>& values, __m512i codes, const uint32_t* x, __m512* acc) {
        const __m512bh value = (__m512bh)values.get(codes);
        unroll<0, M>([&](auto i) FDK_LAMBDA {
            constexpr int c = decltype(i)::value;
            acc[c] = _mm512_dpbf16_ps(acc[c], value, (__m512bh)_mm512_set1_epi32((int)x[c]));
        });
    }
};

#define DOT(M, SPLIT) FDK_BY_BITS(DotPath, M, SPLIT)

void linear(const fdk_job* job, int64_t block0, int64_t block1) {
    if (!job->w->bf16_exact) return fdk_ops_avx512()->linear(job, block0, block1);
    static const BlockFn by_width[9][2][9] = {
        {{nullptr}, {nullptr}},      {DOT(1, false), DOT(1, true)}, {DOT(2, false), {nullptr}},
        {DOT(3, false), {nullptr}},  {DOT(4, false), DOT(4, true)}, {DOT(5, false), {nullptr}},
        {DOT(6, false), {nullptr}},  {DOT(7, false), {nullptr}},    {DOT(8, false), {nullptr}},
    };
    const int bits = job->w->bits, split = job->w->split;
    run_job(*job, block0, block1, [&](const Call& call) {
        return call.tile->nibbles ? Nibbles::run : by_width[call.tile->width][split][bits];
    });
}

int32_t width_for(const fdk_weight* w, int64_t rows) {
    if (!w->bf16_exact) return fdk_ops_avx512()->width_for(w, rows);
    if (w->split) return rows == 1 ? 1 : 4;
    const int64_t tiles = (rows + 7) / 8;
    return (int32_t)((rows + tiles - 1) / tiles);
}

void pack(const fdk_weight* w, const void* x, int32_t rows, int32_t width, void* dst, float* sums, float* nibbles) {
    if (!w->bf16_exact || nibbles) return fdk_ops_avx512()->pack(w, x, rows, width, dst, sums, nibbles);
    if (dst) pack_bf16_pairs<Avx512>(*w, (const uint16_t*)x, rows, width, (uint32_t*)dst, sums);
    else pack_floats<Avx512>(*w, (const uint8_t*)x, rows, width, nullptr, sums);
}

const fdk_ops ops = {1, linear, dequantise_blocks<Avx512>, width_for, pack, Nibbles::size};

}  // namespace

const fdk_ops* fdk_ops_avx512bf16(void) { return &ops; }
