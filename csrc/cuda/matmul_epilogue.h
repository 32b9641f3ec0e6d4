// What follows a matrix product, row by row: bias, activation, dropout, residual; the gradients of the same.
#pragma once

#include "matmul_launch.h"

namespace fastformer {
namespace {

// A thread works on 4 times 4 columns, 16 apart, of a row: one Philox counter gives the bits of 4 columns, 16 apart.
constexpr int kQuads = 4;
constexpr int kQuadDistance = 16;
constexpr int kUnitColumns = kQuads * kQuadDistance;  // of 4 threads together
constexpr int kUnitRows = 8;                          // of a warp

// Within a unit of 8 rows x 64 columns. Lanes that access shared memory at the same time have rows 2 apart: with 8
// banks more to a row than the 32, these are in different banks.
__device__ __forceinline__ int row_of_lane(int lane) { return lane / 16 * 4 + lane / 4 % 2 * 2 + lane / 8 % 2; }
__device__ __forceinline__ int column_of_lane(int lane) { return lane % 4 * 4; }

using Quad = Vector<float, 4>;

template <class T>
__device__ __forceinline__ Quad load_quad(const void* data, int64_t offset, int count, bool aligned) {
  const T* from = static_cast<const T*>(data) + offset;
  const Vector<T, 4> loaded = aligned ? load<4, true>(from, count) : load<4, false>(from, count);
  Quad quad;
#pragma unroll
  for (int i = 0; i < 4; ++i) quad[i] = to_float(loaded[i]);
  return quad;
}
template <class T>
__device__ __forceinline__ void store_quad(void* data, int64_t offset, const Quad& quad, int count, bool aligned) {
  T* to = static_cast<T*>(data) + offset;
  Vector<T, 4> rounded;
#pragma unroll
  for (int i = 0; i < 4; ++i) rounded[i] = from_float<T>(quad[i]);
  aligned ? store<true>(to, rounded, count) : store<false>(to, rounded, count);
}

// Bit 4 i + j: does dropout keep element j of the thread's quad i? `column` is that of the first quad.
__device__ __forceinline__ uint32_t kept_by(const Dropout& dropout, int64_t row, int64_t column) {
  if (dropout.threshold == 0) return ~0u;
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  const uint32_t counter = static_cast<uint32_t>(column / 64 * 16 + column % 16);
  uint32_t bits = 0;
#pragma unroll 1
  for (int j = 0; j < 4; ++j) {
    uint32_t words[kQuads];
    philox(words, seed, counter + j, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), 0);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) bits |= uint32_t(words[i] >= dropout.threshold) << (4 * i + j);
  }
  return bits;
}

__device__ __forceinline__ Quad drop(const Dropout& dropout, const Quad& values, uint32_t kept) {
  Quad result;
#pragma unroll
  for (int j = 0; j < 4; ++j) result[j] = kept >> j & 1 ? values[j] * dropout.scale : 0.0f;
  return result;
}

// The 4 columns from `column` on, `count` of them inside of the matrix. kept: 4 bits.
template <class T>
__device__ __forceinline__ void finish(const Epilogue& e, int64_t row, int64_t column, int64_t columns, int count,
                                       Quad values, uint32_t kept) {
  const int64_t offset = row * columns + column;
  if (e.bias) {
    const Quad bias = load_quad<T>(e.bias, column, count, e.aligned);
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] += bias[j];
  }
  if (e.gradient) {
    Quad hidden = {};
    if (e.pre_activation) {
      const Quad pre = load_quad<T>(e.pre_activation, offset, count, e.aligned);
      with_activation(e.activation, [&](auto activation) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Activated at = activation(pre[j]);
          hidden[j] = at.value;
          values[j] *= at.slope;
        }
      });
    }
    if (e.dropout.threshold) hidden = drop(e.dropout, hidden, kept);
    if (e.hidden) store_quad<T>(e.hidden, offset, hidden, count, e.aligned);
  } else {
    if (e.pre_activation) store_quad<T>(e.pre_activation, offset, values, count, e.aligned);
    with_activation(e.activation, [&](auto activation) {
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] = activation(values[j]).value;
    });
  }
  if (e.dropout.threshold) values = drop(e.dropout, values, kept);
  if (e.residual) {
    const Quad residual = load_quad<T>(e.residual, row * e.residual_stride + column, count, e.aligned);
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] += residual[j];
  }
  if (e.output) store_quad<T>(e.output, offset, values, count, e.aligned);
}

// finish(quad, values) for the quads of the thread that are inside of the matrix: values(i) gives the product's.
template <class T, class F>
__device__ __forceinline__ void finish_row(const Epilogue& e, int64_t row, int64_t first_column, int64_t columns,
                                           const F& values) {
  const uint32_t kept = kept_by(e.dropout, row, first_column);
#pragma unroll 1
  for (int i = 0; i < kQuads; ++i) {
    const int64_t column = first_column + i * kQuadDistance, left = columns - column;
    if (left > 0)
      finish<T>(e, row, column, columns, static_cast<int>(left < 4 ? left : 4), values(i), kept >> (4 * i));
  }
}

// Of the output: where a tile begins.
struct Place {
  int64_t row, column;
};

constexpr int kGroupRows = 8;  // of tiles that run together and share operands in L2

// The block's tile: in groups of kGroupRows rows of tiles, column by column.
template <class Tile> __device__ __forceinline__ Place place_of_tile(const MatmulArgs& args) {
  const int64_t group = blockIdx.x / (kGroupRows * args.tiles_n), within = blockIdx.x % (kGroupRows * args.tiles_n);
  const int64_t height = min(args.tiles_m - group * kGroupRows, int64_t(kGroupRows));
  return {(group * kGroupRows + within % height) * Tile::kM, within / height * Tile::kN};
}

// What this warp of Tile::kWarps does of the tile, of which shared memory holds the product.
template <class T, class Tile>
__device__ __forceinline__ void finish_tile(const MatmulArgs& args, const float* tile, Place place, int warp) {
  const int64_t rows = args.a.count, columns = args.b.count;
  constexpr int kUnitsN = Tile::kN / kUnitColumns;
#pragma unroll 1
  for (int unit = warp; unit < Tile::kM / kUnitRows * kUnitsN; unit += Tile::kWarps) {
    const int lane = threadIdx.x % 32;
    const int r = unit / kUnitsN * kUnitRows + row_of_lane(lane);
    const int c = unit % kUnitsN * kUnitColumns + column_of_lane(lane);
    if (place.row + r >= rows) continue;
    const auto values = [&](int i) {
      return load_shared(reinterpret_cast<const Quad*>(tile + r * Tile::kPitch + c + i * kQuadDistance));
    };
    if (!args.partial) {
      finish_row<T>(args.epilogue, place.row + r, place.column + c, columns, values);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int64_t first = place.column + c + i * kQuadDistance, left = columns - first;
      if (left > 0)
        store_quad<float>(args.partial, (blockIdx.y * rows + place.row + r) * columns + first, values(i),
                          static_cast<int>(left < 4 ? left : 4), args.epilogue.aligned);
    }
  }
}

constexpr int kFinishWarps = 4;

template <class T> __global__ void __launch_bounds__(32 * kFinishWarps) finish_kernel(const FinishArgs a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t unit = int64_t(blockIdx.x) * kFinishWarps + warp;
  const int64_t row = unit / a.column_units * kUnitRows + row_of_lane(lane);
  const int64_t first_column = unit % a.column_units * kUnitColumns + column_of_lane(lane);
  if (row >= a.rows) return;
  finish_row<T>(a.epilogue, row, first_column, a.columns, [&](int i) {
    const int64_t column = first_column + i * kQuadDistance;
    const int count = static_cast<int>(a.columns - column < 4 ? a.columns - column : 4);
    if (!a.partial) return load_quad<T>(a.values, row * a.stride + column, count, a.epilogue.aligned);
    Quad sum = {};
    for (int split = 0; split < a.splits; ++split) {
      const Quad part =
          load_quad<float>(a.partial, (split * a.rows + row) * a.columns + column, count, a.epilogue.aligned);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] += part[j];
    }
    return sum;
  });
}

constexpr int kSumThreads = 32, kSumRows = 8;  // of a block, which sums 128 columns

template <class T>
__global__ void __launch_bounds__(kSumThreads * kSumRows) column_sums_kernel(const ColumnSumsArgs a) {
  const int64_t column = (int64_t(blockIdx.x) * kSumThreads + threadIdx.x) * 4;
  const int count = static_cast<int>(min(max(a.columns - column, int64_t(0)), int64_t(4)));
  const int64_t begin = blockIdx.y * a.group_rows, end = min(begin + a.group_rows, a.rows);
  Quad sum = {};
  for (int64_t row = begin + threadIdx.y; row < end; row += kSumRows) {
    const Quad values = load_quad<T>(a.values, row * a.stride + column, count, a.aligned);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] += values[j];
  }
  SHARED_ARRAY(Quad, sums, kSumThreads * kSumRows);
  store_shared(&sums[threadIdx.y * kSumThreads + threadIdx.x], sum);
  __syncthreads();
  if (threadIdx.y > 0) return;
  for (int y = 1; y < kSumRows; ++y) {
    const Quad other = load_shared(&sums[y * kSumThreads + threadIdx.x]);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] += other[j];
  }
  store_quad<float>(a.partial, blockIdx.y * a.columns + column, sum, count, a.columns % 4 == 0);
}

}  // namespace
}  // namespace fastformer
