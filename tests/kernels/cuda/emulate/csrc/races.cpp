#include <algorithm>
#include "machine.hpp"

namespace emulator {
namespace {

void join(Clock& to, const Clock& from) {
    if (to.size() < from.size()) to.resize(from.size());
    for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

bool covers(const Clock& clock, const Clock& other) {
    if (clock.size() < other.size()) return false;
    for (size_t i = 0; i < other.size(); ++i)
        if (clock[i] < other[i]) return false;
    return true;
}

bool told(const Clock& clock, const Access& access, u32 thread) {
    const size_t i = access.warp * THREADS + thread;
    return i < clock.size() && clock[i] >= access.time;
}

bool knows(const Warp& w, int lane, const Access& access) {
    if (access.time == 0) return true;
    const Clock& clock = *w.knowledge.lanes[lane];
    if (access.lanes == 0) return told(clock, access, ENGINE);
    u32 others = access.lanes;
    if (access.warp == w.knowledge.warp) {
        if (access.time <= w.knowledge.together) return true;
        others &= ~(1u << lane);
    }
    for (; others; others &= others - 1)
        if (!told(clock, access, __builtin_ctz(others))) return false;
    return true;
}

bool knows_write(Warp& w, int lane, const Access& write) {
    Access& known = w.knowledge.known[lane];
    if (write == known) return true;
    if (!knows(w, lane, write)) return false;
    known = write;
    return true;
}

[[noreturn]] void race(int lane, u32 at, bool write, const Access& earlier, bool written) {
    const std::string who = earlier.lanes ? text("lanes %#x", earlier.lanes) : "a copy";
    throw Fault(text("a race: lane %d %s shared address %#x, which <pc %u> of warp %u (%s) has %s with nothing "
                     "that orders them",
                     lane, write ? "writes" : "reads", at, earlier.pc, earlier.warp, who.c_str(),
                     written ? "written" : "read"));
}

void add_read(Shadow& shadow, u32& list, const Access& access) {
    u32 place = shadow.unused;
    if (place) {
        shadow.unused = shadow.reads[place - 1].next;
    } else {
        shadow.reads.emplace_back();
        place = u32(shadow.reads.size());
    }
    shadow.reads[place - 1] = {access, list};
    list = place;
}

void remove_read(Shadow& shadow, u32& link) {
    const u32 place = link;
    link = shadow.reads[place - 1].next;
    shadow.reads[place - 1].next = shadow.unused;
    shadow.unused = place;
}

void tell_apart(Shadow& shadow, Accesses* words) {
    for (int i = 1; i < 4; ++i) {
        words[i].write = words[0].write;
        for (u32 next = words[0].reads; next; next = shadow.reads[next - 1].next) {
            const Access read = shadow.reads[next - 1].access;
            add_read(shadow, words[i].reads, read);
        }
    }
}

// The words of an access, or one for each four of them that have always been accessed together.
template <class Body>
void each_word(Cta& owner, u32 at, u32 bytes, bool write, Body body) {
    const u32 base = owner.cluster->machine->launch.shared_base, end = at + bytes;
    Shadow& shadow = owner.shadow;
    for (u32 first = at & ~15u; first < end; first += 16) {
        const u32 four = (first - base) / 16;
        Accesses* const words = &shadow.words[4 * four];
        const bool all = at <= first && first + 16 <= end;
        if (all && shadow.alike[four]) {
            body(words[0], first);
            continue;
        }
        if (shadow.alike[four]) tell_apart(shadow, words);
        for (u32 i = 0, word = first; i < 4; ++i, word += 4)
            if (word + 4 > at && word < end) body(words[i], word);
        shadow.alike[four] = all && write;
    }
}

void write_word(Warp& w, int lane, Shadow& shadow, Accesses& word, u32 at, const Access& access) {
    if (!knows_write(w, lane, word.write)) race(lane, at, true, word.write, true);
    while (word.reads) {
        const Access& read = shadow.reads[word.reads - 1].access;
        if (!knows(w, lane, read)) race(lane, at, true, read, false);
        remove_read(shadow, word.reads);
    }
    word.write = access;
}

void read_word(Warp& w, int lane, Shadow& shadow, Accesses& word, u32 at) {
    const Knowledge& own = w.knowledge;
    const u32 bit = 1u << lane;
    // Who knows a read of this warp knows all of its lanes up to where they last met, so it takes the place of such a one.
    Access* place = nullptr;
    for (u32 next = word.reads; next && !place; next = shadow.reads[next - 1].next) {
        Access& read = shadow.reads[next - 1].access;
        if (read.warp == own.warp && (read.time == own.time || read.time <= own.together)) place = &read;
    }
    if (place && place->time == own.time && place->lanes & bit) return;
    if (!knows_write(w, lane, word.write)) race(lane, at, false, word.write, true);
    if (place && place->time == own.time) place->lanes |= bit;
    else if (place) *place = {own.warp, own.time, machine_of(w).running_pc, bit};
    else add_read(shadow, word.reads, {own.warp, own.time, machine_of(w).running_pc, bit});
}

bool watched(Warp& w) { return machine_of(w).launch.races; }

}  // namespace

void Told::pass() {
    join(passed, arriving);
    arriving.clear();
}

void observe(Warp& w, int lane, Cta& owner, u32 at, u32 bytes, bool write) {
    if (!watched(w)) return;
    const Access access = {w.knowledge.warp, w.knowledge.time, machine_of(w).running_pc, 1u << lane};
    each_word(owner, at, bytes, write, [&](Accesses& word, u32 address) {
        if (write) write_word(w, lane, owner.shadow, word, address, access);
        else read_word(w, lane, owner.shadow, word, address);
    });
}

u32 observe_copy(Warp& w, int lane, Cta& owner, u32 at, u32 bytes) {
    if (!watched(w) || bytes == 0) return 0;
    const Access access = {w.knowledge.warp, ++w.knowledge.copies, machine_of(w).running_pc, 0};
    each_word(owner, at, bytes, true,
              [&](Accesses& word, u32 address) { write_word(w, lane, owner.shadow, word, address, access); });
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
        if (covers(*clock, barrier.passed)) continue;
        if (!after || clock != before) {
            Clock joined = *clock;
            join(joined, barrier.passed);
            before = clock, after = std::make_shared<const Clock>(std::move(joined));
        }
        clock = after;
    }
}

}  // namespace emulator
