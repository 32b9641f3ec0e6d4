"""linear: dropout(activation(input @ weight.T + bias)) + residual, one matrix product; backward in two.

The gradient in front of the activation is a tensor of its own, written by one pass over the rows: computed while tiles
are loaded, each element's slope (some 30 operations, 25 for the random bits) would be computed anew for every tile that
reads it, in_features / BLOCK_N times, which takes longer than to read and write 2 bytes.

Operations: 2 M N K forward, twice that backward. Bound: tensor cores; see matmul.py.
"""

from math import prod

import torch
from torch import Tensor

from fastformer.kernels.activations import activation_rows
from fastformer.kernels.matmul import matmul


def rows_of(x: Tensor) -> Tensor:
    """(rows, columns): a view, unless the leading dimensions have no common stride."""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    dropout_p: float,
    seed: Tensor | None,
    residual: Tensor | None,
    save_pre_activation: bool,
) -> tuple[Tensor, Tensor]:
    shape, save = input.shape[:-1] + weight.shape[:1], save_pre_activation and activation is not None
    pre_activation = input.new_empty(shape if save else (0,))
    output = matmul(
        rows_of(input), weight.t(), bias=bias, activation=activation, dropout_p=dropout_p, seed=seed,
        residual=None if residual is None else rows_of(residual), pre_activation=pre_activation if save else None,
    )  # fmt: skip
    return output.view(shape), pre_activation


def linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    pre_activation: Tensor,
    activation: str | None,
    dropout_p: float,
    seed: Tensor | None,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = rows_of(grad_output)
    if activation is not None or dropout_p > 0:
        pre = None if activation is None else rows_of(pre_activation)
        grad = activation_rows(pre, grad, activation, dropout_p, seed)
    grad_input = input_gradient(grad, weight, input.shape) if need_input else input.new_empty(0)
    return grad_input, *weight_gradient(grad, rows_of(input), need_weight, need_bias)


def input_gradient(grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    """grad (M, N), weight (N, K) -> (..., K)"""
    return matmul(grad, weight).view(shape)


def weight_gradient(grad: Tensor, rows: Tensor, need_weight: bool, need_bias: bool) -> tuple[Tensor, Tensor]:
    """grad (M, N), rows (M, K) -> (N, K), (N); empty where it isn't needed."""
    none = grad.new_empty(0)
    if not (need_weight or need_bias):
        return none, none
    grad_bias = grad.new_empty(grad.shape[1]) if need_bias else None
    if not need_weight:
        rows = rows[:, :0]  # the sums alone: a product without columns
    grad_weight = matmul(grad.t(), rows, varying="K", sums=grad_bias)
    return grad_weight if need_weight else none, grad_bias if need_bias else none
