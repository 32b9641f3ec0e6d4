"""linear_cross_entropy: the loss of a language model's head; its logits never reach memory as a whole."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastformer import backends, library, reference
from fastformer.ops.common import (
    autocast,
    check_floating,
    check_probability,
    check_shape,
    compute_dtype,
    dtype_of,
    needs_grad,
    raw,
    register,
)
from fastformer.ops.linear import check_matrix, in_features

_SCHEMA = (
    "(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, str reduction,"
    " int ignore_index, float label_smoothing, bool need_input, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight,"
    " Tensor lse, int ignore_index, float label_smoothing, bool need_input, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)"
)
_REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target, ...)``, a chunk of the logits at a time.

    As ``torch.nn.functional.linear_cross_entropy`` for class indices. Only rows whose target is not ignore_index are
    computed. The gradients of a mean or sum are computed along with it, from the same logits, and kept (in float32)
    for the backward, which scales them; those of single losses compute the logits once more. For the arithmetic see
    Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2025.

    Args:
        input: (..., in_features); float32, bfloat16, float16 or float64; any strides.
        linear_weight: (classes, in_features), linear_bias: (classes); input's dtype.
        target: input's leading dimensions, int64: class indices, or ignore_index.
        weight: (classes), of each class; any floating dtype; gets no gradient.
        reduction: "mean" (weighted by the classes' weights; NaN where nothing is labelled), "sum" or "none".
        ignore_index: rows with this target have loss 0 and no gradient, and don't count in the mean.
        label_smoothing: share of the target that is spread over all classes, 0 to 1.

    Returns:
        The loss in input's dtype, in float32 under autocast: one number, or for "none" target's shape. The logits are
        float32 (float64 for float64) and not rounded. In bfloat16 on CPUs that have instructions for it plain PyTorch
        is chosen unless ``fastformer.backend("cpu")`` is asked for: it is faster, but writes all logits to memory.

    Raises:
        TypeError: an operand is not floating, the dtypes differ, or target is not int64.
        ValueError: a shape, reduction or label_smoothing that does not fit.
        NotImplementedError: target holds class probabilities, or weight requires a gradient.
        RuntimeError: a target is no class, on CPUs. On GPUs, where it would take a synchronization to say so, the loss
            of such a row is NaN, and so is every gradient that it has a part in.
    """
    loss_dtype = None  # of input
    if isinstance(input, Tensor) and torch.is_autocast_enabled(input.device.type):
        loss_dtype = torch.float32 if input.dtype != torch.float64 else torch.float64
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    check_floating(input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    check_floating(one_dtype=False, input=input, weight=weight)
    check_matrix("linear_weight", linear_weight, in_features(input), "input's last dimension")
    check_shape("linear_bias", linear_bias, linear_weight.shape[:1], "linear_weight's first dimension")
    check_shape("weight", weight, linear_weight.shape[:1], "linear_weight's first dimension")
    _check_target(target, input)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(map(repr, _REDUCTIONS))}, got {reduction!r}")
    check_probability(label_smoothing=label_smoothing)
    if needs_grad(weight):
        raise NotImplementedError("weight: the weights of the classes get no gradient; pass weight.detach()")
    operands = input, linear_weight, linear_bias
    backend = choose_backend(*operands, weight)
    if backend == "torch":
        return reference.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
            ignore_index=ignore_index, label_smoothing=label_smoothing,
        )  # fmt: skip
    arguments = (input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing)
    if needs_grad(*operands):
        now = (reduction != "none" and needs_grad(x) for x in operands)
        loss = torch.ops.fastformer.linear_cross_entropy(*arguments, *now, backend)[0]
    else:
        loss = raw(backend).linear_cross_entropy(*arguments, False, False, False)[0]
    return loss.to(loss_dtype or input.dtype)


def choose_backend(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, weight: Tensor | None = None
) -> str:
    # torch multiplies bfloat16 where the machine has instructions for it; the kernels compute in float32.
    faster = input.is_cpu and input.dtype == torch.bfloat16 and library.multiplies_bfloat16()
    operands = input, linear_weight, linear_bias, weight
    return backends.choose("linear_cross_entropy", *operands, torch_is_faster=faster)


def _check_target(target: Tensor, input: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a Tensor, got {type(target).__name__}")
    if target.is_floating_point():
        raise NotImplementedError(f"target: expected class indices (int64), got probabilities ({target.dtype})")
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected int64, got {target.dtype}")
    if target.device != input.device:
        raise ValueError(f"target: expected on {input.device} as input is, got {target.device}")
    check_shape("target", target, input.shape[:-1], "input's leading dimensions")


def _fake(
    input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing,
    need_input, need_weight, need_bias,
):  # fmt: skip
    dtype = compute_dtype(input.dtype)
    loss = input.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    lse = input.new_empty(2, math.prod(target.shape), dtype=dtype)
    return loss, lse, *_fake_gradients(input, linear_weight, need_input, need_weight, need_bias)


def _fake_backward(
    grad_output, input, linear_weight, target, linear_bias, weight, lse, ignore_index, label_smoothing,
    need_input, need_weight, need_bias,
):  # fmt: skip
    return _fake_gradients(input, linear_weight, need_input, need_weight, need_bias)


def _fake_gradients(input, linear_weight, need_input, need_weight, need_bias):
    dtype = compute_dtype(input.dtype)
    return (
        input.new_empty(input.shape if need_input else (0,), dtype=dtype),
        input.new_empty(linear_weight.shape if need_weight else (0,), dtype=dtype),
        input.new_empty(linear_weight.shape[:1] if need_bias else (0,), dtype=dtype),
    )


def _setup_context(ctx, inputs, output):
    input, linear_weight, target, linear_bias, weight, ctx.reduction, ctx.ignore_index, ctx.label_smoothing = inputs[:8]
    *ctx.computed, ctx.backend = inputs[8:]
    ctx.dtypes = input.dtype, linear_weight.dtype, dtype_of(linear_bias)
    if ctx.reduction == "none":
        ctx.save_for_backward(input, linear_weight, target, linear_bias, weight, output[1])
    else:
        ctx.save_for_backward(*output[2:])


def _backward(ctx, grad_loss, *grads_of_what_is_saved):
    if ctx.reduction == "none":
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        options = ctx.ignore_index, ctx.label_smoothing
        grads = raw(ctx.backend).linear_cross_entropy_backward(grad_loss, *ctx.saved_tensors, *options, *needs)
    else:
        needs, grads = ctx.computed, ctx.saved_tensors
        # A copy, for whoever gets them may add to them; but the last backward may give away what is kept.
        is_last = not torch._C._autograd._get_current_graph_task_keep_graph()
        if not (is_last and type(grad_loss) is Tensor and grad_loss.is_cpu and grad_loss == 1):
            grads = (grad * grad_loss for grad in grads)
    grad_input, grad_weight, grad_bias = (
        grad.to(dtype) if need else None for grad, dtype, need in zip(grads, ctx.dtypes, needs, strict=True)
    )
    return grad_input, grad_weight, None, grad_bias, *(None,) * 7


register("linear_cross_entropy", _SCHEMA, _BACKWARD_SCHEMA, _fake, _setup_context, _backward, _fake_backward)
