// From a lane's packed words to A fragments of mma.m16n8k16, one mechanism per width.
//
// Words and codes are arranged as fdk/packing/fragments.py says: word r*BITS + i of a unit serves row tile r, and
// code e = 8s + 4h + j is row 8h+g, column 8(j/2) + 2t + j%2 of step s. Register a[s][h + 2*(j/2)] holds two columns.
//
//   1 bit    a lop3 puts the bit into sign, exponent or mantissa: value = offset(position) + 2*bit, for any step;
//            with many tokens (SELECT), a prmt spreads it over 16 bits and a lop3 selects one of two table values;
//            or eight codes index a table of whole operands (16 bytes), replicated for 8 lanes (see octets_to_operand)
//   2 bits   four codes index a table of 4 values (8 bytes), replicated for 16 lanes: 64-bit loads without conflicts
//   3, 4     two codes index a table of pairs (4 bytes), replicated for 32 lanes
//   5 to 8   one code indexes a table of values, both halves equal, replicated for 32 lanes
// A table row is 128 bytes, so a field at bits 7.. of a word, masked, is its byte offset. A WIDE table has rows 256 bytes
// apart and starts at a multiple of 64 KB: then one byte permute makes an address of a whole byte of codes, instead of a shift
// and a mask.
#pragma once
#include "ptx.cuh"

template <int BITS>
struct Table {
    static constexpr int CODES = BITS == 1 ? 0 : BITS == 2 ? 4 : BITS <= 4 ? 2 : 1;  // codes per index
    static constexpr int INDEX_BITS = BITS * CODES;
    static constexpr int ROWS = BITS == 1 ? 0 : 1 << INDEX_BITS;
    static constexpr int BYTES = ROWS * 128;
    static constexpr u32 MASK = ((1u << INDEX_BITS) - 1) << 7;
};

// Fill the replicated table; entry(c) is the 16-bit value of code c. All threads of the CTA take part.
template <int BITS, int WARPS, bool WIDE = false, class Entry>
__device__ __forceinline__ void fill_table(char* table, int warp, int lane, Entry entry) {
    using T = Table<BITS>;
    constexpr u32 LOW = (1u << BITS) - 1;
    // A warp stores four rows at once: eight lanes of 16 bytes cover the 128 bytes of one.
#pragma unroll 8
    for (int row = warp * 4 + lane / 8; row < T::ROWS; row += WARPS * 4) {
        u32x4 v;
        if constexpr (T::CODES == 4) {
            const u32 lo = entry(row & LOW) | u32(entry((row >> BITS) & LOW)) << 16;
            const u32 hi = entry((row >> (2 * BITS)) & LOW) | u32(entry(row >> (3 * BITS))) << 16;
            v = {lo, hi, lo, hi};
        } else {
            const u32 pair = entry(row & LOW) | u32(entry(T::CODES == 2 ? row >> BITS : row)) << 16;
            v = {pair, pair, pair, pair};
        }
        *reinterpret_cast<u32x4*>(table + row * (WIDE ? 256 : 128) + lane % 8 * 16) = v;
    }
}

// The same where each lane has the value of code lane % 2^BITS, which divides 32.
template <int BITS, int WARPS, bool WIDE>
__device__ __forceinline__ void fill_table_from_lanes(char* table, u32 warp, u32 lane, u32 value) {
    using T = Table<BITS>;
    const auto entry = [&](u32 code) { return __shfl_sync(0xffffffffu, value, code); };
#pragma unroll
    for (u32 first = 0; first < T::ROWS; first += WARPS * 4) {
        if (first + warp * 4 >= T::ROWS) break;
        const u32 row = first + warp * 4 + lane / 8;
        const u32 pair = entry(row) | entry(T::CODES > 1 ? row >> BITS : row) << 16;
        u32x4 v = {pair, pair, pair, pair};
        if constexpr (T::CODES == 4) v.y = v.w = entry(row >> 2 * BITS) | entry(row >> 3 * BITS) << 16;
        *reinterpret_cast<u32x4*>(table + row * (WIDE ? 256 : 128) + lane % 8 * 16) = v;
    }
}

// A thread's part of a table of values, on its way through registers.
template <int BITS, int WARPS>
struct TableValues {
    static constexpr bool LANES = BITS <= 5;  // the value of code lane % 2^BITS, else those of the rows that fill_table has it store
    static constexpr int COUNT = LANES ? 1 : (Table<BITS>::ROWS + WARPS * 4 - 1) / (WARPS * 4);
    u16 value[COUNT];

    __device__ __forceinline__ void load(const u16* table, int warp, int lane) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            value[i] = load_2(table + (LANES ? lane % (1 << BITS) : min((i * WARPS + warp) * 4 + lane / 8, Table<BITS>::ROWS - 1)));
    }
    template <bool WIDE>
    __device__ __forceinline__ void fill(char* table, int warp, int lane) const {
        if constexpr (LANES) return fill_table_from_lanes<BITS, WARPS, WIDE>(table, warp, lane, value[0]);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int row = (i * WARPS + warp) * 4 + lane / 8;
            const u32 pair = value[i] * 0x10001u;
            if (Table<BITS>::ROWS % (WARPS * 4) == 0 || row < Table<BITS>::ROWS)
                *reinterpret_cast<u32x4*>(table + row * (WIDE ? 256 : 128) + lane % 8 * 16) = {pair, pair, pair, pair};
        }
    }
};

__device__ __forceinline__ u32 rotate_left(u32 v, int by) {
    return __funnelshift_l(v, v, by);
}

// Bytes of v or, for a selector nibble 8 + i, the sign of byte i eight times (which __byte_perm does not offer).
__device__ __forceinline__ u32 spread_signs(u32 v, u32 selector) {
    u32 result;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(result) : "r"(v), "r"(selector));
    return result;
}

template <bool BF16>
__device__ __forceinline__ u32 multiply_add_pair(u32 a, u32 b, u32 c) {
    u32 d;
    if constexpr (BF16)
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    else
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// What a lane needs to look codes up: the shared address of its column of the table, which starts at a multiple of its
// size so that an `or` adds a row's offset. For one bit, the constants of its lop3: they come from the host, because
// the instruction has room for one immediate only and the compiler splits it when it knows both.
struct Lookup {
    u32 table, one, base7, base6;
    u32 low, differ;  // SELECT: the value of code 0, and its exclusive or with that of code 1, as pairs
    u32 zero;         // 0, which the compiler does not know
    u32 pair;         // table values of the lane, see indices.cuh
};

// Row tile `tile` of a unit: a[s] is the A operand of step s.
template <int BITS, bool BF16, bool SELECT, bool WIDE = false>
__device__ __forceinline__ void dequantise(u32 (&a)[4][4], const u32 (&words)[4 * BITS], int tile, const Lookup& lookup) {
    using T = Table<BITS>;
    const auto at = [&](u32 v) { return (v & T::MASK) | lookup.table; };
    const auto pair_at = [&](u32 v) {
        u32 pair;
        asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(at(v)));
        return pair;
    };
    // The address of the entry of byte `i` of a word whose rotation is taken back.
    const auto byte_at = [&](u32 w, int i) { return __byte_perm(w, lookup.table, 0x7604 | i << 4); };
    if constexpr (WIDE) {
        static_assert(BITS == 2 || BITS == 4 || BITS == 8, "bytes hold whole codes");
#pragma unroll
        for (int i = 0; i < BITS; ++i) {
            const u32 w = rotate_left(words[tile * BITS + i], 25);
            u32x2 v[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                if constexpr (BITS == 2)
                    asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v[q].x), "=r"(v[q].y) : "r"(byte_at(w, q)));
                else
                    asm("ld.shared.u32 %0, [%1];" : "=r"(v[q].x) : "r"(byte_at(w, q)));
            }
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                if constexpr (BITS == 2)
                    a[2 * i + q / 2][q % 2 * 2] = v[q].x, a[2 * i + q / 2][q % 2 * 2 + 1] = v[q].y;
                else if constexpr (BITS == 4)
                    a[i][q / 2 + q % 2 * 2] = v[q].x;
                else if (q % 2 == 0)
                    a[i / 2][i % 2 + q] = __byte_perm(v[q].x, v[q + 1].x, 0x7610);
            }
        }
    } else if constexpr (SELECT) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const u32 v = words[tile] << i;
            a[i / 2][i % 2] = (spread_signs(v, 0xbb99) & lookup.differ) ^ lookup.low;
            a[i / 2][i % 2 + 2] = (spread_signs(v, 0xaa88) & lookup.differ) ^ lookup.low;
        }
    } else if constexpr (BITS == 1) {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            const u32 v = words[tile] << (2 * s);
            a[s][0] = (~v & 0x80008000u) ^ lookup.one;  // -1 or 1
            a[s][1] = v & 0x40004000u;                  // 0 or 2
            a[s][2] = (v & 0x00800080u) | lookup.base7;  // bf16: 2 or 4; fp16: 16 or 18
            a[s][3] = (v & 0x00400040u) | lookup.base6;  // bf16: 4 or 6; fp16: 32 or 34
        }
    } else if constexpr (BITS == 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 w = words[tile * 2 + i];
            const u32 fields[4] = {w, w >> 8, w >> 16, rotate_left(w, 8)};
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                u32x2 four;
                asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(four.x), "=r"(four.y) : "r"(at(fields[q])));
                a[2 * i + q / 2][q % 2 * 2] = four.x;
                a[2 * i + q / 2][q % 2 * 2 + 1] = four.y;
            }
        }
    } else if constexpr (BITS == 3) {
        const u32 w0 = words[tile * 3], w1 = words[tile * 3 + 1], w2 = words[tile * 3 + 2];
#pragma unroll
        for (int pair = 0; pair < 15; ++pair) {
            const u32 w = pair < 5 ? w0 : pair < 10 ? w1 : w2;
            const int shift = pair % 5 * 6 - 6;
            const int s = pair / 4, h = pair / 2 % 2, jj = pair % 2;
            a[s][h + 2 * jj] = pair_at(shift < 0 ? w << 6 : w >> shift);
        }
        const u32 spare = (rotate_left(w0, 8) & 0x180u) | (rotate_left(w1, 10) & 0x600u) | (rotate_left(w2, 12) & 0x1800u);
        a[3][3] = pair_at(spare);
    } else if constexpr (BITS == 4) {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            const u32 w = words[tile * 4 + s];
            a[s][0] = pair_at(w);
            a[s][2] = pair_at(w >> 8);
            a[s][1] = pair_at(w >> 16);
            a[s][3] = pair_at(rotate_left(w, 8));
        }
    } else {
#pragma unroll
        for (int p = 0; p < 16; ++p) {
            u32 value[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int e = 2 * p + i, bit = e * BITS % 32;
                const u32 w = words[tile * BITS + e * BITS / 32];
                u32 v;
                if constexpr (BITS == 8)
                    v = bit == 24 ? rotate_left(w, 8) : w >> bit;
                else if (bit + BITS > 32)
                    v = __funnelshift_r(w, words[tile * BITS + e * BITS / 32 + 1], bit - 7);
                else
                    v = bit < 7 ? w << (7 - bit) : w >> (bit - 7);
                value[i] = pair_at(v);
            }
            a[p / 4][p / 2 % 2 + p % 2 * 2] = __byte_perm(value[0], value[1], 0x7610);
        }
    }
}

// One bit by look-ups: a table row has the four words of a step's operand, for its eight codes. Those are two
// neighbouring bits of each byte of a word; a product brings them together, in the order of their bytes.
constexpr int OCTET_TABLE_BYTES = 256 * 128;

// low, high: values of codes 0 and 1. All threads of the CTA take part.
template <int WARPS>
__device__ __forceinline__ void fill_octets(char* table, int warp, int lane, u32 low, u32 high) {
#pragma unroll 8
    for (int row = warp * 4 + lane / 8; row < 256; row += WARPS * 4) {
        const auto pair = [&](int i) { return (row >> (3 - i) & 1 ? high : low) | (row >> (7 - i) & 1 ? high : low) << 16; };
        *reinterpret_cast<u32x4*>(table + row * 128 + lane % 8 * 16) = u32x4{pair(0), pair(1), pair(2), pair(3)};
    }
}

// A row tile of one bit; lookup.table names the lane's column of 16 bytes.
__device__ __forceinline__ void octets_to_operand(u32 (&a)[4][4], u32 word, const Lookup& lookup) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        const u32 together = (word & 0xc0c0c0c0u >> 2 * s) * (0x41041u << 2 * s);  // in the upper byte
        asm("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(a[s][0]), "=r"(a[s][1]), "=r"(a[s][2]), "=r"(a[s][3])
            : "r"((together >> 17 & 0x7f80u) | lookup.table));
    }
}

// The same for integers of 4 to 8 bits without look-ups: code - 2^(BITS - 1), exactly. A code or'ed into the mantissa of
// 2^7 (bf16) or 2^10 (fp16) is added to it, and a subtraction takes it off again.
template <int BITS, bool BF16>
__device__ __forceinline__ void to_integers(u32 (&a)[4][4], const u32 (&words)[4 * BITS], int tile) {
    static_assert(BITS >= 4);
    constexpr u32 MAGIC = BF16 ? 0x43004300 : 0x64006400, MASK = ((1u << BITS) - 1) * 0x10001u;
    constexpr u32 CENTRE = MAGIC + 0x10001u * (1u << (BITS - 1));
    const auto value = [](u32 codes) {
        // bf16 has room for seven bits: 2^7 + the lower ones, less 2^7 or 2^8 as the eighth says.
        if constexpr (BF16 && BITS == 8) 
            return subtract_pair<BF16>(combine<MASK_OR>(codes, 0x007f007f, MAGIC), combine<MASK_XOR>(codes, 0x00800080, CENTRE));
        return subtract_pair<BF16>(combine<MASK_OR>(codes, MASK, MAGIC), CENTRE);
    };
#pragma unroll
    for (int p = 0; p < 16; ++p) {
        u32& to = a[p / 4][p / 2 % 2 + p % 2 * 2];
        if constexpr (BITS == 4) {
            const u32 low = rotate_left(words[tile * 4 + p / 4], 25);
            to = value(__byte_perm(low, low >> 4, 0x4400 + p % 4 * 0x1111));
        } else if constexpr (BITS == 8) {
            const u32 codes = rotate_left(words[tile * 8 + p / 2], 25);
            to = value(__byte_perm(codes, 0, p % 2 ? 0x4342 : 0x4140));
        } else {
            const int e = 2 * p, low_bit = e * BITS % 32, high_bit = (e + 1) * BITS % 32;
            const int low_word = tile * BITS + e * BITS / 32, high_word = tile * BITS + (e + 1) * BITS / 32;
            const u32 lo = words[low_word], hi = words[high_word];
            const u32 low = low_bit + BITS > 32 ? __funnelshift_r(lo, words[low_word + 1], low_bit) : lo >> low_bit;
            const u32 high = high_bit + BITS > 32 ? __funnelshift_r(hi, words[high_word + 1], high_bit - 16)
                             : high_bit < 16      ? hi << (16 - high_bit)
                                                  : hi >> (high_bit - 16);
            to = value(__byte_perm(low, high, 0x7610));
        }
    }
}
