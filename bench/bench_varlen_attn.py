"""Sequences laid end to end; eager PyTorch on the CPU takes them one by one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer import ops


def inputs(lengths: list[int], heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """Query, key and value (T, H, D) of T tokens."""
    return tuple(torch.randn(sum(lengths), heads, head_dim) for _ in range(3))


def contenders(lengths: list[int]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    cu_seq = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        by_sequence = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (query, key, value)), strict=True)
        outputs = [F.scaled_dot_product_attention(*(x[None] for x in sequence))[0] for sequence in by_sequence]
        return torch.cat(outputs, 1).transpose(0, 1)

    def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.varlen_attn(query, key, value, cu_seq, cu_seq, max(lengths), max(lengths))

    return eager, fused


CASES = {
    "32 sequences of 4 to 128": ([4 * (i + 1) for i in range(32)], 12, 32),
    "8 sequences of 16 to 128": ([16 * (i + 1) for i in range(8)], 12, 64),
    "4 sequences of 128 to 512": ([128, 256, 384, 512], 12, 64),
}


@pytest.mark.parametrize("case", CASES)
def test_forward(side_by_side: Callable, case: str) -> None:
    lengths, heads, head_dim = CASES[case]
    name = f"varlen_attn {case}, {heads}x{head_dim}"
    side_by_side(name, *contenders(lengths), *inputs(lengths, heads, head_dim))


def test_backward(side_by_side: Callable) -> None:
    lengths, heads, head_dim = CASES["8 sequences of 16 to 128"]
    name = f"varlen_attn 8 sequences of 16 to 128, {heads}x{head_dim}"
    side_by_side(name, *contenders(lengths), *inputs(lengths, heads, head_dim), backward=True)
