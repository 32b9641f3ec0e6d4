// How the host side of an op starts a kernel.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>
#include <utility>

#include "device.h"

#ifdef __CUDACC__
// Only a CUDA build of torch has it; another one must still be able to load the library, for the schemas.
#pragma weak aoti_torch_get_current_cuda_stream
#endif

namespace fastformer {

// The tensor's device and torch's current stream on it, until the end of the block.
class OnDeviceOf {
 public:
#ifdef __CUDACC__
  explicit OnDeviceOf(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this build of torch has no CUDA");
    void* stream;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
#else
  explicit OnDeviceOf(const torch::stable::Tensor&) {}
#endif
};

// Of the current device; 2 in the simulator, where tests of a few tiles are then of many and of few.
inline int multiprocessors() {
#ifdef __CUDACC__
  int device = 0, count = 0;
  const bool found = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  STD_TORCH_CHECK(found, "CUDA does not tell the device's properties");
  return count;
#else
  return 2;
#endif
}

// Has the current device what sm_90a has beside sm_90? In the simulator: the word `hopper` in FASTFORMER_SIM.
inline bool is_hopper() {
#ifdef __CUDACC__
  int device = 0, major = 0;
  const bool found = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess;
  STD_TORCH_CHECK(found, "CUDA does not tell the device's properties");
  return major == 9;
#else
  return ::sim::options().hopper;
#endif
}

struct Launch {
  const char* kernel;
  std::initializer_list<std::pair<const char*, int64_t>> shape;  // for messages: {"rows", rows}, ...
  dim3 blocks, threads;
  size_t shared_bytes = 0;  // dynamic
};

inline std::string text(const Launch& launch) {
  std::string text = std::string("fastformer_cuda ") + launch.kernel + " (";
  for (const auto& [name, size] : launch.shape)
    text += (text.back() == '(' ? "" : ", ") + std::string(name) + " " + std::to_string(size);
  return text + ")";
}

template <class... Parameters, class... Arguments>
void launch(const OnDeviceOf& device, const Launch& launch, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
#ifdef __CUDACC__
  cudaError_t error = cudaSuccess;
  if (launch.shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(launch.shared_bytes));
  if (error == cudaSuccess) {
    kernel<<<launch.blocks, launch.threads, launch.shared_bytes, device.stream()>>>(arguments...);
    error = cudaGetLastError();
  }
  STD_TORCH_CHECK(error == cudaSuccess, text(launch), ": ", cudaGetErrorString(error));
#else
  (void)device;
  const dim3 b = launch.blocks, t = launch.threads;
  ::sim::launch(text(launch), {b.x, b.y, b.z}, {t.x, t.y, t.z}, launch.shared_bytes, [&] { kernel(arguments...); });
#endif
}

}  // namespace fastformer
