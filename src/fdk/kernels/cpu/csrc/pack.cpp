// Canonical parts to rows16 and back. Both directions move bits only, so the inverse is exact.
#include "scalar.h"

namespace {

struct Pack {
    const fdk_weight* w;
    uint8_t* data;    // rows16
    uint8_t* codes;   // canonical [n, row_bytes]
    uint8_t* scales;  // [n, groups] of scale_bytes
    uint8_t* zeros;   // [n, groups] of zero_bytes, or null
};

// Where code j of a unit lives: line, bit of the dword. The left-over stream may spread a code over several lines.
template <int B>
FDK_INLINE void put_code(uint32_t (&lines)[B], int j, uint32_t code) {
    constexpr int q = 16 / B, rest = 16 % B, direct = B * q;
    const int p = j / 2, high = 16 * (j % 2);
    if (p < direct) {
        lines[p / q] |= code << (B * (p % q) + high);
        return;
    }
    for (int i = 0; i < B; i++) {
        int at = (p - direct) * B + i;  // in the stream of left-over bits
        if (rest) lines[at / (rest ? rest : 1)] |= (code >> i & 1) << (B * q + at % (rest ? rest : 1) + high);
    }
}

template <int B>
FDK_INLINE uint32_t get_code(const uint32_t (&lines)[B], int j) {
    constexpr int q = 16 / B, rest = 16 % B, direct = B * q;
    const int p = j / 2, high = 16 * (j % 2);
    if (p < direct) return lines[p / q] >> (B * (p % q) + high) & ((1u << B) - 1);
    uint32_t code = 0;
    for (int i = 0; i < B; i++) {
        int at = (p - direct) * B + i;
        if (rest) code |= (lines[at / (rest ? rest : 1)] >> (B * q + at % (rest ? rest : 1) + high) & 1) << i;
    }
    return code;
}

// One row of one unit: 4 * B bytes of the canonical stream <-> B dwords, 64 bytes apart.
template <int B>
FDK_INLINE void pack_unit(const uint8_t* stream, uint8_t* unit) {
    uint8_t bytes[4 * B + 8] = {0};
    memcpy(bytes, stream, 4 * B);
    uint32_t lines[B] = {0};
#pragma GCC unroll 32
    for (int j = 0; j < 32; j++) {
        uint32_t word;
        memcpy(&word, bytes + j * B / 8, 4);
        put_code<B>(lines, j, word >> (j * B % 8) & ((1u << B) - 1));
    }
#pragma GCC unroll 8
    for (int i = 0; i < B; i++) memcpy(unit + 64 * i, &lines[i], 4);
}

template <int B>
FDK_INLINE void unpack_unit(const uint8_t* unit, uint8_t* stream) {
    uint32_t lines[B];
#pragma GCC unroll 8
    for (int i = 0; i < B; i++) memcpy(&lines[i], unit + 64 * i, 4);
    uint32_t words[B + 1] = {0};
#pragma GCC unroll 32
    for (int j = 0; j < 32; j++) {
        uint64_t code = (uint64_t)get_code<B>(lines, j) << (j * B % 32);
        words[j * B / 32] |= (uint32_t)code;
        words[j * B / 32 + 1] |= (uint32_t)(code >> 32);
    }
    memcpy(stream, words, 4 * B);
}

// The [groups] column of 16 rows <-> the lines of a superblock.
FDK_INLINE void move_group(uint8_t* line, uint8_t* rows, int64_t stride, int count, int64_t at, int size, bool pack) {
    for (int r = 0; r < count; r++) {
        uint8_t* outside = rows + r * stride + at * size;
        uint8_t* inside = line + r * size;
        memcpy(pack ? inside : outside, pack ? outside : inside, size);
    }
}

template <int B, bool PACK>
void convert(const Pack& p, int64_t block0, int64_t block1) {
    const fdk_weight& w = *p.w;
    const int64_t row_bytes = (w.k * B + 7) / 8, S = w.split ? 2 : 1;
    const int64_t scales_size = FDK_ROWS * w.scale_bytes, zeros_size = FDK_ROWS * w.zero_bytes;
    const fdk_range* range = w.ranges;
    for (int64_t b = block0; b < block1; b++) {
        while (b >= range->block1) range++;
        const int64_t row = range->row0 + (b - range->block0) * FDK_ROWS;
        const int count = range->row1 - row < FDK_ROWS ? (int)(range->row1 - row) : (int)FDK_ROWS;
        uint8_t* super = p.data + b * w.block_bytes;
        if (PACK) memset(super, 0, w.block_bytes);
        uint8_t* codes = p.codes + row * row_bytes;
        for (int64_t s = 0; s < w.supers; s++, super += w.super_bytes) {
            for (int64_t i = 0; i < S && s * S + i < w.groups; i++) {
                const int64_t g = s * S + i;
                move_group(super + i * scales_size, p.scales + row * w.groups * w.scale_bytes,
                           w.groups * w.scale_bytes, count, g, w.scale_bytes, PACK);
                if (w.zero_bytes)
                    move_group(super + S * scales_size + i * zeros_size, p.zeros + row * w.groups * w.zero_bytes,
                               w.groups * w.zero_bytes, count, g, w.zero_bytes, PACK);
            }
            uint8_t* unit = super + S * (scales_size + zeros_size);
            for (int64_t u = 0; u < w.units; u++, unit += 64 * B) {
                const int64_t at = (s * w.units + u) * 4 * B, left = row_bytes - at;
                if (left <= 0) break;
                for (int r = 0; r < count; r++) {
                    uint8_t* stream = codes + r * row_bytes + at;
                    if (left >= 4 * B) {
                        if (PACK) pack_unit<B>(stream, unit + 4 * r);
                        else unpack_unit<B>(unit + 4 * r, stream);
                    } else {
                        uint8_t tail[4 * B] = {0};
                        if (PACK) {
                            memcpy(tail, stream, left);
                            pack_unit<B>(tail, unit + 4 * r);
                        } else {
                            unpack_unit<B>(unit + 4 * r, tail);
                            memcpy(stream, tail, left);
                        }
                    }
                }
            }
        }
    }
}

// Bits 0, 2, 4, ... of a dword as 16 bits, and back.
FDK_INLINE uint32_t every_second(uint32_t v) {
    v &= 0x55555555u;
    v = (v | v >> 1) & 0x33333333u;
    v = (v | v >> 2) & 0x0f0f0f0fu;
    v = (v | v >> 4) & 0x00ff00ffu;
    return (v | v >> 8) & 0xffffu;
}

FDK_INLINE uint32_t apart(uint32_t v) {
    v = (v | v << 8) & 0x00ff00ffu;
    v = (v | v << 4) & 0x0f0f0f0fu;
    v = (v | v << 2) & 0x33333333u;
    return (v | v << 1) & 0x55555555u;
}

// Where planes 2 and 3 (kind 0) or 4 to 7 (kind 1) put the bits of pairs, byte by byte of the 16 pairs: to[kind][byte], and
// back: from[kind][byte of the half].
struct PlanePlaces {
    uint16_t to[2][2][256], from[2][2][256];
    PlanePlaces() {
        memset(this, 0, sizeof(*this));
        for (int kind = 0; kind < 2; kind++)
            for (int pair = 0; pair < 16; pair++) {
                const int half = pair / 8, f = pair % 8;
                const int bit = kind ? 8 * (f / 4) + 4 * half + 2 * (f % 2) + f / 2 % 2 : 4 * (f / 2) + 2 * half + f % 2;
                for (int v = 0; v < 256; v++) {
                    to[kind][half][v] |= (uint16_t)((v >> f & 1) << bit);
                    from[kind][bit / 8][v] |= (uint16_t)((v >> bit % 8 & 1) << pair);
                }
            }
    }
    static FDK_INLINE uint32_t move(const uint16_t (&places)[2][256], uint32_t v) {
        return places[0][v & 255] | places[1][v >> 8 & 255];
    }
};

// Canonical planes [n, 8, row_bytes] <-> the planes of nested blocks.
template <bool PACK>
void convert_nested(const Pack& p, int64_t block0, int64_t block1) {
    const PlanePlaces places;
    const fdk_weight& w = *p.w;
    const int64_t row_bytes = (w.k + 7) / 8, units = w.supers * w.units;
    const fdk_range* range = w.ranges;
    for (int64_t b = block0; b < block1; b++) {
        while (b >= range->block1) range++;
        const int64_t row = range->row0 + (b - range->block0) * FDK_ROWS;
        const int count = range->row1 - row < FDK_ROWS ? (int)(range->row1 - row) : (int)FDK_ROWS;
        uint8_t* block = p.data + b * w.block_bytes;
        if (PACK) memset(block, 0, w.block_bytes);
        for (int64_t g = 0; g < w.groups; g++)
            move_group(block + g * FDK_ROWS * w.scale_bytes, p.scales + row * w.groups * w.scale_bytes,
                       w.groups * w.scale_bytes, count, g, w.scale_bytes, PACK);
        for (int64_t u = 0; u < units; u++) {
            const int64_t left = row_bytes - 4 * u, size = left < 4 ? left : 4;
            if (left <= 0) break;
            for (int r = 0; r < count; r++) {
                uint8_t *line = block + w.planes_at + 64 * u + 4 * r, *plane = p.codes + (row + r) * 8 * row_bytes + 4 * u;
                uint32_t lines[8] = {0}, bits[8] = {0};
                if (PACK) {
                    for (int t = 0; t < 8; t++) memcpy(&bits[t], plane + t * row_bytes, size);
                    for (int parity = 0; parity < 2; parity++)
                        for (int t = 0; t < 8; t++) {
                            const uint32_t v = every_second(bits[t] >> parity);
                            if (t < 2)
                                for (int l = 0; l < 2; l++) lines[l] |= apart(v >> 8 * l & 255) << t << 16 * parity;
                            else lines[t] |= PlanePlaces::move(places.to[t > 3], v) << 16 * parity;
                        }
                    for (int t = 0; t < 8; t++) memcpy(line + t * w.plane_bytes, &lines[t], 4);
                } else {
                    for (int t = 0; t < 8; t++) memcpy(&lines[t], line + t * w.plane_bytes, 4);
                    for (int parity = 0; parity < 2; parity++)
                        for (int t = 0; t < 8; t++) {
                            uint32_t v = 0;
                            if (t < 2)
                                for (int l = 0; l < 2; l++) v |= every_second((lines[l] >> 16 * parity & 0xffff) >> t) << 8 * l;
                            else v = PlanePlaces::move(places.from[t > 3], lines[t] >> 16 * parity);
                            bits[t] |= apart(v) << parity;
                        }
                    for (int t = 0; t < 8; t++) memcpy(plane + t * row_bytes, &bits[t], size);
                }
            }
        }
    }
}

template <bool PACK>
void convert_part(void* context, int64_t part, int64_t parts) {
    const Pack& p = *(const Pack*)context;
    if (p.w->storage == FDK_NESTED_PLANES)
        return convert_nested<PACK>(p, p.w->blocks * part / parts, p.w->blocks * (part + 1) / parts);
    static void (*const by_bits[9])(const Pack&, int64_t, int64_t) = {
        nullptr,          convert<1, PACK>, convert<2, PACK>, convert<3, PACK>, convert<4, PACK>,
        convert<5, PACK>, convert<6, PACK>, convert<7, PACK>, convert<8, PACK>};
    by_bits[p.w->bits](p, p.w->blocks * part / parts, p.w->blocks * (part + 1) / parts);
}

// What a unit adds to a superblock.
int64_t unit_bytes(int32_t storage, int32_t bits) {
    return storage == FDK_NESTED_PLANES ? 0 : storage == FDK_SPARSE ? 64 + 32 * bits : 64 * bits;
}

}  // namespace

FDK_EXPORT int64_t fdk_weight_size(int64_t ranges) {
    return (int64_t)sizeof(fdk_weight) + (ranges > 1 ? ranges - 1 : 0) * (int64_t)sizeof(fdk_range);
}

// Fills `w` (fdk_weight_size bytes). group 0 means one scale per row; tables :: [ranges][2^bits] of dtype, or null for
// affine families. A nested weight has one table, indexed by its leading `bits` planes, plane t being bit t. Returns 0, or -1 if an argument is out of range.
FDK_EXPORT int32_t fdk_weight_init(fdk_weight* w, const void* data, int64_t n, int64_t k, int32_t bits, int64_t group,
                                   int32_t dtype, int32_t family, const int64_t* row_ends, int64_t ranges,
                                   const void* tables, int32_t storage) {
    if (storage < 0 || storage > FDK_SPARSE || (storage == FDK_NESTED_PLANES && (bits < 2 || family != FDK_TABLE))) return -1;
    if (storage == FDK_SPARSE && (bits != 4 || k % FDK_UNIT || group % FDK_UNIT)) return -1;
    if (bits < 1 || bits > 8 || dtype < 0 || dtype > 2 || family < 0 || family > 3 || ranges < 1) return -1;
    if (group && (group % 16 || k % group)) return -1;
    if (family == FDK_TABLE && !tables) return -1;
    memset(w, 0, sizeof(*w));
    w->data = (const uint8_t*)data;
    w->n = n, w->k = k, w->bits = bits, w->dtype = dtype, w->family = family;
    w->storage = storage;
    w->scale_bytes = dtype == FDK_FP32 ? 4 : 2;
    w->zero_bytes = family == FDK_UINT_U8 ? 1 : family == FDK_UINT_FLOAT ? w->scale_bytes : 0;
    w->group = group ? group : k;
    w->groups = group ? k / group : 1;
    w->split = group % FDK_UNIT != 0;
    const int64_t S = w->split ? 2 : 1;
    w->units = group ? S * group / FDK_UNIT : (k + FDK_UNIT - 1) / FDK_UNIT;
    w->supers = (w->groups + S - 1) / S;
    w->k_padded = w->supers * w->units * FDK_UNIT;
    w->super_bytes = S * FDK_ROWS * (w->scale_bytes + w->zero_bytes) + w->units * unit_bytes(storage, bits);
    w->block_bytes = (w->supers * w->super_bytes + 63) / 64 * 64;
    if (storage == FDK_NESTED_PLANES) {
        w->planes_at = w->block_bytes;
        w->plane_bytes = w->supers * w->units * 64;
        w->block_bytes += FDK_PLANES * w->plane_bytes;
    }
    w->ranges_count = ranges;
    w->bf16_exact = dtype == FDK_BF16 && !(storage == FDK_SPARSE && family == FDK_UINT_FLOAT);
    w->bf16_values = 1;
    int64_t row = 0, block = 0;
    const int entries = 1 << bits;
    for (int64_t t = 0; t < ranges; t++) {
        fdk_range* r = &w->ranges[t];
        r->row0 = row, r->row1 = row_ends[t];
        r->block0 = block, r->block1 = block + (r->row1 - row + FDK_ROWS - 1) / FDK_ROWS;
        row = r->row1, block = r->block1;
        for (int i = 0; i < 256; i++) {
            const int code = i % entries;
            float v = (float)code;  // FDK_UINT_FLOAT: the stored zero may be any float, so nothing is taken off here
            if (family == FDK_TABLE) v = load_float(tables, t * entries + code, dtype);
            else if (family != FDK_UINT_FLOAT) v = (float)(code - entries / 2);
            const uint32_t bits32 = bits_of(v);
            r->value[i] = v;
            r->value_bf16[i] = to_bf16(v);
            r->value_high[i] = (uint16_t)(bits32 >> 16);
            r->value_low[i] = (uint16_t)bits32;
            if (r->value_low[i]) w->bf16_values = 0;
            // vdpbf16ps reads subnormal inputs as zero.
            if ((bits32 & 0x7f800000u) == 0 && (bits32 & 0x7fffffffu) != 0) w->bf16_exact = 0;
        }
    }
    w->blocks = block;
    return row == n ? 0 : -1;
}

FDK_EXPORT void fdk_pack(const fdk_weight* w, void* data, const void* codes, const void* scales, const void* zeros,
                         int32_t threads) {
    Pack p = {w, (uint8_t*)data, (uint8_t*)codes, (uint8_t*)scales, (uint8_t*)zeros};
    fdk_parallel(convert_part<true>, &p, threads);
}

FDK_EXPORT void fdk_unpack(const fdk_weight* w, const void* data, void* codes, void* scales, void* zeros,
                           int32_t threads) {
    Pack p = {w, (uint8_t*)data, (uint8_t*)codes, (uint8_t*)scales, (uint8_t*)zeros};
    fdk_parallel(convert_part<false>, &p, threads);
}
