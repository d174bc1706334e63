// Portable C++ with GCC vector extensions of four lanes: any architecture, and the yardstick for the other units.
#include "kernels.h"

namespace {

struct Generic {
    static constexpr int W = 4;
    typedef float vf __attribute__((vector_size(16)));
    typedef uint32_t vi __attribute__((vector_size(16)));

    static FDK_INLINE vi load(const uint8_t* p) {
        vi v;
        memcpy(&v, p, 16);
        return v;
    }
    template <int S>
    static FDK_INLINE vi shr(vi v) { return v >> S; }
    static FDK_INLINE vi zero_words() { return vi{0, 0, 0, 0}; }
    static FDK_INLINE vi and_mask(vi v, uint32_t m) { return v & m; }
    static FDK_INLINE vi or_and(vi a, vi b, uint32_t m) { return a | (b & m); }

    template <int B>
    struct Values {
        const float* table;
        FDK_INLINE Values(const fdk_range& r) : table(r.value) {}
        FDK_INLINE void pair(vi codes, vf& even, vf& odd) const {
            even = get(codes & ((1u << B) - 1));
            odd = get(codes >> 16 & ((1u << B) - 1));
        }
        FDK_INLINE vf get(vi index) const {
            return vf{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
        }
    };

    static FDK_INLINE vf zero() { return vf{0, 0, 0, 0}; }
    static FDK_INLINE vf add(vf a, vf b) { return a + b; }
    static FDK_INLINE vf sub(vf a, vf b) { return a - b; }
    static FDK_INLINE vf sub_scalar(vf a, float b) { return a - b; }
    static FDK_INLINE vf mul(vf a, vf b) { return a * b; }
    static FDK_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
    static FDK_INLINE vf fnma(vf a, vf b, vf c) { return c - a * b; }
    static FDK_INLINE vf broadcast(const void* p) {
        float f;
        memcpy(&f, p, 4);
        return vf{f, f, f, f};
    }
    static FDK_INLINE void keep(float* p, vf v) { memcpy(p, &v, 16); }
    static FDK_INLINE void keep_partial(float* p, vf v, int lanes) {
        for (int i = 0; i < lanes; i++) p[i] = v[i];
    }
    static FDK_INLINE vf kept(const float* p) {
        vf v;
        memcpy(&v, p, 16);
        return v;
    }
    static FDK_INLINE vf floats(const uint8_t* p, int dtype) { return floats_partial(p, dtype, W); }
    static FDK_INLINE vf floats_partial(const uint8_t* p, int dtype, int lanes) {
        float f[W] = {0, 0, 0, 0};
        for (int i = 0; i < lanes; i++) f[i] = load_float(p, i, dtype);
        return kept(f);
    }
    static FDK_INLINE vf bytes(const uint8_t* p) { return vf{(float)p[0], (float)p[1], (float)p[2], (float)p[3]}; }
    static FDK_INLINE void store(uint8_t* p, int dtype, vf v, int lanes) {
        for (int i = 0; i < lanes; i++) store_float(p, i, dtype, v[i]);
    }
    static FDK_INLINE void prefetch(const uint8_t*) {}
    typedef PlainPanel<Generic> Panel;
};

typedef FloatPath<Generic> Path;

void linear(const fdk_job* job, int64_t block0, int64_t block1) {
    static const BlockFn narrow[2][9] = {FDK_BY_BITS(Path, 1, false), FDK_BY_BITS(Path, 1, true)};
    static const BlockFn wide[2][9] = {FDK_BY_BITS(Path, 4, false), FDK_BY_BITS(Path, 4, true)};
    const int bits = job->w->bits, split = job->w->split;
    run_job(*job, block0, block1,
            [&](const Call& call) { return call.tile->width == 1 ? narrow[split][bits] : wide[split][bits]; });
}

int32_t width_for(const fdk_weight*, int64_t rows) { return rows == 1 ? 1 : 4; }

void pack(const fdk_weight* w, const void* x, int32_t rows, int32_t width, void* dst, float* sums, float*) {
    pack_floats<Generic>(*w, (const uint8_t*)x, rows, width, (float*)dst, sums);
}

const fdk_ops ops = {0, linear, dequantise_blocks<Generic>, width_for, pack, nullptr};

}  // namespace

const fdk_ops* fdk_ops_generic(void) { return &ops; }
