// Runs a kernel: which warp and which of its lanes come next, what ends a launch, and the library's two functions.
#include <algorithm>
#include <charconv>
#include <string_view>
#include "machine.hpp"

namespace emulator {

void complete_cluster_barrier(Cluster& cluster);

namespace {

const Table& handlers() {
    static const Table table = [] {
        Table all;
        add_arithmetic(all), add_memory(all), add_matrices(all), add_barriers(all);
        return all;
    }();
    return table;
}

// What comes before the next `end`, which goes too. No streams: their locales are those of whichever libstdc++ the process
// loaded first, which need not be the one that this was compiled for.
std::string_view take(std::string_view& rest, char end) {
    const std::string_view taken = rest.substr(0, rest.find(end));
    rest.remove_prefix(std::min(taken.size() + 1, rest.size()));
    return taken;
}

template <class T>
T number(std::string_view& rest) {
    const std::string_view word = take(rest, ' ');
    T value = 0;
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
    if (error != std::errc() || end != word.data() + word.size()) throw Fault("cannot read the number " + std::string(word));
    return value;
}

// Lines of text: "words N", "constant AT 32|64|pred VALUE", "special AT NAME", "code NAME GUARD NEGATED OPERANDS...".
std::unique_ptr<Program> parse(std::string_view source) {
    auto program = std::make_unique<Program>();
    std::vector<size_t> first;  // operand of each instruction
    while (!source.empty()) {
        std::string_view line = take(source, '\n');
        const std::string_view kind = take(line, ' ');
        if (kind == "words") {
            program->words = number<int>(line);
            program->initial.assign(program->words, ALL);
        } else if (kind == "constant") {
            const int at = number<int>(line);
            const std::string_view width = take(line, ' ');
            const u64 value = number<u64>(line);
            for (int l = 0; l < 32; ++l) {
                if (width == "64") set<u64>(program->initial.data(), at, l, value);
                else if (width == "32") set<u32>(program->initial.data(), at, l, u32(value));
                else program->initial[at] = value ? ALL : 0;
            }
        } else if (kind == "special") {
            const int at = number<int>(line);
            program->specials.emplace_back(at, line);
        } else if (kind == "code") {
            const std::string name(take(line, ' '));
            const auto found = handlers().find(name);
            if (found == handlers().end()) throw Fault("unknown operation " + name);
            Instruction instruction;
            instruction.run = found->second.run, instruction.kind = found->second.kind;
            instruction.guard = number<i32>(line);
            instruction.negated = number<int>(line);
            first.push_back(program->operands.size());
            while (!line.empty()) program->operands.push_back(number<i32>(line));
            instruction.count = int(program->operands.size() - first.back());
            program->code.push_back(instruction);
        } else {
            throw Fault("cannot read " + std::string(kind));
        }
    }
    for (size_t i = 0; i < program->code.size(); ++i) program->code[i].at = program->operands.data() + first[i];
    return program;
}

void start_cluster(Machine& machine, u32 index) {
    auto cluster = std::make_unique<Cluster>();
    const Launch& launch = machine.launch;
    cluster->machine = &machine;
    const u32 warps = (launch.threads + 31) / 32;
    const auto nothing_yet = std::make_shared<const Clock>();
    for (u32 rank = 0; rank < launch.cluster; ++rank) {
        auto cta = std::make_unique<Cta>();
        cta->cluster = cluster.get(), cta->rank = rank, cta->index = index * launch.cluster + rank;
        cta->shared.assign(launch.shared_bytes, 0xff);
        if (launch.races) cta->shadow.cover(launch.shared_bytes);
        cta->warps_left = warps;
        cta->warps.resize(warps);
        for (u32 i = 0; i < warps; ++i) {
            Warp& w = cta->warps[i];
            w.cta = cta.get(), w.index = int(i);
            w.knowledge.warp = rank * warps + i;
            std::fill(w.knowledge.lanes, w.knowledge.lanes + 32, nothing_yet);
            w.alive = launch.threads - i * 32 >= 32 ? ALL : (1u << (launch.threads - i * 32)) - 1;
            w.registers = machine.program.initial;
            w.r = w.registers.data();
            w.groups.reserve(32);
            w.groups.push_back({0, w.alive});
            for (const auto& [at, name] : machine.program.specials)
                for (u32 l = 0; l < 32; ++l) {
                    u32 value = 0;
                    if (name == "tid.x") value = i * 32 + l;
                    else if (name == "ntid.x") value = launch.threads;
                    else if (name == "ctaid.x") value = cta->index;
                    else if (name == "nctaid.x") value = launch.grid;
                    else if (name == "laneid") value = l;
                    else if (name == "warpid") value = i;
                    else if (name == "cluster_ctarank") value = rank;
                    else if (name == "cluster_nctarank") value = launch.cluster;
                    else if (name == "clusterid.x") value = index;
                    else if (name == "nclusterid.x") value = launch.grid / launch.cluster;
                    else if (name == "lanemask_lt") value = (1u << l) - 1;
                    else if (name != "tid.y" && name != "tid.z" && name != "ctaid.y" && name != "ctaid.z")
                        throw Fault("unknown special register %" + name);
                    w.r[at + l] = value;
                }
        }
        cluster->ctas.push_back(std::move(cta));
    }
    cluster->warps_left = warps * launch.cluster;
    machine.clusters.push_back(std::move(cluster));
}

void end_warp(Warp& w) {
    for (int l = 0; l < 32; ++l)
        if (!w.copies[l].empty()) throw Fault("a thread ends before its cp.async have been waited for");
    if (!w.products.empty()) throw Fault("a warp ends before its wgmma have been waited for");
    Cta& cta = *w.cta;
    --cta.warps_left;
    --cta.cluster->warps_left;
    if (cta.warps_left == 0 && cta.in_flight)
        throw Fault(text("CTA %u ends while %d copies to its shared memory are on their way", cta.index, cta.in_flight));
    if (w.cluster_arrived && w.cluster_generation == cta.cluster->generation) --cta.cluster->arrived;
    complete_cluster_barrier(*cta.cluster);
}

// Groups that stand at the same instruction become one.
void join(Warp& w) {
    auto& groups = w.groups;
    for (size_t i = 0; i < groups.size(); ++i)
        for (size_t j = groups.size() - 1; j > i; --j)
            if (groups[i].pc == groups[j].pc && !groups[i].ticket && !groups[j].ticket) {
                groups[i].lanes |= groups[j].lanes;
                groups[i].tried = false;
                groups.erase(groups.begin() + i64(j));
            }
}

// The group to run: the hindmost, so that lanes which took a longer way catch up; or any.
Group* next_group(Machine& machine, Warp& w) {
    Group* best = nullptr;
    u32 seen = 0;
    for (Group& group : w.groups) {
        if (group.tried) continue;
        if (machine.order() == Order::RANDOM ? machine.random() % ++seen == 0 : !best || group.pc < best->pc) best = &group;
    }
    return best;
}

// Lets some lanes of a group run ahead of the others, as they may between two instructions that bring them together.
void split(Machine& machine, Warp& w) {
    Group& group = w.groups[machine.random() % w.groups.size()];
    const u32 ahead = group.lanes & u32(machine.random());
    if (group.ticket || !ahead || ahead == group.lanes) return;
    group.lanes &= ~ahead, group.tried = true;
    w.groups.push_back({group.pc, ahead});
}

// Runs a warp until its lanes wait, or `budget` instructions; whether it got anywhere.
bool turn(Machine& machine, Warp& w, u64 budget) {
    const Instruction* const code = machine.program.code.data();
    bool moved = false;
    machine.running = &w;
    w.spins = false;
    join(w);
    for (Group& group : w.groups) group.tried = false;
    if (machine.order() == Order::RANDOM && machine.random() % 8 == 0) split(machine, w);
    for (bool first = true; budget > 0; first = false) {
        if (!first) join(w);
        Group* group = next_group(machine, w);
        if (!group) break;
        w.current = group;
        u32 stop = ALL;  // where the nearest other group stands
        for (const Group& other : w.groups)
            if (other.pc > group->pc) stop = std::min(stop, other.pc);
        for (;;) {
            const u32 pc = group->pc, here = group->lanes;
            const Instruction& I = code[pc];
            machine.running_pc = pc;
            u32 lanes = here;
            if (I.guard >= 0) lanes &= I.negated ? ~w.r[I.guard] : w.r[I.guard];
            if (!lanes) {
                if (++group->pc == stop) break;
                continue;
            }
            ++machine.executed, --budget;
            if (I.kind == Kind::BRANCH) {
                moved = true;
                if (lanes == here) {
                    group->pc = I.at[0];
                } else {
                    group->lanes = here & ~lanes, ++group->pc;
                    w.groups.push_back({u32(I.at[0]), lanes});
                }
                break;
            }
            if (I.kind == Kind::EXIT) {
                moved = true;
                w.alive &= ~lanes;
                group->lanes &= ~lanes, ++group->pc;
                if (!group->lanes) w.groups.erase(w.groups.begin() + (group - w.groups.data()));
                if (!w.alive) {
                    end_warp(w);
                    return true;
                }
                break;
            }
            if (I.kind == Kind::TOGETHER || I.kind == Kind::MEMBERS) {
                const u32 needed = w.alive & (I.kind == Kind::MEMBERS ? w.r[I.at[0] + __builtin_ctz(lanes)] : ALL);
                if (lanes != here && (needed & ~lanes))
                    throw Fault("an instruction for the whole warp under a predicate that differs within it");
                if (needed & ~lanes) {
                    group->tried = true;
                    break;
                }
                if (lanes == w.alive) bring_together(w);
            }
            const Outcome outcome = I.run(w, I, lanes);
            if (outcome == Outcome::WAIT) {
                if (lanes != here) throw Fault("a wait under a predicate that differs within the warp");
                group->tried = true;
                break;
            }
            ++group->pc;
            if (outcome == Outcome::PAUSE) return !w.spins;
            moved = true;
            if (group->pc == stop || budget == 0) break;
        }
    }
    return moved;
}

std::string where(const Cta& cta, const Warp& w) {
    std::string message = text("\n  CTA %u warp %d:", cta.index, w.index);
    for (const Group& group : w.groups)
        message += text(" lanes %#x at <pc %u>%s", group.lanes, group.pc, group.ticket ? " (arrived)" : "");
    for (const auto& [address, barrier] : cta.counted)
        if (w.index == 0)
            message += text("\n    mbarrier %#x: phase %llu, %lld of %lld arrivals and %lld bytes to come", address,
                            (unsigned long long)barrier.phase, (long long)barrier.pending, (long long)barrier.expected,
                            (long long)barrier.bytes);
    return message;
}

[[noreturn]] void deadlock(Machine& machine) {
    machine.running = nullptr;
    std::string message = "nothing moves any more";
    for (const auto& cluster : machine.clusters)
        for (const auto& cta : cluster->ctas)
            for (const Warp& w : cta->warps)
                if (w.alive) message += where(*cta, w);
    throw Fault(message);
}

void run(Machine& machine) {
    const u32 count = machine.launch.grid / machine.launch.cluster;
    u32 started = 0, idle = 0;
    std::vector<Warp*> warps;
    while (started < count || !machine.clusters.empty()) {
        while (started < count && machine.clusters.size() < machine.launch.resident) start_cluster(machine, started++);
        warps.clear();
        for (const auto& cluster : machine.clusters)
            for (const auto& cta : cluster->ctas)
                for (Warp& w : cta->warps)
                    if (w.alive) warps.push_back(&w);
        if (machine.order() == Order::BACKWARD) std::reverse(warps.begin(), warps.end());
        if (machine.order() == Order::RANDOM) std::shuffle(warps.begin(), warps.end(), machine.random);
        bool moved = false;
        for (Warp* w : warps) {
            if (!w->alive) continue;
            const u64 budget = machine.order() == Order::RANDOM && machine.random() % 2 ? 1 + machine.random() % 64 : 1 << 20;
            moved |= turn(machine, *w, budget);
            if (machine.copies() == Copies::RANDOM)
                while (!machine.in_flight.empty() && machine.random() % 4 == 0) machine.deliver_one();
            if (machine.executed > machine.launch.limit)
                throw Fault(text("%llu instructions did not end the launch", (unsigned long long)machine.launch.limit));
        }
        auto& clusters = machine.clusters;
        const auto ended = [](const std::unique_ptr<Cluster>& cluster) { return cluster->warps_left == 0; };
        clusters.erase(std::remove_if(clusters.begin(), clusters.end(), ended), clusters.end());
        if (moved) {
            idle = 0;
        } else if (!machine.in_flight.empty()) {
            machine.deliver_one();
        } else if (++idle > 100) {
            deadlock(machine);
        }
    }
}

void copy_message(const std::string& message, char* to, size_t size) {
    const size_t length = std::min(message.size(), size - 1);
    std::memcpy(to, message.data(), length);
    to[length] = 0;
}

}  // namespace
}  // namespace emulator

extern "C" {

// A program from its text, or null with a message.
void* emulator_load(const char* source, char* message, size_t size) {
    try {
        return emulator::parse(source).release();
    } catch (const std::exception& error) {
        emulator::copy_message(error.what(), message, size);
        return nullptr;
    }
}

// Runs a launch; instructions executed, each for all lanes of a group, or -1 with a message.
long long emulator_run(void* program, const emulator::Launch* launch, const void* params, size_t param_bytes,
                       const unsigned long long* ranges, size_t count, char* message, size_t size) {
    using namespace emulator;
    Machine machine{*static_cast<Program*>(program),
                    *launch,
                    static_cast<const u8*>(params),
                    param_bytes,
                    {},
                    std::mt19937_64(launch->seed),
                    {},
                    {}};
    for (size_t i = 0; i < count; ++i) machine.ranges.push_back({ranges[3 * i], ranges[3 * i + 1], ranges[3 * i + 2] != 0});
    try {
        run(machine);
        return (long long)machine.executed;
    } catch (const std::exception& error) {
        std::string text_of = error.what();
        if (const Warp* w = machine.running)
            text_of = text("CTA %u, warp %d, <pc %u>: ", w->cta->index, w->index, machine.running_pc) + text_of;
        copy_message(text_of, message, size);
        return -1;
    }
}
}
