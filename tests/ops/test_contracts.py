"""What holds for every op: calls of each (tests/cases.py), with and without gradients, compiled, exported, threaded."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import CASES, Case
from tensors import BACKEND, DTYPES, at_scale
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastformer
from fastformer import ops

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def leaves(case: Case, scale: int = 1) -> dict[str, Tensor]:
    return {name: x.requires_grad_() for name, x in case.tensors(scale=scale).items()}


def run(function, tensors: dict[str, Tensor], seed: int = 5) -> tuple[Tensor, ...]:
    """The outputs and, where the tensors want them, their gradients."""
    torch.manual_seed(seed)
    outputs = function(**tensors)
    wanted = [x for x in tensors.values() if x.requires_grad]
    if not wanted:
        return outputs
    loss = sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outputs)
    return tuple(out.detach() for out in outputs) + torch.autograd.grad(loss, wanted)


def assert_all_equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    assert len(first) == len(second)
    for x, y in zip(first, second, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@every_case
class TestWithoutGradients:
    def test_no_autograd(self, case, recorder):
        """Neither in no_grad and inference_mode nor where nothing wants a gradient: the raw op is called at once."""
        for tensors, mode in (
            (leaves(case), torch.no_grad()),
            (leaves(case), torch.inference_mode()),
            (case.tensors(), torch.enable_grad()),
        ):
            with mode, recorder:
                outputs = case(**tensors)
            assert all(out.grad_fn is None and not out.requires_grad for out in outputs)
        raw = f"fastformer_{BACKEND}::{case.op}"
        assert [name for name in recorder.names() if name.startswith("fastformer")] == 3 * [raw]

    def test_same_outputs(self, case):
        tensors = leaves(case)
        outputs = run(case, tensors)
        with torch.no_grad():
            torch.manual_seed(5)
            assert_all_equal(case(**tensors), outputs[: len(outputs) - len(tensors)])


@every_case
class TestAutograd:
    def test_inputs_stay(self, case):
        tensors = leaves(case)
        before = {name: x.detach().clone() for name, x in tensors.items()}
        run(case, tensors)
        assert all(torch.equal(x, before[name]) and x._version == 0 for name, x in tensors.items())

    def test_outputs_are_fresh(self, case):
        tensors = case.tensors()
        given = {x.untyped_storage().data_ptr() for x in tensors.values()}
        returned = [out.untyped_storage().data_ptr() for out in case(**tensors)]
        assert given.isdisjoint(returned) and len(set(returned)) == len(returned)

    def test_twice_raises(self, case):
        """Also where the first gradient does not depend on the output: without the error its share would be missing."""
        tensors = leaves(case)
        for loss in (case(**tensors)[0].sum(), case(**tensors)[0].square().sum()):
            with pytest.raises(NotImplementedError, match=f"fastformer.ops.{case.op} can be differentiated once"):
                torch.autograd.grad(loss, tensors.values(), create_graph=True)

    def test_backward_twice_with_retained_graph(self, case):
        tensors = leaves(case)
        loss = sum(out.sum() for out in case(**tensors))
        first = torch.autograd.grad(loss, tensors.values(), retain_graph=True)
        assert_all_equal(first, torch.autograd.grad(loss, tensors.values()))

    def test_any_gradient_layout(self, case):
        tensors = leaves(case)
        outputs = case(**tensors)
        if outputs[0].dim() == 0:
            pytest.skip("one number")
        for layout in (lambda g: g, lambda g: g.mT.contiguous().mT, lambda g: g[..., :1].expand_as(g)):
            given = [layout(torch.linspace(-1, 1, out.numel()).view(out.shape)) for out in outputs]
            expected = torch.autograd.grad(outputs, tensors.values(), [g.clone() for g in given], retain_graph=True)
            assert_all_equal(torch.autograd.grad(outputs, tensors.values(), given, retain_graph=True), expected)

    def test_checkpoint(self, case):
        """The recomputed forward draws the same seeds."""
        tensors = leaves(case)

        def checkpointed(**tensors):
            return torch.utils.checkpoint.checkpoint(case, **tensors, use_reentrant=False)

        assert_all_equal(run(checkpointed, tensors), run(case, tensors))


@every_case
def test_backend_is_kept_for_the_backward(case, recorder):
    if case.gradients_with_the_output:
        pytest.skip("no backward kernel")
    tensors = leaves(case)
    outputs = case(**tensors)
    with fastformer.backend("torch"), recorder:
        torch.autograd.grad(outputs, tensors.values(), [torch.ones_like(out) for out in outputs])
    assert f"fastformer_{BACKEND}::{case.op}_backward" in recorder.names()


def calls(case: Case, recorder) -> list[tuple]:
    """(operator, arguments) of the raw forward, the differentiable op and the raw backward."""
    with recorder:
        with torch.no_grad():
            case(**case.tensors())
        run(case, leaves(case))
    found = [(op, args) for op, args in recorder.calls if op.namespace.startswith("fastformer")]
    names = [f"fastformer_{BACKEND}::{case.op}", f"fastformer::{case.op}", f"fastformer_{BACKEND}::{case.op}_backward"]
    assert [op.name() for op, _ in found] == names[: 2 if case.gradients_with_the_output else 3]
    return found


def fresh(args: tuple, requires_grad: bool) -> tuple:
    def leaf(x):
        if not isinstance(x, Tensor):
            return x
        x = x.detach()
        return x.requires_grad_(requires_grad and x.is_floating_point() and x.dim() > 0)

    return tuple(leaf(x) for x in args)


RAW_CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@every_case
class TestOpcheck:
    def test_raw_forward(self, case, recorder):
        op, args = calls(case, recorder)[0]
        torch.library.opcheck(op, fresh(args, False), test_utils=RAW_CHECKS)

    def test_differentiable(self, case, recorder):
        op, args = calls(case, recorder)[1]
        torch.library.opcheck(op, fresh(args, True))

    def test_raw_backward(self, case, recorder):
        if case.gradients_with_the_output:
            pytest.skip("no backward kernel")
        op, args = calls(case, recorder)[2]
        torch.library.opcheck(op, fresh(args, False), test_utils=RAW_CHECKS)


@every_case
class TestCompile:
    def test_forward_and_backward(self, case):
        torch._dynamo.reset()
        compiled = torch.compile(case, backend="aot_eager", fullgraph=True)
        tensors = leaves(case)
        assert_all_equal(run(compiled, tensors), run(case, tensors))

    def test_without_gradients(self, case):
        torch._dynamo.reset()
        compiled = torch.compile(case, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            tensors = case.tensors()
            assert_all_equal(run(compiled, tensors), run(case, tensors))

    def test_one_graph_for_every_size(self, case):
        if case.one_size:
            pytest.skip("the mask, the bounds or the targets are of one size")
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(case, backend=counter, fullgraph=True, dynamic=True)
        graphs = []
        for scale in (1, 2, 4):
            tensors = leaves(case, scale)
            assert_all_equal(run(compiled, tensors), run(case, tensors))
            graphs.append(counter.frame_count)
        assert graphs[0] == graphs[1] == graphs[2]


@every_case
def test_export(case):
    class Module(nn.Module):
        def __init__(self, parameters: dict[str, Tensor]):
            super().__init__()
            self.weights = nn.ParameterDict(parameters)

        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return case(**dict(zip(names, inputs, strict=True)), **self.weights)

    tensors = case.tensors()
    weights = {name: x for name, x in tensors.items() if name.startswith(("weight", "bias"))}
    names = [name for name in tensors if name not in weights]
    inputs = tuple(tensors[name] for name in names)
    module = Module(weights)
    exported = torch.export.export(module, inputs).module()
    torch.manual_seed(5)
    outputs = exported(*inputs)
    assert_all_equal(tuple(out.detach() for out in outputs), run(case, tensors))


@every_case
class TestThreads:
    def test_same_gradients_again(self, case, threads):
        """The order of every sum depends on the number of threads alone."""
        tensors = leaves(case, scale=1 if case.one_size else at_scale(50))
        first = run(case, tensors)
        for _ in range(3):
            assert_all_equal(run(case, tensors), first)

    @pytest.mark.cpu_only
    def test_calls_at_the_same_time(self, case):
        """torch's generator is one for all threads, so dropout is left out."""
        if "dropout_p" in case.options():
            pytest.skip("draws seeds")
        draws = [leaves(case, scale=1 + i % 4) for i in range(16)]
        if case.one_size:
            draws = [leaves(case) for _ in draws]
        expected = [run(case, tensors) for tensors in draws]

        def work(tensors):
            with fastformer.backend(BACKEND, strict=True):
                torch.set_num_threads(1)
                return run(case, tensors)

        with ThreadPoolExecutor(4) as pool:
            for result, wanted in zip(pool.map(work, draws), expected, strict=True):
                assert_all_equal(result, wanted)


WIDE = ("embeddings", "layer_norm", "add_layer_norm", "linear_cross_entropy", "crf_log_likelihood")


class TestAutocast:
    """Products in the autocast dtype, residual and layer-norm as they come, a loss in float32."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @every_case
    def test_dtypes(self, case, dtype):
        tensors = leaves(case)
        with torch.autocast("cpu", dtype):
            outputs = case(**tensors)
        products = case.op not in WIDE and "residual" not in tensors
        assert all(out.dtype == (dtype if products else torch.float32) for out in outputs)
        gradients = torch.autograd.grad(outputs, tensors.values(), [torch.ones_like(out) for out in outputs])
        assert all(g.dtype == torch.float32 for g in gradients)

    @every_case
    def test_products_are_of_the_autocast_dtype(self, case):
        """Bit for bit what they are when the operands are converted by hand."""
        if case.op in WIDE:
            pytest.skip("no product, or not the output")
        tensors = case.tensors()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = case(**tensors)
        operands = {name: x if name == "residual" else x.bfloat16() for name, x in tensors.items()}
        assert_all_equal(outputs, run(case, operands))

    def test_layer_norm(self):
        input, weight = torch.randn(4, 20), torch.randn(20)
        with torch.autocast("cpu", torch.bfloat16):
            for dtype in DTYPES:
                output = ops.layer_norm(input.to(dtype), 20, weight)
                assert output.dtype == dtype
            half, full = input.bfloat16(), torch.randn(4, 20)
            assert [x.dtype for x in ops.add_layer_norm(half, half, 20, weight)] == 2 * [torch.bfloat16]
            assert [x.dtype for x in ops.add_layer_norm(half, full, 20, weight)] == 2 * [torch.float32]

    @pytest.mark.cpu_only
    def test_float64_stays(self):
        x = torch.randn(4, 20, dtype=torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.linear(x, x).dtype == torch.float64

    def test_residual_keeps_its_digits(self):
        residual = torch.full((2, 3), 1 + 2**-20)
        with torch.autocast("cpu", torch.bfloat16):
            output = ops.linear(torch.zeros(2, 4), torch.zeros(3, 4), residual=residual)
        assert torch.equal(output, residual)
