import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from tensors import BACKEND, INTERPRETED

import fastformer
from fastformer import backends


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """The kernels are what is tested here, also where plain PyTorch would be chosen because it is faster (few rows).

    Strict: nothing falls back to it unseen.
    """
    with on_its_device(), fastformer.backend(BACKEND, strict=True), unwritten_memory_is_nan():
        yield


def on_its_device() -> contextlib.AbstractContextManager:
    """Tensors are made on the GPU where the kernels take those."""
    devices = {one.device for one in backends.implementations() if one.backend == BACKEND}
    return torch.device("cuda") if devices == {"cuda"} and torch.cuda.is_available() else contextlib.nullcontext()


@contextlib.contextmanager
def unwritten_memory_is_nan() -> Iterator[None]:
    if not INTERPRETED:
        yield
        return
    from interpreted_memory import filled_with_nan

    with filled_with_nan():
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
