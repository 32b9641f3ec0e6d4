// scaled_dot_product_attention and varlen_attn.

#include "common.h"

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

// cu_seq on the CPU, int32, from 0 up to at most `total`, never falling.
Tensor check_cu_seq(const Tensor& cu_seq, int64_t total, int64_t longest, const char* name) {
  STD_TORCH_CHECK(cu_seq.dim() == 1 && cu_seq.size(0) >= 1 && cu_seq.scalar_type() == ScalarType::Int, name,
                  " must be int32 of shape (sequences + 1,)");
  const Tensor checked = torch::stable::contiguous(cu_seq);
  const int32_t* p = checked.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(p[0] == 0, name, " must begin with 0, got ", p[0]);
  for (int64_t i = 1; i < checked.size(0); ++i)
    STD_TORCH_CHECK(p[i - 1] <= p[i] && p[i] - p[i - 1] <= longest, name, " must rise by 0 to ", longest,
                    " from sequence to sequence, got ", p[i - 1], " and ", p[i]);
  STD_TORCH_CHECK(p[checked.size(0) - 1] <= total, name, " ends at ", p[checked.size(0) - 1], ", but there are ", total,
                  " rows");
  return checked;
}

// How the (sequence, kv head) pairs become tasks: several pairs in each, or several tasks for each pair.
struct Tasks {
  int64_t pairs, splits, count;
};
Tasks tasks_for(int64_t pairs, int64_t blocks) {
  const int64_t wanted = 4 * torch::stable::get_num_threads();
  if (wanted == 4) return {pairs, 1, 1};
  if (pairs < wanted && pairs % (wanted / 4) != 0) 
    return {1, std::clamp<int64_t>((wanted + pairs - 1) / std::max<int64_t>(pairs, 1), 1, std::max<int64_t>(blocks, 1)), 0};
  return {1, 1, 1};
}

void forward(const AttentionArgs& args) {
  const Kernels& k = kernels();
  const int64_t bytes = k.attention_scratch_bytes(args), pairs = args.sequences * args.kv_heads;
  parallel_tasks(1, [&](int64_t task) { k.attention(args, 0, pairs, 0, 1, scratch(bytes)); });
}

std::tuple<Tensor, Tensor> scaled_dot_product_attention(Tensor query, Tensor key, Tensor value,
                                                        std::optional<Tensor> attn_mask, double dropout_p,
                                                        std::optional<Tensor> seed, bool is_causal, double scale,
                                                        int64_t window_left, int64_t window_right) {
  query = adjacent(query), key = adjacent(key), value = adjacent(value);
  const DType dtype = dtype_of(query);
  Tensor result = new_rows(query, value.size(3));
  Tensor lse = empty({query.size(0), query.size(1), query.size(2)}, compute_type(dtype));
  forward({
      .dtype = dtype, .sequences = query.size(0), .heads = query.size(1), .kv_heads = key.size(1),
      .head_dim = query.size(3), .value_dim = value.size(3), .queries = query.size(2), .keys = key.size(2),
      .cu_seq_q = nullptr, .cu_seq_k = nullptr, .query = input(query), .key = input(key), .value = input(value),
      .mask = mask_of(attn_mask), .is_causal = is_causal, .window_left = window_left, .window_right = window_right,
      .dropout = make_dropout(dropout_p, seed), .scale = scale, .output = output(result),
      .lse = {lse.mutable_data_ptr(), lse.stride(0), lse.stride(1), 1},
  });
  return {result, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer_cpu, CPU, m) {
  m.impl("scaled_dot_product_attention", TORCH_BOX(&scaled_dot_product_attention));
}

}  // namespace fastformer
