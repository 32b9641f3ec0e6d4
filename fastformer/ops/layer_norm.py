"""layer_norm: statistics in float32 (float64 for float64), one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastformer import backends, reference
from fastformer.ops.common import check_floating, check_shape, compute_dtype, dtype_of, needs_grad, raw, register

_SCHEMA = "(Tensor input, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)"
)


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer normalization over the last dimensions: ``(input - mean) / sqrt(variance + eps) * weight + bias``.

    As ``torch.nn.functional.layer_norm`` (Ba et al., "Layer Normalization", 2016).

    Args:
        input: (..., *normalized_shape); float32, bfloat16, float16 or float64; any strides.
        normalized_shape: the last dimensions of input, or the size of the last one.
        weight, bias: normalized_shape; any floating dtype.
        eps: added to the variance.

    Returns:
        A tensor of input's shape and dtype.

    Raises:
        TypeError: an operand is not floating.
        ValueError: normalized_shape is not the end of input's shape, or weight or bias have another shape.
    """
    shape = check_normalized(input, normalized_shape, weight, bias)
    backend = backends.choose("layer_norm", input, weight, bias, size=math.prod(shape))
    if backend == "torch":
        return reference.layer_norm(input, shape, weight, bias, eps)
    rows, w, b = as_rows(shape, input, weight, bias)
    if needs_grad(input, weight, bias):
        output = torch.ops.fastformer.layer_norm(rows, w, b, eps, backend)[0]
    else:
        output = raw(backend).layer_norm(rows, w, b, eps)[0]
    return output if rows is input else output.view(input.shape)


def check_normalized(input, normalized_shape, weight, bias) -> tuple[int, ...]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    check_floating(one_dtype=False, input=input, weight=weight, bias=bias)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(f"normalized_shape: expected the end of input's shape {tuple(input.shape)}, got {shape}")
    check_shape("weight", weight, shape, "normalized_shape")
    check_shape("bias", bias, shape, "normalized_shape")
    return shape


def as_rows(shape: tuple[int, ...], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The normalized dimensions as one."""
    if len(shape) == 1:
        return tensors
    return tuple(None if x is None else x.flatten(-len(shape)) for x in tensors)


def _fake(input, weight, bias, eps):
    rows = math.prod(input.shape[:-1])  # Size.numel() would make a number of a symbolic size
    statistics = input.new_empty(rows, dtype=compute_dtype(input.dtype))
    return torch.empty_like(input, memory_format=torch.contiguous_format), statistics, torch.empty_like(statistics)


def _fake_backward(grad_output, input, weight, mean, rstd):
    grad_weight = input.new_empty(input.shape[-1], dtype=compute_dtype(input.dtype))
    return torch.empty_like(input, memory_format=torch.contiguous_format), grad_weight, torch.empty_like(grad_weight)


def _setup_context(ctx, inputs, output):
    input, weight, bias, _, ctx.backend = inputs
    ctx.dtypes = dtype_of(weight), dtype_of(bias)
    ctx.save_for_backward(input, weight, *output[1:])


def _backward(ctx, grad_output, grad_mean, grad_rstd):
    grad_input, *grads = raw(ctx.backend).layer_norm_backward(grad_output, *ctx.saved_tensors)
    return (
        grad_input,
        *(None if dtype is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)),
        None,
    )


register("layer_norm", _SCHEMA, _BACKWARD_SCHEMA, _fake, _setup_context, _backward, _fake_backward)
