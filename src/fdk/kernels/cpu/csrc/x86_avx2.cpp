// AVX2, FMA, F16C: eight lanes, so a block is two halves of eight rows.
#include <immintrin.h>

#include "kernels.h"

namespace {

struct Avx2 {
    static constexpr int W = 8;
    typedef __m256 vf;
    typedef __m256i vi;

    static FDK_INLINE vi load(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
    template <int S>
    static FDK_INLINE vi shr(vi v) {
        if constexpr (S == 0) return v;
        else return _mm256_srli_epi32(v, S);
    }
    template <int S>
    static FDK_INLINE vi shl(vi v) { return _mm256_slli_epi32(v, S); }
    static FDK_INLINE vi pick(vi a, vi b, uint32_t m) {
        const vi mask = _mm256_set1_epi32((int)m);
        return _mm256_or_si256(_mm256_andnot_si256(mask, a), _mm256_and_si256(mask, b));
    }
    static FDK_INLINE vi zero_words() { return _mm256_setzero_si256(); }
    static FDK_INLINE vi and_mask(vi v, uint32_t m) { return _mm256_and_si256(v, _mm256_set1_epi32((int)m)); }
    static FDK_INLINE vi or_and(vi a, vi b, uint32_t m) { return _mm256_or_si256(a, and_mask(b, m)); }

    // Up to 3 bits one register, 4 bits two of them chosen between by bit 3; above that the table is read from memory.
    template <int B>
    struct Values : Halves<Avx2, B> {
        vf t[2];
        const float* table;
        FDK_INLINE explicit Values(const fdk_range& r) : table(r.value) {
            t[0] = _mm256_loadu_ps(r.value);
            t[1] = _mm256_loadu_ps(r.value + 8);
        }
        // SHIFT brings the code's lowest bit to bit 0.
        template <int SHIFT>
        FDK_INLINE vf get(vi codes) const {
            const vi index = shr<SHIFT>(codes);
            if constexpr (B <= 3) {
                return _mm256_permutevar8x32_ps(t[0], index);
            } else if constexpr (B == 4) {
                const vf upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - SHIFT));  // bit 3 becomes the sign
                return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t[0], index), _mm256_permutevar8x32_ps(t[1], index), upper);
            } else {
                return _mm256_i32gather_ps(table, and_mask(index, (1u << B) - 1), 4);
            }
        }
        template <int>
        FDK_INLINE void pair(vi codes, vf& even, vf& odd) const {
            even = get<0>(codes);
            odd = get<16>(codes);
        }
    };

    static FDK_INLINE vf zero() { return _mm256_setzero_ps(); }
    static FDK_INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
    static FDK_INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
    static FDK_INLINE vf sub_scalar(vf a, float b) { return _mm256_sub_ps(a, _mm256_set1_ps(b)); }
    static FDK_INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
    static FDK_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
    static FDK_INLINE vf fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
    static FDK_INLINE vf broadcast(const void* p) { return _mm256_broadcast_ss((const float*)p); }
    template <int AT>
    static FDK_INLINE vf fma_at(vf a, const uint32_t* x, vf c) { return fma(a, broadcast(x + AT), c); }
    static FDK_INLINE void keep(float* p, vf v) { _mm256_storeu_ps(p, v); }
    static FDK_INLINE vf kept(const float* p) { return _mm256_loadu_ps(p); }
    static FDK_INLINE void keep_partial(float* p, vf v, int lanes) {
        if (lanes == W) return keep(p, v);
        float all[W];
        keep(all, v);
        memcpy(p, all, 4 * lanes);
    }
    static FDK_INLINE vf floats(const uint8_t* p, int dtype) {
        if (dtype == FDK_FP32) return _mm256_loadu_ps((const float*)p);
        const __m128i h = _mm_loadu_si128((const __m128i*)p);
        if (dtype == FDK_FP16) return _mm256_cvtph_ps(h);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    }
    static FDK_INLINE vf floats_partial(const uint8_t* p, int dtype, int lanes) {
        if (lanes == W) return floats(p, dtype);
        uint8_t all[4 * W] = {0};
        memcpy(all, p, lanes * (dtype == FDK_FP32 ? 4 : 2));
        return floats(all, dtype);
    }
    static FDK_INLINE vf bytes(const uint8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
    }
    static FDK_INLINE __m128i narrow(vf v, int dtype) {
        if (dtype == FDK_FP16) return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const vi u = _mm256_castps_si256(v);
        const vi even = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        vi r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, even), _mm256_set1_epi32(0x7fff)), 16);
        const vi nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
        return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
    }
    static FDK_INLINE void store(uint8_t* p, int dtype, vf v, int lanes) {
        if (dtype == FDK_FP32) return keep_partial((float*)p, v, lanes);
        const __m128i h = narrow(v, dtype);
        if (lanes == W) _mm_storeu_si128((__m128i*)p, h);
        else memcpy(p, &h, 2 * lanes);
    }
    static FDK_INLINE void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
    static FDK_INLINE void prefetch_far(const uint8_t*) {}  // loses 5 %: decoding takes twice as long as reading
    typedef PlainPanel<Avx2> Panel;
};

// 4 bits whose values are bf16 numbers: bytes are looked up, the upper and the lower one of a value apart, so that one
// look-up serves all codes at even or at odd places of a line. The compiler shares it between the pairs of the line.
struct Avx2Bytes : Avx2 {
    template <int B>
    struct Values : Avx2::Values<B> {
        using Avx2::Values<B>::Values;
    };
};
template <>
struct Avx2Bytes::Values<4> : Halves<Avx2, 4, 4> {
    vi upper, lower;
    FDK_INLINE explicit Values(const fdk_range& r) {
        uint8_t byte[2][16];
        for (int i = 0; i < 16; i++) byte[0][i] = (uint8_t)r.value_bf16[i], byte[1][i] = (uint8_t)(r.value_bf16[i] >> 8);
        lower = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)byte[0]));
        upper = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)byte[1]));
    }
    template <int PLACE>
    FDK_INLINE void pair(vi codes, vf& even, vf& odd) const {
        const vi index = and_mask(shr<PLACE % 2 * 4>(codes), 0x0f0f0f0f);
        const vi h = _mm256_shuffle_epi8(upper, index), l = _mm256_shuffle_epi8(lower, index);
        const vi halves = _mm256_set1_epi16((short)0xff00);
        const vi both = PLACE < 2 ? _mm256_blendv_epi8(l, _mm256_slli_epi16(h, 8), halves)
                                  : _mm256_blendv_epi8(_mm256_srli_epi16(l, 8), h, halves);
        even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        odd = _mm256_castsi256_ps(and_mask(both, 0xffff0000));
    }
};

typedef FloatPath<Avx2Bytes> BytesPath;
typedef FloatPath<Avx2> Path;

void linear(const fdk_job* job, int64_t block0, int64_t block1, void* workspace) {
    static const BlockFn by_width[5][2][9] = {
        {{nullptr}, {nullptr}},
        {FDK_BY_BITS(Path, 1, false), FDK_BY_BITS(Path, 1, true)},
        {FDK_BY_BITS(Path, 2, false), {nullptr}},
        {{nullptr}, {nullptr}},
        {FDK_BY_BITS(Path, 4, false), {nullptr}},
    };
    static const Panels<Path>::Tile tiles[7] = {{}, FDK_PANEL_TILE(Path, 1), FDK_PANEL_TILE(Path, 2), FDK_PANEL_TILE(Path, 3),
                                                FDK_PANEL_TILE(Path, 4), {}, FDK_PANEL_TILE(Path, 6)};
    if (job->w->storage == FDK_SPARSE) return sparse_linear<Path>(*job, block0, block1, workspace, tiles);
    if (job->w->storage == FDK_NESTED_PLANES) return nested_linear<Path, 1>(*job, block0, block1, workspace, tiles);
    if (job->plan->algorithm == FDK_PANELS) return run_panels<Path>(*job, block0, block1, workspace, tiles);
    DirectFn direct[5];
    static const BlockFn bytes[5][2] = {
        {nullptr},
        {Block<BytesPath, 4, 1, false>::run, Block<BytesPath, 4, 1, true>::run},
        {Block<BytesPath, 4, 2, false>::run},
        {nullptr},
        {Block<BytesPath, 4, 4, false>::run},
    };
    const fdk_weight& w = *job->w;
    for (int i = 0; i < 5; i++) {
        const BlockFn run = w.bits == 4 && w.bf16_exact ? bytes[i][w.split] : by_width[i][w.split][w.bits];
        direct[i] = DirectFn{run, tiles[i].write};
    }
    run_direct(*job, block0, block1, workspace, direct);
}

void plan(const fdk_weight* w, int64_t m, fdk_plan* plan) {
    const int32_t rows = (int32_t)(m < 4 ? m : 4), width = rows == 3 ? 4 : rows;
    *plan = fdk_plan{rows, 0, 1, width, width, FDK_DIRECT, 0};
    if (m > (w->split || w->storage != FDK_PLAIN ? 1 : 4) || w->storage == FDK_SPARSE || Panels<Path>::subtracts(*w)) plan_panels<Path>(*w, m, 6, plan);
}

void pack(const fdk_weight* w, const fdk_plan*, const void* x, const fdk_tile* tile) {
    pack_floats<Avx2>(*w, (const uint8_t*)x, *tile, (float*)tile->x);
}

int64_t multiply(int32_t, int64_t steps, float* sink) { return multiply_chains<Path>(steps, sink); }

const fdk_ops ops = {plan, pack, linear, dequantise_any<Avx2>, read_lines<Avx2>, multiply};

}  // namespace

const fdk_ops* fdk_ops_avx2(void) { return &ops; }
