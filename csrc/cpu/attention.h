// Attention: which thread does what.
#pragma once

#include "phases.h"

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

// The forward, as phases.
class AttentionForward {
 public:
  AttentionForward(const AttentionArgs& args, int64_t threads)
      : args_(args), parts_(parts_of(args)), tasks_(tasks_of(args, threads)) {}

  // of memory that the threads share
  int64_t bytes() const { return parts_ == 1 ? 0 : parts_ * rows() * (args_.value_dim + 1) * compute(); }

  void add_to(Phases& phases, char* memory) const {
    const int64_t scratch_bytes = kernels().attention_scratch_bytes(args_);
    const auto run = [tasks = tasks_, scratch_bytes](const AttentionArgs& args, int64_t task) {
      tasks.run(task, [&](int64_t begin, int64_t end, int64_t split) {
        kernels().attention(args, begin, end, split, tasks.splits, scratch(scratch_bytes));
      });
    };
    if (parts_ == 1) return phases.add(tasks_.count, scratch_bytes, [=, args = args_](int64_t task) { run(args, task); });

    char* lses = memory + parts_ * rows() * args_.value_dim * compute();
    phases.add(parts_ * tasks_.count, scratch_bytes, [=, self = *this](int64_t task) {
      run(self.part(task / self.tasks_.count, memory, lses), task % self.tasks_.count);
    });
    const AttentionMergeArgs merge = {args_, parts_, memory, lses};
    constexpr int64_t kRows = 16;  // of a task
    phases.add((rows() + kRows - 1) / kRows, 0, [=, rows = rows()](int64_t task) {
      kernels().attention_merge(merge, task * kRows, std::min(rows, (task + 1) * kRows));
    });
  }

 private:
  static constexpr int64_t kKeys = 512;  // of a part

  // One query of many keys waits for their memory, and its heads may be few. Whatever the threads and the batch are, so that
  // they don't change the result.
  static int64_t parts_of(const AttentionArgs& a) {
    const bool sees_all = !a.is_causal && a.window_left < 0 && !a.cu_seq_k && !a.dropout.threshold;
    return a.queries == 1 && sees_all && a.value_dim > 0 ? std::max<int64_t>(1, (a.keys + kKeys - 1) / kKeys) : 1;
  }
  static PairTasks tasks_of(const AttentionArgs& a, int64_t threads) {
    const int64_t pairs = a.sequences * a.kv_heads;
    threads = threads_for(a, threads);
    const bool whole = threads == 1 || pairs >= 4 * threads || pairs % threads == 0;
    return {pairs, whole ? 1 : shares(pairs, threads, a.heads / a.kv_heads * a.queries), threads};
  }
  int64_t rows() const { return args_.sequences * args_.heads; }
  int64_t compute() const { return compute_bytes(args_.dtype); }

  AttentionArgs part(int64_t index, char* outputs, char* lses) const {
    AttentionArgs a = args_;
    const int64_t first = index * kKeys;
    const auto skip = [&](const void* data, int64_t elements, int64_t bytes) -> const void* {
      return data ? static_cast<const char*>(data) + first * elements * bytes : nullptr;
    };
    a.keys = std::min(kKeys, args_.keys - first);
    a.key.data = skip(a.key.data, a.key.row, element_bytes(a.dtype));
    a.value.data = skip(a.value.data, a.value.row, element_bytes(a.dtype));
    a.mask.data = skip(a.mask.data, a.mask.key, a.mask.is_bool ? 1 : compute());
    a.output = {outputs + index * rows() * a.value_dim * compute(), a.heads * a.value_dim, a.value_dim, a.value_dim};
    a.lse = {lses + index * rows() * compute(), a.heads, 1, 1};
    a.output_is_compute_type = true;
    return a;
  }

  AttentionArgs args_;
  int64_t parts_;
  PairTasks tasks_;
};

}  // namespace fastformer
