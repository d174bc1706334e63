// What the emulated GPU consists of: programs, warps, CTAs, clusters, their barriers and memory.
//
// A warp has the registers of 32 lanes side by side and runs one instruction for all lanes that stand at it. Lanes that
// take different ways become groups with program counters of their own, which join where they meet.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>
#include "races.hpp"

namespace emulator {

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline std::string text(const char* format, ...) {
    char buffer[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    return buffer;
}

// WAIT: tried again at the warp's next turn, when others have moved on. PAUSE: done, but others should have their turn.
enum class Outcome { NEXT, WAIT, PAUSE };

struct Warp;
struct Instruction;
using Handler = Outcome (*)(Warp&, const Instruction&, u32 lanes);

// TOGETHER: all lanes of the warp have to be at it; MEMBERS: those of the mask in the register at[0].
enum class Kind : u8 { PLAIN, TOGETHER, MEMBERS, BRANCH, EXIT };

struct Instruction {
    Handler run = nullptr;
    const i32* at = nullptr;  // operands: words of the register file, or plain numbers
    i32 count = 0;
    i32 guard = -1;  // word of the predicate, -1 for none
    bool negated = false;
    Kind kind = Kind::PLAIN;
};

struct Program {
    std::vector<Instruction> code;
    std::vector<i32> operands;
    int words = 0;                                      // of a warp's registers
    std::vector<u32> initial;                           // constants among them; what is not set is poison
    std::vector<std::pair<int, std::string>> specials;  // words of special registers
};

constexpr u32 ALL = 0xffffffffu;
constexpr u64 PARAM_AT = 0x1000;                     // of the first parameter in the parameter space
constexpr u64 PARAM_WINDOW = 0x7e00000000000000ull;  // generic addresses of parameters and of shared memory
constexpr u64 SHARED_WINDOW = 0x7f00000000000000ull;
constexpr int RANK_SHIFT = 24;  // of a CTA's rank + 1 in addresses of the cluster's shared memory

// Runs `body` for every lane l of `lanes`; the compiler makes vector instructions of the case that counts.
#define EACH(lanes, ...)                                   \
    if ((lanes) == ALL) {                                  \
        for (int l = 0; l < 32; ++l) __VA_ARGS__           \
    } else {                                               \
        for (u32 left = (lanes); left; left &= left - 1) { \
            const int l = __builtin_ctz(left);             \
            __VA_ARGS__                                    \
        }                                                  \
    }

// Values of a register at word `at` in lane l: 64-bit ones take two words of each lane, all others one.
template <class T>
inline T get(const u32* r, i32 at, int l) {
    if constexpr (sizeof(T) == 8) {
        T value;
        std::memcpy(&value, r + at + 2 * l, 8);
        return value;
    } else if constexpr (sizeof(T) == 4) {
        T value;
        std::memcpy(&value, r + at + l, 4);
        return value;
    } else {
        return T(r[at + l]);
    }
}
template <class T>
inline void set(u32* r, i32 at, int l, T value) {
    if constexpr (sizeof(T) == 8) {
        std::memcpy(r + at + 2 * l, &value, 8);
    } else if constexpr (sizeof(T) == 4) {
        std::memcpy(r + at + l, &value, 4);
    } else {
        r[at + l] = u16(value);
    }
}

struct Group {
    u32 pc, lanes;
    u64 ticket = 0;  // what it waits for at a barrier where it has arrived; 0: nothing
    bool tried = false;
};

struct Cta;

struct AsyncCopy {  // of cp.async
    u8* to;
    const u8* from;
    int bytes;
    u32 batch;
};

struct Operand {  // B of a wgmma that has not been waited for
    std::vector<u8> seen;
    u32 at, atom, batch;
};

struct Warp {
    Cta* cta = nullptr;
    int index = 0;
    u32 alive = 0;
    std::vector<u32> registers;
    u32* r = nullptr;
    std::vector<Group> groups;
    Group* current = nullptr;
    std::vector<AsyncCopy> copies[32];
    u32 copy_batch[32] = {};
    std::vector<Operand> products;
    u32 product_batch = 0;
    bool fenced = false;  // by wgmma.fence
    bool cluster_arrived = false;
    u64 cluster_generation = 0;
    u32 spin_pc = ~0u;
    u64 spin_value = 0;
    bool spins = false;
    Knowledge knowledge;
};

struct NamedBarrier {
    u32 arrived = 0, expected = 0;
    u64 generation = 0;
    Told told;
};

struct CountedBarrier {  // mbarrier
    i64 expected = 0, pending = 0, bytes = 0;
    u64 phase = 0;
    Told told;
    bool busy() const { return pending != expected || bytes != 0; }
};

struct Cluster;

struct Cta {
    Cluster* cluster = nullptr;
    u32 index = 0, rank = 0;
    std::vector<u8> shared;
    Shadow shadow;
    std::vector<Warp> warps;
    NamedBarrier barriers[16];
    std::unordered_map<u32, CountedBarrier> counted;
    u32 warps_left = 0;
    int in_flight = 0;    // copies on their way to its shared memory
    bool waited = false;  // for the kernel in front
};

struct Machine;

struct Cluster {
    Machine* machine = nullptr;
    std::vector<std::unique_ptr<Cta>> ctas;
    u32 warps_left = 0, arrived = 0;
    u64 generation = 0;
    Told told;
};

struct Range {
    u64 first, end;
    bool early;  // may be read before the kernel in front has ended
};

enum class Order { FORWARD, BACKWARD, RANDOM };
enum class Copies { AT_ONCE, LATE, RANDOM };

// Twin of `_Launch` in machine.py.
struct Launch {
    u32 grid, threads, cluster, resident, shared_base, shared_bytes;
    u32 order, copies, dependent, races;
    u64 seed, limit;
};

struct Machine {
    const Program& program;
    Launch launch;
    const u8* params;
    u64 param_bytes;
    std::vector<Range> ranges;
    std::mt19937_64 random;
    std::vector<std::unique_ptr<Cluster>> clusters;
    std::vector<std::function<void()>> in_flight;
    u64 executed = 0;
    size_t last_range = 0;
    Warp* running = nullptr;
    u32 running_pc = 0;

    Order order() const { return Order(launch.order); }
    Copies copies() const { return Copies(launch.copies); }

    // What the copy engine does, now or later.
    void asynchronous(std::function<void()> deliver) {
        if (copies() == Copies::AT_ONCE) deliver();
        else in_flight.push_back(std::move(deliver));
    }
    void deliver_one() {
        const size_t i = random() % in_flight.size();
        auto deliver = std::move(in_flight[i]);
        in_flight[i] = std::move(in_flight.back());
        in_flight.pop_back();
        deliver();
    }
};

inline Machine& machine_of(Warp& w) { return *w.cta->cluster->machine; }

// --- memory ------------------------------------------------------------------------------------------------------

enum class Space : i32 { GLOBAL, SHARED, PARAM, GENERIC, CLUSTER };

// The CTA that an address of the cluster's shared memory belongs to, and the address there.
inline std::pair<Cta*, u32> in_cluster(Cta& cta, u32 address) {
    const u32 rank = address >> RANK_SHIFT;
    if (rank == 0) return {&cta, address};
    if (rank > cta.cluster->ctas.size())
        throw Fault(
            text("shared address %#x is of CTA %u of the cluster, which has %zu", address, rank - 1, cta.cluster->ctas.size()));
    return {cta.cluster->ctas[rank - 1].get(), address & ((1u << RANK_SHIFT) - 1)};
}

inline u8* shared_at(Cta& cta, u32 address, u32 bytes) {
    const u32 base = cta.cluster->machine->launch.shared_base;
    if (address < base || u64(address) + bytes > base + cta.shared.size())
        throw Fault(text("%u bytes at shared address %#x lie outside the CTA's %zu bytes from %#x on", bytes, address,
                         cta.shared.size(), base));
    return cta.shared.data() + (address - base);
}

inline u8* cluster_at(Cta& cta, u32 address, u32 bytes) {
    const auto [owner, at] = in_cluster(cta, address);
    if (owner->warps_left == 0)
        throw Fault(text("shared address %#x belongs to CTA %u of the cluster, which has ended", address, owner->rank));
    return shared_at(*owner, at, bytes);
}

inline u8* global_at(Warp& w, u64 address, u64 bytes, bool write) {
    Machine& machine = machine_of(w);
    const auto found = [&](size_t i) {
        const Range& range = machine.ranges[i];
        if (address < range.first || address + bytes > range.end) return false;
        if (machine.launch.dependent && !w.cta->waited && (write || !range.early))
            throw Fault(text("<range %zu> is %s before the wait for the kernel in front", i, write ? "written" : "read"));
        machine.last_range = i;
        return true;
    };
    if (machine.last_range < machine.ranges.size() && found(machine.last_range)) return reinterpret_cast<u8*>(address);
    for (size_t i = 0; i < machine.ranges.size(); ++i)
        if (found(i)) return reinterpret_cast<u8*>(address);
    std::string message =
        text("%llu bytes at global address %#llx lie in no operand", (unsigned long long)bytes, (unsigned long long)address);
    for (size_t i = 0; i < machine.ranges.size(); ++i) {
        const Range& range = machine.ranges[i];
        const i64 before = i64(range.first - address), after = i64(address + bytes - range.end);
        if (before > 0 && before < 1 << 20) message += text("; %lld bytes before <range %zu>", (long long)before, i);
        if (after > 0 && after < 1 << 20) message += text("; ends %lld bytes past <range %zu>", (long long)after, i);
    }
    throw Fault(message);
}

inline const u8* param_at(Machine& machine, u64 address, u64 bytes) {
    if (address < PARAM_AT || address + bytes > PARAM_AT + machine.param_bytes)
        throw Fault(text("%llu bytes at parameter offset %lld of %llu", (unsigned long long)bytes,
                         (long long)(address - PARAM_AT), (unsigned long long)machine.param_bytes));
    return machine.params + (address - PARAM_AT);
}

// An access by a lane to what `resolve` has found; only those to shared memory are of interest.
inline void observe(Warp& w, int lane, Space space, u64 address, u32 bytes, bool write) {
    if (space == Space::GENERIC && address >= SHARED_WINDOW) space = Space::SHARED, address -= SHARED_WINDOW;
    if (space != Space::SHARED && space != Space::CLUSTER) return;
    const auto [owner, at] = in_cluster(*w.cta, u32(address));
    observe(w, lane, *owner, at, bytes, write);
}

inline u8* resolve(Warp& w, Space space, u64 address, u32 bytes, bool write = false) {
    if (address % bytes)
        throw Fault(text("address %#llx is no multiple of the %u bytes accessed", (unsigned long long)address, bytes));
    switch (space) {
        case Space::SHARED:
            return shared_at(*w.cta, u32(address), bytes);
        case Space::CLUSTER:
            return cluster_at(*w.cta, u32(address), bytes);
        case Space::PARAM:
            return const_cast<u8*>(param_at(machine_of(w), address, bytes));
        case Space::GENERIC:
            if (address >= SHARED_WINDOW) return shared_at(*w.cta, u32(address - SHARED_WINDOW), bytes);
            if (address >= PARAM_WINDOW) return const_cast<u8*>(param_at(machine_of(w), address - PARAM_WINDOW, bytes));
            [[fallthrough]];
        case Space::GLOBAL:
            return global_at(w, address, bytes, write);
    }
    throw Fault("unknown state space");
}

// --- the handlers of all opcodes ---------------------------------------------------------------------------------

struct Entry {
    Handler run;
    Kind kind = Kind::PLAIN;
};
using Table = std::unordered_map<std::string, Entry>;
void add_arithmetic(Table&);
void add_memory(Table&);
void add_matrices(Table&);
void add_barriers(Table&);

}  // namespace emulator
