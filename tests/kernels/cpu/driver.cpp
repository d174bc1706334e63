// Runs the kernels on requests from a pipe, so that the suite can hold a processor to its contract that it only emulates.
//
//   driver ISA < requests > answers
//
// Starts with a line: the instruction sets there are, or why ISA cannot be used. A request is 14 int64: operation (1 linear,
// 2 dequantise), n, k, bits, group, dtype, family, storage, ranges, m, threads, bytes of data, of tables and of bias; then
// row_ends, data, tables, x [m, k], bias, and out as it is before the call. The answer is int64 status and out.
#include <stdio.h>
#include <stdlib.h>

#include "fdk_cpu.h"

extern "C" {
int32_t fdk_use_isa(int32_t isa);
int32_t fdk_isa_available(int32_t isa);
const char* fdk_isa_missing(int32_t isa);
int64_t fdk_weight_size(int64_t ranges);
int32_t fdk_weight_init(fdk_weight*, const void*, int64_t, int64_t, int32_t, int64_t, int32_t, int32_t, const int64_t*, int64_t,
                        const void*, int32_t);
int32_t fdk_linear(const fdk_weight*, const void*, const void*, void*, int64_t, int32_t);
void fdk_dequantise(const fdk_weight*, void*, int64_t, int64_t, int32_t);
void fdk_use_openmp(void*, void*, void*);
}

namespace {

// Threads one after the other: the cuts between them are what matters here.
int part, parts;
void parallel(void (*fn)(void*), void* context, unsigned threads, unsigned) {
    parts = (int)threads;
    for (part = 0; part < parts; part++) fn(context);
}
int thread_num(void) { return part; }
int num_threads(void) { return parts; }

// A buffer that ends where the memory ends is not to be had portably; one of its own size at least shows to sanitizers.
void* receive(int64_t size) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, size ? size : 1) || (size && fread(p, 1, size, stdin) != (size_t)size)) exit(3);
    return p;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2) return 2;
    const int isa = atoi(argv[1]);
    if (fdk_use_isa(isa) < 0) {
        printf("missing: %s\n", fdk_isa_missing(isa));
        return 1;
    }
    for (int i = 0; i < FDK_ISAS; i++)
        if (fdk_isa_available(i)) printf("%d ", i);
    printf("\n");
    fflush(stdout);
    fdk_use_openmp((void*)parallel, (void*)thread_num, (void*)num_threads);
    int64_t r[14];
    while (fread(r, sizeof r, 1, stdin) == 1) {
        const int64_t n = r[1], k = r[2], size = r[5] == FDK_FP32 ? 4 : 2, ranges = r[8], m = r[9];
        int64_t* ends = (int64_t*)receive(8 * ranges);
        void *data = receive(r[11]), *tables = receive(r[12]), *x = receive(m * k * size), *bias = receive(r[13]);
        const int64_t bytes = (r[0] == 1 ? m * n : n * k) * size;
        void* out = receive(bytes);
        fdk_weight* w = (fdk_weight*)malloc(fdk_weight_size(ranges));
        int64_t status = fdk_weight_init(w, data, n, k, (int32_t)r[3], r[4], (int32_t)r[5], (int32_t)r[6], ends, ranges,
                                         r[12] ? tables : nullptr, (int32_t)r[7]);
        if (!status && r[0] == 1) status = fdk_linear(w, x, r[13] ? bias : nullptr, out, m, (int32_t)r[10]);
        else if (!status) fdk_dequantise(w, out, 0, w->blocks, (int32_t)r[10]);
        fwrite(&status, 8, 1, stdout);
        fwrite(out, 1, bytes, stdout);
        fflush(stdout);
        free(w), free(out), free(bias), free(x), free(tables), free(data), free(ends);
    }
    return 0;
}
