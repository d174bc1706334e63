// NEON with bf16 instructions (ARMv8.6, optional from 8.2): bf16 activations are multiplied as they are, in pairs by bfdot for
// few rows, four k of two rows by two rows of x by bfmmla for many.
#include "neon.h"

#include "dot.h"

namespace {

struct NeonDot : Neon {
    static FDK_INLINE bfloat16x8_t halves(vi v) { return vreinterpretq_bf16_u32(v); }
    static FDK_INLINE vi quad(const uint32_t* x) { return vld1q_u32(x); }
    template <int AT>
    static FDK_INLINE vf dot_at(vf acc, vi v, const uint32_t* x) {
        return vbfdotq_laneq_f32(acc, halves(v), halves(quad(x + AT / 4 * 4)), AT % 4);
    }
    static FDK_INLINE vf matrix(vf acc, vi v, vi x) { return vbfmmlaq_f32(acc, halves(v), halves(x)); }
    template <int HIGH>
    static FDK_INLINE vi zip(vi a, vi b) { return HIGH ? vzip2q_u32(a, b) : vzip1q_u32(a, b); }
    static FDK_INLINE vf even_words(vf a, vf b) { return vuzp1q_f32(a, b); }
    static FDK_INLINE vf odd_words(vf a, vf b) { return vuzp2q_f32(a, b); }
};

typedef ArmDot<NeonDot> Dot;

const fdk_ops ops = {Dot::plan, Dot::pack, Dot::linear, Dot::dequantise, read_lines<Neon>, Dot::multiply};

}  // namespace

const fdk_ops* fdk_ops_neonbf16(void) { return &ops; }
