// Scalar conversions, round to nearest even, in portable C++. Internal linkage: each unit has its own flags.
#pragma once
#include <string.h>

#include "fdk_cpu.h"

namespace {

FDK_INLINE uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

FDK_INLINE float float_of(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

FDK_INLINE float from_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }

FDK_INLINE uint16_t to_bf16(float f) {
    uint32_t u = bits_of(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40);  // keep a NaN a NaN
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

FDK_INLINE float from_fp16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000u | ((rest & 0x3ff) << 13));
    if (rest < 0x400) {  // subnormal: exact in float32 as an integer times 2^-24
        float f = (float)rest * 5.9604644775390625e-08f;
        return float_of(bits_of(f) | sign);
    }
    return float_of(sign | ((rest + 0x1c000u) << 13));
}

FDK_INLINE uint16_t to_fp16(float f) {
    uint32_t u = bits_of(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);  // rounds to 65536 or more
    if (a < 0x38800000u) {                                   // subnormal: adding 0.5 rounds to a multiple of 2^-24
        float r = float_of(a) + 0.5f;
        return (uint16_t)(sign | (bits_of(r) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1)) >> 13));
}

FDK_INLINE float load_float(const void* p, int64_t i, int dtype) {
    if (dtype == FDK_FP32) {
        float f;
        memcpy(&f, (const uint8_t*)p + 4 * i, 4);
        return f;
    }
    uint16_t h;
    memcpy(&h, (const uint8_t*)p + 2 * i, 2);
    return dtype == FDK_BF16 ? from_bf16(h) : from_fp16(h);
}

FDK_INLINE void store_float(void* p, int64_t i, int dtype, float f) {
    if (dtype == FDK_FP32) {
        memcpy((uint8_t*)p + 4 * i, &f, 4);
        return;
    }
    uint16_t h = dtype == FDK_BF16 ? to_bf16(f) : to_fp16(f);
    memcpy((uint8_t*)p + 2 * i, &h, 2);
}

}  // namespace
