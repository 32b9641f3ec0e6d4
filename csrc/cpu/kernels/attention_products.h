// Packing and products of attention: scores, and sums weighted by them.
#pragma once

#include "attention.h"
#include "microkernel.h"

namespace fastformer::FASTFORMER_ISA {

// ---- packing ----

// Rows as the columns of panels: panel p holds rows [p W, (p + 1) W), W = kPanelKeys, as (depth, W), times `factor`;
// zero padded to a whole vector.
template <class T>
static void pack_columns(const T* rows, int64_t row_stride, int64_t count, int64_t depth, compute_t<T> factor,
                         compute_t<T>* panels) {
  using S = compute_t<T>;
  constexpr int64_t kW = kPanelKeys<S>;
  constexpr int kN = kLanes<S>;
  for (int64_t r = 0; r < count; r += kN) {
    S* out = panels + r / kW * kW * depth + r % kW;
    for (int64_t k = 0; k < depth; k += kN) {
      const int lanes = int(min<int64_t>(kN, depth - k));
      Vec<S> x[kN];
      if (r + kN <= count && lanes == kN) {
#pragma GCC unroll 16
        for (int i = 0; i < kN; ++i) x[i] = load(rows + (r + i) * row_stride + k) * factor;
      } else {
        for (int i = 0; i < kN; ++i)
          x[i] = r + i < count ? load_lanes(rows + (r + i) * row_stride + k, lanes) * factor : zero<S>();
      }
      transpose<S>(x);
      if (lanes == kN) {
#pragma GCC unroll 16
        for (int i = 0; i < kN; ++i) store(out + (k + i) * kW, x[i]);
      } else {
        for (int i = 0; i < lanes; ++i) store(out + (k + i) * kW, x[i]);
      }
    }
  }
}

// Rows of the compute type, zero padded to whole vectors: copied, or in place where they are so already and adjacent
// (rows far apart compete for the same few sets of the cache) or `in_place` asks for it.
template <class S> struct PackedRows {
  const S* data;
  int64_t stride;
};
template <class T>
static PackedRows<compute_t<T>> pack_rows(const T* rows, int64_t row_stride, int64_t count, int64_t columns,
                                          bool in_place, compute_t<T>* copy) {
  using S = compute_t<T>;
  const int64_t stride = round_up<S>(columns);
  if constexpr (__is_same(T, S)) {
    if (stride == columns && (row_stride == columns || in_place)) return {rows, row_stride};
  }
  for (int64_t r = 0; r < count; ++r)
    for_columns<S>(columns, [&](int64_t c, int lanes) {
      store(copy + r * stride + c, load_lanes(rows + r * row_stride + c, lanes));
    });
  return {copy, stride};
}
// Rows of the compute type, as they are: in place, or converted.
template <class T>
FF_INLINE PackedRows<compute_t<T>> compute_rows(const T* rows, int64_t row_stride, int64_t count, int64_t columns,
                                                compute_t<T>* copy) {
  if constexpr (__is_same(T, compute_t<T>)) return {rows, row_stride};
  return pack_rows(rows, row_stride, count, columns, true, copy);
}

// ---- products ----

// Sums are made of sums of so many terms: more exact, and their share of b stays in L1.
constexpr int64_t kDepth = 128;

template <class S, int ROWS, bool ACCUMULATE, bool TRANSPOSED>
static void product_rows(int vecs, int64_t depth, const S* a, int64_t lda, const S* b, int64_t ldb, S* c, int64_t ldc) {
  if constexpr (kTileVecs == 4) {
    if (vecs == 4) return tile_product<S, ROWS, 4, ACCUMULATE, 0, TRANSPOSED>(depth, a, lda, b, ldb, c, ldc);
    if (vecs == 3) return tile_product<S, ROWS, 3, ACCUMULATE, 0, TRANSPOSED>(depth, a, lda, b, ldb, c, ldc);
  }
  if (vecs == 2) return tile_product<S, ROWS, 2, ACCUMULATE, 0, TRANSPOSED>(depth, a, lda, b, ldb, c, ldc);
  return tile_product<S, ROWS, 1, ACCUMULATE, 0, TRANSPOSED>(depth, a, lda, b, ldb, c, ldc);
}

// c = a b, or c += a b, of up to kTileRows rows and kTileVecs vectors.
template <class S, bool ACCUMULATE, bool TRANSPOSED = false>
static void product(int rows, int vecs, int64_t depth, const S* a, int64_t lda, const S* b, int64_t ldb, S* c,
                    int64_t ldc) {
  switch (rows) {
    case 1: return product_rows<S, 1, ACCUMULATE, TRANSPOSED>(vecs, depth, a, lda, b, ldb, c, ldc);
    case 2: return product_rows<S, 2, ACCUMULATE, TRANSPOSED>(vecs, depth, a, lda, b, ldb, c, ldc);
    case 3: return product_rows<S, 3, ACCUMULATE, TRANSPOSED>(vecs, depth, a, lda, b, ldb, c, ldc);
    case 4: return product_rows<S, 4, ACCUMULATE, TRANSPOSED>(vecs, depth, a, lda, b, ldb, c, ldc);
    case 5: return product_rows<S, 5, ACCUMULATE, TRANSPOSED>(vecs, depth, a, lda, b, ldb, c, ldc);
    default: return product_rows<S, 6, ACCUMULATE, TRANSPOSED>(vecs, depth, a, lda, b, ldb, c, ldc);
  }
}

// scores (rows, kScoreStride), column 0 = key `base`: a b for the keys of `keys` that the queries [q0, q0 + rows) see;
// b are packed columns from key `packed_from` on.
template <class S>
static void score_block(const Sequence& s, int64_t q0, const RowTiles& tiles, int64_t base, KeyRange keys,
                        PackedRows<S> a, int64_t depth, const S* b, int64_t packed_from, S* scores) {
  constexpr int64_t kW = kPanelKeys<S>;
  for (int64_t panel = keys.begin / kW * kW; panel < keys.end; panel += kW) {
    const S* columns = b + (panel - packed_from) * depth;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t i0 = tiles.begin[t], i1 = tiles.begin[t + 1];
      const KeyRange seen = intersection(intersection(keys, {panel, panel + kW}), s.range(q0 + i0, q0 + i1));
      if (seen.begin >= seen.end) continue;
      const int64_t from = round_down<S>(seen.begin), to = round_up<S>(seen.end);
      for (int64_t k = 0; k == 0 || k < depth; k += kDepth)
        (k ? product<S, true> : product<S, false>)(
            int(i1 - i0), int((to - from) / kLanes<S>), min(kDepth, depth - k), a.data + i0 * a.stride + k, a.stride,
            columns + k * kW + from - panel, kW, scores + i0 * kScoreStride + from - base, kScoreStride);
    }
  }
}

// Of each of kLanes<S> vectors the sum of its lanes.
template <class S> FF_INLINE Vec<S> lane_sums(Vec<S>* x) {
  using Int = typename IntType<S>::type;
  constexpr int kN = kLanes<S>;
  const IntVec<S> lane = lane_numbers<S>();
#pragma GCC unroll 4
  for (int step = 1; step < kN; step *= 2) {
    const IntVec<S> second = (lane & Int(step)) != 0;
    const IntVec<S> even = second ? lane + Int(kN - step) : lane, odd = second ? lane + Int(kN) : lane + Int(step);
#pragma GCC unroll 8
    for (int i = 0; i < kN / 2 / step; ++i)
      x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], even) + __builtin_shuffle(x[2 * i], x[2 * i + 1], odd);
  }
  return x[0];
}

// One query per sequence doesn't pay for packing the keys. Forward and backward must agree: their sums round alike.
FF_INLINE bool reads_keys_in_place(const AttentionArgs& a) { return a.queries == 1 && a.heads == a.kv_heads; }

// The scores of one query: as score_block, from keys where they lie, times factor.
template <class T>
static void score_query(int64_t base, KeyRange keys, const compute_t<T>* query, int64_t depth, const T* key,
                        int64_t key_stride, compute_t<T> factor, compute_t<T>* scores) {
  using S = compute_t<T>;
  constexpr int kN = kLanes<S>;
  for (int64_t c = base + round_down<S>(keys.begin - base); c < keys.end; c += kN) {
    const T* row[kN];
    for (int j = 0; j < kN; ++j) row[j] = key + min(max(c + j, keys.begin), keys.end - 1) * key_stride;
    Vec<S> x[kN];
#pragma GCC unroll 16
    for (int j = 0; j < kN; ++j) x[j] = zero<S>();
    for_columns<S>(depth, [&](int64_t k, int lanes) {
      const Vec<S> q = load_lanes(query + k, lanes);
#pragma GCC unroll 16
      for (int j = 0; j < kN; ++j) {
        __builtin_prefetch(row[j] + k + 2 * kN * key_stride, 0, 2);
        x[j] += q * load_lanes(row[j] + k, lanes);
      }
    });
    store(scores + c - base, lane_sums<S>(x) * factor);
  }
}

// c (rows, columns) += a b for the keys of `keys` that the queries see: a (rows, kScoreStride), column 0 = key `base`;
// b (keys, columns) from key `packed_from` on.
template <class S>
static void add_rows(const Sequence& s, int64_t q0, const RowTiles& tiles, int64_t base, KeyRange keys, const S* a,
                     PackedRows<S> b, int64_t packed_from, int64_t columns, S* c) {
  for (int64_t k = base + (keys.begin - base) / kDepth * kDepth; k < keys.end; k += kDepth)
    for (int64_t column = 0; column < columns; column += kTileColumns<S>) {
      const int vecs = int(min<int64_t>(kTileVecs, (columns - column) / kLanes<S>));
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t i0 = tiles.begin[t], i1 = tiles.begin[t + 1];
        const KeyRange seen = intersection(intersection(keys, {k, k + kDepth}), s.range(q0 + i0, q0 + i1));
        if (seen.begin >= seen.end) continue;
        if (i1 - i0 == 1 && vecs == kTileVecs) {  // waits for memory
          constexpr int64_t kAhead = 32;          // keys
          const S* first = b.data + (seen.begin - packed_from) * b.stride + column;
          tile_product<S, 1, kTileVecs, true, kTileVecs * kVecBytes / 64>(
              seen.end - seen.begin, a + i0 * kScoreStride + seen.begin - base, kScoreStride, first, b.stride,
              c + i0 * columns + column, columns, (const char*)(first + kAhead * b.stride), b.stride * sizeof(S));
          continue;
        }
        product<S, true>(int(i1 - i0), vecs, seen.end - seen.begin, a + i0 * kScoreStride + seen.begin - base,
                         kScoreStride, b.data + (seen.begin - packed_from) * b.stride + column, b.stride,
                         c + i0 * columns + column, columns);
      }
    }
}

// Rows times `factor` to the storage type.
template <class T>
static void store_rows(const compute_t<T>* rows, int64_t stride, int64_t count, int64_t columns, compute_t<T> factor,
                       T* out, int64_t out_stride) {
  using S = compute_t<T>;
  for (int64_t r = 0; r < count; ++r)
    for_columns<S>(columns, [&](int64_t c, int lanes) {
      store_lanes(out + r * out_stride + c, load(rows + r * stride + c) * factor, lanes);
    });
}

}  // namespace fastformer::FASTFORMER_ISA
