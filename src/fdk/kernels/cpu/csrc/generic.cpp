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
    template <int S>
    static FDK_INLINE vi shl(vi v) { return v << S; }
    static FDK_INLINE vi pick(vi a, vi b, uint32_t m) { return (a & ~m) | (b & m); }
    static FDK_INLINE vi zero_words() { return vi{0, 0, 0, 0}; }
    static FDK_INLINE vi and_mask(vi v, uint32_t m) { return v & m; }
    static FDK_INLINE vi or_and(vi a, vi b, uint32_t m) { return a | (b & m); }

    template <int B>
    struct Values : Halves<Generic, B> {
        const float* table;
        FDK_INLINE Values(const fdk_range& r) : table(r.value) {}
        template <int>
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
    template <int AT>
    static FDK_INLINE vf fma_at(vf a, const uint32_t* x, vf c) { return fma(a, broadcast(x + AT), c); }
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
    static FDK_INLINE void prefetch_far(const uint8_t*) {}
    typedef PlainPanel<Generic> Panel;
};

typedef FloatPath<Generic> Path;

void linear(const fdk_job* job, int64_t block0, int64_t block1, void* workspace) {
    static const BlockFn one_row[2][9] = {FDK_BY_BITS(Path, 1, false), FDK_BY_BITS(Path, 1, true)};
    static const Panels<Path>::Tile tiles[5] = {{}, FDK_PANEL_TILE(Path, 1), FDK_PANEL_TILE(Path, 2), {}, FDK_PANEL_TILE(Path, 4)};
    if (job->w->storage == FDK_SPARSE) return sparse_linear<Path>(*job, block0, block1, workspace, tiles);
    if (job->w->storage == FDK_NESTED_PLANES) return nested_linear<Path, 1>(*job, block0, block1, workspace, tiles);
    if (job->plan->algorithm == FDK_PANELS) return run_panels<Path>(*job, block0, block1, workspace, tiles);
    const DirectFn direct[2] = {{}, {one_row[job->w->split][job->w->bits], tiles[1].write}};
    run_direct(*job, block0, block1, workspace, direct);
}

void plan(const fdk_weight* w, int64_t m, fdk_plan* plan) {
    *plan = fdk_plan{1, 0, 1, 1, 1, FDK_DIRECT, 0};
    if (m > 1 || w->storage == FDK_SPARSE || Panels<Path>::subtracts(*w)) plan_panels<Path>(*w, m, 4, plan);
}

void pack(const fdk_weight* w, const fdk_plan*, const void* x, const fdk_tile* tile) {
    pack_floats<Generic>(*w, (const uint8_t*)x, *tile, (float*)tile->x);
}

int64_t multiply(int32_t, int64_t steps, float* sink) { return multiply_chains<Path>(steps, sink); }

const fdk_ops ops = {plan, pack, linear, dequantise_any<Generic>, read_lines<Generic>, multiply};

}  // namespace

const fdk_ops* fdk_ops_generic(void) { return &ops; }
