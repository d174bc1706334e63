// Digits of activations by threads that have 16 columns each, for one or two tokens of any format.
#pragma once
#include "fixed_point.cuh"

namespace fdk {

// Columns `at`, +1, +8 and +9 of x (sparse: `at` to at + 3), from which on `from` points, as floats, zeros past K. `most`
// becomes at least their magnitudes, as the bits of 16-bit floats: in either half of its own.
__device__ __forceinline__ void load_columns(float (&v)[4], u32& most, const u16* from, int at) {
    u32 pairs[2] = {};
    if constexpr (SPARSE) {
        if (K % 64 == 0 || at < K) {
            const u32x2 four = load_8(from);
            pairs[0] = four.x, pairs[1] = four.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i, at += 8, from += 8) {
            if constexpr (K % 2 == 0) {
                if (K % 64 == 0 || at < K) pairs[i] = load_4(from);
            } else {
                pairs[i] = (at < K ? load_2(from) : 0) | (at + 1 < K ? u32(load_2(from + 1)) << 16 : 0);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        v[2 * i] = low_half<BF16>(pairs[i]), v[2 * i + 1] = high_half<BF16>(pairs[i]);
        most = larger_halves(most, pairs[i] & 0x7fff7fffu);
    }
}

// The activations that a thread makes digits of, in items of a token's 16 columns of one t of a unit.
struct Columns {
    static constexpr int ITEMS_OF_SHARE = SHARE_UNITS * M * 4, ITEMS = (ITEMS_OF_SHARE + SHARE_THREADS - 1) / SHARE_THREADS;
    static constexpr int KEPT = ITEMS <= 3 ? ITEMS : 2;  // of which stay in registers
    // Warps of a share that have items. If there is one, the others need not know the largest |x|.
    static constexpr int BUSY_WARPS = EVEN_SHARES && ITEMS_OF_SHARE < SHARE_THREADS ? (ITEMS_OF_SHARE + 31) / 32 : SHARE_WARPS;

    struct Item {
        int t, unit, token, column;  // unit counted from the CTA's first
        const u16* from;
    };
    Share share;
    Item kept[KEPT];

    __device__ __forceinline__ int items() const { return EVEN_SHARES ? ITEMS_OF_SHARE : share.units * M * 4; }
    __device__ __forceinline__ bool has(int n) const {
        return (EVEN_SHARES && (n + 1) * SHARE_THREADS <= ITEMS_OF_SHARE) || share.thread + n * SHARE_THREADS < items();
    }
    // Whether any lane of the warp has one; in terms of the warp, for the compiler to know that they agree.
    __device__ __forceinline__ bool warp_has(int n, int warp) const {
        const bool all = EVEN_SHARES && n * SHARE_THREADS + (SHARE_WARPS - 1) * 32 < ITEMS_OF_SHARE;
        return all || n * SHARE_THREADS + (OWN_X ? warp / K_WARPS : warp) * 32 < items();
    }
    __device__ __forceinline__ Item item(const Params& p, int first_unit, int n) const {
        const int i = share.thread + n * SHARE_THREADS, per = EVEN_SHARES ? SHARE_UNITS : max(share.units, 1);
        const int t = i % 4, unit = share.first + i / 4 % per, token = i / 4 / per;
        const int column = (first_unit + unit) * 64 + t * (SPARSE ? 16 : 2);
        return {t, unit, token, column, p.x + i64(min(token, p.m - 1)) * K + column};
    }
    // All but the loads, for which the kernel before has to end.
    __device__ static __forceinline__ Columns of(const Params& p, int first_unit, int units, int warp, int lane) {
        Columns a = {Share::of(units, warp, lane), {}};
#pragma unroll
        for (int n = 0; n < KEPT; ++n) {
            a.kept[n] = a.item(p, first_unit, n);
            if constexpr (PAIRED) keep_ahead(a.kept[n].from);
        }
        return a;
    }
};

__device__ __forceinline__ void prepare_activations(const Params& p, char* smem, const Columns& x, Norms& norms, int, int first_unit, int, int warp, int lane, const Lookup&) {
    float* sums = reinterpret_cast<float*>(smem + Smem::SUM);
    const Share& share = x.share;
    constexpr int ITEMS = Columns::ITEMS, KEPT = Columns::KEPT;
    float kept[KEPT][4][4];
    const auto load = [&](float (&v)[4][4], const Columns::Item& item) {
        u32 most = 0;
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            const int to = SPARSE ? (s ^ item.t % 2 * 2) * 4 : s * 16;
            load_columns(v[s], most, item.from + to, item.column + to);
        }
        return most;
    };
    u32 largest[M] = {};
#pragma unroll
    for (int n = 0; n < ITEMS; ++n) {
        float loaded[4][4] = {};
        float (&v)[4][4] = n < KEPT ? kept[n < KEPT ? n : 0] : loaded;
        if (n < KEPT)
            for (int q = 0; q < 16; ++q) v[q / 4][q % 4] = 0.f;
        if (x.has(n)) {
            const Columns::Item item = n < KEPT ? x.kept[n < KEPT ? n : 0] : x.item(p, first_unit, n);
            const u32 most = load(v, item);
#pragma unroll
            for (int k = 0; k < M; ++k)
                if (item.token == k) largest[k] = larger_halves(largest[k], most);
        }
    }
    norms.read(p, smem, warp, lane);
    if constexpr (FDK_LATE) let_next_kernel_start();
    const int k_warp = OWN_X ? warp % K_WARPS : 0;
    find_largest<Columns::BUSY_WARPS>(largest, smem, share, share.thread / 32, k_warp, warp, lane);
    if constexpr (Norms::LATER && Columns::BUSY_WARPS < SHARE_WARPS) norms.finish(p, smem, warp, lane);
    float scale[M];  // 2^shift
#pragma unroll
    for (int k = 0; k < M; ++k) {
        const Fixed fixed = Fixed::of(largest[k]);
        scale[k] = fixed.scale;
        if (share.thread == 0) back_of(smem, k, k_warp) = fixed.back;
    }
#pragma unroll
    for (int n = 0; n < ITEMS; ++n) {
        if (!x.warp_has(n, warp)) break;
        const Columns::Item item = n < KEPT ? x.kept[n < KEPT ? n : 0] : x.item(p, first_unit, n);
        float loaded[4][4] = {};
        float (&v)[4][4] = n < KEPT ? kept[n < KEPT ? n : 0] : loaded;
        if (n >= KEPT && x.has(n)) load(v, item);
        float sum = 0;
#pragma unroll
        for (int q = 0; q < 16; ++q) sum += v[q / 4][q % 4];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const float factor = M == 2 && item.token == 1 ? scale[M - 1] : scale[0];
        u32 digits[4][4];  // [digit][2*step + half], four columns each
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            u32 w[4];
#pragma unroll
            for (int byte = 0; byte < 4; ++byte) {
                const Element e = element(r / 2, r % 2, byte);
                w[byte] = fixed_point(v[e.s][e.j], factor * float(1 << e.shift));
            }
            const u32 low01 = __byte_perm(w[0], w[1], 0x5140), high01 = __byte_perm(w[0], w[1], 0x7362);
            const u32 low23 = __byte_perm(w[2], w[3], 0x5140), high23 = __byte_perm(w[2], w[3], 0x7362);
            digits[0][r] = __byte_perm(low01, low23, 0x5410) ^ 0x80808080u, digits[1][r] = __byte_perm(low01, low23, 0x7632) ^ 0x80808080u;
            digits[2][r] = __byte_perm(high01, high23, 0x5410) ^ 0x80808080u, digits[3][r] = __byte_perm(high01, high23, 0x7632);
        }
        if (x.has(n)) {
            if (item.t == 0) sums[item.unit * M + item.token] = sum;
#pragma unroll
            for (int d = 0; d < 4; ++d)
                *reinterpret_cast<u32x4*>(smem + Smem::X + (item.unit * COLUMNS_USED + item.token * 4 + d) * 64 + item.t * 16) =
                    u32x4{digits[d][0], digits[d][1], digits[d][2], digits[d][3]};
        }
    }
    share.sync(warp);
}

}  // namespace fdk
