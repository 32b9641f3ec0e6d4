"""What all tests share."""

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from tensors import BACKEND, INTERPRETED
from torch.utils._python_dispatch import TorchDispatchMode

from fastformer import library, tuning

if INTERPRETED:
    import triton_interpreter  # noqa: F401  mends the interpreter

FAST_VARIANTS = 2  # of each test of an op: the others are slow where kernels are interpreted
examples = 5 if INTERPRETED else 40
settings.register_profile("fastformer", deadline=None, derandomize=True, database=None, max_examples=examples)
settings.load_profile("fastformer")


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """One thread and the same random numbers for each test, whatever ran before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tuning.table = None  # what this machine was tuned to is no matter of the tests
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(tryfirst=True)  # before options like -m "not slow" choose
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked cpu_only where other kernels are tested, and calls most variants slow on the
    interpreter."""
    if BACKEND != "cpu":
        left_out = [item for item in items if item.get_closest_marker("cpu_only")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("cpu_only")]
    if INTERPRETED:
        variants: dict[str, list[pytest.Item]] = {}
        for item in items:
            variants.setdefault(item.nodeid.partition("[")[0], []).append(item)
        for test, group in variants.items():
            if test.startswith("tests/ops") and len(group) > FAST_VARIANTS:
                for item in random.Random(test).sample(group, len(group) - FAST_VARIANTS):
                    item.add_marker(pytest.mark.slow)


def _use(isa: str) -> Iterator[str]:
    before = library.isa()
    torch.ops.fastformer_cpu.set_isa(isa)
    yield isa
    torch.ops.fastformer_cpu.set_isa(before)


@pytest.fixture(params=[name for name in library.isas() if "_" not in name] if BACKEND == "cpu" else [BACKEND])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every instruction set of this machine, but those that differ in 8-bit products only."""
    if BACKEND == "cpu":
        yield from _use(request.param)
    else:
        yield request.param


@pytest.fixture(params=library.isas())
def int8_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _use(request.param)


@pytest.fixture(params=[1, 2] if BACKEND == "cpu" else [1])
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
