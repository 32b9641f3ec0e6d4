// The matrix product of matmul_kernels.h for sm_90a and 16-bit types. A block computes a tile of 128 x 128 or 128 x
// 256. One of its three warpgroups is the producer: a thread has TMA fetch steps of 64 of the depth, kStages ahead. The
// others are consumers of 64 rows each: wgmma multiplies what has come, the operands read from shared memory.
//
// Of each stage a barrier tells that it is full (all its bytes have come), another that it is empty (all consumer warps
// have multiplied it). In the end the product goes through shared memory to the epilogue, in float32.
//
// An operand along the depth is one tile of rows of 64 elements of it; one along the count (M or N) is several tiles of
// 64 of the count, side by side, of 64 rows, one for each of the depth.

#pragma once

#include "matmul_epilogue.h"
#include "tensor_map.h"

namespace fastformer {
namespace {

constexpr int kWarpgroup = 128;   // threads
constexpr int kConsumerWarps = 8;
constexpr int kTileDepth = 64;    // of a step
constexpr int kSquare = 64 * 128;  // bytes of 64 x 64 elements

template <int kN_> struct HopperTile {
  static constexpr int kM = 128, kN = kN_, kWarps = kConsumerWarps, kStages = 4;
  static constexpr int kPitch = kN + 8;  // of the product in shared memory, in floats
  static constexpr int kABytes = kM / 64 * kSquare, kStageBytes = kABytes + kN / 64 * kSquare;
  static constexpr int kPipeline = kStages * kStageBytes, kProduct = kM * kPitch * 4;
  static constexpr int kBarriers = kPipeline > kProduct ? kPipeline : kProduct;  // where they are
  static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
};

// A step of an operand: kCount rows (or columns) from `first` on, its depth from `depth` on.
template <int kCount, bool kDepthAdjacent>
__device__ __forceinline__ void fetch(unsigned char* tile, const TensorMap* map, uint64_t* barrier, int first,
                                      int depth) {
  if constexpr (kDepthAdjacent) {
    ptx::tma_load(tile, map, barrier, depth, first);
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 64; ++i) ptx::tma_load(tile + i * kSquare, map, barrier, first + i * 64, depth);
  }
}

template <class T, class Tile, bool kADepth, bool kBDepth>
__global__ void __launch_bounds__(3 * kWarpgroup, 1)
    matmul_hopper_kernel(const MatmulArgs args, const __grid_constant__ TensorMap a_map,
                         const __grid_constant__ TensorMap b_map) {
  DYNAMIC_SHARED(shared);
  constexpr int kStages = Tile::kStages;
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + Tile::kBarriers);
  uint64_t* empty = full + kStages;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full + stage, 1);
      ptx::mbarrier_init(empty + stage, kConsumerWarps);
    }
    ptx::fence_proxy_async();
  }
  __syncthreads();

  const Place place = place_of_tile<Tile>(args);
  const int64_t begin = blockIdx.y * args.split_depth, end = min(begin + args.split_depth, args.depth);
  const int steps = static_cast<int>((end - begin + kTileDepth - 1) / kTileDepth);

  if (__shfl_sync(~0u, threadIdx.x / kWarpgroup, 0) == 0) {
    ptx::give_registers<40>();
    if (threadIdx.x > 0) return;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages, round = step / kStages;
      unsigned char* a = shared + stage * Tile::kStageBytes;
      const int depth = static_cast<int>(begin) + step * kTileDepth;
      ptx::mbarrier_wait(empty + stage, (round + 1) % 2);
      ptx::mbarrier_arrive_expect_tx(full + stage, Tile::kStageBytes);
      fetch<Tile::kM, kADepth>(a, &a_map, full + stage, static_cast<int>(place.row), depth);
      fetch<Tile::kN, kBDepth>(a + Tile::kABytes, &b_map, full + stage, static_cast<int>(place.column), depth);
    }
    return;
  }

  ptx::take_registers<232>();
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroup, warp = thread / 32, lane = thread % 32;
  const int consumer = __shfl_sync(~0u, thread / kWarpgroup, 0);
  const uint64_t a0 = ptx::wgmma_tile(shared + consumer * kSquare);
  const uint64_t b0 = ptx::wgmma_tile(shared + Tile::kABytes, kBDepth ? 0 : kSquare);
  float d[Tile::kN / 8][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    const uint64_t offset = static_cast<uint64_t>(stage * (Tile::kStageBytes / 16));
    ptx::mbarrier_wait(full + stage, step / kStages % 2);
    ptx::wgmma_fence(d);
#pragma unroll
    for (int k = 0; k < kTileDepth / 16; ++k)
      ptx::wgmma<T, Tile::kN, kADepth, kBDepth>(d, a0 + offset + k * ptx::kNextDepth<kADepth>,
                                                b0 + offset + k * ptx::kNextDepth<kBDepth>, true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // of the step before
    if (step > 0 && lane == 0) ptx::mbarrier_arrive(empty + (step - 1) % kStages);
  }
  ptx::wgmma_wait<0>(d);
  ptx::barrier_sync(1, 2 * kWarpgroup);  // nobody reads operands any more

  float* tile = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int n = 0; n < Tile::kN / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_shared(reinterpret_cast<Vector<float, 2>*>(tile + (warp * 16 + 8 * half + lane / 4) * Tile::kPitch + 8 * n +
                                                       lane % 4 * 2),
                   Vector<float, 2>{d[n][2 * half], d[n][2 * half + 1]});
  ptx::barrier_sync(1, 2 * kWarpgroup);
  finish_tile<T, Tile>(args, tile, place, warp);
}

}  // namespace

template <class T>
void HopperLaunches<T>::matmul(const OnDeviceOf& device, const char* name, MatmulArgs args, const Split& split,
                               bool a_depth_adjacent, bool b_depth_adjacent) {
  const auto start = [&]<class Tile, bool kADepth, bool kBDepth>() {
    const auto map = [&](const OperandArg& operand, bool depth_adjacent, int count) {
      const auto depth = static_cast<uint64_t>(args.depth), rows = static_cast<uint64_t>(operand.count);
      const auto stride = static_cast<uint64_t>(operand.stride) * sizeof(T);
      return depth_adjacent ? tensor_map<T>(operand.data, {depth, rows}, {stride}, {kTileDepth, uint32_t(count)})
                            : tensor_map<T>(operand.data, {rows, depth}, {stride}, {64, kTileDepth});
    };
    launch_tiles<Tile>(device, name, args, split, 3 * kWarpgroup, matmul_hopper_kernel<T, Tile, kADepth, kBDepth>,
                       map(args.a, kADepth, Tile::kM), map(args.b, kBDepth, Tile::kN));
  };
  const auto start_tile = [&]<class Tile>() {
    if (!a_depth_adjacent) return start.template operator()<Tile, false, false>();
    b_depth_adjacent ? start.template operator()<Tile, true, true>() : start.template operator()<Tile, true, false>();
  };
  split.large_tiles ? start_tile.template operator()<HopperTile<256>>()
                    : start_tile.template operator()<HopperTile<128>>();
}

}  // namespace fastformer
