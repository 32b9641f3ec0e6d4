// What the host side of the ops shares: tensors to pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "launch.h"
#include "philox.h"

// The simulator's build of the library takes CPU tensors.
#ifdef __CUDACC__
#define FASTFORMER_DEVICE CUDA
#else
#define FASTFORMER_DEVICE CPU
#endif

namespace fastformer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class DType { f32, bf16, f16 };

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "fastformer_cuda takes float32, bfloat16 and float16");
  }
}
inline DType dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// A new contiguous tensor on the device of `like`.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle tensor;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
      std::max(like.get_device_index(), 0), &tensor));
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

inline Dropout make_dropout(double p, const std::optional<Tensor>& seed) {
  Dropout dropout;
  if (p > 0) {
    STD_TORCH_CHECK(seed, "dropout_p > 0 wants a seed");
    dropout.seed = seed->const_data_ptr<int64_t>();
    dropout.threshold = static_cast<uint32_t>(std::fmin(std::nearbyint(p * 0x1p32), 0x1p32 - 1));
    dropout.scale = p < 1 ? static_cast<float>(1 / (1 - p)) : 0;
  }
  return dropout;
}

}  // namespace fastformer
