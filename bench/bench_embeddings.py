from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer import ops

WORDS, WIDTH = 30522, 768


def inputs() -> list[Tensor]:
    """The three tables, weight and bias."""
    return [torch.randn(rows, WIDTH) for rows in (WORDS, 512, 2)] + [torch.rand(WIDTH) + 0.5, torch.randn(WIDTH)]


def functions(batch: int, length: int) -> tuple[Callable, Callable]:
    words, types = torch.randint(WORDS, (batch, length)), torch.randint(2, (batch, length))
    positions = torch.arange(length)

    def eager(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        s = F.embedding(words, word) + F.embedding(types, token_type) + F.embedding(positions, position)
        return F.layer_norm(s, (WIDTH,), weight, bias, 1e-12)

    def fused(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.embeddings(words, word, positions, position, types, token_type, weight, bias, 1e-12)

    return eager, fused


@pytest.mark.parametrize(("batch", "length"), [(1, 16), (1, 128), (8, 128)])
def test_forward(side_by_side: Callable, batch: int, length: int) -> None:
    side_by_side(f"embeddings {batch}x{length}", *functions(batch, length), *inputs())


def test_backward(side_by_side: Callable) -> None:
    side_by_side("embeddings 8x128", *functions(8, 128), *inputs(), backward=True)
