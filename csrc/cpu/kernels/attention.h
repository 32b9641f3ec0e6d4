// What the forward and the backward of attention share: which keys a query sees, masks, packing and products.
#pragma once

#include "lanes.h"
#include "microkernel.h"
#include "philox.h"
#include "vecmath.h"

namespace fastformer::FASTFORMER_ISA {

// Scores are computed in blocks of queries x keys. The blocks of keys begin at multiples of kKeyBlock whatever the
// queries see of them, so that the result of a query depends neither on the other queries nor on the threads.
#ifndef QB
#define QB 48
#endif
#ifndef KB
#define KB 256
#endif
constexpr int64_t kQueryBlock = QB, kKeyBlock = KB;
constexpr int64_t kScoreStride = kKeyBlock + 16;
template <class S> constexpr int64_t kPanelKeys = kTileColumns<S>;
template <class S> constexpr S kInf = S(__builtin_inf());

template <class S> FF_INLINE int64_t round_down(int64_t n) { return n / kLanes<S> * kLanes<S>; }
template <class S> FF_INLINE int64_t round_up(int64_t n) { return (n + kLanes<S> - 1) / kLanes<S> * kLanes<S>; }

// f(f(lane 0, lane 1), ...) over the lanes, in a fixed order.
template <class S, class F> FF_INLINE S reduce(Vec<S> x, F f) {
#pragma GCC unroll 4
  for (int step = kLanes<S> / 2; step > 0; step /= 2)
    x = f(x, __builtin_shuffle(x, lane_numbers<S>() ^ typename IntType<S>::type(step)));
  return x[0];
}
template <class S> FF_INLINE Vec<S> larger(Vec<S> a, Vec<S> b) { return a > b ? a : b; }  // b where a is NaN

// Consecutive pieces of the scratch memory, each aligned to a cache line.
struct Scratch {
  char* next;
  template <class S> S* take(int64_t count) {
    S* piece = (S*)next;
    next += (count * int64_t(sizeof(S)) + 63) / 64 * 64;
    return piece;
  }
};

// ---- what a query sees ----

struct KeyRange {
  int64_t begin, end;
};

// One sequence: its rows in the tensors, and the keys that its queries see, mask apart.
struct Sequence {
  int64_t index, first_query, queries, first_key, keys;
  int64_t first_offset, last_offset;  // query q sees the keys [q + first_offset, q + last_offset]

  Sequence(const AttentionArgs& a, int64_t sequence)
      : index(sequence), first_query(a.cu_seq_q ? a.cu_seq_q[sequence] : 0),
        queries(a.cu_seq_q ? a.cu_seq_q[sequence + 1] - first_query : a.queries),
        first_key(a.cu_seq_k ? a.cu_seq_k[sequence] : 0),
        keys(a.cu_seq_k ? a.cu_seq_k[sequence + 1] - first_key : a.keys) {
    const int64_t shift = keys - queries, limit = keys + queries;
    first_offset = a.window_left < 0 ? -limit : max(-limit, shift - a.window_left);
    last_offset = a.window_right < 0 ? limit : min(limit, shift + a.window_right);
    if (a.is_causal) last_offset = min<int64_t>(last_offset, 0);
  }
  // Both ends never fall from one query to the next.
  FF_INLINE int64_t begin(int64_t query) const { return min(max<int64_t>(query + first_offset, 0), keys); }
  FF_INLINE int64_t end(int64_t query) const { return min(max<int64_t>(query + last_offset + 1, 0), keys); }
  // The keys that some query of [q0, q1) sees.
  FF_INLINE KeyRange range(int64_t q0, int64_t q1) const { return {begin(q0), end(q1 - 1)}; }
};

template <class T, class Data>
FF_INLINE auto* row_of(const AttentionTensor<Data>& t, const Sequence& s, int64_t head, int64_t row) {
  if constexpr (__is_same(Data, void))
    return (T*)t.data + s.index * t.sequence + head * t.head + row * t.row;
  else
    return (const T*)t.data + s.index * t.sequence + head * t.head + row * t.row;
}

// ---- masks ----

// The mask of some query rows of one head, and what it says about each key over all of them.
template <class S> struct MaskRows {
  const AttentionMask& mask;
  uint8_t *any, *all;  // per key: kept by some row; kept as it is by every row
  S* gathered;         // (kKeyBlock), where the keys of the mask are not adjacent
  const char* summarized = nullptr;

  MaskRows(const AttentionArgs& a, Scratch& scratch)
      : mask(a.mask), any(scratch.take<uint8_t>(a.mask.data ? a.keys : 0)),
        all(scratch.take<uint8_t>(a.mask.data ? a.keys : 0)), gathered(scratch.take<S>(kKeyBlock)) {}

  int64_t element_bytes() const { return mask.is_bool ? 1 : sizeof(S); }
  const char* row(const Sequence& s, int64_t head, int64_t query) const {
    return (const char*)mask.data +
           (s.index * mask.sequence + head * mask.head + query * mask.query) * element_bytes();
  }
  // The elements of a row at keys [key, key + count), adjacent; count <= kKeyBlock.
  template <class M> const M* elements(const char* row, int64_t key, int64_t count) const {
    const M* p = (const M*)row + key * mask.key;
    if (mask.key == 1) return p;
    M* copy = (M*)gathered;
    for (int64_t i = 0; i < count; ++i) copy[i] = p[i * mask.key];
    return copy;
  }

  template <class M> void summarize_rows(const char* first, int64_t rows, KeyRange keys) {
    for (int64_t k = keys.begin; k < keys.end; ++k) any[k] = 0, all[k] = 1;
    if (mask.query == 0) rows = 1;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t key = keys.begin; key < keys.end; key += kKeyBlock) {
        const int64_t count = min(kKeyBlock, keys.end - key);
        const M* m = elements<M>(first + i * mask.query * int64_t(sizeof(M)), key, count);
        if constexpr (sizeof(M) == 1) {
          for (int64_t k = 0; k < count; ++k) any[key + k] |= m[k], all[key + k] &= m[k];
        } else {
          for (int64_t k = 0; k < count; ++k) any[key + k] |= m[k] != -kInf<S>, all[key + k] &= m[k] == 0;
        }
      }
    }
  }
  // Fills any and all over the keys given; returns the range from the first to the last key that some row keeps.
  KeyRange summarize(const Sequence& s, int64_t head, int64_t query, int64_t rows, KeyRange keys) {
    const char* first = row(s, head, query);
    mask.is_bool ? summarize_rows<uint8_t>(first, rows, keys) : summarize_rows<S>(first, rows, keys);
    while (keys.begin < keys.end && !any[keys.begin]) ++keys.begin;
    while (keys.begin < keys.end && !any[keys.end - 1]) --keys.end;
    return keys;
  }
  bool keeps_any(int64_t begin, int64_t end) const {
    uint8_t kept = 0;
    for (int64_t k = begin; k < end; ++k) kept |= any[k];
    return kept;
  }
  bool keeps_all(int64_t begin, int64_t end) const {
    uint8_t kept = 1;
    for (int64_t k = begin; k < end; ++k) kept &= all[k];
    return kept;
  }

  // Applies the mask row to the scores of keys [key, key + count).
  void apply(const char* row, int64_t key, int64_t count, S* scores) const {
    if (mask.is_bool) {
      typedef uint8_t Bytes __attribute__((vector_size(kLanes<S>)));
      const uint8_t* m = elements<uint8_t>(row, key, count);
      for_columns<S>(count, [&](int64_t c, int lanes) {
        Bytes bytes = {};
        lanes == kLanes<S> ? memcpy(&bytes, m + c, sizeof(bytes)) : memcpy(&bytes, m + c, size_t(lanes));
        const IntVec<S> keep = __builtin_convertvector(bytes, IntVec<S>) != 0;
        store(scores + c, keep ? load(scores + c) : splat<S>(-kInf<S>));
      });
    } else {
      const S* m = elements<S>(row, key, count);
      for_columns<S>(count, [&](int64_t c, int lanes) {
        store(scores + c, load(scores + c) + (lanes == kLanes<S> ? load(m + c) : load_n(m + c, lanes, -kInf<S>)));
      });
    }
  }
};

// Sets the scores of a row outside [begin, end) to -inf, within the vectors that these cut; all relative to `scores`.
template <class S> FF_INLINE void cut_edges(S* scores, int64_t begin, int64_t end) {
  const IntVec<S> lane = lane_numbers<S>();
  if (const int64_t v = round_down<S>(begin); v != begin)
    store(scores + v, lane < typename IntType<S>::type(begin - v) ? splat<S>(-kInf<S>) : load(scores + v));
  if (const int64_t v = round_down<S>(end); v != end)
    store(scores + v, lane < typename IntType<S>::type(end - v) ? load(scores + v) : splat<S>(-kInf<S>));
}

// ---- exponentials of scores ----

// e^x for x <= 0 within 1.2 units in the last place, 0 below 2^-126: subnormal probabilities are slow and add nothing.
FF_INLINE Vec<float> exp_score(Vec<float> x) {
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, in the low bits
  const Vec<float> z = x * 0x1.715476p0f + kRound, n = z - kRound;
  const Vec<float> r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Vec<float> p = r * 0x1.6a23fep-10f + 0x1.123a10p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Vec<float> y = bit_cast<Vec<float>>(bit_cast<Vec<int32_t>>(p) + (bit_cast<Vec<int32_t>>(z) << 23));
  return x < -87.0f ? Vec<float>{} : y;
}
FF_INLINE Vec<double> exp_score(Vec<double> x) { return exp(x); }

FF_INLINE float log_of(float x) { return logf(x); }
FF_INLINE double log_of(double x) { return log(x); }

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

// c = a b, or c += a b, for a tile of ROWS x (VECS vectors): as tile_product, but with TRANSPOSED a is (depth, ROWS),
// and the old c is read last, so that no register is held for it.
template <class S, int ROWS, int VECS, bool ACCUMULATE, bool TRANSPOSED>
FF_INLINE void tile(int64_t depth, const S* a, int64_t lda, const S* b, int64_t ldb, S* c, int64_t ldc) {
  Vec<S> acc[ROWS][VECS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) acc[i][j] = zero<S>();
  for (int64_t k = 0; k < depth; ++k) {
    Vec<S> bk[VECS];
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) bk[j] = load(b + k * ldb + j * kLanes<S>);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vec<S> aik = splat<S>(TRANSPOSED ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) acc[i][j] += aik * bk[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) {
      S* p = c + i * ldc + j * kLanes<S>;
      store(p, ACCUMULATE ? load(p) + acc[i][j] : acc[i][j]);
    }
}

template <class S, int ROWS, bool ACCUMULATE, bool TRANSPOSED>
static void product_rows(int vecs, int64_t depth, const S* a, int64_t lda, const S* b, int64_t ldb, S* c, int64_t ldc) {
  if constexpr (kTileVecs == 4) {
    if (vecs == 4) return tile<S, ROWS, 4, ACCUMULATE, TRANSPOSED>(depth, a, lda, b, ldb, c, ldc);
    if (vecs == 3) return tile<S, ROWS, 3, ACCUMULATE, TRANSPOSED>(depth, a, lda, b, ldb, c, ldc);
  }
  if (vecs == 2) return tile<S, ROWS, 2, ACCUMULATE, TRANSPOSED>(depth, a, lda, b, ldb, c, ldc);
  return tile<S, ROWS, 1, ACCUMULATE, TRANSPOSED>(depth, a, lda, b, ldb, c, ldc);
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

// A block of rows, cut into tiles of nearly equal numbers of rows: tile t is rows [begin[t], begin[t + 1]).
struct RowTiles {
  int64_t count;
  int64_t begin[kQueryBlock / kTileRows + 2];
  explicit RowTiles(int64_t rows) : count((rows + kTileRows - 1) / kTileRows) {
    for (int64_t t = 0; t <= count; ++t) begin[t] = rows * t / max<int64_t>(count, 1);
  }
};

// Rows that the next task will use, fetched into the cache a few at a time while this one computes: the rows of a head
// are far apart in memory, so the hardware doesn't foresee them.
struct Prefetch {
  struct Rows {
    const char* next;
    int64_t stride, bytes, left, per_step;
  };
  Rows tensors[4];
  int count = 0;

  void add(const void* first, int64_t stride, int64_t bytes, int64_t rows, int64_t steps) {
    tensors[count++] = {(const char*)first, stride, bytes, rows, (rows + steps - 1) / steps};
  }
  FF_INLINE void step() {
    for (int t = 0; t < count; ++t) {
      Rows& r = tensors[t];
      const int64_t rows = min(r.per_step, r.left);
      for (int64_t i = 0; i < rows; ++i, r.next += r.stride)
        for (int64_t byte = 0; byte < r.bytes; byte += 64) __builtin_prefetch(r.next + byte, 0, 2);
      r.left -= rows;
    }
  }
};

FF_INLINE KeyRange intersection(KeyRange a, KeyRange b) { return {max(a.begin, b.begin), min(a.end, b.end)}; }

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
      product<S, false>(int(i1 - i0), int((to - from) / kLanes<S>), depth, a.data + i0 * a.stride, a.stride,
                        columns + from - panel, kW, scores + i0 * kScoreStride + from - base, kScoreStride);
    }
  }
}

}  // namespace fastformer::FASTFORMER_ISA
