// Matrix products on the packed weights: which thread does what.
#pragma once

#include "common.h"

namespace fastformer {

// A packed weight (panels, depth, panel width) in the compute type; see PackArgs.
struct PackedWeight {
  Tensor panels;
  int64_t columns;

  int64_t depth() const { return panels.size(1); }
  const void* data() const { return panels.const_data_ptr(); }
};

inline int64_t panel_columns(DType dtype) { return kernels().panel_bytes / compute_bytes(dtype); }

// Packs b, seen as (columns, depth) with these strides: the weight of a linear, or the transpose of a matrix.
inline PackedWeight pack(const Tensor& b, int64_t columns, int64_t depth, int64_t column_stride,
                         int64_t depth_stride) {
  const DType dtype = dtype_of(b);
  const int64_t width = panel_columns(dtype), panels = (columns + width - 1) / width;
  Tensor packed = empty({panels, depth, width}, compute_type(dtype));
  const PackArgs args = {
      .dtype = dtype, .columns = columns, .depth = depth, .b = b.const_data_ptr(),
      .b_column_stride = column_stride, .b_depth_stride = depth_stride, .packed = packed.mutable_data_ptr(),
  };
  parallel_tasks(panels, [&](int64_t p) { kernels().pack(args, p, p + 1); });
  return {packed, columns};
}
// weight (out_features, in_features), any strides.
inline PackedWeight pack(const Tensor& weight) {
  return pack(weight, weight.size(0), weight.size(1), weight.stride(0), weight.stride(1));
}
// For products with the transpose: weight (depth, columns).
inline PackedWeight pack_transposed(const Tensor& weight) {
  return pack(weight, weight.size(1), weight.size(0), weight.stride(1), weight.stride(0));
}
// A tensor that Python packed before, checked against the product and the instruction set in use.
inline PackedWeight packed_weight(const Tensor& panels, int64_t columns, int64_t depth, DType dtype) {
  const int64_t width = panel_columns(dtype);
  STD_TORCH_CHECK(panels.dim() == 3 && panels.size(0) == (columns + width - 1) / width && panels.size(1) == depth &&
                      panels.size(2) == width && panels.scalar_type() == compute_type(dtype),
                  "packed weight: it was packed for another dtype, shape or instruction set; pack it again");
  return {panels, columns};
}

inline void gemm(const GemmArgs& args) {
  constexpr int64_t kRows = 192;  // of a task
  const int64_t threads = torch::stable::get_num_threads(), width = panel_columns(args.dtype);
  const int64_t panels = (args.columns + width - 1) / width;
  const int64_t row_tasks = threads == 1 ? 1 : (args.rows + kRows - 1) / kRows;
  const int64_t wanted = threads == 1 || args.rows * args.columns * args.depth < (1 << 16) ? 1 : 4 * threads;
  const int64_t panel_tasks = std::clamp<int64_t>((wanted + row_tasks - 1) / std::max<int64_t>(row_tasks, 1), 1,
                                                  std::max<int64_t>(panels, 1));
  const int64_t bytes = kernels().gemm_scratch_bytes(args);
  parallel_tasks(row_tasks * panel_tasks, [&](int64_t task) {
    const int64_t r = task / panel_tasks, p = task % panel_tasks;
    kernels().gemm(args, args.rows * r / row_tasks, args.rows * (r + 1) / row_tasks, panels * p / panel_tasks,
                   panels * (p + 1) / panel_tasks, scratch(bytes));
  });
}

// output (rows, columns), contiguous, = a b for a (rows, depth) with any strides.
inline Tensor product(const Tensor& a, int64_t rows, int64_t row_stride, int64_t depth_stride, const PackedWeight& b,
                      const std::vector<int64_t>& shape, ScalarType type) {
  Tensor output = empty(shape, type);
  GemmArgs args = {
      .dtype = dtype_of(a), .rows = rows, .columns = b.columns, .depth = b.depth(),
      .a = a.const_data_ptr(), .a_row_stride = row_stride, .a_depth_stride = depth_stride,
      .b = b.data(), .bias = nullptr, .output = output.mutable_data_ptr(), .output_stride = b.columns,
  };
  gemm(args);
  return output;
}

// grad_weight (out_features, in_features) = grad^T input
inline Tensor weight_gradient(const Rows& grad, const Rows& input) {
  const PackedWeight b = pack(input.tensor, input.columns, input.count, 1, input.stride);
  return product(grad.tensor, grad.columns, 1, grad.stride, b, {grad.columns, input.columns},
                 grad.tensor.scalar_type());
}

// grad_input (..., in_features) = grad weight
inline Tensor input_gradient(const Rows& grad, const Tensor& weight) {
  return product(grad.tensor, grad.count, grad.stride, 1, pack_transposed(weight),
                 with_last(grad.tensor, weight.size(1)), grad.tensor.scalar_type());
}

// grad_bias (out_features) = sum over the rows of grad
inline Tensor bias_gradient(const Rows& grad) {
  const DType dtype = dtype_of(grad.tensor);
  Tensor sums = empty({grad.columns}, compute_type(dtype));
  const ColumnSumsArgs args = {
      .dtype = dtype, .rows = grad.count, .input = grad.data, .stride = grad.stride, .sums = sums.mutable_data_ptr(),
  };
  constexpr int64_t kColumns = 256;  // of a task
  parallel_rows(grad.columns, kColumns, [&](int64_t begin, int64_t end) { kernels().column_sums(args, begin, end); });
  return to_type(sums, grad.tensor.scalar_type());
}

// The gradient in front of an activation and its dropout: grad * dropout mask * activation gradient.
inline Tensor activation_backward(const Rows& grad, const std::optional<Tensor>& pre_activation, Activation activation,
                                  const Dropout& dropout) {
  Tensor output = empty(shape_of(grad.tensor), grad.tensor.scalar_type());
  const ActivationArgs args = {
      .dtype = dtype_of(grad.tensor), .columns = grad.columns, .activation = activation, .dropout = dropout,
      .grad = grad.data, .grad_stride = grad.stride, .pre_activation = data(pre_activation),
      .output = output.mutable_data_ptr(),
  };
  parallel_rows(grad.count, std::max<int64_t>(1, 16384 / std::max<int64_t>(grad.columns, 1)),
                [&](int64_t begin, int64_t end) { kernels().activation(args, begin, end); });
  return output;
}

}  // namespace fastformer
