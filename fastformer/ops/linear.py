"""linear: a matrix product with bias, activation, dropout and residual in its epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer import backends, reference
from fastformer.ops.common import (
    autocast,
    broadcast_residual,
    check_activation,
    check_floating,
    check_probability,
    check_shape,
    needs_grad,
    raw,
    register,
    seed_for,
)

_SCHEMA = (
    "(Tensor input, Tensor weight, Tensor? bias, str? activation, float dropout_p, Tensor? seed, Tensor? residual,"
    " bool save_pre_activation) -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor input, Tensor weight, Tensor pre_activation, str? activation, float dropout_p,"
    " Tensor? seed, bool need_input, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """``dropout(activation(input @ weight.T + bias)) + residual``.

    As ``torch.nn.functional.linear`` with what follows it. For the weight of a transformers Conv1D pass ``weight.t()``.

    Args:
        input: (..., in_features); float32, bfloat16, float16 or float64; any strides.
        weight: (out_features, in_features), bias: (out_features); input's dtype.
        activation: "gelu" (erf), "gelu_tanh", "relu", "silu" or None.
        dropout_p: probability that an element is dropped; always on where > 0. The mask is that of
            :mod:`fastformer.reference`.
        residual: broadcasts to the output's shape; any floating dtype.

    Returns:
        (..., out_features) in input's dtype (with a residual: the wider of the two). Under autocast the product is
        in the autocast dtype.

    Raises:
        TypeError: an operand is not floating, or the dtypes differ.
        ValueError: a shape, probability or activation that does not fit.
    """
    input, weight, bias = autocast(input, weight, bias)
    check_floating(input=input, weight=weight, bias=bias)
    check_floating(one_dtype=False, input=input, residual=residual)
    check_matrix("weight", weight, in_features(input), "input's last dimension")
    check_shape("bias", bias, weight.shape[:1], "weight's first dimension")
    check_activation(activation)
    check_probability(dropout_p=dropout_p)
    residual = broadcast_residual(residual, input.shape[:-1] + weight.shape[:1])
    operands = input, weight, bias, residual
    faster, options = torch_is_faster(input, dropout_p), (activation, dropout_p > 0)
    backend = backends.choose("linear", *operands, torch_is_faster=faster, options=options)
    if backend == "torch":
        return reference.linear(input, weight, bias, activation=activation, dropout_p=dropout_p, residual=residual)
    seed = seed_for(dropout_p, input)
    fused = residual if residual is not None and residual.dtype == input.dtype else None
    if needs_grad(input, weight, bias, fused):
        output = torch.ops.fastformer.linear(
            input, weight, bias, activation, dropout_p, seed, fused, activation is not None, backend
        )[0]
    else:
        output = raw(backend).linear(input, weight, bias, activation, dropout_p, seed, fused, False)[0]
    return output if fused is residual else output + residual


def in_features(input: Tensor) -> int:
    if input.dim() == 0:
        raise ValueError("input: expected (..., in_features), got a tensor without dimensions")
    return input.shape[-1]


def torch_is_faster(input: Tensor, *dropout_ps: float) -> bool:
    """On CPUs, by weights that are not packed beforehand, PyTorch multiplies as fast and packs nothing; with dropout it
    takes longer to draw the masks."""
    return input.is_cpu and not any(dropout_ps)


def check_matrix(name: str, weight: Tensor, in_features: int, why: str) -> None:
    if weight.dim() != 2 or weight.shape[1] != in_features:
        raise ValueError(f"{name}: expected (out_features, {in_features}) ({why}), got {tuple(weight.shape)}")


def _fake(input, weight, bias, activation, dropout_p, seed, residual, save_pre_activation):
    output = input.new_empty(input.shape[:-1] + weight.shape[:1])
    saved = save_pre_activation and activation is not None
    return output, torch.empty_like(output) if saved else input.new_empty(0)


def _fake_backward(
    grad_output, input, weight, pre_activation, activation, dropout_p, seed, need_input, need_weight, need_bias
):
    return (
        input.new_empty(input.shape if need_input else (0,)),
        input.new_empty(weight.shape if need_weight else (0,)),
        input.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


def _setup_context(ctx, inputs, output):
    input, weight, _, ctx.activation, ctx.dropout_p, seed, residual, _, ctx.backend = inputs
    ctx.save_for_backward(input, weight, output[1], seed)


def _backward(ctx, grad_output, grad_pre_activation):
    input, weight, pre_activation, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = raw(ctx.backend).linear_backward(
        grad_output, input, weight, pre_activation, ctx.activation, ctx.dropout_p, seed, *needs
    )
    grad_residual = grad_output if ctx.needs_input_grad[6] else None
    return (*(g if n else None for g, n in zip(grads, needs, strict=True)), None, None, None, grad_residual, None)


register("linear", _SCHEMA, _BACKWARD_SCHEMA, _fake, _setup_context, _backward, _fake_backward)
