// Loads, stores and copies: plain ones, cp.async, the copy engine, and stores to other CTAs of the cluster.
#include "machine.hpp"

namespace emulator {

CountedBarrier& counted_at(Cta& cta, u32 address);
void complete(Cta& cta, u32 address, i64 arrivals, i64 bytes);

namespace {

// at: space, count, address, whether it has 64 bits, offset, then registers.
u64 address_of(Warp& w, const i32* at, int l) {
    return (at[3] ? get<u64>(w.r, at[2], l) : u64(get<u32>(w.r, at[2], l))) + i64(at[4]);
}

template <class T, class Register>
Outcome load(Warp& w, const Instruction& I, u32 lanes) {
    const i32* at = I.at;
    const int count = at[1];
    EACH(lanes, {
        const u8* from = resolve(w, Space(at[0]), address_of(w, at, l), sizeof(T) * count);
        observe(w, l, Space(at[0]), address_of(w, at, l), sizeof(T) * count, false);
        for (int i = 0; i < count; ++i) {
            T value;
            std::memcpy(&value, from + i * sizeof(T), sizeof(T));
            set<Register>(w.r, at[5 + i], l, Register(value));
        }
    })
    return Outcome::NEXT;
}

// A load that may be repeated until its value changes: the others get their turn behind it.
template <class T, class Register>
Outcome load_latest(Warp& w, const Instruction& I, u32 lanes) {
    load<T, Register>(w, I, lanes);
    u64 value = 0;
    EACH(lanes, { value = value * 31 + get<Register>(w.r, I.at[5], l); })
    const u32 pc = w.current->pc;
    w.spins = w.spin_pc == pc && w.spin_value == value;
    w.spin_pc = pc, w.spin_value = value;
    return Outcome::PAUSE;
}

template <class T>
Outcome store(Warp& w, const Instruction& I, u32 lanes) {
    const i32* at = I.at;
    const int count = at[1];
    EACH(lanes, {
        u8* to = resolve(w, Space(at[0]), address_of(w, at, l), sizeof(T) * count, true);
        observe(w, l, Space(at[0]), address_of(w, at, l), sizeof(T) * count, true);
        for (int i = 0; i < count; ++i) {
            const T value = sizeof(T) < 4 ? T(w.r[at[5 + i] + l]) : get<T>(w.r, at[5 + i], l);
            std::memcpy(to + i * sizeof(T), &value, sizeof(T));
        }
    })
    return Outcome::NEXT;
}

// at: destination (shared), its offset, source (global), its offset, bytes
Outcome copy_async(Warp& w, const Instruction& I, u32 lanes) {
    const i32* at = I.at;
    EACH(lanes, {
        u8* to = resolve(w, Space::SHARED, get<u32>(w.r, at[0], l) + at[1], at[4]);
        observe(w, l, Space::SHARED, get<u32>(w.r, at[0], l) + at[1], at[4], true);
        const u8* from = resolve(w, Space::GLOBAL, get<u64>(w.r, at[2], l) + at[3], at[4]);
        if (machine_of(w).copies() == Copies::AT_ONCE) std::memcpy(to, from, at[4]);
        else w.copies[l].push_back({to, from, at[4], w.copy_batch[l]});
    })
    return Outcome::NEXT;
}

Outcome copy_commit(Warp& w, const Instruction&, u32 lanes) {
    EACH(lanes, { ++w.copy_batch[l]; })
    return Outcome::NEXT;
}

void copies_until(Warp& w, int l, i64 end) {
    auto& copies = w.copies[l];
    size_t kept = 0;
    for (const AsyncCopy& copy : copies) {
        if (i64(copy.batch) < end) std::memcpy(copy.to, copy.from, copy.bytes);
        else copies[kept++] = copy;
    }
    copies.resize(kept);
}

Outcome copy_wait(Warp& w, const Instruction& I, u32 lanes) {
    EACH(lanes, { copies_until(w, l, i64(w.copy_batch[l]) - I.at[0]); })
    return Outcome::NEXT;
}

Outcome copy_wait_all(Warp& w, const Instruction&, u32 lanes) {
    EACH(lanes, { copies_until(w, l, i64(1) << 40); })
    return Outcome::NEXT;
}

// A delivery to `cta`, which must not have ended by then.
void send(Machine& machine, Cta* cta, std::function<void()> deliver) {
    ++cta->in_flight;
    machine.asynchronous([=] {
        --cta->in_flight;
        deliver();
    });
}

// at: destination, its offset, source, its offset, bytes, barrier, its offset
Outcome copy_bulk(Warp& w, const Instruction& I, u32 lanes) {
    const i32* at = I.at;
    EACH(lanes, {
        const auto [owner, to] = in_cluster(*w.cta, get<u32>(w.r, at[0], l) + at[1]);
        const u64 from = get<u64>(w.r, at[2], l) + at[3];
        const u32 bytes = get<u32>(w.r, at[4], l);
        const auto [counting, barrier] = in_cluster(*w.cta, get<u32>(w.r, at[5], l) + at[6]);
        if (to % 16 || from % 16 || bytes % 16)
            throw Fault(text("a bulk copy of %u bytes from %#llx to %#x is not of whole multiples of 16", bytes,
                             (unsigned long long)from, to));
        u8* const there = shared_at(*owner, to, bytes);
        const u8* const here = global_at(w, from, bytes, false);
        counted_at(*counting, barrier);
        const u32 warp = w.knowledge.warp, time = observe_copy(w, l, *owner, to, bytes);
        send(machine_of(w), owner, [=, counting = counting, barrier = barrier] {
            std::memcpy(there, here, bytes);
            tell_copy(warp, time, counted_at(*counting, barrier).told);
            complete(*counting, barrier, 0, bytes);
        });
    })
    return Outcome::NEXT;
}

// Twin of `tensor_map` in device.py.
struct TensorMap {
    u64 magic, address, rows, columns, box_rows, box_columns;
};

void copy_box(Cta& cta, const TensorMap& map, u32 to, i32 column, i32 row) {
    for (u32 i = 0; i < map.box_rows; ++i)
        for (u32 j = 0; j < map.box_columns; ++j) {
            const i64 y = i64(row) + i, x = i64(column) + j;
            u16 value = 0;
            if (y >= 0 && y < i64(map.rows) && x >= 0 && x < i64(map.columns))
                std::memcpy(&value, reinterpret_cast<const u8*>(map.address + (y * map.columns + x) * 2), 2);
            const u32 at = to + i * 128 + j * 2;
            std::memcpy(shared_at(cta, at ^ (at >> 7 & 7) << 4, 2), &value, 2);
        }
}

// at: destination, its offset, map, column, row, barrier, its offset, mask of CTAs or -1
Outcome copy_tensor(Warp& w, const Instruction& I, u32 lanes) {
    const i32* at = I.at;
    EACH(lanes, {
        TensorMap map;
        std::memcpy(&map, resolve(w, Space::GENERIC, get<u64>(w.r, at[2], l), 64), sizeof map);
        if (map.magic != 0x70616d66646b2121ull) throw Fault("no tensor map lies where the copy looks for one");
        if (map.box_columns != 64) throw Fault("a swizzle of 128 bytes takes boxes of 64 columns of 16 bits");
        const auto [own, to] = in_cluster(*w.cta, get<u32>(w.r, at[0], l) + at[1]);
        const auto [counting, barrier] = in_cluster(*w.cta, get<u32>(w.r, at[5], l) + at[6]);
        global_at(w, map.address, map.rows * map.columns * 2, false);
        if (to % 128) throw Fault(text("a box goes to %#x, which is no multiple of 128", to));
        const i32 column = get<i32>(w.r, at[3], l), row = get<i32>(w.r, at[4], l);
        const u32 mask = at[7] < 0 ? 1u << own->rank : get<u16>(w.r, at[7], l);
        Machine& machine = machine_of(w);
        for (u32 rank = 0; rank < 16; ++rank)
            if (mask >> rank & 1) {
                if (rank >= w.cta->cluster->ctas.size()) throw Fault("a copy names a CTA that the cluster does not have");
                Cta* const target = w.cta->cluster->ctas[rank].get();
                Cta* const counted = at[7] < 0 ? counting : target;
                const u32 warp = w.knowledge.warp, time = observe_copy(w, l, *target, to, u32(map.box_rows) * 128);
                send(machine, target, [=, to = to, barrier = barrier] {
                    copy_box(*target, map, to, column, row);
                    tell_copy(warp, time, counted_at(*counted, barrier).told);
                    complete(*counted, barrier, 0, i64(map.box_rows) * map.box_columns * 2);
                });
            }
    })
    return Outcome::NEXT;
}

// at: destination, its offset, barrier, its offset, count, then registers of 32 bits
Outcome store_counted(Warp& w, const Instruction& I, u32 lanes) {
    const i32* at = I.at;
    EACH(lanes, {
        const auto [owner, to] = in_cluster(*w.cta, get<u32>(w.r, at[0], l) + at[1]);
        const auto [counting, barrier] = in_cluster(*w.cta, get<u32>(w.r, at[2], l) + at[3]);
        const int count = at[4];
        if (owner->warps_left == 0) throw Fault(text("a store goes to CTA %u of the cluster, which has ended", owner->rank));
        if (owner != counting) throw Fault("a store is counted by a barrier of another CTA than the one it goes to");
        if (to % (4 * count)) throw Fault(text("a store of %d words goes to %#x", count, to));
        u8* const there = shared_at(*owner, to, 4 * count);
        u32 words[4];
        for (int i = 0; i < count; ++i) words[i] = w.r[at[5 + i] + l];
        const u32 warp = w.knowledge.warp, time = observe_copy(w, l, *owner, to, 4 * count);
        send(machine_of(w), owner, [=, counting = counting, barrier = barrier] {
            std::memcpy(there, words, 4 * count);
            tell_copy(warp, time, counted_at(*counting, barrier).told);
            complete(*counting, barrier, 0, 4 * count);
        });
    })
    return Outcome::NEXT;
}

Outcome map_address(Warp& w, const Instruction& I, u32 lanes) {
    EACH(lanes, {
        const u32 address = get<u32>(w.r, I.at[1], l), rank = get<u32>(w.r, I.at[2], l);
        if (rank >= w.cta->cluster->ctas.size())
            throw Fault(text("mapa names CTA %u of a cluster of %zu", rank, w.cta->cluster->ctas.size()));
        set<u32>(w.r, I.at[0], l, (address & ((1u << RANK_SHIFT) - 1)) | (rank + 1) << RANK_SHIFT);
    })
    return Outcome::NEXT;
}

template <u64 WINDOW, bool BACK>
Outcome to_generic(Warp& w, const Instruction& I, u32 lanes) {
    EACH(lanes, { set<u64>(w.r, I.at[0], l, get<u64>(w.r, I.at[1], l) + (BACK ? 0 - WINDOW : WINDOW)); })
    return Outcome::NEXT;
}

// at: result, space, address, whether it has 64 bits, offset, operand
template <class Function>
Outcome atomic(Warp& w, const Instruction& I, u32 lanes, Function function) {
    const i32* at = I.at;
    EACH(lanes, {
        const u64 address = (at[3] ? get<u64>(w.r, at[2], l) : get<u32>(w.r, at[2], l)) + i64(at[4]);
        u8* to = resolve(w, Space(at[1]), address, 4, true);
        u32 old;
        std::memcpy(&old, to, 4);
        const u32 value = function(old, get<u32>(w.r, at[5], l));
        std::memcpy(to, &value, 4);
        if (at[0] >= 0) set<u32>(w.r, at[0], l, old);
    })
    return Outcome::NEXT;
}

}  // namespace

void add_memory(Table& table) {
    table["ld.u8"] = {load<u8, u32>};
    table["ld.s8"] = {load<i8, i32>};
    table["ld.u16"] = {load<u16, u32>};
    table["ld.s16"] = {load<i16, i32>};
    table["ld.32"] = {load<u32, u32>};
    table["ld.64"] = {load<u64, u64>};
    table["ld.latest.u16"] = {load_latest<u16, u32>};
    table["ld.latest.32"] = {load_latest<u32, u32>};
    table["ld.latest.64"] = {load_latest<u64, u64>};
    table["st.8"] = {store<u8>};
    table["st.16"] = {store<u16>};
    table["st.32"] = {store<u32>};
    table["st.64"] = {store<u64>};
    table["atom.add.32"] = {
        [](Warp& w, const Instruction& I, u32 lanes) { return atomic(w, I, lanes, [](u32 a, u32 b) { return a + b; }); }};
    table["atom.exch.32"] = {
        [](Warp& w, const Instruction& I, u32 lanes) { return atomic(w, I, lanes, [](u32, u32 b) { return b; }); }};
    table["cp.async"] = {copy_async};
    table["cp.async.commit_group"] = {copy_commit};
    table["cp.async.wait_group"] = {copy_wait};
    table["cp.async.wait_all"] = {copy_wait_all};
    table["cp.async.bulk"] = {copy_bulk};
    table["cp.async.bulk.tensor.2d"] = {copy_tensor};
    table["st.async"] = {store_counted};
    table["mapa"] = {map_address};
    table["cvta.shared"] = {to_generic<SHARED_WINDOW, false>};
    table["cvta.to.shared"] = {to_generic<SHARED_WINDOW, true>};
    table["cvta.param"] = {to_generic<PARAM_WINDOW, false>};
}

}  // namespace emulator
