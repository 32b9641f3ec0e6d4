// What the host side of the CUDA ops shares, besides ../common.h: types, devices.
#pragma once

#include "../common.h"

#include "launch.h"
#include "philox.h"

// The simulator's build of the library takes CPU tensors.
#ifdef __CUDACC__
#define FASTFORMER_DEVICE CUDA
#else
#define FASTFORMER_DEVICE CPU
#endif

namespace fastformer {

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

// A new contiguous tensor on the device of `like`.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  return empty_on(device_type, std::max(like.get_device_index(), 0), shape, type);
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& vector) {
  return vector ? std::optional(torch::stable::contiguous(*vector)) : std::nullopt;
}

inline Dropout make_dropout(double p, const std::optional<Tensor>& seed) {
  Dropout dropout;
  if (p > 0) {
    STD_TORCH_CHECK(seed, "dropout_p > 0 wants a seed");
    dropout.seed = seed->const_data_ptr<int64_t>();
    dropout.threshold = dropout_threshold(p);
    dropout.scale = static_cast<float>(dropout_scale(p));
  }
  return dropout;
}

}  // namespace fastformer
