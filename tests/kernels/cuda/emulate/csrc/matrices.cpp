// Tensor cores: mma.sync, wgmma, and the loads and stores of their fragments.
#include "floats.hpp"

namespace emulator {
namespace {

struct Tile {  // A of one warp: 16 x 16
    float v[16][16];
};

template <class Half>
Tile operand_a(const Warp& w, const i32* at) {
    Tile a;
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 4; ++i) {
            const u32 pair = w.r[at[i] + l];
            float* to = &a.v[l / 4 + i % 2 * 8][l % 4 * 2 + i / 2 * 8];
            to[0] = Half::widen(pair & 0xffff), to[1] = Half::widen(pair >> 16);
        }
    return a;
}

// d[16 x 8] (+)= a b, row by row: lane 4g+t has rows g, g+8 and columns 2t, 2t+1 in four registers.
void multiply_add(Warp& w, const i32* d, const i32* c, const Tile& a, const float (&b)[16][8], bool keep) {
    float sum[16][8] = {};
    if (keep)
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 4; ++i) sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2] = get<float>(w.r, c[i], l);
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 8; ++column) sum[row][column] += a.v[row][k] * b[k][column];
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 4; ++i) set<float>(w.r, d[i], l, sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
}

// at: 4 of d, 4 of a, 2 of b, 4 of c
template <class Half>
Outcome mma(Warp& w, const Instruction& I, u32) {
    const i32* at = I.at;
    float b[16][8];
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 2; ++i) {
            const u32 pair = w.r[at[8 + i] + l];
            b[l % 4 * 2 + i * 8][l / 4] = Half::widen(pair & 0xffff), b[l % 4 * 2 + i * 8 + 1][l / 4] = Half::widen(pair >> 16);
        }
    multiply_add(w, at, at + 10, operand_a<Half>(w, at + 4), b, true);
    return Outcome::NEXT;
}

// The same with k = 32 and two of each four columns of a, whose places are given. Equal ones are undefined by PTX: they count
// twice here, as on an H200.
// at: 4 of d, 4 of a, 4 of b, 4 of c, the places and the pair of lanes in each four that has them
template <class Half>
Outcome mma_sparse(Warp& w, const Instruction& I, u32) {
    const i32* at = I.at;
    const Tile kept = operand_a<Half>(w, at + 4);
    float b[32][8], sum[16][8];
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 4; ++i) {
            const u32 pair = w.r[at[8 + i] + l];
            b[l % 4 * 2 + i * 8][l / 4] = Half::widen(pair & 0xffff), b[l % 4 * 2 + i * 8 + 1][l / 4] = Half::widen(pair >> 16);
            sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2] = get<float>(w.r, at[12 + i], l);
        }
    for (int row = 0; row < 16; ++row)
        for (int four = 0; four < 8; ++four) {
            const u32 word = w.r[at[16] + row % 8 * 4 + 2 * at[17] + four / 4];
            const u32 places = word >> (row / 8 * 16 + four % 4 * 4) & 15;
            for (int i = 0; i < 2; ++i)
                for (int column = 0; column < 8; ++column)
                    sum[row][column] += kept.v[row][four * 2 + i] * b[four * 4 + (places >> 2 * i) % 4][column];
        }
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 4; ++i) set<float>(w.r, at[i], l, sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
    return Outcome::NEXT;
}

// The same with 8-bit integers: m16n8k32.
template <class A, class B>
Outcome mma_integers(Warp& w, const Instruction& I, u32) {
    const i32* at = I.at;
    i32 a[16][32], b[32][8], sum[16][8];
    for (int l = 0; l < 32; ++l)
        for (int byte = 0; byte < 4; ++byte) {
            for (int i = 0; i < 4; ++i) a[l / 4 + i % 2 * 8][l % 4 * 4 + i / 2 * 16 + byte] = A(w.r[at[4 + i] + l] >> 8 * byte);
            for (int i = 0; i < 2; ++i) b[l % 4 * 4 + i * 16 + byte][l / 4] = B(w.r[at[8 + i] + l] >> 8 * byte);
        }
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 4; ++i) sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2] = get<i32>(w.r, at[10 + i], l);
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 32; ++k)
            for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 4; ++i) set<i32>(w.r, at[i], l, sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
    return Outcome::NEXT;
}

// at: count, whether transposed, address, its offset, registers
Outcome load_matrices(Warp& w, const Instruction& I, u32) {
    const i32* at = I.at;
    for (int i = 0; i < at[0]; ++i) {
        u16 matrix[8][8];
        for (int row = 0; row < 8; ++row) {
            const u32 from = w.r[at[2] + 8 * i + row] + at[3];
            std::memcpy(matrix[row], resolve(w, Space::SHARED, from, 16), 16);
            observe(w, 8 * i + row, Space::SHARED, from, 16, false);
        }
        for (int l = 0; l < 32; ++l) {
            const int g = l / 4, t = l % 4 * 2;
            w.r[at[4 + i] + l] = at[1] ? matrix[t][g] | u32(matrix[t + 1][g]) << 16 : matrix[g][t] | u32(matrix[g][t + 1]) << 16;
        }
    }
    return Outcome::NEXT;
}

Outcome store_matrices(Warp& w, const Instruction& I, u32) {
    const i32* at = I.at;
    for (int i = 0; i < at[0]; ++i) {
        u16 matrix[8][8];
        for (int l = 0; l < 32; ++l) {
            const int g = l / 4, t = l % 4 * 2;
            const u32 pair = w.r[at[4 + i] + l];
            (at[1] ? matrix[t][g] : matrix[g][t]) = u16(pair);
            (at[1] ? matrix[t + 1][g] : matrix[g][t + 1]) = u16(pair >> 16);
        }
        for (int row = 0; row < 8; ++row) {
            const u32 to = w.r[at[2] + 8 * i + row] + at[3];
            std::memcpy(resolve(w, Space::SHARED, to, 16), matrix[row], 16);
            observe(w, 8 * i + row, Space::SHARED, to, 16, true);
        }
    }
    return Outcome::NEXT;
}

// Rows of 128 bytes, swizzled by 16 bytes in atoms of 8 rows: where the 32 bytes of row n that a step reads lie.
void read_swizzled(Warp& w, u32 start, u32 atom, int n, u16 (&to)[16]) {
    const u32 at = start + n / 8 * atom + n % 8 * 128;
    for (int piece = 0; piece < 2; ++piece) {
        const u32 linear = at + piece * 16;
        const u32 from = linear ^ (linear >> 7 & 7) << 4;
        std::memcpy(to + piece * 8, shared_at(*w.cta, from, 16), 16);
        observe(w, 0, *w.cta, from, 16, false);
    }
}

// at: columns, columns / 2 registers of d, 4 of a, descriptor, predicate
//
// Sums are there at once, because copies of registers that the assembler leaves out would read them too early
// otherwise. B has to stay as it is until it has been waited for.
template <class Half>
Outcome wgmma(Warp& w, const Instruction& I, u32 lanes) {
    const int columns = I.at[0];
    const i32 *d = I.at + 1, *a = d + columns / 2;
    if (!w.fenced) throw Fault("wgmma without wgmma.fence in front of it");
    const int lane = __builtin_ctz(lanes);
    const u64 descriptor = get<u64>(w.r, a[4], lane);
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
        throw Fault(text("wgmma with descriptor %#llx: only a swizzle of 128 bytes is emulated", (unsigned long long)descriptor));
    const u32 start = (descriptor & 0x3fff) << 4, atom = (descriptor >> 32 & 0x3fff) << 4;
    const bool keep = w.r[a[5]] >> lane & 1;
    const Tile tile = operand_a<Half>(w, a);
    Operand operand = {std::vector<u8>(32 * columns), start, atom, w.product_batch};
    for (int first = 0; first < columns; first += 8) {
        float b[16][8];
        for (int n = 0; n < 8; ++n) {
            u16 row[16];
            read_swizzled(w, start, atom, first + n, row);
            std::memcpy(&operand.seen[32 * (first + n)], row, 32);
            for (int k = 0; k < 16; ++k) b[k][n] = Half::widen(row[k]);
        }
        multiply_add(w, d + first / 2, d + first / 2, tile, b, keep);
    }
    w.products.push_back(std::move(operand));
    return Outcome::NEXT;
}

Outcome wgmma_fence(Warp& w, const Instruction&, u32) {
    w.fenced = true;
    return Outcome::NEXT;
}

Outcome wgmma_commit(Warp& w, const Instruction&, u32) {
    ++w.product_batch;
    return Outcome::NEXT;
}

Outcome wgmma_wait(Warp& w, const Instruction& I, u32) {
    size_t kept = 0;
    for (Operand& operand : w.products) {
        if (i64(operand.batch) < i64(w.product_batch) - I.at[0]) {
            for (size_t n = 0; n < operand.seen.size() / 32; ++n) {
                u16 row[16];
                read_swizzled(w, operand.at, operand.atom, int(n), row);
                if (std::memcmp(row, operand.seen.data() + n * 32, 32))
                    throw Fault(text("B of a wgmma at %#x was overwritten before the wait for it", operand.at));
            }
        } else {
            if (&w.products[kept] != &operand) w.products[kept] = std::move(operand);
            ++kept;
        }
    }
    w.products.resize(kept);
    return Outcome::NEXT;
}

}  // namespace

void add_matrices(Table& table) {
    table["mma.m16n8k16.bf16"] = {mma<Bf16>, Kind::TOGETHER};
    table["mma.m16n8k16.f16"] = {mma<F16>, Kind::TOGETHER};
    table["mma.sp.m16n8k32.bf16"] = {mma_sparse<Bf16>, Kind::TOGETHER};
    table["mma.sp.m16n8k32.f16"] = {mma_sparse<F16>, Kind::TOGETHER};
    table["mma.m16n8k32.u8.s8"] = {mma_integers<u8, i8>, Kind::TOGETHER};
    table["mma.m16n8k32.s8.s8"] = {mma_integers<i8, i8>, Kind::TOGETHER};
    table["mma.m16n8k32.u8.u8"] = {mma_integers<u8, u8>, Kind::TOGETHER};
    table["ldmatrix"] = {load_matrices, Kind::TOGETHER};
    table["stmatrix"] = {store_matrices, Kind::TOGETHER};
    table["wgmma.bf16"] = {wgmma<Bf16>, Kind::TOGETHER};
    table["wgmma.f16"] = {wgmma<F16>, Kind::TOGETHER};
    table["wgmma.fence"] = {wgmma_fence, Kind::TOGETHER};
    table["wgmma.commit_group"] = {wgmma_commit, Kind::TOGETHER};
    table["wgmma.wait_group"] = {wgmma_wait, Kind::TOGETHER};
}

}  // namespace emulator
