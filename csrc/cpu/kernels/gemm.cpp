// Matrix products with packed weights and fused epilogues. The weights stream from memory once per block of rows; a block
// of kDepthBlock x panel stays in L1 while every row tile uses it, the rows themselves stay in L2.

#include "lanes.h"
#include "microkernel.h"
#include "philox.h"
#include "vecmath.h"

namespace fastformer::FASTFORMER_ISA {

constexpr int64_t kDepthBlock = 128;           // 128 x 64 floats = 32 KiB
constexpr int64_t kRowBlockBytes = 1 << 20;    // rows of `a` that share a pass over the weights: half of L2
template <class S> constexpr int64_t kPanel = kTileColumns<S>;

static int64_t row_block(const GemmArgs& a) {
  const int64_t bytes = a.depth * (a.dtype == DType::f64 ? 8 : 4);
  return max<int64_t>(kTileRows, min<int64_t>(192, kRowBlockBytes / max<int64_t>(bytes, 1)) / kTileRows * kTileRows);
}
static bool needs_conversion(const GemmArgs& a) {
  const bool compute = a.a_is_compute_type || a.dtype == DType::f32 || a.dtype == DType::f64;
  return !compute || (a.a_depth_stride != 1 && a.depth != 1);
}
int64_t gemm_scratch_bytes(const GemmArgs& a) {
  const int64_t block = row_block(a), size = a.dtype == DType::f64 ? 8 : 4;
  return block * kTileVecs * kVecBytes + (needs_conversion(a) ? block * a.depth * size : 0);
}

template <class T> static void pack_panels(const PackArgs& a, int64_t panel_begin, int64_t panel_end) {
  using S = compute_t<T>;
  constexpr int64_t kWidth = kPanel<S>, kChunk = 16;  // transposed through chunks of 16 depths
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    S* out = (S*)a.packed + p * a.depth * kWidth;
    const T* b = (const T*)a.b + p * kWidth * a.b_column_stride;
    const int64_t width = min<int64_t>(kWidth, a.columns - p * kWidth);
    if (a.b_column_stride == 1) {
      for (int64_t k = 0; k < a.depth; ++k) {
        const T* row = b + k * a.b_depth_stride;
        S* o = out + k * kWidth;
        if (width == kWidth) {
          for (int64_t c = 0; c < kWidth; c += kLanes<S>) store(o + c, load(row + c));
        } else {
          for (int64_t c = 0; c < kWidth; ++c) o[c] = c < width ? to_compute(row[c]) : S(0);
        }
      }
      continue;
    }
    for (int64_t k0 = 0; k0 < a.depth; k0 += kChunk) {
      const int64_t depth = min(kChunk, a.depth - k0);
      for (int64_t c = 0; c < kWidth; ++c) {
        const T* column = b + c * a.b_column_stride + k0 * a.b_depth_stride;
        for (int64_t k = 0; k < depth; ++k)
          out[(k0 + k) * kWidth + c] = c < width ? to_compute(column[k * a.b_depth_stride]) : S(0);
      }
    }
  }
}

void pack(const PackArgs& a, int64_t panel_begin, int64_t panel_end) {
  dispatch(a.dtype, [&]<class T>() { pack_panels<T>(a, panel_begin, panel_end); });
}

template <class S, bool ACCUMULATE>
static void row_tile(int rows, int64_t depth, const S* a, int64_t lda, const S* b, S* c) {
  constexpr int kV = kTileVecs;
  constexpr int64_t kW = kPanel<S>;
  switch (rows) {
    case 1: return tile_product<S, 1, kV, ACCUMULATE>(depth, a, lda, b, kW, c, kW);
    case 2: return tile_product<S, 2, kV, ACCUMULATE>(depth, a, lda, b, kW, c, kW);
    case 3: return tile_product<S, 3, kV, ACCUMULATE>(depth, a, lda, b, kW, c, kW);
    case 4: return tile_product<S, 4, kV, ACCUMULATE>(depth, a, lda, b, kW, c, kW);
    case 5: return tile_product<S, 5, kV, ACCUMULATE>(depth, a, lda, b, kW, c, kW);
    default: return tile_product<S, 6, kV, ACCUMULATE>(depth, a, lda, b, kW, c, kW);
  }
}

// One row of a panel: acc (compute type) to the output.
template <class T, Activation ACTIVATION>
static void epilogue_row(const GemmArgs& g, int64_t row, int64_t column, int width, const compute_t<T>* acc) {
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
      if (pre) store_lanes(pre + c, v, lanes);
      v = activate<S>(ACTIVATION, v);
      if (g.dropout.threshold) v = dropout.apply<S>(v, column + c);
    }
    if (residual) v += load_lanes(residual + c, lanes);
    if (g.output_is_compute_type)
      store_lanes((S*)g.output + row * g.output_stride + column + c, v, lanes);
    else
      store_lanes((T*)g.output + row * g.output_stride + column + c, v, lanes);
  });
}

template <class T>
static void epilogue(const GemmArgs& g, int64_t row, int64_t column, int width, const compute_t<T>* acc) {
  switch (g.activation) {
    case Activation::gelu: return epilogue_row<T, Activation::gelu>(g, row, column, width, acc);
    case Activation::gelu_tanh: return epilogue_row<T, Activation::gelu_tanh>(g, row, column, width, acc);
    case Activation::relu: return epilogue_row<T, Activation::relu>(g, row, column, width, acc);
    case Activation::silu: return epilogue_row<T, Activation::silu>(g, row, column, width, acc);
    case Activation::none: return epilogue_row<T, Activation::none>(g, row, column, width, acc);
  }
}

template <class T, class A>  // A: the type of g.a
static void product(const GemmArgs& g, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                    void* scratch) {
  using S = compute_t<T>;
  constexpr int64_t kW = kPanel<S>;
  const int64_t block = row_block(g);
  S* acc = (S*)scratch;             // (block, kW)
  S* converted = acc + block * kW;  // (block, depth)
  for (int64_t m0 = row_begin; m0 < row_end; m0 += block) {
    const int64_t rows = min(block, row_end - m0);
    const S* a = nullptr;
    int64_t lda = g.a_row_stride;
    const A* source = (const A*)g.a + m0 * g.a_row_stride;
    if constexpr (__is_same(A, S)) a = source;
    if (needs_conversion(g)) {
      if (g.a_depth_stride == 1) {
        for (int64_t i = 0; i < rows; ++i)
          for_columns<S>(g.depth, [&](int64_t k, int lanes) {
            store_lanes(converted + i * g.depth + k, load_lanes(source + i * g.a_row_stride + k, lanes), lanes);
          });
      } else {
        for (int64_t k0 = 0; k0 < g.depth; k0 += 16)  // transposed through 16 depths, one cache line of a row
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t k = k0; k < min(k0 + 16, g.depth); ++k)
              converted[i * g.depth + k] = to_compute(source[i * g.a_row_stride + k * g.a_depth_stride]);
      }
      a = converted;
      lda = g.depth;
    }
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t p = panel_begin; p < panel_end; ++p) {
      const S* b = (const S*)g.b + p * g.depth * kW;
      for (int64_t k0 = 0; k0 == 0 || k0 < g.depth; k0 += kDepthBlock) {
        const int64_t depth = min(kDepthBlock, g.depth - k0);
        const char* next = (const char*)(b + (k0 + depth) * kW);
        const int64_t share = depth * kW * int64_t(sizeof(S)) / tiles;  // of the next block, prefetched by each tile
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t i0 = rows * t / tiles, i1 = rows * (t + 1) / tiles;
          for (int64_t byte = 0; byte < share; byte += 64) __builtin_prefetch(next + t * share + byte, 0, 2);
          (k0 ? row_tile<S, true> : row_tile<S, false>)(int(i1 - i0), depth, a + i0 * lda + k0, lda, b + k0 * kW,
                                                        acc + i0 * kW);
        }
      }
      const int width = int(min<int64_t>(kW, g.columns - p * kW));
      for (int64_t i = 0; i < rows; ++i) epilogue<T>(g, m0 + i, p * kW, width, acc + i * kW);
    }
  }
}

void gemm(const GemmArgs& g, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
          void* scratch) {
  dispatch(g.dtype, [&]<class T>() {
    if (g.a_is_compute_type)
      product<T, compute_t<T>>(g, row_begin, row_end, panel_begin, panel_end, scratch);
    else
      product<T, T>(g, row_begin, row_end, panel_begin, panel_end, scratch);
  });
}

}  // namespace fastformer::FASTFORMER_ISA
