// Attention: which thread does what.
#pragma once

#include "common.h"

namespace fastformer {

// Threads that the work is worth: at least some 20 microseconds for each. A few queries wait for the keys' memory.
inline int64_t threads_for(const AttentionArgs& a, int64_t threads) {
  const double products = double(a.sequences) * a.heads * a.queries * a.keys * (a.head_dim + a.value_dim);
  return std::clamp<int64_t>(int64_t(products / (a.queries < 8 ? 1e5 : 1e6)), 1, threads);
}

// Into how many shares a pair is split where the pairs alone don't keep the threads busy.
inline int64_t shares(int64_t pairs, int64_t threads, int64_t rows) {
  constexpr int64_t kRows = 48;  // a smaller share isn't worth packing the keys once more
  return std::clamp<int64_t>((4 * threads + pairs - 1) / pairs, 1, rows / kRows + 1);
}

// Tasks of several (sequence, kv head) pairs each, or of one share of one pair.
struct PairTasks {
  int64_t pairs, splits, each, count;

  PairTasks(int64_t pairs, int64_t splits, int64_t threads)
      : pairs(pairs), splits(splits), each(std::max<int64_t>(1, threads == 1 ? pairs : pairs / (4 * threads))),
        count((pairs + each - 1) / each * splits) {}

  // f(begin, end, split)
  template <class F> void run(int64_t task, const F& f) const {
    const int64_t begin = task / splits * each;
    f(begin, std::min(pairs, begin + each), task % splits);
  }
};

// The forward.
class AttentionTasks {
 public:
  AttentionTasks(const AttentionArgs& args, int64_t threads) : args_(args), tasks_(tasks_of(args, threads)) {}

  int64_t count() const { return tasks_.count; }
  int64_t bytes() const { return kernels().attention_scratch_bytes(args_); }
  void operator()(int64_t task) const {
    tasks_.run(task, [&](int64_t begin, int64_t end, int64_t split) {
      kernels().attention(args_, begin, end, split, tasks_.splits, scratch(bytes()));
    });
  }

 private:
  static PairTasks tasks_of(const AttentionArgs& a, int64_t threads) {
    const int64_t pairs = a.sequences * a.kv_heads;
    threads = threads_for(a, threads);
    const bool whole = threads == 1 || pairs >= 4 * threads || pairs % threads == 0;
    return {pairs, whole ? 1 : shares(pairs, threads, a.heads / a.kv_heads * a.queries), threads};
  }

  AttentionArgs args_;
  PairTasks tasks_;
};

}  // namespace fastformer
