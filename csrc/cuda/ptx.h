// Every instruction that C++ has no name for: PTX under nvcc, and beside it what it does, for the simulator
// (docs/sim.md).
// There is no inline PTX outside this file. Fragment layouts are those of the PTX ISA.
#pragma once

#include <type_traits>

#include "device.h"

namespace fastformer::ptx {

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// ldmatrix: kCount matrices of 8 x 8 elements of 16 bits from shared memory. Lane 8 m + r gives the address of row r of
// matrix m (16 bytes, aligned to them); lane l gets elements 2 (l % 4) and the next of row l / 4 of matrix m in
// registers[m], or of the transposed matrix.
template <int kCount, bool kTranspose = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&registers)[kCount], const void* row SIM_WHERE) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
#ifdef __CUDACC__
  const uint32_t address = shared_address(row);
  if constexpr (kCount == 1 && !kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0]) : "r"(address) : "memory");
  if constexpr (kCount == 1 && kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0]) : "r"(address) : "memory");
  if constexpr (kCount == 2 && !kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1]) : "r"(address) : "memory");
  if constexpr (kCount == 2 && kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1]) : "r"(address) : "memory");
  if constexpr (kCount == 4 && !kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address) : "memory");
  if constexpr (kCount == 4 && kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address) : "memory");
#else
  ::sim::MatrixRows all = {row, kCount, {}};
  ::sim::exchange_rows(all, where);
  const int lane = ::sim::self->lane();
  for (int m = 0; m < kCount; ++m) {
    uint32_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int r = kTranspose ? lane % 4 * 2 + i : lane / 4, c = kTranspose ? lane / 4 : lane % 4 * 2 + i;
      pair[i] = static_cast<const uint16_t*>(all.rows[8 * m + r])[c];
    }
    registers[m] = pair[0] | pair[1] << 16;
  }
#endif
}

// mma.m16n8k16: d (16 x 8, float32) += a (16 x 16, row) b (16 x 8, column), T = f16 or bf16.
// With g = lane / 4, t = lane % 4, pairs of neighbours in one register:
//   a[0..3] rows g, g + 8, g, g + 8, columns 2 t (+ 8 in the last two); b[0..1] rows 2 t, 2 t + 8, column g;
//   d[0..3] row g (+ 8 in the last two), columns 2 t, 2 t + 1.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] SIM_WHERE) {
  constexpr bool kHalf = std::is_same_v<T, f16>;
  static_assert(kHalf || std::is_same_v<T, bf16>);
#ifdef __CUDACC__
  if constexpr (kHalf)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  ::sim::mma_m16n8(kHalf ? ::sim::Operand::f16 : ::sim::Operand::bf16, d, a, b, where);
#endif
}

// mma.m16n8k8: the same of 16 x 8 and 8 x 8 in tf32, given as float32 bits of which the upper 19 count (to_tf32):
//   a[0..3] rows g, g + 8, g, g + 8, columns t (+ 4 in the last two); b[0..1] rows t, t + 4, column g; d as above.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2] SIM_WHERE) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  ::sim::mma_m16n8(::sim::Operand::tf32, d, a, b, where);
#endif
}

// float32 rounded to tf32 (10 bits of fraction), to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#ifdef __CUDACC__
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
#else
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fffffff;  // NaN
  return (bits & 0x7fffffff) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
#endif
}

// cp.async: kBytes (4, 8 or 16, aligned to them) from global to shared memory, zeros after the first source_bytes.
// Complete for the thread itself after cp_async_wait, for others after a barrier that follows.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int source_bytes = kBytes SIM_WHERE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef __CUDACC__
  if constexpr (kBytes == 16)  // past the L1 cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(source_bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :: "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "n"(kBytes), "r"(source_bytes)
                 : "memory");
#else
  const ::sim::Copy copy = {shared, global, kBytes, source_bytes};
  ::sim::copy_start(copy, where);
  ::sim::options().lazy_copies ? ::sim::copy_poison(copy) : ::sim::copy_make(copy);
#endif
}
// Ends a group: the copies since the last one.
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  ::sim::copy_commit();
#endif
}
// Waits for all of this thread's groups but the kGroupsLeft last.
template <int kGroupsLeft> __device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" :: "n"(kGroupsLeft) : "memory");
#else
  for (const ::sim::Copy& copy : ::sim::copy_wait(kGroupsLeft)) ::sim::copy_make(copy);
#endif
}

// bar.sync, bar.arrive: a barrier of the block, id 1 to 15, of `threads` threads (whole warps); arriving does not wait.
__device__ __forceinline__ void barrier_sync(int id, int threads SIM_WHERE) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
#else
  ::sim::barrier(id, threads, false, "bar.sync", where);
#endif
}
__device__ __forceinline__ void barrier_arrive(int id, int threads SIM_WHERE) {
#ifdef __CUDACC__
  asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
#else
  ::sim::barrier_arrive(id, threads, where);
#endif
}

// The same number, of which the compiler knows nothing: what is computed from it inside of a loop is computed there, and
// not held in registers throughout the loop.
__device__ __forceinline__ int opaque(int x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Approximations: 2^x (2 units in the last place, subnormals are 0), tanh(x) (relative error 2^-11), 1 / x.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDACC__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = exp2f(fabsf(x) < 0x1p-126f ? 0 : x);
  return result < 0x1p-126f ? 0 : result;
#endif
}
__device__ __forceinline__ float tanh_approx(float x) {
#ifdef __CUDACC__
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return tanhf(x);
#endif
}
__device__ __forceinline__ float reciprocal_approx(float x) {
#ifdef __CUDACC__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = 1 / (fabsf(x) < 0x1p-126f ? copysignf(0, x) : x);
  return fabsf(result) < 0x1p-126f ? copysignf(0, result) : result;
#endif
}

}  // namespace fastformer::ptx
