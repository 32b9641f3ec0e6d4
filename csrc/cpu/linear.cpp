// linear: dropout(activation(input @ weight.T + bias)) + residual, on weights packed for the call or before it.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <span>

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
      .b_type = weight.type(), .bias = data(b),
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

// dtype: bfloat16 or float16 for panels of 16 bits; those of a weight in this dtype hold the same values.
Tensor pack_weight(Tensor weight, std::optional<ScalarType> dtype) {
  STD_TORCH_CHECK(!dtype || ((*dtype == ScalarType::BFloat16 || *dtype == ScalarType::Half) &&
                             weight.scalar_type() != ScalarType::Double),
                  "dtype: expected bfloat16, float16 or None, and no float64 weight");
  return pack(weight, dtype).panels;
}

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

// A matrix of some floating type, of which elements are read one by one.
struct Elements {
  const char* data;
  ScalarType type;
  int64_t rows, columns, row_stride, column_stride;

  explicit Elements(const Tensor& x)
      : data(static_cast<const char*>(x.const_data_ptr())), type(x.scalar_type()), rows(x.size(0)), columns(x.size(1)),
        row_stride(x.stride(0)), column_stride(x.stride(1)) {}

  template <class T> T at(int64_t row, int64_t column) const {
    T value;
    std::memcpy(&value, data + (row * row_stride + column * column_stride) * int64_t(sizeof(T)), sizeof(T));
    return value;
  }
  float widened(int64_t row, int64_t column) const {
    if (type == ScalarType::Float) return at<float>(row, column);
    if (type == ScalarType::BFloat16) return float(at<torch::headeronly::BFloat16>(row, column));
    return float(at<torch::headeronly::Half>(row, column));
  }
};

template <class T> bool is_copy(T value, const char* copy) { return std::memcmp(&value, copy, sizeof(T)) == 0; }

// Is `copy`, of type `to`, what packing makes of the element?
bool is_packed_value(const Elements& weight, int64_t row, int64_t column, ScalarType to, const char* copy) {
  if (to == ScalarType::Double) return is_copy(weight.at<double>(row, column), copy);
  const float value = weight.widened(row, column);
  if (to == ScalarType::BFloat16) return is_copy(torch::headeronly::BFloat16(value), copy);
  if (to == ScalarType::Half) return is_copy(torch::headeronly::Half(value), copy);
  return is_copy(value, copy);
}

// Samples of the weights, which are one after the other the columns of `packed`, against the packed values, bit by bit.
// Quantized values say too little: beside them are samples of what they were made of.
bool agrees(std::span<const Tensor> weights, const Tensor& packed) {
  constexpr int64_t kSamples = 8;  // of each weight
  const ScalarType type = packed.scalar_type();
  const bool quantized = type == ScalarType::Char;
  const char* panels = static_cast<const char*>(packed.const_data_ptr());
  const int64_t depth = quantized ? (weights.empty() ? 0 : weights[0].size(1)) : packed.size(1);
  const int64_t width = quantized ? kQuantizedColumns : packed.size(2);
  const int64_t bytes = quantized ? 4 : packed.element_size(), columns = packed.size(0) * width;
  if (quantized && packed.size(1) != quantized_panel_bytes(depth)) return false;
  int64_t first = 0;  // column of the weight's first row
  for (const Tensor& tensor : weights) {
    const Elements weight(tensor);
    const bool same_width = (weight.type == ScalarType::Double) == (type == ScalarType::Double);
    if (weight.columns != depth || first + weight.rows > columns || !same_width) return false;
    for (int64_t s = 0; s < kSamples && weight.rows > 0 && depth > 0; ++s) {
      const int64_t row = weight.rows * s / kSamples, column = first + row, panel = column / width, c = column % width;
      const int64_t k = quantized ? sampled_depth(column, depth) : depth * (7 * s % kSamples) / kSamples;
      const int64_t copy = quantized ? (panel + 1) * quantized_panel_bytes(depth) - (width - c) * bytes
                                     : ((panel * depth + k) * width + c) * bytes;
      if (!is_packed_value(weight, row, k, quantized ? ScalarType::Float : type, panels + copy)) return false;
    }
    first += weight.rows;
  }
  return true;
}

bool is_packed(std::vector<Tensor> weights, std::vector<int64_t> counts, std::vector<Tensor> packed) {
  std::span<const Tensor> rest = weights;
  for (size_t i = 0; i < packed.size(); ++i) {
    const size_t count = static_cast<size_t>(counts[i]);
    if (!agrees(rest.first(count), packed[i])) return false;
    rest = rest.subspan(count);
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
  m.impl("use_huge_pages", TORCH_BOX(&use_huge_pages));
}

}  // namespace fastformer
