from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer import ops


def inputs(rows: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, in) input, (out, in) weight, (out) bias."""
    weight = torch.randn(out_features, in_features) / in_features**0.5
    return torch.randn(rows, in_features), weight, torch.randn(out_features)


def eager(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(input, weight, bias))


def fused(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.linear(input, weight, bias, activation="gelu")


@pytest.mark.parametrize(
    ("rows", "in_features", "out_features"), [(16, 384, 1536), (128, 768, 768), (128, 768, 3072), (1024, 768, 3072)]
)
def test_forward(side_by_side: Callable, rows: int, in_features: int, out_features: int) -> None:
    name = f"linear with gelu {rows}x{in_features} to {out_features}"
    side_by_side(name, eager, fused, *inputs(rows, in_features, out_features))


def test_backward(side_by_side: Callable) -> None:
    side_by_side("linear with gelu 128x768 to 3072", eager, fused, *inputs(128, 768, 3072), backward=True)
