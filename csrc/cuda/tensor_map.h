// The host side of TMA: what a kernel gets of a tensor, to copy tiles of it.
#pragma once

#include <initializer_list>

#include "launch.h"
#include "ptx_hopper.h"

namespace fastformer {

// Of 16-bit elements, sizes and box beginning with what is adjacent, of which a box has 64; strides in bytes, of the
// other dimensions. Data and strides are aligned to 16 bytes. Outside of the tensor it is zero.
template <class T>
TensorMap tensor_map(const void* data, std::initializer_list<uint64_t> sizes, std::initializer_list<uint64_t> strides,
                     std::initializer_list<uint32_t> box) {
#ifdef __CUDACC__
  using Encode = decltype(&cuTensorMapEncodeTiled);  // of the driver, which the library is not linked with
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    STD_TORCH_CHECK(error == cudaSuccess && found == cudaDriverEntryPointSuccess,
                    "CUDA's driver has no cuTensorMapEncodeTiled: fastformer's kernels for Hopper want CUDA 12.0");
    return reinterpret_cast<Encode>(function);
  }();
  TensorMap map;
  const uint32_t one[] = {1, 1, 1, 1};
  const CUresult error = encode(
      &map, std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      static_cast<uint32_t>(sizes.size()), const_cast<void*>(data), sizes.begin(), strides.begin(), box.begin(), one,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(error == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", static_cast<int>(error));
  return map;
#else
  return ::sim::tensor_map(data, sizes, strides, box);
#endif
}

}  // namespace fastformer
