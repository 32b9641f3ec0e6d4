// layer_norm and add_layer_norm.

#include "common.h"

namespace fastformer {
namespace {

// Rows per task: some 32K elements, so that waking a thread is worth it.
int64_t grain(int64_t columns) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(columns, 1)); }

// The pairs of types that the kernel takes: equal ones, and 16 bits added to a float32 residual (autocast).
bool has_kernel(DType input, DType residual) {
  return input == residual || (residual == DType::f32 && input != DType::f64);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor input, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                              double eps) {
  const Rows x = rows_of(input);
  const DType dtype = dtype_of(input);
  const auto w = to_compute(weight, dtype), b = to_compute(bias, dtype);
  Tensor output = empty(shape_of(input), input.scalar_type());
  Tensor mean = empty({x.count}, compute_type(dtype)), rstd = empty({x.count}, compute_type(dtype));
  const LayerNormArgs args = {
      .dtype = dtype, .residual_dtype = dtype, .columns = x.columns, .eps = eps, .dropout = {},
      .input = x.data, .residual = nullptr, .input_stride = x.stride, .residual_stride = 0,
      .weight = data(w), .bias = data(b),
      .output = output.mutable_data_ptr(), .sum = nullptr,
      .mean = mean.mutable_data_ptr(), .rstd = rstd.mutable_data_ptr(),
  };
  parallel_rows(x.count, grain(x.columns), [&](int64_t begin, int64_t end) { kernels().layer_norm(args, begin, end); });
  return {output, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(Tensor input, Tensor residual, std::optional<Tensor> weight,
                                                          std::optional<Tensor> bias, double eps, double dropout_p,
                                                          std::optional<Tensor> seed) {
  if (!has_kernel(dtype_of(input), dtype_of(residual))) {
    const bool wide = dtype_of(input) == DType::f64 || dtype_of(residual) == DType::f64;
    input = to_type(input, wide ? ScalarType::Double : ScalarType::Float);
    residual = to_type(residual, wide ? ScalarType::Double : ScalarType::Float);
  }
  const Rows x = rows_of(input), r = rows_of(residual);
  const DType dtype = dtype_of(residual);
  const auto w = to_compute(weight, dtype), b = to_compute(bias, dtype);
  Tensor output = empty(shape_of(input), residual.scalar_type()), sum = empty(shape_of(input), residual.scalar_type());
  Tensor mean = empty({x.count}, compute_type(dtype)), rstd = empty({x.count}, compute_type(dtype));
  const LayerNormArgs args = {
      .dtype = dtype_of(input), .residual_dtype = dtype, .columns = x.columns, .eps = eps,
      .dropout = make_dropout(dropout_p, seed),
      .input = x.data, .residual = r.data, .input_stride = x.stride, .residual_stride = r.stride,
      .weight = data(w), .bias = data(b),
      .output = output.mutable_data_ptr(), .sum = sum.mutable_data_ptr(),
      .mean = mean.mutable_data_ptr(), .rstd = rstd.mutable_data_ptr(),
  };
  parallel_rows(x.count, grain(x.columns), [&](int64_t begin, int64_t end) { kernels().layer_norm(args, begin, end); });
  return {output, sum, mean, rstd};
}

// Runs the backward over chunks of rows, whose shares of the weight gradients are summed apart and then added up: the order
// is fixed, and no sum is long. Returns (grad_weight, grad_bias) in the compute type.
std::pair<Tensor, Tensor> backward(const LayerNormBackwardArgs& args, int64_t rows) {
  const ScalarType type = compute_type(args.dtype);
  const int64_t chunks = std::clamp<int64_t>(rows / 64, 1, 512);
  const Tensor weights = zeros({chunks, args.columns}, type), biases = zeros({chunks, args.columns}, type);
  char *grad_weight = static_cast<char*>(weights.mutable_data_ptr()),
       *grad_bias = static_cast<char*>(biases.mutable_data_ptr());
  const int64_t bytes = args.columns * compute_bytes(args.dtype);
  parallel_tasks(chunks, [&](int64_t c) {
    kernels().layer_norm_backward(args, rows * c / chunks, rows * (c + 1) / chunks, grad_weight + c * bytes,
                                  grad_bias + c * bytes);
  });
  const std::vector<int64_t> chunk_dim = {0};
  return {torch::stable::sum(weights, chunk_dim), torch::stable::sum(biases, chunk_dim)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad_output, Tensor input, std::optional<Tensor> weight,
                                                       Tensor mean, Tensor rstd) {
  const Rows x = rows_of(input), g = rows_of(grad_output);
  const DType dtype = dtype_of(input);
  const auto w = to_compute(weight, dtype);
  Tensor grad_input = empty(shape_of(input), input.scalar_type());
  const LayerNormBackwardArgs args = {
      .dtype = dtype, .grad_input_dtype = dtype, .columns = x.columns, .dropout = {},
      .grad_output = g.data, .grad_sum = nullptr, .input = x.data,
      .grad_output_stride = g.stride, .grad_sum_stride = 0, .input_stride = x.stride,
      .weight = data(w), .mean = mean.const_data_ptr(), .rstd = rstd.const_data_ptr(),
      .grad_input = grad_input.mutable_data_ptr(), .grad_residual = nullptr,
  };
  const auto [grad_weight, grad_bias] = backward(args, x.count);
  return {grad_input, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(Tensor grad_output, std::optional<Tensor> grad_sum,
                                                                   Tensor sum, std::optional<Tensor> weight,
                                                                   Tensor mean, Tensor rstd, double dropout_p,
                                                                   std::optional<Tensor> seed, ScalarType input_dtype) {
  const Rows s = rows_of(sum), g = rows_of(grad_output);
  std::optional<Rows> gs;
  if (grad_sum) gs = rows_of(*grad_sum);
  const DType dtype = dtype_of(sum);
  const bool direct = has_kernel(dtype_of(input_dtype), dtype);
  const auto w = to_compute(weight, dtype);
  Tensor grad_input = empty(shape_of(sum), direct ? input_dtype : sum.scalar_type());
  Tensor grad_residual = empty(shape_of(sum), sum.scalar_type());
  const LayerNormBackwardArgs args = {
      .dtype = dtype, .grad_input_dtype = dtype_of(grad_input), .columns = s.columns,
      .dropout = make_dropout(dropout_p, seed),
      .grad_output = g.data, .grad_sum = gs ? gs->data : nullptr, .input = s.data,
      .grad_output_stride = g.stride, .grad_sum_stride = gs ? gs->stride : 0, .input_stride = s.stride,
      .weight = data(w), .mean = mean.const_data_ptr(), .rstd = rstd.const_data_ptr(),
      .grad_input = grad_input.mutable_data_ptr(), .grad_residual = grad_residual.mutable_data_ptr(),
  };
  const auto [grad_weight, grad_bias] = backward(args, s.count);
  return {to_type(grad_input, input_dtype), grad_residual, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer_cpu, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
}

}  // namespace fastformer
