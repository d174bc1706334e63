// The product in integers, for one or two tokens of formats that are affine in their codes (int, uint, nested, sparse int, any one bit).
//
// An mma has eight columns and one token fills one of them; here it fills four, one for each digit of its activations:
// x * 2^shift is rounded to 32-bit fixed point, the largest |x| of the CTA's slice just below 2^30, and written in
// base 256 with digits in [-128, 127]. Codes enter mma.m16n8k32 as bytes, four for one `and`, and sums are exact.
// An `and` leaves a code at some bit of its byte; activations are scaled by the missing power of two (element_shift),
// and what differs between rows g and g+8 is taken out of the sums (row_shift).
//
// A code thus costs a quarter of an instruction or less, where dequantising to bf16 costs half a lop3 per weight at
// one bit and a table look-up's share of shared-memory bandwidth above. Zero points enter through sums of x.
//
// FDK_PAIRED: one token's digits fill only half of the columns, so two row tiles share an accumulator, each with the
// digits in its own half of the columns and zeros in the other. A lane then has half as many sums to scale.
#pragma once
#include "epilogue.cuh"

namespace fdk {

constexpr int COLUMNS_USED = 4 * M;
// Nested weights: bits of the fields that planes become (planes.cuh), a byte of which holds codes of rows g and g + 8.
using Planes = Slice<NESTED ? FDK_SLICE : 2, KIND == 5, BF16>;
constexpr int FIELD = Planes::FIELD;
constexpr int MAX_SHIFT = SPARSE ? 0 : NESTED ? (FIELD < 8 ? 4 : 0) : BITS == 1 ? 6 : BITS == 2 ? 2 : BITS == 4 ? 4 : 0;
// A lane has the sums of row tiles LANE_TILES * share_of(lane) + 0.. and, of each, of columns 2t and 2t + 1.
constexpr int LANE_TILES = 4 / TILES_SHARING;
__device__ __forceinline__ int share_of(int lane) {
    return TILES_SHARING == 1 ? 0 : lane % 4 / 2;
}

// Byte `byte` of register `half` (columns 4t.. or 16+4t.. of the mma) of step S holds column 16s + 8(j/2) + 2t + j%2 of
// the unit, sparse: 16t + 4s + j with the two halves exchanged for odd t (sparse.cuh), with x scaled by 2^shift.
struct Element {
    int s, j, shift;
};
__device__ constexpr Element element(int step, int half, int byte) {
    if (SPARSE) return {2 * step + half, byte % 3 ? 3 - byte : byte, 0};
    if (NESTED) return {2 * (byte % 2) + step, 2 * half + byte / 2, MAX_SHIFT * (1 - step)};
    if (BITS == 1) return {2 * step + half, byte == 0 ? 2 : byte == 1 ? 0 : byte == 2 ? 3 : 1, 2 * (2 * step + half)};
    if (BITS == 8) return {2 * step + half, byte, 0};
    return {2 * step + byte / 2, 2 * (byte % 2) + half, BITS * (1 - half)};
}

// Products of rows 8h + g carry this power of two.
__device__ constexpr int row_shift(int h) {
    if (SPARSE) return 4;
    if (NESTED) return MAX_SHIFT + (FIELD == 2 ? 2 * h : 0);
    return BITS == 1 ? 7 - h : BITS == 2 ? 2 + 4 * h : BITS == 4 ? 4 : 0;
}

// A operands of the two steps of a row tile, codes as bytes.
template <int WORDS>
__device__ __forceinline__ void code_bytes(u32 (&a)[2][4], const u32 (&words)[WORDS], int tile, const Lookup& lookup) {
    if constexpr (SPARSE) {
        const ByteExpansion expand(lookup);
        expand(a, words, tile);
    } else if constexpr (NESTED) {
        constexpr u32 MASK = 0x01010101u * ((1u << FDK_SLICE) - 1);
        u32 fields[FIELD];
        slice_fields<BITS, FDK_SLICE>(fields, words, tile);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int bit = i / 4 * 4 + i % 2 * 2 + i / 2 % 2;
            a[i / 4][i % 4] = FDK_SLICE == 8 ? fields[bit % FIELD] : fields[bit % FIELD] & MASK << bit / FIELD * FIELD;
        }
    } else {
        constexpr int BACK = 32 - 7;  // words are packed rotated left by 7
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            if constexpr (BITS == 1) {
                const u32 w = words[tile];
#pragma unroll
                for (int i = 0; i < 4; ++i) a[step][i] = w & (0x01010101u << (7 - i % 2 - 2 * (2 * step + i / 2)));
            } else if constexpr (BITS == 2) {
                const u32 w = rotate_left(words[tile * 2 + step], BACK);
                a[step][0] = w & 0x03030303u, a[step][1] = w & 0x30303030u;
                a[step][2] = w & 0x0c0c0c0cu, a[step][3] = w & 0xc0c0c0c0u;
            } else if constexpr (BITS == 4) {
                const u32 w0 = rotate_left(words[tile * 4 + 2 * step], BACK), w1 = rotate_left(words[tile * 4 + 2 * step + 1], BACK);
                const u32 low = __byte_perm(w0, w1, 0x5410), high = __byte_perm(w0, w1, 0x7632);
                a[step][0] = low & 0x0f0f0f0fu, a[step][1] = high & 0x0f0f0f0fu;
                a[step][2] = low & 0xf0f0f0f0u, a[step][3] = high & 0xf0f0f0f0u;
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) a[step][i] = rotate_left(words[tile * 8 + step * 4 + i], BACK);
            }
        }
    }
}

// d = a b + c for unsigned bytes a[16 x 32], signed ones of sparse weights, and signed bytes b[32 x 8].
__device__ __forceinline__ void mma_bytes(u32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const u32 (&c)[4]) {
    if constexpr (SPARSE)
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
    else
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

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

constexpr int SHARE_ITEMS = SHARE_UNITS * M * 4, ITEMS = (SHARE_ITEMS + SHARE_THREADS - 1) / SHARE_THREADS;  // (token, unit, t); per thread
constexpr int KEPT = ITEMS <= 3 ? ITEMS : 2;  // of which stay in registers
// Warps of a share that have items. If there is one, the others need not know the largest |x|.
constexpr int SHARE_WARPS = SHARE_THREADS / 32;
constexpr int BUSY_WARPS = EVEN_SHARES && SHARE_ITEMS < SHARE_THREADS ? (SHARE_ITEMS + 31) / 32 : SHARE_WARPS;
constexpr bool IDLE_WARPS = BUSY_WARPS < SHARE_WARPS;  // the last among them
constexpr bool X_MEANWHILE = false;

// 2^-shift of a token in a warp's slice of k.
__device__ __forceinline__ float& back_of(char* smem, int token, int k_warp) {
    return reinterpret_cast<float*>(smem + Smem::MAXIMA)[M * WARPS + token * K_WARPS + k_warp];
}

// The activations that a thread makes digits of, in items of a token's 16 columns of one t of a unit.
struct Activations {
    struct Item {
        int t, unit, token, column;  // unit counted from the CTA's first
        const u16* from;
    };
    Share share;
    Item kept[KEPT];

    __device__ __forceinline__ int items() const { return EVEN_SHARES ? SHARE_ITEMS : share.units * M * 4; }
    __device__ __forceinline__ bool has(int n) const {
        return (EVEN_SHARES && (n + 1) * SHARE_THREADS <= SHARE_ITEMS) || share.thread + n * SHARE_THREADS < items();
    }
    // Whether any lane of the warp has one; in terms of the warp, for the compiler to know that they agree.
    __device__ __forceinline__ bool warp_has(int n, int warp) const {
        const bool all = EVEN_SHARES && n * SHARE_THREADS + (SHARE_WARPS - 1) * 32 < SHARE_ITEMS;
        return all || n * SHARE_THREADS + (OWN_X ? warp / K_WARPS : warp) * 32 < items();
    }
    __device__ __forceinline__ Item item(const Params& p, int first_unit, int n) const {
        const int i = share.thread + n * SHARE_THREADS, per = EVEN_SHARES ? SHARE_UNITS : max(share.units, 1);
        const int t = i % 4, unit = share.first + i / 4 % per, token = i / 4 / per;
        const int column = (first_unit + unit) * 64 + t * (SPARSE ? 16 : 2);
        return {t, unit, token, column, p.x + i64(min(token, p.m - 1)) * K + column};
    }
    // All but the loads, for which the kernel before has to end.
    __device__ static __forceinline__ Activations of(const Params& p, int first_unit, int units, int warp, int lane) {
        Activations a = {Share::of(units, warp, lane), {}};
#pragma unroll
        for (int n = 0; n < KEPT; ++n) {
            a.kept[n] = a.item(p, first_unit, n);
            if constexpr (PAIRED) keep_ahead(a.kept[n].from);
        }
        return a;
    }
};

// Shared memory at X: digits[unit][4*token + digit][t][16 bytes], the B operands of both steps of a lane; at SUM:
// sum(x)[unit][token]; at MAXIMA: the largest |x| of each warp, and 2^-shift.
__device__ __forceinline__ void prepare_activations(const Params& p, char* smem, const Activations& x, Norms& norms, int, int first_unit, int, int warp, int lane, const Lookup&) {
    float* sums = reinterpret_cast<float*>(smem + Smem::SUM);
    u32* maxima = reinterpret_cast<u32*>(smem + Smem::MAXIMA);
    const Share& share = x.share;
    float kept[KEPT][4][4];
    const auto load = [&](float (&v)[4][4], const Activations::Item& item) {
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
            const Activations::Item item = n < KEPT ? x.kept[n < KEPT ? n : 0] : x.item(p, first_unit, n);
            const u32 most = load(v, item);
#pragma unroll
            for (int k = 0; k < M; ++k)
                if (item.token == k) largest[k] = larger_halves(largest[k], most);
        }
    }
    norms.read(p, smem, warp, lane);
    if constexpr (FDK_LATE) let_next_kernel_start();
    const int k_warp = OWN_X ? warp % K_WARPS : 0;
#pragma unroll
    for (int k = 0; k < M; ++k) {
        largest[k] = __reduce_max_sync(0xffffffffu, max(largest[k] & 0xffffu, largest[k] >> 16));
        largest[k] = __float_as_uint(low_half<BF16>(largest[k]));
        if (BUSY_WARPS > 1 && lane == 0) maxima[k * WARPS + k_warp * SHARE_WARPS + share.thread / 32] = largest[k];
    }
    if constexpr (BUSY_WARPS > 1) share.sync(warp);
    if constexpr (Norms::LATER && IDLE_WARPS) norms.finish(p, smem, warp, lane);
    float scale[M];  // 2^shift
#pragma unroll
    for (int k = 0; k < M; ++k) {
        u32 most = BUSY_WARPS > 1 ? 0 : largest[k];
#pragma unroll
        for (int i = 0; BUSY_WARPS > 1 && i < BUSY_WARPS; ++i) most = max(most, maxima[k * WARPS + k_warp * SHARE_WARPS + i]);
        const int exponent = int(most >> 23);  // biased; 255 for NaN and infinity
        // Finite also with the shift of an element; a slice below 2^-97 has fewer digits.
        const int biased = min(29 - MAX_SHIFT + 2 * 127 - exponent, 254 - MAX_SHIFT);
        scale[k] = __uint_as_float(u32(biased) << 23);
        const float back = __uint_as_float(u32(254 - biased) << 23);
        if (share.thread == 0) back_of(smem, k, k_warp) = exponent == 255 ? __uint_as_float(0x7fc00000u) : back;
    }
#pragma unroll
    for (int n = 0; n < ITEMS; ++n) {
        if (!x.warp_has(n, warp)) break;
        const Activations::Item item = n < KEPT ? x.kept[n < KEPT ? n : 0] : x.item(p, first_unit, n);
        float loaded[4][4] = {};
        float (&v)[4][4] = n < KEPT ? kept[n < KEPT ? n : 0] : loaded;
        if (n >= KEPT && x.has(n)) load(v, item);
        float sum = 0;
#pragma unroll
        for (int q = 0; q < 16; ++q) sum += v[q / 4][q % 4];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const float factor = M == 2 && item.token == 1 ? scale[M - 1] : scale[0];
        // Half a digit added to the lower three lets them carry into the next; what remains is signed.
        constexpr u32 HALVES = 0x00808080u;
        u32 digits[4][4];  // [digit][2*step + half], four columns each
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            u32 w[4];
#pragma unroll
            for (int byte = 0; byte < 4; ++byte) {
                const Element e = element(r / 2, r % 2, byte);
                const float value = v[e.s][e.j], power = factor * float(1 << e.shift);
                // The sum of a 16-bit float and HALVES loses no more than the one rounding to an integer.
                w[byte] = PAIRED ? u32(__float2int_rn(fmaf(value, power, float(HALVES)))) : u32(__float2int_rn(value * power)) + HALVES;
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

__device__ __forceinline__ void wait_for_activations(const char*, int, int, int) {}

// Sums of one block over a warp's slice, row 16*tile + 8*h + g: of scale * digits for columns 2t and 2t+1, that is
// digits 2*(t%2) and one more of token t/2 (one token, not sharing: t < 2 only), and of scale * (zero *) sum(x) of that
// token. PAIRED: digits are added up before they are scaled.
struct Accumulator {
    float sum[LANE_TILES][2][PAIRED ? 1 : 2];
    float scaled_x[LANE_TILES][2];
};

struct Unit {
    u32 words[SPARSE ? 24 : 4 * BITS];
    Rows scales;
    Zeros zeros;
};

__device__ __forceinline__ void load_unit(Unit& u, const char* stage, StageGroups groups, int index, int, int lane, int, WholeBlock) {
    const int g = lane / 4, share = share_of(lane), group = STAGE_GROUPS == 1 ? 0 : index * 64 / GROUP;
    constexpr int PIECES = SPARSE ? 6 : BITS, PIECE = Smem::CODE_BYTES / PIECES;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const u32x4 v = *reinterpret_cast<const u32x4*>(stage + index * Smem::CODE_BYTES + i * PIECE + lane / (512 / PIECE) * 16);
        u.words[4 * i] = v.x, u.words[4 * i + 1] = v.y, u.words[4 * i + 2] = v.z, u.words[4 * i + 3] = v.w;
    }
    u.scales = load_rows(groups.scales + group * 128, g, share);
    if constexpr (ZEROS) u.zeros = load_zeros(groups.zeros + group * Smem::GROUP_ZERO_BYTES, g, share);
}

// Unit `unit` of the CTA, which is unit `index` of its stage.
__device__ __forceinline__ void multiply_unit(Accumulator& acc, const Unit& u, const char* smem, int unit, int index, int lane, const Lookup& lookup, WholeBlock) {
    // Sums start at 1.5 * 2^23, so that their bits read as a float are that number plus the sum, which is below 2^22;
    // a start of 256 times as much makes them count 256 each.
    constexpr u32 MAGIC = 0x4b400000u, NEXT = PAIRED ? MAGIC + (8u << 23) : MAGIC;
    const float magic = __uint_as_float(MAGIC), both = __uint_as_float(MAGIC) + __uint_as_float(NEXT);
    const u32 start[4] = {MAGIC, NEXT, MAGIC, NEXT};
    const int t = lane % 4, column = lane / 4;
    u32x4 b[TILES_SHARING];
#pragma unroll
    for (int i = 0; i < TILES_SHARING; ++i) {
        const int digits = Smem::X + ((unit - index) * COLUMNS_USED + column % COLUMNS_USED) * 64 + t * 16;
        const bool zeros = TILES_SHARING > 1 && column / COLUMNS_USED != i;
        b[i] = *reinterpret_cast<const u32x4*>(smem + (zeros ? Smem::NO_DIGITS : digits) + index * COLUMNS_USED * 64);
    }
    const float x = reinterpret_cast<const float*>(smem + Smem::SUM)[unit * M + (M == 2 ? t / 2 : 0)];
#pragma unroll
    for (int tile = 0; tile < LANE_TILES; ++tile) {
        u32 a[2][4], d[4] = {start[0], start[1], start[2], start[3]};
#pragma unroll
        for (int i = 0; i < TILES_SHARING; ++i) {
            code_bytes(a, u.words, tile + i * LANE_TILES, lookup);
            mma_bytes(d, a[0], b[i].x, b[i].y, d);
            mma_bytes(d, a[1], b[i].z, b[i].w, d);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float scale = u.scales.at(tile, h), low = __uint_as_float(d[2 * h]), high = __uint_as_float(d[2 * h + 1]);
            auto& sum = acc.sum[tile][h];
            if constexpr (PAIRED) {
                sum[0] = fmaf(scale, (high - both) + low, sum[0]);
            } else {
                sum[0] = fmaf(scale, low - magic, sum[0]);
                sum[1] = fmaf(scale, high - magic, sum[1]);
            }
            if constexpr (!SPARSE) acc.scaled_x[tile][h] = fmaf(ZEROS ? scale * u.zeros.at(tile, h) : scale, x, acc.scaled_x[tile][h]);
        }
    }
}

// A warp's sums of a block to its slot [64 rows][M tokens]; `low` and `high` are the two table values of one bit.
__device__ __forceinline__ void store_partial(float* slot, const Accumulator& acc, char* smem, int lane, float low, float high, WholeBlock) {
    const int g = lane / 4, t = lane % 4, token = M == 2 ? t / 2 : 0;
    const float back = back_of(smem, token, OWN_X ? threadIdx.x / 32 % K_WARPS : 0);
#pragma unroll
    for (int tile = 0; tile < LANE_TILES; ++tile)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const auto& sum = acc.sum[tile][h];
            float v = (PAIRED ? sum[0] : fmaf(256.f, sum[PAIRED ? 0 : 1], sum[0])) * (t % 2 ? 65536.f : 1.f);
            v += __shfl_xor_sync(0xffffffffu, v, 1);
            v *= back * (1.f / float(1 << row_shift(h)));
            const float x = acc.scaled_x[tile][h];
            if constexpr (TABLE)
                v = fmaf(high, v, low * (x - v));
            else if constexpr (NESTED)
                v = float(Planes::STEP) * (v - float(Planes::MIDDLE - (KIND == 5 ? 0.5 : 0)) * x);
            else if constexpr (!SPARSE)
                v -= ZEROS ? x : float(1 << (BITS - 1)) * x;
            const int row = (share_of(lane) * LANE_TILES + tile) * 16 + h * 8 + g;
            if (t % 2 == 0 && (TILES_SHARING > 1 || t / 2 < M)) slot[row * M + token] = v;
        }
}

}  // namespace fdk
