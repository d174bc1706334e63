// Where threads wait for each other and for copies, and what the lanes of a warp tell each other.
#include "machine.hpp"

namespace emulator {

CountedBarrier& counted_at(Cta& cta, u32 address) {
    const auto found = cta.counted.find(address);
    if (found == cta.counted.end())
        throw Fault(text("no mbarrier has been initialised at shared address %#x of CTA %u", address, cta.index));
    return found->second;
}

void complete(Cta& cta, u32 address, i64 arrivals, i64 bytes) {
    CountedBarrier& barrier = counted_at(cta, address);
    if (arrivals > barrier.pending)
        throw Fault(
            text("the mbarrier at %#x expects %lld arrivals in a phase and got more", address, (long long)barrier.expected));
    barrier.pending -= arrivals, barrier.bytes -= bytes;
    if (barrier.pending == 0 && barrier.bytes == 0) ++barrier.phase, barrier.pending = barrier.expected, barrier.told.pass();
}

void complete_cluster_barrier(Cluster& cluster) {
    if (cluster.arrived == cluster.warps_left && cluster.arrived > 0) ++cluster.generation, cluster.arrived = 0, cluster.told.pass();
}

namespace {

u32 shared_address(Warp& w, const i32* at, int l) { return get<u32>(w.r, at[0], l) + at[1]; }

// at: barrier, its offset, count
Outcome init(Warp& w, const Instruction& I, u32 lanes) {
    EACH(lanes, {
        const u32 address = shared_address(w, I.at, l), count = get<u32>(w.r, I.at[2], l);
        shared_at(*w.cta, address, 8);
        if (address % 8 || count == 0) throw Fault(text("an mbarrier of %u arrivals at %#x", count, address));
        w.cta->counted[address] = {i64(count), i64(count), 0, 0, {}};
    })
    return Outcome::NEXT;
}

// at: barrier, its offset
Outcome invalidate(Warp& w, const Instruction& I, u32 lanes) {
    EACH(lanes, { w.cta->counted.erase(shared_address(w, I.at, l)); })
    return Outcome::NEXT;
}

// at: barrier, its offset, bytes
Outcome expect(Warp& w, const Instruction& I, u32 lanes) {
    EACH(lanes, {
        const auto [owner, address] = in_cluster(*w.cta, shared_address(w, I.at, l));
        CountedBarrier& barrier = counted_at(*owner, address);
        barrier.bytes += get<u32>(w.r, I.at[2], l);
        tell(w, 1u << l, barrier.told);
        complete(*owner, address, 1, 0);
    })
    return Outcome::NEXT;
}

Outcome arrive(Warp& w, const Instruction& I, u32 lanes) {
    EACH(lanes, {
        const auto [owner, address] = in_cluster(*w.cta, shared_address(w, I.at, l));
        if (owner->warps_left == 0)
            throw Fault(text("an arrival at a barrier of CTA %u of the cluster, which has ended", owner->rank));
        tell(w, 1u << l, counted_at(*owner, address).told);
        complete(*owner, address, 1, 0);
    })
    return Outcome::NEXT;
}

// at: predicate, barrier, its offset, parity. Lanes whose phase is not over go round their loop again; where it is only
// asked (WAITS is false), they go on.
template <bool WAITS>
Outcome phase_over(Warp& w, const Instruction& I, u32 lanes) {
    u32 done = 0;
    for (u32 open = lanes, same = 0; open; open &= ~same) {
        const int first = __builtin_ctz(open);
        const u32 address = shared_address(w, I.at + 1, first), parity = get<u32>(w.r, I.at[3], first) & 1;
        same = 0;
        EACH(open, {
            same |= u32(shared_address(w, I.at + 1, l) == address && (get<u32>(w.r, I.at[3], l) & 1) == parity) << l;
        })
        const CountedBarrier& barrier = counted_at(*w.cta, address);
        if ((barrier.phase & 1) == parity) continue;
        learn(w, same, barrier.told);
        done |= same;
    }
    if (WAITS && !done) return Outcome::WAIT;
    w.r[I.at[0]] = (w.r[I.at[0]] & ~lanes) | done;
    return Outcome::NEXT;
}

// at: barrier number, threads or -1
NamedBarrier& arrive_named(Warp& w, const Instruction& I) {
    const u32 number = w.r[I.at[0] + __builtin_ctz(w.alive)];
    if (number > 15) throw Fault(text("there is no barrier %u", number));
    NamedBarrier& barrier = w.cta->barriers[number];
    const u32 threads = I.at[1] < 0 ? w.cta->warps_left * 32 : w.r[I.at[1] + __builtin_ctz(w.alive)];
    if (threads % 32 || threads == 0)
        throw Fault(text("barrier %u is for %u threads, which are not whole warps", number, threads));
    if (barrier.arrived && barrier.expected != threads)
        throw Fault(text("barrier %u is for %u threads and for %u", number, barrier.expected, threads));
    barrier.expected = threads;
    barrier.arrived += 32;
    tell(w, w.alive, barrier.told);
    if (barrier.arrived > threads) throw Fault(text("more than %u threads are at barrier %u", threads, number));
    return barrier;
}

void pass_if_complete(NamedBarrier& barrier) {
    if (barrier.arrived == barrier.expected) ++barrier.generation, barrier.arrived = 0, barrier.told.pass();
}

Outcome sync_named(Warp& w, const Instruction& I, u32) {
    Group& group = *w.current;
    NamedBarrier* barrier = nullptr;
    if (group.ticket == 0) {
        barrier = &arrive_named(w, I);
        group.ticket = barrier->generation + 1;
        pass_if_complete(*barrier);
    } else {
        barrier = &w.cta->barriers[w.r[I.at[0] + __builtin_ctz(w.alive)]];
    }
    if (barrier->generation < group.ticket) return Outcome::WAIT;
    group.ticket = 0;
    learn(w, w.alive, barrier->told);
    return Outcome::NEXT;
}

Outcome arrive_at_named(Warp& w, const Instruction& I, u32) {
    NamedBarrier& barrier = arrive_named(w, I);
    pass_if_complete(barrier);
    return Outcome::NEXT;
}

Outcome cluster_arrive(Warp& w, const Instruction&, u32) {
    Cluster& cluster = *w.cta->cluster;
    if (w.cluster_arrived) throw Fault("arrives at the cluster's barrier a second time without waiting");
    w.cluster_arrived = true, w.cluster_generation = cluster.generation;
    ++cluster.arrived;
    tell(w, w.alive, cluster.told);
    complete_cluster_barrier(cluster);
    return Outcome::NEXT;
}

Outcome cluster_wait(Warp& w, const Instruction&, u32) {
    if (!w.cluster_arrived) throw Fault("waits at the cluster's barrier without having arrived");
    if (w.cta->cluster->generation == w.cluster_generation) return Outcome::WAIT;
    w.cluster_arrived = false;
    learn(w, w.alive, w.cta->cluster->told);
    return Outcome::NEXT;
}

Outcome wait_for_previous_kernel(Warp& w, const Instruction&, u32) {
    w.cta->waited = true;
    return Outcome::NEXT;
}

Outcome nothing(Warp&, const Instruction&, u32) { return Outcome::NEXT; }

// at: mask, result, predicate or -1, value, lane or distance, bounds
template <class Source>
Outcome shuffle(Warp& w, const Instruction& I, u32 lanes, Source source) {
    u32 values[32];
    std::memcpy(values, w.r + I.at[3], sizeof values);
    u32 inside = 0;
    EACH(lanes, {
        const u32 distance = get<u32>(w.r, I.at[4], l), bounds = get<u32>(w.r, I.at[5], l);
        const int segment = bounds >> 8 & 31, first = l & segment, last = first | (bounds & 31 & ~segment);
        int from = source(l, int(distance & 31), first, last, segment);
        const bool valid = from >= 0;
        if (!valid) from = l;
        if (!(lanes >> from & 1)) throw Fault(text("a shuffle reads lane %d, which takes no part in it", from));
        inside |= u32(valid) << l;
        w.r[I.at[1] + l] = values[from];
    })
    if (I.at[2] >= 0) w.r[I.at[2]] = (w.r[I.at[2]] & ~lanes) | inside;
    return Outcome::NEXT;
}

Outcome shuffle_butterfly(Warp& w, const Instruction& I, u32 lanes) {
    return shuffle(w, I, lanes,
                   [](int l, int distance, int, int last, int) { return (l ^ distance) <= last ? l ^ distance : -1; });
}
Outcome shuffle_index(Warp& w, const Instruction& I, u32 lanes) {
    return shuffle(w, I, lanes, [](int, int lane, int first, int last, int segment) {
        const int from = first | (lane & ~segment);
        return from <= last ? from : -1;
    });
}
Outcome shuffle_up(Warp& w, const Instruction& I, u32 lanes) {
    return shuffle(w, I, lanes, [](int l, int distance, int, int last, int) { return l - distance >= last ? l - distance : -1; });
}
Outcome shuffle_down(Warp& w, const Instruction& I, u32 lanes) {
    return shuffle(w, I, lanes, [](int l, int distance, int, int last, int) { return l + distance <= last ? l + distance : -1; });
}

// at: mask, result, value
template <class T, class Function>
Outcome reduce(Warp& w, const Instruction& I, u32 lanes, Function function) {
    T all = get<T>(w.r, I.at[2], __builtin_ctz(lanes));
    EACH(lanes & (lanes - 1), { all = function(all, get<T>(w.r, I.at[2], l)); })
    EACH(lanes, { set<T>(w.r, I.at[1], l, all); })
    return Outcome::NEXT;
}

// at: mask, result, predicate
Outcome ballot(Warp& w, const Instruction& I, u32 lanes) {
    const u32 votes = w.r[I.at[2]] & lanes;
    EACH(lanes, { w.r[I.at[1] + l] = votes; })
    return Outcome::NEXT;
}

// at: mask, result predicate, predicate
template <bool ANY>
Outcome vote(Warp& w, const Instruction& I, u32 lanes) {
    const u32 votes = w.r[I.at[2]] & lanes;
    const bool yes = ANY ? votes != 0 : votes == lanes;
    w.r[I.at[1]] = (w.r[I.at[1]] & ~lanes) | (yes ? lanes : 0);
    return Outcome::NEXT;
}

// at: mask, lane or -1, predicate
Outcome elect(Warp& w, const Instruction& I, u32 lanes) {
    const int chosen = __builtin_ctz(lanes);
    if (I.at[1] >= 0) {
        EACH(lanes, { w.r[I.at[1] + l] = chosen; })
    }
    w.r[I.at[2]] = (w.r[I.at[2]] & ~lanes) | 1u << chosen;
    return Outcome::NEXT;
}

// Time passes with every instruction, also of other warps.
Outcome read_clock(Warp& w, const Instruction& I, u32 lanes) {
    EACH(lanes, { w.r[I.at[0] + l] = u32(machine_of(w).executed); })
    return Outcome::NEXT;
}

}  // namespace

void add_barriers(Table& table) {
    table["mbarrier.init"] = {init};
    table["mbarrier.inval"] = {invalidate};
    table["mbarrier.arrive"] = {arrive};
    table["mbarrier.arrive.expect_tx"] = {expect};
    table["mbarrier.try_wait.parity"] = {phase_over<true>};
    table["mbarrier.test_wait.parity"] = {phase_over<false>};
    table["bar.sync"] = {sync_named, Kind::TOGETHER};
    table["bar.arrive"] = {arrive_at_named, Kind::TOGETHER};
    table["barrier.cluster.arrive"] = {cluster_arrive, Kind::TOGETHER};
    table["barrier.cluster.wait"] = {cluster_wait, Kind::TOGETHER};
    table["griddepcontrol.wait"] = {wait_for_previous_kernel};
    table["together"] = {nothing, Kind::TOGETHER};
    table["bar.warp.sync"] = {nothing, Kind::MEMBERS};
    table["shfl.sync.bfly"] = {shuffle_butterfly, Kind::MEMBERS};
    table["shfl.sync.idx"] = {shuffle_index, Kind::MEMBERS};
    table["shfl.sync.up"] = {shuffle_up, Kind::MEMBERS};
    table["shfl.sync.down"] = {shuffle_down, Kind::MEMBERS};
    table["redux.sync.max.u32"] = {[](Warp& w, const Instruction& I, u32 lanes) {
                                       return reduce<u32>(w, I, lanes, [](u32 a, u32 b) { return a > b ? a : b; });
                                   },
                                   Kind::MEMBERS};
    table["redux.sync.max.s32"] = {[](Warp& w, const Instruction& I, u32 lanes) {
                                       return reduce<i32>(w, I, lanes, [](i32 a, i32 b) { return a > b ? a : b; });
                                   },
                                   Kind::MEMBERS};
    table["redux.sync.min.u32"] = {[](Warp& w, const Instruction& I, u32 lanes) {
                                       return reduce<u32>(w, I, lanes, [](u32 a, u32 b) { return a < b ? a : b; });
                                   },
                                   Kind::MEMBERS};
    table["redux.sync.add.s32"] = {
        [](Warp& w, const Instruction& I, u32 lanes) { return reduce<u32>(w, I, lanes, [](u32 a, u32 b) { return a + b; }); },
        Kind::MEMBERS};
    table["redux.sync.or.b32"] = {
        [](Warp& w, const Instruction& I, u32 lanes) { return reduce<u32>(w, I, lanes, [](u32 a, u32 b) { return a | b; }); },
        Kind::MEMBERS};
    table["vote.sync.ballot.b32"] = {ballot, Kind::MEMBERS};
    table["vote.sync.any.pred"] = {vote<true>, Kind::MEMBERS};
    table["vote.sync.all.pred"] = {vote<false>, Kind::MEMBERS};
    table["clock"] = {read_clock};
    table["elect.sync"] = {elect, Kind::MEMBERS};
}

}  // namespace emulator
