// feed_forward: dropout(W2 hidden_dropout(activation(W1 input + b1)) + b2) + residual.

#include "feed_forward.h"

namespace fastformer {
namespace {

Tensor forward(const Tensor& input, const PackedWeight& weight1, const std::optional<Tensor>& bias1,
               const PackedWeight& weight2, const std::optional<Tensor>& bias2, Activation activation,
               const Dropout& hidden_dropout, const Dropout& dropout, const std::optional<Tensor>& residual) {
  const Rows x = rows_of(input);
  const DType dtype = dtype_of(input);
  const auto b1 = to_compute(bias1, dtype), b2 = to_compute(bias2, dtype);
  std::optional<Rows> r;
  if (residual) r = rows_of(*residual);
  Tensor output = empty(with_last(input, weight2.columns), input.scalar_type());
  const GemmArgs first = {
      .dtype = dtype, .rows = x.count, .columns = weight1.columns, .depth = weight1.depth,
      .a = x.data, .a_row_stride = x.stride, .a_depth_stride = 1, .b = weight1.data(),
      .b_type = weight1.type(), .bias = data(b1),
      .activation = activation, .dropout = hidden_dropout,
      .output = nullptr, .output_stride = 0,
  };
  const GemmArgs second = {
      .dtype = dtype, .rows = x.count, .columns = weight2.columns, .depth = weight2.depth,
      .a = nullptr, .a_row_stride = 0, .a_depth_stride = 1, .b = weight2.data(),
      .b_type = weight2.type(), .bias = data(b2),
      .dropout = dropout, .residual = r ? r->data : nullptr, .residual_stride = r ? r->stride : 0,
      .output = output.mutable_data_ptr(), .output_stride = weight2.columns,
  };
  Phases phases(torch::stable::get_num_threads());
  FeedForward products(first, second, phases.threads());
  const Tensor memory = empty({products.bytes()}, ScalarType::Byte);
  products.add_to(phases, static_cast<char*>(memory.mutable_data_ptr()));
  phases.run();
  return output;
}

// For a training step, which keeps the pre-activation: (output, pre-activation).
std::tuple<Tensor, Tensor> training_forward(const Tensor& input, const Tensor& weight1, const std::optional<Tensor>& bias1,
                                            const Tensor& weight2, const std::optional<Tensor>& bias2,
                                            Activation activation, const Dropout& hidden_dropout,
                                            const Dropout& dropout, const std::optional<Tensor>& residual) {
  const Rows x = rows_of(input);
  const DType dtype = dtype_of(input);
  const int64_t hidden_features = weight1.size(0), out_features = weight2.size(0);
  const auto b1 = to_compute(bias1, dtype), b2 = to_compute(bias2, dtype);
  std::optional<Rows> r;
  if (residual) r = rows_of(*residual);
  // In 16 bits the sums have memory of their own.
  const auto sums_in = [&](const Tensor& tensor) {
    return tensor.scalar_type() == compute_type(dtype) ? matrix(rows_of(tensor))
                                                       : empty({x.count, tensor.size(tensor.dim() - 1)}, compute_type(dtype));
  };
  Tensor pre_activation = empty(with_last(input, hidden_features), input.scalar_type());
  Tensor hidden = empty({x.count, hidden_features}, compute_type(dtype));
  Tensor sums = sums_in(pre_activation);
  multiply(sums, matrix(x), transposed(matrix(weight1)));
  finish({.dtype = dtype, .rows = x.count, .columns = hidden_features, .bias = data(b1), .activation = activation,
          .dropout = hidden_dropout, .pre_activation = pre_activation.mutable_data_ptr(),
          .output = hidden.mutable_data_ptr(), .output_stride = hidden_features, .output_is_compute_type = true},
         sums);
  Tensor output = empty(with_last(input, out_features), input.scalar_type());
  sums = sums_in(output);
  multiply(sums, hidden, transposed(matrix(weight2)));
  if (b2 || dropout.threshold || r || sums.const_data_ptr() != output.const_data_ptr())
    finish({.dtype = dtype, .rows = x.count, .columns = out_features, .bias = data(b2), .dropout = dropout,
            .residual = r ? r->data : nullptr, .residual_stride = r ? r->stride : 0,
            .output = output.mutable_data_ptr(), .output_stride = out_features},
           sums);
  return {output, pre_activation};
}

std::tuple<Tensor, Tensor> feed_forward(Tensor input, Tensor weight1, std::optional<Tensor> bias1, Tensor weight2,
                                        std::optional<Tensor> bias2, std::optional<std::string> activation,
                                        double hidden_dropout_p, std::optional<Tensor> hidden_seed, double dropout_p,
                                        std::optional<Tensor> seed, std::optional<Tensor> residual,
                                        bool save_pre_activation) {
  const Activation act = activation_of(activation);
  const Dropout hidden_dropout = make_dropout(hidden_dropout_p, hidden_seed), dropout = make_dropout(dropout_p, seed);
  if (save_pre_activation)
    return training_forward(input, weight1, bias1, weight2, bias2, act, hidden_dropout, dropout, residual);
  return {forward(input, pack(weight1), bias1, pack(weight2), bias2, act, hidden_dropout, dropout, residual),
          empty({0}, input.scalar_type())};
}

Tensor packed_feed_forward(Tensor input, Tensor packed1, int64_t hidden_features, std::optional<Tensor> bias1,
                           Tensor packed2, int64_t out_features, std::optional<Tensor> bias2,
                           std::optional<std::string> activation, std::optional<Tensor> residual) {
  const DType dtype = dtype_of(input);
  const PackedWeight weight1 = packed_weight(packed1, hidden_features, input.size(input.dim() - 1), dtype),
                     weight2 = packed_weight(packed2, out_features, hidden_features, dtype);
  return forward(input, weight1, bias1, weight2, bias2, activation_of(activation), {}, {}, residual);
}

// The hidden activation again, from what the forward kept of it.
Tensor hidden_activation(const Tensor& pre_activation, Activation activation, const Dropout& dropout) {
  const Rows pre = rows_of(pre_activation);
  Tensor output = empty(shape_of(pre_activation), pre_activation.scalar_type());
  const ActivationArgs args = {
      .dtype = dtype_of(pre_activation), .columns = pre.columns, .activation = activation, .dropout = dropout,
      .grad = nullptr, .grad_stride = 0, .pre_activation = pre.data, .output = output.mutable_data_ptr(),
  };
  parallel_rows(pre.count, std::max<int64_t>(1, 16384 / std::max<int64_t>(pre.columns, 1)),
                [&](int64_t begin, int64_t end) { kernels().activation(args, begin, end); });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_backward(
    Tensor grad_output, Tensor input, Tensor weight1, Tensor weight2, Tensor pre_activation,
    std::optional<std::string> activation_name, double hidden_dropout_p, std::optional<Tensor> hidden_seed,
    double dropout_p, std::optional<Tensor> seed, bool need_input, bool need_weight1, bool need_bias1,
    bool need_weight2, bool need_bias2) {
  const Activation activation = activation_of(activation_name);
  const Dropout hidden_dropout = make_dropout(hidden_dropout_p, hidden_seed), dropout = make_dropout(dropout_p, seed);
  Rows grad = rows_of(grad_output);
  if (dropout.threshold) grad = rows_of(activation_backward(grad, std::nullopt, Activation::none, dropout));
  const Tensor none = empty({0}, input.scalar_type());
  const Tensor grad_bias2 = need_bias2 ? bias_gradient(grad) : none;
  const Tensor grad_weight2 =
      need_weight2 ? weight_gradient(grad, rows_of(hidden_activation(pre_activation, activation, hidden_dropout)))
                   : none;
  if (!need_input && !need_weight1 && !need_bias1) return {none, none, none, grad_weight2, grad_bias2};

  // In the compute type, for the products that follow.
  Tensor grad_hidden = product(matrix(grad), matrix(weight2));
  if (activation != Activation::none || hidden_dropout.threshold)
    finish({.dtype = dtype_of(input), .rows = grad.count, .columns = grad_hidden.size(1), .activation = activation,
            .dropout = hidden_dropout, .pre_activation = pre_activation.mutable_data_ptr(), .gradient = true,
            .output = grad_hidden.mutable_data_ptr(), .output_stride = grad_hidden.size(1),
            .output_is_compute_type = true},
           grad_hidden);
  const Rows grad_pre = rows_of(grad_hidden);
  const ScalarType type = input.scalar_type();
  Tensor grad_input = none;
  if (need_input) {
    grad_input = empty(shape_of(input), compute_type(dtype_of(input)));
    multiply(matrix(rows_of(grad_input)), grad_hidden, matrix(weight1));
  }
  return {to_type(grad_input, type),
          need_weight1 ? to_type(product(transposed(grad_hidden), matrix(rows_of(input))), type) : none,
          need_bias1 ? to_type(bias_gradient(grad_pre), type) : none, grad_weight2, grad_bias2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer_cpu, CPU, m) {
  m.impl("feed_forward", TORCH_BOX(&feed_forward));
  m.impl("feed_forward_backward", TORCH_BOX(&feed_forward_backward));
  m.impl("packed_feed_forward", TORCH_BOX(&packed_feed_forward));
}

}  // namespace fastformer
