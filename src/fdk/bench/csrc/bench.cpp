// The kernels measured without Python: memcpy, a sum, dense bf16 products, byte tables and table weights of every width.
// One binary, linked statically, for any Linux and for Android. bench --help lists the flags. Every product is checked against
// double precision before it is timed. Records are lines of JSON with the fields of fdk.bench; each is written whole.
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "scalar.h"

extern "C" {
int32_t fdk_use_isa(int32_t isa);
int32_t fdk_isa_available(int32_t isa);
int32_t fdk_preferred_isa(void);
const char* fdk_isa_missing(int32_t isa);
int64_t fdk_weight_size(int64_t ranges);
int32_t fdk_weight_init(fdk_weight*, const void*, int64_t, int64_t, int32_t, int64_t, int32_t, int32_t, const int64_t*, int64_t,
                        const void*, int32_t);
void fdk_pack(const fdk_weight*, void*, const void*, const void*, const void*, int32_t);
int32_t fdk_linear(const fdk_weight*, const void*, const void*, void*, int64_t, int32_t);
void fdk_read(const void*, int64_t, int32_t);
int64_t fdk_multiply(int32_t, int64_t, int32_t);
void fdk_use_openmp(void*, void*, void*);
}

namespace {

const char* const ISA_NAMES[FDK_ISAS] = {"generic", "avx2", "avx512", "avx512bf16", "neon", "neonbf16", "sve"};
const int MOST = 16;  // values of a flag

struct List {
    int64_t v[MOST];
    int count;
};

struct Options {
    List m = {{1, 4, 16, 64}, 4}, k = {{4096}, 1}, n = {{}, 0}, bits = {{1, 2, 3, 4, 5, 6, 7, 8}, 8}, threads = {{1}, 1};
    int64_t group = 64, copies = 0, reps = 30, inner = 0;
    const char *isa = "", *include = "", *output = "", *commit = "", *dirty = "";
} options;

volatile sig_atomic_t interrupted;
void on_signal(int) { interrupted = 1; }

[[noreturn]] void fail(const char* format, const char* a, const char* b = "") {
    fprintf(stderr, "bench: ");
    fprintf(stderr, format, a, b);
    fprintf(stderr, "\n");
    exit(2);
}

[[noreturn]] void leave(void) {
    fprintf(stderr, "bench: interrupted; the records so far are complete lines\n");
    exit(130);
}

double seconds(void) {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Threads that wait by spinning, so that handing them work costs less than a microsecond.
struct Pool {
    void (*fn)(void*);
    void* context;
    unsigned threads;
    int round, left, started;
} pool;
__thread int this_part;

void* work(void* number) {
    this_part = (int)(intptr_t)number;
    for (int seen = 0;;) {
        int spins = 0;
        while (__atomic_load_n(&pool.round, __ATOMIC_ACQUIRE) == seen)
            if (++spins > 20000) sched_yield();
        seen++;
        if (this_part < (int)pool.threads) pool.fn(pool.context);
        __atomic_fetch_sub(&pool.left, 1, __ATOMIC_ACQ_REL);
    }
}

// Called by the library where it would call the OpenMP runtime.
void parallel(void (*fn)(void*), void* context, unsigned threads, unsigned) {
    while (pool.started + 1 < (int)threads) {
        pthread_t thread;
        // A thread that starts now takes part in the next round only: its count of rounds begins at zero.
        if (__atomic_load_n(&pool.round, __ATOMIC_ACQUIRE)) fail("threads have to be started before the first %s", "round");
        if (pthread_create(&thread, nullptr, work, (void*)(intptr_t)(pool.started + 1))) fail("cannot start a %s", "thread");
        pool.started++;
    }
    pool.fn = fn, pool.context = context, pool.threads = threads;
    __atomic_store_n(&pool.left, pool.started, __ATOMIC_RELEASE);
    __atomic_fetch_add(&pool.round, 1, __ATOMIC_ACQ_REL);
    fn(context);
    for (int spins = 0; __atomic_load_n(&pool.left, __ATOMIC_ACQUIRE);)
        if (++spins > 20000) sched_yield();
}
int thread_num(void) { return this_part; }
int num_threads(void) { return (int)pool.threads; }

uint64_t state = 1;
uint32_t random_bits(void) {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}
float random_value(void) { return (float)random_bits() / 2147483648.0f - 1.0f; }

void* memory(int64_t size) {
    void* p = nullptr;
    if (posix_memalign(&p, 4096, size ? size : 1)) fail("no memory for the operands of one product; lower %s or --copies", "-k");
    return p;
}

struct Shape {
    int64_t m, k, n, g, bits, threads;
};

struct Rates {
    double read, copy, peak, bf16[MOST];  // bytes and operations a second; seconds of the dense product by position in -m
} rates;

int out;
char device[160], driver[96], date[40];
const char* isa_name;

// A string of the operating system or the command line as one of JSON.
const char* quoted(const char* s, char* buffer, size_t size) {
    size_t at = 0;
    if (!*s) return "null";
    buffer[at++] = '"';
    for (; *s && at + 3 < size; s++)
        if (*s != '"' && *s != '\\' && (unsigned char)*s >= 32) buffer[at++] = *s;
    buffer[at++] = '"', buffer[at] = 0;
    return buffer;
}

struct Timing {
    double average, p20, p50, p80;
    int64_t reps, inner, copies;
};

void write_record(const char* test, const char* provider, const char* format, const Shape& s, const char* reason, double bytes,
                  const Timing& t, double x_bf16) {
    char a[200], b[120], c[64], times[320] = "null, \"time_p20\": null, \"time_p50\": null, \"time_p80\": null", ratios[160], sizes[160];
    const double floor = rates.read > 0 ? bytes / rates.read : 0;
    if (!reason) snprintf(times, sizeof times, "%.9g, \"time_p20\": %.9g, \"time_p50\": %.9g, \"time_p80\": %.9g", t.average, t.p20, t.p50, t.p80);
    if (!reason && x_bf16 > 0) snprintf(ratios, sizeof ratios, "%.6g", x_bf16);
    else snprintf(ratios, sizeof ratios, "null");
    char floors[200] = "null, \"floor_plain\": null, \"floor_memory\": null, \"floor_reader\": null";
    char fraction[120] = "null, \"read_fraction\": null";
    if (!reason && floor > 0) {
        snprintf(floors, sizeof floors, "%.9g, \"floor_plain\": null, \"floor_memory\": \"pool\", \"floor_reader\": \"fdk_read\"", floor);
        snprintf(fraction, sizeof fraction, "%.6g, \"read_fraction\": %.6g", t.p50 / floor, floor / t.p50);
    }
    if (s.g) snprintf(sizes, sizeof sizes, "%lld", (long long)s.g);
    else snprintf(sizes, sizeof sizes, "null");
    char line[3000];
    const int size = snprintf(
        line, sizeof line,
        "{\"test\": \"%s\", \"m\": %lld, \"k\": %lld, \"n\": %lld, \"g\": %s, \"bits\": %lld, \"format\": \"%s\", \"dtype\": \"bf16\", "
        "\"provider\": \"%s\", \"kernel\": %s, \"status\": \"%s\", \"reason\": %s%s%s, \"copies\": %lld, \"inner_reps\": %lld, "
        "\"reps\": %lld, \"settle\": null, \"launch\": \"direct\", \"bytes_rw\": %.0f, \"ops\": %.0f, \"avg_time\": %s, \"floor\": %s, \"x_bf16\": %s, "
        "\"x_bf16_p20\": null, \"x_bf16_p80\": null, \"x_floor\": %s, \"relative_error\": null, \"chain_time\": null, "
        "\"x_chain\": null, \"read_bandwidth\": %.6g, \"copy_bandwidth\": %.6g, \"peak\": %.6g, \"reader\": \"fdk_read\", "
        "\"threads\": %lld, \"isa\": \"%s\", \"device\": %s, \"driver\": %s, \"versions\": \"bench.cpp\", \"commit\": %s, "
        "\"dirty\": %s, \"date\": \"%s\", \"id\": \"native-%s-%d\"}\n",
        test, (long long)s.m, (long long)s.k, (long long)s.n, sizes, (long long)s.bits, format, provider,
        strcmp(provider, "fdk") ? "null" : "\"cpu\"", reason ? "failed" : "ok", reason ? "\"" : "", reason ? reason : "null",
        reason ? "\"" : "", (long long)t.copies, (long long)t.inner, (long long)t.reps, bytes, 2.0 * s.m * s.k * s.n, times, floors,
        ratios, fraction, rates.read, rates.copy, rates.peak, (long long)s.threads, isa_name, quoted(device, a, sizeof a),
        quoted(driver, b, sizeof b), quoted(options.commit, c, sizeof c), *options.dirty ? options.dirty : "null", date, date,
        (int)getpid());
    // At once, so that neither a signal nor a full disk leaves a part of a line.
    const off_t before = lseek(out, 0, SEEK_END);
    if (write(out, line, size) != size) {
        if (before >= 0 && ftruncate(out, before)) {}
        fail("cannot write %s: is the disk full?", *options.output ? options.output : "to stdout");
    }
    if (out != STDOUT_FILENO)
        fprintf(stderr, "%-10s %-10s m=%-4lld %lldx%lld threads=%lld  %10.1f us  %7.2f GB/s%s%s\n", test, format, (long long)s.m,
                (long long)s.n, (long long)s.k, (long long)s.threads, 1e6 * t.p50, bytes / t.p50 / 1e9, reason ? "  WRONG: " : "",
                reason ? reason : "");
}

int ascending(const void* a, const void* b) {
    const double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

// Time of one call of run(copy), over `copies` sets of operands in turn, so that weights come from memory.
template <class Run>
Timing measure(int64_t copies, Run&& run) {
    double* times = (double*)memory(options.reps * 8);
    double once = seconds();
    for (int64_t i = 0; i < copies && i < 3; i++) run(i);
    once = (seconds() - once) / (double)(copies < 3 ? copies : 3);
    int64_t inner = options.inner ? options.inner : (int64_t)(0.01 / (once + 1e-9)) + 1, at = 0;
    if (inner > 1000) inner = 1000;
    Timing t = {0, 0, 0, 0, 0, inner, copies};
    int64_t reps = 0;
    for (; reps < options.reps && !interrupted; reps++) {
        const double start = seconds();
        for (int64_t i = 0; i < inner; i++) run(at++ % copies);
        times[reps] = (seconds() - start) / (double)inner;
        t.average += times[reps];
    }
    if (!reps) leave();
    qsort(times, reps, 8, ascending);
    t.average /= (double)reps;
    t.p20 = times[reps / 5], t.p50 = times[reps / 2], t.p80 = times[reps - 1 - reps / 5];
    t.reps = reps * inner;
    free(times);
    return t;
}

int64_t copies_of(double bytes) {
    const int64_t wanted = options.copies ? options.copies : (int64_t)(256e6 / bytes) + 1;
    return wanted < 1 ? 1 : wanted > 100 ? 100 : wanted;
}

struct Rows {
    const uint16_t *w, *x;
    uint16_t* y;
    int64_t m, k, n;
};

// y = x W^T in plain C++ that compilers vectorise: w [n, k], x [m, k], all bf16.
void dense_part(void* context) {
    const Rows& r = *(const Rows*)context;
    const int64_t first = r.n * thread_num() / num_threads(), end = r.n * (thread_num() + 1) / num_threads();
    for (int64_t row = first; row < end; row++)
        for (int64_t i = 0; i < r.m; i++) {
            float sums[16] = {0};
            const uint16_t *w = r.w + row * r.k, *x = r.x + i * r.k;
            for (int64_t k = 0; k + 16 <= r.k; k += 16)
                for (int l = 0; l < 16; l++) sums[l] += from_bf16(w[k + l]) * from_bf16(x[k + l]);
            float sum = 0;
            for (int l = 0; l < 16; l++) sum += sums[l];
            for (int64_t k = r.k / 16 * 16; k < r.k; k++) sum += from_bf16(w[k]) * from_bf16(x[k]);
            r.y[i * r.n + row] = to_bf16(sum);
        }
}

struct Bytes {
    const uint8_t* codes;     // [n, k / 2], two codes a byte
    const uint16_t* scales;   // [n, k / group]
    const float (*table)[2];  // [256]
    const uint16_t* x;
    uint16_t* y;
    int64_t k, n, group;
};

// The byte table of the source project: a byte selects the values of both its codes.
void byte_table_part(void* context) {
    const Bytes& r = *(const Bytes*)context;
    const int64_t first = r.n * thread_num() / num_threads(), end = r.n * (thread_num() + 1) / num_threads();
    for (int64_t row = first; row < end; row++) {
        float total = 0;
        for (int64_t g = 0; g < r.k / r.group; g++) {
            float sum = 0;
            for (int64_t k = g * r.group; k < (g + 1) * r.group; k += 2) {
                const float* v = r.table[r.codes[(row * r.k + k) / 2]];
                sum += v[0] * from_bf16(r.x[k]) + v[1] * from_bf16(r.x[k + 1]);
            }
            total += sum * from_bf16(r.scales[row * (r.k / r.group) + g]);
        }
        r.y[row] = to_bf16(total);
    }
}

// Why y is wrong, or null: every element of up to 64 rows of W against double precision, within the bound of docs/numerics.md
// with four times its middle term, because plain C++ sums in no particular order.
template <class Weight>
const char* wrong(const Shape& s, const uint16_t* x, const uint16_t* y, Weight&& weight) {
    static char text[160];
    const int64_t step = s.n / 64 + 1;
    for (int64_t row = 0; row < s.n; row += step)
        for (int64_t i = 0; i < s.m && i < 8; i++) {
            double sum = 0, squares = 0;
            for (int64_t k = 0; k < s.k; k++) {
                const double p = weight(row, k) * (double)from_bf16(x[i * s.k + k]);
                sum += p, squares += p * p;
            }
            const double bound = 24 * sqrt((double)s.k) * ldexp(1, -24) * sqrt(squares) + 1.01 * ldexp(1, -8) * fabs(sum);
            const double got = from_bf16(y[i * s.n + row]);
            if (fabs(got - sum) <= bound) continue;
            snprintf(text, sizeof text, "y[%lld, %lld] = %.6g, expected %.6g", (long long)i, (long long)row, got, sum);
            return text;
        }
    return nullptr;
}

bool wanted(const char* test) { return !*options.include || strstr(test, options.include); }

void bandwidths(const Shape& s) {
    const int64_t size = 128 << 20;
    uint8_t *from = (uint8_t*)memory(size), *to = (uint8_t*)memory(size);
    memset(from, 1, size), memset(to, 2, size);
    int64_t operations = 0;
    Timing t = measure(1, [&](int64_t) { operations = fdk_multiply(FDK_BF16, 100000, (int32_t)s.threads); });
    rates.peak = (double)operations / t.p50;
    t = measure(1, [&](int64_t) { fdk_read(from, size, (int32_t)s.threads); });
    rates.read = (double)size / t.p50;
    const Shape whole = {1, size / 2, 1, 0, 16, s.threads};
    if (wanted("reduce_sum")) write_record("reduce_sum", "fdk", "bf16", whole, nullptr, (double)size, t, 0);
    struct Copy { uint8_t *from, *to; int64_t size; } copy = {from, to, size};
    t = measure(1, [&](int64_t) {
        parallel([](void* p) {
            const Copy& c = *(const Copy*)p;
            const int64_t a = c.size * thread_num() / num_threads(), b = c.size * (thread_num() + 1) / num_threads();
            memcpy(c.to + a, c.from + a, b - a);
        }, &copy, (unsigned)s.threads, 0);
    });
    rates.copy = 2.0 * (double)size / t.p50;
    if (wanted("memcpy")) write_record("memcpy", "libc", "bf16", whole, nullptr, 2.0 * (double)size, t, 0);
    free(from), free(to);
}

void dense(Shape s, int which) {
    const double bytes = 2.0 * ((double)s.n * s.k + (double)s.m * (s.k + s.n));
    const int64_t copies = copies_of(bytes);
    uint16_t *w = (uint16_t*)memory(copies * s.n * s.k * 2), *x = (uint16_t*)memory(s.m * s.k * 2), *y = (uint16_t*)memory(s.m * s.n * 2);
    for (int64_t i = 0; i < s.n * s.k; i++) w[i] = to_bf16(random_value());
    for (int64_t c = 1; c < copies; c++) memcpy(w + c * s.n * s.k, w, s.n * s.k * 2);
    for (int64_t i = 0; i < s.m * s.k; i++) x[i] = to_bf16(random_value());
    auto run = [&](int64_t c) {
        Rows r = {w + c * s.n * s.k, x, y, s.m, s.k, s.n};
        parallel(dense_part, &r, (unsigned)s.threads, 0);
    };
    memset(y, 0xff, s.m * s.n * 2);
    run(0);
    const char* reason = wrong(s, x, y, [&](int64_t row, int64_t k) { return (double)from_bf16(w[row * s.k + k]); });
    Timing t = {0, 0, 0, 0, 0, 0, copies};
    if (!reason) t = measure(copies, run);
    rates.bf16[which] = t.p50;
    const char* test = s.m == 1 ? "mv" : "mm";
    if (wanted(test)) write_record(test, "plain-bf16", "bf16", s, reason, bytes, t, reason ? 0 : 1);
    free(w), free(x), free(y);
}

// One row-major table weight in memory: its canonical codes, scales and table.
struct Canonical {
    uint8_t* codes;
    uint16_t *scales, table[256];
    int64_t row_bytes, groups, k, group;
    int bits;
    Canonical(const Shape& s) : row_bytes((s.k * s.bits + 7) / 8), groups(s.k / s.g), k(s.k), group(s.g), bits((int)s.bits) {
        codes = (uint8_t*)memory(s.n * row_bytes), scales = (uint16_t*)memory(s.n * groups * 2);
        for (int64_t i = 0; i < s.n * row_bytes; i++) codes[i] = (uint8_t)random_bits();
        for (int64_t i = 0; i < s.n * groups; i++) scales[i] = to_bf16(0.5f + 0.25f * random_value());
        for (int i = 0; i < 1 << bits; i++) table[i] = to_bf16(-1.0f + 2.0f * (float)i / (float)((1 << bits) - 1));
    }
    ~Canonical() { free(codes), free(scales); }
    double operator()(int64_t row, int64_t at) const {
        uint32_t code = 0;
        for (int b = 0; b < bits; b++) code |= (uint32_t)(codes[row * row_bytes + (at * bits + b) / 8] >> (at * bits + b) % 8 & 1) << b;
        return (double)from_bf16(table[code]) * (double)from_bf16(scales[row * groups + at / group]);
    }
};

void tables(Shape s, int which) {
    const double bytes = (double)s.n * s.k * s.bits / 8 + 2.0 * s.n * (s.k / s.g) + 2.0 * s.m * (s.k + s.n);
    const int64_t copies = copies_of(bytes);
    Canonical source(s);
    fdk_weight** w = (fdk_weight**)memory(copies * sizeof(void*));
    for (int64_t c = 0; c < copies; c++) {
        w[c] = (fdk_weight*)memory(fdk_weight_size(1));
        if (fdk_weight_init(w[c], nullptr, s.n, s.k, (int32_t)s.bits, s.g, FDK_BF16, FDK_TABLE, &s.n, 1, source.table, 0))
            fail("the library refuses this %s", "shape");
        uint8_t* data = (uint8_t*)memory(w[c]->blocks * w[c]->block_bytes);
        if (c) memcpy(data, w[0]->data, w[c]->blocks * w[c]->block_bytes);
        else fdk_pack(w[c], data, source.codes, source.scales, nullptr, (int32_t)s.threads);
        w[c]->data = data;
    }
    uint16_t *x = (uint16_t*)memory(s.m * s.k * 2), *y = (uint16_t*)memory(s.m * s.n * 2);
    for (int64_t i = 0; i < s.m * s.k; i++) x[i] = to_bf16(random_value());
    char format[32];
    snprintf(format, sizeof format, "lut%lld_g%lld", (long long)s.bits, (long long)s.g);
    auto run = [&](int64_t c) {
        if (fdk_linear(w[c], x, nullptr, y, s.m, (int32_t)s.threads)) fail("no memory for the activations of m = %s", "this size");
    };
    memset(y, 0xff, s.m * s.n * 2);
    run(0);
    const char* reason = wrong(s, x, y, source);
    Timing t = {0, 0, 0, 0, 0, 0, copies};
    if (!reason) t = measure(copies, run);
    write_record(s.m == 1 ? "mv_lut" : "mm_lut", "fdk", format, s, reason, bytes, t, rates.bf16[which] / t.p50);
    for (int64_t c = 0; c < copies; c++) free((void*)w[c]->data), free(w[c]);
    free(w), free(x), free(y);
}

void byte_table(Shape s, int which) {
    s.bits = 4;
    const double bytes = (double)s.n * s.k / 2 + 2.0 * s.n * (s.k / s.g) + 2.0 * (s.k + s.n);
    Canonical source(s);
    float table[256][2];
    for (int i = 0; i < 256; i++) table[i][0] = from_bf16(source.table[i & 15]), table[i][1] = from_bf16(source.table[i >> 4]);
    const int64_t copies = copies_of(bytes), size = s.n * source.row_bytes;
    uint8_t* codes = (uint8_t*)memory(copies * size);
    for (int64_t c = 0; c < copies; c++) memcpy(codes + c * size, source.codes, size);
    uint16_t *x = (uint16_t*)memory(s.k * 2), *y = (uint16_t*)memory(s.n * 2);
    for (int64_t i = 0; i < s.k; i++) x[i] = to_bf16(random_value());
    auto run = [&](int64_t c) {
        Bytes r = {codes + c * size, source.scales, table, x, y, s.k, s.n, s.g};
        parallel(byte_table_part, &r, (unsigned)s.threads, 0);
    };
    memset(y, 0xff, s.n * 2);
    run(0);
    const char* reason = wrong(s, x, y, source);
    Timing t = {0, 0, 0, 0, 0, 0, copies};
    if (!reason) t = measure(copies, run);
    char format[32];
    snprintf(format, sizeof format, "lut4_g%lld", (long long)s.g);
    write_record("mv_lut8", "byte-table", format, s, reason, bytes, t, rates.bf16[which] / t.p50);
    free(codes), free(x), free(y);
}

void parse_list(const char* flag, const char* text, List* list) {
    list->count = 0;
    for (const char* p = text; *p;) {
        char* end;
        const long long v = strtoll(p, &end, 10);
        if (end == p || v < 1 || list->count == MOST || (*end && *end != ',')) fail("%s %s: comma-separated positive integers, at most 16", flag, text);
        list->v[list->count++] = v;
        p = *end ? end + 1 : end;
    }
    if (!list->count) fail("%s needs a value%s", flag);
}

const char HELP[] =
    "bench: fdk's CPU kernels without Python. Lists are comma-separated.\n"
    "  -m 1,4,16,64      rows of activations\n"
    "  -k 4096           in_features\n"
    "  -n                out_features (default: k)\n"
    "  -b 1,...,8        widths\n"
    "  -g 64             group\n"
    "  --threads 1       numbers of threads\n"
    "  --copies 0        sets of operands in turn (0: 256 MB of them)\n"
    "  --reps 30         measurements\n"
    "  --inner 0         calls in a measurement (0: about 10 ms)\n"
    "  --isa NAME        instruction set (default: the best one there is)\n"
    "  --include TEXT    only tests whose name holds TEXT: memcpy reduce_sum mv mm mv_lut8 mv_lut mm_lut\n"
    "  --output FILE     append records there instead of writing them to stdout\n";

void parse(int argc, char** argv) {
    for (int i = 1; i < argc; i++) {
        const char* flag = argv[i];
        auto is = [&](const char* name) { return !strcmp(flag, name); };
        if (is("-h") || is("--help")) {
            fputs(HELP, stdout);
            exit(0);
        }
        if (i + 1 == argc) fail("%s needs a value; --help lists the flags%s", flag);
        const char* value = argv[++i];
        List one;
        auto number = [&]() { return parse_list(flag, value, &one), one.v[0]; };
        if (is("-m")) parse_list(flag, value, &options.m);
        else if (is("-k")) parse_list(flag, value, &options.k);
        else if (is("-n")) parse_list(flag, value, &options.n);
        else if (is("-b")) parse_list(flag, value, &options.bits);
        else if (is("--threads")) parse_list(flag, value, &options.threads);
        else if (is("-g")) options.group = number();
        else if (is("--copies")) options.copies = number();
        else if (is("--reps")) options.reps = number();
        else if (is("--inner")) options.inner = number();
        else if (is("--isa")) options.isa = value;
        else if (is("--include")) options.include = value;
        else if (is("--output")) options.output = value;
        else if (is("--commit")) options.commit = value;
        else if (is("--dirty")) options.dirty = value;
        else fail("%s is not a flag; --help lists them%s", flag);
    }
    for (int i = 0; i < options.k.count; i++)
        if (options.group % 16 || options.k.v[i] % options.group) fail("-g must be a multiple of 16 that divides %s", "every -k");
    for (int i = 0; i < options.bits.count; i++)
        if (options.bits.v[i] > 8) fail("-b takes widths from 1 to %s", "8");
}

void name_machine(void) {
    utsname system;
    uname(&system);
    snprintf(driver, sizeof driver, "%.40s %.40s", system.sysname, system.release);
    snprintf(device, sizeof device, "%.40s, %ld cores", system.machine, sysconf(_SC_NPROCESSORS_ONLN));
    if (FILE* f = fopen("/proc/cpuinfo", "r")) {
        char line[256];
        while (fgets(line, sizeof line, f))
            if (!strncmp(line, "model name", 10) || !strncmp(line, "Hardware", 8)) {
                const char* colon = strchr(line, ':');
                if (colon) snprintf(device, sizeof device, "%.100s, %ld cores", strtok((char*)colon + 2, "\n"), sysconf(_SC_NPROCESSORS_ONLN));
                break;
            }
        fclose(f);
    }
    const time_t now = time(nullptr);
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S+00:00", gmtime(&now));
}

}  // namespace

int main(int argc, char** argv) {
    parse(argc, argv);
    int isa = fdk_preferred_isa();
    if (*options.isa) {
        for (isa = 0; isa < FDK_ISAS && strcmp(options.isa, ISA_NAMES[isa]); isa++) {
        }
        if (!fdk_isa_available(isa)) fail("--isa %s: %s", options.isa, fdk_isa_missing(isa));
    }
    fdk_use_isa(isa);
    isa_name = ISA_NAMES[isa];
    name_machine();
    out = *options.output ? open(options.output, O_WRONLY | O_CREAT | O_APPEND, 0666) : STDOUT_FILENO;
    if (out < 0) fail("cannot write %s", options.output);
    signal(SIGINT, on_signal), signal(SIGTERM, on_signal);
    fdk_use_openmp((void*)parallel, (void*)thread_num, (void*)num_threads);
    unsigned most = 1;
    for (int i = 0; i < options.threads.count; i++) most = options.threads.v[i] > most ? (unsigned)options.threads.v[i] : most;
    parallel([](void*) {}, nullptr, most, 0);
    for (int t = 0; t < options.threads.count && !interrupted; t++) {
        Shape s = {1, 0, 0, 0, 16, options.threads.v[t]};
        bandwidths(s);
        for (int k = 0; k < options.k.count && !interrupted; k++)
            for (int n = 0; n < (options.n.count ? options.n.count : 1) && !interrupted; n++) {
                s.k = options.k.v[k], s.n = options.n.count ? options.n.v[n] : s.k;
                for (int m = 0; m < options.m.count && !interrupted; m++) {
                    s.m = options.m.v[m], s.g = 0, s.bits = 16;
                    dense(s, m);
                    s.g = options.group;
                    if (s.m == 1 && wanted("mv_lut8") && !interrupted) byte_table(s, m);
                    for (int b = 0; b < options.bits.count && !interrupted; b++) {
                        s.bits = options.bits.v[b];
                        if (wanted(s.m == 1 ? "mv_lut" : "mm_lut")) tables(s, m);
                    }
                }
            }
    }
    if (interrupted) leave();
    return 0;
}
