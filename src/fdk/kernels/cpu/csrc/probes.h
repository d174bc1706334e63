// What the machine can do at most, for benchmarks.
#pragma once
#include "codes.h"

namespace {

template <class I>
uint64_t read_lines(const void* p, int64_t size) {
    typename I::vi seen[4] = {I::zero_words(), I::zero_words(), I::zero_words(), I::zero_words()};
    const uint8_t* at = (const uint8_t*)p;
    for (int64_t i = 0; i + 256 <= size; i += 256, at += 256)
        unroll<0, 4>([&](auto n) FDK_LAMBDA {
            constexpr int line = decltype(n)::value;
            I::prefetch(at + 64 * line + 2048);
            unroll<0, 16 / I::W>([&](auto h) FDK_LAMBDA {
                seen[line] = I::or_and(seen[line], I::load(at + 64 * line + 4 * I::W * decltype(h)::value), 0xffffffffu);
            });
        });
    for (int n = 1; n < 4; n++) seen[0] = I::or_and(seen[0], seen[n], 0xffffffffu);
    uint64_t first;
    memcpy(&first, &seen[0], 8);
    return first;
}

// Independent chains, as many as hide the latency, on the operands in sink :: [16]; returns the operations of one step.
template <class Path>
int64_t multiply_chains(int64_t steps, float* sink) {
    typedef typename Path::I I;
    uint32_t panel[2 * FDK_ROWS], x[2 * 12];
    for (int i = 0; i < 2 * FDK_ROWS; i++) memcpy(&panel[i], &sink[i % FDK_ROWS], 4);
    for (int i = 0; i < 2 * 12; i++) memcpy(&x[i], &sink[i % FDK_ROWS], 4);
    typename I::vf acc[12];
    for (int i = 0; i < 12; i++) acc[i] = I::zero();
    for (int64_t s = 0; s < steps; s++) Path::template multiply<1, 12, 0>(panel, x, acc);
    for (int i = 1; i < 12; i++) acc[0] = I::add(acc[0], acc[i]);
    I::keep(sink, acc[0]);
    return 12 * 2 * 2 * I::W * Path::pairs_per_step;
}

}  // namespace
