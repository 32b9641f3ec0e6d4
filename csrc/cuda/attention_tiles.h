// The tiles of attention in shared memory, and their products.
//
// Each warp computes 16 rows of a product; of 8 columns j its lane has the elements that mma.m16n8k16 gives it:
//   c[j][0..3]: row lane / 4 (+ 8 in the last two), columns 8 j + 2 (lane % 4) and the next.
// 16-bit products run on tensor cores, float32 by fused multiply-adds on the same elements: no rounding to tf32.
// 16-bit: scores are in units of log2, exp(x) = exp2(x log2(e)). float32: in natural ones, by expf, as that change of
// units would cost more than all the rest.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention.h"
#include "ptx.h"

namespace fastformer::attention {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr size_t kMostShared = 99 * 1024;  // of a block, on the GPUs that have least: sm_86, sm_89, sm_120

// f.operator()<padded head size>()
template <class F> void with_head_size(const Args& args, F f) {
  const int size = std::max(args.head_dim, args.value_dim);
  if (size <= 64) return f.template operator()<64>();
  if (size <= 128) return f.template operator()<128>();
  f.template operator()<256>();
}
// Columns of an output or a gradient in one block: more of them don't fit the registers. Blocks of the same rows
// compute the scores anew.
template <int kSize> constexpr int kSlice = kSize < 128 ? kSize : 128;
template <int kSize> constexpr int kSlices = kSize / kSlice<kSize>;

inline dim3 blocks_of(int64_t count) {
  STD_TORCH_CHECK(count <= INT32_MAX, "fastformer_cuda takes up to 2^31 - 1 blocks of rows, got ", count);
  return dim3(static_cast<unsigned>(count));
}

struct Position {  // of a row of a tile
  int head, row;   // row: in its sequence
};
struct Span {
  int first, rows;
};

// The rows of a sequence. Bounds that go down or out of the tensor are cut: nothing is read or written outside of it.
__device__ __forceinline__ Span sequence_rows(const Sequences& sequences, int sequence) {
  if (!sequences.bounds) return {0, sequences.total};
  const int32_t* bounds = sequences.bounds + sequence * sequences.stride;
  const int first = min(max(bounds[0], 0), sequences.total);
  return {first, min(max(bounds[sequences.stride], first), sequences.total) - first};
}

// The unit of scores for inputs of type T, and exp and log in it.
template <class T> constexpr float kUnit = std::is_same_v<T, float> ? 1 : kLog2e;
template <class T> __device__ __forceinline__ float exponential(float score) {
  if constexpr (std::is_same_v<T, float>) return expf(score);
  return ptx::exp2_approx(score);
}

template <class T, class X> __device__ __forceinline__ T* row_of(const X& x, int sequence, int head, int row) {
  return static_cast<T*>(x.data) + sequence * x.stride_sequence + head * x.stride_head + row * x.stride_row;
}
__device__ __forceinline__ float* row_of(const Statistics& x, int sequence, int head, int row) {
  return x.data + sequence * x.stride_sequence + head * x.stride_head + row;
}

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }
// Of element e of c[j].
__device__ __forceinline__ int row_of_element(int e, int lane) { return lane / 4 + e / 2 * 8; }
__device__ __forceinline__ int row_of_element(int e) { return row_of_element(e, lane()); }
__device__ __forceinline__ int column_of_element(int j, int e, int lane) { return 8 * j + lane % 4 * 2 + e % 2; }
__device__ __forceinline__ int column_of_element(int j, int e) { return column_of_element(j, e, lane()); }

// ---- Tiles: rows of kSize elements in shared memory, whose 16 bytes are permuted so that the same ones of 8
// neighbouring rows lie in different banks.

template <class T> constexpr int kChunk = 16 / sizeof(T);

// Where a chunk (of 16 bytes) of a row is. `more` is added to the chunk, or to the row but for its offset, where these
// have 0 in its bits: addresses that differ by constants only.
template <class T, int kSize> __device__ __forceinline__ int chunk_at(int row, int chunk, int more = 0) {
  constexpr int kChunks = kSize / kChunk<T>;
  static_assert(kChunks % 4 == 0);
  constexpr int kPermuted = kChunks % 8 == 0 ? 8 : 4;
  const int permuted = more ^ row / (8 / kPermuted) % kPermuted ^ chunk % kPermuted;
  return (row * kChunks + permuted + chunk / kPermuted * kPermuted) * kChunk<T>;
}

// Begins to read kRows rows of `size` elements; row_pointer(row) is null for one of zeros.
template <int kRows, int kSize, int kThreads, class T, class F>
__device__ __forceinline__ void load_tile(T* tile, const Input& x, int size, F row_pointer) {
  constexpr int kChunks = kSize / kChunk<T>;
  const int thread = ptx::opaque(threadIdx.x);
  const auto elements = [&](const T* from, int chunk) {
    return from ? min(max(size - chunk * kChunk<T>, 0), kChunk<T>) : 0;
  };
  if (x.aligned) {
#pragma unroll 2
    for (int i = thread; i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const T* const from = row_pointer(row);
      const int count = elements(from, chunk);
      ptx::cp_async<16>(tile + chunk_at<T, kSize>(row, chunk), count ? from + chunk * kChunk<T> : x.data,
                        count * int(sizeof(T)));
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const T* const from = row_pointer(row);
      const int count = elements(from, chunk);
      Vector<T, kChunk<T>> values = {};
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e)
        if (e < count) values[e] = from[(chunk * kChunk<T> + e) * x.stride_column];
      store_shared(reinterpret_cast<Vector<T, kChunk<T>>*>(tile + chunk_at<T, kSize>(row, chunk)), values);
    }
  }
}
// The same of neighbouring rows of a sequence, `left` of which are there.
template <int kRows, int kSize, int kThreads, class T>
__device__ __forceinline__ void load_tile(T* tile, const Input& x, int size, const T* first, int left) {
  load_tile<kRows, kSize, kThreads>(tile, x, size,
                                    [&](int row) { return row < left ? first + row * x.stride_row : nullptr; });
}

// Writes the warp's 16 rows of c, through its own rows of a tile that nobody else reads. `size` columns are left from
// the tensor's row at row_pointer(row) on; null: a row that is not there.
template <int kSize, int kColumns, class T, class F>
__device__ __forceinline__ void store_rows(const float (&c)[kColumns / 8][4], T* tile, bool aligned, int size,
                                           F row_pointer) {
  __syncwarp();
  const int lane = ptx::opaque(attention::lane());
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = column_of_element(j, 0, lane);
      const Vector<T, 2> pair = {{from_float<T>(c[j][2 * half]), from_float<T>(c[j][2 * half + 1])}};
      T* to = tile + chunk_at<T, kSize>(row_of_element(2 * half, lane), column / kChunk<T>) + column % kChunk<T>;
      store_shared(reinterpret_cast<Vector<T, 2>*>(to), pair);
    }
  __syncwarp();
  constexpr int kChunks = kColumns / kChunk<T>;
#pragma unroll 1
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int row = i / kChunks, chunk = i % kChunks, count = min(size - chunk * kChunk<T>, kChunk<T>);
    T* to = row_pointer(row);
    if (!to || count <= 0) continue;
    const T* from = tile + chunk_at<T, kSize>(row, chunk);
    const auto values = load_shared(reinterpret_cast<const Vector<T, kChunk<T>>*>(from));
    to += chunk * kChunk<T>;
    aligned && count == kChunk<T> ? store<true>(to, values, count) : store<false>(to, values, count);
  }
}

// ---- Products of a warp.

template <int kColumns> using Accumulator = float[kColumns / 8][4];

__device__ __forceinline__ uint32_t pair_of(bf16, float x, float y) {
  const auto pair = __floats2bfloat162_rn(x, y);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
__device__ __forceinline__ uint32_t pair_of(f16, float x, float y) {
  const auto pair = __floats2half2_rn(x, y);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

// The left operand of a product with the transpose of a tile: 16 rows of a tile, for the tensor cores in registers
// where kKept.
template <class T, int kSize, bool kKept> struct LeftRows {
  const T* rows;
  uint32_t kept[kKept ? kSize / 16 : 1][4];

  __device__ explicit LeftRows(const T* rows) : rows(rows) {}
  __device__ __forceinline__ void read(uint32_t (&a)[4], int k) const {
    ptx::ldmatrix<4>(a, rows + chunk_at<T, kSize>(lane() % 16, 2 * k, lane() / 16));
  }
  __device__ __forceinline__ void keep() {
    if constexpr (kKept) {
#pragma unroll
      for (int k = 0; k < kSize / 16; ++k) read(kept[k], k);
    }
  }
};

__device__ __forceinline__ float dot(const Vector<float, 4>& a, const Vector<float, 4>& b) {
  return fmaf(a[3], b[3], fmaf(a[2], b[2], fmaf(a[1], b[1], a[0] * b[0])));
}

// c += a b^T, of kColumns rows of b.
template <int kColumns, int kSize, bool kKept, class T>
__device__ __forceinline__ void multiply_transposed(Accumulator<kColumns>& c, const LeftRows<T, kSize, kKept>& left,
                                                    const T* b) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll 1
    for (int k = 0; k < kSize / 4; ++k) {
      const auto vector = [&](const float* tile, int row) {
        return load_shared(reinterpret_cast<const Vector<float, 4>*>(tile + chunk_at<float, kSize>(row, k)));
      };
      const auto a0 = vector(left.rows, row_of_element(0)), a1 = vector(left.rows, row_of_element(2));
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        const auto b0 = vector(b, column_of_element(j, 0)), b1 = vector(b, column_of_element(j, 1));
        c[j][0] += dot(a0, b0);  // by fours: the error grows slower than in one long sum
        c[j][1] += dot(a0, b1);
        c[j][2] += dot(a1, b0);
        c[j][3] += dot(a1, b1);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kSize / 16; ++k) {
      uint32_t a[4];
      if constexpr (!kKept) left.read(a, k);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t pairs[4];
        const int row = 16 * n + lane() / 16 * 8 + lane() % 8;
        ptx::ldmatrix<4>(pairs, b + chunk_at<T, kSize>(row, 2 * k, lane() / 8 % 2));
        const uint32_t b0[2] = {pairs[0], pairs[1]}, b1[2] = {pairs[2], pairs[3]};
        if constexpr (kKept) {
          ptx::mma_m16n8k16<T>(c[2 * n], left.kept[k], b0);
          ptx::mma_m16n8k16<T>(c[2 * n + 1], left.kept[k], b1);
        } else {
          ptx::mma_m16n8k16<T>(c[2 * n], a, b0);
          ptx::mma_m16n8k16<T>(c[2 * n + 1], a, b1);
        }
      }
    }
  }
}

// Floats in shared memory by which `multiply` hands its left operand from lane to lane.
template <int kRows> constexpr int kScratchStride = kRows % 16 ? kRows : kRows + 8;  // no two rows in the same banks
template <class T, int kRows> constexpr int kScratch = std::is_same_v<T, float> ? 16 * kScratchStride<kRows> : 0;

// c += a b, of kRows rows and kColumns columns of b, which may begin with any 128th column of a tile of kSize.
// 16-bit: a is rounded to b's type.
template <int kRows, int kColumns, int kSize, class T>
__device__ __forceinline__ void multiply(Accumulator<kColumns>& c, const Accumulator<kRows>& a, const T* b,
                                         float* scratch) {
  if constexpr (std::is_same_v<T, float>) {
    constexpr int kStride = kScratchStride<kRows>;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        float* to = scratch + row_of_element(e) * kStride + column_of_element(j, 0);
        store_shared(reinterpret_cast<Vector<float, 2>*>(to), Vector<float, 2>{{a[j][e], a[j][e + 1]}});
      }
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < kRows; k += 4) {
      const auto vector = [&](int row) {
        return load_shared(reinterpret_cast<const Vector<float, 4>*>(scratch + row * kStride + k));
      };
      const auto a0 = vector(row_of_element(0)), a1 = vector(row_of_element(2));
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        constexpr int kPeriod = 4, kPeriods = kColumns / 8 / kPeriod;  // those j that share their addresses at once
        const int j = n % kPeriods * kPeriod + n / kPeriods;
        Vector<float, 4> b0, b1;
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // of row k + i; written so that all addresses are one, but for constants
          const int column = column_of_element(0, 0);
          const int place = chunk_at<float, kSize>(k, column / 4, 2 * (j % kPeriod) ^ i);
          const float* from = b + place + i * kSize + j / kPeriod * 32 + column % 4;
          const auto values = load_shared(reinterpret_cast<const Vector<float, 2>*>(from));
          b0[i] = values[0], b1[i] = values[1];
        }
        c[j][0] += dot(a0, b0);
        c[j][1] += dot(a0, b1);
        c[j][2] += dot(a1, b0);
        c[j][3] += dot(a1, b1);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k) {
      const auto &left = a[2 * k], &right = a[2 * k + 1];
      const uint32_t pairs_a[4] = {pair_of(T(), left[0], left[1]), pair_of(T(), left[2], left[3]),
                                   pair_of(T(), right[0], right[1]), pair_of(T(), right[2], right[3])};
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t pairs[4];
        ptx::ldmatrix<4, true>(pairs, b + chunk_at<T, kSize>(16 * k + lane() % 16, 2 * n, lane() / 16));
        const uint32_t b0[2] = {pairs[0], pairs[1]}, b1[2] = {pairs[2], pairs[3]};
        ptx::mma_m16n8k16<T>(c[2 * n], pairs_a, b0);
        ptx::mma_m16n8k16<T>(c[2 * n + 1], pairs_a, b1);
      }
    }
  }
}

}  // namespace fastformer::attention
