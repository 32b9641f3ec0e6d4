// linear: the host side. Backward in two products; the gradient in front of the activation is a tensor of its own,
// because both of them read it, many times.

#include "matmul.h"

namespace fastformer {
namespace {

std::tuple<Tensor, Tensor> linear(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                  std::optional<std::string> activation, double dropout_p, std::optional<Tensor> seed,
                                  std::optional<Tensor> residual, bool save_pre_activation) {
  const OnDeviceOf device(input);
  const Rows x = rows_of(input);
  const auto b = contiguous(bias);
  std::optional<Rows> r;
  if (residual) r = rows_of(*residual);
  Tensor output = empty(input, with_last(input, weight.size(0)), input.scalar_type());
  const bool save = save_pre_activation && activation;
  Tensor pre_activation = empty(input, save ? shape_of(output) : std::vector<int64_t>{0}, input.scalar_type());
  matmul(device, "linear", operand_of(x), operand_of(weight),
         {.bias = b ? b->const_data_ptr() : nullptr, .activation = activation_named<Activation>(activation),
          .pre_activation = save ? pre_activation.mutable_data_ptr() : nullptr,
          .dropout = make_dropout(dropout_p, seed), .residual = r ? r->data : nullptr,
          .residual_stride = r ? r->stride : 0, .output = output.mutable_data_ptr()});
  return {output, pre_activation};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor grad_output, Tensor input, Tensor weight,
                                                   Tensor pre_activation, std::optional<std::string> activation,
                                                   double dropout_p, std::optional<Tensor> seed, bool need_input,
                                                   bool need_weight, bool need_bias) {
  const OnDeviceOf device(input);
  Rows grad = rows_of(grad_output);
  const Dropout dropout = make_dropout(dropout_p, seed);
  if (activation || dropout.threshold) {
    Tensor output = empty(input, shape_of(grad_output), input.scalar_type());
    activation_backward(device, grad,
                        {.activation = activation_named<Activation>(activation), .gradient = true,
                         .pre_activation = activation ? pre_activation.mutable_data_ptr() : nullptr,
                         .dropout = dropout, .output = output.mutable_data_ptr()});
    grad = rows_of(output);
  }
  const Tensor none = empty(input, {0}, input.scalar_type());
  return {need_input ? input_gradient(device, grad, weight, input) : none,
          need_weight ? weight_gradient(device, grad, rows_of(input)) : none,
          need_bias ? bias_gradient(device, grad) : none};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer_cuda, FASTFORMER_DEVICE, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace fastformer
