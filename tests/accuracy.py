"""The accuracy rule: an error is judged by the error that eager PyTorch makes in the same dtype on the same inputs."""

from collections.abc import Callable

import torch
from torch import Tensor


def assert_close_to_reference(out: Tensor, eager: Tensor, ref64: Tensor, what: str = "output", slack: int = 0) -> None:
    """max |out - ref64| <= 2 max |eager - ref64| + one unit in the last place (of out's dtype) of max |ref64|.

    `slack`: so many units in the last place of 1 are allowed on top.
    """
    assert out.shape == ref64.shape, f"{what}: shape {tuple(out.shape)}, expected {tuple(ref64.shape)}"
    assert out.dtype == eager.dtype, f"{what}: {out.dtype}, expected {eager.dtype}"
    if out.numel() == 0:
        return
    error = (out.double() - ref64).abs().max().item()
    bound = error_bound(eager, ref64) + slack * torch.finfo(out.dtype).eps
    assert error <= bound, f"{what}: error {error:.3g}, at most {bound:.3g} allowed"  # NaN fails, too


def error_bound(eager: Tensor, ref64: Tensor) -> float:
    unit = torch.finfo(eager.dtype).eps * ref64.abs().max().item()
    # In float64 eager may be the reference itself: then only rounding separates the two.
    units = 32 if eager.dtype == torch.float64 else 1
    return 2 * (eager.double() - ref64).abs().max().item() + units * unit


def assert_op_close(fused: Callable, eager: Callable, *draws: dict[str, Tensor | None], slack: int = 0) -> None:
    """The outputs of `fused` and the gradients of its floating tensors, by the accuracy rule.

    Both functions take the tensors of a draw by name and return one or several; `eager` runs in the tensors' dtypes and
    in float64. Each run begins with the same state of torch's generator. Several draws are judged as one: where a
    result is a single number, one draw says little about the size of an error. A `slack` is for arbitrary calls of
    numbers around 1, whose exact result may be a single number, or 0.
    """
    judged = [_results(fused, eager, tensors) for tensors in draws]
    for name in judged[0]:
        results = zip(*(draw[name] for draw in judged), strict=True)
        assert_close_to_reference(*(torch.stack(result) for result in results), name, slack)


def assert_strides_do_not_matter(function: Callable, tensors: dict[str, Tensor | None]) -> None:
    """Outputs and gradients are, bit for bit, those of contiguous copies."""
    contiguous = {
        name: None if x is None else x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()
    }
    (leaves, outputs), (copies, expected) = _run(function, tensors), _run(function, contiguous)
    weights = [torch.randn(out.shape).to(out.dtype) for out in outputs]
    outputs += torch.autograd.grad(outputs, leaves.values(), weights)
    expected += torch.autograd.grad(expected, copies.values(), weights)
    assert all(torch.equal(x, y) for x, y in zip(outputs, expected, strict=True))


def _results(fused: Callable, eager: Callable, tensors: dict[str, Tensor | None]) -> dict[str, tuple[Tensor, ...]]:
    """Name -> (fused, eager, float64) for every output and gradient."""
    runs = [_run(fused, tensors), _run(eager, tensors), _run(eager, tensors, torch.float64)]
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn(out.shape, generator=generator, device="cpu") for out in runs[0][1]]
    weights = [x.to(out) for x, out in zip(drawn, runs[0][1], strict=True)]  # of the outputs' sum
    results = []
    for leaves, outputs in runs:
        given = [weight.to(out.dtype) for weight, out in zip(weights, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, leaves.values(), given)
        named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
        results.append(named | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)})
    return {name: tuple(result[name] for result in results) for name in results[0]}


def _run(function: Callable, tensors: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> tuple:
    """The tensors that collect gradients, and the outputs."""
    inputs = {name: None if x is None else x.detach() for name, x in tensors.items()}
    floating = {name: x for name, x in inputs.items() if x is not None and x.is_floating_point()}
    leaves = {name: x.to(dtype or x.dtype).requires_grad_() for name, x in floating.items()}
    torch.manual_seed(1)
    outputs = function(**inputs | leaves)
    return leaves, outputs if isinstance(outputs, tuple) else (outputs,)
