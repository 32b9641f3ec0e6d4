// Attention, backward: block by block of queries x keys the probabilities come back from the scores and the
// log-sum-exp, with S = scale Q K^T + mask, P = exp(S - lse), Pd = dropout(P):
//   dV = Pd^T dO,  dP = dropout(dO V^T),  dS = P (dP - delta) with delta = rowsum(dO O),  dQ = scale dS K,
//   dK = scale dS^T Q.

#include "attention_products.h"

namespace fastformer::FASTFORMER_ISA {

template <class T> struct BackwardScratch {
  using S = compute_t<T>;
  Scratch scratch;
  MaskRows<S> mask;
  // Of one block of keys:
  S *key_columns, *value_columns;  // packed
  S* keys;                         // packed rows
  S *grad_key, *grad_value;        // (kKeyBlock, columns rounded up)
  // Of one block of queries:
  S *query, *grad_output;          // (kQueryBlock, columns rounded up)
  S *probabilities, *grad_scores;  // (kQueryBlock, kScoreStride)
  S *lse, *delta;                  // (kQueryBlock)
  // Of all query heads of a pair:
  S* grad_query;                   // (heads, queries, head_dim rounded up)
  Prefetch prefetch;

  BackwardScratch(const AttentionArgs& a, void* memory) : scratch{(char*)memory}, mask(a, scratch) {
    const int64_t columns = round_up<S>(a.head_dim), value_dim = round_up<S>(a.value_dim);
    key_columns = scratch.take<S>(kKeyBlock * columns);
    value_columns = scratch.take<S>(kKeyBlock * value_dim);
    keys = scratch.take<S>(kKeyBlock * columns);
    grad_key = scratch.take<S>(kKeyBlock * columns);
    grad_value = scratch.take<S>(kKeyBlock * value_dim);
    query = scratch.take<S>(kQueryBlock * columns);
    grad_output = scratch.take<S>(kQueryBlock * value_dim);
    probabilities = scratch.take<S>(kQueryBlock * kScoreStride);
    grad_scores = scratch.take<S>(kQueryBlock * kScoreStride);
    lse = scratch.take<S>(kQueryBlock);
    delta = scratch.take<S>(kQueryBlock);
    grad_query = scratch.take<S>(a.heads / a.kv_heads * a.queries * columns);
  }
};

int64_t attention_backward_scratch_bytes(const AttentionBackwardArgs& b) {
  int64_t bytes = 0;
  dispatch(b.forward.dtype,
           [&]<class T>() { bytes = BackwardScratch<T>(b.forward, nullptr).scratch.next - (char*)nullptr; });
  return bytes;
}

// Scores -> dropout(P) and dO V^T -> dS, in place, for a block of queries x keys.
template <class T>
static void differentiate(const AttentionArgs& a, const Sequence& s, int64_t head, int64_t q0, int64_t rows,
                          int64_t base, KeyRange block, bool masked, BackwardScratch<T>& w) {
  using S = compute_t<T>;
  const int64_t block_from = round_down<S>(block.begin - base), block_to = round_up<S>(block.end - base);
  for (int64_t i = 0; i < rows; ++i) {
    if (i % kTileRows == 0) w.prefetch.step();
    S *p = w.probabilities + i * kScoreStride, *ds = w.grad_scores + i * kScoreStride;
    const RowRange<S> row(s, q0 + i, block, base);
    for (int64_t c = block_from; c < row.from; c += kLanes<S>) store(p + c, zero<S>()), store(ds + c, zero<S>());
    for (int64_t c = row.to; c < block_to; c += kLanes<S>) store(p + c, zero<S>()), store(ds + c, zero<S>());
    if (row.from == row.to) continue;
    cut_edges(p, row.begin, row.end);
    if (masked) w.mask.apply(s, head, q0 + i, base, row, p);
    const S lse = w.lse[i];
    const Vec<S> delta = splat<S>(w.delta[i]);
    const auto gradients = [&](auto drop) {
      for (int64_t c = row.from; c < row.to; c += kLanes<S>) {
        const Vec<S> score = load(p + c), x = exp_score(score - lse);
        const Vec<S> dp = drop(load(ds + c), base + c);
        const Vec<S> grad = x * (dp - (x == S(1) ? dp : delta));  // one key alone: 0 without rounding errors
        store(ds + c, score == -kInf<S> ? zero<S>() : grad);  // the other factor may be anything where nothing is seen
        store(p + c, drop(x, base + c));
      }
    };
    if (a.dropout.threshold) {
      RowDropout dropout(a.dropout, uint32_t(s.index), uint32_t(head), uint32_t(q0 + i));
      gradients([&](Vec<S> x, int64_t key) { return dropout.apply<S>(x, key); });
    } else {
      gradients([](Vec<S> x, int64_t) { return x; });
    }
  }
}

// c (keys from `base` on, columns) += a^T b over the rows of a block: a (rows, kScoreStride), column 0 = key `base`;
// b (rows, columns). Each tile of keys takes the rows that see it.
template <class S>
static void add_transposed(const Sequence& s, int64_t q0, int64_t rows, int64_t base, KeyRange keys, const S* a,
                           PackedRows<S> b, int64_t columns, S* c) {
  for (int64_t column = 0; column < columns; column += kTileColumns<S>) {
    const int vecs = int(min<int64_t>(kTileVecs, (columns - column) / kLanes<S>));
    int64_t first = 0, last = 0;
    for (int64_t key = keys.begin; key < keys.end; key += kTileRows) {
      const int64_t end = min(key + kTileRows, keys.end);
      while (first < rows && s.end(q0 + first) <= key) ++first;
      while (last < rows && s.begin(q0 + last) < end) ++last;
      if (first >= last) continue;
      product<S, true, true>(int(end - key), vecs, last - first, a + first * kScoreStride + key - base, kScoreStride,
                             b.data + first * b.stride + column, b.stride, c + (key - base) * columns + column,
                             columns);
    }
  }
}

// The queries [q0, q0 + rows) of one head against one block of keys, which begins at `base`.
template <class T>
static void backward_block(const AttentionBackwardArgs& b, AttentionGradients wanted, const Sequence& s, int64_t head,
                           int64_t q0, int64_t rows, int64_t base, KeyRange keys, PackedRows<compute_t<T>> key_rows,
                           compute_t<T>* grad_query, BackwardScratch<T>& w) {
  using S = compute_t<T>;
  const AttentionArgs& a = b.forward;
  keys = intersection(keys, s.range(q0, q0 + rows));
  if (keys.begin >= keys.end) return;
  if (a.mask.data) keys = w.mask.summarize(s, head, q0, rows, keys);
  if (keys.begin >= keys.end) return;
  const bool masked = a.mask.data && !w.mask.keeps_all(keys.begin, keys.end);

  const int64_t columns = round_up<S>(a.head_dim), row0 = s.first_query + q0;
  const RowTiles tiles(rows);
  const PackedRows<S> query =
      pack_rows<T>(row_of<T>(a.query, s, head, row0), a.query.row, rows, a.head_dim, false, w.query);
  const PackedRows<S> grad_output = pack_rows<T>(row_of<T>(b.grad_output, s, head, row0), b.grad_output.row, rows,
                                                 a.value_dim, false, w.grad_output);
  for (int64_t i = 0; i < rows; ++i) {
    const T* output = row_of<T>(a.output, s, head, row0 + i);
    Vec<S> delta = zero<S>();
    for_columns<S>(a.value_dim, [&](int64_t c, int lanes) {
      delta += load(grad_output.data + i * grad_output.stride + c) * load_lanes(output + c, lanes);
    });
    w.delta[i] = sum<S>(delta);
    const S lse = *row_of<S>(a.lse, s, head, row0 + i);
    w.lse[i] = lse == -kInf<S> ? kInf<S> : lse;  // a row that sees nothing: all its probabilities are 0
  }

  if (reads_keys_in_place(a))
    score_query<T>(base, keys, query.data, a.head_dim, row_of<T>(a.key, s, head, s.first_key), a.key.row, S(a.scale),
                   w.probabilities);
  else
    score_block<S>(s, q0, tiles, base, keys, query, a.head_dim, w.key_columns, base, w.probabilities);
  score_block<S>(s, q0, tiles, base, keys, grad_output, a.value_dim, w.value_columns, base, w.grad_scores);
  differentiate<T>(a, s, head, q0, rows, base, keys, masked, w);
  if (wanted != AttentionGradients::queries) {
    add_transposed<S>(s, q0, rows, base, keys, w.probabilities, grad_output, round_up<S>(a.value_dim), w.grad_value);
    add_transposed<S>(s, q0, rows, base, keys, w.grad_scores, query, columns, w.grad_key);
  }
  if (wanted != AttentionGradients::keys)
    add_rows<S>(s, q0, tiles, base, keys, w.grad_scores, key_rows, base, columns, grad_query);
}

template <class T>
static void backward_pair(const AttentionBackwardArgs& b, AttentionGradients wanted, const Sequence& s, int64_t kv_head,
                          int64_t split, int64_t splits, BackwardScratch<T>& w) {
  using S = compute_t<T>;
  const AttentionArgs& a = b.forward;
  const int64_t columns = round_up<S>(a.head_dim), value_columns = round_up<S>(a.value_dim);
  const int64_t head = kv_head * (a.heads / a.kv_heads), key_blocks = (s.keys + kKeyBlock - 1) / kKeyBlock;
  const bool share_queries = wanted == AttentionGradients::queries, share_keys = wanted == AttentionGradients::keys;
  const QueryBlocks blocks(a, s, share_queries ? split : 0, share_queries ? splits : 1);
  const KeyRange keys = share_queries ? blocks.keys(s)
                        : share_keys  ? KeyRange{key_blocks * split / splits * kKeyBlock,
                                                 min(s.keys, key_blocks * (split + 1) / splits * kKeyBlock)}
                                      : KeyRange{0, s.keys};
  const auto grad_query = [&](int64_t block) {
    return w.grad_query + (blocks.head(block) * s.queries + blocks.first_query(block)) * columns;
  };
  for (int64_t block = blocks.begin; block < blocks.end; ++block)
    for (int64_t i = 0; i < blocks.rows(block) * columns; i += kLanes<S>) store(grad_query(block) + i, zero<S>());

  for (int64_t base = keys.begin / kKeyBlock * kKeyBlock; base < keys.end; base += kKeyBlock) {
    const int64_t count = min(kKeyBlock, s.keys - base);
    const T* key = row_of<T>(a.key, s, kv_head, s.first_key + base);
    pack_columns<T>(key, a.key.row, count, a.head_dim, S(a.scale), w.key_columns);
    pack_columns<T>(row_of<T>(a.value, s, kv_head, s.first_key + base), a.value.row, count, a.value_dim, S(1),
                    w.value_columns);
    const PackedRows<S> key_rows = pack_rows<T>(key, a.key.row, count, a.head_dim, false, w.keys);
    for (int64_t i = 0; i < count * columns; i += kLanes<S>) store(w.grad_key + i, zero<S>());
    for (int64_t i = 0; i < count * value_columns; i += kLanes<S>) store(w.grad_value + i, zero<S>());
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      backward_block<T>(b, wanted, s, head + blocks.head(block), blocks.first_query(block), blocks.rows(block), base,
                        intersection(keys, {base, base + count}), key_rows, grad_query(block), w);
    }
    if (share_queries) continue;
    store_rows<T>(w.grad_key, columns, count, a.head_dim, S(a.scale),
                  row_of<T>(b.grad_key, s, kv_head, s.first_key + base), b.grad_key.row);
    store_rows<T>(w.grad_value, value_columns, count, a.value_dim, S(1),
                  row_of<T>(b.grad_value, s, kv_head, s.first_key + base), b.grad_value.row);
  }
  if (share_keys) return;
  for (int64_t block = blocks.begin; block < blocks.end; ++block)
    store_rows<T>(grad_query(block), columns, blocks.rows(block), a.head_dim, S(a.scale),
                  row_of<T>(b.grad_query, s, head + blocks.head(block), s.first_query + blocks.first_query(block)),
                  b.grad_query.row);
}

// What the pair after this one reads and writes.
template <class T>
static Prefetch prefetch_pair(const AttentionBackwardArgs& b, const Sequence& now, int64_t pair) {
  const AttentionArgs& a = b.forward;
  const Sequence s(a, pair / a.kv_heads);
  const int64_t kv_head = pair % a.kv_heads, head = kv_head * (a.heads / a.kv_heads), size = sizeof(T);
  Prefetch prefetch(a, now, s, size * (a.head_dim + a.value_dim) * 2);
  prefetch.add(row_of<T>(a.key, s, kv_head, s.first_key), a.key.row * size, a.head_dim * size, s.keys);
  prefetch.add(row_of<T>(a.value, s, kv_head, s.first_key), a.value.row * size, a.value_dim * size, s.keys);
  prefetch.add(row_of<T>(a.query, s, head, s.first_query), a.query.row * size, a.head_dim * size, s.queries);
  prefetch.add(row_of<T>(a.output, s, head, s.first_query), a.output.row * size, a.value_dim * size, s.queries);
  prefetch.add(row_of<T>(b.grad_output, s, head, s.first_query), b.grad_output.row * size, a.value_dim * size,
               s.queries);
  prefetch.add(row_of<T>(b.grad_query, s, head, s.first_query), b.grad_query.row * size, a.head_dim * size, s.queries);
  prefetch.add(row_of<T>(b.grad_key, s, kv_head, s.first_key), b.grad_key.row * size, a.head_dim * size, s.keys);
  prefetch.add(row_of<T>(b.grad_value, s, kv_head, s.first_key), b.grad_value.row * size, a.value_dim * size, s.keys);
  return prefetch;
}

void attention_backward(const AttentionBackwardArgs& b, AttentionGradients wanted, int64_t begin, int64_t end,
                        int64_t split, int64_t splits, void* scratch) {
  dispatch(b.forward.dtype, [&]<class T>() {
    BackwardScratch<T> w(b.forward, scratch);
    for (int64_t pair = begin; pair < end; ++pair) {
      const Sequence s(b.forward, pair / b.forward.kv_heads);
      w.prefetch = pair + 1 < end ? prefetch_pair<T>(b, s, pair + 1) : Prefetch();
      backward_pair<T>(b, wanted, s, pair % b.forward.kv_heads, split, splits, w);
    }
  });
}

}  // namespace fastformer::FASTFORMER_ISA
