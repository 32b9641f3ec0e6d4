"""What the tests of torch's own modules share."""

import pytest
import torch
from torch import nn


@pytest.fixture
def slow_path():
    """torch without its fast path, which computes erf for nn.GELU("tanh"), takes every number of a float mask but 0 for
    -inf, and under autocast adds in bfloat16."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture
def tokens_of(monkeypatch):
    """A function of an accelerated encoder: the list of the numbers of tokens that its last layer computes."""

    def watch(model: nn.Module) -> list[int]:
        seen, layer_class = [], type(model.layers[-1])
        original = layer_class.compute

        def compute(layer, x, *args):
            if layer is model.layers[-1]:
                seen.append(x.shape[:-1].numel())
            return original(layer, x, *args)

        monkeypatch.setattr(layer_class, "compute", compute)
        return seen

    return watch
