// scaled_dot_product_attention and varlen_attn.

#include "attention.h"

namespace fastformer {
namespace {

using torch::stable::transpose;

// The elements of a row adjacent: copied only where they are not.
Tensor adjacent(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

template <class Data> AttentionTensor<Data> view(Data* data, const Tensor& t) {
  if (t.dim() == 4) return {data, t.stride(0), t.stride(1), t.stride(2)};
  return {data, 0, t.stride(1), t.stride(0)};  // packed: (rows, heads, columns)
}
AttentionInput input(const Tensor& t) { return view(t.const_data_ptr(), t); }
AttentionOutput output(const Tensor& t) { return view(t.mutable_data_ptr(), t); }

AttentionMask mask_of(const std::optional<Tensor>& mask) {
  if (!mask) return {};
  return {mask->const_data_ptr(), mask->scalar_type() == ScalarType::Bool, mask->stride(0), mask->stride(1),
          mask->stride(2), mask->stride(3)};
}

// A new tensor of that many columns beside those of `like`, each row's heads adjacent in memory.
Tensor new_rows(const Tensor& like, int64_t columns) {
  if (like.dim() == 3) return empty({like.size(0), like.size(1), columns}, like.scalar_type());
  return transpose(empty({like.size(0), like.size(2), like.size(1), columns}, like.scalar_type()), 1, 2);
}

// cu_seq on the CPU, int32, from 0 up to `total`, never falling.
Tensor check_cu_seq(const Tensor& cu_seq, int64_t total, int64_t longest, const char* name) {
  STD_TORCH_CHECK(cu_seq.dim() == 1 && cu_seq.size(0) >= 1 && cu_seq.scalar_type() == ScalarType::Int, name,
                  " must be int32 of shape (sequences + 1,)");
  const Tensor checked = torch::stable::contiguous(cu_seq);
  const int32_t* p = checked.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(p[0] == 0, name, " must begin with 0, got ", p[0]);
  for (int64_t i = 1; i < checked.size(0); ++i)
    STD_TORCH_CHECK(p[i - 1] <= p[i] && p[i] - p[i - 1] <= longest, name, " must rise by 0 to ", longest,
                    " from sequence to sequence, got ", p[i - 1], " and ", p[i]);
  STD_TORCH_CHECK(p[checked.size(0) - 1] == total, name, " must end with the number of rows, ", total, ", got ",
                  p[checked.size(0) - 1]);
  return checked;
}

void forward(const AttentionArgs& args) {
  Phases phases(torch::stable::get_num_threads());
  const AttentionForward attention(args, phases.threads());
  const Tensor memory = empty({attention.bytes()}, ScalarType::Byte);
  attention.add_to(phases, static_cast<char*>(memory.mutable_data_ptr()));
  phases.run();
}

void backward(const AttentionBackwardArgs& b) {
  const Kernels& k = kernels();
  const AttentionArgs& a = b.forward;
  const int64_t pairs = a.sequences * a.kv_heads, threads = threads_for(a, torch::stable::get_num_threads());
  if (pairs == 0) return;
  const int64_t bytes = k.attention_backward_scratch_bytes(b);
  const auto run = [&](AttentionGradients gradients, int64_t splits) {
    const PairTasks tasks(pairs, splits, threads);
    parallel_tasks(tasks.count, [&](int64_t task) {
      tasks.run(task, [&](int64_t begin, int64_t end, int64_t split) {
        k.attention_backward(b, gradients, begin, end, split, splits, scratch(bytes));
      });
    });
  };
  // Whole pairs take 5 products, shares of pairs 4 + 3, because grad_key and grad_query need the same scores.
  const int64_t rounds = (pairs + threads - 1) / threads;
  if (threads == 1 || rounds * threads * 5 <= pairs * 7) return run(AttentionGradients::all, 1);
  run(AttentionGradients::keys, shares(pairs, threads, a.keys));
  run(AttentionGradients::queries, shares(pairs, threads, a.heads / a.kv_heads * a.queries));
}

struct Options {
  double dropout_p;
  const std::optional<Tensor>& seed;
  bool is_causal;
  double scale;
  int64_t window_left, window_right;
};

// Padded: (sequences, heads, rows, columns). Packed: (rows, heads, columns), with cu_seq_*.
AttentionArgs padded_args(const Tensor& query, const Tensor& key, const Tensor& value,
                          const std::optional<Tensor>& mask, const Options& o, const Tensor& result,
                          const Tensor& lse) {
  return {
      .dtype = dtype_of(query), .sequences = query.size(0), .heads = query.size(1), .kv_heads = key.size(1),
      .head_dim = query.size(3), .value_dim = value.size(3), .queries = query.size(2), .keys = key.size(2),
      .cu_seq_q = nullptr, .cu_seq_k = nullptr, .query = input(query), .key = input(key), .value = input(value),
      .mask = mask_of(mask), .is_causal = o.is_causal, .window_left = o.window_left, .window_right = o.window_right,
      .dropout = make_dropout(o.dropout_p, o.seed), .scale = o.scale, .output = output(result),
      .lse = {lse.mutable_data_ptr(), lse.stride(0), lse.stride(1), 1},
  };
}
AttentionArgs packed_args(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seq_q,
                          const Tensor& cu_seq_k, int64_t max_q, int64_t max_k, const Options& o, const Tensor& result,
                          const Tensor& lse) {
  STD_TORCH_CHECK(cu_seq_q.size(0) == cu_seq_k.size(0), "cu_seq_q and cu_seq_k must hold as many sequences, got ",
                  cu_seq_q.size(0) - 1, " and ", cu_seq_k.size(0) - 1);
  return {
      .dtype = dtype_of(query), .sequences = cu_seq_q.size(0) - 1, .heads = query.size(1), .kv_heads = key.size(1),
      .head_dim = query.size(2), .value_dim = value.size(2), .queries = max_q, .keys = max_k,
      .cu_seq_q = cu_seq_q.const_data_ptr<int32_t>(), .cu_seq_k = cu_seq_k.const_data_ptr<int32_t>(),
      .query = input(query), .key = input(key), .value = input(value), .mask = {},
      .is_causal = o.is_causal, .window_left = o.window_left, .window_right = o.window_right,
      .dropout = make_dropout(o.dropout_p, o.seed), .scale = o.scale, .output = output(result),
      .lse = {lse.mutable_data_ptr(), 0, lse.stride(0), 1},
  };
}

std::tuple<Tensor, Tensor> scaled_dot_product_attention(Tensor query, Tensor key, Tensor value,
                                                        std::optional<Tensor> attn_mask, double dropout_p,
                                                        std::optional<Tensor> seed, bool is_causal, double scale,
                                                        int64_t window_left, int64_t window_right) {
  query = adjacent(query), key = adjacent(key), value = adjacent(value);
  Tensor result = new_rows(query, value.size(3));
  Tensor lse = empty({query.size(0), query.size(1), query.size(2)}, compute_type(dtype_of(query)));
  const Options options = {dropout_p, seed, is_causal, scale, window_left, window_right};
  forward(padded_args(query, key, value, attn_mask, options, result, lse));
  return {result, lse};
}

std::tuple<Tensor, Tensor, Tensor> scaled_dot_product_attention_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, std::optional<Tensor> attn_mask, Tensor result,
    Tensor lse, double dropout_p, std::optional<Tensor> seed, bool is_causal, double scale, int64_t window_left,
    int64_t window_right) {
  query = adjacent(query), key = adjacent(key), value = adjacent(value);
  grad_output = adjacent(grad_output), result = adjacent(result);
  const Options options = {dropout_p, seed, is_causal, scale, window_left, window_right};
  const Tensor grad_query = new_rows(query, query.size(3)), grad_key = new_rows(key, key.size(3)),
               grad_value = new_rows(value, value.size(3));
  backward({
      .forward = padded_args(query, key, value, attn_mask, options, result, lse), .grad_output = input(grad_output),
      .grad_query = output(grad_query), .grad_key = output(grad_key), .grad_value = output(grad_value),
  });
  return {grad_query, grad_key, grad_value};
}

std::tuple<Tensor, Tensor> varlen_attn(Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor cu_seq_k,
                                       int64_t max_q, int64_t max_k, double dropout_p, std::optional<Tensor> seed,
                                       double scale, int64_t window_left, int64_t window_right) {
  query = adjacent(query), key = adjacent(key), value = adjacent(value);
  cu_seq_q = check_cu_seq(cu_seq_q, query.size(0), max_q, "cu_seq_q");
  cu_seq_k = check_cu_seq(cu_seq_k, key.size(0), max_k, "cu_seq_k");
  Tensor result = new_rows(query, value.size(2));
  Tensor lse = empty({query.size(1), query.size(0)}, compute_type(dtype_of(query)));
  const Options options = {dropout_p, seed, false, scale, window_left, window_right};
  forward(packed_args(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, options, result, lse));
  return {result, lse};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attn_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value,
                                                        Tensor result, Tensor lse, Tensor cu_seq_q, Tensor cu_seq_k,
                                                        int64_t max_q, int64_t max_k, double dropout_p,
                                                        std::optional<Tensor> seed, double scale, int64_t window_left,
                                                        int64_t window_right) {
  query = adjacent(query), key = adjacent(key), value = adjacent(value);
  grad_output = adjacent(grad_output), result = adjacent(result);
  cu_seq_q = check_cu_seq(cu_seq_q, query.size(0), max_q, "cu_seq_q");
  cu_seq_k = check_cu_seq(cu_seq_k, key.size(0), max_k, "cu_seq_k");
  const Options options = {dropout_p, seed, false, scale, window_left, window_right};
  const Tensor grad_query = new_rows(query, query.size(2)), grad_key = new_rows(key, key.size(2)),
               grad_value = new_rows(value, value.size(2));
  backward({
      .forward = packed_args(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, options, result, lse),
      .grad_output = input(grad_output), .grad_query = output(grad_query), .grad_key = output(grad_key),
      .grad_value = output(grad_value),
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer_cpu, CPU, m) {
  m.impl("scaled_dot_product_attention", TORCH_BOX(&scaled_dot_product_attention));
  m.impl("scaled_dot_product_attention_backward", TORCH_BOX(&scaled_dot_product_attention_backward));
  m.impl("varlen_attn", TORCH_BOX(&varlen_attn));
  m.impl("varlen_attn_backward", TORCH_BOX(&varlen_attn_backward));
}

}  // namespace fastformer
