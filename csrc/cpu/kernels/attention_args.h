// Arguments of the attention kernels.
#pragma once

#include <stdint.h>

namespace fastformer {

// (sequences, heads, rows, columns) with strides in elements; the columns are adjacent. Where the sequences are packed
// one after the other (cu_seq_*), the stride of a sequence is 0 and its first row is cu_seq[sequence].
template <class Data> struct AttentionTensor {
  Data* data;
  int64_t sequence, head, row;
};
using AttentionInput = AttentionTensor<const void>;
using AttentionOutput = AttentionTensor<void>;

// (sequences, heads, queries, keys) with strides in elements, 0 where it broadcasts.
struct AttentionMask {
  const void* data;  // bool bytes, true = keep, or the compute type, added to the scores; null = no mask
  bool is_bool;
  int64_t sequence, head, query, key;
};

// output = dropout(softmax(scale query key^T + mask)) value. Query head h uses kv head h / (heads / kv_heads).
struct AttentionArgs {
  DType dtype;
  int64_t sequences, heads, kv_heads, head_dim, value_dim;
  int64_t queries, keys;               // of each sequence; of the longest where cu_seq_* are given
  const int32_t *cu_seq_q, *cu_seq_k;  // (sequences + 1), or null
  AttentionInput query, key, value;
  AttentionMask mask;
  bool is_causal;                      // query i sees keys j <= i
  int64_t window_left, window_right;   // and keys i + shift - left <= j <= i + shift + right, shift = keys - queries
  Dropout dropout;
  double scale;
  AttentionOutput output, lse;         // lse: compute type, one column
  bool output_is_compute_type = false;
};

// One query of each sequence and head, whose keys were cut into parts: a row of output and lse is merged from its rows in
// each part, compute type, (parts, sequences * heads, value_dim) and (parts, sequences * heads).
struct AttentionMergeArgs {
  AttentionArgs whole;
  int64_t parts;
  const void *outputs, *lses;
};

struct AttentionBackwardArgs {
  AttentionArgs forward;  // output and lse are read
  AttentionInput grad_output;
  AttentionOutput grad_query, grad_key, grad_value;
};

// Pairs [begin, end) of (sequence, kv head), pair = sequence kv_heads + kv head; of each pair the share `split` of
// `splits` of its query blocks.
using AttentionKernel = void(const AttentionArgs&, int64_t begin, int64_t end, int64_t split, int64_t splits,
                             void* scratch);
using AttentionScratchKernel = int64_t(const AttentionArgs&);
using AttentionMergeKernel = void(const AttentionMergeArgs&, int64_t row_begin, int64_t row_end);

// Which gradients a task of the backward computes for its pairs: all, or grad_key and grad_value of the share `split`
// of the key blocks, or grad_query of the share `split` of the query blocks.
enum class AttentionGradients { all, keys, queries };
using AttentionBackwardKernel = void(const AttentionBackwardArgs&, AttentionGradients, int64_t begin, int64_t end,
                                     int64_t split, int64_t splits, void* scratch);
using AttentionBackwardScratchKernel = int64_t(const AttentionBackwardArgs&);

}  // namespace fastformer
