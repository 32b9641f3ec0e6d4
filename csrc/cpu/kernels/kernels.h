// What the host side calls: one table of functions per instruction set. A kernel is serial and works on the part of the
// output that it is given; the host decides which thread does which part.
#pragma once

#include <stdint.h>

namespace fastformer {

enum class DType { f32, f64, bf16, f16 };
enum class Activation { none, gelu, gelu_tanh, relu, silu };

// Dropout by Philox: an element is kept where its 32 random bits are >= threshold, and scaled by 1 / (1 - p).
struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;
  double scale = 1;
};

// layer_norm, and add_layer_norm where residual is given: s = dropout(input) + residual, output = layer_norm(s).
// Pointers to the compute type are float, double where dtype is f64. Row strides in elements; columns are adjacent.
struct LayerNormArgs {
  DType dtype, residual_dtype;  // residual, sum and output have residual_dtype (dtype where there is no residual)
  int64_t columns;
  double eps;
  Dropout dropout;
  const void *input, *residual;
  int64_t input_stride, residual_stride;
  const void *weight, *bias;  // compute type, or null
  void *output, *sum;         // contiguous; sum is null for layer_norm
  void *mean, *rstd;          // compute type, one per row
};

// The gradients of LayerNormArgs; input here is what was normalized (s).
struct LayerNormBackwardArgs {
  DType dtype, grad_input_dtype;
  int64_t columns;
  Dropout dropout;
  const void *grad_output, *grad_sum, *input;  // grad_sum: the gradient that reaches s directly, or null
  int64_t grad_output_stride, grad_sum_stride, input_stride;
  const void *weight, *mean, *rstd;
  void *grad_input, *grad_residual;  // contiguous; grad_residual is null for layer_norm
};

// embeddings: the sum of one row of each table, output = dropout(layer_norm(sum)).
struct EmbeddingsArgs {
  DType dtype;
  int64_t columns;
  double eps;
  Dropout dropout;
  int tables;  // 1 to 3
  const void* table[3];
  int64_t table_stride[3];
  const int64_t* ids[3];      // the row of the table, for each row of the output
  const void *weight, *bias;  // compute type, or null
  void *output, *mean, *rstd;
  const void* grad_output;
  int64_t grad_output_stride;
};

// The gradient of one table: row r is the sum of grad_rows[order[i]] for first[r] <= i < first[r + 1].
struct EmbeddingGradientArgs {
  DType dtype;
  int64_t columns;
  const void* grad_rows;  // compute type, contiguous
  const int64_t *order, *first;
  int64_t padding_idx;  // the row without a gradient, or -1
  void* grad_table;     // contiguous
};

// Rows in 8 bits: x = scale * (value - zero), each group of kQuantizedGroup depths of a row with a scale and a zero of its
// own, (rows, groups). quantized_depth(depth) values a row, those past the depth arbitrary, and a cache line, or many rows
// would share cache sets; memory for kQuantizedRowTile - 1 more rows is there.
struct QuantizedRows {
  uint8_t* values = nullptr;
  float* scale;
  int32_t* zero;
};
constexpr int kQuantizedRowTile = 32;
constexpr int64_t quantized_depth(int64_t depth) { return (depth + 63) / 64 * 64; }
constexpr int64_t quantized_stride(int64_t depth) { return quantized_depth(depth) + 64; }
constexpr int64_t kQuantizedGroup = 768;
constexpr int64_t quantized_groups(int64_t depth) { return depth > 0 ? (depth + kQuantizedGroup - 1) / kQuantizedGroup : 1; }

// A panel of quantized weights: w = scale * value, each of the kQuantizedColumns columns with a scale of its own.
//   int8  value[quantized_depth / 64][kQuantizedColumns / 16][16][16][4]   zero padded: see quantized_offset
//   float scale[kQuantizedColumns]
//   int32 sum[quantized_groups][kQuantizedColumns]           of the column's values in each group
//   float sample[kQuantizedColumns]                          w at depth sampled_depth(column): see is_packed
constexpr int64_t kQuantizedColumns = 64;
// Blocks of 64 depths x 16 columns, as AMX takes them; in them four depths of a column side by side.
constexpr int64_t quantized_offset(int64_t k, int64_t column) {
  return k / 64 * 64 * kQuantizedColumns + column / 16 * 1024 + k % 64 / 4 * 64 + column % 16 * 4 + k % 4;
}
constexpr int64_t kQuantizedMaxDepth = 65536;  // sums of products of 255 and 127 fit into 32 bits
constexpr int64_t quantized_panel_bytes(int64_t depth) {
  return (quantized_depth(depth) + 4 * (quantized_groups(depth) + 2)) * kQuantizedColumns;
}
constexpr int64_t sampled_depth(int64_t column, int64_t depth) { return depth * (7 * column % 16) / 16; }

// What the panels of packed weights hold: the compute type, 16 bits that are widened on the way, or QuantizedRows' peer.
enum class PanelType { compute, bf16, f16, int8 };

// output = dropout(activate(a b + bias)) + residual, and for gradients
// output = dropout(a b) * activation_gradient(pre_activation).
// Strides in elements. b is packed (see pack): panels of kernels().panel_columns(dtype) columns.
struct GemmArgs {
  DType dtype;  // of a, output, residual and pre_activation
  int64_t rows, columns, depth;
  const void* a;  // (rows, depth)
  int64_t a_row_stride, a_depth_stride;
  bool a_is_compute_type = false;  // float whatever dtype is: an intermediate result
  const void* b;  // packed
  PanelType b_type = PanelType::compute;
  QuantizedRows quantized;   // a, where b_type is int8
  const void* bias;          // compute type, or null
  Activation activation = Activation::none;
  Dropout dropout;
  const void* residual = nullptr;
  int64_t residual_stride = 0;
  void* pre_activation = nullptr;  // (rows, columns), contiguous: a b + bias; written, or read where `gradient`
  bool gradient = false;
  void* output;
  int64_t output_stride;
  bool output_is_compute_type = false;
};

// The panels of b (columns, depth): panel p holds columns [p W, (p + 1) W), depth by depth, zero padded.
struct PackArgs {
  DType dtype;
  int64_t columns, depth;
  const void* b;
  int64_t b_column_stride, b_depth_stride;
  void* packed;
  PanelType packed_type = PanelType::compute;
};

// a (rows, depth) -> QuantizedRows
struct QuantizeArgs {
  DType dtype;
  int64_t depth;
  const void* a;
  int64_t a_row_stride;
  bool a_is_compute_type = false;
  QuantizedRows quantized;
};

// pre_activation -> activation, or (gradient) grad * dropout mask * activation gradient; contiguous (rows, columns).
struct ActivationArgs {
  DType dtype;
  int64_t columns;
  Activation activation;
  Dropout dropout;
  const void* grad;            // null for the forward
  int64_t grad_stride;
  const void* pre_activation;  // null where there is no activation
  void* output;
};

// sums[c] = sum over the rows of input[row, c], compute type.
struct ColumnSumsArgs {
  DType dtype;
  int64_t rows;
  const void* input;
  int64_t stride;
  void* sums;
};

// output[i] = input[rows[i]], widened to the compute type; both of `columns` adjacent elements, output contiguous.
struct GatherRowsArgs {
  DType dtype;
  int64_t columns;
  const void* input;
  int64_t stride;
  const int64_t* rows;
  void* output;
};

// Cross entropy over a slice of the classes: logits (rows, columns) of the compute type, everything else one per row.
struct CrossEntropyArgs {
  DType dtype;  // f32 or f64
  int64_t rows, columns;
  void* logits;
  int64_t stride;
  const void* class_weight;  // of these columns; null for ones
  // Statistics, written: the largest logit, sum(exp(logit - largest)), and sum(class_weight (largest - logit)) or null.
  void *largest, *sum_exp, *distance;
  // The gradient, written over the logits: scale exp(logit - largest - log_sum) - uniform class_weight - (hot at the
  // target); here largest and log_sum are of all classes. Their sum, rounded, would not do for logits far from zero.
  const void *log_sum, *scale, *uniform, *hot;
  const int64_t* target;  // counted from the slice's first column
};

}  // namespace fastformer

#include "attention_args.h"
#include "crf_args.h"

namespace fastformer {

using LayerNormKernel = void(const LayerNormArgs&, int64_t row_begin, int64_t row_end);
// Adds the rows' share to grad_weight and grad_bias (compute type, `columns` elements each).
using LayerNormBackwardKernel = void(const LayerNormBackwardArgs&, int64_t row_begin, int64_t row_end,
                                     void* grad_weight, void* grad_bias);
// scratch: a row of the compute type.
using EmbeddingsKernel = void(const EmbeddingsArgs&, int64_t row_begin, int64_t row_end, void* scratch);
// What layer_norm_backward starts from, contiguous in the compute type: the sums, and the gradient behind the dropout.
using EmbeddingsBackwardKernel = void(const EmbeddingsArgs&, int64_t row_begin, int64_t row_end, void* sums,
                                      void* grads);
// scratch: two rows of these columns, of the compute type.
using EmbeddingGradientKernel = void(const EmbeddingGradientArgs&, int64_t row_begin, int64_t row_end,
                                     int64_t column_begin, int64_t column_end, void* scratch);
using PackKernel = void(const PackArgs&, int64_t panel_begin, int64_t panel_end);
// scratch: gemm_scratch_bytes(args) bytes, aligned to 64.
using GemmKernel = void(const GemmArgs&, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                        void* scratch);
using GemmScratchKernel = int64_t(const GemmArgs&);
// What follows a product, for sums (rows, columns) of the compute type; they may lie where the output or pre_activation does.
using EpilogueKernel = void(const GemmArgs&, int64_t row_begin, int64_t row_end, const void* sums);
using QuantizeKernel = void(const QuantizeArgs&, int64_t row_begin, int64_t row_end, int64_t group_begin,
                            int64_t group_end);
using ActivationKernel = void(const ActivationArgs&, int64_t row_begin, int64_t row_end);
using ColumnSumsKernel = void(const ColumnSumsArgs&, int64_t column_begin, int64_t column_end);
using GatherRowsKernel = void(const GatherRowsArgs&, int64_t begin, int64_t end);
using CrossEntropyKernel = void(const CrossEntropyArgs&);

struct Kernels {
  const char* isa;  // of what differs: the levels above avx512 have other 8-bit products
  int panel_bytes;  // one row of a panel: panel_bytes / sizeof(compute type) columns
  LayerNormKernel* layer_norm;
  LayerNormBackwardKernel* layer_norm_backward;
  EmbeddingsKernel* embeddings;
  EmbeddingsBackwardKernel* embeddings_backward;
  EmbeddingGradientKernel* embedding_gradient;
  PackKernel* pack;
  GemmKernel* gemm;
  GemmScratchKernel* gemm_scratch_bytes;
  EpilogueKernel* epilogue;
  QuantizeKernel* quantize;
  PackKernel* pack_quantized;  // panels of quantized_panel_bytes
  GemmKernel* quantized_gemm;
  int64_t quantized_scratch_bytes;
  ActivationKernel* activation;
  ColumnSumsKernel* column_sums;
  GatherRowsKernel* gather_rows;
  CrossEntropyKernel* cross_entropy_statistics;
  CrossEntropyKernel* cross_entropy_gradient;
  CrfKernel* crf_log_likelihood;
  CrfBackwardKernel* crf_backward;
  CrfDecodeKernel* crf_decode;
  AttentionKernel* attention;
  AttentionScratchKernel* attention_scratch_bytes;
  AttentionMergeKernel* attention_merge;
  AttentionBackwardKernel* attention_backward;
  AttentionBackwardScratchKernel* attention_backward_scratch_bytes;
};

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels, kernels_vnni, kernels_amx; }

}  // namespace fastformer
