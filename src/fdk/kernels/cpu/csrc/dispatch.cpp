// Chooses the instruction set, packs activations, runs the parallel region. The only unit that knows about threads.
#include <pthread.h>
#include <stdlib.h>

#include "scalar.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__APPLE__)
#include <dispatch/dispatch.h>
#include <sys/sysctl.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#include <sys/prctl.h>
#endif

namespace {

const int64_t MOST_TILES = FDK_CHUNK / 4 + 2;  // the narrowest tiles of many rows have 4
const int64_t SHARE = 8;  // blocks taken at a time where threads share them out as they go

// missing(isa): why this machine cannot run the kernels of an instruction set, or null if it can.
#if defined(__x86_64__)
bool has(int isa) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
    const bool avx = c & bit_AVX, fma = c & bit_FMA, f16c = c & bit_F16C;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool avx2 = b & (1u << 5), f = b & (1u << 16), dq = b & (1u << 17), bw = b & (1u << 30), vl = b & (1u << 31);
    const bool vbmi = (c & (1u << 1)) && (c & (1u << 6));  // and VBMI2
    const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6;  // registers the operating system saves
    if (isa == FDK_AVX2) return ymm && avx && fma && f16c && avx2;
    const bool avx512 = zmm && avx2 && fma && f16c && f && dq && bw && vl;
    if (isa == FDK_AVX512) return avx512;
    if (a < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
    return avx512 && vbmi && (a & (1u << 5));
}
const char* missing(int isa) {
    if (isa == FDK_GENERIC || ((isa == FDK_AVX2 || isa == FDK_AVX512 || isa == FDK_AVX512BF16) && has(isa))) return nullptr;
    return isa < FDK_NEON ? "the processor or the operating system lacks these instructions" : "it belongs to ARM";
}
#elif defined(__aarch64__) && defined(__APPLE__)
const char* missing(int isa) {
    int bf16 = 0;
    size_t size = sizeof bf16;
    if (isa == FDK_GENERIC || isa == FDK_NEON) return nullptr;
    if (isa == FDK_SVE) return "macOS offers no SVE";
    if (isa != FDK_NEONBF16) return "it belongs to x86";
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &bf16, &size, nullptr, 0) == 0 && bf16
               ? nullptr : "the processor has no bf16 instructions";
}
#elif defined(__aarch64__)
// Bits of the auxiliary vector and of prctl that headers of older systems lack.
const unsigned long SVE = 1ul << 22, SVE_BF16 = 1ul << 12, NEON_BF16 = 1ul << 14;
const int GET_SVE_LENGTH = 51;
int sve_bits() { return (getauxval(AT_HWCAP) & SVE) ? (prctl(GET_SVE_LENGTH) & 0xffff) * 8 : 0; }

const char* missing(int isa) {
    const unsigned long more = getauxval(AT_HWCAP2);
    const int bits = sve_bits();
    switch (isa) {
        case FDK_GENERIC:
        case FDK_NEON: return nullptr;
        case FDK_NEONBF16: return more & NEON_BF16 ? nullptr : "the processor has no bf16 instructions";
        case FDK_SVE:
            if (!bits) return "the processor has no SVE";
            if (!(more & SVE_BF16)) return "its SVE has no bf16 instructions";
            return bits == 128 || bits == 256 || bits == 512 ? nullptr : "its SVE vectors are not of 128, 256 or 512 bits";
        default: return "it belongs to x86";
    }
}
#else
const char* missing(int isa) { return isa == FDK_GENERIC ? nullptr : "it belongs to another architecture"; }
#endif

const fdk_ops* ops_of(int isa) {
    switch (isa) {
        case FDK_GENERIC: return fdk_ops_generic();
#if defined(__x86_64__)
        case FDK_AVX2: return fdk_ops_avx2();
        case FDK_AVX512: return fdk_ops_avx512();
        case FDK_AVX512BF16: return fdk_ops_avx512bf16();
#elif defined(__aarch64__)
        case FDK_NEON: return fdk_ops_neon();
        case FDK_NEONBF16: return fdk_ops_neonbf16();
#if !defined(__APPLE__)
        case FDK_SVE: return sve_bits() == 128 ? fdk_ops_sve128() : sve_bits() == 256 ? fdk_ops_sve256() : fdk_ops_sve512();
#endif
#endif
        default: return nullptr;
    }
}

const fdk_ops* current;
int current_isa = -1;

// GOMP_parallel and friends of the runtime torch loaded: a second OpenMP runtime would fight it for the cores.
typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);
GompParallel gomp_parallel;
int (*omp_thread_num)(void);
int (*omp_num_threads)(void);

struct Region {
    void (*fn)(void*, int64_t, int64_t);
    void* context;
};

#if defined(__APPLE__)
// Two OpenMP runtimes in one process crash on macOS, so its own threads are used. Untested.
struct Applied {
    void (*fn)(void*, int64_t, int64_t);
    void* context;
    int64_t parts;
};
void applied_part(void* p, size_t part) {
    const Applied* a = (const Applied*)p;
    a->fn(a->context, (int64_t)part, a->parts);
}
bool has_threads() { return true; }
#else
void region_entry(void* p) {
    const Region* r = (const Region*)p;
    r->fn(r->context, omp_thread_num(), omp_num_threads());
}
bool has_threads() { return gomp_parallel; }
#endif

// Scratch for packed activations, one growing buffer per calling thread, freed when the thread ends.
pthread_key_t scratch_key;
pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
__thread void* scratch;
__thread size_t scratch_size;

void make_key(void) { pthread_key_create(&scratch_key, free); }

void* scratch_of(size_t size) {
    if (size <= scratch_size) return scratch;
    pthread_once(&scratch_once, make_key);
    free(scratch);
    scratch_size = 0;
    if (posix_memalign(&scratch, 64, size)) scratch = nullptr;
    else scratch_size = size;
    pthread_setspecific(scratch_key, scratch);
    return scratch;
}

struct Run {
    fdk_job job;
    fdk_plan plan;
    fdk_tile tiles[MOST_TILES];
    const uint8_t* x;    // row 0 of the chunk
    uint8_t* workspace;  // plan.workspace bytes for each thread
    int64_t next;        // first block that no thread has taken yet
};

void pack_part(void* context, int64_t part, int64_t parts) {
    const Run& r = *(const Run*)context;
    for (int64_t t = r.job.tiles_count * part / parts; t < r.job.tiles_count * (part + 1) / parts; t++) {
        const fdk_tile& tile = r.tiles[t];
        const uint8_t* x = r.x + (tile.row - r.tiles[0].row) * r.job.w->k * r.job.w->scale_bytes;
        current->pack(r.job.w, &r.plan, x, &tile);
    }
}

// Few rows are limited by memory: every thread reads one stretch of it, in order.
void linear_part(void* context, int64_t part, int64_t parts) {
    const Run& r = *(const Run*)context;
    current->linear(&r.job, r.job.w->blocks * part / parts, r.job.w->blocks * (part + 1) / parts,
                    r.workspace + part * r.plan.workspace);
}

// Many rows are limited by arithmetic: threads take blocks as they go, so that a core that is shared with other work
// does not keep the others waiting. A block's result does not depend on who computes it.
void linear_share(void* context, int64_t part, int64_t) {
    Run& r = *(Run*)context;
    const int64_t blocks = r.job.w->blocks;
    for (;;) {
        const int64_t first = __atomic_fetch_add(&r.next, SHARE, __ATOMIC_RELAXED);
        if (first >= blocks) return;
        const int64_t end = first + SHARE < blocks ? first + SHARE : blocks;
        current->linear(&r.job, first, end, r.workspace + part * r.plan.workspace);
    }
}

struct Rows {
    const fdk_weight* w;
    uint8_t* out;
    int64_t block0, block1;
};

int64_t row_of(const fdk_weight* w, int64_t block) {
    const fdk_range* r = w->ranges;
    while (r < w->ranges + w->ranges_count - 1 && block >= r->block1) r++;
    int64_t row = r->row0 + (block - r->block0) * FDK_ROWS;
    return row < r->row1 ? row : r->row1;
}

void dequantise_part(void* context, int64_t part, int64_t parts) {
    const Rows& r = *(const Rows*)context;
    const int64_t count = r.block1 - r.block0, b0 = r.block0 + count * part / parts, b1 = r.block0 + count * (part + 1) / parts;
    const int64_t rows = row_of(r.w, b0) - row_of(r.w, r.block0);
    current->dequantise(r.w, r.out + rows * r.w->k * r.w->scale_bytes, b0, b1);
}

int64_t round_up(int64_t v) { return (v + 63) / 64 * 64; }

// Tiles are often a power of two bytes long; one behind the other they would share a few sets of the caches.
const int64_t STAGGER = 4096 + 64;

int64_t x_size(const Run& r, const fdk_tile& tile, bool packed) {
    return packed ? round_up(tile.width * r.job.w->k_padded * (r.plan.bf16_pairs ? 2 : 4)) : 0;
}

}  // namespace

extern "C" void fdk_parallel(void (*fn)(void*, int64_t, int64_t), void* context, int32_t threads) {
    if (threads <= 1 || !has_threads()) {
        fn(context, 0, 1);
        return;
    }
#if defined(__APPLE__)
    Applied a = {fn, context, threads};
    dispatch_apply_f((size_t)threads, dispatch_get_global_queue(QOS_CLASS_USER_INITIATED, 0), &a, applied_part);
#else
    Region r = {fn, context};
    gomp_parallel(region_entry, &r, (unsigned)threads, 0);
#endif
}

FDK_EXPORT int32_t fdk_abi(void) { return FDK_ABI; }

// The digest of the sources this library was built from, as build.py computes it.
FDK_EXPORT const char* fdk_sources(void) { return FDK_SOURCES; }

// Why an instruction set cannot be used on this machine, or null if it can.
FDK_EXPORT const char* fdk_isa_missing(int32_t isa) {
    return isa < FDK_GENERIC || isa >= FDK_ISAS ? "there is no such instruction set" : missing(isa);
}

FDK_EXPORT int32_t fdk_isa_available(int32_t isa) { return !fdk_isa_missing(isa); }

// The instruction set to use where nobody asks for one. SVE of 128 bits does what NEON does in more instructions.
FDK_EXPORT int32_t fdk_preferred_isa(void) {
    int32_t best = FDK_GENERIC;
    for (int32_t isa = 0; isa < FDK_ISAS; isa++)
        if (fdk_isa_available(isa)) best = isa;
#if defined(__aarch64__) && !defined(__APPLE__)
    if (best == FDK_SVE && sve_bits() == 128) best = FDK_NEONBF16;
#endif
    return best;
}

// Returns the instruction set in use, or -1 and changes nothing if this one is not available.
FDK_EXPORT int32_t fdk_use_isa(int32_t isa) {
    if (!fdk_isa_available(isa)) return -1;
    current = ops_of(isa);
    return current_isa = isa;
}

FDK_EXPORT int32_t fdk_current_isa(void) { return current_isa; }

// Products of more bf16 rows than this may round scaled weights; -1: none do.
FDK_EXPORT int64_t fdk_exact_rows(void) { return current_isa == FDK_AVX512BF16 ? FDK_EXACT_ROWS : -1; }

FDK_EXPORT void fdk_use_openmp(void* parallel, void* thread_num, void* num_threads) {
    gomp_parallel = (GompParallel)parallel;
    omp_thread_num = (int (*)(void))thread_num;
    omp_num_threads = (int (*)(void))num_threads;
}

// x :: [m, k], bias :: [n] or null, out :: [m, n], all of the weight's dtype. Returns 0, or -1 if out of memory.
FDK_EXPORT int32_t fdk_linear(const fdk_weight* w, const void* x, const void* bias, void* out, int64_t m,
                              int32_t threads) {
    // Waking a thread costs about as much as 64 KiB of weights or a million products.
    if (w->blocks * w->block_bytes < 64 * 1024 && m * w->n * w->k < (1 << 20)) threads = 1;
    if (threads > w->blocks) threads = (int32_t)w->blocks;
    if (threads < 1 || !has_threads()) threads = 1;
    Run r;
    for (int64_t row = 0; row < m; row += r.plan.rows) {
        current->plan(w, m - row, &r.plan);
        if (r.plan.rows > m - row) r.plan.rows = m - row;
        const int64_t rows = r.plan.rows;
        r.job.w = w, r.job.plan = &r.plan, r.job.tiles = r.tiles, r.job.bias = bias, r.job.out = out;
        r.x = (const uint8_t*)x + row * w->k * w->scale_bytes;
        // One row that already is what the kernel reads is used where it lies.
        const bool as_is = r.plan.bf16_pairs || w->dtype == FDK_FP32;
        const bool packed = !(rows == 1 && r.plan.width == 1 && as_is && w->k == w->k_padded) &&
                            r.plan.algorithm != FDK_NIBBLES && r.plan.algorithm != FDK_SPARSE_ROWS;
        const bool summed = w->zero_bytes && w->storage != FDK_SPARSE && r.plan.algorithm != FDK_SCALED_PANELS;
        const int64_t sums_size = summed ? w->supers * (w->split ? 2 : 1) * (int64_t)sizeof(float) : 0;
        int64_t size = 0;
        r.job.tiles_count = 0;
        for (int64_t at = 0; at < rows;) {
            fdk_tile& t = r.tiles[r.job.tiles_count++];
            t.width = r.job.tiles_count <= r.plan.wide_tiles ? r.plan.width : r.plan.rest_width;
            t.row = row + at;
            t.rows = (int32_t)(rows - at < t.width ? rows - at : t.width);
            at += t.rows;
            size += x_size(r, t, packed) + round_up(t.width * sums_size) + STAGGER;
        }
        const int64_t workspace = round_up(r.plan.workspace);
        uint8_t* memory = (uint8_t*)scratch_of(64 + size + threads * workspace);
        if (!memory) return -1;
        r.plan.workspace = workspace;
        r.workspace = memory;
        memory += threads * workspace;
        for (int64_t i = 0; i < r.job.tiles_count; i++) {
            fdk_tile& t = r.tiles[i];
            t.x = packed ? memory : nullptr;
            memory += x_size(r, t, packed);
            t.sums = sums_size ? (float*)memory : nullptr;
            memory += round_up(t.width * sums_size) + STAGGER;
        }
        if (packed || sums_size) fdk_parallel(pack_part, &r, rows * w->k < (1 << 16) ? 1 : threads);
        if (!packed) r.tiles[0].x = (void*)r.x;
        r.next = 0;
        fdk_parallel(rows > 8 ? linear_share : linear_part, &r, threads);
    }
    return 0;
}

// out :: [rows of blocks block0 .. block1, k] of the weight's dtype.
FDK_EXPORT void fdk_dequantise(const fdk_weight* w, void* out, int64_t block0, int64_t block1, int32_t threads) {
    Rows r = {w, (uint8_t*)out, block0, block1};
    if (threads > block1 - block0) threads = (int32_t)(block1 - block0);
    fdk_parallel(dequantise_part, &r, threads);
}

namespace {

struct Probe {
    const uint8_t* p;
    int64_t size;
    int32_t dtype;
    int64_t steps, operations;
};

void read_part(void* context, int64_t part, int64_t parts) {
    Probe& probe = *(Probe*)context;
    const int64_t lines = probe.size / 256, from = lines * part / parts, to = lines * (part + 1) / parts;
    volatile uint64_t seen = current->read(probe.p + 256 * from, 256 * (to - from));
    (void)seen;
}

void multiply_part(void* context, int64_t part, int64_t parts) {
    Probe& probe = *(Probe*)context;
    float sink[FDK_ROWS] = {0};
    const int64_t operations = current->multiply(probe.dtype, probe.steps, sink);
    if (part == 0) probe.operations = operations * parts;
}

}  // namespace

// Probes for benchmarks. Reads size bytes once, split over the threads.
FDK_EXPORT void fdk_read(const void* p, int64_t size, int32_t threads) {
    Probe probe = {(const uint8_t*)p, size, 0, 0, 0};
    fdk_parallel(read_part, &probe, threads);
}

// Multiply-adds from registers and first-level cache, as the kernels use for this dtype; returns the floating-point
// operations that were done.
FDK_EXPORT int64_t fdk_multiply(int32_t dtype, int64_t steps, int32_t threads) {
    Probe probe = {nullptr, 0, dtype, steps, 0};
    fdk_parallel(multiply_part, &probe, threads);
    return probe.operations * steps;
}
