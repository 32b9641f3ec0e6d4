// Stands in for CUDA's runtime under the host code that nvcc compiled: a launch calls back, with the kernel's name as it
// is in the PTX. There is one device, with 2 multiprocessors, as in the simulator; tensors are on the CPU. Of the driver
// there is cuTensorMapEncodeTiled, which writes what tensor_map.py reads.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>

namespace {

using OnLaunch = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, uint64_t shared, void** args);
using OnAllocation = void (*)(void* data, uint64_t bytes);
OnLaunch on_launch = nullptr;
OnAllocation on_allocation = nullptr;
cudaError_t last_error = cudaSuccess;
int capability = 80;
std::map<const void*, const char*>& kernels() {
  static std::map<const void*, const char*> all;
  return all;
}

// tensor_map.FORMAT
struct EncodedMap {
  char magic[10] = {'t', 'e', 'n', 's', 'o', 'r', ' ', 'm', 'a', 'p'};
  char unused = 0;
  uint8_t rank, type, swizzle, interleave, fill;
  uint64_t address, sizes[5], strides[4];
  uint16_t box[5];
  uint8_t steps[5];
};

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  if (rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
  EncodedMap encoded{};
  encoded.rank = rank, encoded.type = type, encoded.swizzle = swizzle;
  encoded.interleave = interleave, encoded.fill = fill, encoded.address = reinterpret_cast<uint64_t>(address);
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (box[i] > 256 || steps[i] > 8) return CUDA_ERROR_INVALID_VALUE;
    encoded.sizes[i] = sizes[i], encoded.box[i] = box[i], encoded.steps[i] = steps[i];
    if (i > 0) encoded.strides[i - 1] = strides[i - 1];
  }
  static_assert(sizeof encoded <= sizeof *map);
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &encoded, sizeof encoded);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

// Of the device: 80 or 90.
__attribute__((visibility("default"))) void set_capability(int number) { capability = number; }

__attribute__((visibility("default"))) void set_callbacks(OnLaunch launch, OnAllocation allocation) {
  on_launch = launch;
  on_allocation = allocation;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[host] = name;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
static Configuration pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
  *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  const auto found = kernels().find(host);
  if (found == kernels().end()) return cudaErrorInvalidDeviceFunction;
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<char*>(found->second));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  const unsigned blocks[] = {grid.x, grid.y, grid.z}, threads[] = {block.x, block.y, block.z};
  const char* name = reinterpret_cast<const char*>(kernel);
  return last_error = on_launch && on_launch(name, blocks, threads, shared, args) == 0 ? cudaSuccess : cudaErrorAssert;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t) { return "the kernel did something wrong"; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 2; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; return cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  if (found) *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// Of torch: a build for CPUs has no CUDA device to guard.
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) { return 0; }
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

// New tensors (the linker's --wrap puts this function in the place of torch's).
int32_t aoti_torch_get_data_ptr(void* tensor, void** data);
int32_t aoti_torch_get_storage_size(void* tensor, int64_t* bytes);
int32_t __real_aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, void**);
int32_t __wrap_aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device, void** tensor) {
  void* data = nullptr;
  int64_t bytes = 0;
  int32_t error = __real_aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device, tensor);
  if (error == 0) error = aoti_torch_get_data_ptr(*tensor, &data);
  if (error == 0) error = aoti_torch_get_storage_size(*tensor, &bytes);
  if (error == 0 && on_allocation) on_allocation(data, static_cast<uint64_t>(bytes));
  return error;
}
}
