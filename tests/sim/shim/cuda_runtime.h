// Stands in for CUDA's header of this name when g++ compiles a kernel: the part of the language that the kernels use.
#pragma once

#include <math.h>

#include <bit>
#include <type_traits>

#include "sim.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

using uint = unsigned;
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define threadIdx (::sim::self->thread_index)
#define blockIdx (::sim::self->block_index)
#define blockDim (::sim::self->block_dim)
#define gridDim (::sim::self->grid_dim)
constexpr int warpSize = 32;

// Threads of a block and of a warp wait for each other.

inline void __syncthreads(sim::Where where = sim::Where::current()) {
  sim::barrier(0, static_cast<int>(blockDim.x * blockDim.y * blockDim.z), false, "__syncthreads", where);
}
inline int __syncthreads_count(int predicate, sim::Where where = sim::Where::current()) {
  return sim::barrier(0, static_cast<int>(blockDim.x * blockDim.y * blockDim.z), predicate, "__syncthreads_count",
                      where);
}
inline int __syncthreads_or(int predicate, sim::Where where = sim::Where::current()) {
  return __syncthreads_count(predicate, where) != 0;
}
inline int __syncthreads_and(int predicate, sim::Where where = sim::Where::current()) {
  return __syncthreads_count(!predicate, where) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, sim::Where where = sim::Where::current()) { sim::sync_warp(mask, where); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { sim::yield(); }

namespace sim {

template <class T> T shuffle_value(const char* name, unsigned mask, T value, int source, Where where) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(name, mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace sim

// The source lane is within the segment of `width` lanes; where it would lie outside (up, down, xor) it is the lane
// itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, sim::Where where = sim::Where::current()) {
  const int own = sim::self->lane();
  return sim::shuffle_value("__shfl_sync", mask, value, (own & ~(width - 1)) | (lane & (width - 1)), where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, sim::Where where = sim::Where::current()) {
  const int own = sim::self->lane(), source = own - static_cast<int>(delta);
  return sim::shuffle_value("__shfl_up_sync", mask, value, source < (own & ~(width - 1)) ? own : source, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, sim::Where where = sim::Where::current()) {
  const int own = sim::self->lane(), source = own + static_cast<int>(delta);
  return sim::shuffle_value("__shfl_down_sync", mask, value, source > (own | (width - 1)) ? own : source, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, sim::Where where = sim::Where::current()) {
  const int own = sim::self->lane(), source = own ^ lane_mask;
  return sim::shuffle_value("__shfl_xor_sync", mask, value, source > (own | (width - 1)) ? own : source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, sim::Where where = sim::Where::current()) {
  return sim::ballot("__ballot_sync", mask, predicate, where);
}
inline int __any_sync(unsigned mask, int predicate, sim::Where where = sim::Where::current()) {
  return sim::ballot("__any_sync", mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, sim::Where where = sim::Where::current()) {
  return sim::ballot("__all_sync", mask, !predicate, where) == 0;
}
template <class T> unsigned __match_any_sync(unsigned mask, T value, sim::Where where = sim::Where::current()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return sim::match_any(mask, bits, where);
}
inline unsigned __activemask() { return sim::active_mask(); }

#define SIM_REDUCE(name, reduction)                                                                               \
  inline unsigned name(unsigned mask, unsigned value, sim::Where where = sim::Where::current()) {                 \
    return sim::reduce(#name, mask, value, sim::Reduction::reduction, false, where);                              \
  }                                                                                                               \
  inline int name(unsigned mask, int value, sim::Where where = sim::Where::current()) {                           \
    return static_cast<int>(                                                                                      \
        sim::reduce(#name, mask, static_cast<unsigned>(value), sim::Reduction::reduction, true, where));          \
  }
SIM_REDUCE(__reduce_add_sync, add)
SIM_REDUCE(__reduce_min_sync, min)
SIM_REDUCE(__reduce_max_sync, max)
SIM_REDUCE(__reduce_and_sync, bit_and)
SIM_REDUCE(__reduce_or_sync, bit_or)
SIM_REDUCE(__reduce_xor_sync, bit_xor)
#undef SIM_REDUCE

// Atomics: real ones, so that ThreadSanitizer knows them.

namespace sim {

template <class T, class F> T atomic_update(T* address, F f) {
  using Bits = std::conditional_t<sizeof(T) == 8, unsigned long long, unsigned>;
  auto* bits = reinterpret_cast<Bits*>(address);
  Bits old = __atomic_load_n(bits, __ATOMIC_ACQUIRE);
  while (!__atomic_compare_exchange_n(bits, &old, std::bit_cast<Bits>(static_cast<T>(f(std::bit_cast<T>(old)))), false,
                                      __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
  }
  return std::bit_cast<T>(old);
}

}  // namespace sim

template <class T> T atomicAdd(T* a, std::type_identity_t<T> v) {
  return sim::atomic_update(a, [&](T old) { return old + v; });
}
template <class T> T atomicSub(T* a, std::type_identity_t<T> v) {
  return sim::atomic_update(a, [&](T old) { return old - v; });
}
template <class T> T atomicMax(T* a, std::type_identity_t<T> v) {
  return sim::atomic_update(a, [&](T old) { return old < v ? v : old; });
}
template <class T> T atomicMin(T* a, std::type_identity_t<T> v) {
  return sim::atomic_update(a, [&](T old) { return v < old ? v : old; });
}
template <class T> T atomicAnd(T* a, std::type_identity_t<T> v) {
  return sim::atomic_update(a, [&](T old) { return old & v; });
}
template <class T> T atomicOr(T* a, std::type_identity_t<T> v) {
  return sim::atomic_update(a, [&](T old) { return old | v; });
}
template <class T> T atomicExch(T* a, std::type_identity_t<T> v) {
  return sim::atomic_update(a, [&](T) { return v; });
}
template <class T> T atomicCAS(T* a, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return sim::atomic_update(a, [&](T old) { return old == expected ? v : old; });
}
inline unsigned atomicInc(unsigned* a, unsigned limit) {
  return sim::atomic_update(a, [&](unsigned old) { return old >= limit ? 0 : old + 1; });
}

// Arithmetic. Where the hardware approximates, this is exact to the last place or two of float.

template <class T> T __ldg(const T* p) { return *p; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t(a) * b >> 32); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (x >> i & 1) << (31 - i);
  return result;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 15;
    unsigned byte = bytes >> 8 * (pick & 7) & 0xff;
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1 / sqrt(static_cast<double>(x))); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }

#define SIM_MIN_MAX(type)                                         \
  inline type min(type a, type b) { return b < a ? b : a; }       \
  inline type max(type a, type b) { return a < b ? b : a; }
SIM_MIN_MAX(int)
SIM_MIN_MAX(unsigned)
SIM_MIN_MAX(long)
SIM_MIN_MAX(unsigned long)
SIM_MIN_MAX(long long)
#undef SIM_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
