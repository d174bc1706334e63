// The streaming floor: what reading a weight's bytes costs when nothing is done with them. Same 16-byte loads, same
// launch mode as the product kernels (first loads before the dependency wait), one reduction, n outputs.
// Macros: FDK_BYTES (a multiple of 16), FDK_N, FDK_CTAS, FDK_THREADS, FDK_UNROLL.
#pragma once
#include "ptx.cuh"

namespace fdk {

constexpr i64 PIECES = i64(FDK_BYTES) / 16;
constexpr int N = FDK_N, CTAS = FDK_CTAS, THREADS = FDK_THREADS, UNROLL = FDK_UNROLL;

struct Params {
    const char* data;  // [FDK_BYTES]
    u16* out;          // [N]
};

extern "C" __global__ void __launch_bounds__(THREADS) fdk_stream(const __grid_constant__ Params p) {
    __shared__ u32 sums[THREADS / 32];
    constexpr i64 STRIDE = i64(CTAS) * THREADS;
    i64 at = i64(blockIdx.x) * THREADS + threadIdx.x;
    const u64 policy = evict_first_policy();
    u32x4 v[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i)
        v[i] = at + i * STRIDE < PIECES ? stream_16(p.data + (at + i * STRIDE) * 16, policy) : u32x4{};
    let_next_kernel_start();
    wait_for_previous_kernel();
    u32 sum = 0;
    for (at += UNROLL * STRIDE; at < PIECES; at += UNROLL * STRIDE) {
        // Each register is refilled as soon as it is used, so UNROLL loads stay in flight.
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            sum += v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
            v[i] = at + i * STRIDE < PIECES ? stream_16(p.data + (at + i * STRIDE) * 16, policy) : u32x4{};
        }
    }
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) sum += v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    sum = __reduce_add_sync(0xffffffffu, sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < THREADS / 32; ++i) sum += sums[i];
    for (int n = blockIdx.x * THREADS + threadIdx.x; n < N; n += CTAS * THREADS) p.out[n] = u16(sum);
}

}  // namespace fdk
