from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer import ops


def inputs(rows: int, width: int) -> tuple[Tensor, ...]:
    """(rows, width) input, (4 width, width) and (width, 4 width) weights with their biases, (rows, width) residual."""
    hidden = 4 * width
    return (
        torch.randn(rows, width),
        torch.randn(hidden, width) / width**0.5,
        torch.randn(hidden),
        torch.randn(width, hidden) / hidden**0.5,
        torch.randn(width),
        torch.randn(rows, width),
    )


def eager(input: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(input, weight1, bias1)), weight2, bias2) + residual


def fused(input: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: Tensor) -> Tensor:
    return ops.feed_forward(input, weight1, bias1, weight2, bias2, residual=residual)


@pytest.mark.parametrize(("rows", "width"), [(16, 384), (128, 768), (1024, 768)])
def test_forward(side_by_side: Callable, rows: int, width: int) -> None:
    side_by_side(f"feed_forward {rows}x{width}, hidden {4 * width}", eager, fused, *inputs(rows, width))


def test_backward(side_by_side: Callable) -> None:
    side_by_side("feed_forward 128x768, hidden 3072", eager, fused, *inputs(128, 768), backward=True)
