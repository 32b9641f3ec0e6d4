// Matrix products on the packed weights: which thread does what.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common.h"

namespace fastformer {

// A packed weight: (panels, depth, panel width) in the compute type or in 16 bits, see PackArgs; or quantized, (panels,
// bytes of a panel) in 8 bits, see QuantizedRows.
struct PackedWeight {
  Tensor panels;
  int64_t columns, depth;

  PanelType type() const {
    switch (panels.scalar_type()) {
      case ScalarType::Char: return PanelType::int8;
      case ScalarType::BFloat16: return PanelType::bf16;
      case ScalarType::Half: return PanelType::f16;
      default: return PanelType::compute;
    }
  }
  const void* data() const { return panels.const_data_ptr(); }
};

inline int64_t panel_columns(DType dtype) { return kernels().panel_bytes / compute_bytes(dtype); }

// Packs b, seen as (columns, depth) with these strides: the weight of a linear, or the transpose of a matrix. In the
// compute type, or in `type`, of 16 bits.
inline PackedWeight pack(const Tensor& b, int64_t columns, int64_t depth, int64_t column_stride, int64_t depth_stride,
                         std::optional<ScalarType> type = std::nullopt) {
  const DType dtype = dtype_of(b);
  const int64_t width = panel_columns(dtype), panels = (columns + width - 1) / width;
  PackedWeight packed = {empty({panels, depth, width}, type.value_or(compute_type(dtype))), columns, depth};
  const PackArgs args = {
      .dtype = dtype, .columns = columns, .depth = depth, .b = b.const_data_ptr(),
      .b_column_stride = column_stride, .b_depth_stride = depth_stride, .packed = packed.panels.mutable_data_ptr(),
      .packed_type = packed.type(),
  };
  parallel_tasks(panels, [&](int64_t p) { kernels().pack(args, p, p + 1); });
  return packed;
}
// weight (out_features, in_features), any strides.
inline PackedWeight pack(const Tensor& weight, std::optional<ScalarType> type = std::nullopt) {
  return pack(weight, weight.size(0), weight.size(1), weight.stride(0), weight.stride(1), type);
}
// A tensor that Python packed before, checked against the product and the instruction set in use.
inline PackedWeight packed_weight(const Tensor& panels, int64_t columns, int64_t depth, DType dtype) {
  const int64_t width = panel_columns(dtype);
  if (panels.scalar_type() == ScalarType::Char) {
    STD_TORCH_CHECK(panels.dim() == 2 && panels.size(0) == (columns + kQuantizedColumns - 1) / kQuantizedColumns &&
                        panels.size(1) == quantized_panel_bytes(depth) && dtype != DType::f64,
                    "packed weight: it was quantized for another shape, or for float64");
    return {panels, columns, depth};
  }
  STD_TORCH_CHECK(panels.dim() == 3 && panels.size(0) == (columns + width - 1) / width && panels.size(1) == depth &&
                      panels.size(2) == width &&
                      (panels.scalar_type() == compute_type(dtype) || (panels.element_size() == 2 && dtype != DType::f64)),
                  "packed weight: it was packed for another dtype, shape or instruction set; pack it again");
  return {panels, columns, depth};
}

// Which product: the panels of b say it.
struct Product {
  GemmKernel* kernel;
  int64_t panels, scratch_bytes;
};
inline Product product_of(const GemmArgs& args) {
  const int64_t width = args.b_type == PanelType::int8 ? kQuantizedColumns : panel_columns(args.dtype);
  const int64_t panels = (args.columns + width - 1) / width;
  if (args.b_type == PanelType::int8) return {kernels().quantized_gemm, panels, kernels().quantized_scratch_bytes};
  return {kernels().gemm, panels, kernels().gemm_scratch_bytes(args)};
}

// Memory for the quantized rows of a product: scales, zeros, values.
inline int64_t quantized_scales(int64_t rows, int64_t depth) { return (rows * quantized_groups(depth) + 15) / 16 * 16; }
inline int64_t quantized_bytes(int64_t rows, int64_t depth) {
  return (rows + kQuantizedRowTile - 1) * quantized_stride(depth) + quantized_scales(rows, depth) * 8;
}
// rows count from `first`
inline QuantizedRows quantized_rows(void* memory, int64_t first, int64_t rows, int64_t depth) {
  const int64_t groups = quantized_groups(depth), scales = quantized_scales(rows, depth);
  float* scale = static_cast<float*>(memory);
  int32_t* zero = reinterpret_cast<int32_t*>(scale + scales);
  uint8_t* values = reinterpret_cast<uint8_t*>(zero + scales);
  return {values - first * quantized_stride(depth), scale - first * groups, zero - first * groups};
}
inline void quantize(const GemmArgs& args, int64_t row_begin, int64_t row_end, int64_t group_begin, int64_t group_end) {
  kernels().quantize({.dtype = args.dtype, .depth = args.depth, .a = args.a, .a_row_stride = args.a_row_stride,
                      .a_is_compute_type = args.a_is_compute_type, .quantized = args.quantized},
                     row_begin, row_end, group_begin, group_end);
}
inline void quantize(const GemmArgs& args, int64_t row_begin, int64_t row_end) {
  quantize(args, row_begin, row_end, 0, quantized_groups(args.depth));
}
inline bool wants_quantizing(const GemmArgs& args) {
  return args.b_type == PanelType::int8 && !args.quantized.values;
}
// Rows that make a task.
inline int64_t quantized_grain(const GemmArgs& args) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(args.depth, 1));
}
// Quantizes args.a into memory of its own, which lives as long as the result.
inline Tensor quantize(GemmArgs& args) {
  Tensor memory = empty({quantized_bytes(args.rows, args.depth)}, ScalarType::Byte);
  args.quantized = quantized_rows(memory.mutable_data_ptr(), 0, args.rows, args.depth);
  parallel_rows(args.rows, quantized_grain(args), [&](int64_t begin, int64_t end) { quantize(args, begin, end); });
  return memory;
}

// How a product is cut into tasks: blocks of rows x groups of panels. Where b is quantized, so are the rows of a by then.
class GemmTasks {
 public:
  GemmTasks(const GemmArgs& args, int64_t threads) : args_(args), product_(product_of(args)), threads_(threads) {
    constexpr int64_t kRows = 192, kBytes = 96 << 10;  // of a task: rows, and at least so much of b
    const int64_t bytes = args.columns * args.depth * (args.b_type == PanelType::int8 ? 1 : compute_bytes(args.dtype));
    rows_ = threads == 1 ? 1 : (args.rows + kRows - 1) / kRows;
    const bool small = threads == 1 || args.rows * args.columns * args.depth < (1 << 16);
    const int64_t wanted = small ? 1 : std::clamp(bytes / kBytes, threads, 4 * threads);
    panels_ = std::clamp<int64_t>((wanted + rows_ - 1) / std::max<int64_t>(rows_, 1), 1,
                                  std::max<int64_t>(product_.panels, 1));
    if (panels_ > threads) panels_ -= panels_ % threads;
  }
  int64_t count() const { return rows_ * panels_; }
  int64_t bytes() const { return product_.scratch_bytes; }
  void operator()(int64_t task) const {
    const int64_t r = task / panels_, p = in_turn(task % panels_);
    product_.kernel(args_, args_.rows * r / rows_, args_.rows * (r + 1) / rows_, product_.panels * p / panels_,
                    product_.panels * (p + 1) / panels_, scratch(bytes()));
  }

 private:
  // Threads take tasks in turn: so each goes on with the panels behind its last ones, which are on their way into its cache.
  int64_t in_turn(int64_t task) const {
    return panels_ % threads_ ? task : task % threads_ * (panels_ / threads_) + task / threads_;
  }

  GemmArgs args_;
  Product product_;
  int64_t threads_, rows_, panels_;  // rows and panels: in how many parts they are cut
};

inline void gemm(GemmArgs args) {
  std::optional<Tensor> quantized;
  if (wants_quantizing(args)) quantized = quantize(args);
  const GemmTasks tasks(args, torch::stable::get_num_threads());
  parallel_tasks(tasks.count(), tasks);
}

// The product of rows [begin, end) by this thread alone, in serial_bytes(args, end - begin) of its memory.
inline int64_t serial_bytes(const GemmArgs& args, int64_t rows) {
  return product_of(args).scratch_bytes + (wants_quantizing(args) ? quantized_bytes(rows, args.depth) : 0);
}
inline void gemm_serial(GemmArgs args, int64_t begin, int64_t end, char* memory) {
  const auto [kernel, panels, bytes] = product_of(args);
  if (wants_quantizing(args)) {
    args.quantized = quantized_rows(memory + bytes, begin, end - begin, args.depth);
    quantize(args, begin, end);
  }
  kernel(args, begin, end, 0, panels, memory);
}

// Products by matrices that are used but once, so by those of a training step, are torch's (MKL's, oneDNN's): they pack as
// they go. All in the compute type.

inline Tensor matrix(const void* data, ScalarType type, int64_t rows, int64_t columns, int64_t row_stride,
                     int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle view;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<void*>(data), 2, sizes, strides, 0, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &view));
  return to_type(Tensor(view), compute_type(dtype_of(type)));
}
inline Tensor matrix(const Rows& rows) {
  return matrix(rows.data, rows.tensor.scalar_type(), rows.count, rows.columns, rows.stride, 1);
}
inline Tensor matrix(const Tensor& weight) {
  return matrix(weight.const_data_ptr(), weight.scalar_type(), weight.size(0), weight.size(1), weight.stride(0),
                weight.stride(1));
}
inline Tensor transposed(const Tensor& x) {
  return matrix(x.const_data_ptr(), x.scalar_type(), x.size(1), x.size(0), x.stride(1), x.stride(0));
}
// out = a b, or out += a b
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool add = false) {
  STABLE_TORCH_ERROR_CODE_CHECK(add ? aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1, 1)
                                    : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}
inline Tensor product(const Tensor& a, const Tensor& b) {
  Tensor out = empty({a.size(0), b.size(1)}, a.scalar_type());
  multiply(out, a, b);
  return out;
}
// What follows a product in `args`; the sums (rows, columns) may lie where the output or the pre-activation goes.
inline void finish(const GemmArgs& args, const Tensor& sums) {
  parallel_rows(args.rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(args.columns, 1)),
                [&](int64_t begin, int64_t end) { kernels().epilogue(args, begin, end, sums.const_data_ptr()); });
}

// grad_weight (out_features, in_features) = grad^T input
inline Tensor weight_gradient(const Rows& grad, const Rows& input) {
  return to_type(product(transposed(matrix(grad)), matrix(input)), grad.tensor.scalar_type());
}

// grad_input (..., in_features) = grad weight
inline Tensor input_gradient(const Rows& grad, const Tensor& weight) {
  const ScalarType type = grad.tensor.scalar_type();
  const Tensor b = matrix(weight);
  Tensor output = empty(with_last(grad.tensor, b.size(1)), b.scalar_type());
  multiply(matrix(rows_of(output)), matrix(grad), b);
  return to_type(output, type);
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
