import os
from collections.abc import Callable, Iterator

import pytest
import torch

import fastformer

BACKEND = os.environ.get("FASTFORMER_BACKEND", "cpu")  # "triton" with TRITON_INTERPRET=1


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """The kernels are what is tested here, also where plain PyTorch would be chosen because it is faster (few rows).

    Strict: nothing falls back to it unseen.
    """
    with fastformer.backend(BACKEND, strict=True):
        yield


@pytest.fixture
def raises_before_anything_runs(recorder) -> Callable[[Callable, type[Exception], str], None]:
    """Checks that a call raises this error and message, and that nothing was computed and no random number drawn."""

    def check(call: Callable, error: type[Exception], message: str) -> None:
        state = torch.get_rng_state()
        with recorder, pytest.raises(error, match=message):
            call()
        assert set(recorder.names()) <= {"aten::expand"}  # that is how a broadcast is checked
        assert torch.equal(torch.get_rng_state(), state)

    return check
