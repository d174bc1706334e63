// Thin wrappers around the PTX that only the prefill kernel uses.
#pragma once
#include "ptx.cuh"

namespace fdk {

// --- barriers in shared memory ---------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init_count(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier), "r"(rank) : "memory");
}

// Whether a phase is over, for all lanes of a warp.
__device__ __forceinline__ bool barrier_over(u32 barrier, u32 parity) {
    u32 over;
    asm volatile("{\n.reg .pred over;\nmbarrier.test_wait.parity.shared::cta.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
                 : "=r"(over) : "r"(barrier), "r"(parity) : "memory");
    return __all_sync(0xffffffffu, over);
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// --- barriers and registers of warpgroups ----------------------------------------------------------------------

__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers of this warpgroup's threads from here on: more than at the launch, or fewer.
template <int COUNT, bool MORE>
__device__ __forceinline__ void keep_registers() {
    if constexpr (MORE)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
    else
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// --- copies and sums through global memory ---------------------------------------------------------------------

// A box of x at (column, token) into shared memory; with a mask, to the same place in every CTA of it.
template <bool MULTICAST>
__device__ __forceinline__ void copy_box(u32 to, const void* map, int column, int token, u32 barrier, u16 mask) {
    if constexpr (MULTICAST)
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
            "l"(map), "r"(column), "r"(token), "r"(barrier), "h"(mask)
            : "memory");
    else
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                     "l"(map), "r"(column), "r"(token), "r"(barrier)
                     : "memory");
}

// Sums that wait in global memory past L1, which does not see what other multiprocessors write.
__device__ __forceinline__ f32x4 load_partial(const f32x4* from) {
    f32x4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ void set_flag(u32* flag, u32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ u32 read_flag(const u32* flag) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

// Between what threads write to global memory and what the copy engine reads of it.
__device__ __forceinline__ void global_copies_fence() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// --- pairs and tiles of 16-bit floats ------------------------------------------------------------------------

// a * b of pairs.
template <bool BF16>
__device__ __forceinline__ u32 multiply_pair(u32 a, u32 b) {
    u32 d;
    if constexpr (BF16)
        asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    else
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// Two tiles of 8 rows x 8 tokens, transposed: 8 rows of one token are contiguous. Lanes 0 to 15 name the tokens' places.
__device__ __forceinline__ void store_transposed(u32 to, u32 a, u32 b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}

}  // namespace fdk
