// What every kernel includes: CUDA's own headers under nvcc, those that stand in for them (tests/sim/shim) under g++.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// Shared memory is declared by these macros alone:
//   SHARED_ARRAY(float, name, size)  of a size known to the compiler
//   DYNAMIC_SHARED(name)             unsigned char name[], of the bytes that the launch asks for
// SIM_WHERE ends the parameters of a function that the simulator checks, so that it can name the caller's line;
// SIM_WHERE_ALONE where there are no others.
#ifdef __CUDACC__
#define SHARED_ARRAY(type, name, size) __shared__ type name[size]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define SIM_WHERE
#define SIM_WHERE_ALONE
#else
#define SHARED_ARRAY(type, name, size) \
  static char name##_tag;              \
  const ::sim::Shared<type> name(      \
      static_cast<type*>(::sim::shared_array(&name##_tag, sizeof(type) * (size), alignof(type), #name)), size, #name)
#define DYNAMIC_SHARED(name) unsigned char* const name = ::sim::dynamic_shared()
#define SIM_WHERE , ::sim::Where where = ::sim::Where::current()
#define SIM_WHERE_ALONE ::sim::Where where = ::sim::Where::current()
#endif

namespace fastformer {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

// Neighbours in memory that move by one instruction where they are up to 16 bytes, aligned to their size.
template <class T, int kSize> struct alignas(sizeof(T) * kSize < 16 ? sizeof(T) * kSize : 16) Vector {
  T values[kSize];
  __device__ __forceinline__ T& operator[](int i) { return values[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
};

// The `count` first of kSize elements, zeros after them. kAligned: all or none, at an address for a whole vector.
template <int kSize, bool kAligned, class T>
__device__ __forceinline__ Vector<T, kSize> load(const T* from, int count) {
  Vector<T, kSize> vector = {};
  if constexpr (kAligned) {
    if (count > 0) vector = *reinterpret_cast<const Vector<T, kSize>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (i < count) vector[i] = from[i];
  }
  return vector;
}
template <bool kAligned, class T, int kSize>
__device__ __forceinline__ void store(T* to, const Vector<T, kSize>& vector, int count) {
  if constexpr (kAligned) {
    if (count > 0) *reinterpret_cast<Vector<T, kSize>*>(to) = vector;
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (i < count) to[i] = vector[i];
  }
}

// Shared memory, a whole vector at a time; the simulator checks bounds and alignment and counts bank conflicts.
template <class V> __device__ __forceinline__ V load_shared(const V* from SIM_WHERE) {
#ifndef __CUDACC__
  ::sim::check_shared(from, sizeof(V), alignof(V), "load_shared", where);
  ::sim::note_shared_access(from, sizeof(V), where);
#endif
  return *from;
}
template <class V> __device__ __forceinline__ void store_shared(V* to, const V& value SIM_WHERE) {
#ifndef __CUDACC__
  ::sim::check_shared(to, sizeof(V), alignof(V), "store_shared", where, true);
  ::sim::note_shared_access(to, sizeof(V), where);
#endif
  *to = value;
}

// The sum over the lanes of a warp, the same bits in each of them.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

}  // namespace fastformer
