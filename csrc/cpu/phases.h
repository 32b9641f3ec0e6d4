// Work in phases, each of independent tasks, in one parallel region.
#pragma once

#include <functional>
#include <thread>

#include "common.h"

namespace fastformer {

// A phase begins when the one before is done. Threads take task after task, in order, and wait for what is not done yet:
// whoever takes a task runs it, so however many threads there are, even one, the work comes to its end.
class Phases {
 public:
  explicit Phases(int64_t threads) : threads_(threads) {}
  int64_t threads() const { return threads_; }

  // f(task) for each task, in `bytes` of the thread's scratch memory at most
  void add(int64_t tasks, int64_t bytes, std::function<void(int64_t)> f) {
    if (tasks <= 0) return;
    phases_.push_back({tasks_, std::move(f)});
    tasks_ += tasks;
    most_tasks_ = std::max(most_tasks_, tasks);
    bytes_ = std::max(bytes_, bytes);
  }

  // f(begin, end) over rows, in 8 tasks for each thread, but of some 4K to 16K elements.
  template <class F> void add_rows(int64_t rows, int64_t columns, F f) {
    columns = std::max<int64_t>(columns, 1);
    const int64_t each = std::max<int64_t>(1, std::clamp(rows / (8 * threads_), 4096 / columns, 16384 / columns));
    add((rows + each - 1) / each, 0, [=](int64_t task) { f(task * each, std::min(rows, (task + 1) * each)); });
  }

  void run() const {
    const int64_t threads = std::min<int64_t>(most_tasks_, threads_);
    std::atomic<int64_t> next{0}, done{0};
    const auto work = [&] {
      scratch(bytes_);  // what can fail does so before a task is taken that others wait for
      size_t phase = 0;
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks_;) {
        while (phase + 1 < phases_.size() && task >= phases_[phase + 1].first) ++phase;
        for (int64_t spins = 0; done.load(std::memory_order_acquire) < phases_[phase].first; ++spins) wait(spins);
        phases_[phase].f(task - phases_[phase].first);
        done.fetch_add(1, std::memory_order_release);
      }
    };
    if (threads <= 1) return work();
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(); });
  }

 private:
  struct Phase {
    int64_t first;  // task
    std::function<void(int64_t)> f;
  };

  // For a while at full speed: a phase takes microseconds. Then others may have the core.
  static void wait(int64_t spins) {
    if (spins >= 4096) return std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  std::vector<Phase> phases_;
  int64_t threads_, tasks_ = 0, most_tasks_ = 0, bytes_ = 0;
};

}  // namespace fastformer
