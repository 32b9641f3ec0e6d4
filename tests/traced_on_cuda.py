"""What every op gives for CUDA tensors that hold nothing; run by test_traced_on_cuda.py, which makes such a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from cases import CASES, Case
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses import FakeTensorMode

import fastformer
from fastformer import backends, ops
from fastformer.cli import calls
from fastformer.cli.measure import time_on

WITH_KERNELS = {name: case for name, case in CASES.items() if "triton" in backends.declared(case.op)}
every_case = pytest.mark.parametrize("case", WITH_KERNELS.values(), ids=WITH_KERNELS)
HOST_READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "synchronize"}


@pytest.fixture(autouse=True)
def fake_mode() -> Iterator[FakeTensorMode]:
    """The autograd engine would run a device's nodes on a thread of that device, where the mode is not on."""
    with torch.autograd.set_multithreading_enabled(False), FakeTensorMode() as mode:
        yield mode


def on_cuda(case: Case, requires_grad: bool) -> tuple[dict[str, Tensor], dict]:
    tensors = {
        name: torch.empty(shape, device="cuda", requires_grad=requires_grad) for name, shape in case.shapes.items()
    }
    options = {name: x.to("cuda") if isinstance(x, Tensor) else x for name, x in case.options().items()}
    return tensors, options


def call(case: Case, tensors: dict[str, Tensor], options: dict) -> tuple[Tensor, ...]:
    outputs = getattr(ops, case.op)(**tensors, **options)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def with_gradients(case: Case, tensors: dict[str, Tensor], options: dict) -> tuple[Tensor, ...]:
    outputs = call(case, tensors, options)
    return *outputs, *torch.autograd.grad(outputs, tensors.values(), [torch.ones_like(out) for out in outputs])


def layouts(results: tuple[Tensor, ...]) -> list[tuple]:
    return [(x.shape, x.dtype, x.stride()) for x in results]


def assert_on_cuda_only(calls: list[tuple]) -> None:
    """No operator reads on the host or waits, and nothing moves to the CPU."""
    for op, _ in calls:
        assert op._opname not in HOST_READS, op


@every_case
class TestFake:
    def test_forward(self, case, recorder):
        tensors, options = on_cuda(case, requires_grad=False)
        with recorder:
            outputs = call(case, tensors, options)
        assert [n for n in recorder.names() if n.startswith("fastformer")] == [f"fastformer_triton::{case.op}"]
        assert all(out.device.type == "cuda" for out in outputs)
        assert_on_cuda_only(recorder.calls)

    def test_backward(self, case, recorder):
        tensors, options = on_cuda(case, requires_grad=True)
        with recorder:
            results = with_gradients(case, tensors, options)
        first, *rest = [(op, args) for op, args in recorder.calls if op.namespace.startswith("fastformer")]
        assert first[0].name() == f"fastformer::{case.op}" and first[1][-1] == "triton"
        assert {op.namespace for op, _ in rest} <= {"fastformer_triton"}
        assert all(x.device.type == "cuda" for x in results)
        assert_on_cuda_only(recorder.calls)

    def test_layouts_are_those_of_the_cpu(self, case, fake_mode):
        on_gpu = layouts(with_gradients(case, *on_cuda(case, requires_grad=True)))
        with torch._subclasses.fake_tensor.unset_fake_temporarily(), fastformer.backend("cpu", strict=True):
            tensors = {name: x.requires_grad_() for name, x in case.tensors().items()}
            on_cpu = layouts(with_gradients(case, tensors, case.options()))
        assert on_gpu == on_cpu


def compiled(function: Callable, graphs: list[torch.fx.GraphModule]) -> Callable:
    def keep(graph: torch.fx.GraphModule, example_inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    return torch.compile(function, backend=aot_autograd(fw_compiler=keep), fullgraph=True)


def operators(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """Its calls of operators of torch; none of them reads on the host or waits."""
    nodes = [node for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert_on_cuda_only([(node.target, node.args) for node in nodes])
    return nodes


def kernels(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in operators(graph) if node.target.namespace.startswith("fastformer")]


@every_case
class TestCompile:
    def test_forward(self, case):
        tensors, options = on_cuda(case, requires_grad=False)
        graphs = []
        outputs = compiled(lambda tensors: call(case, tensors, options), graphs)(tensors)
        assert layouts(outputs) == layouts(call(case, tensors, options))
        (graph,) = graphs
        assert [node.target.name() for node in kernels(graph)] == [f"fastformer_triton::{case.op}"]

    def test_backward(self, case):
        tensors, options = on_cuda(case, requires_grad=True)
        graphs = []
        outputs = compiled(lambda tensors: call(case, tensors, options), graphs)(tensors)
        gradients = torch.autograd.grad(outputs, tensors.values(), [torch.ones_like(out) for out in outputs])
        assert layouts((*outputs, *gradients)) == layouts(with_gradients(case, tensors, options))
        found = [node for graph in graphs for node in kernels(graph)]
        assert len(graphs) == 2 and found  # forward, backward
        for node in found:
            assert node.target.namespace == "fastformer_triton" or node.args[-1] == "triton"


@every_case
def test_export(case):
    class Module(nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return call(case, tensors, options)

    tensors, options = on_cuda(case, requires_grad=False)
    graph = torch.export.export(Module(), (tensors,)).module()
    assert [node.target.name() for node in kernels(graph)] == [f"fastformer_triton::{case.op}"]


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2, use_cache=False, attn_implementation="sdpa"
    )
    return transformers.GPT2Model(config)


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("training", [False, True])
class TestAccelerated:
    def test_kernels(self, make, training, recorder):
        with torch.device("cuda"):
            model = fastformer.accelerate(make().train(training))
            ids = torch.zeros(3, 7, dtype=torch.int64)
        report = fastformer.report(model)
        assert not report.left, str(report)
        with recorder, torch.set_grad_enabled(training):
            output = model(input_ids=ids).last_hidden_state
            if training:
                output.sum().backward()
        assert output.shape == (3, 7, 32) and output.device.type == "cuda"
        called = {op.name() for op, _ in recorder.calls if op.namespace.startswith("fastformer")}
        prefix = "fastformer" if training else "fastformer_triton"
        expected = {"scaled_dot_product_attention", "add_layer_norm", "linear", "feed_forward"}
        assert {f"{prefix}::{op}" for op in expected} <= called
        assert not {name for name in called if "cpu" in name}
        assert not any("scaled_dot_product" in name for name in recorder.names() if name.startswith("aten"))
        assert_on_cuda_only(recorder.calls)


class NoEvent:
    """A torch.cuda.Event that takes no time."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, end: NoEvent) -> float:
        return 2.0  # milliseconds


def test_timer(monkeypatch):
    """Contenders take turns, the cache is emptied before each, and milliseconds become seconds."""
    monkeypatch.setattr(torch.cuda, "Event", NoEvent)
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    called = []
    contenders = {name: lambda name=name: called.append(name) for name in "ab"}
    timings = time_on(torch.device("cuda"), contenders, seconds=0, repeats=3)
    assert called == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 3 and len(waited) == 4
    assert {name: timing.samples for name, timing in timings.items()} == {name: [0.002] * 3 for name in "ab"}


@pytest.mark.parametrize("group", ["attention", "rows"])
def test_benchmark_cases(monkeypatch, group):
    """Those of bench/gpu.py: all that is made is on the GPU, and what is checked has the shape of its reference."""
    monkeypatch.syspath_prepend("bench")
    import gpu
    import gpu_cases

    device, scale = torch.device("cuda"), dataclasses.replace(gpu_cases.TINY, dtypes=(torch.bfloat16,))
    count = 0
    for case in getattr(gpu_cases, group)(device, torch.bfloat16, scale, ["triton"]):
        for name in case.contenders:
            if not name.startswith("torch"):
                results = gpu.runner(case, name)(seed=1)
                assert all(x.device.type == "cuda" and x.dtype in (case.dtype, torch.float32) for x in results)
                for expected in gpu.references(case, results):
                    assert [case.part(x).shape for x in results] == [x.shape for x in expected]
                count += 1
    assert count >= 8


@pytest.mark.parametrize("call", calls.main_options(quick=True), ids=lambda call: f"{call.op} {call.what}")
def test_calls_of_verify(call):
    if call.op == "varlen_attn":
        pytest.skip("eager reads the bounds on the host")
    tensors = call.tensors(torch.device("cuda"), torch.float16)
    found = {}
    for name, function in (("fused", call.fused), ("eager", call.eager)):
        results = calls.results(call.bind(function, torch.device("cuda")), tensors)
        assert all(x.device.type == "cuda" for x in results.values())
        found[name] = {key: (x.shape, x.dtype) for key, x in results.items()}
    assert found["fused"] == found["eager"]
