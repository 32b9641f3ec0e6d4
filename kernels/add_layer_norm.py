"""add_layer_norm and its backward. The kernels are in norm.py, which says what they compute and what that costs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer.kernels import norm


def add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return norm.forward(input, residual, weight, bias, eps, dropout_p, seed)


def add_layer_norm_backward(
    grad_output: Tensor, grad_sum: Tensor | None, sum: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    dropout_p: float, seed: Tensor | None, input_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_input = sum.new_empty(sum.shape, dtype=input_dtype)
    grad_residual = sum.new_empty(sum.shape)
    return (
        grad_input,
        grad_residual,
        *norm.backward(grad_output, grad_sum, sum, weight, mean, rstd, dropout_p, seed, grad_input, grad_residual),
    )
