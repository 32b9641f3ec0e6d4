// What sm_90a has beside its threads: barriers that count bytes, the engine that copies tiles, products that run on
// their own. csrc/cuda/ptx_hopper.h calls it. How it stands to the hardware: docs/sim.md.
#pragma once

#include <array>
#include <initializer_list>

#include "sim.h"

namespace sim {

uint32_t shared_address(const void* pointer);  // from the beginning of the block's shared memory

// Phases end when `count` arrivals and all announced bytes have come.
void mbarrier_init(void* barrier, int count, Where where);
void mbarrier_arrive(void* barrier, int bytes_to_come, Where where);
void mbarrier_wait(void* barrier, int parity, Where where);
void fence_proxy_async();

// What cuTensorMapEncodeTiled makes, for elements of 16 bits and rows of 128 bytes whose chunks are swapped.
struct TensorMap {
  static constexpr int kMost = 4;
  const void* data = nullptr;
  int rank = 0;
  uint64_t sizes[kMost] = {}, strides[kMost] = {};  // x first; strides in bytes
  uint32_t box[kMost] = {};
};
// strides: without that of x. Throws std::runtime_error where CUDA returns an error.
TensorMap tensor_map(const void* data, std::initializer_list<uint64_t> sizes, std::initializer_list<uint64_t> strides,
                     std::initializer_list<uint32_t> box);

// Copies a box to shared memory. Lazy: when no thread can go on without it; until then the destination is NaN.
void tensor_load(void* destination, const TensorMap& map, void* barrier, std::array<int, TensorMap::kMost> first,
                 Where where);

// d += a b^T of 64 x n x 16, of which each warp makes its 16 rows. Lazy: when it is waited for; until then d is NaN.
struct Tile {
  uint64_t descriptor;
  bool depth_adjacent;
};
struct Wgmma {
  bool half;  // else bfloat16
  int n;
  bool accumulate;
  Tile a, b;  // a only where it is not in registers
};
void wgmma(const Wgmma& product, float* d, const uint32_t* a_registers, Where where);
void wgmma_fence(Where where);
void wgmma_commit(Where where);
void wgmma_wait(int groups_left, Where where);

void set_registers(int count, Where where);

}  // namespace sim
