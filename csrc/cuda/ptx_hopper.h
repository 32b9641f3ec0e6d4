// The instructions of sm_90a that ptx.h does not have: barriers in shared memory that count bytes, copies of tiles by
// the tensor memory accelerator (TMA), products of a warpgroup (4 warps) that read shared memory by themselves. As in
// ptx.h, each stands beside what it does, for the simulator.
//
// Tiles in shared memory are rows of 128 bytes, aligned to 1024 bytes, whose chunks of 16 bytes are swapped: bits 4 to
// 6 of an address are xored with bits 7 to 9. TMA writes them so, and wgmma reads them so.
#pragma once

#include "ptx.h"

#ifdef __CUDACC__
#include <cuda.h>
#else
#include "hopper.h"
#endif

namespace fastformer {

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = ::sim::TensorMap;
#endif

namespace ptx {

// A barrier in shared memory: a phase ends when `count` arrivals and all announced bytes have come; phases are counted.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count SIM_WHERE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(count) : "memory");
#else
  ::sim::mbarrier_init(barrier, count, where);
#endif
}
// What this thread did to shared memory, mbarrier_init included, comes before what TMA and wgmma do there.
__device__ __forceinline__ void fence_proxy_async() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  ::sim::fence_proxy_async();
#endif
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier SIM_WHERE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
#else
  ::sim::mbarrier_arrive(barrier, 0, where);
#endif
}
// An arrival that announces bytes, which copies are to bring.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes SIM_WHERE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
#else
  ::sim::mbarrier_arrive(barrier, bytes, where);
#endif
}
// Waits for the end of the phase of that parity: the current one, or at once if it is the one before. Phase 0 has
// parity 0; a new barrier lets parity 1 pass.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity SIM_WHERE) {
#ifdef __CUDACC__
  uint32_t done = 0;
  while (!done)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#else
  ::sim::mbarrier_wait(barrier, parity, where);
#endif
}

// Copies the map's box at these places (x along what is adjacent) to `tile`, zeros for what is outside of the tensor;
// `barrier` then counts the bytes of the whole box. Of maps of 2 and of 4 dimensions.
__device__ __forceinline__ void tma_load(void* tile, const TensorMap* map, uint64_t* barrier, int x, int y SIM_WHERE) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
               :: "r"(shared_address(tile)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y) : "memory");
#else
  ::sim::tensor_load(tile, *map, barrier, {x, y}, where);
#endif
}
__device__ __forceinline__ void tma_load(void* tile, const TensorMap* map, uint64_t* barrier, int x, int y, int z,
                                         int w SIM_WHERE) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6}], [%2];"
               :: "r"(shared_address(tile)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
#else
  ::sim::tensor_load(tile, *map, barrier, {x, y, z, w}, where);
#endif
}

// wgmma: products of a warpgroup, which run beside it. In front of them, after registers of theirs have changed: fence.
// After some of them: commit. Then, until wgmma_wait, neither these registers nor the tiles in shared memory may
// change. Naming the registers keeps the compiler from moving what it does to them across.
template <int kBlocks> __device__ __forceinline__ void hold(float (&registers)[kBlocks][4]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < 4 * kBlocks; ++i) asm volatile("" : "+f"(registers[i / 4][i % 4]) :: "memory");
#else
  (void)registers;
#endif
}
template <int kBlocks> __device__ __forceinline__ void wgmma_fence(float (&d)[kBlocks][4] SIM_WHERE) {
  hold(d);
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  ::sim::wgmma_fence(where);
#endif
}
__device__ __forceinline__ void wgmma_commit(SIM_WHERE_ALONE) {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  ::sim::wgmma_commit(where);
#endif
}
// Until at most kGroupsLeft committed groups of products are under way.
template <int kGroupsLeft> __device__ __forceinline__ void wgmma_wait(SIM_WHERE_ALONE) {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(kGroupsLeft) : "memory");
#else
  ::sim::wgmma_wait(kGroupsLeft, where);
#endif
}
// The same, after which d is read.
template <int kGroupsLeft, int kBlocks> __device__ __forceinline__ void wgmma_wait(float (&d)[kBlocks][4] SIM_WHERE) {
#ifdef __CUDACC__
  wgmma_wait<kGroupsLeft>();
#else
  wgmma_wait<kGroupsLeft>(where);
#endif
  hold(d);
}

// How wgmma finds a tile in shared memory: its address, or that of a part of it, and, for rows along the count (M or N)
// in several tiles side by side, the distance from one to the next.
__device__ __forceinline__ uint64_t wgmma_tile(const void* tile, int distance = 0) {
#ifdef __CUDACC__
  const uint32_t address = shared_address(tile);
#else
  const uint32_t address = ::sim::shared_address(tile);
#endif
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kEightRows = uint64_t(1024 / 16) << 32;
  return kSwizzle128 | kEightRows | uint64_t(static_cast<uint32_t>(distance) / 16) << 16 | address / 16;
}
// What to add to it for the next 16 of the depth.
template <bool kDepthAdjacent> constexpr uint64_t kNextDepth = (kDepthAdjacent ? 32 : 16 * 128) / 16;

#ifdef __CUDACC__
#define FF_D32                                                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FF_D64                                                                                                       \
  FF_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
         "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FF_D128                                                                                                       \
  FF_D64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
         "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, "   \
         "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, "      \
         "%122, %123, %124, %125, %126, %127"
#define FF_F4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define FF_F16(j) FF_F4(j), FF_F4(j + 1), FF_F4(j + 2), FF_F4(j + 3)
#define FF_F32(j) FF_F16(j), FF_F16(j + 4)
#define FF_F64(j) FF_F32(j), FF_F32(j + 8)
#define FF_WGMMA(n, type, names, a, b, accumulates, by_count_a, by_count_b, ...)                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulates ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n      \
               "k16.f32." #type "." #type " {" names "}, %" #a ", %" #b ", p, 1, 1, %" #by_count_a ", %" #by_count_b \
               ";\n}"                                                                                              \
               : __VA_ARGS__                                                                                       \
               : "l"(a_tile), "l"(b_tile), "r"(static_cast<int>(accumulate)), "n"(!kADepth), "n"(!kBDepth)          \
               : "memory")
#define FF_WGMMA_A(n, type, names, a_names, b, accumulates, by_count_b, ...)                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulates ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n      \
               "k16.f32." #type "." #type " {" names "}, {" a_names "}, %" #b ", p, 1, 1, %" #by_count_b ";\n}"     \
               : __VA_ARGS__                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_tile), "r"(1), "n"(!kBDepth)                    \
               : "memory")
#endif

// d (64 x kN, float32) = a (64 x 16) b (kN x 16)^T, + d if `accumulate`; T = f16 or bf16. kADepth, kBDepth: are the
// rows in shared memory along the depth (64 of it), or along M and N (64 of these)?
// Warp w of the four, lane l: d[j][i] is in row 16 w + l / 4 (+ 8 for i = 2, 3), column 8 j + 2 (l % 4) + i % 2.
template <class T, int kN, bool kADepth, bool kBDepth>
__device__ __forceinline__ void wgmma(float (&d)[kN / 8][4], uint64_t a_tile, uint64_t b_tile,
                                      bool accumulate SIM_WHERE) {
  constexpr bool kHalf = std::is_same_v<T, f16>;
  static_assert(kHalf || std::is_same_v<T, bf16>);
  static_assert(kN == 128 || kN == 256);
#ifdef __CUDACC__
  if constexpr (kN == 128 && kHalf) FF_WGMMA(128, f16, FF_D64, 64, 65, 66, 67, 68, FF_F64(0));
  if constexpr (kN == 128 && !kHalf) FF_WGMMA(128, bf16, FF_D64, 64, 65, 66, 67, 68, FF_F64(0));
  if constexpr (kN == 256 && kHalf) FF_WGMMA(256, f16, FF_D128, 128, 129, 130, 131, 132, FF_F64(0), FF_F64(16));
  if constexpr (kN == 256 && !kHalf) FF_WGMMA(256, bf16, FF_D128, 128, 129, 130, 131, 132, FF_F64(0), FF_F64(16));
#else
  ::sim::wgmma({.half = kHalf, .n = kN, .accumulate = accumulate, .a = {a_tile, kADepth}, .b = {b_tile, kBDepth}}, d[0],
               nullptr, where);
#endif
}

// d += a b^T of the same, kN = 64 or 128, with a in registers: of each warp its 16 rows, as for mma.m16n8k16. They may
// not change until wgmma_wait, either.
template <class T, int kN, bool kBDepth>
__device__ __forceinline__ void wgmma(float (&d)[kN / 8][4], const uint32_t (&a)[4], uint64_t b_tile SIM_WHERE) {
  constexpr bool kHalf = std::is_same_v<T, f16>;
  static_assert(kHalf || std::is_same_v<T, bf16>);
  static_assert(kN == 64 || kN == 128);
#ifdef __CUDACC__
  if constexpr (kN == 64 && kHalf) FF_WGMMA_A(64, f16, FF_D32, "%32, %33, %34, %35", 36, 37, 38, FF_F32(0));
  if constexpr (kN == 64 && !kHalf) FF_WGMMA_A(64, bf16, FF_D32, "%32, %33, %34, %35", 36, 37, 38, FF_F32(0));
  if constexpr (kN == 128 && kHalf) FF_WGMMA_A(128, f16, FF_D64, "%64, %65, %66, %67", 68, 69, 70, FF_F64(0));
  if constexpr (kN == 128 && !kHalf) FF_WGMMA_A(128, bf16, FF_D64, "%64, %65, %66, %67", 68, 69, 70, FF_F64(0));
#else
  ::sim::wgmma({.half = kHalf, .n = kN, .accumulate = true, .a = {}, .b = {b_tile, kBDepth}}, d[0], a, where);
#endif
}

// Gives registers of this warpgroup's threads back to the block, down to kCount each; takes them, up to kCount.
template <int kCount> __device__ __forceinline__ void give_registers(SIM_WHERE_ALONE) {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(kCount));
#else
  ::sim::set_registers(kCount, where);
#endif
}
template <int kCount> __device__ __forceinline__ void take_registers(SIM_WHERE_ALONE) {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(kCount));
#else
  ::sim::set_registers(kCount, where);
#endif
}

}  // namespace ptx
}  // namespace fastformer
