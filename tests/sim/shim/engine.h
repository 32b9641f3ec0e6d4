// The inside of the simulator: what its parts (sim.cpp, warp.cpp, memory.cpp) share.
#pragma once

#include <array>
#include <bit>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "fiber.h"
#include "sim.h"

namespace sim {

constexpr int kMaxThreads = 1024, kWarps = kMaxThreads / 32, kBarriers = 16;
constexpr size_t kMaxShared = 227 * 1024;  // of a block, on sm_90
constexpr size_t kGap = 128;               // between shared arrays; AddressSanitizer reports accesses to it
#if defined(SIM_ASAN) || defined(SIM_TSAN)
constexpr size_t kStack = 256 * 1024;
#else
constexpr size_t kStack = 64 * 1024;
#endif
#ifdef SIM_TSAN
constexpr int64_t kArenas = 64;  // blocks that run without an order between them: races between blocks are seen, too
#else
constexpr int64_t kArenas = 1;
#endif

// Threads of a block.
struct ThreadSet {
  uint64_t words[kMaxThreads / 64] = {};

  void add(int i) { words[i / 64] |= uint64_t(1) << i % 64; }
  void remove(int i) { words[i / 64] &= ~(uint64_t(1) << i % 64); }
  void add(const ThreadSet& other) {
    for (int w = 0; w < kMaxThreads / 64; ++w) words[w] |= other.words[w];
  }
  int first() const {
    for (int w = 0; w < kMaxThreads / 64; ++w)
      if (words[w]) return w * 64 + std::countr_zero(words[w]);
    return -1;
  }
  int last() const {
    for (int w = kMaxThreads / 64; w-- > 0;)
      if (words[w]) return w * 64 + 63 - std::countl_zero(words[w]);
    return -1;
  }
  int first_from(int i) const {  // or from the beginning
    const uint64_t rest = words[i / 64] >> i % 64;
    if (rest) return i + std::countr_zero(rest);
    for (int w = i / 64 + 1; w < kMaxThreads / 64; ++w)
      if (words[w]) return w * 64 + std::countr_zero(words[w]);
    return first();
  }
};

struct Waiting {  // where a thread waits, for messages
  const char* name = nullptr;
  Where where;
};

struct Thread : Self {
  Fiber* fiber = nullptr;
  bool done = false;
  Waiting waits;
  std::vector<Copy> copies;          // cp.async that are not complete yet
  std::vector<size_t> groups;        // ends of the committed groups in copies
};

struct Barrier {
  int expected = 0, arrived = 0, trues = 0, result = 0;
  unsigned generation = 0;
  ThreadSet waiting;
  Waiting first;
  int first_thread = 0;
  char order[2];  // for happens_before, by turns: nobody can be two generations ahead
};

// Lanes of a warp that wait for each other.
struct Meeting {
  unsigned mask = 0, here = 0;
  Waiting waits;
  Exchange exchange = nullptr;
  int order = 0;
};

struct Warp {
  unsigned lanes = 0, done = 0;  // that exist, that have returned
  void* payload[32];
  std::vector<Meeting> meetings;
  int orders = 0;
  char order[2];
};

struct SharedArray {
  const void* tag;
  unsigned char* begin;
  size_t bytes;
  const char* name;
};

struct Engine {
  std::recursive_mutex mutex;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber host;
  const std::function<void()>* body = nullptr;
  Launch* launch = nullptr;

  std::vector<Thread> threads;
  int living = 0;
  ThreadSet ready;
  Warp warps[kWarps];
  Barrier barriers[kBarriers];
  int idle_yields = 0;

  unsigned char* arenas = nullptr;
  unsigned char* arena = nullptr;  // of this block
  size_t used = 0;
  std::vector<SharedArray> arrays;
  // load_shared and store_shared by warp, place in the source and how often each lane came there.
  struct Access {
    uintptr_t address[32];
    size_t bytes;
    unsigned lanes;
  };
  std::map<std::tuple<int, const char*, unsigned, unsigned>, std::deque<Access>> accesses;
  std::map<std::tuple<int, const char*, unsigned, unsigned>, std::array<unsigned, 32>> visits;

  std::mt19937_64 random;
  std::string error;
  char start, end;  // of the threads, for happens_before
};

Engine& engine();
inline Thread& me() { return static_cast<Thread&>(*self); }

// Waits for the lanes of the mask, as collective does; `exchange` null: orders memory. Returns which of warp.order did.
int meet(const char* name, unsigned mask, void* payload, Exchange exchange, Where where);

// Until someone sets the calling thread ready.
void wait(Waiting waits);

// memory.cpp
void poison_arena();
void* allocate(const void* tag, size_t bytes, size_t alignment, const char* name);
std::string too_much_shared(size_t bytes);
void count_wavefronts(const uintptr_t* address, unsigned lanes, size_t bytes);
void count_noted_accesses();  // of load_shared and store_shared in this block

// hopper.cpp
void begin_block_of_hopper();
void end_block_of_hopper();  // nothing may be under way
bool finish_load();          // one of those under way; false: there is none
void check_under_way(const void* pointer, size_t bytes, bool writes, const char* what, Where where);

}  // namespace sim
