// Attention forward for sm_90a and 16-bit types, padded or packed: heads of up to 128, no dropout, no mask but one for
// all queries of a head. It returns what attention_forward.h does, and the backward goes on from it.
//
// A block computes 128 rows of one head (Shah et al., "FlashAttention-3", 2024). One of its three warpgroups is the
// producer: a thread has TMA fetch the queries, then keys and values, 128 at a time, two tiles ahead. The others are
// consumers of 64 rows each: scores by wgmma from shared memory, an online softmax in registers, which then are the
// left operand of wgmma with the values. While one consumer is at its softmax the other may multiply.
//
// Tiles in shared memory are 64 columns wide, those of a row side by side. Barriers: full when all bytes have come,
// empty when all consumer warps are done.
#pragma once

#include "attention_forward.h"
#include "tensor_map.h"

namespace fastformer::attention {

template <int kSize> struct HopperShape {
  static constexpr int kRows = 128, kKeys = 128, kStages = 2, kWarpgroup = 128, kConsumerWarps = 8;
  static constexpr int kTile = 128 * kSize * 2;  // bytes, of queries, keys or values
  static constexpr int kSquares = 128 * 128;     // bytes of 64 columns of a tile
  static constexpr int kStage = 2 * kTile;
  static constexpr int kBarriers = kTile + kStages * kStage;  // where they are
  static constexpr size_t kSharedBytes = kBarriers + 8 * (1 + 4 * kStages);
};

// Where a consumer finds a step of keys (0) or values (1), or the producer a place for it.
template <int kSize> struct HopperPipeline {
  using Shape = HopperShape<kSize>;
  unsigned char* memory;
  uint64_t* barriers;  // of the queries, then two of each stage and kind

  __device__ __forceinline__ unsigned char* tile(int step, int kind) const {
    return memory + Shape::kTile + step % Shape::kStages * Shape::kStage + kind * Shape::kTile;
  }
  __device__ __forceinline__ uint64_t* full(int step, int kind) const {
    return barriers + 1 + 2 * (step % Shape::kStages * 2 + kind);
  }
  __device__ __forceinline__ uint64_t* empty(int step, int kind) const { return full(step, kind) + 1; }
  static __device__ __forceinline__ int parity(int step) { return step / Shape::kStages % 2; }
};

template <class T, int kSize>
__global__ void __launch_bounds__(3 * HopperShape<kSize>::kWarpgroup, 1)
    forward_hopper_kernel(const ForwardArgs args, const __grid_constant__ TensorMap query_map,
                          const __grid_constant__ TensorMap key_map, const __grid_constant__ TensorMap value_map) {
  using Shape = HopperShape<kSize>;
  constexpr int kRows = Shape::kRows, kKeys = Shape::kKeys, kWarpgroup = Shape::kWarpgroup;
  DYNAMIC_SHARED(memory);
  const HopperPipeline<kSize> pipeline = {memory, reinterpret_cast<uint64_t*>(memory + Shape::kBarriers)};

  int index = blockIdx.x;
  const int tile = args.tiles - 1 - index % args.tiles;  // causal: those with most keys begin first
  const int head = (index /= args.tiles) % args.heads, sequence = index / args.heads;
  const int kv_head = head / (args.heads / args.kv_heads);
  const Span queries = sequence_rows(args.queries, sequence), keys = sequence_rows(args.keys, sequence);
  const int first = tile * kRows, rows = min(queries.rows - first, kRows);
  if (rows <= 0) return;
  const Band band = band_of(args, queries.rows, keys.rows);
  int begin = 0, end = keys.rows;
  bool masked = args.mask.data != nullptr;
  const int64_t mask_at = mask_offset(args.mask, sequence, head, 0);
  if (masked) {
    const MaskedKeys shown = keys_of_mask(args.mask, mask_at, begin, end);
    begin = shown.begin, end = shown.end, masked = !shown.plain;
  }
  const Columns columns = visible_columns(first, first + rows - 1, band, begin, end, kKeys);
  const int steps = columns.begin < columns.end ? (columns.end - columns.begin + kKeys - 1) / kKeys : 0;

  if (threadIdx.x == 0) {
    ptx::mbarrier_init(pipeline.barriers, 1);
    for (int step = 0; step < Shape::kStages; ++step)
      for (int kind = 0; kind < 2; ++kind) {
        ptx::mbarrier_init(pipeline.full(step, kind), 1);
        ptx::mbarrier_init(pipeline.empty(step, kind), Shape::kConsumerWarps);
      }
    ptx::fence_proxy_async();
  }
  __syncthreads();

  if (__shfl_sync(~0u, threadIdx.x / kWarpgroup, 0) == 0) {
    ptx::give_registers<24>();
    if (threadIdx.x > 0 || steps == 0) return;
    const auto fetch = [&](unsigned char* to, const TensorMap* map, uint64_t* barrier, int row, int of_head,
                           bool packed) {
      ptx::mbarrier_arrive_expect_tx(barrier, Shape::kTile);
#pragma unroll
      for (int c = 0; c < kSize / 64; ++c)
        ptx::tma_load(to + c * Shape::kSquares, map, barrier, 64 * c, row, of_head, packed ? 0 : sequence);
    };
    fetch(memory, &query_map, pipeline.barriers, queries.first + first, head, args.queries.bounds);
#pragma unroll 1
    for (int step = 0; step < steps; ++step)
#pragma unroll
      for (int kind = 0; kind < 2; ++kind) {
        ptx::mbarrier_wait(pipeline.empty(step, kind), pipeline.parity(step) ^ 1);
        fetch(pipeline.tile(step, kind), kind ? &value_map : &key_map, pipeline.full(step, kind),
              keys.first + columns.begin + step * kKeys, kv_head, args.keys.bounds);
      }
    return;
  }

  ptx::take_registers<240>();
  const int consumer = __shfl_sync(~0u, threadIdx.x / kWarpgroup, 0) - 1;
  const int first_row = 16 * (warp() - kWarpgroup / 32);  // of this warp
  const int own = first + first_row + row_of_element(0);  // this lane's row, and 8 rows further the other one
  const Columns seen = visible_columns(first + 64 * consumer, first + min(64 * consumer + 63, rows - 1), band, begin,
                                       end, kKeys);
  const float scale = args.scale * kUnit<T>;
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {};  // of each row the largest score; this lane's share of the sum
  Accumulator<kSize> out = {};
  if (steps > 0) ptx::mbarrier_wait(pipeline.barriers, 0);

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int start = columns.begin + step * kKeys;
    const bool sees = 64 * consumer < rows && start >= seen.begin && start < seen.end;
    Accumulator<kKeys> p;  // scores, then probabilities
    uint32_t left[kKeys / 16][4];
    ptx::mbarrier_wait(pipeline.full(step, 0), pipeline.parity(step));
    if (sees) {
      const uint64_t q = ptx::wgmma_tile(memory + consumer * 64 * 128), k = ptx::wgmma_tile(pipeline.tile(step, 0));
      ptx::wgmma_fence(p);
#pragma unroll
      for (int i = 0; i < kSize / 16; ++i) {
        const uint64_t offset = i / 4 * (Shape::kSquares / 16) + i % 4 * ptx::kNextDepth<true>;
        ptx::wgmma<T, kKeys, true, true>(p, q + offset, k + offset, i > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>(p);
    }
    __syncwarp();  // all lanes have seen that it is full
    if (lane() == 0) ptx::mbarrier_arrive(pipeline.empty(step, 0));
    if (sees) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) p[j][e] *= scale;
      if (!seen.whole(start, kKeys)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = own + 8 * half;
          const int low = max(row + band.lowest, begin) - start, high = min(row + band.highest + 1, end) - start;
#pragma unroll
          for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e)
              if (column_of_element(j, e) < low || column_of_element(j, e) >= high) p[j][e] = -INFINITY;
        }
      }
      if (masked) {
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = start + column_of_element(j, e);
            if (key >= end) continue;
            const int64_t at = mask_at + key * args.mask.stride_column;
            const bool shows = mask_shows(args.mask, at);
            const float value = args.mask.is_bool ? 0 : mask_value<T>(args.mask, at);
            p[j][e] = shows ? p[j][e] + value : -INFINITY;
            p[j][e + 2] = shows ? p[j][e + 2] + value : -INFINITY;
          }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) online_softmax<T, kKeys, kSize>(half, p, out, m[half], l[half]);
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto& from = p[2 * k + i / 2];
          left[k][i] = pair_of(T(), from[i % 2 * 2], from[i % 2 * 2 + 1]);
        }
    }
    ptx::mbarrier_wait(pipeline.full(step, 1), pipeline.parity(step));
    if (sees) {
      const uint64_t v = ptx::wgmma_tile(pipeline.tile(step, 1), Shape::kSquares);
      ptx::wgmma_fence(out);
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k)
        ptx::wgmma<T, kSize, false>(out, left[k], v + k * ptx::kNextDepth<false>);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>(out);
    }
    __syncwarp();
    if (lane() == 0) ptx::mbarrier_arrive(pipeline.empty(step, 1));
  }

  const auto position = [&](int row) { return Position{head, first + row}; };
  const auto row_pointer = [&]<class X>(const X& x, int row) {
    using Element = std::conditional_t<std::is_same_v<X, Input>, const T, T>;
    return row_of<Element>(x, sequence, head, queries.first + first + row);
  };
  take_again<T, kSize>(out, m, args, masked, sequence, kv_head, keys, band, max(begin, columns.begin), columns.end, 0,
                       first_row, rows, position, row_pointer);
  normalize<T, kSize>(out, m, l, 1);
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (lane() % 4 == 0 && first_row + row_of_element(2 * half) < rows)
      *row_of(args.lse, sequence, head, queries.first + own + 8 * half) = m[half];
  ptx::barrier_sync(1, 2 * kWarpgroup);  // nobody reads queries any more
  store_rows<kSize, kSize>(out, reinterpret_cast<T*>(memory) + first_row * kSize, args.output.aligned, args.value_dim,
                           [&](int row) {
                             return first_row + row < rows ? row_pointer(args.output, first_row + row) : nullptr;
                           });
}

template <class T> void forward_hopper(const OnDeviceOf& device, ForwardArgs args) {
  const auto start = [&]<int kSize>() {
    using Shape = HopperShape<kSize>;
    args.tiles = (args.max_queries + Shape::kRows - 1) / Shape::kRows;
    const int64_t blocks = int64_t(args.sequences) * args.heads * args.tiles;
    if (blocks == 0) return;
    const auto map = [&](const Input& x, int size, const Sequences& rows, int heads) {
      const auto bytes = [](int64_t count, int64_t stride) { return uint64_t(count > 1 ? stride * 2 : 16); };
      return tensor_map<T>(x.data,
                           {uint64_t(size), uint64_t(rows.total), uint64_t(heads),
                            uint64_t(rows.bounds ? 1 : args.sequences)},
                           {bytes(rows.total, x.stride_row), bytes(heads, x.stride_head),
                            bytes(rows.bounds ? 1 : args.sequences, x.stride_sequence)},
                           {64, 128, 1, 1});
    };
    launch(device,
           {"attention_forward",
            {{"sequences", args.sequences}, {"heads", args.heads}, {"queries", args.max_queries},
             {"keys", args.max_keys}, {"head size", args.head_dim}, {"parts", args.parts}},
            blocks_of(blocks), dim3(3 * Shape::kWarpgroup), Shape::kSharedBytes},
           forward_hopper_kernel<T, kSize>, args, map(args.query, args.head_dim, args.queries, args.heads),
           map(args.key, args.head_dim, args.keys, args.kv_heads),
           map(args.value, args.value_dim, args.keys, args.kv_heads));
  };
  std::max(args.head_dim, args.value_dim) <= 64 ? start.template operator()<64>() : start.template operator()<128>();
}

}  // namespace fastformer::attention
