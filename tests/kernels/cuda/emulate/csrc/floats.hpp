// 16-bit floats: bfloat16 and IEEE half precision, with one rounding to nearest even.
#pragma once
#include <cmath>
#include "machine.hpp"

namespace emulator {

inline u32 bits_of(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float float_of(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

struct Bf16 {
    static float widen(u32 half) { return float_of(half << 16); }
    static u32 narrow(float value) {
        const u32 bits = bits_of(value);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
};

struct F16 {
    static float widen(u32 half) {
        const u32 sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
        if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
        return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
    }
    static u32 narrow(float value) {
        const u32 bits = bits_of(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
        if (rest > 0x7f800000u) return 0x7fff;
        if (rest >= 0x477ff000u) return sign | 0x7c00u;
        // Below the normal range the sum with one half has just the bits that a half has.
        if (rest < 0x38800000u) return sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000u);
        return sign | (rest + 0xc8000fffu + (rest >> 13 & 1)) >> 13;
    }
};

// To float so that another rounding to fewer bits gives what one rounding would: to odd where it is not exact.
inline float to_odd(double value) {
    const float nearest = float(value);
    if (double(nearest) == value || !std::isfinite(nearest) || (bits_of(nearest) & 1)) return nearest;
    return std::nextafterf(nearest, value > nearest ? INFINITY : -INFINITY);
}

}  // namespace emulator
