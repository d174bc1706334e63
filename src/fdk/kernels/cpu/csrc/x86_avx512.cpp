// AVX-512 F, BW, VL, DQ: float32 multiply-adds for every activation type.
#include "avx512.h"

namespace {

void linear(const fdk_job* job, int64_t block0, int64_t block1, void* workspace) {
    static const BlockFn by_width[9][2][9] = {
        {{nullptr}, {nullptr}},
        {FDK_BY_BITS(Avx512Path, 1, false), FDK_BY_BITS(Avx512Path, 1, true)},
        {FDK_BY_BITS(Avx512Path, 2, false), {nullptr}},
        {{nullptr}, {nullptr}},
        {FDK_BY_BITS(Avx512Path, 4, false), {nullptr}},
        {{nullptr}, {nullptr}},
        {FDK_BY_BITS(Avx512Path, 6, false), {nullptr}},
        {{nullptr}, {nullptr}},
        {FDK_BY_BITS(Avx512Path, 8, false), {nullptr}},
    };
    static const Panels<Avx512Path>::Tile tiles[13] = FDK_PANEL_TILES(Avx512Path);
    if (job->w->storage == FDK_SPARSE) return sparse_linear<Avx512Path>(*job, block0, block1, workspace, tiles);
    if (job->w->storage == FDK_NESTED_PLANES)
        return nested_linear<Avx512Path, 1, 2, 4, 6, 8>(*job, block0, block1, workspace, tiles);
    if (job->plan->algorithm == FDK_PANELS) return run_panels<Avx512Path>(*job, block0, block1, workspace, tiles);
    if (job->plan->algorithm == FDK_NIBBLES) return Nibbles<Avx512, 1>::run(*job, block0, block1, (float*)workspace);
    DirectFn direct[9];
    for (int i = 0; i < 9; i++) direct[i] = DirectFn{by_width[i][job->w->split][job->w->bits], tiles[i].write};
    run_direct(*job, block0, block1, workspace, direct);
}

void plan(const fdk_weight* w, int64_t m, fdk_plan* plan) {
    // As for bf16, except that up to 4 bits one register holds the table.
    const bool never = w->storage == FDK_SPARSE || Panels<Avx512Path>::subtracts(*w);
    const int64_t of_plain = w->bits <= 4 ? m : 4, of_planes = w->bits <= 5 ? 16 : w->bits <= 7 ? 8 : 2;
    const int64_t direct = never ? 0 : w->split ? 1 : w->storage == FDK_NESTED_PLANES ? of_planes : of_plain;
    *plan = fdk_plan{1, 0, 1, 1, 1, FDK_DIRECT, 0};
    if (m == 1 && direct && Nibbles<Avx512, 1>::plan(*w, plan)) return;
    if (m > direct) return plan_panels<Avx512Path>(*w, m, 12, plan);
    plan->rows = rows_of_chunk(m, 32 * 8);
    cut_evenly(8, plan);
    if (plan->width > 2) plan->width += plan->width % 2;
    plan_direct(plan);
}

void pack(const fdk_weight* w, const fdk_plan*, const void* x, const fdk_tile* tile) {
    pack_floats<Avx512>(*w, (const uint8_t*)x, *tile, (float*)tile->x);
}

int64_t multiply(int32_t, int64_t steps, float* sink) { return multiply_chains<Avx512Path>(steps, sink); }

const fdk_ops ops = {plan, pack, linear, dequantise_any<Avx512>, read_lines<Avx512>, multiply};

}  // namespace

const fdk_ops* fdk_ops_avx512(void) { return &ops; }
