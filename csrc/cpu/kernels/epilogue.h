// What matrix products do with their sums before they store them.
#pragma once

#include "lanes.h"
#include "philox.h"
#include "vecmath.h"

namespace fastformer::FASTFORMER_ISA {

constexpr int64_t kAhead = 4096;  // bytes of b that come into L2 before a few rows, which wait for memory, read them

// Which matrices are too large for a core's L2: they are written past the caches, which saves reading them first.
struct Streams {
  bool output = false, pre_activation = false;

  Streams() = default;
  explicit Streams(const GemmArgs& g) {
    constexpr int64_t kL2 = 2 << 20;
    const int64_t size = g.dtype == DType::f64 ? 8 : 4;
    const bool large = (g.dtype == DType::f64 || g.dtype == DType::f32) && g.rows * g.columns * size > kL2;
    const auto aligned = [&](const void* data, int64_t stride) {
      return uintptr_t(data) % kVecBytes == 0 && stride * size % kVecBytes == 0;
    };
    // A product within a larger op goes to scratch memory, which is used again.
    output = large && !g.output_is_compute_type && aligned(g.output, g.output_stride);
    pre_activation = large && g.pre_activation && !g.gradient && aligned(g.pre_activation, g.columns);
  }
};

// One row of a panel: acc (compute type) to the output.
template <class T, Activation ACTIVATION>
static void epilogue_row(const GemmArgs& g, int64_t row, int64_t column, int width, const compute_t<T>* acc,
                         Streams streams) {
  using S = compute_t<T>;
  const S* bias = g.bias ? (const S*)g.bias + column : nullptr;
  const T* residual = g.residual ? (const T*)g.residual + row * g.residual_stride + column : nullptr;
  T* pre = g.pre_activation ? (T*)g.pre_activation + row * g.columns + column : nullptr;
  RowDropout dropout(g.dropout, uint64_t(row));
  for_columns<S>(width, [&](int64_t c, int lanes) {
    Vec<S> v = load(acc + c);
    if (bias) v += load_lanes(bias + c, lanes);
    if (g.gradient) {
      if (g.dropout.threshold) v = dropout.apply<S>(v, column + c);
      if (pre) v *= activation_gradient<S>(ACTIVATION, load_lanes(pre + c, lanes));
    } else {
      if (pre) streams.pre_activation ? stream_lanes(pre + c, v, lanes) : store_lanes(pre + c, v, lanes);
      v = activate<S>(ACTIVATION, v);
      if (g.dropout.threshold) v = dropout.apply<S>(v, column + c);
    }
    if (residual) v += load_lanes(residual + c, lanes);
    const int64_t to = row * g.output_stride + column + c;
    if (g.output_is_compute_type)
      store_lanes((S*)g.output + to, v, lanes);
    else
      streams.output ? stream_lanes((T*)g.output + to, v, lanes) : store_lanes((T*)g.output + to, v, lanes);
  });
}

template <class T>
static void epilogue(const GemmArgs& g, int64_t row, int64_t column, int width, const compute_t<T>* acc,
                     Streams streams = {}) {
  switch (g.activation) {
    case Activation::gelu: return epilogue_row<T, Activation::gelu>(g, row, column, width, acc, streams);
    case Activation::gelu_tanh: return epilogue_row<T, Activation::gelu_tanh>(g, row, column, width, acc, streams);
    case Activation::relu: return epilogue_row<T, Activation::relu>(g, row, column, width, acc, streams);
    case Activation::silu: return epilogue_row<T, Activation::silu>(g, row, column, width, acc, streams);
    case Activation::none: return epilogue_row<T, Activation::none>(g, row, column, width, acc, streams);
  }
}

}  // namespace fastformer::FASTFORMER_ISA
