// What the codes of a weight mean: the values of FDK_KIND, by the names that fdk/kernels/cuda/decode_config.py has for them.
#pragma once

namespace kind {

enum : int {
    TABLE,         // an index of a table
    INT,           // code - 2^(bits - 1)
    UINT_U8,       // code - zero, zeros of 8 bits
    UINT_FLOAT,    // ... of 16-bit floats
    ROUNDED,       // slices of FDK_SLICE bits of nested codes, of which FDK_BITS planes are read: rounded
    CUT,           // ... without the bits below them
    SPARSE_INT,    // 16:32 sparse integers of 4 bits: FDK_BITS is 3, with their masks
    SPARSE_TABLE,  // ... indices of a table
};

__device__ constexpr bool has_zeros(int kind) { return kind == UINT_U8 || kind == UINT_FLOAT; }
__device__ constexpr bool is_nested(int kind) { return kind == ROUNDED || kind == CUT; }
__device__ constexpr bool is_sparse(int kind) { return kind == SPARSE_INT || kind == SPARSE_TABLE; }

}  // namespace kind
