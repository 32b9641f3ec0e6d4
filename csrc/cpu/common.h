// What the host side of the CPU ops shares, besides ../common.h: types, tasks to threads.
#pragma once

#include "../common.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>

#include "isa.h"

namespace fastformer {

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
inline int64_t element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// A new contiguous tensor.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType type) {
  return empty_on(aoti_torch_device_type_cpu(), 0, shape, type);
}
inline Tensor zeros(const std::vector<int64_t>& shape, ScalarType type) {
  Tensor tensor = empty(shape, type);
  return torch::stable::zero_(tensor);
}
// For large memory that nobody has written to yet: the first write to each page takes as long as the writing, and what is
// read from end to end, as a GPT's weights for each token, is read faster (bench/NOTES.md). The system gives huge pages if it
// can and wants to.
inline void use_huge_pages(Tensor memory) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr()), offset = address % kPage;
  madvise(reinterpret_cast<void*>(address - offset), offset + memory.numel() * memory.element_size(), MADV_HUGEPAGE);
#endif
}
// A small vector (weight, bias) as the kernels want it: contiguous, compute type.
inline std::optional<Tensor> to_compute(const std::optional<Tensor>& vector, DType dtype) {
  if (!vector) return std::nullopt;
  return torch::stable::contiguous(to_type(*vector, compute_type(dtype)));
}
inline const void* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

inline Activation activation_of(const std::optional<std::string>& name) { return activation_named<Activation>(name); }

inline Dropout make_dropout(double p, const std::optional<Tensor>& seed) {
  Dropout dropout;
  if (p > 0) {
    STD_TORCH_CHECK(seed, "dropout_p > 0 wants a seed");
    dropout.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
    dropout.threshold = dropout_threshold(p);
    dropout.scale = dropout_scale(p);
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

// Memory that is kept for the next call and grows, aligned to a cache line.
struct Buffer {
  void* memory = nullptr;
  int64_t size = 0;

  void* of(int64_t bytes) {
    if (size < bytes) {
      std::free(memory);
      size = 0;
      memory = std::aligned_alloc(64, (bytes + 4095) / 4096 * 4096);
      STD_TORCH_CHECK(memory, "out of memory: ", bytes, " bytes of scratch");
      size = bytes;
    }
    return memory;
  }
  ~Buffer() { std::free(memory); }
};

// Memory of the calling thread, valid until its next call.
inline void* scratch(int64_t bytes) {
  static thread_local Buffer buffer;
  return buffer.of(bytes);
}

}  // namespace fastformer
