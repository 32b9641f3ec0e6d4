// Threads, blocks, launches, barriers, and how the lanes of a warp meet.

#include <algorithm>
#include <bit>
#include <cstdio>
#include <sstream>
#include <stdexcept>

#include "engine.h"

#if SIM_OWN_SWITCH
// Saves the registers that a call must keep on one stack, and takes them from the other.
asm(R"(
.text
.globl sim_switch
.hidden sim_switch
.type sim_switch, @function
sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sim_switch, .-sim_switch
)");
#endif

namespace sim {

Engine& engine() {
  static Engine* e = new Engine;  // never destroyed: fibers may be anywhere
  return *e;
}

namespace {

std::string at(const Where& where) {
  const char* file = std::strrchr(where.file_name(), '/');
  return std::string(file ? file + 1 : where.file_name()) + ":" + std::to_string(where.line());
}
std::string text(const Waiting& waits) { return std::string(waits.name) + " at " + at(waits.where); }
std::string text(Index3 i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

Thread* pick() {
  Engine& e = engine();
  int next = -1;
  do {
    switch (options().threads) {
      case Order::forward: next = e.ready.first(); break;
      case Order::reverse: next = e.ready.last(); break;
      case Order::random: next = e.ready.first_from(static_cast<int>(e.random() % e.threads.size())); break;
    }
  } while (next < 0 && finish_load());
  return next < 0 ? nullptr : &e.threads[static_cast<size_t>(next)];
}

void go_to(Thread& from, Thread& to) {
  if (&from == &to) return;
  self = &to;
  Fiber::switch_from_to(*from.fiber, *to.fiber);
}
void go_to_host(Thread& from) { Fiber::switch_from_to(*from.fiber, engine().host); }

// "threads 0-31 wait in ...": all that have not returned, by what they wait for.
std::string who_waits() {
  std::string lines;
  const auto& threads = engine().threads;
  for (size_t i = 0; i < threads.size();) {
    size_t end = i + 1;
    const auto same = [&](const Thread& t) {
      return t.done == threads[i].done && t.waits.name == threads[i].waits.name &&
             t.waits.where.line() == threads[i].waits.where.line();
    };
    while (end < threads.size() && same(threads[end])) ++end;
    lines += "\n  thread" + (end - i > 1 ? "s " + std::to_string(i) + "-" + std::to_string(end - 1)
                                         : " " + std::to_string(i));
    if (threads[i].done)
      lines += ": returned";
    else
      lines += threads[i].waits.name ? ": " + text(threads[i].waits) : ": running";
    i = end;
  }
  return lines;
}

[[noreturn]] void deadlock() {
  fault("deadlock: no thread can go on" + who_waits(), me().waits.where);
}

void complete(Warp& warp, int first_thread, size_t index) {
  const Meeting meeting = warp.meetings[index];
  warp.meetings.erase(warp.meetings.begin() + static_cast<std::ptrdiff_t>(index));
  if (meeting.exchange) meeting.exchange(warp.payload, meeting.here, meeting.waits.where);
  for (unsigned lanes = meeting.here; lanes; lanes &= lanes - 1)
    engine().ready.add(first_thread + std::countr_zero(lanes));
}

void finish(Thread& thread) {
  const Unwatched unwatched;
  Engine& e = engine();
  happens_before(&e.end);
  thread.done = true;
  --e.living;
  e.ready.remove(thread.index);
  const Barrier& all = e.barriers[0];
  if (all.arrived)
    fault("divergence: it returns while thread " + std::to_string(all.first_thread) + " waits in " + text(all.first) +
              " for all threads of the block",
          all.first.where);
  Warp& warp = e.warps[thread.warp()];
  warp.done |= 1u << thread.lane();
  for (size_t i = 0; i < warp.meetings.size(); ++i) {
    const Meeting& meeting = warp.meetings[i];
    if ((meeting.mask & ~warp.done) == meeting.here) {
      complete(warp, thread.warp() * 32, i);
      break;
    }
  }
  if (e.living == 0) {
    end_block_of_hopper();
    return go_to_host(thread);
  }
  Thread* next = pick();
  if (!next) deadlock();
  go_to(thread, *next);
}

void fiber_main() {
  Thread* thread = &me();
  thread->fiber->arrived();
  for (;;) {
    happens_after(&engine().start);
    (*engine().body)();
    finish(*thread);
    thread = &me();  // of the next block; on another fiber than before, maybe
  }
}

void start_block(Index3 block, Index3 grid, Index3 dim, int64_t number, size_t dynamic_shared) {
  const Unwatched unwatched;
  Engine& e = engine();
  const int n = static_cast<int>(e.threads.size());
  e.living = n;
  e.ready = {};
  e.idle_yields = 0;
  for (Warp& warp : e.warps) {
    warp.lanes = warp.done = 0;
    warp.meetings.clear();
  }
  for (Barrier& barrier : e.barriers) {
    barrier.expected = barrier.arrived = barrier.trues = 0;
    barrier.waiting = {};
  }
  for (int i = 0; i < n; ++i) {
    Thread& thread = e.threads[static_cast<size_t>(i)];
    const unsigned u = static_cast<unsigned>(i);
    thread.thread_index = {u % dim.x, u / dim.x % dim.y, u / dim.x / dim.y};
    thread.block_index = block;
    thread.block_dim = dim;
    thread.grid_dim = grid;
    thread.index = i;
    thread.done = false;
    thread.waits = {};
    thread.copies.clear();
    thread.groups.clear();
    // A thread of one block and the same of another are on different fibers, or ThreadSanitizer would see an order.
    thread.fiber = e.fibers[static_cast<size_t>((i + number * 37) % n)].get();
    e.ready.add(i);
    e.warps[i / 32].lanes |= 1u << (i % 32);
  }
  if (number % kArenas == 0) {
    happens_after(&e.end);
    happens_before(&e.start);
  }
  e.arena = e.arenas + static_cast<size_t>(number % kArenas) * (kMaxShared + 64 * kGap);
  poison_arena();
  begin_block_of_hopper();
  if (dynamic_shared) allocate(nullptr, dynamic_shared, 1024, "(dynamic)");
}

Options options_of_environment() {
  Options o;
  const char* value = std::getenv("FASTFORMER_SIM");
  std::istringstream words(value ? value : "");
  for (std::string word; std::getline(words, word, ',');) {
    const size_t equal = word.find('=');
    const std::string name = word.substr(0, equal);
    if (equal != std::string::npos) o.seed = std::stoull(word.substr(equal + 1));
    if (name == "forward") o.threads = o.blocks = Order::forward;
    else if (name == "reverse") o.threads = o.blocks = Order::reverse;
    else if (name == "random") o.threads = o.blocks = Order::random;
    else if (name == "eager") o.lazy_copies = false;
    else if (name == "lazy") o.lazy_copies = true;
    else if (name == "conflicts") o.count_conflicts = true;
    else if (name == "hopper") o.hopper = true;
    else throw std::runtime_error("FASTFORMER_SIM: got '" + word +
                                  "', expected some of forward, reverse, random=SEED, eager, lazy, conflicts, hopper");
  }
  return o;
}

}  // namespace

Self* self = nullptr;

void wait(Waiting waits) {
  Engine& e = engine();
  Thread& thread = me();
  thread.waits = waits;
  e.ready.remove(thread.index);
  Thread* next = pick();
  if (!next) deadlock();
  go_to(thread, *next);
  thread.waits = {};
  e.idle_yields = 0;
}

Options& options() {
  static Options o = options_of_environment();
  return o;
}

std::vector<Launch>& launches() {
  static auto* all = new std::vector<Launch>;
  return *all;
}

void fault(const std::string& what, Where where) {
  Engine& e = engine();
  Thread& thread = me();
  e.error = e.launch->kernel + ": block " + text(thread.block_index) + ", thread " + text(thread.thread_index) + ", " +
            (where.line() ? at(where) + ": " : "") + what;
  go_to_host(thread);
  std::abort();  // nobody comes back
}

void launch(const std::string& kernel, Index3 grid, Index3 block, size_t dynamic_shared,
            const std::function<void()>& thread) {
  Engine& e = engine();
  const std::lock_guard lock(e.mutex);
  const int64_t n = int64_t(block.x) * block.y * block.z, blocks = int64_t(grid.x) * grid.y * grid.z;
  if (n < 1 || n > kMaxThreads || block.z > 64)
    throw std::runtime_error(kernel + ": a block of " + text(block) + " threads: it has 1 to 1024");
  if (blocks < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(kernel + ": a grid of " + text(grid) + " blocks");
  if (dynamic_shared > kMaxShared) throw std::runtime_error(kernel + ": " + too_much_shared(dynamic_shared));
  if (!e.arenas) {
    e.arenas = static_cast<unsigned char*>(mmap(nullptr, kArenas * (kMaxShared + 64 * kGap), PROT_READ | PROT_WRITE,
                                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (e.arenas == MAP_FAILED) throw std::runtime_error("no memory for the shared memory of the blocks");
    e.arena = e.arenas;
  }
  if (launches().size() >= 10000) launches().clear();
  launches().push_back({.kernel = kernel, .grid = grid, .block = block});
  e.launch = &launches().back();
  e.body = &thread;
  e.error.clear();
  e.random.seed(options().seed);
  while (static_cast<int64_t>(e.fibers.size()) < n) e.fibers.push_back(std::make_unique<Fiber>(kStack, fiber_main));
  e.threads.assign(static_cast<size_t>(n), {});

  std::vector<int64_t> order;
  if (options().blocks == Order::random) {
    order.resize(static_cast<size_t>(blocks));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    std::shuffle(order.begin(), order.end(), e.random);
  }
  for (int64_t number = 0; number < blocks && e.error.empty(); ++number) {
    const int64_t b = options().blocks == Order::forward   ? number
                      : options().blocks == Order::reverse ? blocks - 1 - number
                                                           : order[static_cast<size_t>(number)];
    const Index3 index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                          static_cast<unsigned>(b / grid.x / grid.y)};
    start_block(index, grid, block, number, dynamic_shared);
    Thread* first = pick();
    self = first;
    Fiber::switch_from_to(e.host, *first->fiber);
    count_noted_accesses();
  }
  happens_after(&e.end);
  if (!e.error.empty()) {
    for (auto& fiber : e.fibers) fiber->restart();
    throw std::runtime_error(e.error);
  }
}

int barrier(int id, int count, bool predicate, const char* name, Where where) {
  const Unwatched unwatched;
  Engine& e = engine();
  Thread& thread = me();
  if (id < 0 || id >= kBarriers) fault("barrier " + std::to_string(id) + ": there are 0 to 15", where);
  const bool all = id == 0 && count == static_cast<int>(e.threads.size());
  Barrier& b = e.barriers[id];
  if (all && e.living < count)
    fault("divergence: it comes to " + std::string(name) + ", but other threads of the block have returned" +
              who_waits(), where);
  if (b.arrived && b.expected != count)
    fault("barrier " + std::to_string(id) + " of " + std::to_string(count) + " threads, thread " +
              std::to_string(b.first_thread) + " waits for " + std::to_string(b.expected) + " in " + text(b.first),
          where);
  if (all && b.arrived && b.first.where.line() != where.line())
    fault("divergence: it comes to " + std::string(name) + ", thread " + std::to_string(b.first_thread) +
              " waits for it in " + text(b.first), where);
  if (!b.arrived) {
    b.expected = count;
    b.first = {name, where};
    b.first_thread = thread.index;
  }
  char* order = &b.order[b.generation & 1];
  happens_before(order);
  b.trues += predicate;
  if (++b.arrived == count) {
    b.result = b.trues;
    b.arrived = b.trues = 0;
    ++b.generation;
    e.ready.add(b.waiting);
    b.waiting = {};
    happens_after(order);
    return b.result;
  }
  b.waiting.add(thread.index);
  wait({name, where});
  happens_after(order);
  return b.result;
}

void barrier_arrive(int id, int count, Where where) {
  const Unwatched unwatched;
  Engine& e = engine();
  if (id < 0 || id >= kBarriers) fault("barrier " + std::to_string(id) + ": there are 0 to 15", where);
  Barrier& b = e.barriers[id];
  if (b.arrived && b.expected != count)
    fault("barrier " + std::to_string(id) + " of " + std::to_string(count) + " threads, others wait for " +
              std::to_string(b.expected), where);
  if (!b.arrived) {
    b.expected = count;
    b.first = {"bar.arrive", where};
    b.first_thread = me().index;
  }
  happens_before(&b.order[b.generation & 1]);
  if (++b.arrived == count) {
    b.result = b.trues;
    b.arrived = b.trues = 0;
    ++b.generation;
    e.ready.add(b.waiting);
    b.waiting = {};
  }
}

int meet(const char* name, unsigned mask, void* payload, Exchange exchange, Where where) {
  const Unwatched unwatched;
  Thread& thread = me();
  Warp& warp = engine().warps[thread.warp()];
  const unsigned bit = 1u << thread.lane();
  if (!(mask & bit)) fault(std::string(name) + ": its lane is not in the mask", where);
  mask &= warp.lanes;
  size_t index = warp.meetings.size();
  for (size_t i = 0; i < warp.meetings.size(); ++i) {
    const Meeting& m = warp.meetings[i];
    if (!(m.mask & bit)) continue;
    if (m.mask != mask || m.waits.where.line() != where.line() || std::strcmp(m.waits.name, name) != 0) {
      const int other = thread.warp() * 32 + std::countr_zero(m.here);
      fault("divergence: it comes to " + std::string(name) + ", thread " + std::to_string(other) +
                " waits for it in " + text(m.waits), where);
    }
    index = i;
  }
  if (index == warp.meetings.size()) warp.meetings.push_back({mask, 0, {name, where}, exchange, warp.orders++ & 1});
  Meeting& meeting = warp.meetings[index];
  const int order = meeting.order;
  if (!exchange) happens_before(&warp.order[order]);
  meeting.here |= bit;
  warp.payload[thread.lane()] = payload;
  if ((mask & ~warp.done) == meeting.here)
    complete(warp, thread.warp() * 32, index);
  else
    wait({name, where});
  return order;
}

void collective(const char* name, unsigned mask, void* payload, Exchange exchange, Where where) {
  meet(name, mask, payload, exchange, where);
}

void sync_warp(unsigned mask, Where where) {
  const int order = meet("__syncwarp", mask, nullptr, nullptr, where);
  happens_after(&engine().warps[me().warp()].order[order]);
}

unsigned active_mask() { return 1u << me().lane(); }  // the hardware promises no more

void yield() {
  Engine& e = engine();
  Thread& thread = me();
  if (++e.idle_yields > 100000) fault("deadlock: every thread that could run spins" + who_waits(), {});
  const int next = e.ready.first_from((thread.index + 1) % static_cast<int>(e.threads.size()));  // each in its turn
  go_to(thread, e.threads[static_cast<size_t>(next)]);
}

}  // namespace sim
