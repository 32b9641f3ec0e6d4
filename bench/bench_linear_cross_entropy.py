from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer import ops


@pytest.mark.parametrize("labelled", [1.0, 0.15])
@pytest.mark.parametrize(("rows", "in_features", "classes"), [(1024, 768, 30522), (1024, 768, 50257)])
def test_backward(side_by_side: Callable, rows: int, in_features: int, classes: int, labelled: float) -> None:
    input, weight = torch.randn(rows, in_features), torch.randn(classes, in_features) / in_features**0.5
    target = torch.randint(classes, (rows,)).where(torch.rand(rows) < labelled, -100)

    def eager(input: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(input, weight), target)

    def fused(input: Tensor, weight: Tensor) -> Tensor:
        return ops.linear_cross_entropy(input, weight, target)

    name = f"linear_cross_entropy {rows}x{in_features} to {classes}, {labelled:.0%} labelled"
    side_by_side(name, eager, fused, input, weight, backward=True)
