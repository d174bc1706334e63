// The activations of a CTA's slice of k on their way into shared memory, as they lie in memory.
#pragma once
#include "epilogue.cuh"

namespace fdk {

constexpr bool BULK_X = FDK_HOPPER && K % 64 == 0 && !OWN_X;
constexpr bool IDLE_WARPS = false;                            // while others bring activations
constexpr bool X_MEANWHILE = BULK_X && !SUMS && PHASES == 1;  // nobody waits for activations before the products
static_assert(X_BUFFERS == 1 || BULK_X, "only bulk copies arrive meanwhile");

__device__ __forceinline__ u32 x_barrier(const char* smem, int phase, int k_warp, int chunk) {
    return shared_address(smem) + Smem::BARRIERS + Smem::X_BARRIERS + ((phase % X_BUFFERS * K_WARPS + k_warp) * X_CHUNKS + chunk) * 8;
}

static_assert(!INTERLEAVED || (BULK_X && !SUMS), "nobody else needs activations by slices of a warp");
constexpr int X_WARPS = INTERLEAVED ? WARPS : ROW_WARPS;  // that bring a piece

// Pieces that a warp asks for before the products; at the first unit of each it asks for another one.
constexpr int X_AHEAD = FDK_X_AHEAD > 0 && FDK_X_AHEAD < X_CHUNKS && BULK_X && !SUMS && PHASES == 1 && STEPS_PER_CTA == 1 ? FDK_X_AHEAD : X_CHUNKS;

// Tokens that there are; what lies in the places of others goes into sums that nobody writes. Asking for one of them again in
// their stead would send all CTAs to the same lines of the second-level cache.
__device__ __forceinline__ int tokens_here(const Params& p) { return M == 1 ? 1 : min(M, p.m); }

// Of STREAMED phases: how many are asked for ahead, the barrier of warps that are done with one, and a warp that asks for its
// tokens of one, of `busy` warps that do.
constexpr int PHASES_AHEAD = X_BUFFERS > 2 ? X_BUFFERS - 2 : 1;

__device__ __forceinline__ u32 done_barrier(const char* smem, int phase) { return x_barrier(smem, phase, 1, 0); }

__device__ __forceinline__ void ask_for_phase(const Params& p, char* smem, int phase, int cta_unit, int busy, int warp, int lane) {
    if (phase >= PHASES || warp >= M) return;
    if (phase >= X_BUFFERS) barrier_wait(done_barrier(smem, phase), (phase / X_BUFFERS + 1) % 2);
    const u32 barrier = x_barrier(smem, phase, 0, 0), to = shared_address(smem) + Smem::X + phase % X_BUFFERS * Smem::X_BUFFER;
    const int tokens = tokens_here(p);
    if (lane == 0) barrier_expect(barrier, max(0, tokens - warp + busy - 1) / busy * Smem::CTA_UNITS * 128);
    __syncwarp();
    const int token = lane * busy + warp;
    if (token < tokens)
        copy_bulk_shared(to + token * Smem::X_STRIDE, p.x + i64(token) * K + (cta_unit + phase * Smem::CTA_UNITS) * 64, Smem::CTA_UNITS * 128, barrier);
}

// Each warp of a slice of k brings some tokens of every piece, since a warp's copies are issued one by one; whoever multiplies
// waits for the pieces that he needs.
__device__ __forceinline__ void bring_piece(const Params& p, char* smem, int phase, int chunk, int first_unit, int units, int warp, int lane) {
    const int k_warp = INTERLEAVED ? 0 : warp % K_WARPS, which = INTERLEAVED ? warp : warp / K_WARPS;
    if (INTERLEAVED && M < WARPS && which >= M) return;
    const int first = INTERLEAVED ? 0 : units * k_warp / K_WARPS;
    const int count = INTERLEAVED ? Smem::CTA_UNITS / X_CHUNKS : (units * (k_warp + 1) / K_WARPS - first) / X_CHUNKS;
    const int tokens = tokens_here(p), mine = max(0, tokens - which + X_WARPS - 1) / X_WARPS;
    const u32 barrier = x_barrier(smem, phase, k_warp, chunk), to = shared_address(smem) + Smem::X + phase % X_BUFFERS * Smem::X_BUFFER;
    const int at = first + chunk * count;
    if (lane == 0) barrier_expect(barrier, mine * count * 128);
    __syncwarp();
#pragma unroll
    for (int base = 0; base < (M + X_WARPS - 1) / X_WARPS; base += 32) {
        const int token = (base + lane) * X_WARPS + which;
        if (token >= tokens) continue;
        copy_bulk_shared(to + token * Smem::X_STRIDE + at * 128, p.x + i64(token) * K + (first_unit + at) * 64, count * 128, barrier);
    }
}

// Before a warp multiplies unit `at` of its slice. Pieces are counted at compile time: a division here costs each unit more
// than the wait.
__device__ __forceinline__ void wait_for_activations(const Params& p, char* smem, int phase, int at, int cta_unit, int units, int warp, int lane) {
    if constexpr (!BULK_X || SUMS) return;
    constexpr int CHUNK = UNITS / (CLUSTER * PHASES * (INTERLEAVED ? 1 : K_WARPS) * X_CHUNKS);
    const int chunk = X_CHUNKS == 1 ? 0 : at / CHUNK;
    if (at != chunk * CHUNK) return;
    if constexpr (X_AHEAD < X_CHUNKS)
        if (chunk + X_AHEAD < X_CHUNKS) bring_piece(p, smem, phase, chunk + X_AHEAD, cta_unit, units, warp, lane);
    barrier_wait(x_barrier(smem, phase, INTERLEAVED ? 0 : warp % K_WARPS, chunk), phase / X_BUFFERS % 2);
}

// Activations of a share of few columns on their way through registers: one load a piece of four columns, with nothing to be
// worked out between the dependency wait and the first of them.
struct Activations {
    static constexpr int PIECES = (SHARE_UNITS * 16 + SHARE_THREADS - 1) / SHARE_THREADS;  // of a token, a thread
    // Several plain steps are long, and the compiler made their loop longer by it.
    static constexpr bool SHORT = STEPS_PER_CTA == 1 || SQUARES || GATED || RESIDUAL;
    static constexpr bool FIT = OWN_X && K % 64 == 0 && ((M * PIECES <= 8 && SHORT) || AHEAD);
    static constexpr bool WHOLE = EVEN_SHARES && SHARE_UNITS * 16 % SHARE_THREADS == 0;
    static constexpr int TOKENS = FIT ? M : 1, KEPT = FIT ? PIECES : 1;

    Share share;
    const u16* from[TOKENS];  // this thread's first piece
    u32x2 piece[TOKENS][KEPT];

    __device__ static __forceinline__ Activations of(const Params& p, int first_unit, int units, int warp, int lane) {
        Activations a = {Share::of(units, warp, lane), {}, {}};
        if constexpr (FIT) {
#pragma unroll
            for (int token = 0; token < M; ++token) {
                a.from[token] = p.x + (token < p.m ? token * K : 0) + (first_unit + a.share.first) * 64 + a.share.thread * 4;
                keep_ahead(a.from[token]);
            }
        }
        return a;
    }
    __device__ __forceinline__ bool has(int n) const { return WHOLE || share.thread + n * SHARE_THREADS < share.units * 16; }
    // Behind the dependency wait.
    __device__ __forceinline__ void load() {
#pragma unroll
        for (int token = 0; token < TOKENS; ++token)
#pragma unroll
            for (int n = 0; n < KEPT; ++n) piece[token][n] = has(n) ? load_8(from[token] + n * SHARE_THREADS * 4) : u32x2{};
    }
    __device__ __forceinline__ void store(char* smem, int warp) const {
        char* to = smem + Smem::X + share.first * 128 + share.thread * 8;
#pragma unroll
        for (int token = 0; token < TOKENS; ++token)
#pragma unroll
            for (int n = 0; n < KEPT; ++n)
                if (has(n)) *reinterpret_cast<u32x2*>(to + token * Smem::X_STRIDE + n * SHARE_THREADS * 8) = piece[token][n];
        share.sync(warp);
    }
};

// Activations of `units` units from `first_unit` on, to x[token][column], rows X_STRIDE bytes apart: one bulk copy per
// token and piece, through registers, or by hand with zeros past K. `busy` warps ask
// for later pieces themselves.
__device__ __forceinline__ void stage_activations(const Params& p, char* smem, Activations& x, Norms& norms, int phase, int first_unit, int units, int warp, int lane, bool busy = false) {
    [[maybe_unused]] char* to = smem + Smem::X + phase % X_BUFFERS * Smem::X_BUFFER;
    if constexpr (BULK_X) {
        const int pieces = busy ? X_AHEAD : X_CHUNKS;
#pragma unroll 1
        for (int chunk = 0; chunk < pieces; ++chunk) bring_piece(p, smem, phase, chunk, first_unit, units, warp, lane);
        if (phase == 0) norms.read(p, smem, warp, lane);
        if constexpr (SUMS)
            for (int i = 0; i < K_WARPS * X_CHUNKS; ++i) barrier_wait(x_barrier(smem, phase, 0, i), phase % 2);
    } else if constexpr (Activations::FIT) {
        x.load();
        norms.read(p, smem, warp, lane);
        x.store(smem, warp);
    } else {
        if (phase == 0) norms.read(p, smem, warp, lane);
        // Pieces of four columns per thread in flight.
        constexpr int MOST = (SHARE_UNITS * M * 16 + SHARE_THREADS - 1) / SHARE_THREADS, AHEAD = MOST < 8 ? MOST : 8;
        const Share share = Share::of(units, warp, lane);
        const int pieces = share.units * M * 16, row_pieces = max(16 * share.units, 1);
        for (int base = share.thread; base < pieces; base += AHEAD * SHARE_THREADS) {
            u32x2 piece[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                const int i = base + a * SHARE_THREADS, token = i / row_pieces;
                const int column = (first_unit + share.first) * 64 + i % row_pieces * 4;
                const u16* row = p.x + i64(token) * K;
                piece[a] = {};
                if (i >= pieces || token >= p.m) continue;
                if constexpr (K % 4 == 0) {
                    if (K % 64 == 0 || column < K) piece[a] = load_8(row + column);
                } else {
                    u32 e[4];
#pragma unroll
                    for (int q = 0; q < 4; ++q) e[q] = column + q < K ? load_2(row + column + q) : 0;
                    piece[a] = {e[0] | e[1] << 16, e[2] | e[3] << 16};
                }
            }
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                const int i = base + a * SHARE_THREADS, token = i / row_pieces;
                if (i < pieces)
                    *reinterpret_cast<u32x2*>(to + token * Smem::X_STRIDE + share.first * 128 + i % row_pieces * 8) = piece[a];
            }
        }
        share.sync(warp);
    }
}

}  // namespace fdk
