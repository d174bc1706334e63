// Digits of two tokens and more by lanes that have whole words of them: two pairs of columns, whose four bytes a word is made
// of, or four pairs and two words, one of the first columns of each pair and one of the second. Lanes exchange nothing; a warp
// has a unit of as many tokens at a time as a lane has pairs, of fewer tokens two units, and a load touches as many lines.
#pragma once
#include "fixed_point.cuh"

namespace fdk {

struct Words {
    static constexpr bool TWO = !NESTED && (BITS == 2 || BITS == 4);  // words of a lane
    static constexpr int PAIRS = TWO ? 4 : 2, APART = NESTED ? 32 : 8, LANES = 32 / PAIRS;  // APART: columns from a pair to the next
    static constexpr int AT_ONCE = PAIRS < M ? PAIRS : M, TRIPS = M / AT_ONCE, SIDE = PAIRS / AT_ONCE;  // tokens, and units beside each other
    static constexpr int BUSY = (SHARE_UNITS + SIDE - 1) / SIDE;
    static constexpr int BUSY_WARPS = EVEN_SHARES && BUSY < SHARE_WARPS ? BUSY : SHARE_WARPS;
    static constexpr int MOST = (SHARE_UNITS + SHARE_WARPS * SIDE - 1) / (SHARE_WARPS * SIDE);  // units of a lane
    static constexpr bool KEPT = MOST * TRIPS * PAIRS <= 64;  // in registers, or loaded twice

    Share share;
    int first, column;       // of the lane's units, counted from the share's first; and its first column there
    const u16* from[TRIPS];  // of each of the lane's tokens, at that column

    __device__ static __forceinline__ Words of(const Params& p, int first_unit, int units, int warp, int lane) {
        Words a = {Share::of(units, warp, lane), own(warp) * SIDE + (SIDE == 1 ? 0 : lane / LANES / AT_ONCE), 0, {}};
        const int i = lane % LANES;
        a.column = (first_unit + a.share.first + a.first) * 64 + i / 4 * (NESTED ? 8 : TWO ? 32 : 16) + i % 4 * 2;
#pragma unroll
        for (int trip = 0; trip < TRIPS; ++trip) {
            a.from[trip] = p.x + i64(min(token(trip, lane), p.m - 1)) * K + a.column;
            keep_ahead(a.from[trip]);
        }
        return a;
    }
    __device__ static __forceinline__ int own(int warp) { return OWN_X ? warp / K_WARPS : warp; }  // of the share
    // Of the tokens of a trip, that of the lane.
    __device__ static __forceinline__ int group(int lane) { return SIDE == 1 ? lane / LANES : lane / LANES % AT_ONCE; }
    __device__ static __forceinline__ int token(int trip, int lane) { return trip * AT_ONCE + group(lane); }
    // Which of the lane's values byte `byte` of its word `word` is, see `element`.
    __device__ static constexpr int value(int word, int byte) {
        if (TWO) return 2 * byte + word;
        if (NESTED) return 2 * (byte % 2) + byte / 2;
        return BITS == 1 ? 2 * (1 - byte % 2) + byte / 2 : byte;
    }
    __device__ __forceinline__ bool has(int n) const {
        return (EVEN_SHARES && (n + 1) * SHARE_WARPS * SIDE <= SHARE_UNITS) || first + n * SHARE_WARPS * SIDE < share.units;
    }
    __device__ __forceinline__ int unit(int n) const { return share.first + first + n * SHARE_WARPS * SIDE; }  // from the CTA's first
    __device__ __forceinline__ u32 load(int n, int trip, int pair) const {
        const int to = n * SHARE_WARPS * SIDE * 64 + pair * APART;
        return has(n) && (K % 64 == 0 || column + to < K) ? load_4(from[trip] + to) : 0;
    }
};

__device__ __forceinline__ void prepare_activations(const Params& p, char* smem, const Words& x, Norms& norms, int, int, int, int warp, int lane, const Lookup&) {
    using W = Words;
    constexpr int UNROLL = W::KEPT ? W::MOST : 1;
    const Share& share = x.share;
    u32 kept[W::KEPT ? W::MOST : 1][W::TRIPS][W::PAIRS], most[W::TRIPS] = {};
#pragma unroll(UNROLL)
    for (int n = 0; n < W::MOST; ++n)
#pragma unroll
        for (int i = 0; i < W::TRIPS * W::PAIRS; ++i) {
            const int trip = i / W::PAIRS, pair = i % W::PAIRS;
            const u32 loaded = x.load(n, trip, pair);
            if constexpr (W::KEPT)
                kept[n][trip][pair] = loaded;
            else
                most[trip] = larger_halves(most[trip], loaded & 0x7fff7fffu);
        }
    norms.read(p, smem, warp, lane);
    if constexpr (FDK_LATE) let_next_kernel_start();
    if constexpr (W::KEPT) {
#pragma unroll
        for (int i = 0; i < W::MOST * W::TRIPS * W::PAIRS; ++i) {
            u32& to = most[i / W::PAIRS % W::TRIPS];
            to = larger_halves(to, kept[i / W::PAIRS / W::TRIPS][i / W::PAIRS % W::TRIPS][i % W::PAIRS] & 0x7fff7fffu);
        }
    }
    u32 largest[M];
#pragma unroll
    for (int k = 0; k < M; ++k) largest[k] = W::group(lane) == k % W::AT_ONCE ? most[k / W::AT_ONCE] : 0;
    const int k_warp = OWN_X ? warp % K_WARPS : 0;
    find_largest<W::BUSY_WARPS>(largest, smem, share, W::own(warp), k_warp, warp, lane);
    if constexpr (Norms::LATER && W::BUSY_WARPS < SHARE_WARPS) norms.finish(p, smem, warp, lane);

    const int i = lane % W::LANES;
    constexpr bool APART_BITS = !NESTED && BITS != 1 && !W::TWO;  // codes of a pair lie at bits of their own
    const int shift = NESTED ? MAX_SHIFT * (1 - i / 8) : BITS == 1 ? i / 4 * 2 : 0;  // besides a word's own, of TWO
    float power[W::TRIPS];
#pragma unroll
    for (int trip = 0; trip < W::TRIPS; ++trip) {
        u32 own = largest[trip * W::AT_ONCE];
#pragma unroll
        for (int k = 1; k < W::AT_ONCE; ++k) own = W::group(lane) == k ? largest[trip * W::AT_ONCE + k] : own;
        const Fixed fixed = Fixed::of(own);
        power[trip] = fixed.scale * float(1 << shift);
        if (share.thread < W::LANES * W::AT_ONCE && i == 0) back_of(smem, W::token(trip, lane), k_warp) = fixed.back;
    }
    // Every other token's lanes write the second digit of two first, to the banks that the others leave.
    const bool odd = lane / W::LANES % 2;
    const u32 first = odd ? 0x7632 : 0x5410, second = odd ? 0x5410 : 0x7632;
    char* const to = smem + Smem::X + W::group(lane) * 256 + i % 4 * 16 + i / 4 * (W::TWO ? 8 : 4) + (odd ? 64 : 0);
    const int other = odd ? -64 : 64;
#pragma unroll(UNROLL)
    for (int n = 0; n < W::MOST; ++n) {
        if (!x.has(n)) continue;
#pragma unroll
        for (int trip = 0; trip < W::TRIPS; ++trip) {
            u32 w[2 * W::PAIRS];
#pragma unroll
            for (int pair = 0; pair < W::PAIRS; ++pair) {
                const u32 both = W::KEPT ? kept[W::KEPT ? n : 0][trip][pair] : x.load(n, trip, pair);
                w[2 * pair] = fixed_point(low_half<BF16>(both), power[trip] * (W::TWO ? float(1 << BITS) : 1.f)) ^ 0x00808080u;
                w[2 * pair + 1] = fixed_point(high_half<BF16>(both), power[trip] * (APART_BITS ? float(1 << MAX_SHIFT) : 1.f)) ^ 0x00808080u;
            }
            u32 digits[4][W::TWO ? 2 : 1];
#pragma unroll
            for (int word = 0; word < (W::TWO ? 2 : 1); ++word) {
                const auto at = [&](int byte) { return w[W::value(word, byte)]; };
#pragma unroll
                for (int d = 0; d < 4; d += 2) {
                    const u32 two = d ? 0x7362 : 0x5140;  // digits d and d + 1 of two columns
                    const u32 before = __byte_perm(at(0), at(1), two), behind = __byte_perm(at(2), at(3), two);
                    digits[d][word] = __byte_perm(before, behind, first), digits[d + 1][word] = __byte_perm(before, behind, second);
                }
            }
            char* const unit = to + (x.unit(n) * M + trip * W::AT_ONCE) * 256;
#pragma unroll
            for (int d = 0; d < 4; ++d) {
                char* const place = unit + d / 2 * 128 + (d % 2 ? other : 0);
                if constexpr (W::TWO)
                    *reinterpret_cast<u32x2*>(place) = u32x2{digits[d][0], digits[d][1]};
                else
                    *reinterpret_cast<u32*>(place) = digits[d][0];
            }
        }
    }
    share.sync(warp);
}

}  // namespace fdk
