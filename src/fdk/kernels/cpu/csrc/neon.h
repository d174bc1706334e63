// Traits of ARMv8 NEON: four lanes, so a block is four vectors of rows. Internal linkage like everything in kernels.h.
#pragma once
#include <arm_neon.h>

#include "bytes.h"
#include "nibbles.h"

namespace {

struct Neon {
    static constexpr int W = 4;
    typedef float32x4_t vf;
    typedef uint32x4_t vi;

    static FDK_INLINE vi load(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
    template <int S>
    static FDK_INLINE vi shr(vi v) {
        if constexpr (S == 0) return v;
        else return vshrq_n_u32(v, S);
    }
    template <int S>
    static FDK_INLINE vi shl(vi v) { return vshlq_n_u32(v, S); }
    static FDK_INLINE vi pick(vi a, vi b, uint32_t m) { return vbslq_u32(vdupq_n_u32(m), b, a); }
    static FDK_INLINE vi zero_words() { return vdupq_n_u32(0); }
    static FDK_INLINE vi and_mask(vi v, uint32_t m) { return vandq_u32(v, vdupq_n_u32(m)); }
    static FDK_INLINE vi or_and(vi a, vi b, uint32_t m) { return vorrq_u32(a, and_mask(b, m)); }
    static FDK_INLINE vf as_floats(vi v) { return vreinterpretq_f32_u32(v); }

    static FDK_INLINE vi upper_nibbles(vi v) { return vreinterpretq_u32_u8(vshrq_n_u8(vreinterpretq_u8_u32(v), 4)); }
    template <int HIGH>
    static FDK_INLINE vi transpose(vi a, vi b) {
        const uint8x16_t x = vreinterpretq_u8_u32(a), y = vreinterpretq_u8_u32(b);
        return vreinterpretq_u32_u8(HIGH ? vtrn2q_u8(x, y) : vtrn1q_u8(x, y));
    }
    template <int HIGH>
    static FDK_INLINE vi transpose_halves(vi a, vi b) {
        const uint16x8_t x = vreinterpretq_u16_u32(a), y = vreinterpretq_u16_u32(b);
        return vreinterpretq_u32_u16(HIGH ? vtrn2q_u16(x, y) : vtrn1q_u16(x, y));
    }
    // An instruction looks up 16, 32 or 64 bytes. Longer tables stay in memory and pass through four registers: an index
    // beyond these leaves what was found before.
    template <int N>
    struct bytes_of {
        uint8_t t[N];
        bytes_of() = default;
        FDK_INLINE explicit bytes_of(const uint8_t* p) { memcpy(t, p, N); }
        FDK_INLINE vi at(vi index) const {
            const uint8x16_t i = vreinterpretq_u8_u32(index);
            uint8x16_t found = vqtbl4q_u8(part(0, i), i);
            unroll<1, N / 64>([&](auto p) FDK_LAMBDA {
                constexpr int first = 64 * decltype(p)::value;
                found = vqtbx4q_u8(found, part(first, i), vsubq_u8(i, vdupq_n_u8(first)));
            });
            return vreinterpretq_u32_u8(found);
        }
        FDK_INLINE uint8x16x4_t part(int first, uint8x16_t index) const {
            const uint8_t* p;
            // Seems to depend on the index, or compilers would keep all parts, in registers that there are not.
            __asm__("" : "=r"(p) : "0"(t + first), "w"(index));
            return vld1q_u8_x4(p);
        }
    };
    template <int B>
    using Values = ByteValues<Neon, B, 4>;

    static FDK_INLINE vf zero() { return vdupq_n_f32(0); }
    static FDK_INLINE vf add(vf a, vf b) { return vaddq_f32(a, b); }
    static FDK_INLINE vf sub(vf a, vf b) { return vsubq_f32(a, b); }
    static FDK_INLINE vf sub_scalar(vf a, float b) { return vsubq_f32(a, vdupq_n_f32(b)); }
    static FDK_INLINE vf mul(vf a, vf b) { return vmulq_f32(a, b); }
    static FDK_INLINE vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
    static FDK_INLINE vf fnma(vf a, vf b, vf c) { return vfmsq_f32(c, a, b); }
    static FDK_INLINE vf broadcast(const void* p) { return vld1q_dup_f32((const float*)p); }
    // c + a * x[AT]: four values of x are loaded at once, and the instruction takes one of them.
    template <int AT>
    static FDK_INLINE vf fma_at(vf a, const uint32_t* x, vf c) {
        return vfmaq_laneq_f32(c, a, as_floats(vld1q_u32(x + AT / 4 * 4)), AT % 4);
    }
    static FDK_INLINE void keep(float* p, vf v) { vst1q_f32(p, v); }
    static FDK_INLINE vf kept(const float* p) { return vld1q_f32(p); }
    static FDK_INLINE void keep_words(uint32_t* p, vi v) { vst1q_u32(p, v); }
    static FDK_INLINE vi kept_words(const uint32_t* p) { return vld1q_u32(p); }
    static FDK_INLINE void keep_partial(float* p, vf v, int lanes) {
        if (lanes == W) return keep(p, v);
        float all[W];
        keep(all, v);
        memcpy(p, all, 4 * lanes);
    }
    static FDK_INLINE vf floats(const uint8_t* p, int dtype) {
        if (dtype == FDK_FP32) return as_floats(load(p));
        const uint16x4_t h = vreinterpret_u16_u8(vld1_u8(p));
        if (dtype == FDK_FP16) return vcvt_f32_f16(vreinterpret_f16_u16(h));
        return as_floats(vshll_n_u16(h, 16));
    }
    static FDK_INLINE vf floats_partial(const uint8_t* p, int dtype, int lanes) {
        if (lanes == W) return floats(p, dtype);
        uint8_t all[4 * W] = {0};
        memcpy(all, p, lanes * (dtype == FDK_FP32 ? 4 : 2));
        return floats(all, dtype);
    }
    static FDK_INLINE vf bytes(const uint8_t* p) {
        uint32_t four;
        memcpy(&four, p, 4);
        return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
    }
    static FDK_INLINE uint16x4_t narrow(vf v, int dtype) {
        if (dtype == FDK_FP16) return vreinterpret_u16_f16(vcvt_f16_f32(v));
        const vi u = vreinterpretq_u32_f32(v);
        const vi r = vaddq_u32(vaddq_u32(u, vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1))), vdupq_n_u32(0x7fff));
        return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), r, vdupq_n_u32(0x7fc00000)), 16);
    }
    static FDK_INLINE void store(uint8_t* p, int dtype, vf v, int lanes) {
        if (dtype == FDK_FP32) return keep_partial((float*)p, v, lanes);
        const uint16x4_t h = narrow(v, dtype);
        memcpy(p, &h, 2 * (lanes < W ? lanes : W));
    }
    static FDK_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
    static FDK_INLINE void prefetch_far(const uint8_t*) {}  // not measured on ARM

    // Tables of nibbles.h: four times the same byte of 16 sums, because that is what an instruction looks up; the bytes that
    // it finds for 16 rows are put together.
    static FDK_INLINE void keep_table(float* table, const vf (&sum)[4]) {
        for (int i = 0; i < 4; i++) keep(table + 4 * i, sum[i]);
        const uint8x16x4_t bytes = vld4q_u8((const uint8_t*)table);
        for (int i = 0; i < 4; i++) vst1q_u8((uint8_t*)(table + 4 * i), bytes.val[i]);
    }
    static FDK_INLINE void add_nibbles(const uint8_t* line, const float* tables, vf (&acc)[4]) {
        const uint8x16x4_t codes = vld4q_u8(line);
        unroll<0, 8>([&](auto n) FDK_LAMBDA {
            constexpr int N = decltype(n)::value;
            const uint8x16_t byte = codes.val[N / 2], index = N % 2 ? vshrq_n_u8(byte, 4) : vandq_u8(byte, vdupq_n_u8(15));
            const uint8x16x4_t t = vld1q_u8_x4((const uint8_t*)(tables + 16 * N));
            const uint8x16_t b0 = vqtbl1q_u8(t.val[0], index), b1 = vqtbl1q_u8(t.val[1], index);
            const uint8x16_t b2 = vqtbl1q_u8(t.val[2], index), b3 = vqtbl1q_u8(t.val[3], index);
            const uint16x8_t low[2] = {vreinterpretq_u16_u8(vzip1q_u8(b0, b1)), vreinterpretq_u16_u8(vzip2q_u8(b0, b1))};
            const uint16x8_t high[2] = {vreinterpretq_u16_u8(vzip1q_u8(b2, b3)), vreinterpretq_u16_u8(vzip2q_u8(b2, b3))};
            unroll<0, 2>([&](auto i) FDK_LAMBDA {
                constexpr int J = decltype(i)::value;
                acc[2 * J] = add(acc[2 * J], vreinterpretq_f32_u16(vzip1q_u16(low[J], high[J])));
                acc[2 * J + 1] = add(acc[2 * J + 1], vreinterpretq_f32_u16(vzip2q_u16(low[J], high[J])));
            });
            // Or compilers would mix all nibbles and put what they looked up onto the stack.
            if constexpr (N % 2) __asm__("" : "+w"(acc[0]), "+w"(acc[1]), "+w"(acc[2]), "+w"(acc[3]));
        });
    }
    typedef PlainPanel<Neon> Panel;
};

template <>
struct Neon::bytes_of<16> {
    uint8x16_t t;
    bytes_of() = default;
    FDK_INLINE explicit bytes_of(const uint8_t* p) : t(vld1q_u8(p)) {}
    FDK_INLINE vi at(vi index) const { return vreinterpretq_u32_u8(vqtbl1q_u8(t, vreinterpretq_u8_u32(index))); }
};
template <>
struct Neon::bytes_of<32> {
    uint8x16x2_t t;
    bytes_of() = default;
    FDK_INLINE explicit bytes_of(const uint8_t* p) : t(vld1q_u8_x2(p)) {}
    FDK_INLINE vi at(vi index) const { return vreinterpretq_u32_u8(vqtbl2q_u8(t, vreinterpretq_u8_u32(index))); }
};
template <>
struct Neon::bytes_of<64> {
    uint8x16x4_t t;
    bytes_of() = default;
    FDK_INLINE explicit bytes_of(const uint8_t* p) : t(vld1q_u8_x4(p)) {}
    FDK_INLINE vi at(vi index) const { return vreinterpretq_u32_u8(vqtbl4q_u8(t, vreinterpretq_u8_u32(index))); }
};

}  // namespace
