from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer import ops


def inputs(batch: int, heads: int, length: int, head_dim: int) -> tuple[Tensor, ...]:
    """Query, key and value (B, H, S, D), as views of (B, S, H, D), which is how models come by them."""
    return tuple(torch.randn(batch, length, heads, head_dim).transpose(1, 2) for _ in range(3))


def padding_mask(batch: int, length: int) -> Tensor:
    """(B, 1, 1, S) bool: sequences from full length down to an eighth of it."""
    lengths = torch.linspace(length, length / 8, batch).long()
    return (torch.arange(length) < lengths[:, None])[:, None, None, :]


@pytest.mark.parametrize("masking", ["no mask", "padding", "causal"])
@pytest.mark.parametrize(
    ("batch", "heads", "length", "head_dim"), [(1, 12, 128, 64), (8, 12, 128, 64), (8, 12, 512, 32)]
)
def test_forward(side_by_side: Callable, batch: int, heads: int, length: int, head_dim: int, masking: str) -> None:
    options = {
        "is_causal": masking == "causal",
        "attn_mask": padding_mask(batch, length) if masking == "padding" else None,
    }
    side_by_side(
        f"scaled_dot_product_attention {batch}x{heads}x{length}x{head_dim}, {masking}",
        partial(F.scaled_dot_product_attention, **options),
        partial(ops.scaled_dot_product_attention, **options),
        *inputs(batch, heads, length, head_dim),
    )


def test_backward(side_by_side: Callable) -> None:
    eager, fused = F.scaled_dot_product_attention, ops.scaled_dot_product_attention
    side_by_side("scaled_dot_product_attention 8x12x128x64", eager, fused, *inputs(8, 12, 128, 64), backward=True)
