// Matrix products with packed weights and fused epilogues. The weights stream from memory once per block of rows: while every
// row tile uses one kDepth x panel block of them from L1, the next one comes into L2. The rows of `a` (a slice of kSlice
// depths of them) and the sums stay in L2.

#include "epilogue.h"
#include "microkernel.h"

namespace fastformer::FASTFORMER_ISA {

constexpr int64_t kDepth = kVecBytes == 64 ? 128 : 256;  // x 64 or 16 floats = 32 or 16 KiB of L1
constexpr int64_t kSlice = 1024;   // 192 x 1024 floats = 768 KiB of L2, and as much for the sums
constexpr int64_t kRows = 192;
constexpr int64_t kColumns = 1024;
template <class S> constexpr int64_t kPanel = kTileColumns<S>;

// Rows are copied where they are not adjacent values of the compute type, where they are so far apart that they would share
// cache sets, and where there are enough of them to pay for it.
static bool copies_rows(const GemmArgs& a) {
  const bool compute = a.a_is_compute_type || a.dtype == DType::f32 || a.dtype == DType::f64;
  const bool conflicts = a.a_row_stride % 1024 == 0 && a.rows > kTileRows;
  return !compute || (a.a_depth_stride != 1 && a.depth != 1) || conflicts;
}
static int64_t copied_stride(const GemmArgs& a) { return a.depth + 16; }

int64_t gemm_scratch_bytes(const GemmArgs& a) {
  const int64_t size = a.dtype == DType::f64 ? 8 : 4, sums = a.depth <= kSlice ? kTileVecs * kVecBytes : kColumns * size;
  return kRows * (sums + (copies_rows(a) ? copied_stride(a) * size : 0)) + kDepth * kTileVecs * kVecBytes;
}

// out (columns, rows) = the transpose of in (rows, columns), widened; rows `in_stride` and `out_stride` apart.
template <class T>
static void transpose_copy(const T* in, int64_t in_stride, int64_t rows, int64_t columns, compute_t<T>* out,
                           int64_t out_stride) {
  using S = compute_t<T>;
  constexpr int64_t n = kLanes<S>, kChunk = 4 * n;  // columns read from one row before the next
  const int64_t whole_rows = rows / n * n, whole_columns = columns / n * n;
  for (int64_t c0 = 0; c0 < whole_columns; c0 += kChunk)
    for (int64_t r = 0; r < whole_rows; r += n)
      for (int64_t c = c0; c < min(c0 + kChunk, whole_columns); c += n) {
        Vec<S> x[n];
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) x[i] = load(in + (r + i) * in_stride + c);
        transpose<S>(x);
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) store(out + (c + i) * out_stride + r, x[i]);
      }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      out[c * out_stride + r] = to_compute(in[r * in_stride + c]);
}

template <class T> static void pack_panels(const PackArgs& a, int64_t panel_begin, int64_t panel_end) {
  using S = compute_t<T>;
  constexpr int64_t kW = kPanel<S>;
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    S* out = (S*)a.packed + p * a.depth * kW;
    const T* b = (const T*)a.b + p * kW * a.b_column_stride;
    const int64_t width = min<int64_t>(kW, a.columns - p * kW);
    if (width < kW) memset((void*)out, 0, size_t(a.depth * kW) * sizeof(S));
    if (a.b_depth_stride == 1) {
      transpose_copy(b, a.b_column_stride, width, a.depth, out, kW);
    } else if (a.b_column_stride == 1) {
      for (int64_t k = 0; k < a.depth; ++k)
        for_columns<S>(width, [&](int64_t c, int lanes) {
          store_lanes(out + k * kW + c, load_lanes(b + k * a.b_depth_stride + c, lanes), lanes);
        });
    } else {
      for (int64_t k = 0; k < a.depth; ++k)
        for (int64_t c = 0; c < width; ++c)
          out[k * kW + c] = to_compute(b[c * a.b_column_stride + k * a.b_depth_stride]);
    }
  }
}

// To panels of 16 bits, P.
template <class P, class T> static void pack_narrow(const PackArgs& a, int64_t panel_begin, int64_t panel_end) {
  constexpr int64_t kW = kPanel<float>;
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    P* out = (P*)a.packed + p * a.depth * kW;
    const int64_t width = min<int64_t>(kW, a.columns - p * kW);
    if (width < kW) memset((void*)out, 0, size_t(a.depth * kW) * sizeof(P));
    for (int64_t c = 0; c < width; ++c) {
      const T* b = (const T*)a.b + (p * kW + c) * a.b_column_stride;
      for (int64_t k = 0; k < a.depth; ++k) out[k * kW + c] = from_compute<P>(to_compute(b[k * a.b_depth_stride]));
    }
  }
}

void pack(const PackArgs& a, int64_t panel_begin, int64_t panel_end) {
  dispatch(a.dtype, [&]<class T>() {
    if constexpr (!__is_same(T, double)) {
      if (a.packed_type == PanelType::bf16) return pack_narrow<bf16, T>(a, panel_begin, panel_end);
      if (a.packed_type == PanelType::f16) return pack_narrow<f16, T>(a, panel_begin, panel_end);
    }
    pack_panels<T>(a, panel_begin, panel_end);
  });
}

template <class S, class B, bool ACCUMULATE, int LINES>
static void row_tile(int rows, int64_t depth, const S* a, int64_t lda, const B* b, S* c, const char* next,
                     int64_t step) {
  constexpr int64_t kW = kPanel<S>;
  const auto tile = [&]<int ROWS>() {
    tile_product<S, ROWS, kTileVecs, ACCUMULATE, LINES, false, B>(depth, a, lda, b, kW, c, kW, next, step);
  };
  switch (rows) {
    case 1: return tile.template operator()<1>();
    case 2: return tile.template operator()<2>();
    case 3: return tile.template operator()<3>();
    case 4: return tile.template operator()<4>();
    case 5: return tile.template operator()<5>();
    default: return tile.template operator()<6>();
  }
}
// Few rows wait for memory: then every line is asked for.
template <class S, class B, bool ACCUMULATE> static auto* row_tile_for(int64_t step) {
  if (step > 128) return row_tile<S, B, ACCUMULATE, 4>;
  return step > 64 ? row_tile<S, B, ACCUMULATE, 2> : row_tile<S, B, ACCUMULATE, 1>;
}

// acc (rows, panel) = or += a b for one panel and depths [k0, k1); done(begin, end) for each tile of rows after its
// last step. b of 16 bits, B, is widened once for many tiles.
template <class S, class B, class Done>
FF_INLINE void panel_product(int64_t rows, int64_t k0, int64_t k1, const S* a, int64_t lda, const B* b, S* widened,
                             S* acc, Done done) {
  constexpr int64_t kW = kPanel<S>;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const auto steps = [&]<class Block>(const Block* block, int64_t k, int64_t depth) {
    const int64_t share = depth * kW * int64_t(sizeof(B)) / tiles / 64 * 64;  // of the next block for each tile
    const int64_t step = depth ? share / depth : 0;
    const char* next = tiles > 1 ? (const char*)(b + (k + depth) * kW) : (const char*)(b + k * kW) + kAhead;
    auto* tile = k ? row_tile_for<S, Block, true>(step) : row_tile_for<S, Block, false>(step);
    const bool last = k + depth >= k1;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t i = rows * t / tiles, end = rows * (t + 1) / tiles;
      tile(int(end - i), depth, a + i * lda + k, lda, block, acc + i * kW, next + t * share, step);
      if (last) done(i, end);
    }
  };
  for (int64_t k = k0; k == k0 || k < k1; k += kDepth) {
    const int64_t depth = min(kDepth, k1 - k);
    const B* block = b + k * kW;
    if (__is_same(B, S) || tiles <= 2) {
      steps(block, k, depth);
    } else {
      for (int64_t i = 0; i < depth * kW; i += kLanes<S>) store(widened + i, load(block + i));
      steps(widened, k, depth);
    }
  }
}

// Rows of g.a in the compute type, copied_stride apart.
template <class A>
static void copy_rows(const GemmArgs& g, int64_t rows, const A* source, compute_t<A>* copy) {
  using S = compute_t<A>;
  const int64_t stride = copied_stride(g);
  if (g.a_depth_stride == 1) {
    for (int64_t i = 0; i < rows; ++i)
      for_columns<S>(g.depth, [&](int64_t k, int lanes) {
        store_lanes(copy + i * stride + k, load_lanes(source + i * g.a_row_stride + k, lanes), lanes);
      });
    return;
  }
  if (g.a_row_stride == 1) return transpose_copy(source, g.a_depth_stride, g.depth, rows, copy, stride);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < g.depth; ++k)
      copy[i * stride + k] = to_compute(source[i * g.a_row_stride + k * g.a_depth_stride]);
}

template <class T, class A, class B>  // A: the type of g.a, B: of the panels
static void product(const GemmArgs& g, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                    void* scratch) {
  using S = compute_t<T>;
  constexpr int64_t kW = kPanel<S>;
  const int64_t slices = max<int64_t>(1, (g.depth + kSlice - 1) / kSlice);
  const int64_t group = slices == 1 ? 1 : kColumns / kW;  // panels whose sums wait for the next slice
  S* sums = (S*)scratch;                                  // (group, kRows, kW)
  S* widened = sums + group * kRows * kW;                 // (kDepth, kW)
  S* copy = widened + kDepth * kW;                        // (kRows, copied_stride)
  const int64_t blocks = (row_end - row_begin + kRows - 1) / kRows;
  const Streams streams(g);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t m0 = row_begin + (row_end - row_begin) * block / blocks;
    const int64_t rows = row_begin + (row_end - row_begin) * (block + 1) / blocks - m0;
    const S* a = nullptr;
    int64_t lda = g.a_row_stride;
    const A* source = (const A*)g.a + m0 * g.a_row_stride;
    if constexpr (__is_same(A, S)) a = source;
    if (copies_rows(g)) {
      copy_rows<A>(g, rows, source, copy);
      a = copy;
      lda = copied_stride(g);
    }
    for (int64_t p0 = panel_begin; p0 < panel_end; p0 += group)
      for (int64_t slice = 0; slice < slices; ++slice)
        for (int64_t p = p0; p < min(p0 + group, panel_end); ++p) {
          S* acc = sums + (p - p0) * rows * kW;
          const bool last = slice + 1 == slices;
          const int width = int(min<int64_t>(kW, g.columns - p * kW));
          panel_product<S>(
              rows, g.depth * slice / slices, g.depth * (slice + 1) / slices, a, lda,
              (const B*)g.b + p * g.depth * kW, widened, acc,
              [&](int64_t begin, int64_t end) {
                if (last)
                  for (int64_t i = begin; i < end; ++i) epilogue<T>(g, m0 + i, p * kW, width, acc + i * kW, streams);
              });
        }
  }
  streams_done();
}

void gemm(const GemmArgs& g, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
          void* scratch) {
  dispatch(g.dtype, [&]<class T>() {
    using S = compute_t<T>;
    const auto with = [&]<class A>() {
      if constexpr (!__is_same(T, double)) {
        if (g.b_type == PanelType::bf16)
          return product<T, A, bf16>(g, row_begin, row_end, panel_begin, panel_end, scratch);
        if (g.b_type == PanelType::f16)
          return product<T, A, f16>(g, row_begin, row_end, panel_begin, panel_end, scratch);
      }
      product<T, A, S>(g, row_begin, row_end, panel_begin, panel_end, scratch);
    };
    g.a_is_compute_type ? with.template operator()<S>() : with.template operator()<T>();
  });
}

void epilogue(const GemmArgs& g, int64_t row_begin, int64_t row_end, const void* sums) {
  dispatch(g.dtype, [&]<class T>() {
    for (int64_t row = row_begin; row < row_end; ++row)
      epilogue<T>(g, row, 0, int(g.columns), (const compute_t<T>*)sums + row * g.columns);
  });
}

}  // namespace fastformer::FASTFORMER_ISA
