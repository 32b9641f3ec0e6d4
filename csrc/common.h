// What the host side of the ops shares, on CPUs and GPUs: tensors to pointers, options to numbers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

namespace fastformer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}
// The shape with another last dimension.
inline std::vector<int64_t> with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> shape = shape_of(tensor);
  shape.back() = last;
  return shape;
}

// A new contiguous tensor. By the shim's own function: through the dispatcher, by name, it takes a microsecond longer.
inline Tensor empty_on(int32_t device_type, int32_t device_index, const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  AtenTensorHandle tensor;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type, device_index, &tensor));
  return Tensor(tensor);
}
inline Tensor to_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// A tensor as rows of its last dimension, `stride` elements apart, elements adjacent; copied only where it must be.
struct Rows {
  Tensor tensor;
  int64_t count, columns, stride;
  const void* data;
};
inline Rows rows_of(const Tensor& input) {
  const int64_t dim = input.dim(), columns = input.size(dim - 1);
  int64_t count = 1;
  for (int64_t d = 0; d < dim - 1; ++d) count *= input.size(d);
  bool regular = columns == 1 || input.stride(dim - 1) == 1;
  int64_t stride = 0, expected = -1;  // of a row; of the next dimension to the left
  for (int64_t d = dim - 2; d >= 0 && regular; --d) {
    if (input.size(d) == 1) continue;
    if (expected < 0)
      stride = input.stride(d);
    else
      regular = input.stride(d) == expected;
    expected = input.stride(d) * input.size(d);
  }
  if (regular) return {input, count, columns, expected < 0 ? columns : stride, input.const_data_ptr()};
  Tensor copy = torch::stable::contiguous(input);
  return {copy, count, columns, columns, copy.const_data_ptr()};
}

// E: the library's own enum.
template <class E> E activation_named(const std::optional<std::string>& name) {
  if (!name) return E::none;
  if (*name == "gelu") return E::gelu;
  if (*name == "gelu_tanh") return E::gelu_tanh;
  if (*name == "relu") return E::relu;
  if (*name == "silu") return E::silu;
  STD_TORCH_CHECK(false, "activation must be gelu, gelu_tanh, relu, silu or None, got ", *name);
}

// Of dropout: random words below it drop the element; what is kept is multiplied by the scale.
inline uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(std::fmin(std::nearbyint(p * 0x1p32), 0x1p32 - 1));
}
inline double dropout_scale(double p) { return p < 1 ? 1 / (1 - p) : 0; }

}  // namespace fastformer
