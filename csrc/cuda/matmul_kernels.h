// The kernel of every matrix product: a (M, K) b (N, K)^T and its epilogue. A block computes a tile of the output in
// float32, along the depth K in steps of 64 bytes of each row, which cp.async fetches kStages - 1 steps ahead.
//
// bfloat16 and float16: ldmatrix and mma.m16n8k16. float32: multiply-adds on the ordinary units, not 3xTF32, whose
// error is several times that of float32 arithmetic.
//
// In shared memory a row is a row of the operand in memory, elements of the depth or of the other dimension, in chunks
// of 16 bytes; within a row they are swapped so that neither ldmatrix nor the copies have bank conflicts. Operands
// whose rows are not aligned to 16 bytes come element by element: slower, the same numbers.
//
// Operations: 2 M N K. Bound: tensor cores from some hundreds of rows on; memory for few rows.

#pragma once

#include "matmul_epilogue.h"

namespace fastformer {
namespace {

constexpr int kStages = 4;
constexpr int kChunk = 16;  // bytes
template <class T> constexpr int kChunkSize = kChunk / sizeof(T);   // elements
template <class T> constexpr int kStepDepth = 64 / sizeof(T);

// kM x kN elements of the output by kWarpsM x kWarpsN warps.
template <int kM_, int kN_, int kWarpsM, int kWarpsN_> struct Tile {
  static constexpr int kM = kM_, kN = kN_, kWarpsN = kWarpsN_;
  static constexpr int kWarps = kWarpsM * kWarpsN;
  static constexpr int kBlocks = 16 / kWarps;  // of a multiprocessor: a thread may have 128 registers
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kPitch = kN + 8;  // of the product in shared memory, in floats
  static constexpr int kABytes = kM * 64, kBBytes = kN * 64;  // of a step
  static constexpr int kPipeline = kStages * (kABytes + kBBytes), kProduct = kM * kPitch * 4;
  static constexpr int kSharedBytes = kPipeline > kProduct ? kPipeline : kProduct;
};
using LargeTile = Tile<128, 128, 2, 4>;
using SmallTile = Tile<64, 64, 2, 2>;

// Where chunk `chunk` of row `row` is, in chunks.
template <int kChunks> __device__ __forceinline__ int place_of(int row, int chunk) {
  static_assert(kChunks == 4 || kChunks % 8 == 0);
  return row * kChunks + (chunk ^ (kChunks == 4 ? row / 2 % 4 : row % 8));
}

// A step of an operand: kCount rows (or columns) from `first` on, its depth from `begin` on, zeros from `end` on.
template <class T, int kCount, bool kDepthAdjacent, int kThreads> struct Step {
  static constexpr int kRows = kDepthAdjacent ? kCount : kStepDepth<T>;
  static constexpr int kChunks = (kDepthAdjacent ? kStepDepth<T> : kCount) / kChunkSize<T>;  // of a row
  static_assert(kRows * kChunks % kThreads == 0);

  static __device__ __forceinline__ void copy(unsigned char* shared, const OperandArg& operand, int64_t first,
                                              int64_t begin, int64_t end) {
    const int64_t first_row = kDepthAdjacent ? first : begin, first_column = kDepthAdjacent ? begin : first;
    const int64_t rows = kDepthAdjacent ? operand.count : end, columns = kDepthAdjacent ? end : operand.count;
    // f(place, source, count) for the thread's i-th chunk.
    const auto chunk = [&](int i, const auto& f) {
      const int index = static_cast<int>(threadIdx.x) + i * kThreads, row = index / kChunks, chunk = index % kChunks;
      const int64_t left = columns - first_column - chunk * kChunkSize<T>;
      const bool inside = first_row + row < rows && left > 0;
      const int64_t offset = (first_row + row) * operand.stride + first_column + chunk * kChunkSize<T>;
      f(shared + place_of<kChunks>(row, chunk) * kChunk, static_cast<const T*>(operand.data) + (inside ? offset : 0),
        inside ? static_cast<int>(left < kChunkSize<T> ? left : kChunkSize<T>) : 0);
    };
    constexpr int kPerThread = kRows * kChunks / kThreads;
    if (operand.aligned) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
        chunk(i, [](unsigned char* to, const T* from, int count) {
          ptx::cp_async<kChunk>(to, from, count * static_cast<int>(sizeof(T)));
        });
    } else {
#pragma unroll 1
      for (int i = 0; i < kPerThread; ++i)
        chunk(i, [](unsigned char* to, const T* from, int count) {
          store_shared(reinterpret_cast<Vector<T, kChunkSize<T>>*>(to), load<kChunkSize<T>, false>(from, count));
        });
    }
  }
  static __device__ __forceinline__ const unsigned char* at(const unsigned char* shared, int row, int chunk) {
    return shared + place_of<kChunks>(row, chunk) * kChunk;
  }
};

// The product of a warp, in its registers: by tensor cores.
template <class T, class Tile, class A, bool kADepth, class B, bool kBDepth> struct Product {
  static constexpr int kMmaM = Tile::kWarpM / 16, kMmaN = Tile::kWarpN / 8;
  float d[kMmaM][kMmaN][4] = {};

  // 4 matrices of 8 x 8: 16 of the count from `first` on, depth 16 k to 16 k + 15. Lanes 8 j to 8 j + 7 give the rows
  // of matrix j, of which count_half and depth_half say what it is.
  template <class Operand, bool kDepthAdjacent>
  static __device__ __forceinline__ void load(uint32_t (&registers)[4], const unsigned char* shared, int first, int k,
                                              int count_half, int depth_half) {
    const int r = threadIdx.x % 8;
    if constexpr (kDepthAdjacent)
      ptx::ldmatrix<4>(registers, Operand::at(shared, first + 8 * count_half + r, 2 * k + depth_half));
    else
      ptx::ldmatrix<4, true>(registers, Operand::at(shared, 16 * k + 8 * depth_half + r, first / 8 + count_half));
  }

  __device__ __forceinline__ void add(const unsigned char* a_shared, const unsigned char* b_shared, int m0, int n0) {
    const int low = threadIdx.x / 8 % 2, high = threadIdx.x / 16 % 2;
#pragma unroll
    for (int k = 0; k < kStepDepth<T> / 16; ++k) {
      uint32_t a[kMmaM][4], b[kMmaN / 2][4];
#pragma unroll
      for (int m = 0; m < kMmaM; ++m) load<A, kADepth>(a[m], a_shared, m0 + 16 * m, k, low, high);
#pragma unroll
      for (int n = 0; n < kMmaN / 2; ++n) load<B, kBDepth>(b[n], b_shared, n0 + 16 * n, k, high, low);
#pragma unroll
      for (int m = 0; m < kMmaM; ++m)
#pragma unroll
        for (int n = 0; n < kMmaN; ++n)
          ptx::mma_m16n8k16<T>(d[m][n], a[m], {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]});
    }
  }

  __device__ __forceinline__ void store(float* shared, int m0, int n0) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int n = 0; n < kMmaN; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = m0 + 16 * m + 8 * half + lane / 4, column = n0 + 8 * n + lane % 4 * 2;
          store_shared(reinterpret_cast<Vector<float, 2>*>(shared + row * Tile::kPitch + column),
                       Vector<float, 2>{d[m][n][2 * half], d[m][n][2 * half + 1]});
        }
  }
};

// The same by multiply-adds: a warp has 4 x 8 threads, each of them 8 x 4 elements. Which these are depends on what is
// adjacent, so that a thread reads 4 neighbours at once and those of a quarter of a warp are in different banks.
template <class Tile, class A, bool kADepth, class B, bool kBDepth>
struct Product<float, Tile, A, kADepth, B, kBDepth> {
  static_assert(Tile::kWarpM == 32 && Tile::kWarpN == 32);
  float d[8][4] = {};

  static __device__ __forceinline__ int row(int i) {  // element i of 8
    const int y = threadIdx.x % 32 / 8;
    return i / 4 * 16 + (kADepth ? y + i % 4 * 4 : y * 4 + i % 4);
  }
  static __device__ __forceinline__ int column(int j) {
    const int x = threadIdx.x % 8;
    return kBDepth ? x + 8 * j : x * 4 + j;
  }
  static __device__ __forceinline__ Quad read(const unsigned char* chunk) {
    return load_shared(reinterpret_cast<const Quad*>(chunk));
  }

  __device__ __forceinline__ void add(const unsigned char* a_shared, const unsigned char* b_shared, int m0, int n0) {
    float sum[8][4] = {};  // of the step alone: long sums lose digits
#pragma unroll 1  // all at once needs more registers than there are
    for (int k = 0; k < kStepDepth<float>; k += 4) {
      Quad a[8], b[4];  // kDepth: [element][depth]; else [depth][element], of a by halves: [half * 4 + depth]
#pragma unroll
      for (int i = 0; i < 8; ++i)
        a[i] = read(kADepth ? A::at(a_shared, m0 + row(i), k / 4)
                            : A::at(a_shared, k + i % 4, (m0 + row(i / 4 * 4)) / 4));
#pragma unroll
      for (int j = 0; j < 4; ++j)
        b[j] = read(kBDepth ? B::at(b_shared, n0 + column(j), k / 4) : B::at(b_shared, k + j, (n0 + column(0)) / 4));
#pragma unroll
      for (int depth = 0; depth < 4; ++depth)
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            sum[i][j] = fmaf(kADepth ? a[i][depth] : a[i / 4 * 4 + depth][i % 4],
                             kBDepth ? b[j][depth] : b[depth][j], sum[i][j]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) d[i][j] += sum[i][j];
  }

  __device__ __forceinline__ void store(float* shared, int m0, int n0) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float* to = shared + (m0 + row(i)) * Tile::kPitch + n0;
      if constexpr (kBDepth) {
#pragma unroll
        for (int j = 0; j < 4; ++j) store_shared(to + column(j), d[i][j]);
      } else {
        store_shared(reinterpret_cast<Quad*>(to + column(0)), Quad{d[i][0], d[i][1], d[i][2], d[i][3]});
      }
    }
  }
};

// kADepth, kBDepth: are the operand's elements adjacent along the depth?
template <class T, class Tile, bool kADepth, bool kBDepth>
__global__ void __launch_bounds__(32 * Tile::kWarps, Tile::kBlocks) matmul_kernel(const MatmulArgs args) {
  constexpr int kThreads = 32 * Tile::kWarps;
  using A = Step<T, Tile::kM, kADepth, kThreads>;
  using B = Step<T, Tile::kN, kBDepth, kThreads>;
  DYNAMIC_SHARED(shared);
  const auto a_shared = [&](int step) { return shared + step % kStages * (Tile::kABytes + Tile::kBBytes); };

  const auto [row, column] = place_of_tile<Tile>(args);

  const int64_t begin = blockIdx.y * args.split_depth, end = min(begin + args.split_depth, args.depth);
  const int steps = begin < end ? static_cast<int>((end - begin + kStepDepth<T> - 1) / kStepDepth<T>) : 0;
  const auto fetch = [&](int step) {
    if (step < steps) {
      const int64_t depth = begin + int64_t(step) * kStepDepth<T>;
      A::copy(a_shared(step), args.a, row, depth, end);
      B::copy(a_shared(step) + Tile::kABytes, args.b, column, depth, end);
    }
    ptx::cp_async_commit();  // empty ones, too: the groups are counted
  };

  const int warp = threadIdx.x / 32;
  const int m0 = warp / Tile::kWarpsN * Tile::kWarpM, n0 = warp % Tile::kWarpsN * Tile::kWarpN;
  Product<T, Tile, A, kADepth, B, kBDepth> product;
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // the step has come for all threads, and none reads the one before it any more
    fetch(step + kStages - 1);
    product.add(a_shared(step), a_shared(step) + Tile::kABytes, m0, n0);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // nobody reads operands any more

  float* tile = reinterpret_cast<float*>(shared);
  product.store(tile, m0, n0);
  __syncthreads();
  finish_tile<T, Tile>(args, tile, {row, column}, warp);
}

}  // namespace

template <class T>
void Launches<T>::matmul(const OnDeviceOf& device, const char* name, MatmulArgs args, const Split& split,
                         bool a_depth_adjacent, bool b_depth_adjacent) {
  const auto start = [&]<class Tile, bool kADepth, bool kBDepth>() {
    launch_tiles<Tile>(device, name, args, split, 32 * Tile::kWarps, matmul_kernel<T, Tile, kADepth, kBDepth>);
  };
  const auto start_tile = [&]<class Tile>() {
    if (!a_depth_adjacent) return start.template operator()<Tile, false, false>();
    b_depth_adjacent ? start.template operator()<Tile, true, true>() : start.template operator()<Tile, true, false>();
  };
  if constexpr (!std::is_same_v<T, float>)
    if (split.large_tiles) return start_tile.template operator()<LargeTile>();
  start_tile.template operator()<SmallTile>();
}

template <class T> void Launches<T>::finish(const OnDeviceOf& device, const char* name, const FinishArgs& args) {
  const int64_t units = (args.rows + kUnitRows - 1) / kUnitRows * args.column_units;
  const int64_t blocks = (units + kFinishWarps - 1) / kFinishWarps;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "fastformer_cuda takes up to 2^31 - 1 blocks of rows, got ", blocks);
  launch(device,
         {name, {{"rows", args.rows}, {"columns", args.columns}}, dim3(static_cast<unsigned>(blocks)),
          dim3(32 * kFinishWarps)},
         finish_kernel<T>, args);
}

template <class T> void Launches<T>::column_sums(const OnDeviceOf& device, int groups, const ColumnSumsArgs& args) {
  const int64_t blocks = (args.columns + 4 * kSumThreads - 1) / (4 * kSumThreads);
  launch(device,
         {"column_sums", {{"rows", args.rows}, {"columns", args.columns}},
          dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups)), dim3(kSumThreads, kSumRows)},
         column_sums_kernel<T>, args);
}

}  // namespace fastformer
