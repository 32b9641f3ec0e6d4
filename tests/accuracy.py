"""The accuracy rule: an error is judged by the error that eager PyTorch makes in the same dtype on the same inputs."""

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


def clone_leaf(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """A copy with the same strides' order that collects its own gradient."""
    if tensor is None:
        return None
    return tensor.detach().to(dtype or tensor.dtype).requires_grad_(tensor.requires_grad)
