// Attention, backward: the probabilities again from the log-sum-exp, block by block (Dao, "FlashAttention-2", 2023).
//   delta = rowsum(grad_output * output)       P = exp(scores - lse), D its dropout factors
//   grad_value = (P D)^T grad_output           dS = P (D grad_output value^T - delta)
//   grad_query = scale dS key                  grad_key = scale dS^T query

#include "attention.h"

namespace fastformer::FASTFORMER_ISA {

template <class T> struct BackwardScratch {
  using S = compute_t<T>;
  Scratch scratch;
  MaskRows<S> mask;
  S *keys, *values;                // packed columns: of the scores and of grad_output value^T
  S* key_rows;                     // packed rows
  S *query, *query_rows;           // (kQueryBlock, head_dim): for the scores, for grad_key
  S *grad_output, *grad_rows;      // (kQueryBlock, value_dim): for dS, for grad_value
  S *scores, *grad_scores;         // (kQueryBlock, kScoreStride): then P D and dS
  S *delta, *lse;                  // (kQueryBlock)
  S *grad_query;                   // (kQueryBlock, head_dim rounded up)
  S *grad_key, *grad_value;        // (keys, head_dim and value_dim rounded up)

  BackwardScratch(const AttentionArgs& a, void* memory) : scratch{(char*)memory}, mask(a, scratch) {
    const int64_t padded = a.keys + 2 * kPanelKeys<S>, d = round_up<S>(a.head_dim), dv = round_up<S>(a.value_dim);
    keys = scratch.take<S>(padded * a.head_dim);
    values = scratch.take<S>(padded * a.value_dim);
    key_rows = scratch.take<S>(a.keys * d);
    query = scratch.take<S>(kQueryBlock * d);
    query_rows = scratch.take<S>(kQueryBlock * d);
    grad_output = scratch.take<S>(kQueryBlock * dv);
    grad_rows = scratch.take<S>(kQueryBlock * dv);
    scores = scratch.take<S>(kQueryBlock * kScoreStride);
    grad_scores = scratch.take<S>(kQueryBlock * kScoreStride);
    delta = scratch.take<S>(kQueryBlock);
    lse = scratch.take<S>(kQueryBlock);
    grad_query = scratch.take<S>(kQueryBlock * d);
    grad_key = scratch.take<S>(a.keys * d);
    grad_value = scratch.take<S>(a.keys * dv);
  }
};

int64_t attention_backward_scratch_bytes(const AttentionBackwardArgs& b) {
  int64_t bytes = 0;
  dispatch(b.forward.dtype,
           [&]<class T>() { bytes = BackwardScratch<T>(b.forward, nullptr).scratch.next - (char*)nullptr; });
  return bytes;
}

// c += a^T b: a (depth, rows), rows of a kScoreStride apart; b and c have `columns`, a multiple of a vector.
template <class S>
static void add_transposed(int64_t rows, int64_t depth, int64_t columns, const S* a, PackedRows<S> b, S* c) {
  for (int64_t column = 0; column < columns; column += kTileColumns<S>) {
    const int vecs = int(min<int64_t>(kTileVecs, (columns - column) / kLanes<S>));
    for (int64_t i = 0; i < rows; i += kTileRows)
      product<S, true, true>(int(min<int64_t>(kTileRows, rows - i)), vecs, depth, a + i, kScoreStride, b.data + column,
                             b.stride, c + i * columns + column, columns);
  }
}

// One row of a block of keys: scores to P D, grad_scores (grad_output value^T) to dS; 0 where the query sees no key.
// `seen` and `block` are relative to key `base`.
template <class T>
static void gradient_row(const AttentionArgs& a, const Sequence& s, int64_t head, int64_t query, int64_t base,
                         KeyRange seen, KeyRange block, bool masked, compute_t<T> lse, compute_t<T> delta,
                         compute_t<T>* scores, compute_t<T>* grad_scores, BackwardScratch<T>& w) {
  using S = compute_t<T>;
  const int64_t begin = round_down<S>(block.begin), end = round_up<S>(block.end);
  const bool empty = seen.begin >= seen.end || lse == -kInf<S>;
  const int64_t from = empty ? end : round_down<S>(seen.begin), to = empty ? end : round_up<S>(seen.end);
  for (int64_t c = begin; c < from; c += kLanes<S>) store(scores + c, zero<S>()), store(grad_scores + c, zero<S>());
  for (int64_t c = to; c < end; c += kLanes<S>) store(scores + c, zero<S>()), store(grad_scores + c, zero<S>());
  if (empty) return;
  cut_edges(scores, seen.begin, seen.end);
  if (masked) w.mask.apply(w.mask.row(s, head, query), base + from, seen.end - from, scores + from);
  const auto gradients = [&](auto drop) {
    for (int64_t c = from; c < to; c += kLanes<S>) {
      const Vec<S> score = load(scores + c), p = exp_score(score - lse);
      const Vec<S> grad = p * (drop(load(grad_scores + c), base + c) - delta);
      store(scores + c, drop(p, base + c));
      store(grad_scores + c, score == -kInf<S> ? zero<S>() : grad);  // what lies beyond the edges may be anything
    }
  };
  if (a.dropout.threshold) {
    RowDropout dropout(a.dropout, uint32_t(s.index), uint32_t(head), uint32_t(query));
    gradients([&](Vec<S> x, int64_t key) { return dropout.apply<S>(x, key); });
  } else {
    gradients([](Vec<S> x, int64_t) { return x; });
  }
}

// Queries [q0, q0 + rows) of one head against the keys `share`: adds to grad_key and grad_value, writes grad_query.
template <class T>
static void backward_block(const AttentionBackwardArgs& b, AttentionGradients wanted, const Sequence& s, int64_t head,
                           int64_t q0, int64_t rows, KeyRange share, int64_t packed_from,
                           PackedRows<compute_t<T>> key_rows, BackwardScratch<T>& w) {
  using S = compute_t<T>;
  const AttentionArgs& a = b.forward;
  const int64_t d = round_up<S>(a.head_dim), dv = round_up<S>(a.value_dim);
  const RowTiles tiles(rows);
  KeyRange keys = intersection(share, s.range(q0, q0 + rows));
  if (a.mask.data && keys.begin < keys.end) keys = w.mask.summarize(s, head, q0, rows, keys);

  const T* query = row_of<T>(a.query, s, head, s.first_query + q0);
  const T* grad = row_of<T>(b.grad_output, s, head, s.first_query + q0);
  const PackedRows<S> q = compute_rows(query, a.query.row, rows, a.head_dim, w.query);
  const PackedRows<S> g = compute_rows(grad, b.grad_output.row, rows, a.value_dim, w.grad_output);
  const PackedRows<S> query_rows = pack_rows<T>(query, a.query.row, rows, a.head_dim, true, w.query_rows);
  const PackedRows<S> grad_rows = pack_rows<T>(grad, b.grad_output.row, rows, a.value_dim, true, w.grad_rows);
  for (int64_t i = 0; i < rows; ++i) {
    const T* output = row_of<const T>(a.output, s, head, s.first_query + q0 + i);
    Vec<S> total = zero<S>();
    for_columns<S>(a.value_dim, [&](int64_t c, int lanes) {
      total += load_lanes(output + c, lanes) * load_lanes(grad + i * b.grad_output.row + c, lanes);
    });
    w.delta[i] = sum<S>(total);
    w.lse[i] = *row_of<S>(a.lse, s, head, s.first_query + q0 + i);
  }
  for (int64_t i = 0; i < rows * d; i += kLanes<S>) store(w.grad_query + i, zero<S>());

  for (int64_t base = keys.begin / kKeyBlock * kKeyBlock; base < keys.end; base += kKeyBlock) {
    const KeyRange block = intersection(keys, {base, base + kKeyBlock});
    if (a.mask.data && !w.mask.keeps_any(block.begin, block.end)) continue;
    const bool masked = a.mask.data && !w.mask.keeps_all(block.begin, block.end);
    score_block<S>(s, q0, tiles, base, block, q, a.head_dim, w.keys, packed_from, w.scores);
    score_block<S>(s, q0, tiles, base, block, g, a.value_dim, w.values, packed_from, w.grad_scores);
    for (int64_t i = 0; i < rows; ++i) {
      const KeyRange seen = intersection(block, s.range(q0 + i, q0 + i + 1));
      gradient_row<T>(a, s, head, q0 + i, base, {seen.begin - base, seen.end - base},
                      {block.begin - base, block.end - base}, masked, w.lse[i], w.delta[i],
                      w.scores + i * kScoreStride, w.grad_scores + i * kScoreStride, w);
    }
    const int64_t count = block.end - block.begin, column = block.begin - base;
    if (wanted != AttentionGradients::queries) {
      add_transposed(count, rows, dv, w.scores + column, grad_rows, w.grad_value + block.begin * dv);
      add_transposed(count, rows, d, w.grad_scores + column, query_rows, w.grad_key + block.begin * d);
    }
    if (wanted != AttentionGradients::keys)
      for (int64_t c = 0; c < d; c += kTileColumns<S>) {
        const int vecs = int(min<int64_t>(kTileVecs, (d - c) / kLanes<S>));
        for (int64_t t = 0; t < tiles.count; ++t)
          product<S, true>(int(tiles.begin[t + 1] - tiles.begin[t]), vecs, count,
                           w.grad_scores + tiles.begin[t] * kScoreStride + column, kScoreStride,
                           key_rows.data + block.begin * key_rows.stride + c, key_rows.stride,
                           w.grad_query + tiles.begin[t] * d + c, d);
      }
  }
  if (wanted == AttentionGradients::keys) return;
  for (int64_t i = 0; i < rows; ++i) {
    T* grad_query = row_of<T>(b.grad_query, s, head, s.first_query + q0 + i);
    for_columns<S>(a.head_dim, [&](int64_t c, int lanes) {
      store_lanes(grad_query + c, load(w.grad_query + i * d + c) * S(a.scale), lanes);
    });
  }
}

// rows (count, columns rounded up), times factor, to the rows of one head.
template <class T>
static void store_rows(const AttentionOutput& out, const Sequence& s, int64_t head, KeyRange rows, int64_t columns,
                       const compute_t<T>* from, compute_t<T> factor) {
  using S = compute_t<T>;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    T* to = row_of<T>(out, s, head, s.first_key + r);
    for_columns<S>(columns, [&](int64_t c, int lanes) {
      store_lanes(to + c, load(from + r * round_up<S>(columns) + c) * factor, lanes);
    });
  }
}

template <class T>
static void backward_pair(const AttentionBackwardArgs& b, AttentionGradients wanted, const Sequence& s,
                          int64_t kv_head, int64_t split, int64_t splits, BackwardScratch<T>& w) {
  using S = compute_t<T>;
  const AttentionArgs& a = b.forward;
  const int64_t group = a.heads / a.kv_heads, blocks = (s.queries + kQueryBlock - 1) / kQueryBlock;
  const int64_t key_blocks = (s.keys + kKeyBlock - 1) / kKeyBlock;
  KeyRange share = {0, s.keys};
  int64_t begin = 0, end = blocks;
  if (wanted == AttentionGradients::keys) {
    share = {key_blocks * split / splits * kKeyBlock, min(s.keys, key_blocks * (split + 1) / splits * kKeyBlock)};
  } else if (wanted == AttentionGradients::queries) {
    begin = blocks * split / splits;
    end = blocks * (split + 1) / splits;
  }
  const int64_t count = share.end - share.begin, d = round_up<S>(a.head_dim), dv = round_up<S>(a.value_dim);
  if (count > 0) {
    const T* key = row_of<T>(a.key, s, kv_head, s.first_key + share.begin);
    const T* value = row_of<T>(a.value, s, kv_head, s.first_key + share.begin);
    pack_columns<T>(key, a.key.row, count, a.head_dim, S(a.scale), w.keys);
    pack_columns<T>(value, a.value.row, count, a.value_dim, S(1), w.values);
    PackedRows<S> key_rows = pack_rows<T>(key, a.key.row, count, a.head_dim, false, w.key_rows);
    key_rows.data -= share.begin * key_rows.stride;
    if (wanted != AttentionGradients::queries) {
      for (int64_t i = share.begin * d; i < share.end * d; i += kLanes<S>) store(w.grad_key + i, zero<S>());
      for (int64_t i = share.begin * dv; i < share.end * dv; i += kLanes<S>) store(w.grad_value + i, zero<S>());
    }
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int64_t block = begin; block < end; ++block) {
        const int64_t q0 = s.queries * block / blocks, q1 = s.queries * (block + 1) / blocks;
        backward_block<T>(b, wanted, s, head, q0, q1 - q0, share, share.begin, key_rows, w);
      }
    if (wanted != AttentionGradients::queries) {
      store_rows<T>(b.grad_key, s, kv_head, share, a.head_dim, w.grad_key, S(a.scale));
      store_rows<T>(b.grad_value, s, kv_head, share, a.value_dim, w.grad_value, S(1));
    }
  } else if (wanted != AttentionGradients::keys && s.keys == 0) {  // no key: the gradient of the queries is 0
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int64_t q = s.queries * begin / max<int64_t>(blocks, 1); q < s.queries * end / max<int64_t>(blocks, 1); ++q) {
        T* grad_query = row_of<T>(b.grad_query, s, head, s.first_query + q);
        for_columns<S>(a.head_dim, [&](int64_t c, int lanes) { store_lanes(grad_query + c, zero<S>(), lanes); });
      }
  }
}

void attention_backward(const AttentionBackwardArgs& b, AttentionGradients wanted, int64_t sequence, int64_t kv_head,
                        int64_t split, int64_t splits, void* scratch) {
  dispatch(b.forward.dtype, [&]<class T>() {
    BackwardScratch<T> w(b.forward, scratch);
    backward_pair<T>(b, wanted, Sequence(b.forward, sequence), kv_head, split, splits, w);
  });
}

}  // namespace fastformer::FASTFORMER_ISA
