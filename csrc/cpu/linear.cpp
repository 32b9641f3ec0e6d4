// linear: dropout(activation(input @ weight.T + bias)) + residual, on weights packed for the call or before it.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "gemm.h"

namespace fastformer {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& input, const PackedWeight& weight, const std::optional<Tensor>& bias,
                                   Activation activation, const Dropout& dropout,
                                   const std::optional<Tensor>& residual, bool save_pre_activation) {
  const Rows x = rows_of(input);
  const DType dtype = dtype_of(input);
  const auto b = to_compute(bias, dtype);
  std::optional<Rows> r;
  if (residual) r = rows_of(*residual);
  Tensor output = empty(with_last(input, weight.columns), input.scalar_type());
  const bool save = save_pre_activation && activation != Activation::none;
  Tensor pre_activation = empty(save ? with_last(input, weight.columns) : std::vector<int64_t>{0}, input.scalar_type());
  gemm({
      .dtype = dtype, .rows = x.count, .columns = weight.columns, .depth = weight.depth,
      .a = x.data, .a_row_stride = x.stride, .a_depth_stride = 1, .b = weight.data(),
      .b_is_quantized = weight.quantized(), .bias = data(b),
      .activation = activation, .dropout = dropout,
      .residual = r ? r->data : nullptr, .residual_stride = r ? r->stride : 0,
      .pre_activation = save ? pre_activation.mutable_data_ptr() : nullptr,
      .output = output.mutable_data_ptr(), .output_stride = weight.columns,
  });
  return {output, pre_activation};
}

std::tuple<Tensor, Tensor> linear(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                  std::optional<std::string> activation, double dropout_p, std::optional<Tensor> seed,
                                  std::optional<Tensor> residual, bool save_pre_activation) {
  return forward(input, pack(weight), bias, activation_of(activation), make_dropout(dropout_p, seed), residual,
                 save_pre_activation);
}

Tensor packed_linear(Tensor input, Tensor packed, int64_t out_features, std::optional<Tensor> bias,
                     std::optional<std::string> activation, std::optional<Tensor> residual) {
  const PackedWeight weight = packed_weight(packed, out_features, input.size(input.dim() - 1), dtype_of(input));
  return std::get<0>(forward(input, weight, bias, activation_of(activation), {}, residual, false));
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor grad_output, Tensor input, Tensor weight,
                                                   Tensor pre_activation, std::optional<std::string> activation,
                                                   double dropout_p, std::optional<Tensor> seed, bool need_input,
                                                   bool need_weight, bool need_bias) {
  Rows grad = rows_of(grad_output);
  const Dropout dropout = make_dropout(dropout_p, seed);
  if (activation || dropout.threshold)
    grad = rows_of(activation_backward(grad, activation ? std::optional(pre_activation) : std::nullopt,
                                       activation_of(activation), dropout));
  const Tensor none = empty({0}, input.scalar_type());
  return {need_input ? input_gradient(grad, weight) : none,
          need_weight ? weight_gradient(grad, rows_of(input)) : none, need_bias ? bias_gradient(grad) : none};
}

Tensor pack_weight(Tensor weight) { return pack(weight).panels; }

Tensor quantize_weight(Tensor weight) {
  const int64_t columns = weight.size(0), depth = weight.size(1);
  STD_TORCH_CHECK(weight.scalar_type() != ScalarType::Double && depth <= kQuantizedMaxDepth,
                  "weight: expected float32, bfloat16 or float16 with at most ", kQuantizedMaxDepth, " in_features");
  const int64_t panels = (columns + kQuantizedColumns - 1) / kQuantizedColumns;
  Tensor packed = empty({panels, quantized_panel_bytes(depth)}, ScalarType::Char);
  const PackArgs args = {
      .dtype = dtype_of(weight), .columns = columns, .depth = depth, .b = weight.const_data_ptr(),
      .b_column_stride = weight.stride(0), .b_depth_stride = weight.stride(1), .packed = packed.mutable_data_ptr(),
  };
  parallel_tasks(panels, [&](int64_t p) { kernels().pack_quantized(args, p, p + 1); });
  return packed;
}

constexpr int64_t kSamples = 16;  // of each weight

// The element in the compute type.
float widened(const Tensor& tensor, int64_t offset) {
  if (tensor.scalar_type() == ScalarType::Float) return static_cast<const float*>(tensor.const_data_ptr())[offset];
  return tensor.scalar_type() == ScalarType::BFloat16
             ? float(static_cast<const torch::headeronly::BFloat16*>(tensor.const_data_ptr())[offset])
             : float(static_cast<const torch::headeronly::Half*>(tensor.const_data_ptr())[offset]);
}

// As is_packed, against the samples that were kept at quantization.
bool is_quantized(const std::vector<Tensor>& weights, const Tensor& packed) {
  const int64_t depth = weights.empty() ? 0 : weights[0].size(1);
  if (packed.size(1) != quantized_panel_bytes(depth)) return false;
  const int64_t samples = packed.size(1) - kQuantizedColumns * int64_t(sizeof(float));  // offset in a panel
  const char* kept = static_cast<const char*>(packed.const_data_ptr());
  int64_t first = 0;
  for (const Tensor& weight : weights) {
    const int64_t rows = weight.size(0);
    if (weight.size(1) != depth || weight.scalar_type() == ScalarType::Double ||
        first + rows > packed.size(0) * kQuantizedColumns)
      return false;
    for (int64_t s = 0; s < kSamples && rows > 0 && depth > 0; ++s) {
      const int64_t row = rows * s / kSamples, column = first + row;
      const float value = widened(weight, row * weight.stride(0) + sampled_depth(column, depth) * weight.stride(1));
      const char* panel = kept + column / kQuantizedColumns * packed.size(1);
      const char* copy = panel + samples + column % kQuantizedColumns * int64_t(sizeof(float));
      if (std::memcmp(&value, copy, sizeof(float))) return false;
    }
    first += rows;
  }
  return true;
}

// Samples of the weights, which are one after the other the columns of `packed`, against the packed values, bit by bit.
bool is_packed(std::vector<Tensor> weights, Tensor packed) {
  if (packed.scalar_type() == ScalarType::Char) return is_quantized(weights, packed);
  const int64_t depth = packed.size(1), width = packed.size(2);
  const char* kept = static_cast<const char*>(packed.const_data_ptr());
  int64_t first = 0;  // column of the weight's first row
  for (const Tensor& weight : weights) {
    const DType dtype = dtype_of(weight);
    const int64_t rows = weight.size(0), bytes = compute_bytes(dtype);
    if (weight.size(1) != depth || first + rows > packed.size(0) * width || compute_type(dtype) != packed.scalar_type())
      return false;
    for (int64_t s = 0; s < kSamples && rows > 0 && depth > 0; ++s) {
      const int64_t row = rows * s / kSamples, k = depth * (7 * s % kSamples) / kSamples, column = first + row;
      const int64_t offset = row * weight.stride(0) + k * weight.stride(1);
      const char* copy = kept + ((column / width * depth + k) * width + column % width) * bytes;
      if (dtype == DType::f32 || dtype == DType::f64) {
        if (std::memcmp(static_cast<const char*>(weight.const_data_ptr()) + offset * bytes, copy, bytes)) return false;
      } else {
        const float value = widened(weight, offset);
        if (std::memcmp(&value, copy, bytes)) return false;
      }
    }
    first += rows;
  }
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("quantize_weight", TORCH_BOX(&quantize_weight));
  m.impl("is_packed", TORCH_BOX(&is_packed));
}

}  // namespace fastformer
