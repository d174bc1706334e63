// Digits of one token by warps that have a unit at a time, a lane two neighbouring columns of it: a load of a warp is one
// line of memory, where threads of 16 columns each (digit_columns.cuh) touch eight lines with every load, which took longer
// than anything else in front of the products of a large k.
//
// A word of digits is made of the pairs of two lanes, `PARTNER` apart, each of which takes two digits of both; of 2 and 4
// bits of four lanes, where a word has only the first or the second column of each pair.
#pragma once
#include "fixed_point.cuh"

namespace fdk {

struct Pairs {
    static constexpr int BUSY_WARPS = EVEN_SHARES && SHARE_UNITS < SHARE_WARPS ? SHARE_UNITS : SHARE_WARPS;
    static constexpr int MOST = SHARE_MOST_UNITS;  // units of a warp

    Share share;
    int warp;         // of the share
    const u16* from;  // this lane's columns of the warp's first unit, SHARE_WARPS units before the next one
    int column;

    __device__ static __forceinline__ Pairs of(const Params& p, int first_unit, int units, int warp, int lane) {
        Pairs a = {Share::of(units, warp, lane), OWN_X ? warp / K_WARPS : warp, nullptr, 0};
        a.column = (first_unit + a.share.first + a.warp) * 64 + lane * 2;
        a.from = p.x + a.column;
        keep_ahead(a.from);
        return a;
    }
    __device__ __forceinline__ bool has(int n) const {
        return (EVEN_SHARES && (n + 1) * SHARE_WARPS <= SHARE_UNITS) || warp + n * SHARE_WARPS < share.units;
    }
    __device__ __forceinline__ int unit(int n) const { return share.first + warp + n * SHARE_WARPS; }  // from the CTA's first
    __device__ __forceinline__ u32 load(int n) const {
        const int to = n * SHARE_WARPS * 64;
        return has(n) && (K % 64 == 0 || column + to < K) ? load_4(from + to) : 0;
    }
};

// What the columns of a lane become, as `element` says from the other side: words `word` of digits in the 16 bytes of t, scaled
// by two powers of two.
struct Place {
    static constexpr bool FOUR = !NESTED && !SPARSE && (BITS == 2 || BITS == 4);  // lanes that share words
    static constexpr int PARTNER = SPARSE ? 1 : NESTED ? 16 : FOUR ? 8 : 4;
    static constexpr u32 LOWER = SPARSE || NESTED ? 0x5140 : BITS == 1 ? 0x1504 : 0x5410, UPPER = LOWER + 0x2222;

    int t, word, shift[2];  // shift: of the first and the second column

    __device__ static __forceinline__ Place of(int lane) {
        if constexpr (SPARSE) return {lane / 8, lane / 2 % 4 ^ lane / 8 % 2 * 2, {0, 0}};
        const int s = lane / 8, h = lane / 4 % 2, t = lane % 4;
        if constexpr (NESTED) return {t, s % 2 * 2 + h, {MAX_SHIFT * (1 - s % 2), MAX_SHIFT * (1 - s % 2)}};
        if constexpr (FOUR) return {t, s / 2 * 2 + h, {BITS, 0}};
        if constexpr (BITS == 1) return {t, s, {2 * s, 2 * s}};
        return {t, s, {0, MAX_SHIFT}};
    }
};

// Sums over a warp of COUNT values of each lane: lane i gets that of value i / (32 / COUNT).
template <int COUNT>
__device__ __forceinline__ float sum_lanes(float (&v)[COUNT], int lane) {
    int count = COUNT;
#pragma unroll
    for (int other = 16; other; other /= 2) {
        if (count > 1) {
            count /= 2;
            const bool upper = lane & other;
#pragma unroll
            for (int i = 0; i < COUNT / 2; ++i) {
                if (i >= count) break;
                const float mine = upper ? v[i + count] : v[i], theirs = upper ? v[i] : v[i + count];
                v[i] = mine + __shfl_xor_sync(0xffffffffu, theirs, other);
            }
        } else {
            v[0] += __shfl_xor_sync(0xffffffffu, v[0], other);
        }
    }
    return v[0];
}

// meanwhile(): what is done while activations are on their way.
template <class Meanwhile>
__device__ __forceinline__ void make_digits(const Params& p, char* smem, const Pairs& x, Norms& norms, int warp, int lane, Meanwhile meanwhile) {
    const Share& share = x.share;
    u32 pairs[Pairs::MOST], largest[M] = {};
#pragma unroll
    for (int n = 0; n < Pairs::MOST; ++n) pairs[n] = x.load(n);
    meanwhile();
    norms.read(p, smem, warp, lane);
    if constexpr (FDK_LATE) let_next_kernel_start();
    const int k_warp = OWN_X ? warp % K_WARPS : 0;
#pragma unroll
    for (int n = 0; n < Pairs::MOST; ++n) largest[0] = larger_halves(largest[0], pairs[n] & 0x7fff7fffu);
    find_largest<Pairs::BUSY_WARPS>(largest, smem, share, x.warp, k_warp, warp, lane);
    if constexpr (Norms::LATER && Pairs::BUSY_WARPS < SHARE_WARPS) norms.finish(p, smem, warp, lane);
    const Fixed fixed = Fixed::of(largest[0]);
    if (share.thread == 0) back_of(smem, 0, k_warp) = fixed.back;

    const Place place = Place::of(lane);
    const float powers[2] = {fixed.scale * float(1 << place.shift[0]), fixed.scale * float(1 << place.shift[1])};
    // Digits 0 and 3 go first, so that both halves of the warp write to banks of their own.
    const bool upper = lane & Place::PARTNER;
    char* const to = smem + Smem::X + place.t * 16 + place.word * 4;
    const int first = upper ? 3 * 64 : 0, second = upper ? 2 * 64 : 64;
    constexpr int TOGETHER = Pairs::MOST >= 8 ? 8 : Pairs::MOST > 2 ? 4 : Pairs::MOST;
#pragma unroll
    for (int base = 0; base < Pairs::MOST; base += TOGETHER) {
        float sums[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            sums[i] = 0.f;
            const int n = base + i;
            if (n >= Pairs::MOST || !x.has(n)) continue;
            const float a = low_half<BF16>(pairs[n]), b = high_half<BF16>(pairs[n]);
            sums[i] = a + b;
            u32 w[2] = {fixed_point(a, powers[0]), fixed_point(b, powers[1])};
            if constexpr (Place::FOUR) {
                // Of this lane and of the one with the other half of the octets: the first columns, or the second ones.
                const bool h = lane & 4;
                const u32 theirs = __shfl_xor_sync(0xffffffffu, h ? w[0] : w[1], 4);
                w[0] = h ? theirs : w[0], w[1] = h ? w[1] : theirs;
            }
            const u32 low = __byte_perm(w[0], w[1], 0x5140), high = __byte_perm(w[0], w[1], 0x7362);  // digits 0 and 1; 2 and 3
            const u32 mine = upper ? high : low, theirs = __shfl_xor_sync(0xffffffffu, upper ? low : high, Place::PARTNER);
            const u32 before = upper ? theirs : mine, behind = upper ? mine : theirs;  // in the order of lanes
            const u32 x0 = __byte_perm(before, behind, Place::LOWER) ^ 0x80808080u;
            const u32 x1 = __byte_perm(before, behind, Place::UPPER) ^ (upper ? 0u : 0x80808080u);
            char* const digits = to + x.unit(n) * 256;
            *reinterpret_cast<u32*>(digits + first) = upper ? x1 : x0;
            *reinterpret_cast<u32*>(digits + second) = upper ? x0 : x1;
        }
        const float sum = sum_lanes(sums, lane);
        const int n = base + lane / (32 / TOGETHER);
        if (lane % (32 / TOGETHER) == 0 && n < Pairs::MOST && x.has(n)) reinterpret_cast<float*>(smem + Smem::SUM)[x.unit(n)] = sum;
    }
    share.sync(warp);
}

__device__ __forceinline__ void prepare_activations(const Params& p, char* smem, const Pairs& x, Norms& norms, int, int, int, int warp, int lane, const Lookup&) {
    make_digits(p, smem, x, norms, warp, lane, [] {});
}

}  // namespace fdk
