"""What the ops share: checks of the arguments, autocast, and how a differentiable op is registered."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from fastformer import backends, cuda_library, library
from fastformer.reference import ACTIVATIONS, draw_seed

_differentiable = torch.library.Library("fastformer", "DEF")
_cpu = torch.library.Library("fastformer_cpu", "FRAGMENT")
_cuda = torch.library.Library("fastformer_cuda", "FRAGMENT")
_triton = torch.library.Library("fastformer_triton", "DEF")

_RAW = {
    "cpu": torch.ops.fastformer_cpu,
    "triton": torch.ops.fastformer_triton,
    "cuda": torch.ops.fastformer_cuda,
}


def raw(backend: str):
    """The namespace of the backend's raw ops."""
    return _RAW[backend]


def register(
    name: str,
    schema: str,
    backward_schema: str,
    fake: Callable,
    setup_context: Callable,
    backward: Callable,
    fake_backward: Callable,
) -> None:
    """Defines ``fastformer::<name>``, the differentiable op, on top of every backend's raw ``<name>``.

    `schema` is that of the raw op; the differentiable op takes the backend's name as its last argument, so that the
    backward runs where the forward did. `fake` serves both.
    """
    arguments, returns = schema.split(" -> ")
    _differentiable.define(f"{name}{arguments[:-1]}, str backend) -> {returns}")
    _differentiable.impl(name, lambda *args: getattr(raw(args[-1]), name)(*args[:-1]), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastformer::{name}", lambda *args: fake(*args[:-1]), lib=_differentiable)

    def keep(ctx, inputs, output):
        ctx.set_materialize_grads(False)  # no zeros for what is saved for the backward only
        setup_context(ctx, inputs, output)

    def once(ctx, *grads):
        if torch.is_grad_enabled():  # create_graph=True: the raw ops would cut the graph without a word
            raise NotImplementedError(f"fastformer.ops.{name} can be differentiated once, without create_graph")
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return (*backward(ctx, *grads), None)

    torch.library.register_autograd(f"fastformer::{name}", once, setup_context=keep, lib=_differentiable)
    register_raw(name, name, schema, fake)
    register_raw(name, f"{name}_backward", backward_schema, fake_backward)


def register_raw(op: str, name: str, schema: str, fake: Callable) -> None:
    """A raw op of `op` on every backend that has it; that of the Triton kernels is defined here as well."""
    if library.available():
        torch.library.register_fake(f"fastformer_cpu::{name}", fake, lib=_cpu)
    if cuda_library.available() and hasattr(torch.ops.fastformer_cuda, name):
        torch.library.register_fake(f"fastformer_cuda::{name}", fake, lib=_cuda)
    if "triton" in backends.declared(op):
        _triton.define(name + schema)
        _triton.impl(name, _launcher(op, name), backends.TRITON_DEVICE.upper())
        torch.library.register_fake(f"fastformer_triton::{name}", fake, lib=_triton)


def _launcher(op: str, raw_name: str) -> Callable:
    """`raw_name` of kernels/<op>.py, imported by the first call: Triton takes its time."""

    def launch(*args):
        function = getattr(importlib.import_module(f"fastformer.kernels.{op}"), raw_name)
        if args[0].is_cpu:
            return function(*args)
        with torch.cuda.device(args[0].device):
            return function(*args)

    return launch


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def seed_for(dropout_p: float, input: Tensor) -> Tensor | None:
    return draw_seed(input.device) if dropout_p > 0 else None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels accumulate in and keep statistics in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_of(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands of a matrix product in the autocast dtype, where autocast is on."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in _AUTOCAST else x for x in tensors)


_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)


def check_floating(*, one_dtype: bool = True, **tensors: Tensor | None) -> None:
    """All of them floating, on one device and, unless told otherwise, of one dtype. Raises TypeError or ValueError."""
    first_name, first = None, None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if first is None:
            first_name, first = name, tensor
        elif one_dtype and tensor.dtype != first.dtype:
            raise TypeError(f"{name}: expected {first.dtype} as {first_name} has, got {tensor.dtype}")
        elif tensor.device != first.device:
            raise ValueError(f"{name}: expected on {first.device} as {first_name} is, got {tensor.device}")


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], why: str) -> None:
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)} ({why}), got {tuple(tensor.shape)}")


def check_probability(**probabilities: float) -> None:
    for name, p in probabilities.items():
        if not 0 <= p <= 1:
            raise ValueError(f"{name}: expected a probability from 0 to 1, got {p}")


def check_activation(activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        expected = ", ".join(repr(a) for a in ACTIVATIONS)
        raise ValueError(f"activation: expected one of {expected}, got {activation!r}")


def broadcast_residual(residual: Tensor | None, shape: torch.Size) -> Tensor | None:
    if residual is None or residual.shape == shape:
        return residual
    try:
        return residual.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"residual: expected a shape that broadcasts to the output's {tuple(shape)}, got {tuple(residual.shape)}"
        ) from None
