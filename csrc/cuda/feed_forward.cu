// feed_forward: the host side. Two products forward; four backward, of which the first, grad_output W2, makes of the
// pre-activation both the gradient in front of the activation and the hidden activation again, for W2's gradient.

#include "matmul.h"

namespace fastformer {
namespace {

const void* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor> feed_forward(Tensor input, Tensor weight1, std::optional<Tensor> bias1, Tensor weight2,
                                        std::optional<Tensor> bias2, std::optional<std::string> activation,
                                        double hidden_dropout_p, std::optional<Tensor> hidden_seed, double dropout_p,
                                        std::optional<Tensor> seed, std::optional<Tensor> residual,
                                        bool save_pre_activation) {
  const OnDeviceOf device(input);
  const ScalarType type = input.scalar_type();
  const auto b1 = contiguous(bias1), b2 = contiguous(bias2);
  std::optional<Rows> r;
  if (residual) r = rows_of(*residual);
  Tensor hidden = empty(input, with_last(input, weight1.size(0)), type);
  Tensor output = empty(input, with_last(input, weight2.size(0)), type);
  Tensor pre_activation = empty(input, save_pre_activation ? shape_of(hidden) : std::vector<int64_t>{0}, type);
  matmul(device, "feed_forward, first", operand_of(rows_of(input)), operand_of(weight1),
         {.bias = data(b1), .activation = activation_named<Activation>(activation),
          .pre_activation = save_pre_activation ? pre_activation.mutable_data_ptr() : nullptr,
          .dropout = make_dropout(hidden_dropout_p, hidden_seed), .output = hidden.mutable_data_ptr()});
  matmul(device, "feed_forward, second", operand_of(rows_of(hidden)), operand_of(weight2),
         {.bias = data(b2), .dropout = make_dropout(dropout_p, seed), .residual = r ? r->data : nullptr,
          .residual_stride = r ? r->stride : 0, .output = output.mutable_data_ptr()});
  return {output, pre_activation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_backward(
    Tensor grad_output, Tensor input, Tensor weight1, Tensor weight2, Tensor pre_activation,
    std::optional<std::string> activation, double hidden_dropout_p, std::optional<Tensor> hidden_seed, double dropout_p,
    std::optional<Tensor> seed, bool need_input, bool need_weight1, bool need_bias1, bool need_weight2,
    bool need_bias2) {
  const OnDeviceOf device(input);
  const ScalarType type = input.scalar_type();
  Rows grad = rows_of(grad_output);
  if (dropout_p > 0) {
    Tensor dropped = empty(input, shape_of(grad_output), type);
    activation_backward(device, grad, {.gradient = true, .dropout = make_dropout(dropout_p, seed),
                                       .output = dropped.mutable_data_ptr()});
    grad = rows_of(dropped);
  }
  const Tensor none = empty(input, {0}, type);
  const bool need_first = need_input || need_weight1 || need_bias1;
  Tensor hidden = need_weight2 ? empty(input, shape_of(pre_activation), type) : none;
  Tensor grad_pre = need_first ? empty(input, shape_of(pre_activation), type) : none;
  const Epilogue gradient = {
      .activation = activation_named<Activation>(activation), .gradient = true,
      .pre_activation = pre_activation.mutable_data_ptr(),
      .hidden = need_weight2 ? hidden.mutable_data_ptr() : nullptr,
      .dropout = make_dropout(hidden_dropout_p, hidden_seed),
      .output = need_first ? grad_pre.mutable_data_ptr() : nullptr};
  if (need_first)
    matmul(device, "hidden_gradient", operand_of(grad), transposed(operand_of(weight2)), gradient);
  else if (need_weight2)
    activation_backward(device, rows_of(pre_activation), gradient);
  const Rows g = need_first ? rows_of(grad_pre) : grad;
  return {need_input ? input_gradient(device, g, weight1, input) : none,
          need_weight1 ? weight_gradient(device, g, rows_of(input)) : none,
          need_bias1 ? bias_gradient(device, g) : none,
          need_weight2 ? weight_gradient(device, grad, rows_of(hidden)) : none,
          need_bias2 ? bias_gradient(device, grad) : none};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer_cuda, FASTFORMER_DEVICE, m) {
  m.impl("feed_forward", TORCH_BOX(&feed_forward));
  m.impl("feed_forward_backward", TORCH_BOX(&feed_forward_backward));
}

}  // namespace fastformer
