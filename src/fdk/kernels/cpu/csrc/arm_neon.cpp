// ARMv8.0 NEON: float32 multiply-adds for every activation type; no bf16 instructions.
#include "neon.h"

namespace {

// Values that are bf16 numbers take two look-ups instead of four.
struct NeonUpper : Neon {
    template <int B>
    using Values = ByteValues<Neon, B, 2>;
};

template <class Traits>
struct NeonPath : FloatPath<Traits> {
    // 32 registers hold 16 sums and the tables of 4 bits.
    template <int B, int M>
    static constexpr int together() { return B <= 4 && M <= 4 ? 4 : 2; }
};

typedef NeonPath<Neon> Path;
typedef NeonPath<NeonUpper> UpperPath;

// Codes of nested and sparse weights mean small integers, so that only plain tables may need all bytes.
bool upper(const fdk_weight& w) { return w.bf16_values || w.storage != FDK_PLAIN; }

void linear(const fdk_job* job, int64_t block0, int64_t block1, void* workspace) {
    static const BlockFn by_width[9][2][9] = {
        {{nullptr}, {nullptr}},
        {FDK_BY_BITS(UpperPath, 1, false), FDK_BY_BITS(UpperPath, 1, true)},
        {FDK_BY_SIX_BITS(UpperPath, 2), {nullptr}},
        {{nullptr}, {nullptr}},
        {FDK_BY_SIX_BITS(UpperPath, 4), {nullptr}},
        {{nullptr}, {nullptr}},
        {{nullptr}, {nullptr}},
        {{nullptr}, {nullptr}},
        {FDK_BY_SIX_BITS(UpperPath, 8), {nullptr}},
    };
    static const BlockFn all_bytes[2][9] = {FDK_BY_BITS(Path, 1, false), FDK_BY_BITS(Path, 1, true)};
    static const Panels<UpperPath>::Tile tiles[13] = FDK_PANEL_TILES(UpperPath);
    static const Panels<UpperPath>::ExpandFn expand[9] = {
        nullptr,
        Panels<Path>::expand<1>, Panels<Path>::expand<2>, Panels<Path>::expand<3>, Panels<Path>::expand<4>,
        Panels<Path>::expand<5>, Panels<Path>::expand<6>, Panels<Path>::expand<7>, Panels<Path>::expand<8>};
    const fdk_weight& w = *job->w;
    if (w.storage == FDK_SPARSE) return sparse_linear<UpperPath>(*job, block0, block1, workspace, tiles);
    if (w.storage == FDK_NESTED_PLANES) return nested_linear<UpperPath, 1>(*job, block0, block1, workspace, tiles);
    if (job->plan->algorithm == FDK_PANELS)
        return run_panels<UpperPath>(*job, block0, block1, workspace, tiles, upper(w) ? nullptr : expand);
    if (job->plan->algorithm == FDK_NIBBLES)
        return (w.bits == 1 ? Nibbles<Neon, 1>::run : Nibbles<Neon, 2>::run)(*job, block0, block1, (float*)workspace);
    DirectFn direct[9];
    for (int i = 0; i < 9; i++)
        direct[i] = DirectFn{upper(w) ? by_width[i][w.split][w.bits] : all_bytes[w.split][w.bits], tiles[i].write};
    run_direct(*job, block0, block1, workspace, direct);
}

void plan(const fdk_weight* w, int64_t m, fdk_plan* plan) {
    const bool never = w->storage == FDK_SPARSE || Panels<UpperPath>::subtracts(*w);
    const int64_t direct = never ? 0 : w->split || w->storage == FDK_NESTED_PLANES || w->bits > 6 || !upper(*w) ? 1 : 8;
    *plan = fdk_plan{1, 0, 1, 1, 1, FDK_DIRECT, 0};
    if (m == 1 && direct && (Nibbles<Neon, 1>::plan(*w, plan) || Nibbles<Neon, 2>::plan(*w, plan))) return;
    if (m > direct) return plan_panels<UpperPath>(*w, m, 12, plan);
    const int32_t width = m <= 2 ? (int32_t)m : m <= 4 ? 4 : 8;
    plan->rows = m;
    plan->width = plan->rest_width = width;
}

void pack(const fdk_weight* w, const fdk_plan*, const void* x, const fdk_tile* tile) {
    pack_floats<Neon>(*w, (const uint8_t*)x, *tile, (float*)tile->x);
}

void dequantise(const fdk_weight* w, void* out, int64_t block0, int64_t block1) {
    (upper(*w) ? dequantise_any<NeonUpper> : dequantise_blocks<Neon>)(w, out, block0, block1);
}

int64_t multiply(int32_t, int64_t steps, float* sink) { return multiply_chains<UpperPath>(steps, sink); }

const fdk_ops ops = {plan, pack, linear, dequantise, read_lines<Neon>, multiply};

}  // namespace

const fdk_ops* fdk_ops_neon(void) { return &ops; }
