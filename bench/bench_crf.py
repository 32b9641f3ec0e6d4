"""Beside pytorch-crf where it is installed, else beside fastformer.reference: both loop over the positions."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastformer import ops, reference

try:
    from torchcrf import CRF
except ImportError:
    CRF = None

BATCH, LENGTH, TAGS = 32, 128, 9


def inputs() -> list[Tensor]:
    """Emissions, transitions, start and end."""
    return [torch.randn(BATCH, LENGTH, TAGS), torch.randn(TAGS, TAGS) / 3, torch.randn(TAGS), torch.randn(TAGS)]


def padding() -> Tensor:
    """(B, S), True = keep: sequences from full length down to half of it."""
    return torch.arange(LENGTH) < torch.linspace(LENGTH, LENGTH / 2, BATCH).long()[:, None]


def named(transitions: Tensor, start: Tensor, end: Tensor) -> dict[str, Tensor]:
    return {"crf.transitions": transitions, "crf.start_transitions": start, "crf.end_transitions": end}


class PytorchCrf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.crf = CRF(TAGS, batch_first=True)

    def forward(self, emissions: Tensor, tags: Tensor | None, mask: Tensor) -> Tensor:
        if tags is not None:
            return self.crf(emissions, tags, mask, reduction="mean")
        decoded = [path + [-100] * (LENGTH - len(path)) for path in self.crf.decode(emissions, mask)]
        return torch.tensor(decoded)


def test_log_likelihood(side_by_side: Callable) -> None:
    tags, mask = torch.randint(TAGS, (BATCH, LENGTH)), padding()

    def eager(emissions: Tensor, *weights: Tensor) -> Tensor:
        if CRF is None:
            return reference.crf_log_likelihood(emissions, tags, *weights, mask)
        return functional_call(PytorchCrf(), named(*weights), (emissions, tags, mask))

    def fused(emissions: Tensor, *weights: Tensor) -> Tensor:
        return ops.crf_log_likelihood(emissions, tags, *weights, mask)

    side_by_side(f"crf_log_likelihood {BATCH}x{LENGTH}", eager, fused, *inputs(), backward=True)


def test_decode(side_by_side: Callable) -> None:
    mask = padding()

    def eager(emissions: Tensor, *weights: Tensor) -> Tensor:
        if CRF is None:
            return reference.crf_decode(emissions, *weights, mask).double()
        return functional_call(PytorchCrf(), named(*weights), (emissions, None, mask)).double()

    def fused(emissions: Tensor, *weights: Tensor) -> Tensor:
        return ops.crf_decode(emissions, *weights, mask).double()

    side_by_side(f"crf_decode {BATCH}x{LENGTH}", eager, fused, *inputs())
