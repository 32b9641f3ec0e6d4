// What the host side of the ops shares: tensors to pointers, tasks to threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "isa.h"

namespace fastformer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "fastformer_cpu takes float32, float64, bfloat16 and float16");
  }
}
inline DType dtype_of(const Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

// The type that the kernels compute in.
inline ScalarType compute_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }
inline int64_t compute_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// A new contiguous tensor. By the shim's own function: through the dispatcher, by name, it takes a microsecond longer.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  AtenTensorHandle tensor;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), aoti_torch_device_type_cpu(), 0, &tensor));
  return Tensor(tensor);
}
inline Tensor zeros(const std::vector<int64_t>& shape, ScalarType type) {
  Tensor tensor = empty(shape, type);
  return torch::stable::zero_(tensor);
}
inline Tensor to_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}
// A small vector (weight, bias) as the kernels want it: contiguous, compute type.
inline std::optional<Tensor> to_compute(const std::optional<Tensor>& vector, DType dtype) {
  if (!vector) return std::nullopt;
  return torch::stable::contiguous(to_type(*vector, compute_type(dtype)));
}
inline const void* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

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

inline Activation activation_of(const std::optional<std::string>& name) {
  if (!name) return Activation::none;
  if (*name == "gelu") return Activation::gelu;
  if (*name == "gelu_tanh") return Activation::gelu_tanh;
  if (*name == "relu") return Activation::relu;
  if (*name == "silu") return Activation::silu;
  STD_TORCH_CHECK(false, "activation must be gelu, gelu_tanh, relu, silu or None, got ", *name);
}

inline Dropout make_dropout(double p, const std::optional<Tensor>& seed) {
  Dropout dropout;
  if (p > 0) {
    STD_TORCH_CHECK(seed, "dropout_p > 0 wants a seed");
    dropout.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
    dropout.threshold = static_cast<uint32_t>(std::fmin(std::nearbyint(p * 0x1p32), 0x1p32 - 1));
    dropout.scale = p < 1 ? 1 / (1 - p) : 0;
  }
  return dropout;
}

// f(task) for each task, taken one by one by the threads of torch's pool: a thread that is held up delays one task.
template <class F> void parallel_tasks(int64_t tasks, const F& f) {
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(task);
  });
}

// f(begin, end) over rows, in tasks of about `grain` rows.
template <class F> void parallel_rows(int64_t rows, int64_t grain, const F& f) {
  const int64_t tasks = (rows + grain - 1) / grain;
  parallel_tasks(tasks, [&](int64_t task) { f(task * grain, std::min(rows, (task + 1) * grain)); });
}

// Memory of the calling thread, aligned to a cache line, valid until its next call.
inline void* scratch(int64_t bytes) {
  struct Buffer {
    void* memory = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(memory); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < bytes) {
    std::free(buffer.memory);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.memory = std::aligned_alloc(64, buffer.size);
    STD_TORCH_CHECK(buffer.memory, "out of memory: ", buffer.size, " bytes of scratch");
  }
  return buffer.memory;
}

}  // namespace fastformer
