// What this machine can do at most, for `fastformer bench`: every thread of torch's pool runs one of the loops in
// kernels/ceilings.h. The caller takes the time.
#include "kernels/ceilings.h"

#include <atomic>
#include <string>

#include "common.h"

namespace fastformer {
namespace {

MultiplyAddsKernel* multiply_adds_kernel(bool int8) {
  const std::string isa = kernels().isa;
#if defined(__x86_64__)
  if (int8 && isa == "avx512_vnni") return avx512::multiply_adds_vnni;
  if (int8 && isa == "avx512_amx") return avx512::multiply_adds_amx;
  if (!int8 && isa == "avx2") return avx2::multiply_adds;
  if (!int8 && isa.starts_with("avx512")) return avx512::multiply_adds;
#endif
  STD_TORCH_CHECK(!int8, isa, " has no instruction for products of 8 bits");
  return baseline::multiply_adds;
}

ReadKernel* read_kernel() {
#if defined(__x86_64__)
  const std::string isa = kernels().isa;
  if (isa == "avx2") return avx2::read;
  if (isa.starts_with("avx512")) return avx512::read;
#endif
  return baseline::read;
}

// f(thread) on each thread of the pool.
template <class F> void on_every_thread(const F& f) {
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) f(thread);
  });
}

int64_t multiply_adds(int64_t rounds, bool int8) {
  MultiplyAddsKernel* kernel = multiply_adds_kernel(int8);
  std::atomic<int64_t> operations{0};
  on_every_thread([&](int64_t) { operations += kernel(rounds); });
  return operations;
}

// Bytes read: every thread reads a part of its own, the same one each time.
int64_t read_memory(Tensor memory, int64_t times) {
  constexpr int64_t kUnit = 4096;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t bytes = memory.numel() * memory.element_size() / threads / kUnit * kUnit;
  std::atomic<int32_t> sum{0};  // so that nothing can be left out
  on_every_thread([&](int64_t thread) {
    sum += read_kernel()(static_cast<const char*>(memory.const_data_ptr()) + thread * bytes, bytes, times);
  });
  return bytes * threads * times;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer_cpu, CompositeExplicitAutograd, m) {
  m.impl("multiply_adds", TORCH_BOX(&multiply_adds));
  m.impl("read_memory", TORCH_BOX(&read_memory));
}

}  // namespace fastformer
