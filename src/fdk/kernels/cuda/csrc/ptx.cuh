// Thin wrappers around the PTX that the kernels use. No CUDA headers, so that NVRTC needs nothing but these files.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct __align__(16) u32x4 {
    u32 x, y, z, w;
};
struct __align__(8) u32x2 {
    u32 x, y;
};
struct __align__(16) f32x4 {
    float x, y, z, w;
};
struct __align__(8) f32x2 {
    float x, y;
};

#if __CUDA_ARCH__ >= 900
#define FDK_HOPPER 1
#else
#define FDK_HOPPER 0
#endif

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Any function of three words, by its values for a, b, c = 0xf0, 0xcc, 0xaa. Left to itself the compiler makes two
// instructions of a choice between two words, because it sees two constants in it.
template <int FUNCTION>
__device__ __forceinline__ u32 combine(u32 a, u32 b, u32 c) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(FUNCTION));
    return d;
}
constexpr int CHOOSE = 0xe4;        // (a & c) | (b & ~c)
constexpr int MASK_OR = 0xea;       // (a & b) | c
constexpr int NOT_MASK_OR = 0xae;   // (~a & b) | c
constexpr int MASK_XOR = 0x6a;      // (a & b) ^ c

// The larger of two halves each, as unsigned integers.
__device__ __forceinline__ u32 larger_halves(u32 a, u32 b) {
#if FDK_HOPPER
    u32 d;
    asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
#else
    const u32 low = max(a & 0xffffu, b & 0xffffu);
    return low | max(a & 0xffff0000u, b & 0xffff0000u);
#endif
}

// --- 16-bit floats ---------------------------------------------------------------------------------------------

template <bool BF16>
__device__ __forceinline__ float low_half(u32 pair) {
    if constexpr (BF16) return __uint_as_float(pair << 16);
    float value;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(value) : "r"(pair));
    return value;
}

template <bool BF16>
__device__ __forceinline__ float high_half(u32 pair) {
    if constexpr (BF16) return __uint_as_float(pair & 0xffff0000u);
    float value;
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(pair));
    return value;
}

template <bool BF16>
__device__ __forceinline__ u16 round_half(float value) {
    u16 half;
    if constexpr (BF16)
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
    else
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}

// Two floats as a pair, the first in the low half.
template <bool BF16>
__device__ __forceinline__ u32 round_pair(float low, float high) {
    u32 pair;
    if constexpr (BF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// a - b of pairs.
template <bool BF16>
__device__ __forceinline__ u32 subtract_pair(u32 a, u32 b) {
    u32 d;
    if constexpr (BF16)
        asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    else
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// --- tensor cores ----------------------------------------------------------------------------------------------

// d[16 x 8] += a[16 x 16] b[16 x 8]; lane 4g+t holds rows g, g+8 and columns 2t, 2t+1 of d.
template <bool BF16>
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with k = 32 and half of a's columns left out: of each four, two are kept, in the registers that a dense a[16 x 16] has.
// Where they belong say 2 bits each of `indices`, two that should differ a nibble: rows g in the low half of the word,
// rows g + 8 in the high one, columns 0 to 15 in lanes 4g + 2 PAIR, columns 16 to 31 in lanes 4g + 2 PAIR + 1. b as in four
// registers of a lane, here all the same: rows 2t, 2t+1 of each eight.
template <bool BF16, int PAIR>
__device__ __forceinline__ void mma_sparse(float (&d)[4], const u32 (&a)[4], u32 b, u32 indices) {
    if constexpr (BF16)
        asm("mma.sp.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%8,%8,%8}, {%0,%1,%2,%3}, %9, %10;"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(indices), "n"(PAIR));
    else
        asm("mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%8,%8,%8}, {%0,%1,%2,%3}, %9, %10;"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(indices), "n"(PAIR));
}

// Four 8 x 8 matrices of halves; lane i names row i % 8 of matrix i / 8, and gets columns 2t, 2t+1 of row g of each.
__device__ __forceinline__ void load_matrices(u32& a, u32& b, u32& c, u32& d, u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "r"(row)
                 : "memory");
}

// The A operand of m16n8k16 to 16 rows of 32 bytes, `stride` bytes apart.
__device__ __forceinline__ void store_matrices(char* to, int stride, int lane, const u32 (&a)[4]) {
#if FDK_HOPPER
    const u32 row = shared_address(to) + lane % 16 * stride + lane / 16 * 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
                 : "memory");
#else
    for (int i = 0; i < 4; ++i) *reinterpret_cast<u32*>(to + (lane / 4 + i % 2 * 8) * stride + i / 2 * 16 + lane % 4 * 4) = a[i];
#endif
}

// --- global memory ---------------------------------------------------------------------------------------------

__device__ __forceinline__ u64 evict_first_policy() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// 16 bytes from global to shared memory, past L1; weights are read once, so L2 drops them first.
__device__ __forceinline__ void copy_async(u32 to, const void* from, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy) : "memory");
}

__device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --- bulk copies with a barrier that counts their bytes (Hopper) --------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals = 1) {
#if FDK_HOPPER
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}

// True for one lane of a warp whose lanes are all here.
__device__ __forceinline__ bool elected() {
    u32 yes = 1;
#if FDK_HOPPER
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(yes));
#endif
    return yes != 0;
}

// Makes the initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
#if FDK_HOPPER
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// racecheck takes an arrival to speak for its own thread alone, whatever has brought the warp together before it. With
// FDK_ALL_ARRIVE, for its sake, each lane arrives (tests/kernels/cuda/sanitize.py).
#ifdef FDK_ALL_ARRIVE
constexpr int ARRIVALS = 32;
#else
constexpr int ARRIVALS = 1;  // of a warp
#endif

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
#if FDK_HOPPER
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
#if FDK_HOPPER
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again%=;\n"
        "}" ::"r"(barrier), "r"(parity) : "memory");
#endif
}

// Loads from shared memory that are still in flight are not ordered against the copy engine's writes: without this,
// refilling a stage right behind its loads now and then replaced what the last of them was to read.
__device__ __forceinline__ void order_before_bulk_copies() {
#if FDK_HOPPER
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// `bytes`, a multiple of 16, from global to shared memory; weights are read once, so L2 drops them first.
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
#if FDK_HOPPER
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
#endif
}

// The same for what is read by many CTAs.
__device__ __forceinline__ void copy_bulk_shared(u32 to, const void* from, u32 bytes, u32 barrier) {
#if FDK_HOPPER
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
#endif
}

// Plain loads that stay behind the dependency wait: activations may come from the kernel before.
__device__ __forceinline__ u32x2 load_8(const void* from) {
    u32x2 v;
    asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ u32 load_4(const void* from) {
    u32 v;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ u16 load_2(const void* from) {
    u16 v;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(from) : "memory");
    return v;
}

// What kernels of the same chain rewrite: past L1, which may still hold what an earlier kernel read.
__device__ __forceinline__ u16 load_latest_2(const void* from) {
    u16 v;
    asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(v) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ float load_latest_float(const void* from) {
    float v;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(from) : "memory");
    return v;
}

__device__ __forceinline__ u32x4 stream_16(const void* from, u64 policy) {
    u32x4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from), "l"(policy));
    return v;
}

// --- programmatic dependent launch -----------------------------------------------------------------------------

// Until this returns nothing may be written to global memory, nor read if the kernel before may have written it.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if FDK_HOPPER
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if FDK_HOPPER
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ u32 clock_low() {
    u32 clocks;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(clocks)::"memory");
    return clocks;
}

__device__ __forceinline__ void nap() { asm volatile("nanosleep.u32 100;" ::: "memory"); }

// All that a CTA without work does: it keeps its place for so many clocks behind the dependency wait. Given up early, the
// place would go to a CTA of the next launch, whose others then share one.
__device__ __forceinline__ void hold_place(u32 clocks) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const u32 begin = clock_low();
    while (clock_low() - begin < clocks) nap();
}

// Waits for the other warps that name the same barrier, 1 to 15; `threads` of them in all.
__device__ __forceinline__ void sync_some(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Has a value computed here, and not where it is used.
template <class T>
__device__ __forceinline__ void keep_ahead(T*& value) {
    asm volatile("" : "+l"(value));
}

// The value of a load, which the compiler shall not wait for earlier to convert it.
__device__ __forceinline__ u16 arrived(u16 value) {
    asm volatile("" : "+h"(value));
    return value;
}

// --- clusters --------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank = 0;
#if FDK_HOPPER
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

__device__ __forceinline__ void cluster_arrive() {
#if FDK_HOPPER
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// For CTAs that have nothing to show each other yet but initialised barriers: no wait for memory, unlike the above.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if FDK_HOPPER
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if FDK_HOPPER
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Store to the same shared-memory address in CTA `rank` of the cluster, counted by the barrier at that address there.
__device__ __forceinline__ void store_counted(u32 address, u32 barrier, u32 rank, f32x4 v) {
#if FDK_HOPPER
    u32 to, counted;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(address), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counted) : "r"(barrier), "r"(rank));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(to), "f"(v.x),
                 "f"(v.y), "f"(v.z), "f"(v.w), "r"(counted)
                 : "memory");
#endif
}

// Store to the same shared-memory address in CTA `rank` of the cluster.
__device__ __forceinline__ void store_remote(u32 address, u32 rank, f32x4 v) {
#if FDK_HOPPER
    u32 remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(remote), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
#endif
}
