// embeddings: rows of up to three tables, their sum, its layer-norm and dropout.

#include <numeric>

#include "common.h"

namespace fastformer {
namespace {

constexpr int64_t kHugeTable = 4 << 20;  // bytes of a gradient from which huge pages pay

// What is looked up: the tables, and in which rows.
class Lookup {
 public:
  const int64_t rows, columns;  // of the output
  const DType dtype;

  Lookup(const Tensor& input_ids, const Tensor& word, const std::optional<Tensor>& position_ids,
         const std::optional<Tensor>& position, const std::optional<Tensor>& token_type_ids,
         const std::optional<Tensor>& token_type)
      : rows(input_ids.numel()), columns(word.size(1)), dtype(dtype_of(word)) {
    add("input_ids", input_ids, word);  // first; token_type, if there is one, is second, and position the last
    if (token_type) add("token_type_ids", *token_type_ids, *token_type);
    if (position) add("position_ids", *position_ids, *position);
  }

  EmbeddingsArgs args(double eps, double dropout_p, const std::optional<Tensor>& seed) const {
    EmbeddingsArgs args = {.dtype = dtype, .columns = columns, .eps = eps, .dropout = make_dropout(dropout_p, seed)};
    for (; args.tables < static_cast<int>(tables_.size()); ++args.tables) {
      args.table[args.tables] = tables_[args.tables].data;
      args.table_stride[args.tables] = tables_[args.tables].stride;
      args.ids[args.tables] = ids_[args.tables].const_data_ptr<int64_t>();
    }
    return args;
  }

 private:
  void add(const char* name, const Tensor& ids, const Tensor& table) {
    ids_.push_back(torch::stable::contiguous(ids));
    tables_.push_back(rows_of(table));
    const int64_t *id = ids_.back().const_data_ptr<int64_t>(), count = table.size(0);
    for (int64_t i = 0; i < rows; ++i)
      STD_TORCH_CHECK(id[i] >= 0 && id[i] < count, name, ": index out of range, expected 0 to ", count - 1, ", got ",
                      id[i]);
  }

  std::vector<Tensor> ids_;
  std::vector<Rows> tables_;
};

std::tuple<Tensor, Tensor, Tensor> embeddings(
    Tensor input_ids, Tensor word, std::optional<Tensor> position_ids, std::optional<Tensor> position,
    std::optional<Tensor> token_type_ids, std::optional<Tensor> token_type, std::optional<Tensor> weight,
    std::optional<Tensor> bias, double eps, int64_t /*padding_idx*/, double dropout_p, std::optional<Tensor> seed) {
  const Lookup lookup(input_ids, word, position_ids, position, token_type_ids, token_type);
  const auto w = to_compute(weight, lookup.dtype), b = to_compute(bias, lookup.dtype);
  std::vector<int64_t> shape = shape_of(input_ids);
  shape.push_back(lookup.columns);
  Tensor output = empty(shape, word.scalar_type());
  const ScalarType type = compute_type(lookup.dtype);
  Tensor mean = empty({lookup.rows}, type), rstd = empty({lookup.rows}, type);
  EmbeddingsArgs args = lookup.args(eps, dropout_p, seed);
  args.weight = data(w), args.bias = data(b);
  args.output = output.mutable_data_ptr(), args.mean = mean.mutable_data_ptr(), args.rstd = rstd.mutable_data_ptr();
  const int64_t bytes = lookup.columns * compute_bytes(lookup.dtype);
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(lookup.columns, 1));
  parallel_rows(lookup.rows, grain,
                [&](int64_t begin, int64_t end) { kernels().embeddings(args, begin, end, scratch(bytes)); });
  return {output, mean, rstd};
}

// The gradients of the sums, (rows, columns) in the compute type, and of weight and bias. Each chunk of rows adds up its
// share of the latter: the order is fixed, and no sum is long.
std::tuple<Tensor, Tensor, Tensor> gradients_of_sums(const EmbeddingsArgs& args, int64_t rows, const void* weight,
                                                     const Tensor& mean, const Tensor& rstd) {
  constexpr int64_t kBlock = 16;  // rows that stay in the cache between the kernels
  const ScalarType type = compute_type(args.dtype);
  const int64_t row_bytes = args.columns * compute_bytes(args.dtype), chunks = std::clamp<int64_t>(rows / 64, 1, 512);
  Tensor sums_grad = empty({rows, args.columns}, type);
  const Tensor weights = zeros({chunks, args.columns}, type), biases = zeros({chunks, args.columns}, type);
  const auto at = [](const Tensor& tensor, int64_t bytes) {
    return static_cast<char*>(tensor.mutable_data_ptr()) + bytes;
  };
  parallel_tasks(chunks, [&](int64_t c) {
    char* const sums = static_cast<char*>(scratch(2 * kBlock * row_bytes));
    char* const grads = sums + kBlock * row_bytes;
    const int64_t end = rows * (c + 1) / chunks;
    for (int64_t row = rows * c / chunks; row < end; row += kBlock) {
      const int64_t last = std::min(row + kBlock, end);
      kernels().embeddings_backward(args, row, last, sums, grads);
      const DType dtype = args.dtype == DType::f64 ? DType::f64 : DType::f32;
      const LayerNormBackwardArgs norm = {
          .dtype = dtype, .grad_input_dtype = dtype, .columns = args.columns, .dropout = {},
          .grad_output = grads, .grad_sum = nullptr, .input = sums,
          .grad_output_stride = args.columns, .grad_sum_stride = 0, .input_stride = args.columns,
          .weight = weight, .mean = at(mean, row * compute_bytes(dtype)), .rstd = at(rstd, row * compute_bytes(dtype)),
          .grad_input = at(sums_grad, row * row_bytes), .grad_residual = nullptr,
      };
      kernels().layer_norm_backward(norm, 0, last - row, at(weights, c * row_bytes), at(biases, c * row_bytes));
    }
  });
  const std::vector<int64_t> chunk_dim = {0};
  return {sums_grad, torch::stable::sum(weights, chunk_dim), torch::stable::sum(biases, chunk_dim)};
}

// Each row of the table adds up its share in the order of the batch: the result does not depend on the threads.
Tensor gradient_of_table(const Tensor& table, const int64_t* ids, const Tensor& sums_grad, int64_t padding_idx) {
  const int64_t count = table.size(0), columns = table.size(1), rows = sums_grad.size(0);
  std::vector<int64_t> first(count + 1), order(rows);
  for (int64_t i = 0; i < rows; ++i) ++first[ids[i] + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t i = 0; i < rows; ++i) order[next[ids[i]]++] = i;

  Tensor grad = empty({count, columns}, table.scalar_type());
  if (grad.numel() * static_cast<int64_t>(grad.element_size()) >= kHugeTable) use_huge_pages(grad);
  const EmbeddingGradientArgs args = {
      .dtype = dtype_of(table), .columns = columns, .grad_rows = sums_grad.const_data_ptr(), .order = order.data(),
      .first = first.data(), .padding_idx = padding_idx, .grad_table = grad.mutable_data_ptr(),
  };
  // A table of few rows, which are long sums, is shared out by columns.
  const int64_t width = count < 64 ? 64 : columns, blocks = columns ? (columns + width - 1) / width : 0;
  const int64_t parts = std::min<int64_t>(count, 256);
  parallel_tasks(parts * blocks, [&](int64_t task) {
    const int64_t part = task / blocks, column = task % blocks * width;
    kernels().embedding_gradient(args, count * part / parts, count * (part + 1) / parts, column,
                                 std::min(column + width, columns), scratch(2 * columns * compute_bytes(args.dtype)));
  });
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embeddings_backward(
    Tensor grad_output, Tensor input_ids, Tensor word, std::optional<Tensor> position_ids,
    std::optional<Tensor> position, std::optional<Tensor> token_type_ids, std::optional<Tensor> token_type,
    std::optional<Tensor> weight, Tensor mean, Tensor rstd, int64_t padding_idx, double dropout_p,
    std::optional<Tensor> seed, bool need_word, bool need_position, bool need_token_type) {
  const Lookup lookup(input_ids, word, position_ids, position, token_type_ids, token_type);
  const auto w = to_compute(weight, lookup.dtype);
  const Rows g = rows_of(grad_output);
  EmbeddingsArgs args = lookup.args(0, dropout_p, seed);
  args.grad_output = g.data, args.grad_output_stride = g.stride;
  const auto [sums_grad, grad_weight, grad_bias] = gradients_of_sums(args, lookup.rows, data(w), mean, rstd);

  const auto gradient = [&](const std::optional<Tensor>& table, bool needed, int which, int64_t without) {
    if (!table || !needed) return empty({0}, word.scalar_type());
    return gradient_of_table(*table, args.ids[which], sums_grad, without);
  };
  return {gradient(word, need_word, 0, padding_idx), gradient(position, need_position, args.tables - 1, -1),
          gradient(token_type, need_token_type, 1, -1), grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer_cpu, CPU, m) {
  m.impl("embeddings", TORCH_BOX(&embeddings));
  m.impl("embeddings_backward", TORCH_BOX(&embeddings_backward));
}

}  // namespace fastformer
