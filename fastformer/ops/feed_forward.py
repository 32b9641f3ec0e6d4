"""feed_forward: both products of a transformer's feed-forward layer; on CPUs the hidden activation stays in cache."""

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
from fastformer.ops.linear import check_matrix, in_features, torch_is_faster

_SCHEMA = (
    "(Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str? activation,"
    " float hidden_dropout_p, Tensor? hidden_seed, float dropout_p, Tensor? seed, Tensor? residual,"
    " bool save_pre_activation) -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor input, Tensor weight1, Tensor weight2, Tensor pre_activation, str? activation, float"
    " hidden_dropout_p, Tensor? hidden_seed, float dropout_p, Tensor? seed, bool need_input, bool need_weight1, bool"
    " need_bias1, bool need_weight2, bool need_bias2) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str | None = "gelu",
    hidden_dropout_p: float = 0.0,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """``dropout(W2 hidden_dropout(activation(W1 input + bias1)) + bias2) + residual``.

    The position-wise feed-forward network of Vaswani et al., "Attention Is All You Need", 2017.

    Args:
        input: (..., in_features); float32, bfloat16, float16 or float64; any strides.
        weight1: (hidden_features, in_features), bias1: (hidden_features); input's dtype.
        weight2: (out_features, hidden_features), bias2: (out_features); input's dtype.
        activation: "gelu" (erf), "gelu_tanh", "relu", "silu" or None.
        hidden_dropout_p, dropout_p: dropout of the hidden activation and of the output; always on where > 0. The
            masks are those of :mod:`fastformer.reference`.
        residual: broadcasts to the output's shape; any floating dtype.

    Returns:
        (..., out_features) in input's dtype (with a residual: the wider of the two). Under autocast the products
        are in the autocast dtype.

    Raises:
        TypeError: an operand is not floating, or the dtypes differ.
        ValueError: a shape, probability or activation that does not fit.
    """
    input, weight1, bias1, weight2, bias2 = autocast(input, weight1, bias1, weight2, bias2)
    check_floating(input=input, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)
    check_floating(one_dtype=False, input=input, residual=residual)
    check_matrix("weight1", weight1, in_features(input), "input's last dimension")
    check_matrix("weight2", weight2, weight1.shape[0], "weight1's first dimension")
    check_shape("bias1", bias1, weight1.shape[:1], "weight1's first dimension")
    check_shape("bias2", bias2, weight2.shape[:1], "weight2's first dimension")
    check_activation(activation)
    check_probability(hidden_dropout_p=hidden_dropout_p, dropout_p=dropout_p)
    residual = broadcast_residual(residual, input.shape[:-1] + weight2.shape[:1])
    operands = input, weight1, bias1, weight2, bias2, residual
    # In a training step both multiply by torch's products, but the fused op, in float32, keeps no hidden activation.
    keeps_less = needs_grad(*operands) and input.dtype.itemsize >= 4
    faster = torch_is_faster(input, hidden_dropout_p, dropout_p) and not keeps_less
    options = activation, hidden_dropout_p > 0 or dropout_p > 0
    backend = backends.choose("feed_forward", *operands, torch_is_faster=faster, options=options)
    if backend == "torch":
        return reference.feed_forward(
            input, weight1, bias1, weight2, bias2, activation=activation, hidden_dropout_p=hidden_dropout_p,
            dropout_p=dropout_p, residual=residual,
        )  # fmt: skip
    seeds = seed_for(hidden_dropout_p, input), seed_for(dropout_p, input)
    fused = residual if residual is not None and residual.dtype == input.dtype else None
    arguments = (
        input, weight1, bias1, weight2, bias2, activation, hidden_dropout_p, seeds[0], dropout_p, seeds[1], fused,
    )  # fmt: skip
    if needs_grad(input, weight1, bias1, weight2, bias2, fused):
        output = torch.ops.fastformer.feed_forward(*arguments, True, backend)[0]
    else:
        output = raw(backend).feed_forward(*arguments, False)[0]
    return output if fused is residual else output + residual


def _fake(
    input, weight1, bias1, weight2, bias2, activation, hidden_dropout_p, hidden_seed, dropout_p, seed, residual,
    save_pre_activation,
):  # fmt: skip
    output = input.new_empty(input.shape[:-1] + weight2.shape[:1])
    return output, input.new_empty(input.shape[:-1] + weight1.shape[:1] if save_pre_activation else (0,))


def _fake_backward(
    grad_output, input, weight1, weight2, pre_activation, activation, hidden_dropout_p, hidden_seed, dropout_p, seed,
    need_input, need_weight1, need_bias1, need_weight2, need_bias2,
):  # fmt: skip
    return (
        input.new_empty(input.shape if need_input else (0,)),
        input.new_empty(weight1.shape if need_weight1 else (0,)),
        input.new_empty(weight1.shape[:1] if need_bias1 else (0,)),
        input.new_empty(weight2.shape if need_weight2 else (0,)),
        input.new_empty(weight2.shape[:1] if need_bias2 else (0,)),
    )


def _setup_context(ctx, inputs, output):
    input, weight1, _, weight2, _, ctx.activation, ctx.hidden_dropout_p, hidden_seed = inputs[:8]
    ctx.dropout_p, seed, _, _, ctx.backend = inputs[8:]
    ctx.save_for_backward(input, weight1, weight2, output[1], hidden_seed, seed)


def _backward(ctx, grad_output, grad_pre_activation):
    input, weight1, weight2, pre_activation, hidden_seed, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    grads = raw(ctx.backend).feed_forward_backward(
        grad_output, input, weight1, weight2, pre_activation, ctx.activation, ctx.hidden_dropout_p, hidden_seed,
        ctx.dropout_p, seed, *needs,
    )  # fmt: skip
    grads = tuple(g if n else None for g, n in zip(grads, needs, strict=True))
    grad_residual = grad_output if ctx.needs_input_grad[10] else None
    return (*grads, None, None, None, None, None, grad_residual, None)


register("feed_forward", _SCHEMA, _BACKWARD_SCHEMA, _fake, _setup_context, _backward, _fake_backward)
