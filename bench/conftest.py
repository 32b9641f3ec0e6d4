"""Microbenchmarks of each op: eager PyTorch and fused, side by side in one group, on the same inputs.

    python -m pytest bench --benchmark-only [--threads N]

Before anything is timed, the outputs (and gradients) are checked: the error of the fused op against float64 is at most
twice that of eager, plus one unit in the last place.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastformer
from fastformer.cli.measure import accuracy

Function = Callable[..., Tensor]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=None, help="CPU threads (default: as many as torch takes)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads") or torch.get_num_threads())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(max_time=0.5, min_rounds=5, warmup=True, disable_gc=True))


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("contender", ["eager", "fused"])  # last, so that the two run one after the other


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """The kernels are what is measured, also where plain PyTorch would be chosen."""
    with fastformer.backend("cpu"):
        yield


@pytest.fixture
def side_by_side(contender: str, benchmark) -> Callable[..., None]:
    """Call it with a name, the eager and the fused function, and the floating tensors that both take."""

    def run(name: str, eager: Function, fused: Function, *inputs: Tensor, backward: bool = False) -> None:
        if backward:
            gradient = torch.randn_like(eager(*inputs))
            inputs = tuple(x.requires_grad_() for x in inputs)
            eager, fused = with_backward(eager, gradient), with_backward(fused, gradient)
        with torch.inference_mode(not backward):
            check(eager, fused, inputs)
            benchmark.group = name + (", forward and backward" if backward else "")
            benchmark.extra_info["threads"] = torch.get_num_threads()
            benchmark({"eager": eager, "fused": fused}[contender], *inputs)

    torch.manual_seed(0)
    return run


def with_backward(function: Function, gradient: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """The function's output, and the gradients of its inputs for this gradient of the output."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        output = function(*inputs)
        return output, *torch.autograd.grad(output, inputs, gradient.to(output.dtype))

    return run


def check(eager: Callable, fused: Callable, inputs: tuple[Tensor, ...]) -> None:
    ref64 = eager(*(x.detach().double().requires_grad_(x.requires_grad) for x in inputs))
    results = (fused(*inputs), eager(*inputs), ref64)
    if isinstance(ref64, Tensor):
        results = ((result,) for result in results)
    for position, tensors in enumerate(zip(*results, strict=True)):
        judged = accuracy(*(x.detach() for x in tensors))
        assert judged.agree, f"result {position}: {judged}"
