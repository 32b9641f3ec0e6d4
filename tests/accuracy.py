"""The accuracy rule: an error is judged by the error that eager PyTorch makes in the same dtype on the same inputs."""

from collections.abc import Callable

import torch
from torch import Tensor


def assert_close_to_reference(out: Tensor, eager: Tensor, ref64: Tensor, what: str = "output") -> None:
    """max |out - ref64| <= 2 max |eager - ref64| + one unit in the last place (of out's dtype) of max |ref64|."""
    assert out.shape == ref64.shape, f"{what}: shape {tuple(out.shape)}, expected {tuple(ref64.shape)}"
    assert out.dtype == eager.dtype, f"{what}: {out.dtype}, expected {eager.dtype}"
    if out.numel() == 0:
        return
    error, bound = (out.double() - ref64).abs().max().item(), error_bound(eager, ref64)
    assert error <= bound, f"{what}: error {error:.3g}, at most {bound:.3g} allowed"  # NaN fails, too


def error_bound(eager: Tensor, ref64: Tensor) -> float:
    unit = torch.finfo(eager.dtype).eps * ref64.abs().max().item()
    if eager.dtype == torch.float64:  # the reference is as exact as the kernel: only rounding separates them
        return 32 * unit
    return 2 * (eager.double() - ref64).abs().max().item() + unit


def assert_op_close(fused: Callable, eager: Callable, tensors: dict[str, Tensor | None]) -> None:
    """The outputs of `fused` and the gradients of its floating tensors, by the accuracy rule.

    Both functions take the tensors by name and return one or several; `eager` runs in the tensors' dtypes and in float64.
    Each run begins with the same state of torch's generator.
    """
    leaves, outputs = zip(
        _run(fused, tensors), _run(eager, tensors), _run(eager, tensors, torch.float64), strict=True
    )
    for i, results in enumerate(zip(*outputs, strict=True)):
        assert_close_to_reference(*(result.detach() for result in results), f"output {i}")
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs[0]]
    gradients = [_gradients(*run, weights) for run in zip(leaves, outputs, strict=True)]
    for name in gradients[0]:
        assert_close_to_reference(*(gradient[name] for gradient in gradients), f"gradient of {name}")


def _run(function: Callable, tensors: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> tuple:
    """The tensors that collect gradients, and the outputs."""
    inputs = {name: None if x is None else x.detach() for name, x in tensors.items()}
    floating = {name: x for name, x in inputs.items() if x is not None and x.is_floating_point()}
    leaves = {name: x.to(dtype or x.dtype).requires_grad_() for name, x in floating.items()}
    torch.manual_seed(1)
    outputs = function(**inputs | leaves)
    return leaves, outputs if isinstance(outputs, tuple) else (outputs,)


def _gradients(leaves: dict[str, Tensor], outputs: tuple[Tensor, ...], weights: list[Tensor]) -> dict[str, Tensor]:
    """Of sum(outputs * weights)."""
    weights = [weight.to(out.dtype) for weight, out in zip(weights, outputs, strict=True)]
    return dict(zip(leaves, torch.autograd.grad(outputs, leaves.values(), weights), strict=True))
