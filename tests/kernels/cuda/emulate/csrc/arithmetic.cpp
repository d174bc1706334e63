// Instructions that read and write registers of their own lane only.
#include <climits>
#include "floats.hpp"

namespace emulator {
namespace {

template <class T>
T minimum(T a, T b) {
    return a < b ? a : b;
}
template <class T>
T maximum(T a, T b) {
    return a > b ? a : b;
}

template <class T>
bool negative(T a) {
    if constexpr (std::is_signed_v<T>) return a < 0;
    return false;
}

// Division by zero gives all ones on a GPU, and is what no kernel relies on.
template <class T>
T quotient(T a, T b) {
    if (b == 0) throw Fault("division by zero");
    return a / b;
}
template <class T>
T remainder_of(T a, T b) {
    if (b == 0) throw Fault("division by zero");
    return a % b;
}

u32 permute(u32 a, u32 b, u32 selector) {
    const u64 both = u64(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 pick = selector >> 4 * i & 15;
        u32 byte = u32(both >> 8 * (pick & 7)) & 0xff;
        if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << 8 * i;
    }
    return result;
}

u32 lop3(u32 a, u32 b, u32 c, u32 function) {
    u32 result = 0;
    for (u32 i = 0; i < 8; ++i)
        if (function >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}

template <class T>
T extract(T value, u32 position, u32 length) {
    constexpr int BITS = sizeof(T) * 8;
    using U = std::make_unsigned_t<T>;
    position &= 0xff, length &= 0xff;
    if (length == 0) return 0;
    U sign = 0;
    if (std::is_signed_v<T>) sign = U(value) >> minimum<u32>(position + length - 1, BITS - 1) & 1;
    U result = position < BITS ? U(value) >> position : 0;
    const int kept = minimum<int>(length, BITS - minimum<int>(position, BITS));
    if (kept < BITS) {
        const U mask = (U(1) << kept) - 1;
        result = (result & mask) | (sign && int(length) > 0 ? ~mask : 0);
    }
    return T(result);
}

template <class T>
T insert(T a, T b, u32 position, u32 length) {
    constexpr u32 BITS = sizeof(T) * 8;
    position &= 0xff, length &= 0xff;
    if (position >= BITS || length == 0) return b;
    const T mask = (length >= BITS ? ~T(0) : (T(1) << length) - 1) << position;
    return (b & ~mask) | (a << position & mask);
}

template <class To>
To saturate(double value) {
    if (std::isnan(value)) return 0;
    const double low = double(std::numeric_limits<To>::min()), high = double(std::numeric_limits<To>::max());
    return value <= low ? std::numeric_limits<To>::min() : value >= high ? std::numeric_limits<To>::max() : To(value);
}

template <class Half, class Function>
u32 pairwise(u32 a, u32 b, u32 c, Function function) {
    u32 result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const auto part = [&](u32 pair) { return double(Half::widen(pair >> shift & 0xffff)); };
        result |= (Half::narrow(to_odd(function(part(a), part(b), part(c)))) & 0xffff) << shift;
    }
    return result;
}

Outcome branch(Warp&, const Instruction&, u32) { return Outcome::NEXT; }

}  // namespace

#define OP(name, ...)                                                        \
    table[name] = {[](Warp& w, const Instruction& I, u32 lanes) -> Outcome { \
        [[maybe_unused]] u32* r = w.r;                                       \
        [[maybe_unused]] const i32* at = I.at;                               \
        __VA_ARGS__;                                                         \
        return Outcome::NEXT;                                                \
    }}
#define UNARY(name, D, A, result)           \
    OP(name, EACH(lanes, {                  \
           const A a = get<A>(r, at[1], l); \
           set<D>(r, at[0], l, D(result));  \
       }))
#define BINARY(name, D, A, B, result)       \
    OP(name, EACH(lanes, {                  \
           const A a = get<A>(r, at[1], l); \
           const B b = get<B>(r, at[2], l); \
           set<D>(r, at[0], l, D(result));  \
       }))
#define TERNARY(name, D, A, B, C, result)   \
    OP(name, EACH(lanes, {                  \
           const A a = get<A>(r, at[1], l); \
           const B b = get<B>(r, at[2], l); \
           const C c = get<C>(r, at[3], l); \
           set<D>(r, at[0], l, D(result));  \
       }))
#define INSERTION(name, T)                                                                                            \
    OP(name, EACH(lanes, {                                                                                            \
           set<T>(r, at[0], l,                                                                                        \
                  insert<T>(get<T>(r, at[1], l), get<T>(r, at[2], l), get<u32>(r, at[3], l), get<u32>(r, at[4], l))); \
       }))
#define PREDICATES(name, result)                             \
    OP(name, {                                               \
        const u32 a = r[at[1]], b = r[at[2]];                \
        r[at[0]] = (r[at[0]] & ~lanes) | ((result) & lanes); \
    })
#define COMPARE(name, T, result)              \
    OP(name, {                                \
        u32 yes = 0;                          \
        EACH(lanes, {                         \
            const T a = get<T>(r, at[1], l);  \
            const T b = get<T>(r, at[2], l);  \
            yes |= u32(result) << l;          \
        })                                    \
        r[at[0]] = (r[at[0]] & ~lanes) | yes; \
    })
#define COMPARISONS(suffix, T)             \
    COMPARE("setp.eq." suffix, T, a == b); \
    COMPARE("setp.ne." suffix, T, a != b); \
    COMPARE("setp.lt." suffix, T, a < b);  \
    COMPARE("setp.le." suffix, T, a <= b); \
    COMPARE("setp.gt." suffix, T, a > b);  \
    COMPARE("setp.ge." suffix, T, a >= b)
// Integers of both signs wrap around, so sums and products are those of unsigned ones.
#define INTEGERS(suffix, T, U)                                                                 \
    COMPARISONS(suffix, T);                                                                    \
    BINARY("add." suffix, U, U, U, a + b);                                                     \
    BINARY("sub." suffix, U, U, U, a - b);                                                     \
    BINARY("mul.lo." suffix, U, U, U, a * b);                                                   \
    TERNARY("mad.lo." suffix, U, U, U, U, a * b + c);                                           \
    BINARY("div." suffix, T, T, T, quotient<T>(a, b));                                         \
    BINARY("rem." suffix, T, T, T, remainder_of<T>(a, b));                                     \
    BINARY("min." suffix, T, T, T, minimum<T>(a, b));                                          \
    BINARY("max." suffix, T, T, T, maximum<T>(a, b));                                          \
    BINARY("shr." suffix, T, T, u32, b < sizeof(T) * 8 ? a >> b : negative(a) ? T(-1) : T(0)); \
    TERNARY("bfe." suffix, T, T, u32, u32, extract<T>(a, b, c));                               \
    UNARY("neg." suffix, U, U, U(0) - a);                                                      \
    UNARY("abs." suffix, U, T, negative(a) ? U(0) - U(a) : U(a))
#define BITS(suffix, T)                                               \
    COMPARE("setp.eq." suffix, T, a == b);                            \
    COMPARE("setp.ne." suffix, T, a != b);                            \
    BINARY("and." suffix, T, T, T, a & b);                             \
    BINARY("or." suffix, T, T, T, a | b);                             \
    BINARY("xor." suffix, T, T, T, a ^ b);                            \
    UNARY("not." suffix, T, T, ~a);                                   \
    BINARY("shl." suffix, T, T, u32, b < sizeof(T) * 8 ? a << b : 0); \
    BINARY("shr." suffix, T, T, u32, b < sizeof(T) * 8 ? a >> b : 0)
#define CONVERSIONS(suffix, A)                   \
    UNARY("cvt.u8." suffix, u16, A, u8(a));      \
    UNARY("cvt.s8." suffix, u16, A, i16(i8(a))); \
    UNARY("cvt.u16." suffix, u16, A, a);         \
    UNARY("cvt.s16." suffix, u16, A, a);         \
    UNARY("cvt.u32." suffix, u32, A, a);         \
    UNARY("cvt.s32." suffix, i32, A, a);         \
    UNARY("cvt.u64." suffix, u64, A, a);         \
    UNARY("cvt.s64." suffix, i64, A, a)
#define HALVES(suffix, Half)                                                                                                 \
    UNARY("cvt.f32." suffix, float, u16, Half::widen(a));                                                                    \
    UNARY("cvt.rn." suffix ".f32", u16, float, Half::narrow(a));                                                             \
    BINARY("cvt.rn." suffix "x2.f32", u32, float, float, Half::narrow(a) << 16 | (Half::narrow(b) & 0xffff));                \
    BINARY("add.rn." suffix "x2", u32, u32, u32, pairwise<Half>(a, b, 0, [](double x, double y, double) { return x + y; })); \
    BINARY("sub.rn." suffix "x2", u32, u32, u32, pairwise<Half>(a, b, 0, [](double x, double y, double) { return x - y; })); \
    BINARY("mul.rn." suffix "x2", u32, u32, u32, pairwise<Half>(a, b, 0, [](double x, double y, double) { return x * y; })); \
    TERNARY("fma.rn." suffix "x2", u32, u32, u32, u32,                                                                       \
            pairwise<Half>(a, b, c, [](double x, double y, double z) { return std::fma(x, y, z); }))

void add_arithmetic(Table& table) {
    INTEGERS("s16", i16, u16);
    INTEGERS("u16", u16, u16);
    INTEGERS("s32", i32, u32);
    INTEGERS("u32", u32, u32);
    INTEGERS("s64", i64, u64);
    INTEGERS("u64", u64, u64);
    BITS("b16", u16);
    BITS("b32", u32);
    BITS("b64", u64);
    PREDICATES("and.pred", a & b);
    PREDICATES("or.pred", a | b);
    PREDICATES("xor.pred", a ^ b);
    PREDICATES("not.pred", ~a + 0 * b);
    PREDICATES("mov.pred", a + 0 * b);
    CONVERSIONS("u8", u8);
    CONVERSIONS("s8", i8);
    CONVERSIONS("u16", u16);
    CONVERSIONS("s16", i16);
    CONVERSIONS("u32", u32);
    CONVERSIONS("s32", i32);
    CONVERSIONS("u64", u64);
    CONVERSIONS("s64", i64);

    BINARY("mul.wide.u16", u32, u16, u16, u32(a) * b);
    BINARY("mul.wide.s16", i32, i16, i16, i32(a) * b);
    BINARY("mul.wide.u32", u64, u32, u32, u64(a) * b);
    BINARY("mul.wide.s32", i64, i32, i32, i64(a) * b);
    TERNARY("mad.wide.u32", u64, u32, u32, u64, u64(a) * b + c);
    TERNARY("mad.wide.s32", u64, i32, i32, u64, u64(i64(a) * b) + c);
    BINARY("mul.hi.u32", u32, u32, u32, u64(a) * b >> 32);
    BINARY("mul.hi.s32", i32, i32, i32, i64(a) * b >> 32);
    TERNARY("lop3.b32", u32, u32, u32, u32, lop3(a, b, c, u32(at[4])));
    TERNARY("prmt.b32", u32, u32, u32, u32, permute(a, b, c));
    BINARY("max.u16x2", u32, u32, u32, maximum<u32>(a & 0xffff, b & 0xffff) | maximum<u32>(a >> 16, b >> 16) << 16);
    INSERTION("bfi.b32", u32);
    INSERTION("bfi.b64", u64);
    TERNARY("shf.l.wrap.b32", u32, u32, u32, u32, u32((u64(b) << 32 | a) << (c & 31) >> 32));
    TERNARY("shf.r.wrap.b32", u32, u32, u32, u32, u32((u64(b) << 32 | a) >> (c & 31)));
    TERNARY("shf.l.clamp.b32", u32, u32, u32, u32, c >= 32 ? a : u32((u64(b) << 32 | a) << c >> 32));
    TERNARY("shf.r.clamp.b32", u32, u32, u32, u32, c >= 32 ? b : u32((u64(b) << 32 | a) >> c));
    UNARY("popc.b32", u32, u32, __builtin_popcount(a));
    UNARY("clz.b32", u32, u32, a ? __builtin_clz(a) : 32);

    UNARY("mov.32", u32, u32, a);
    UNARY("mov.64", u64, u64, a);
    BINARY("pack.32", u32, u32, u32, (a & 0xffff) | b << 16);
    BINARY("pack.64", u64, u32, u32, a | u64(b) << 32);
    OP("unpack.32", EACH(lanes, {
           const u32 a = get<u32>(r, at[2], l);
           r[at[0] + l] = a & 0xffff;
           r[at[1] + l] = a >> 16;
       }));
    OP("unpack.64", EACH(lanes, {
           const u64 a = get<u64>(r, at[2], l);
           r[at[0] + l] = u32(a);
           r[at[1] + l] = u32(a >> 32);
       }));
    OP("selp.32", {
        const u32 p = r[at[3]];
        EACH(lanes, { r[at[0] + l] = r[at[p >> l & 1 ? 1 : 2] + l]; })
    });
    OP("selp.64", {
        const u32 p = r[at[3]];
        EACH(lanes, { set<u64>(r, at[0], l, get<u64>(r, at[p >> l & 1 ? 1 : 2], l)); })
    });

    COMPARISONS("f32", float);
    COMPARE("setp.neu.f32", float, !(a == b));
    COMPARE("setp.ltu.f32", float, !(a >= b));
    COMPARE("setp.leu.f32", float, !(a > b));
    COMPARE("setp.gtu.f32", float, !(a <= b));
    COMPARE("setp.geu.f32", float, !(a < b));
    COMPARE("setp.nan.f32", float, std::isnan(a) || std::isnan(b));
    COMPARE("setp.num.f32", float, !std::isnan(a) && !std::isnan(b));
    BINARY("add.f32", float, float, float, a + b);
    BINARY("sub.f32", float, float, float, a - b);
    BINARY("mul.f32", float, float, float, a * b);
    BINARY("div.rn.f32", float, float, float, a / b);
    BINARY("div.full.f32", float, float, float, a / b);
    BINARY("div.approx.f32", float, float, float, a / b);
    BINARY("min.f32", float, float, float, std::fmin(a, b));
    BINARY("max.f32", float, float, float, std::fmax(a, b));
    TERNARY("fma.rn.f32", float, float, float, float, std::fma(a, b, c));
    UNARY("neg.f32", u32, u32, a ^ 0x80000000u);
    UNARY("abs.f32", u32, u32, a & 0x7fffffffu);
    UNARY("rcp.rn.f32", float, float, 1.0f / a);
    UNARY("rcp.approx.f32", float, float, 1.0f / a);
    UNARY("sqrt.rn.f32", float, float, std::sqrt(a));
    UNARY("sqrt.approx.f32", float, float, std::sqrt(a));
    UNARY("rsqrt.approx.f32", float, float, 1.0 / std::sqrt(double(a)));
    UNARY("ex2.approx.f32", float, float, std::exp2(a));
    UNARY("lg2.approx.f32", float, float, std::log2(a));
    UNARY("cvt.rn.f32.s32", float, i32, a);
    UNARY("cvt.rn.f32.u32", float, u32, a);
    UNARY("cvt.rn.f32.s8", float, i8, a);
    UNARY("cvt.rn.f32.u8", float, u8, a);
    UNARY("cvt.rn.f32.s16", float, i16, a);
    UNARY("cvt.rn.f32.u16", float, u16, a);
    UNARY("cvt.rn.f32.s64", float, i64, a);
    UNARY("cvt.rn.f32.u64", float, u64, a);
    UNARY("cvt.rni.s32.f32", i32, float, saturate<i32>(std::nearbyint(a)));
    UNARY("cvt.rzi.s32.f32", i32, float, saturate<i32>(std::trunc(a)));
    UNARY("cvt.rzi.u32.f32", u32, float, saturate<u32>(std::trunc(a)));
    UNARY("cvt.rzi.u32.f64", u32, double, saturate<u32>(std::trunc(a)));
    UNARY("cvt.rzi.s32.f64", i32, double, saturate<i32>(std::trunc(a)));
    HALVES("bf16", Bf16);
    HALVES("f16", F16);

    table["bra"] = {branch, Kind::BRANCH};
    table["exit"] = {branch, Kind::EXIT};
    OP("nop", (void)lanes);
    table["trap"] = {[](Warp&, const Instruction&, u32) -> Outcome { throw Fault("the kernel stopped itself"); }};
}

}  // namespace emulator
