// Attention, forward: the scores of a block of queries x keys, an online softmax (Milakov and Gimelshein, 2018), and
// the weighted sum of the values, block by block of keys.

#include "attention.h"

namespace fastformer::FASTFORMER_ISA {

template <class T> struct ForwardScratch {
  using S = compute_t<T>;
  Scratch scratch;
  MaskRows<S> mask;
  S* keys;    // packed columns
  S* values;  // packed rows
  S* query;   // (kQueryBlock, head_dim), converted
  S* scores;  // (kQueryBlock, kScoreStride)
  S* output;  // (kQueryBlock, value_dim rounded up): not yet divided by the sum
  S *largest, *sum;  // (kQueryBlock)
  Prefetch prefetch;

  ForwardScratch(const AttentionArgs& a, void* memory) : scratch{(char*)memory}, mask(a, scratch) {
    const int64_t keys_padded = a.keys + 2 * kPanelKeys<S>;
    keys = scratch.take<S>(keys_padded * a.head_dim);
    values = scratch.take<S>(a.keys * round_up<S>(a.value_dim));
    query = scratch.take<S>(kQueryBlock * round_up<S>(a.head_dim));
    scores = scratch.take<S>(kQueryBlock * kScoreStride);
    output = scratch.take<S>(kQueryBlock * round_up<S>(a.value_dim));
    largest = scratch.take<S>(kQueryBlock);
    sum = scratch.take<S>(kQueryBlock);
  }
};

int64_t attention_scratch_bytes(const AttentionArgs& a) {
  int64_t bytes = 0;
  dispatch(a.dtype, [&]<class T>() { bytes = ForwardScratch<T>(a, nullptr).scratch.next - (char*)nullptr; });
  return bytes;
}

// The keys of a block that one row sees, and the whole vectors that hold them; relative to the block.
template <class S> struct RowRange {
  int64_t begin, end, from, to;
  RowRange(KeyRange seen, int64_t base)
      : begin(seen.begin - base), end(max(seen.begin, seen.end) - base), from(round_down<S>(begin)), to(round_up<S>(end)) {}
};

template <class S> FF_INLINE S largest_score(const S* begin, const S* end) {
  Vec<S> a = splat<S>(-kInf<S>), b = a;
  for (; begin + kLanes<S> < end; begin += 2 * kLanes<S>) {
    a = larger<S>(load(begin), a);
    b = larger<S>(load(begin + kLanes<S>), b);
  }
  if (begin < end) a = larger<S>(load(begin), a);
  return reduce<S>(larger<S>(a, b), larger<S>);
}

// The probabilities of the rows [i0, i1) of a block (not divided by their sum), in place of the scores.
template <class T>
static void softmax_tile(const AttentionArgs& a, const Sequence& s, int64_t head, int64_t q0, int64_t i0, int64_t i1,
                         int64_t base, KeyRange block, bool masked, ForwardScratch<T>& w) {
  using S = compute_t<T>;
  const KeyRange tile = intersection(block, s.range(q0 + i0, q0 + i1));
  if (tile.begin >= tile.end) return;
  w.prefetch.step();
  const int64_t columns = round_up<S>(a.value_dim);
  const int64_t tile_from = round_down<S>(tile.begin - base), tile_to = round_up<S>(tile.end - base);
  for (int64_t i = i0; i < i1; ++i) {
    S* row = w.scores + i * kScoreStride;
    const RowRange<S> seen(intersection(block, s.range(q0 + i, q0 + i + 1)), base);
    if (seen.begin == seen.end) continue;
    cut_edges(row, seen.begin, seen.end);
    if (masked) w.mask.apply(w.mask.row(s, head, q0 + i), base + seen.from, seen.end - seen.from, row + seen.from);
    const S before = w.largest[i], now = max(before, largest_score(row + seen.from, row + seen.to));
    if (now > before) {
      w.largest[i] = now;
      if (w.sum[i] != 0) {
        const S factor = exp_score(splat<S>(before - now))[0];
        w.sum[i] *= factor;
        S* output = w.output + i * columns;
        for (int64_t c = 0; c < columns; c += kLanes<S>) store(output + c, load(output + c) * factor);
      }
    }
  }
  for (int64_t i = i0; i < i1; ++i) {
    S* row = w.scores + i * kScoreStride;
    const RowRange<S> seen(intersection(block, s.range(q0 + i, q0 + i + 1)), base);
    const int64_t from = seen.begin == seen.end ? tile_to : seen.from, to = seen.begin == seen.end ? tile_to : seen.to;
    const S shift = w.largest[i] == -kInf<S> ? 0 : w.largest[i];
    for (int64_t c = tile_from; c < from; c += kLanes<S>) store(row + c, zero<S>());
    Vec<S> total = zero<S>();
    const auto probabilities = [&](auto drop) {
      for (int64_t c = from; c < to; c += kLanes<S>) {
        const Vec<S> p = exp_score(load(row + c) - shift);
        total += p;
        store(row + c, drop(p, base + c));
      }
    };
    if (a.dropout.threshold) {
      RowDropout dropout(a.dropout, uint32_t(s.index), uint32_t(head), uint32_t(q0 + i));
      probabilities([&](Vec<S> p, int64_t key) { return dropout.apply<S>(p, key); });
    } else {
      probabilities([](Vec<S> p, int64_t) { return p; });
    }
    for (int64_t c = to; c < tile_to; c += kLanes<S>) store(row + c, zero<S>());
    w.sum[i] += reduce<S>(total, [](Vec<S> x, Vec<S> y) { return x + y; });
  }
}

// Queries [q0, q0 + rows) of one head.
template <class T>
static void forward_block(const AttentionArgs& a, const Sequence& s, int64_t head, int64_t q0, int64_t rows,
                          int64_t packed_from, PackedRows<compute_t<T>> values, ForwardScratch<T>& w) {
  using S = compute_t<T>;
  const int64_t columns = round_up<S>(a.value_dim);
  const RowTiles tiles(rows);
  KeyRange keys = s.range(q0, q0 + rows);
  if (a.mask.data) keys = w.mask.summarize(s, head, q0, rows, keys);

  const PackedRows<S> query = compute_rows(row_of<T>(a.query, s, head, s.first_query + q0), a.query.row, rows,
                                           a.head_dim, w.query);
  for (int64_t i = 0; i < rows; ++i) w.largest[i] = -kInf<S>, w.sum[i] = 0;
  bool started[kQueryBlock] = {};  // per tile: does w.output hold something?

  for (int64_t base = keys.begin / kKeyBlock * kKeyBlock; base < keys.end; base += kKeyBlock) {
    const KeyRange block = intersection(keys, {base, base + kKeyBlock});
    if (a.mask.data && !w.mask.keeps_any(block.begin, block.end)) continue;
    const bool masked = a.mask.data && !w.mask.keeps_all(block.begin, block.end);
    score_block<S>(s, q0, tiles, base, block, query, a.head_dim, w.keys, packed_from, w.scores);
    for (int64_t t = 0; t < tiles.count; ++t) softmax_tile<T>(a, s, head, q0, tiles.begin[t], tiles.begin[t + 1], base, block, masked, w);
    for (int64_t c = 0; c < columns; c += kTileColumns<S>) {
      const int vecs = int(min<int64_t>(kTileVecs, (columns - c) / kLanes<S>));
      for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t i0 = tiles.begin[t], i1 = tiles.begin[t + 1];
        const KeyRange tile = intersection(block, s.range(q0 + i0, q0 + i1));
        if (tile.begin >= tile.end) continue;
        (started[t] ? product<S, true> : product<S, false>)(
            int(i1 - i0), vecs, tile.end - tile.begin, w.scores + i0 * kScoreStride + tile.begin - base, kScoreStride,
            values.data + tile.begin * values.stride + c, values.stride, w.output + i0 * columns + c, columns);
      }
    }
    for (int64_t t = 0; t < tiles.count; ++t) {
      const KeyRange tile = intersection(block, s.range(q0 + tiles.begin[t], q0 + tiles.begin[t + 1]));
      started[t] |= tile.begin < tile.end;
    }
  }

  for (int64_t i = 0; i < rows; ++i) {
    const S sum = w.sum[i], factor = 1 / sum;
    T* output = row_of<T>(a.output, s, head, s.first_query + q0 + i);
    for_columns<S>(a.value_dim, [&](int64_t c, int lanes) {
      store_lanes(output + c, sum == 0 ? zero<S>() : load(w.output + i * columns + c) * factor, lanes);
    });
    *row_of<S>(a.lse, s, head, s.first_query + q0 + i) = sum == 0 ? -kInf<S> : w.largest[i] + log_of(sum);
  }
}

template <class T>
static void forward_pair(const AttentionArgs& a, const Sequence& s, int64_t kv_head, int64_t split, int64_t splits,
                         ForwardScratch<T>& w) {
  using S = compute_t<T>;
  const int64_t group = a.heads / a.kv_heads, blocks = (s.queries + kQueryBlock - 1) / kQueryBlock;
  const int64_t begin = group * blocks * split / splits, end = group * blocks * (split + 1) / splits;
  if (begin == end) return;
  const bool one_head = begin / blocks == (end - 1) / blocks;
  KeyRange keys = one_head ? s.range(s.queries * (begin % blocks) / blocks,
                                     s.queries * ((end - 1) % blocks + 1) / blocks)
                           : s.range(0, s.queries);
  if (a.mask.data && a.mask.query == 0 && (one_head || a.mask.head == 0))
    keys = w.mask.summarize(s, kv_head * group + begin / blocks, 0, 1, keys);
  keys.begin = keys.begin / kPanelKeys<S> * kPanelKeys<S>;
  const int64_t count = max<int64_t>(0, keys.end - keys.begin);
  pack_columns<T>(row_of<T>(a.key, s, kv_head, s.first_key + keys.begin), a.key.row, count, a.head_dim, S(a.scale),
                  w.keys);
  const bool few = group * s.queries < 8;  // copying the values would cost more than it saves
  PackedRows<S> values = pack_rows<T>(row_of<T>(a.value, s, kv_head, s.first_key + keys.begin), a.value.row, count,
                                      a.value_dim, few, w.values);
  values.data -= keys.begin * values.stride;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t q0 = s.queries * (b % blocks) / blocks, q1 = s.queries * (b % blocks + 1) / blocks;
    forward_block<T>(a, s, kv_head * group + b / blocks, q0, q1 - q0, keys.begin, values, w);
  }
}

// What the pair after this one begins with, unless it is so large that it would push this one out of the cache.
template <class T> static Prefetch prefetch_pair(const AttentionArgs& a, const Sequence& now, int64_t pair) {
  Prefetch prefetch;
  const Sequence s(a, pair / a.kv_heads);
  const int64_t group = a.heads / a.kv_heads, kv_head = pair % a.kv_heads, head = kv_head * group;
  const int64_t size = sizeof(T), key_bytes = a.head_dim * size, value_bytes = a.value_dim * size;
  if (group * now.queries < 8 || (s.keys + s.queries) * (key_bytes + value_bytes) > 512 * 1024) return prefetch;
  int64_t steps = group * ((now.queries + kTileRows - 1) / kTileRows) * ((now.keys + kKeyBlock - 1) / kKeyBlock);
  steps = max<int64_t>(1, a.is_causal ? steps / 2 : steps);
  prefetch.add(row_of<T>(a.key, s, kv_head, s.first_key), a.key.row * size, key_bytes, s.keys, steps);
  prefetch.add(row_of<T>(a.value, s, kv_head, s.first_key), a.value.row * size, value_bytes, s.keys, steps);
  prefetch.add(row_of<T>(a.query, s, head, s.first_query), a.query.row * size, key_bytes, s.queries, steps);
  prefetch.add(row_of<T>(a.output, s, head, s.first_query), a.output.row * size, value_bytes, s.queries, steps);
  return prefetch;
}

void attention(const AttentionArgs& a, int64_t begin, int64_t end, int64_t split, int64_t splits, void* scratch) {
  dispatch(a.dtype, [&]<class T>() {
    ForwardScratch<T> w(a, scratch);
    for (int64_t pair = begin; pair < end; ++pair) {
      const Sequence s(a, pair / a.kv_heads);
      w.prefetch = pair + 1 < end ? prefetch_pair<T>(a, s, pair + 1) : Prefetch();
      forward_pair<T>(a, s, pair % a.kv_heads, split, splits, w);
    }
  });
}

}  // namespace fastformer::FASTFORMER_ISA
