// Attention, forward: the scores of a block of queries x keys, an online softmax (Milakov and Gimelshein, 2018), and
// the weighted sum of the values, block by block of keys.

#include "attention_products.h"

namespace fastformer::FASTFORMER_ISA {

template <class T> struct ForwardScratch {
  using S = compute_t<T>;
  Scratch scratch;
  MaskRows<S> mask;
  S* keys;           // packed columns
  S* values;         // packed rows
  S* query;          // (kQueryBlock, head_dim), converted
  S* scores;         // (kQueryBlock, kScoreStride), then the probabilities, not yet divided by their sum
  S* output;         // (kQueryBlock, value_dim rounded up), not yet divided either
  S *largest, *sum;  // (kQueryBlock), of the blocks of keys so far
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

// Of whole vectors.
template <class S> FF_INLINE S largest_score(const S* begin, const S* end) {
  Vec<S> a = splat<S>(-kInf<S>), b = a;
  for (; begin + kLanes<S> < end; begin += 2 * kLanes<S>) {
    a = larger<S>(load(begin), a);
    b = larger<S>(load(begin + kLanes<S>), b);
  }
  if (begin < end) a = larger<S>(load(begin), a);
  return reduce<S>(larger<S>(a, b), larger<S>);
}

// Scores to probabilities, in place, for the rows [i0, i1) of a block. Where a row's largest score rises, its output
// and sum so far fall.
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
    const RowRange<S> seen(s, q0 + i, tile, base);
    if (seen.from == seen.to) continue;
    cut_edges(row, seen.begin, seen.end);
    if (masked) w.mask.apply(s, head, q0 + i, base, seen, row);
    const S before = w.largest[i], now = max(before, largest_score(row + seen.from, row + seen.to));
    if (!(now > before)) continue;
    w.largest[i] = now;
    if (w.sum[i] == 0) continue;
    const S factor = exp_score(splat<S>(before - now))[0];
    w.sum[i] *= factor;
    S* output = w.output + i * columns;
    for (int64_t c = 0; c < columns; c += kLanes<S>) store(output + c, load(output + c) * factor);
  }
  for (int64_t i = i0; i < i1; ++i) {
    S* row = w.scores + i * kScoreStride;
    const RowRange<S> seen(s, q0 + i, tile, base);
    const S shift = w.largest[i] == -kInf<S> ? 0 : w.largest[i];
    for (int64_t c = tile_from; c < seen.from; c += kLanes<S>) store(row + c, zero<S>());
    Vec<S> total = zero<S>();
    const auto probabilities = [&](auto drop) {
      for (int64_t c = seen.from; c < seen.to; c += kLanes<S>) {
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
    for (int64_t c = seen.to; c < tile_to; c += kLanes<S>) store(row + c, zero<S>());
    w.sum[i] += reduce<S>(total, [](Vec<S> x, Vec<S> y) { return x + y; });
  }
}

// Queries [q0, q0 + rows) of one head. Keys and values are packed from key `packed_from` on; where `key` is given, keys
// are read there instead.
template <class T>
static void forward_block(const AttentionArgs& a, const Sequence& s, int64_t head, int64_t q0, int64_t rows,
                          const T* key, int64_t packed_from, PackedRows<compute_t<T>> values, ForwardScratch<T>& w) {
  using S = compute_t<T>;
  const int64_t columns = round_up<S>(a.value_dim), row0 = s.first_query + q0;
  const RowTiles tiles(rows);
  KeyRange keys = s.range(q0, q0 + rows);
  if (a.mask.data) keys = w.mask.summarize(s, head, q0, rows, keys);

  const PackedRows<S> query = compute_rows(row_of<T>(a.query, s, head, row0), a.query.row, rows, a.head_dim, w.query);
  for (int64_t i = 0; i < rows; ++i) w.largest[i] = -kInf<S>, w.sum[i] = 0;
  for (int64_t i = 0; i < rows * columns; i += kLanes<S>) store(w.output + i, zero<S>());

  for (int64_t base = keys.begin / kKeyBlock * kKeyBlock; base < keys.end; base += kKeyBlock) {
    const KeyRange block = intersection(keys, {base, base + kKeyBlock});
    if (a.mask.data && !w.mask.keeps_any(block.begin, block.end)) continue;
    const bool masked = a.mask.data && !w.mask.keeps_all(block.begin, block.end);
    if (key)
      score_query<T>(base, block, query.data, a.head_dim, key, a.key.row, S(a.scale), w.scores);
    else
      score_block<S>(s, q0, tiles, base, block, query, a.head_dim, w.keys, packed_from, w.scores);
    for (int64_t t = 0; t < tiles.count; ++t)
      softmax_tile<T>(a, s, head, q0, tiles.begin[t], tiles.begin[t + 1], base, block, masked, w);
    add_rows<S>(s, q0, tiles, base, block, w.scores, values, packed_from, columns, w.output);
  }

  for (int64_t i = 0; i < rows; ++i) {
    const S sum = w.sum[i];  // 0: the row sees nothing
    const auto divide = [&](auto* output) {
      for_columns<S>(a.value_dim, [&](int64_t c, int lanes) {
        store_lanes(output + c, sum == 0 ? zero<S>() : load(w.output + i * columns + c) * (1 / sum), lanes);
      });
    };
    if (a.output_is_compute_type)
      divide(row_of<S>(a.output, s, head, row0 + i));
    else
      divide(row_of<T>(a.output, s, head, row0 + i));
    *row_of<S>(a.lse, s, head, row0 + i) = sum == 0 ? -kInf<S> : w.largest[i] + log_of(sum);
  }
}

template <class T>
static void forward_pair(const AttentionArgs& a, const Sequence& s, int64_t kv_head, int64_t split, int64_t splits,
                         ForwardScratch<T>& w) {
  using S = compute_t<T>;
  const int64_t head = kv_head * (a.heads / a.kv_heads);
  const QueryBlocks blocks(a, s, split, splits);
  if (blocks.begin == blocks.end) return;
  KeyRange keys = blocks.keys(s);
  if (a.mask.data && a.mask.query == 0 && (blocks.one_head() || a.mask.head == 0))
    keys = w.mask.summarize(s, head + blocks.head(blocks.begin), 0, 1, keys);
  keys.begin = keys.begin / kPanelKeys<S> * kPanelKeys<S>;
  const int64_t count = max<int64_t>(0, keys.end - keys.begin);
  const T* key = row_of<T>(a.key, s, kv_head, s.first_key);
  const bool in_place = reads_keys_in_place(a);
  if (!in_place) pack_columns<T>(key + keys.begin * a.key.row, a.key.row, count, a.head_dim, S(a.scale), w.keys);
  const PackedRows<S> values = pack_rows<T>(row_of<T>(a.value, s, kv_head, s.first_key + keys.begin), a.value.row,
                                            count, a.value_dim, s.queries < 8, w.values);
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    forward_block<T>(a, s, head + blocks.head(b), blocks.first_query(b), blocks.rows(b), in_place ? key : nullptr,
                     keys.begin, values, w);
  }
}

// What the pair after this one reads and writes.
template <class T> static Prefetch prefetch_pair(const AttentionArgs& a, const Sequence& now, int64_t pair) {
  const Sequence s(a, pair / a.kv_heads);
  const int64_t kv_head = pair % a.kv_heads, head = kv_head * (a.heads / a.kv_heads), size = sizeof(T);
  Prefetch prefetch(a, now, s, size * (a.head_dim + a.value_dim));
  prefetch.add(row_of<T>(a.key, s, kv_head, s.first_key), a.key.row * size, a.head_dim * size, s.keys);
  prefetch.add(row_of<T>(a.value, s, kv_head, s.first_key), a.value.row * size, a.value_dim * size, s.keys);
  prefetch.add(row_of<T>(a.query, s, head, s.first_query), a.query.row * size, a.head_dim * size, s.queries);
  prefetch.add(row_of<T>(a.output, s, head, s.first_query), a.output.row * size, a.value_dim * size, s.queries);
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

// output = sum over the parts of exp(lse_part - lse) output_part, lse = log of the sum of exp(lse_part).
template <class T> static void merge_rows(const AttentionMergeArgs& m, int64_t row_begin, int64_t row_end) {
  using S = compute_t<T>;
  const AttentionArgs& a = m.whole;
  const int64_t rows = a.sequences * a.heads;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const S* outputs = (const S*)m.outputs + row * a.value_dim;
    const S* lses = (const S*)m.lses + row;
    S largest = -kInf<S>, sum = 0;
    for (int64_t p = 0; p < m.parts; ++p) largest = max(largest, lses[p * rows]);
    const S shift = largest == -kInf<S> ? 0 : largest;
    const auto weight = [&](int64_t part) { return exp_score(splat<S>(lses[part * rows] - shift))[0]; };
    for (int64_t p = 0; p < m.parts; ++p) sum += weight(p);
    const Sequence s(a, row / a.heads);
    const int64_t head = row % a.heads;
    T* output = row_of<T>(a.output, s, head, 0);
    for_columns<S>(a.value_dim, [&](int64_t c, int lanes) {
      Vec<S> total = zero<S>();
      for (int64_t p = 0; p < m.parts && sum != 0; ++p)
        total += load_lanes(outputs + p * rows * a.value_dim + c, lanes) * (weight(p) / sum);
      store_lanes(output + c, total, lanes);
    });
    *row_of<S>(a.lse, s, head, 0) = sum == 0 ? -kInf<S> : largest + log_of(sum);
  }
}

void attention_merge(const AttentionMergeArgs& m, int64_t row_begin, int64_t row_end) {
  dispatch(m.whole.dtype, [&]<class T>() { merge_rows<T>(m, row_begin, row_end); });
}

}  // namespace fastformer::FASTFORMER_ISA
