#include <algorithm>
#include "machine.hpp"

namespace emulator {
namespace {

void join(Clock& to, const Clock& from) {
    if (to.size() < from.size()) to.resize(from.size());
    for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

bool knows(const Warp& w, int lane, const Access& access) {
    const bool own = access.warp == w.knowledge.warp;
    if (own && access.lanes <= ALL && access.time <= w.knowledge.together) return true;
    const Clock& clock = *w.knowledge.lanes[lane];
    for (u64 left = access.lanes; left; left &= left - 1) {
        const u32 thread = __builtin_ctzll(left);
        if (own && int(thread) == lane) continue;
        const size_t i = access.warp * THREADS + thread;
        if (i >= clock.size() || clock[i] < access.time) return false;
    }
    return true;
}

[[noreturn]] void race(int lane, u32 at, bool write, const Access& earlier, bool written) {
    throw Fault(text("a race: lane %d %s shared address %#x, which <pc %u> of warp %u (lanes %#llx) has %s with nothing "
                     "that orders them",
                     lane, write ? "writes" : "reads", at, earlier.pc, earlier.warp, (unsigned long long)earlier.lanes,
                     written ? "written" : "read"));
}

template <class Body>
void each_word(Cta& owner, u32 at, u32 bytes, Body body) {
    const u32 base = owner.cluster->machine->launch.shared_base;
    for (u32 word = at / 4; word <= (at + bytes - 1) / 4; ++word) body(owner.accesses[word - base / 4], word * 4);
}

void write_word(Warp& w, int lane, Accesses& word, u32 at, const Access& access) {
    if (!knows(w, lane, word.write)) race(lane, at, true, word.write, true);
    for (const Access& read : word.reads)
        if (!knows(w, lane, read)) race(lane, at, true, read, false);
    word.reads.clear();
    word.write = access;
}

void read_word(Warp& w, int lane, Accesses& word, u32 at) {
    if (!knows(w, lane, word.write)) race(lane, at, false, word.write, true);
    const Knowledge& own = w.knowledge;
    const u64 bit = u64(1) << lane;
    bool found = false;
    for (size_t i = 0; i < word.reads.size();) {
        Access& read = word.reads[i];
        if (read.warp != own.warp) {
            ++i;
        } else if (read.time == own.time) {
            read.lanes |= bit, found = true, ++i;
        } else if (read.lanes &= ~bit; read.lanes) {
            ++i;
        } else {
            read = word.reads.back();
            word.reads.pop_back();
        }
    }
    if (!found) word.reads.push_back({own.warp, own.time, machine_of(w).running_pc, bit});
}

bool watched(Warp& w) { return machine_of(w).launch.races; }

}  // namespace

void Told::pass() {
    join(passed, arriving);
    arriving.clear();
}

void observe(Warp& w, int lane, Cta& owner, u32 at, u32 bytes, bool write) {
    if (!watched(w)) return;
    const Access access = {w.knowledge.warp, w.knowledge.time, machine_of(w).running_pc, u64(1) << lane};
    each_word(owner, at, bytes, [&](Accesses& word, u32 address) {
        if (write) write_word(w, lane, word, address, access);
        else read_word(w, lane, word, address);
    });
}

u32 observe_copy(Warp& w, int lane, Cta& owner, u32 at, u32 bytes) {
    if (!watched(w) || bytes == 0) return 0;
    const Access access = {w.knowledge.warp, ++w.knowledge.copies, machine_of(w).running_pc, u64(1) << ENGINE};
    each_word(owner, at, bytes, [&](Accesses& word, u32 address) { write_word(w, lane, word, address, access); });
    return access.time;
}

void bring_together(Warp& w) {
    Knowledge& own = w.knowledge;
    own.together = own.time++;
    if (std::all_of(own.lanes, own.lanes + 32, [&](const auto& clock) { return clock == own.lanes[0]; })) return;
    Clock all;
    for (int l = 0; l < 32; ++l)
        if (l == 0 || own.lanes[l] != own.lanes[l - 1]) join(all, *own.lanes[l]);
    std::fill(own.lanes, own.lanes + 32, std::make_shared<const Clock>(std::move(all)));
}

void tell(Warp& w, u32 lanes, Told& barrier) {
    if (!watched(w)) return;
    Knowledge& own = w.knowledge;
    Clock& to = barrier.arriving;
    const Clock* last = nullptr;
    for (u32 left = lanes; left; left &= left - 1) {
        const Clock* clock = own.lanes[__builtin_ctz(left)].get();
        if (clock != last) join(to, *clock);
        last = clock;
    }
    if (to.size() < (own.warp + 1) * THREADS) to.resize((own.warp + 1) * THREADS);
    for (int l = 0; l < 32; ++l) {
        u32& time = to[own.warp * THREADS + l];
        time = std::max(time, lanes >> l & 1 ? own.time : own.together);
    }
    ++own.time;
}

void tell_copy(u32 warp, u32 time, Told& barrier) {
    Clock& to = barrier.arriving;
    if (time == 0) return;
    if (to.size() < (warp + 1) * THREADS) to.resize((warp + 1) * THREADS);
    u32& known = to[warp * THREADS + ENGINE];
    known = std::max(known, time);
}

void learn(Warp& w, u32 lanes, const Told& barrier) {
    if (!watched(w)) return;
    Knowledge& own = w.knowledge;
    std::shared_ptr<const Clock> before, after;
    for (u32 left = lanes; left; left &= left - 1) {
        auto& clock = own.lanes[__builtin_ctz(left)];
        if (!after || clock != before) {
            Clock joined = *clock;
            join(joined, barrier.passed);
            before = clock, after = std::make_shared<const Clock>(std::move(joined));
        }
        clock = after;
    }
}

}  // namespace emulator
