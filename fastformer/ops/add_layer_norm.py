"""add_layer_norm: residual + dropout + layer_norm in one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastformer import backends, reference
from fastformer.ops.common import (
    check_floating,
    check_probability,
    check_shape,
    compute_dtype,
    dtype_of,
    needs_grad,
    raw,
    register,
    seed_for,
)
from fastformer.ops.layer_norm import as_rows, check_normalized

_SCHEMA = (
    "(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, float eps, float dropout_p, Tensor? seed)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor? grad_sum, Tensor sum, Tensor? weight, Tensor mean, Tensor rstd, float dropout_p,"
    " Tensor? seed, ScalarType input_dtype) -> (Tensor, Tensor, Tensor, Tensor)"
)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``s = dropout(input) + residual``; returns ``(layer_norm(s), s)``.

    Post-norm models (BERT) use the first, pre-norm models (GPT-2) both. Dropout is always on where dropout_p > 0;
    its mask is that of :mod:`fastformer.reference`.

    Args:
        input, residual: (..., *normalized_shape), one shape; each float32, bfloat16, float16 or float64; any strides.
        normalized_shape, weight, bias, eps: as in :func:`layer_norm`.
        dropout_p: probability that an element of input is dropped.

    Returns:
        Two tensors of input's shape, in the wider of the two dtypes (a bfloat16 input and a float32 residual give
        float32).

    Raises:
        TypeError, ValueError: as :func:`layer_norm`; residual has another shape than input.
    """
    shape = check_normalized(input, normalized_shape, weight, bias)
    check_floating(one_dtype=False, input=input, residual=residual)
    check_shape("residual", residual, input.shape, "input's")
    check_probability(dropout_p=dropout_p)
    operands = input, residual, weight, bias
    backend = backends.choose("add_layer_norm", *operands, size=math.prod(shape), options=(dropout_p > 0,))
    if backend == "torch":
        return reference.add_layer_norm(input, residual, shape, weight, bias, eps, dropout_p=dropout_p)
    x, r, w, b = as_rows(shape, input, residual, weight, bias)
    seed = seed_for(dropout_p, input)
    if needs_grad(input, residual, weight, bias):
        output, s, *_ = torch.ops.fastformer.add_layer_norm(x, r, w, b, eps, dropout_p, seed, backend)
    else:
        output, s, *_ = raw(backend).add_layer_norm(x, r, w, b, eps, dropout_p, seed)
    return (output, s) if x is input else (output.view(input.shape), s.view(input.shape))


def _fake(input, residual, weight, bias, eps, dropout_p, seed):
    output = input.new_empty(input.shape, dtype=torch.promote_types(input.dtype, residual.dtype))
    rows = math.prod(input.shape[:-1])  # Size.numel() would make a number of a symbolic size
    statistics = input.new_empty(rows, dtype=compute_dtype(output.dtype))
    return output, torch.empty_like(output), statistics, torch.empty_like(statistics)


def _fake_backward(grad_output, grad_sum, sum, weight, mean, rstd, dropout_p, seed, input_dtype):
    grad_weight = sum.new_empty(sum.shape[-1], dtype=compute_dtype(sum.dtype))
    grad_input = sum.new_empty(sum.shape, dtype=input_dtype)
    return grad_input, sum.new_empty(sum.shape), grad_weight, torch.empty_like(grad_weight)


def _setup_context(ctx, inputs, output):
    input, residual, weight, bias, _, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.input_dtype = input.dtype
    ctx.dtypes = residual.dtype, dtype_of(weight), dtype_of(bias)
    ctx.save_for_backward(weight, seed, *output[1:])


def _backward(ctx, grad_output, grad_sum, grad_mean, grad_rstd):
    weight, seed, s, mean, rstd = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(s)
    grad_input, *grads = raw(ctx.backend).add_layer_norm_backward(
        grad_output, grad_sum, s, weight, mean, rstd, ctx.dropout_p, seed, ctx.input_dtype
    )
    grads = (None if dtype is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
    return grad_input, *grads, None, None, None


register("add_layer_norm", _SCHEMA, _BACKWARD_SCHEMA, _fake, _setup_context, _backward, _fake_backward)
