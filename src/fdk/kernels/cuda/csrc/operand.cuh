// From a lane's words of a unit to the A operand of mma.m16n8k16, however the codes are stored.
#pragma once
#include "kinds.cuh"
#include "planes.cuh"
#include "sparse.cuh"

// Row tile `tile`: a[s] is the operand of step s. KIND (kinds.cuh) and SLICE are the macros of shape.cuh.
template <int KIND, int BITS, int SLICE, bool BF16, bool SELECT, bool WIDE = false, int WORDS>
__device__ __forceinline__ void to_operand(u32 (&a)[4][4], const u32 (&words)[WORDS], int tile, const Lookup& lookup) {
    if constexpr (kind::is_sparse(KIND)) {
        const Expansion<KIND == kind::SPARSE_TABLE, BF16> expand(lookup);
        expand(a, words, tile);
    } else if constexpr (kind::is_nested(KIND)) {
        dequantise_planes<BITS, SLICE, KIND == kind::CUT, BF16>(a, words, tile, lookup);
    } else {
        dequantise<BITS, BF16, SELECT, WIDE>(a, words, tile, lookup);
    }
}
