// SVE with bf16 instructions. The source knows no vector length; it is compiled once for each of 128, 256 and 512 bits, where
// the length is a constant and vectors can be array elements, and the machine's length chooses when the library is loaded.
#include <arm_sve.h>

#include "neon.h"

#include "dot.h"

namespace {

#define FDK_FIXED __attribute__((arm_sve_vector_bits(__ARM_FEATURE_SVE_BITS)))
typedef svfloat32_t fixed_floats FDK_FIXED;
typedef svuint32_t fixed_words FDK_FIXED;
typedef svuint8_t fixed_bytes FDK_FIXED;

struct Sve {
    static constexpr int W = __ARM_FEATURE_SVE_BITS / 32;
    typedef fixed_floats vf;
    typedef fixed_words vi;

    static FDK_INLINE svbool_t all() { return svptrue_b32(); }
    static FDK_INLINE svuint8_t u8(vi v) { return svreinterpret_u8_u32(v); }
    static FDK_INLINE svuint16_t u16(vi v) { return svreinterpret_u16_u32(v); }
    static FDK_INLINE svbfloat16_t halves(vi v) { return svreinterpret_bf16_u32(v); }

    static FDK_INLINE vi load(const uint8_t* p) { return svreinterpret_u32_u8(svld1_u8(svptrue_b8(), p)); }
    template <int S>
    static FDK_INLINE vi shr(vi v) {
        if constexpr (S == 0) return v;
        else return svlsr_n_u32_x(all(), v, S);
    }
    template <int S>
    static FDK_INLINE vi shl(vi v) { return svlsl_n_u32_x(all(), v, S); }
    static FDK_INLINE vi zero_words() { return svdup_n_u32(0); }
    static FDK_INLINE vi and_mask(vi v, uint32_t m) { return svand_n_u32_x(all(), v, m); }
    static FDK_INLINE vi or_and(vi a, vi b, uint32_t m) { return svorr_u32_x(all(), a, and_mask(b, m)); }
    static FDK_INLINE vi pick(vi a, vi b, uint32_t m) { return or_and(and_mask(a, ~m), b, m); }
    static FDK_INLINE vf as_floats(vi v) { return svreinterpret_f32_u32(v); }

    static FDK_INLINE vi upper_nibbles(vi v) { return svreinterpret_u32_u8(svlsr_n_u8_x(svptrue_b8(), u8(v), 4)); }
    template <int HIGH>
    static FDK_INLINE vi transpose(vi a, vi b) {
        return svreinterpret_u32_u8(HIGH ? svtrn2_u8(u8(a), u8(b)) : svtrn1_u8(u8(a), u8(b)));
    }
    template <int HIGH>
    static FDK_INLINE vi transpose_halves(vi a, vi b) {
        return svreinterpret_u32_u16(HIGH ? svtrn2_u16(u16(a), u16(b)) : svtrn1_u16(u16(a), u16(b)));
    }
    // An instruction looks up as many bytes as a vector has; indices beyond them give zero.
    template <int N>
    struct bytes_of {
        static constexpr int SIZE = 4 * W, COUNT = N > SIZE ? N / SIZE : 1;
        fixed_bytes t[COUNT];
        bytes_of() = default;
        FDK_INLINE explicit bytes_of(const uint8_t* p) {
            for (int i = 0; i < COUNT; i++) t[i] = svld1_u8(svwhilelt_b8(0, N), p + SIZE * i);
        }
        FDK_INLINE vi at(vi index) const {
            svuint8_t found = svtbl_u8(t[0], u8(index));
            unroll<1, COUNT>([&](auto part) FDK_LAMBDA {
                constexpr int J = decltype(part)::value;
                found = svorr_u8_x(svptrue_b8(), found, svtbl_u8(t[J], svsub_n_u8_x(svptrue_b8(), u8(index), SIZE * J)));
            });
            return svreinterpret_u32_u8(found);
        }
    };
    template <int B>
    using Values = ByteValues<Sve, B, 2>;

    static FDK_INLINE vf zero() { return svdup_n_f32(0); }
    static FDK_INLINE vf add(vf a, vf b) { return svadd_f32_x(all(), a, b); }
    static FDK_INLINE vf sub(vf a, vf b) { return svsub_f32_x(all(), a, b); }
    static FDK_INLINE vf sub_scalar(vf a, float b) { return svsub_n_f32_x(all(), a, b); }
    static FDK_INLINE vf fma(vf a, vf b, vf c) { return svmla_f32_x(all(), c, a, b); }
    static FDK_INLINE vf fnma(vf a, vf b, vf c) { return svmls_f32_x(all(), c, a, b); }
    static FDK_INLINE vf broadcast(const void* p) { return svdup_n_f32(*(const float*)p); }
    static FDK_INLINE void keep(float* p, vf v) { svst1_f32(all(), p, v); }
    static FDK_INLINE vf kept(const float* p) { return svld1_f32(all(), p); }
    static FDK_INLINE void keep_words(uint32_t* p, vi v) { svst1_u32(all(), p, v); }
    static FDK_INLINE vi kept_words(const uint32_t* p) { return svld1_u32(all(), p); }
    static FDK_INLINE vf floats(const uint8_t* p, int dtype) { return floats_partial(p, dtype, W); }
    static FDK_INLINE vf floats_partial(const uint8_t* p, int dtype, int lanes) {
        const svbool_t first = svwhilelt_b32(0, lanes);
        if (dtype == FDK_FP32) return svld1_f32(first, (const float*)p);
        const svuint32_t h = svld1uh_u32(first, (const uint16_t*)p);
        if (dtype == FDK_FP16) return svcvt_f32_f16_x(all(), svreinterpret_f16_u32(h));
        return as_floats(svlsl_n_u32_x(all(), h, 16));
    }
    static FDK_INLINE vf bytes(const uint8_t* p) { return svcvt_f32_u32_x(all(), svld1ub_u32(all(), p)); }
    static FDK_INLINE void store(uint8_t* p, int dtype, vf v, int lanes) {
        const svbool_t first = svwhilelt_b32(0, lanes);
        if (dtype == FDK_FP32) return svst1_f32(first, (float*)p, v);
        if (dtype == FDK_FP16) return svst1h_u32(first, (uint16_t*)p, svreinterpret_u32_f16(svcvt_f16_f32_x(all(), v)));
        const svuint32_t u = svreinterpret_u32_f32(v), even = svand_n_u32_x(all(), svlsr_n_u32_x(all(), u, 16), 1);
        const svuint32_t r = svlsr_n_u32_x(all(), svadd_n_u32_x(all(), svadd_u32_x(all(), u, even), 0x7fff), 16);
        svst1h_u32(first, (uint16_t*)p, svsel_u32(svcmpuo_f32(all(), v, v), svdup_n_u32(0x7fc0), r));
    }
    static FDK_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
    static FDK_INLINE void prefetch_far(const uint8_t*) {}  // not measured on ARM

    static FDK_INLINE vi quad(const uint32_t* x) { return svld1rq_u32(all(), x); }
    template <int AT>
    static FDK_INLINE vf dot_at(vf acc, vi v, const uint32_t* x) {
        return svbfdot_lane_f32(acc, halves(v), halves(quad(x + AT / 4 * 4)), AT % 4);
    }
    static FDK_INLINE vf matrix(vf acc, vi v, vi x) { return svbfmmla_f32(acc, halves(v), halves(x)); }
    template <int HIGH>
    static FDK_INLINE vi zip(vi a, vi b) { return HIGH ? svzip2_u32(a, b) : svzip1_u32(a, b); }
    static FDK_INLINE vf even_words(vf a, vf b) { return svuzp1_f32(a, b); }
    static FDK_INLINE vf odd_words(vf a, vf b) { return svuzp2_f32(a, b); }
};

typedef ArmDot<Sve> Dot;

const fdk_ops ops = {Dot::plan, Dot::pack, Dot::linear, Dot::dequantise, read_lines<Sve>, Dot::multiply};

}  // namespace

#define FDK_NAME_OF(bits) fdk_ops_sve##bits
#define FDK_OPS_OF(bits) FDK_NAME_OF(bits)
const fdk_ops* FDK_OPS_OF(__ARM_FEATURE_SVE_BITS)(void) { return &ops; }
