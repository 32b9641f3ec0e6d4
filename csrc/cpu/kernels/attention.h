// What the forward and the backward of attention share: which keys a query sees, and masks. Their products are in
// attention_products.h.
#pragma once

#include "lanes.h"
#include "microkernel.h"
#include "philox.h"
#include "vecmath.h"

namespace fastformer::FASTFORMER_ISA {

// Scores are computed in blocks of queries x keys, which begin at multiples of these numbers whatever the queries see
// of the keys: so results depend neither on the threads nor on the padding.
constexpr int64_t kQueryBlock = 48, kKeyBlock = 256;
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
FF_INLINE KeyRange intersection(KeyRange a, KeyRange b) { return {max(a.begin, b.begin), min(a.end, b.end)}; }

// One sequence: its rows in the tensors, and the keys that its queries see, mask apart.
struct Sequence {
  int64_t index, first_query, queries, first_key, keys;
  int64_t first_offset, last_offset;  // query q sees the keys [q + first_offset, q + last_offset]

  Sequence(const AttentionArgs& a, int64_t sequence)
      : index(sequence), first_query(a.cu_seq_q ? a.cu_seq_q[sequence] : 0),
        queries(a.cu_seq_q ? a.cu_seq_q[sequence + 1] - first_query : a.queries),
        first_key(a.cu_seq_k ? a.cu_seq_k[sequence] : 0),
        keys(a.cu_seq_k ? a.cu_seq_k[sequence + 1] - first_key : a.keys) {
    const int64_t shift = keys - queries, limit = 2 * (keys + queries);  // as good as no limit
    first_offset = a.window_left < 0 ? -limit : shift - min(a.window_left, limit);
    last_offset = a.window_right < 0 ? limit : shift + min(a.window_right, limit);
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

// A block of rows (at least one), cut into tiles of nearly as many rows each: tile t is rows [begin[t], begin[t + 1]).
struct RowTiles {
  int64_t count;
  int64_t begin[kQueryBlock / kTileRows + 1];
  explicit RowTiles(int64_t rows) : count((rows + kTileRows - 1) / kTileRows) {
    for (int64_t t = 0; t <= count; ++t) begin[t] = rows * t / count;
  }
};

// The keys of `block` that one query sees, and the whole vectors that hold them, relative to key `base`.
template <class S> struct RowRange {
  int64_t begin, end, from, to;
  RowRange(const Sequence& s, int64_t query, KeyRange block, int64_t base) {
    const KeyRange seen = intersection(block, s.range(query, query + 1));
    begin = (seen.begin < seen.end ? seen.begin : block.begin) - base;
    end = (seen.begin < seen.end ? seen.end : block.begin) - base;
    from = round_down<S>(begin);
    to = begin == end ? from : round_up<S>(end);
  }
};

// The query blocks of a pair of (sequence, kv head): those of its first query head, then those of the next.
struct QueryBlocks {
  int64_t queries, per_head, begin, end;  // the blocks [begin, end) are the share of one task
  QueryBlocks(const AttentionArgs& a, const Sequence& s, int64_t split, int64_t splits)
      : queries(s.queries), per_head((s.queries + kQueryBlock - 1) / kQueryBlock),
        begin(a.heads / a.kv_heads * per_head * split / splits),
        end(a.heads / a.kv_heads * per_head * (split + 1) / splits) {}
  int64_t head(int64_t block) const { return block / per_head; }  // of the pair's query heads
  int64_t first_query(int64_t block) const { return block % per_head * kQueryBlock; }
  int64_t rows(int64_t block) const { return min(kQueryBlock, queries - first_query(block)); }
  bool one_head() const { return begin < end && head(begin) == head(end - 1); }
  // The keys that some query of the share sees.
  KeyRange keys(const Sequence& s) const {
    if (begin == end) return {0, 0};
    return one_head() ? s.range(first_query(begin), first_query(end - 1) + rows(end - 1)) : s.range(0, queries);
  }
};

// ---- masks ----

// The mask of some query rows of one head, and what it says about each key over all of them.
template <class S> struct MaskRows {
  const AttentionMask& mask;
  uint8_t *any, *all;  // per key: kept by some row; kept as it is by every row
  S* gathered;         // (kKeyBlock), where the keys of the mask are not adjacent

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

  // Applies the mask to the scores of one query, of which column 0 is key `base`.
  void apply(const Sequence& s, int64_t head, int64_t query, int64_t base, const RowRange<S>& seen, S* scores) const {
    const char* mask_row = row(s, head, query);
    const int64_t key = base + seen.from, count = seen.end - seen.from;
    scores += seen.from;
    if (mask.is_bool) {
      typedef uint8_t Bytes __attribute__((vector_size(kLanes<S>)));
      const uint8_t* m = elements<uint8_t>(mask_row, key, count);
      for_columns<S>(count, [&](int64_t c, int lanes) {
        Bytes bytes = {};
        lanes == kLanes<S> ? memcpy(&bytes, m + c, sizeof(bytes)) : memcpy(&bytes, m + c, size_t(lanes));
        const IntVec<S> keep = __builtin_convertvector(bytes, IntVec<S>) != 0;
        store(scores + c, keep ? load(scores + c) : splat<S>(-kInf<S>));
      });
    } else {
      const S* m = elements<S>(mask_row, key, count);
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

FF_INLINE float log_of(float x) { return logf(x); }
FF_INLINE double log_of(double x) { return log(x); }

// ---- the next pair ----

// Rows that the next pair of (sequence, kv head) will use, fetched into the cache a few at a time while this one
// computes: the rows of a head are far apart in memory, so the hardware doesn't foresee them.
struct Prefetch {
  struct Rows {
    const char* next;
    int64_t stride, bytes, left, each;
  };
  Rows tensors[8];
  int count = 0;
  int64_t steps = 0;  // that the pair now being computed has

  Prefetch() = default;
  // Nothing is fetched for few queries, which wait for memory themselves, nor if the next pair, with so many bytes for
  // a query and a key together, would push this one out of the cache.
  Prefetch(const AttentionArgs& a, const Sequence& now, const Sequence& next, int64_t bytes) {
    const int64_t group = a.heads / a.kv_heads;
    if (group * now.queries < 8 || max(next.keys, next.queries) * bytes > 512 * 1024) return;
    steps = group * ((now.queries + kTileRows - 1) / kTileRows) * ((now.keys + kKeyBlock - 1) / kKeyBlock);
    if (a.is_causal) steps = (steps + 1) / 2;
  }
  void add(const void* first, int64_t stride, int64_t bytes, int64_t rows) {
    if (steps) tensors[count++] = {(const char*)first, stride, bytes, rows, (rows + steps - 1) / steps};
  }
  FF_INLINE void step() {
    for (int t = 0; t < count; ++t) {
      Rows& r = tensors[t];
      const int64_t rows = min(r.each, r.left);
      for (int64_t i = 0; i < rows; ++i, r.next += r.stride)
        for (int64_t byte = 0; byte < r.bytes; byte += 64) __builtin_prefetch(r.next + byte, 0, 2);
      r.left -= rows;
    }
  }
};

}  // namespace fastformer::FASTFORMER_ISA
