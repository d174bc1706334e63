// From the masks and kept codes of 16:32 sparse weights to A fragments of mma.m16n8k16.
//
// Lane 4g + t expands columns 16t to 16t + 15 of a unit for rows g and g + 8 of each row tile: half t % 2 of block t / 2 of 32,
// whose mask and 16 codes, ascending in k from the lowest four bits, both of its lanes read (fdk/packing/fragments.py).
// The lower half counts its codes from the bottom, the upper one from the top, so that one count of kept weights says where
// the second byte of mask finds its codes. A byte of mask then names two selectors by which byte permutes spread eight codes
// over eight columns, zeros between them.
//
// Steps 0 and 1 hold the 8 columns at the outer end of the block, steps 2 and 3 the others: the other operand is loaded so.
#pragma once
#include "dequantise.cuh"

constexpr int SELECTOR_BYTES = 256 * 128, KEPT_VALUES_BYTES = 32 * 128;

// Selectors of eight columns for a byte of mask: nibble i % 4 (times 4, plus 16 from i = 4 on) names the code of column i, with
// columns 1 and 2 exchanged, among codes 0, 2, 4, 6, 1, 3, 5, 7, or 8, which makes a zero of a byte below 128.
__device__ __forceinline__ u32 selectors(u32 mask, bool from_top) {
    u32 found = 0, code = from_top ? 8 - __popc(mask) : 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const bool kept = mask >> i & 1;
        const int place = i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : i % 4;
        found |= (kept ? code % 2 * 4 + code / 2 : 8) << (16 * (i / 4) + 4 * place);
        code += kept;
    }
    return found;
}

// What a row of the table of selectors has for its byte of mask: two entries, for codes counted from the bottom and from the top.
//   WHOLE       4 bytes: the selectors of all eight columns
//   HALVED      8 bytes: one of four columns in each word, and above the first one by how much the codes of the next byte of
//               mask are shifted down
//   NEIGHBOURS  the same, but of even columns in the first word and of odd ones in the second, in order
enum SelectorRow { WHOLE, HALVED, NEIGHBOURS };

// Fill the table of selectors, a row of 128 bytes for a byte of mask: its even entries count codes from the bottom, as lower
// halves of a block do. All warps take part.
template <int WARPS, SelectorRow ROW = WHOLE>
__device__ __forceinline__ void fill_selectors(char* table, int warp, int lane) {
    for (int first = warp * 32; first < 256; first += WARPS * 32) {
        const u32 bottom = selectors(first + lane, false), top = selectors(first + lane, true);
#pragma unroll
        for (int i = 0; i < 32; i += 4) {
            const u32 b = __shfl_sync(0xffffffffu, bottom, i + lane / 8), t = __shfl_sync(0xffffffffu, top, i + lane / 8);
            u32x4 entries = {b, t, b, t};
            if constexpr (ROW != WHOLE) {
                const auto half = [](u32 all, int i) {
                    if constexpr (ROW == NEIGHBOURS) return __byte_perm(all, 0, i ? 0x4431 : 0x4420);
                    return i ? all >> 16 : all & 0xffffu;
                };
                const u32 used = 4 * __popc(first + i + lane / 8);
                entries = {half(b, 0) | used << 16, half(b, 1), half(t, 0) | (32 - used) << 16, half(t, 1)};
            }
            *reinterpret_cast<u32x4*>(table + (first + i + lane / 8) * 128 + lane % 8 * 16) = entries;
        }
    }
}

// Fill the table of values behind it: row 0 is a dropped weight, row 16 + c one of code c.
template <int WARPS, class Entry>
__device__ __forceinline__ void fill_kept_values(char* table, int warp, int lane, Entry entry) {
    for (int row = warp * 4 + lane / 8; row < 32; row += WARPS * 4) {
        const u32 pair = row < 16 ? 0 : entry(row - 16) * 0x10001u;
        *reinterpret_cast<u32x4*>(table + row * 128 + lane % 8 * 16) = u32x4{pair, pair, pair, pair};
    }
}

// What a lane needs to expand codes. Integers: code ^ 8, so that a dropped weight's zero stands for 8, their middle.
template <bool TABLE, bool BF16>
struct Expansion {
    u32 selectors, values;  // shared addresses of the lane's columns of the tables
    u32 bytes;              // `which` bytes of mask come first
    u32 base;               // pair of 2^7 (bf16) or 2^10 (fp16), exclusive or 8
    u32 kept;               // tables: the bit of a kept code
    int from_top;           // 1 in an upper half

    __device__ __forceinline__ explicit Expansion(const Lookup& lookup)
        : selectors(lookup.table),
          values(lookup.table + SELECTOR_BYTES),
          bytes(threadIdx.x % 2 ? 0x4243 : 0x4140),
          base((BF16 ? 0x43084308u : 0x64086408u) ^ lookup.zero),
          kept((TABLE ? 0x10101010u : 0x08080808u) ^ lookup.zero),
          from_top(threadIdx.x % 2) {}

    // Columns of a row: a[s][h] and a[s][h + 2] of steps `s` and s + 1, from eight codes of which the selector takes some.
    __device__ __forceinline__ void eight(u32 (&a)[4][4], int s, int h, u32 codes, u32 selector) const {
        // Tables mark kept codes; integers turn over the top bit, which makes two's complement of them.
        constexpr int MARK = TABLE ? MASK_OR : MASK_XOR;
        const u32 even = combine<MARK>(codes, 0x0f0f0f0fu, kept), odd = combine<MARK>(codes >> 4, 0x0f0f0f0fu, kept);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // __byte_perm would clear the selectors' top bits.
            u32 four;
            asm("prmt.b32 %0, %1, %2, %3;" : "=r"(four) : "r"(even), "r"(odd), "r"(i ? selector >> 16 : selector));
            if constexpr (TABLE) {
                u32 value[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const u32 row = j == 0 ? four << 7 : four >> (8 * j - 7);
                    asm("ld.shared.u32 %0, [%1];" : "=r"(value[j]) : "r"(combine<MASK_OR>(row, 0xf80u, values)));
                }
                a[s + i][h] = __byte_perm(value[0], value[2], 0x7610), a[s + i][h + 2] = __byte_perm(value[1], value[3], 0x7610);
            } else {
                const auto pair = [&](u32 v) {
                    constexpr u32 ONE = BF16 ? 0x3f803f80u : 0x3c003c00u, MIDDLE = BF16 ? 0xc308c308u : 0xe408e408u;
                    return multiply_add_pair<BF16>(combine<MASK_XOR>(v, 0x000f000fu, base), ONE, MIDDLE);
                };
                a[s + i][h] = pair(four), a[s + i][h + 2] = pair(four >> 8);
            }
        }
    }

    // Row tile `tile` of a unit, whose words are mask and codes of rows g and g + 8 of each row tile.
    __device__ __forceinline__ void operator()(u32 (&a)[4][4], const u32 (&words)[24], int tile) const {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const u32 mask = __byte_perm(words[6 * tile + 3 * h], 0, bytes), low = words[6 * tile + 3 * h + 1], high = words[6 * tile + 3 * h + 2];
            u32 outer, inner;
            asm("ld.shared.u32 %0, [%1];" : "=r"(outer) : "r"(combine<MASK_OR>(mask << 7, 0x7f80u, selectors)));
            asm("ld.shared.u32 %0, [%1];" : "=r"(inner) : "r"(combine<MASK_OR>(mask >> 9, 0x7f80u, selectors)));
            const int used = 4 * __popc(mask & 0xffu);
            eight(a, 0, h, from_top ? high : low, outer);
            eight(a, 2, h, __funnelshift_rc(low, high, from_top ? 32 - used : used), inner);
        }
    }
};

// Integers as A operands of mma.m16n8k32, signed bytes of 16 times their value, so that a dropped one is a zero: a[step][h] and
// a[step][h + 2] have four columns each of row g + 8h, with the middle two exchanged, from the eight at the outer end of the block first.
struct ByteExpansion {
    u32 selectors;     // shared address of the lane's columns of the table, whose rows are HALVED
    u32 outer, inner;  // bits by which a byte of mask is turned to where it is an offset into it
    u32 first;         // bits below the codes of the outer end
    u32 turned;        // 8 in each byte

    __device__ __forceinline__ explicit ByteExpansion(const Lookup& lookup)
        : selectors(lookup.table),
          outer(threadIdx.x % 2 ? 17 : 25),
          inner(threadIdx.x % 2 ? 9 : 1),
          first(threadIdx.x % 2 ? 32 : 0),
          turned(0x08080808u ^ lookup.zero) {}

    __device__ __forceinline__ void eight(u32 (&a)[4], int h, u32 codes, u32x2 selector) const {
        // Two's complement of four bits, below 128 as a byte, so that a selector can make zeros; times 16 it is one of eight.
        const u32 even = combine<MASK_XOR>(codes, 0x0f0f0f0fu, turned), odd = combine<MASK_XOR>(codes >> 4, 0x0f0f0f0fu, turned);
        asm("prmt.b32 %0, %1, %2, %3;" : "=r"(a[h]) : "r"(even), "r"(odd), "r"(selector.x));
        asm("prmt.b32 %0, %1, %2, %3;" : "=r"(a[h + 2]) : "r"(even), "r"(odd), "r"(selector.y));
        a[h] *= 16, a[h + 2] *= 16;
    }

    // Row tile `tile` of a unit, whose words are mask and codes of rows g and g + 8 of each row tile.
    __device__ __forceinline__ void operator()(u32 (&a)[2][4], const u32 (&words)[24], int tile) const {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const u32 mask = words[6 * tile + 3 * h], low = words[6 * tile + 3 * h + 1], high = words[6 * tile + 3 * h + 2];
            const auto entry = [&](u32 turn) {
                u32x2 found;
                asm("ld.shared.v2.u32 {%0, %1}, [%2];"
                    : "=r"(found.x), "=r"(found.y)
                    : "r"(combine<MASK_OR>(__funnelshift_r(mask, mask, turn), 0x7f80u, selectors)));
                return found;
            };
            const u32x2 end = entry(outer);
            eight(a[0], h, __funnelshift_rc(low, high, first), end);
            eight(a[1], h, __funnelshift_rc(low, high, end.x >> 16), entry(inner));
        }
    }
};
