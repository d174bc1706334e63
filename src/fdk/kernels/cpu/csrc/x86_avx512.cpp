// AVX-512 F, BW, VL, DQ: float32 multiply-adds for every activation type.
#include "avx512.h"

namespace {

void linear(const fdk_job* job, int64_t block0, int64_t block1) {
    static const BlockFn by_width[9][2][9] = {
        {{nullptr}, {nullptr}},
        {FDK_BY_BITS(Avx512Path, 1, false), FDK_BY_BITS(Avx512Path, 1, true)},
        {FDK_BY_BITS(Avx512Path, 2, false), {nullptr}},
        {{nullptr}, {nullptr}},
        {FDK_BY_BITS(Avx512Path, 4, false), FDK_BY_BITS(Avx512Path, 4, true)},
        {{nullptr}, {nullptr}},
        {{nullptr}, {nullptr}},
        {{nullptr}, {nullptr}},
        {FDK_BY_BITS(Avx512Path, 8, false), {nullptr}},
    };
    const int bits = job->w->bits, split = job->w->split;
    run_job(*job, block0, block1, [&](const Call& call) {
        return call.tile->nibbles ? Nibbles::run : by_width[call.tile->width][split][bits];
    });
}

int32_t width_for(const fdk_weight* w, int64_t rows) {
    if (w->split) return rows == 1 ? 1 : 4;
    return rows == 1 ? 1 : rows == 2 ? 2 : rows <= 4 ? 4 : 8;
}

void pack(const fdk_weight* w, const void* x, int32_t rows, int32_t width, void* dst, float* sums, float* nibbles) {
    if (nibbles) Nibbles::prepare(*w, (const uint8_t*)x, nibbles);
    pack_floats<Avx512>(*w, (const uint8_t*)x, rows, width, nibbles ? nullptr : (float*)dst, sums);
}

const fdk_ops ops = {0, linear, dequantise_blocks<Avx512>, width_for, pack, Nibbles::size};

}  // namespace

const fdk_ops* fdk_ops_avx512(void) { return &ops; }
