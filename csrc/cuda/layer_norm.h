// The kernels of layer_norm and add_layer_norm, forward and backward: a row is read once and stays in registers.
//
// A row has 1 to 32 warps, 4 vectors of 16 bytes (of the wider of the two types) for each thread; narrow rows share a
// block. Statistics in float32: the mean, then the squares around it. The gradients of weight and bias are summed over
// the rows that a thread meets, then over all of them by a second kernel: the order is fixed, the same on every GPU.

#pragma once

#include "common.h"

namespace fastformer {
namespace {

constexpr int kVectors = 4;       // of a thread
constexpr int kMaxColumns = 16384;
constexpr int kMaxGroups = 1024;  // of rows, in the backward

template <class R> constexpr int kVectorSize = 16 / sizeof(R);
template <class R> constexpr int kMaxThreads = kMaxColumns / kVectors / kVectorSize<R>;
constexpr int kNarrowThreads = 256;  // of a block whose rows stay in registers in the backward

// T is the type of the input, R that of the residual, the sum and the output: T's or float32.

struct RowsArg {
  const void* data;
  int64_t stride;
};
struct VectorArg {  // weight or bias, of its own type
  const void* data = nullptr;
  DType dtype = DType::f32;
};

struct ForwardArgs {
  int64_t rows;
  int columns;
  float eps;
  Dropout dropout;
  RowsArg input, residual;
  VectorArg weight, bias;
  void *output, *sum;
  float *mean, *rstd;
};

struct BackwardArgs {
  int64_t rows;
  int columns;
  Dropout dropout;
  RowsArg grad_output, grad_sum, input;  // input: what was normalized
  VectorArg weight;
  const float *mean, *rstd;
  void *grad_input, *grad_residual;
  float* partial;  // (groups, 2, columns): the shares of grad_weight and grad_bias
};

// The columns of a thread: kVectors vectors, `step` apart. Without dropout the threads of a row read side by side; with
// it, a thread's columns are 16 apart, so that one Philox counter gives the bits of kVectors elements.
template <int kSize> struct Columns {
  int first, step;

  __device__ explicit Columns(bool dropout) {
    const int thread = threadIdx.x, threads = blockDim.x;
    constexpr int kPerBlock = 16 / kSize;  // threads that share 64 columns
    first = dropout ? thread / kPerBlock * 64 + thread % kPerBlock * kSize : thread * kSize;
    step = dropout ? 16 : threads * kSize;
  }
  __device__ int operator[](int i) const { return first + i * step; }

  // Bit i * kSize + j: is element j of vector i kept?
  __device__ uint32_t kept(const Dropout& dropout, int64_t row) const {
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
    uint32_t bits = 0;
#pragma unroll 1
    for (int j = 0; j < kSize; ++j) {
      uint32_t words[kVectors];
      philox(words, seed, first / 64 * 16 + first % 16 + j, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32),
             0);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) bits |= uint32_t(words[i] >= dropout.threshold) << (i * kSize + j);
    }
    return bits;
  }
};

template <bool kAligned, int kSize>
__device__ void load_floats(float (&values)[kSize], const VectorArg& arg, int column, int count) {
  const auto convert = [&](const auto* data) {
    const auto vector = load<kSize, kAligned>(data + column, count);
#pragma unroll
    for (int j = 0; j < kSize; ++j) values[j] = to_float(vector[j]);
  };
  switch (arg.dtype) {
    case DType::f32: return convert(static_cast<const float*>(arg.data));
    case DType::bf16: return convert(static_cast<const bf16*>(arg.data));
    case DType::f16: return convert(static_cast<const f16*>(arg.data));
  }
}

// Sums over the threads of a row, for each of them. All threads of the block come here together.
template <int kCount> __device__ void row_sum(float (&values)[kCount]) {
  SHARED_ARRAY(float, scratch, 32 * kCount);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = warp_sum(values[i]);
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;  // of a row
  if (warps == 1) return;
  __syncthreads();  // the sums before these have been read
  if (lane == 0) {
    const int warp = threadIdx.y * warps + threadIdx.x / 32;
    for (int i = 0; i < kCount; ++i) scratch[warp * kCount + i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    values[i] = warp_sum(lane < warps ? scratch[(threadIdx.y * warps + lane) * kCount + i] : 0.0f);
}

// kAligned: every row of every operand, for whole vectors.
template <class T, class R, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads<R>, 1) forward_kernel(const ForwardArgs a) {
  constexpr int kSize = kVectorSize<R>;
  const bool dropout = a.dropout.threshold != 0;
  const Columns<kSize> columns(dropout);
  const float n = static_cast<float>(a.columns);
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int limit = row < a.rows ? a.columns - columns.first : 0;
  const auto left = [&](int i) { return limit - i * columns.step; };  // columns from vector i on
  float x[kVectors][kSize];
  {
    Vector<T, kSize> input[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      input[i] =
          load<kSize, kAligned>(static_cast<const T*>(a.input.data) + row * a.input.stride + columns[i], left(i));
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[i][j] = to_float(input[i][j]);
  }
  if (dropout) {
    const uint32_t kept = columns.kept(a.dropout, row);
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[i][j] = kept >> (i * kSize + j) & 1 ? x[i][j] * a.dropout.scale : 0.0f;
  }
  if (a.residual.data) {
#pragma unroll
    for (int half = 0; half < kVectors; half += 2) {  // all at once would take too many registers
      Vector<R, kSize> sum[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        sum[i] = load<kSize, kAligned>(
            static_cast<const R*>(a.residual.data) + row * a.residual.stride + columns[half + i], left(half + i));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          sum[i][j] = from_float<R>(x[half + i][j] + to_float(sum[i][j]));
          x[half + i][j] = to_float(sum[i][j]);  // as stored: what the backward will see
        }
        store<kAligned>(static_cast<R*>(a.sum) + row * a.columns + columns[half + i], sum[i], left(half + i));
      }
    }
  }

  float total[1] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
#pragma unroll
    for (int j = 0; j < kSize; ++j) total[0] += x[i][j];
  row_sum(total);
  // The deviations from a first mean correct it: exact also where the mean is large beside the variance.
  const float first_mean = total[0] / n;
  float moments[2] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float d = (kAligned ? 0 : j) < left(i) ? x[i][j] - first_mean : 0.0f;
      moments[0] += d;
      moments[1] += d * d;
    }
  row_sum(moments);
  const float shift = moments[0] / n, mean = first_mean + shift;
  const float rstd = 1 / sqrtf(moments[1] / n - shift * shift + a.eps);

#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (left(i) <= 0) continue;
    float weight[kSize], bias[kSize];
    if (a.weight.data) load_floats<kAligned>(weight, a.weight, columns[i], left(i));
    if (a.bias.data) load_floats<kAligned>(bias, a.bias, columns[i], left(i));
    Vector<R, kSize> output;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      float v = (x[i][j] - mean) * rstd;
      if (a.weight.data) v *= weight[j];
      if (a.bias.data) v += bias[j];
      output[j] = from_float<R>(v);
    }
    store<kAligned>(static_cast<R*>(a.output) + row * a.columns + columns[i], output, left(i));
  }
  if (threadIdx.x == 0 && row < a.rows) {
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
}

// With x_hat = (x - mean) rstd and h = grad_output * weight:
// grad_x = rstd (h - mean(h) - x_hat mean(h x_hat)), grad_weight = sum(grad_output x_hat),
// grad_bias = sum(grad_output).
// kNarrow: a row and the shares of grad_weight and grad_bias stay in registers. The threads of a wide block, and those
// of unaligned 16-bit rows, have too few: they read the row again, from the cache, and leave the shares to
// weights_kernel.
template <class T, class R, bool kAligned, bool kNarrow>
__global__ void __launch_bounds__(kNarrow ? kNarrowThreads : kMaxThreads<R>, 1) backward_kernel(const BackwardArgs a) {
  constexpr int kSize = kVectorSize<R>, kKept = kNarrow ? kVectors : 1;
  const bool dropout = a.dropout.threshold != 0;
  const Columns<kSize> columns(dropout);
  const float n = static_cast<float>(a.columns);
  float grad_weight[kKept][kSize] = {}, grad_bias[kKept][kSize] = {};

  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < a.rows; first += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const float mean = row < a.rows ? a.mean[row] : 0, rstd = row < a.rows ? a.rstd[row] : 0;
    const int limit = row < a.rows ? a.columns - columns.first : 0;
    const auto left = [&](int i) { return limit - i * columns.step; };  // columns from vector i on
    const auto load_row = [&](const RowsArg& rows, int i) {
      return load<kSize, kAligned>(static_cast<const R*>(rows.data) + row * rows.stride + columns[i], left(i));
    };
    Vector<R, kSize> g[kKept], x[kKept];
    if constexpr (kNarrow) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        g[i] = load_row(a.grad_output, i);
        x[i] = load_row(a.input, i);
      }
    }
    float sums[2] = {};  // of h and h x_hat
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (left(i) <= 0) continue;
      const Vector<R, kSize> gi = kNarrow ? g[i % kKept] : load_row(a.grad_output, i);
      const Vector<R, kSize> xi = kNarrow ? x[i % kKept] : load_row(a.input, i);
      float weight[kSize];
      if (a.weight.data) load_floats<kAligned>(weight, a.weight, columns[i], left(i));
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float go = to_float(gi[j]), x_hat = (kAligned ? 0 : j) < left(i) ? (to_float(xi[j]) - mean) * rstd : 0.0f;
        const float h = a.weight.data ? go * weight[j] : go;
        sums[0] += h;
        sums[1] += h * x_hat;
        if constexpr (kNarrow) {
          grad_weight[i][j] += go * x_hat;
          grad_bias[i][j] += go;
        }
      }
    }
    row_sum(sums);
    const float mean_h = sums[0] / n, mean_hx = sums[1] / n;
    const uint32_t kept = dropout ? columns.kept(a.dropout, row) : 0;
#pragma unroll(kKept)
    for (int i = 0; i < kVectors; ++i) {
      if (left(i) <= 0) continue;
      const Vector<R, kSize> gi = kNarrow ? g[i % kKept] : load_row(a.grad_output, i);
      const Vector<R, kSize> xi = kNarrow ? x[i % kKept] : load_row(a.input, i);
      Vector<R, kSize> grad_sum, grad_residual;
      Vector<T, kSize> grad_input;
      if (a.grad_sum.data) grad_sum = load_row(a.grad_sum, i);
      float weight[kSize];
      if (a.weight.data) load_floats<kAligned>(weight, a.weight, columns[i], left(i));
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float go = to_float(gi[j]), x_hat = (to_float(xi[j]) - mean) * rstd;
        const float h = a.weight.data ? go * weight[j] : go;
        float grad = (h - mean_h - x_hat * mean_hx) * rstd;
        if (a.grad_sum.data) grad += to_float(grad_sum[j]);
        grad_residual[j] = from_float<R>(grad);
        if (dropout) grad = kept >> (i * kSize + j) & 1 ? grad * a.dropout.scale : 0.0f;
        grad_input[j] = from_float<T>(grad);
      }
      if (a.grad_residual)
        store<kAligned>(static_cast<R*>(a.grad_residual) + row * a.columns + columns[i], grad_residual, left(i));
      store<kAligned>(static_cast<T*>(a.grad_input) + row * a.columns + columns[i], grad_input, left(i));
    }
  }

  if constexpr (kNarrow) {
    float* const partial = a.partial + (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * 2 * a.columns;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const int column = columns[i] + j;
        if (column >= a.columns) continue;
        partial[column] = grad_weight[i][j];
        partial[a.columns + column] = grad_bias[i][j];
      }
  }
}

// The shares of grad_weight and grad_bias of every gridDim.y-th row, for a column in each thread.
template <class R> __global__ void __launch_bounds__(256) weights_kernel(const BackwardArgs a) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= a.columns) return;
  float grad_weight = 0, grad_bias = 0;
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const float g = to_float(static_cast<const R*>(a.grad_output.data)[row * a.grad_output.stride + column]);
    const float x = to_float(static_cast<const R*>(a.input.data)[row * a.input.stride + column]);
    grad_weight += g * ((x - a.mean[row]) * a.rstd[row]);
    grad_bias += g;
  }
  a.partial[int64_t(blockIdx.y) * 2 * a.columns + column] = grad_weight;
  a.partial[(int64_t(blockIdx.y) * 2 + 1) * a.columns + column] = grad_bias;
}

// The sums over the groups: blocks of 32 columns; of grad_weight (blockIdx.y = 0) and grad_bias (1).
constexpr int kSumRows = 16;
__global__ void __launch_bounds__(32 * kSumRows) sum_groups_kernel(const float* partial, int groups, int columns,
                                                            float* grad_weight, float* grad_bias) {
  SHARED_ARRAY(float, sums, 32 * kSumRows);
  const int column = blockIdx.x * 32 + threadIdx.x;
  float sum = 0;
  if (column < columns)
    for (int group = threadIdx.y; group < groups; group += kSumRows)
      sum += partial[(int64_t(group) * 2 + blockIdx.y) * columns + column];
  sums[threadIdx.y * 32 + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= columns) return;
  for (int y = 1; y < kSumRows; ++y) sum += sums[y * 32 + threadIdx.x];
  (blockIdx.y == 0 ? grad_weight : grad_bias)[column] = sum;
}

}  // namespace
}  // namespace fastformer
