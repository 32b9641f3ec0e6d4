"""The logits of a vocabulary, in training: not computed before something other than their cross entropy is wanted.

A language model's loss is all that training asks of its head, and `ops.linear_cross_entropy` computes that from what
the logits would be made of: without them in memory, and for the labelled tokens alone. So the head returns a tensor
that knows how to become the logits. `F.cross_entropy` of it, also behind the views and casts of transformers' losses,
is the fused op; everything else gets the logits, with their gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map_only

from fastformer import ops
from fastformer.ops.linear_cross_entropy import choose_backend

Take = Callable[[Tensor], Tensor]  # some of the rows (..., anything), or all, in another shape


class _Product:
    """linear(input, weight, bias), when it is needed first."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None):
        self.operands = input, weight, bias
        self.versions = [x._version for x in self.operands if x is not None]
        self.output: Tensor | None = None

    def compute(self) -> Tensor:
        if self.output is None:
            if [x._version for x in self.operands if x is not None] != self.versions:
                raise RuntimeError(
                    "the logits were not computed yet, and their weight has been edited since: look at them before"
                )
            if self.operands[1].untyped_storage().nbytes() == 0:
                raise RuntimeError(
                    "the logits were not computed yet, and FSDP has freed their weight: look at them before"
                )
            device = self.operands[1].device.type
            with torch.enable_grad(), torch.autocast(device, enabled=False):
                self.output = F.linear(*self.operands)
        return self.output

    @property
    def is_edited(self) -> bool:
        return self.output is not None and self.output._version > 0


_waiting: weakref.WeakSet[_Product] = weakref.WeakSet()


def _compute_before_step(optimizer, args, kwargs) -> None:
    """Somebody still holds logits that the step would change."""
    pending = [product for product in _waiting if product.output is None]
    if pending:
        weights = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for product in pending:
            if not weights.isdisjoint(map(id, product.operands)):
                product.compute()


register_optimizer_step_pre_hook(_compute_before_step)


class Logits(Tensor):
    _product: _Product
    _takes: tuple[Take, ...]
    _rows: Tensor  # (..., in_features), of the product's input what these logits are of

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            loss = _cross_entropy(*args, **kwargs)
            if loss is not None:
                return loss
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if args and isinstance(args[0], Logits) and not kwargs:
            take = _take(func, args[0], args[1:])
            if take is not None:
                return args[0]._taken(take)
        args, kwargs = tree_map_only(Logits, Logits._computed, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """For functions of autograd, which see these tensors as they are, and have their gradient go to _Linear."""
        args, kwargs = tree_map_only(Logits, lambda logits: logits._computed().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def _computed(self) -> Tensor:
        x = self._product.compute()
        for take in self._takes:
            x = take(x)
        return x

    def _taken(self, take: Take) -> Tensor:
        if self._product.is_edited:
            return take(self._computed())
        return _logits(take(self._rows), self._product, (*self._takes, take))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Logits:
        ctx.save_for_backward(rows, weight)
        size = *rows.shape[:-1], weight.shape[0]
        return Tensor._make_wrapper_subclass(Logits, size, dtype=rows.dtype, device=rows.device)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weight = ctx.saved_tensors
        grads = grad.flatten(0, -2)
        return grad @ weight, grads.t() @ rows.flatten(0, -2), grads.sum(0) if ctx.needs_input_grad[2] else None


def _logits(rows: Tensor, product: _Product, takes: tuple[Take, ...]) -> Logits:
    logits = _Linear.apply(rows, *product.operands[1:])
    logits._rows, logits._product, logits._takes = rows, product, takes
    return logits


def waiting(input: Tensor, weight: Tensor, bias: Tensor | None) -> Logits:
    """linear(input, weight, bias), of (..., in_features)."""
    product = _Product(input, weight, bias)
    _waiting.add(product)
    return _logits(input, product, ())


def may_wait(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Is this a training step of which the fused op can compute the loss?"""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and weight.requires_grad
        and type(input) is Tensor
        and input.dim() > 1
        and input.dtype == weight.dtype
        and not torch.is_autocast_enabled(input.device.type)
        and not torch.jit.is_tracing()
        and choose_backend(input, weight, bias) != "torch"
    )


_METADATA = {
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "__len__", "is_floating_point")),
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cpu")),
}


def _take(func: Callable, logits: Logits, arguments: Sequence[Any]) -> Take | None:
    """What the function takes of the logits' rows, as losses do before the cross entropy; None for other functions."""
    classes = logits.shape[-1]
    if func is Tensor.contiguous and not arguments:
        return lambda x: x.contiguous()
    if func is Tensor.float and logits.dtype == torch.float32:
        return lambda x: x
    if func is Tensor.to and list(arguments) in ([logits.dtype], [logits.device]):
        return lambda x: x
    if func in (Tensor.view, Tensor.reshape):
        size = arguments[0] if len(arguments) == 1 else arguments
        if isinstance(size, tuple | list) and len(size) > 1 and size[-1] == classes:
            return lambda x: getattr(x, func.__name__)(*size[:-1], x.shape[-1])
    if func is Tensor.flatten and list(arguments) in ([0, -2], [0, logits.dim() - 2]):
        return lambda x: x.flatten(0, -2)
    if func is Tensor.__getitem__:
        (index,) = arguments
        index = index if isinstance(index, tuple) else (index,)
        plain = all(part is Ellipsis or isinstance(part, slice) for part in index)
        reaches_classes = Ellipsis in index or len(index) == logits.dim()
        if plain and (not reaches_classes or index[-1] == slice(None)):
            return lambda x: x[index]
    return None


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """F.cross_entropy by the fused op; None where that says something else, or the logits have been edited."""
    if not isinstance(input, Logits) or input._product.is_edited or input.dim() != 2:
        return None
    if size_average is not None or reduce is not None or type(target) is not Tensor or target.dtype != torch.int64:
        return None
    if target.shape != input.shape[:1] or (weight is not None and (weight.requires_grad or weight.dim() != 1)):
        return None
    _, linear_weight, linear_bias = input._product.operands
    return ops.linear_cross_entropy(
        input._rows, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
        ignore_index=ignore_index, label_smoothing=label_smoothing,
    )  # fmt: skip
