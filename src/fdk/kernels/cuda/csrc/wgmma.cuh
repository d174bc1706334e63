// wgmma with the A operand in registers (Hopper): d[64 x N] = a[64 x 16] b[16 x N] + d, N = FDK_TOKENS.
//
// Lane 4g+t of warp w of the warpgroup holds in a, as for mma.m16n8k16, rows 16w + g + 8h; d[4j + 2h + c] is row
// 16w + g + 8h, column 8j + 2t + c. b lies in shared memory as N rows of 64 halves, 128 bytes each, swizzled by the copy
// engine in atoms of 8 rows. The instruction names every register of d, hence the lists below.
#pragma once
#include "ptx.cuh"

#define FDK_D1 "%6, %7, %8, %9"
#define FDK_O1 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define FDK_D2 FDK_D1 ", %10, %11, %12, %13"
#define FDK_O2 FDK_O1, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define FDK_D3 FDK_D2 ", %14, %15, %16, %17"
#define FDK_O3 FDK_O2, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define FDK_D4 FDK_D3 ", %18, %19, %20, %21"
#define FDK_O4 FDK_O3, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define FDK_D5 FDK_D4 ", %22, %23, %24, %25"
#define FDK_O5 FDK_O4, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define FDK_D6 FDK_D5 ", %26, %27, %28, %29"
#define FDK_O6 FDK_O5, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define FDK_D7 FDK_D6 ", %30, %31, %32, %33"
#define FDK_O7 FDK_O6, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define FDK_D8 FDK_D7 ", %34, %35, %36, %37"
#define FDK_O8 FDK_O7, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FDK_D9 FDK_D8 ", %38, %39, %40, %41"
#define FDK_O9 FDK_O8, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define FDK_D10 FDK_D9 ", %42, %43, %44, %45"
#define FDK_O10 FDK_O9, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define FDK_D11 FDK_D10 ", %46, %47, %48, %49"
#define FDK_O11 FDK_O10, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define FDK_D12 FDK_D11 ", %50, %51, %52, %53"
#define FDK_O12 FDK_O11, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define FDK_D13 FDK_D12 ", %54, %55, %56, %57"
#define FDK_O13 FDK_O12, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define FDK_D14 FDK_D13 ", %58, %59, %60, %61"
#define FDK_O14 FDK_O13, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define FDK_D15 FDK_D14 ", %62, %63, %64, %65"
#define FDK_O15 FDK_O14, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define FDK_D16 FDK_D15 ", %66, %67, %68, %69"
#define FDK_O16 FDK_O15, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FDK_D17 FDK_D16 ", %70, %71, %72, %73"
#define FDK_O17 FDK_O16, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define FDK_D18 FDK_D17 ", %74, %75, %76, %77"
#define FDK_O18 FDK_O17, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define FDK_D19 FDK_D18 ", %78, %79, %80, %81"
#define FDK_O19 FDK_O18, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define FDK_D20 FDK_D19 ", %82, %83, %84, %85"
#define FDK_O20 FDK_O19, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define FDK_D21 FDK_D20 ", %86, %87, %88, %89"
#define FDK_O21 FDK_O20, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define FDK_D22 FDK_D21 ", %90, %91, %92, %93"
#define FDK_O22 FDK_O21, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define FDK_D23 FDK_D22 ", %94, %95, %96, %97"
#define FDK_O23 FDK_O22, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define FDK_D24 FDK_D23 ", %98, %99, %100, %101"
#define FDK_O24 FDK_O23, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define FDK_D25 FDK_D24 ", %102, %103, %104, %105"
#define FDK_O25 FDK_O24, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define FDK_D26 FDK_D25 ", %106, %107, %108, %109"
#define FDK_O26 FDK_O25, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define FDK_D27 FDK_D26 ", %110, %111, %112, %113"
#define FDK_O27 FDK_O26, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define FDK_D28 FDK_D27 ", %114, %115, %116, %117"
#define FDK_O28 FDK_O27, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define FDK_D29 FDK_D28 ", %118, %119, %120, %121"
#define FDK_O29 FDK_O28, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define FDK_D30 FDK_D29 ", %122, %123, %124, %125"
#define FDK_O30 FDK_O29, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define FDK_D31 FDK_D30 ", %126, %127, %128, %129"
#define FDK_O31 FDK_O30, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define FDK_D32 FDK_D31 ", %130, %131, %132, %133"
#define FDK_O32 FDK_O31, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

#define FDK_PASTE_(a, b) a##b
#define FDK_PASTE(a, b) FDK_PASTE_(a, b)
#define FDK_TEXT_(a) #a
#define FDK_TEXT(a) FDK_TEXT_(a)

namespace fdk {

// Descriptor of 64 columns of b at a shared address that is a multiple of 1024; adding 2 moves on by 16 columns.
__device__ __forceinline__ u64 b_descriptor(u32 address) {
    constexpr u64 ATOM = 1024 >> 4, SWIZZLE_128 = 1;
    return u64(address >> 4) | u64(1) << 16 | ATOM << 32 | SWIZZLE_128 << 62;
}

// The operands count as changed by the instruction, because it is not done when control passes on. `keep` = 0 ignores
// what d held.
__device__ __forceinline__ void wgmma(float (&d)[FDK_TOKENS / 2], u32 (&a)[4], u64 b, int keep) {
#if FDK_BF16
#define FDK_WGMMA_TYPE "bf16.bf16"
#else
#define FDK_WGMMA_TYPE "f16.f16"
#endif
    asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %5, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n" FDK_TEXT(FDK_TOKENS) "k16.f32." FDK_WGMMA_TYPE " {"
                 FDK_PASTE(FDK_D, FDK_TOKEN_TILES) "}, {%0, %1, %2, %3}, %4, keep, 1, 1, 0;\n}"
                 : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]), "+l"(b), "+r"(keep), FDK_PASTE(FDK_O, FDK_TOKEN_TILES)::"memory");
}

// Before the first wgmma that reads registers written by other instructions.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving reads and writes of registers across the asynchronous instruction that uses them.
template <int COUNT>
__device__ __forceinline__ void pin(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

}  // namespace fdk
