from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer import ops


def inputs(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, width) input, (width) weight and bias."""
    return torch.randn(rows, width), torch.rand(width) + 0.5, torch.randn(width)


def eager(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(input, weight.shape, weight, bias)


def fused(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.layer_norm(input, weight.shape, weight, bias)


@pytest.mark.parametrize(("rows", "width"), [(16, 384), (128, 768), (1024, 768)])
def test_forward(side_by_side: Callable, rows: int, width: int) -> None:
    side_by_side(f"layer_norm {rows}x{width}", eager, fused, *inputs(rows, width))


def test_backward(side_by_side: Callable) -> None:
    side_by_side("layer_norm 1024x768", eager, fused, *inputs(1024, 768), backward=True)
