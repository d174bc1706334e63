// 16:32 sparse weights on any instruction set: kept values are scattered into panels, one by one. The bytes are described
// in fdk_cpu.h.
#pragma once
#include "dequantise.h"
#include "nested.h"
#include "panels.h"

namespace {

// Row r of a unit: which of its 32 weights are kept, and their codes, 4 bits each, in order.
struct Kept {
    uint32_t mask;
    uint64_t codes;
    FDK_INLINE Kept(const uint8_t* unit, int row) {
        memcpy(&mask, unit + 4 * row, 4);
        memcpy(&codes, unit + 64 + 8 * row, 8);
    }
    // visit(position, code) for every kept weight.
    template <class Visit>
    FDK_INLINE void each(Visit&& visit) const {
        uint64_t left = codes;
        for (uint32_t m = mask; m; m &= m - 1, left >>= 4) visit(__builtin_ctz(m), (int)(left & 15));
    }
};

const int64_t SPARSE_UNIT = 192;

// Zero of a row, relative to what the values of the range have already taken off.
FDK_INLINE float zero_of(const fdk_weight& w, const uint8_t* zeros, int row) {
    if (!w.zero_bytes) return 0;
    return w.family == FDK_UINT_U8 ? (float)zeros[row] - (float)(1 << (w.bits - 1)) : load_float(zeros, row, w.dtype);
}

// As Panels::expand, with the zeros taken off.
template <class Path>
void expand_sparse(const fdk_weight& w, const fdk_range& range, const uint8_t* super, int64_t supers, uint32_t* panel) {
    constexpr int WORDS = Path::words_per_pair;
    for (int64_t s = 0; s < supers; s++, super += w.super_bytes) {
        const uint8_t *zeros = super + FDK_ROWS * w.scale_bytes, *unit = zeros + FDK_ROWS * w.zero_bytes;
        for (int64_t u = 0; u < w.units; u++, unit += SPARSE_UNIT, panel += 16 * WORDS * FDK_ROWS) {
            memset(panel, 0, 16 * WORDS * FDK_ROWS * 4);
            for (int r = 0; r < (int)FDK_ROWS; r++) {
                const float zero = zero_of(w, zeros, r);
                Kept(unit, r).each([&](int k, int code) FDK_LAMBDA {
                    const float value = range.value[code] - zero;
                    if constexpr (WORDS == 1) ((uint16_t*)panel)[(k / 2 * FDK_ROWS + r) * 2 + k % 2] = to_bf16(value);
                    else memcpy(panel + k * FDK_ROWS + r, &value, 4);
                });
            }
            Path::arrange(panel);
        }
    }
}

template <class Path>
void sparse_linear(const fdk_job& job, int64_t block0, int64_t block1, void* workspace,
                   const typename Panels<Path>::Tile* tiles) {
    static const typename Panels<Path>::ExpandFn expand[9] = {nullptr, nullptr, nullptr, nullptr, expand_sparse<Path>};
    run_panels<Path>(job, block0, block1, workspace, tiles, expand);
}

void dequantise_sparse(const fdk_weight& w, uint8_t* out, int64_t block0, int64_t block1) {
    for (int64_t b = block0; b < block1; b++) {
        const fdk_range* range = range_of(w, b);
        const int64_t left = range->row1 - range->row0 - (b - range->block0) * FDK_ROWS;
        const int rows = left < FDK_ROWS ? (int)left : (int)FDK_ROWS;
        const uint8_t* super = w.data + b * w.block_bytes;
        memset(out, 0, rows * w.k * w.scale_bytes);
        for (int64_t s = 0; s < w.supers; s++, super += w.super_bytes) {
            const uint8_t *zeros = super + FDK_ROWS * w.scale_bytes, *units = zeros + FDK_ROWS * w.zero_bytes;
            for (int r = 0; r < rows; r++) {
                const float scale = load_float(super, r, w.dtype), zero = zero_of(w, zeros, r);
                for (int64_t u = 0; u < w.units; u++) {
                    uint8_t* at = out + (r * w.k + (s * w.units + u) * FDK_UNIT) * w.scale_bytes;
                    Kept(units + u * SPARSE_UNIT, r).each([&](int k, int code) FDK_LAMBDA {
                        store_float(at, k, w.dtype, scale * (range->value[code] - zero));
                    });
                }
            }
        }
        out += rows * w.k * w.scale_bytes;
    }
}

template <class I>
void dequantise_any(const fdk_weight* w, void* out, int64_t block0, int64_t block1) {
    if (block0 >= block1) return;
    if (w->storage == FDK_SPARSE) dequantise_sparse(*w, (uint8_t*)out, block0, block1);
    else if (w->storage == FDK_NESTED_PLANES) dequantise_nested<I>(*w, (uint8_t*)out, block0, block1);
    else dequantise_blocks<I>(w, out, block0, block1);
}

}  // namespace
