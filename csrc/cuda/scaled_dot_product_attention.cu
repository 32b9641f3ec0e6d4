// scaled_dot_product_attention and varlen_attn: the host side.

#include "attention.h"
#include "common.h"

namespace fastformer {
namespace {

using namespace attention;
using torch::stable::transpose;

// f.operator()<T>()
template <class F> void with_type(const Tensor& tensor, F f) {
  switch (dtype_of(tensor)) {
    case DType::f32: return f.template operator()<float>();
    case DType::bf16: return f.template operator()<bf16>();
    case DType::f16: return f.template operator()<f16>();
  }
}

bool is_aligned(const Tensor& t) {
  const int64_t last = t.dim() - 1, size = 16 / t.element_size();
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(last) == 1;
  for (int64_t d = 0; d < last; ++d) aligned &= t.size(d) == 1 || t.stride(d) % size == 0;
  return aligned;
}

// Padded: (sequences, heads, rows, columns). Packed: (rows, heads, columns).
Input input(const Tensor& t) {
  if (t.dim() == 4)
    return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3), is_aligned(t)};
  return {t.const_data_ptr(), 0, t.stride(1), t.stride(0), t.stride(2), is_aligned(t)};
}
Output output(const Tensor& t) {
  const Input x = input(t);
  return {t.mutable_data_ptr(), x.stride_sequence, x.stride_head, x.stride_row, x.aligned};
}
// Padded: (sequences, heads, rows). Packed: (heads, rows).
Statistics statistics(const Tensor& t) {
  float* const data = static_cast<float*>(t.mutable_data_ptr());
  if (t.dim() == 3) return {data, t.stride(0), t.stride(1)};
  return {data, 0, t.stride(0)};
}
Mask mask_of(const std::optional<Tensor>& mask) {
  if (!mask) return {};
  return {mask->const_data_ptr(), mask->scalar_type() == ScalarType::Bool, mask->stride(0), mask->stride(1),
          mask->size(2) > 1 ? mask->stride(2) : 0, mask->stride(3)};
}

// A new tensor of that many columns beside those of `like`, each row's heads adjacent in memory.
Tensor new_rows(const Tensor& like, int64_t columns, ScalarType type) {
  if (like.dim() == 3) return empty(like, {like.size(0), like.size(1), columns}, type);
  return transpose(empty(like, {like.size(0), like.size(2), like.size(1), columns}, type), 1, 2);
}
Tensor new_statistics(const Tensor& query) {
  if (query.dim() == 3) return empty(query, {query.size(1), query.size(0)}, ScalarType::Float);
  return empty(query, {query.size(0), query.size(1), query.size(2)}, ScalarType::Float);
}

// What the raw ops are given beside the tensors; cu_seq_*, max_*: of varlen_attn.
struct Options {
  double dropout_p;
  const std::optional<Tensor>& seed;
  bool is_causal;
  double scale;
  int64_t window_left, window_right;
  const Tensor *cu_seq_q = nullptr, *cu_seq_k = nullptr;
  int64_t max_q = 0, max_k = 0;
};

int to_int(int64_t size) {
  STD_TORCH_CHECK(size < kFar, "fastformer_cuda takes sizes up to 2^30 - 1, got ", size);
  return static_cast<int>(size);
}

Args args_of(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
             const Options& o) {
  const bool packed = o.cu_seq_q;
  const int64_t last = query.dim() - 1, size = std::max(query.size(last), value.size(last));
  STD_TORCH_CHECK(size <= kMaxHeadSize, "fastformer_cuda takes head sizes up to ", kMaxHeadSize, ", got ", size);
  const auto sequences = [](const Tensor* bounds, int64_t total) {
    return bounds ? Sequences{bounds->const_data_ptr<int32_t>(), bounds->stride(0), to_int(total)}
                  : Sequences{nullptr, 0, to_int(total)};
  };
  const auto window = [](int64_t keys) { return keys < 0 ? kFar : static_cast<int>(std::min<int64_t>(keys, kFar)); };
  const int64_t rows = packed ? 0 : 2;
  return {
      .sequences = to_int(packed ? o.cu_seq_q->size(0) - 1 : query.size(0)),
      .heads = to_int(query.size(1)), .kv_heads = to_int(key.size(1)), .head_dim = to_int(query.size(last)),
      .value_dim = to_int(value.size(last)), .max_queries = to_int(packed ? o.max_q : query.size(2)),
      .max_keys = to_int(packed ? o.max_k : key.size(2)),
      .queries = sequences(o.cu_seq_q, query.size(rows)), .keys = sequences(o.cu_seq_k, key.size(rows)),
      .query = input(query), .key = input(key), .value = input(value), .mask = mask_of(mask),
      .window_left = window(o.window_left), .window_right = window(o.window_right),
      .causal_right = o.is_causal ? 0 : kFar, .scale = static_cast<float>(o.scale),
      .dropout = make_dropout(o.dropout_p, o.seed),
  };
}

// How many rows of a tile the queries of a key head make, and between how many blocks its keys are split, so that two
// for each multiprocessor are there, with four tiles of keys at least.
void plan(ForwardArgs& args) {
  constexpr int64_t kFewRows = 64, kTileKeys = 64;
  args.stack = args.parts = 1;
  args.part_keys = 0;
  const int64_t groups = args.kv_heads ? args.heads / args.kv_heads : 1;
  if (args.max_queries * groups <= kFewRows) args.stack = static_cast<int>(groups);
  const int64_t blocks = int64_t(args.sequences) * args.heads / args.stack;
  if (blocks == 0 || args.max_queries * args.stack > kFewRows) return;
  const int64_t wanted = (2 * int64_t(multiprocessors()) + blocks - 1) / blocks;
  const int64_t parts = std::min<int64_t>({wanted, args.max_keys / (4 * kTileKeys), kMostParts});
  if (parts <= 1) return;
  const int64_t tiles = (args.max_keys + kTileKeys - 1) / kTileKeys;
  args.part_keys = static_cast<int>((tiles + parts - 1) / parts * kTileKeys);
  args.parts = static_cast<int>(parts);
}

// Does the kernel for sm_90a take it? TMA wants rows that are aligned and no size of 0. Dropout, masks of each query's
// own and queries so few that heads share a tile or blocks the keys are the other kernel's.
bool hopper_takes(const ForwardArgs& args, DType dtype) {
  const auto tma_takes = [&](const Input& x, int size, const Sequences& rows, int heads) {
    const bool repeats = (rows.total > 1 && x.stride_row == 0) || (heads > 1 && x.stride_head == 0) ||
                         (!rows.bounds && args.sequences > 1 && x.stride_sequence == 0);
    return x.aligned && !repeats && size > 0 && size <= 128 && rows.total > 0 && heads > 0;
  };
  return dtype != DType::f32 && is_hopper() && args.mask.stride_row == 0 && args.dropout.threshold == 0 &&
         args.stack == 1 && args.parts == 1 && tma_takes(args.query, args.head_dim, args.queries, args.heads) &&
         tma_takes(args.key, args.head_dim, args.keys, args.kv_heads) &&
         tma_takes(args.value, args.value_dim, args.keys, args.kv_heads);
}

// A call of the kernels that gives what the raw ops return.
std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const std::optional<Tensor>& mask, const Options& options) {
  const OnDeviceOf device(query);
  const int64_t value_dim = value.size(value.dim() - 1);
  ForwardArgs args = {args_of(query, key, value, mask, options)};
  plan(args);
  const Tensor result = new_rows(query, value_dim, query.scalar_type()), lse = new_statistics(query);
  args.output = output(result), args.lse = statistics(lse);
  args.part_stride_output = lse.numel() * value_dim, args.part_stride_lse = lse.numel();
  std::optional<Tensor> part_output, part_lse;  // (parts, ...), each part laid out as the result
  if (args.parts > 1) {
    part_output = empty(query, {args.parts, args.part_stride_output}, ScalarType::Float);
    part_lse = empty(query, {args.parts, args.part_stride_lse}, ScalarType::Float);
    args.output.data = part_output->mutable_data_ptr();
    args.lse.data = static_cast<float*>(part_lse->mutable_data_ptr());
  }
  with_type(query, [&]<class T>() {
    if constexpr (!std::is_same_v<T, float>)
      if (hopper_takes(args, dtype_of(query))) return forward_hopper<T>(device, args);
    forward<T>(device, args);
    if (args.parts == 1) return;
    combine<T>(device, {.count = lse.numel(), .parts = args.parts, .heads = args.heads,
                        .rows = to_int(lse.size(lse.dim() - 1)), .value_dim = args.value_dim,
                        .part_output = static_cast<const float*>(args.output.data), .part_lse = args.lse.data,
                        .part_stride_output = args.part_stride_output, .part_stride_lse = args.part_stride_lse,
                        .output = output(result), .lse = statistics(lse)});
  });
  return {result, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& query, const Tensor& key,
                                            const Tensor& value, const std::optional<Tensor>& mask,
                                            const Tensor& result, const Tensor& lse, const Options& options) {
  const OnDeviceOf device(query);
  const int64_t last = query.dim() - 1;
  BackwardArgs args = {args_of(query, key, value, mask, options)};
  const Tensor grad_query = new_rows(query, query.size(last), query.scalar_type());
  const Tensor grad_key = new_rows(key, key.size(last), key.scalar_type());
  const Tensor grad_value = new_rows(value, value.size(last), value.scalar_type());
  const Tensor delta = new_statistics(query);
  args.grad_output = input(grad_output), args.lse = statistics(lse), args.delta = statistics(delta);
  args.grad_query = output(grad_query), args.grad_key = output(grad_key), args.grad_value = output(grad_value);
  const DeltaArgs delta_args = {.count = lse.numel(), .heads = args.heads, .rows = to_int(lse.size(lse.dim() - 1)),
                                .value_dim = args.value_dim, .grad_output = args.grad_output,
                                .output = input(result), .delta = args.delta};
  with_type(query, [&]<class T>() { backward<T>(device, delta_args, args); });
  return {grad_query, grad_key, grad_value};
}

std::tuple<Tensor, Tensor> scaled_dot_product_attention(Tensor query, Tensor key, Tensor value,
                                                        std::optional<Tensor> attn_mask, double dropout_p,
                                                        std::optional<Tensor> seed, bool is_causal, double scale,
                                                        int64_t window_left, int64_t window_right) {
  return forward(query, key, value, attn_mask, {dropout_p, seed, is_causal, scale, window_left, window_right});
}

std::tuple<Tensor, Tensor, Tensor> scaled_dot_product_attention_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, std::optional<Tensor> attn_mask, Tensor result,
    Tensor lse, double dropout_p, std::optional<Tensor> seed, bool is_causal, double scale, int64_t window_left,
    int64_t window_right) {
  return backward(grad_output, query, key, value, attn_mask, result, lse,
                  {dropout_p, seed, is_causal, scale, window_left, window_right});
}

std::tuple<Tensor, Tensor> varlen_attn(Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor cu_seq_k,
                                       int64_t max_q, int64_t max_k, double dropout_p, std::optional<Tensor> seed,
                                       double scale, int64_t window_left, int64_t window_right) {
  return forward(query, key, value, std::nullopt,
                 {dropout_p, seed, false, scale, window_left, window_right, &cu_seq_q, &cu_seq_k, max_q, max_k});
}

std::tuple<Tensor, Tensor, Tensor> varlen_attn_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value,
                                                        Tensor result, Tensor lse, Tensor cu_seq_q, Tensor cu_seq_k,
                                                        int64_t max_q, int64_t max_k, double dropout_p,
                                                        std::optional<Tensor> seed, double scale, int64_t window_left,
                                                        int64_t window_right) {
  return backward(grad_output, query, key, value, std::nullopt, result, lse,
                  {dropout_p, seed, false, scale, window_left, window_right, &cu_seq_q, &cu_seq_k, max_q, max_k});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer_cuda, FASTFORMER_DEVICE, m) {
  m.impl("scaled_dot_product_attention", TORCH_BOX(&scaled_dot_product_attention));
  m.impl("scaled_dot_product_attention_backward", TORCH_BOX(&scaled_dot_product_attention_backward));
  m.impl("varlen_attn", TORCH_BOX(&varlen_attn));
  m.impl("varlen_attn_backward", TORCH_BOX(&varlen_attn_backward));
}

}  // namespace fastformer
