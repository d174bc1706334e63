// Whether accesses to shared memory are ordered by what the kernel says, and not only by the turns that a run takes.
//
// Each thread has a clock, and knows up to which time of theirs it has been told what others did: at barriers, and by the
// other lanes of its warp at any instruction for all of them. Two accesses to a word, one of them a write, of which the
// later one's thread does not know the earlier one, are a race. The copies of a warp count as one more thread of it, whose
// times barriers tell that count their bytes. (Vector clocks: Mattern 1989, as in FastTrack, Flanagan and Freund 2009.)
#pragma once
#include <memory>
#include <vector>
#include "words.hpp"

namespace emulator {

struct Warp;
struct Cta;

using Clock = std::vector<u32>;  // of the threads of a cluster, THREADS of each warp
constexpr u32 ENGINE = 32, THREADS = 33;

struct Access {
    u32 warp = 0, time = 0, pc = 0, lanes = 0;  // time 0: none; lanes 0: a copy of the warp
    bool operator==(const Access& other) const { return warp == other.warp && time == other.time && lanes == other.lanes; }
};
struct Accesses {  // since which none is of interest: the last write of a word, and the reads behind it
    Access write;
    u32 reads = 0;
};
struct Read {
    Access access;
    u32 next = 0;
};
struct Shadow {  // of a CTA's shared memory; reads are lists in one array, by 1 + index
    std::vector<Accesses> words;
    std::vector<u8> alike;  // of each four words whether the first stands for all of them
    std::vector<Read> reads;
    u32 unused = 0;
    void cover(u32 bytes) { alike.assign((bytes + 15) / 16, 1), words.resize(alike.size() * 4); }
};

// What a barrier is told, and what it tells.
struct Told {
    Clock arriving, passed;
    void pass();
};

struct Knowledge {  // of a warp's lanes
    u32 warp = 0, time = 1, together = 0, copies = 0;
    std::shared_ptr<const Clock> lanes[32];
    Access known[32];  // the last write that a lane was found to know: what it has been told once, it knows
};

void observe(Warp& w, int lane, Cta& owner, u32 at, u32 bytes, bool write);
// A copy by the engine that a lane asks for; its time.
u32 observe_copy(Warp& w, int lane, Cta& owner, u32 at, u32 bytes);
void bring_together(Warp& w);
void tell(Warp& w, u32 lanes, Told& barrier);
void tell_copy(u32 warp, u32 time, Told& barrier);
void learn(Warp& w, u32 lanes, const Told& barrier);

}  // namespace emulator
