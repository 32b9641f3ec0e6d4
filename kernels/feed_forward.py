"""feed_forward: dropout(W2 hidden_dropout(activation(W1 input + b1)) + b2) + residual, two matrix products.

Backward has four products: the epilogue of the first, grad_output W2, makes of the pre-activation both the gradient in
front of the activation and the hidden activation again, for W2's gradient.

Operations: 2 M hidden (in_features + out_features) forward, twice that backward. Bytes: the operands once, and (M,
hidden), in the input's dtype, written and read once between the products. Bound: tensor cores; see matmul.py.
"""

import torch
from torch import Tensor

from fastformer.kernels.activations import activation_rows
from fastformer.kernels.linear import input_gradient, rows_of, weight_gradient
from fastformer.kernels.matmul import matmul


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str | None,
    hidden_dropout_p: float,
    hidden_seed: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    residual: Tensor | None,
    save_pre_activation: bool,
) -> tuple[Tensor, Tensor]:
    leading = input.shape[:-1]
    pre_activation = input.new_empty(leading + weight1.shape[:1] if save_pre_activation else (0,))
    hidden = matmul(
        rows_of(input), weight1.t(), bias=bias1, activation=activation, dropout_p=hidden_dropout_p, seed=hidden_seed,
        pre_activation=pre_activation if save_pre_activation else None,
    )  # fmt: skip
    output = matmul(
        hidden, weight2.t(), bias=bias2, dropout_p=dropout_p, seed=seed,
        residual=None if residual is None else rows_of(residual),
    )  # fmt: skip
    return output.view(leading + weight2.shape[:1]), pre_activation


def feed_forward_backward(
    grad_output: Tensor,
    input: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    pre_activation: Tensor,
    activation: str | None,
    hidden_dropout_p: float,
    hidden_seed: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    need_input: bool,
    need_weight1: bool,
    need_bias1: bool,
    need_weight2: bool,
    need_bias2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad, pre, rows = rows_of(grad_output), rows_of(pre_activation), rows_of(input)
    if dropout_p > 0:
        grad = activation_rows(None, grad, None, dropout_p, seed)
    hidden, grad_pre, grad_input = pre, pre, input.new_empty(0)
    if need_input or need_weight1 or need_bias1:
        if need_weight2:
            hidden = torch.empty_like(pre)
        grad_pre = matmul(
            grad, weight2, activation=activation, dropout_p=hidden_dropout_p, seed=hidden_seed, pre_activation=pre,
            gradient=True, hidden=hidden if need_weight2 else None,
        )  # fmt: skip
        if need_input:
            grad_input = input_gradient(grad_pre, weight1, input.shape)
    elif need_weight2:
        hidden = activation_rows(pre, None, activation, hidden_dropout_p, hidden_seed)
    grads2 = weight_gradient(grad, hidden, need_weight2, need_bias2)
    grads1 = weight_gradient(grad_pre, rows, need_weight1, need_bias1)
    return grad_input, *grads1, *grads2
