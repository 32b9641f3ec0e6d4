// What attention is called with, forward and backward, padded and packed.
//
// A tensor is addressed as (sequence, head, row, column): padded (B, H, S, D) as it is, packed (T, H, D) with sequences
// of stride 0 whose first rows are in cu_seq. A query sees the keys of a band of diagonals: lowest <= key - query <=
// highest. Causality (aligned to the top left), a window (to the bottom right) and both together are such a band.
#pragma once

#include "launch.h"
#include "philox.h"

namespace fastformer::attention {

constexpr int kFar = 1 << 30;  // diagonals away: more than any sequence has
constexpr int kMaxHeadSize = 256;

struct Input {
  const void* data;
  int64_t stride_sequence, stride_head, stride_row, stride_column;
  bool aligned;  // can its rows be read 16 bytes at a time?
};
struct Output {
  void* data;
  int64_t stride_sequence, stride_head, stride_row;
  bool aligned;
};
struct Statistics {  // a float for each row
  float* data;
  int64_t stride_sequence, stride_head;
};
struct Mask {
  const void* data = nullptr;  // bool, or float32 that is added to the scores
  bool is_bool = false;
  int64_t stride_sequence = 0, stride_head = 0, stride_row = 0, stride_column = 0;
};
struct Sequences {
  const int32_t* bounds = nullptr;  // null: each has all `total` rows
  int64_t stride = 0;
  int total;
};

struct Args {
  int sequences, heads, kv_heads, head_dim, value_dim;
  int max_queries, max_keys;  // of a sequence
  Sequences queries, keys;
  Input query, key, value;
  Mask mask;
  int window_left, window_right, causal_right;  // kFar: no limit
  float scale;
  Dropout dropout;
};

struct ForwardArgs : Args {
  int stack;             // heads of a group whose rows share a tile: all where queries are few, or 1
  int tiles;             // of rows, in a sequence
  int parts, part_keys;  // the keys are split between so many blocks, which then write float32 outputs
  int64_t part_stride_output, part_stride_lse;
  Output output;
  Statistics lse;
};

struct BackwardArgs : Args {
  int tiles;
  Input grad_output;
  Statistics lse, delta;
  Output grad_query, grad_key, grad_value;
};

struct CombineArgs {
  int64_t count;                        // rows of all heads
  int parts, heads, rows, value_dim;    // rows: of a sequence, or of all of them where packed
  const float *part_output, *part_lse;  // (parts, ...), laid out as output and lse are
  int64_t part_stride_output, part_stride_lse;
  Output output;
  Statistics lse;
};
constexpr int kMostParts = 32;

struct DeltaArgs {
  int64_t count;  // rows of all heads
  int heads, rows, value_dim;
  Input grad_output, output;
  Statistics delta;
};

// The launches, for each type compiled in a file of its own. They fill in `tiles`.
template <class T> void forward(const OnDeviceOf& device, ForwardArgs args);
template <class T> void forward_hopper(const OnDeviceOf& device, ForwardArgs args);  // of what hopper_takes
template <class T> void combine(const OnDeviceOf& device, const CombineArgs& args);
template <class T> void backward(const OnDeviceOf& device, const DeltaArgs& delta, BackwardArgs args);

}  // namespace fastformer::attention
