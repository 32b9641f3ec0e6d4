"""What all tests share."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode

from fastformer import library

settings.register_profile("fastformer", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("fastformer")


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """One thread and the same random numbers for each test, whatever ran before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=library.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every instruction set of this machine."""
    before = library.isa()
    torch.ops.fastformer_cpu.set_isa(request.param)
    yield request.param
    torch.ops.fastformer_cpu.set_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.param)
    return request.param


class Recorder(TorchDispatchMode):
    """Notes every operator that runs, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **kwargs or {})

    def names(self) -> list[str]:
        return [func.name() for func, _ in self.calls]


@pytest.fixture
def recorder() -> Recorder:
    """Use it as a context manager."""
    return Recorder()
