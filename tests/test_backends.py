"""What runs a call, who may say so, and what the user is told."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from accuracy import assert_op_close
from cases import CASES
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastformer
from fastformer import backends, cuda_library, library, ops, reference

PACKAGE = Path(fastformer.__file__).parent
X, W = torch.ones(200, 8), torch.ones(6, 8)
needs_library = pytest.mark.skipif(not library.available(), reason=f"no op library: {library.why_unavailable()}")


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.delenv("FASTFORMER_BACKEND", raising=False)


def ran(recorder, call=lambda: ops.layer_norm(X, 8)) -> str:
    """The backend whose kernel was called, or "torch"."""
    recorder.calls.clear()
    with recorder:
        call()
    for op, args in recorder.calls:
        if op.namespace.startswith("fastformer"):
            return args[-1] if op.namespace == "fastformer" else op.namespace.removeprefix("fastformer_")
    return "torch"


class TestDeclarations:
    def test_one_of_each(self):
        declared = [(i.op, i.backend) for i in backends.implementations()]
        assert len(set(declared)) == len(declared)
        assert {op for op, backend in declared if backend == "torch"} == set(backends.OPS) == set(ops.__all__)
        assert {backend for _, backend in declared} <= set(backends.BACKENDS)

    @pytest.mark.parametrize("op", [op for op in backends.OPS if op != "crf_decode"])  # which has no gradient
    @needs_library
    def test_same_signatures(self, op):
        """Every backend's raw op, and the differentiable one but for its last argument, which names the backend."""

        def signature(op_name: str) -> tuple:
            schema = getattr(getattr(torch.ops, op_name.partition("::")[0]), op_name.partition("::")[2]).default._schema
            return [(a.name, str(a.type)) for a in schema.arguments], [str(r.type) for r in schema.returns]

        declared = [i.backend for i in backends.implementations() if i.op == op and i.backend != "torch"]
        fused = [backend for backend in declared if not backends.why_unavailable(backend)]
        assert fused
        arguments, returns = signature(f"fastformer::{op}")
        assert arguments[-1] == ("backend", "str")
        for backend in fused:
            assert signature(f"fastformer_{backend}::{op}") == (arguments[:-1], returns)
        backward = [signature(f"fastformer_{backend}::{op}_backward") for backend in fused]
        assert all(other == backward[0] for other in backward)


@needs_library
class TestDefault:
    def test_kernels(self, recorder):
        with warnings.catch_warnings(action="error"):
            assert ran(recorder) == "cpu"
            assert ran(recorder, lambda: ops.linear(X, W, dropout_p=0.5)) == "cpu"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_torch_where_it_is_faster(self, recorder, dtype):
        """Products by weights that are not packed; nothing is said, for nothing is lost."""
        x, weight = X.to(dtype), W.to(dtype)
        with warnings.catch_warnings(action="error"):
            assert ran(recorder, lambda: ops.linear(x, weight)) == "torch"
            assert ran(recorder, lambda: ops.feed_forward(x, weight, None, weight.mT, None)) == "torch"
            with fastformer.backend("cpu"):
                assert ran(recorder, lambda: ops.linear(x, weight)) == "cpu"

    @pytest.mark.parametrize("rows", [1, 127, 128, 500])
    def test_same_results_whichever(self, rows):
        given = {"input": torch.randn(rows, 8), "weight": torch.randn(6, 8), "bias": torch.randn(6)}
        assert_op_close(ops.linear, reference.linear, given)


@needs_library
class TestContext:
    def test_nesting(self, recorder):
        with fastformer.backend("torch"):
            assert ran(recorder) == "torch"
            with fastformer.backend("cpu", strict=True):
                assert ran(recorder) == "cpu"
                with fastformer.backend("torch"):
                    assert ran(recorder) == "torch"
                assert ran(recorder) == "cpu"
            assert ran(recorder) == "torch"
        assert ran(recorder) == "cpu"

    def test_left_by_an_error(self, recorder):
        with pytest.raises(ZeroDivisionError), fastformer.backend("torch", strict=True):
            raise ZeroDivisionError
        assert backends._requested() == (None, False)

    def test_of_one_thread(self):
        requests = []
        with fastformer.backend("torch"):
            thread = threading.Thread(target=lambda: requests.append(backends._requested()))
            thread.start()
            thread.join()
            requests.append(backends._requested())
        assert requests == [(None, False), ("torch", False)]

    def test_as_decorator(self, recorder):
        @fastformer.backend("torch")
        def call():
            return ops.layer_norm(X, 8)

        assert ran(recorder, call) == ran(recorder, call) == "torch"

    @pytest.mark.parametrize("name", ["CPU", "gpu", "", None])
    def test_unknown(self, name):
        with pytest.raises(ValueError, match=f"backend: got {name!r}, expected one of cpu, triton, cuda, torch"):
            fastformer.backend(name).__enter__()


@needs_library
class TestCompiled:
    """torch.compile sees the request, at the call and inside the function."""

    @staticmethod
    def graphs(function, *calls) -> list[str]:
        """The code of what is compiled in these calls."""
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(function, backend=counter, fullgraph=True)
        for call in calls:
            call(compiled)
        return [graph.code for graph in counter.graphs]

    def test_at_the_call(self):
        def on_torch(compiled):
            with fastformer.backend("torch"):
                compiled(X)

        codes = self.graphs(lambda x: ops.layer_norm(x, 8), lambda compiled: compiled(X), on_torch)
        assert ["fastformer_cpu.layer_norm" in code for code in codes] == [True, False]

    def test_inside(self):
        def function(x):
            with fastformer.backend("torch"):
                return ops.layer_norm(x, 8)

        (code,) = self.graphs(function, lambda compiled: compiled(X))
        assert "functional.layer_norm" in code and "fastformer" not in code

    def test_where_torch_is_faster(self):
        """Products by weights that are not packed, unless there is dropout or the kernels are asked for."""
        weight = torch.randn(6, 8)
        asked, dropout = fastformer.backend("cpu"), {"dropout_p": 0.5}
        for context, options, fused in [
            (contextlib.nullcontext(), {}, False),
            (contextlib.nullcontext(), dropout, True),
            (asked, {}, True),
        ]:
            with context:
                (code,) = self.graphs(lambda x, options=options: ops.linear(x, weight, **options), lambda f: f(X))
            assert ("fastformer_cpu.linear" in code) == fused


class TestEnvironment:
    @needs_library
    def test_order(self, recorder, monkeypatch):
        """The context manager, then the variable, then the default."""
        monkeypatch.setenv("FASTFORMER_BACKEND", "torch")
        assert ran(recorder) == "torch"
        with fastformer.backend("cpu"):
            assert ran(recorder) == "cpu"
        monkeypatch.setenv("FASTFORMER_BACKEND", "")
        assert ran(recorder) == "cpu"

    def test_unknown(self, monkeypatch):
        monkeypatch.setenv("FASTFORMER_BACKEND", "nonsense")
        with pytest.raises(
            ValueError, match="FASTFORMER_BACKEND: got 'nonsense', expected one of cpu, triton, cuda, torch"
        ):
            ops.layer_norm(X, 8)

    @needs_library
    def test_of_a_process(self):
        script = "import torch; from fastformer import backends; print(backends.choose('layer_norm', torch.ones(3)))"
        environment = os.environ | {"FASTFORMER_BACKEND": "torch"}
        assert run_python(script, PACKAGE.parent, environment) == "torch"


def attention(head_size: int, value_size: int) -> Tensor:
    query, value = torch.ones(1, 1, 2, head_size), torch.ones(1, 1, 2, value_size)
    return ops.scaled_dot_product_attention(query, query, value)


def variable_length(head_size: int, value_size: int) -> Tensor:
    query, value, bounds = torch.ones(2, 1, head_size), torch.ones(2, 1, value_size), torch.tensor([0, 2]).int()
    return ops.varlen_attn(query, query, value, bounds, bounds, 2, 2)


class TestCallsThatNothingTakes:
    def test_strict(self):
        """All backends' reasons, in the order of backends.BACKENDS."""
        with (
            fastformer.backend("triton", strict=True),
            pytest.raises(NotImplementedError) as error,
        ):
            ops.layer_norm(X.to(torch.float8_e4m3fn), 8)
        text = str(error.value).splitlines()
        assert text[0] == "fastformer.ops.layer_norm: backend 'triton' was asked for and can't take this call"
        cuda = "" if cuda_library.available() else f"{cuda_library.why_unavailable()}; "
        assert text[1].startswith("  cpu: ") and text[1].endswith(
            "takes float32, bfloat16, float16, float64, got float8_e4m3fn"
        )
        assert text[2:] == [
            "  triton: takes cuda tensors, got one on cpu; takes float32, bfloat16, float16, got float8_e4m3fn",
            f"  cuda: {cuda}takes cuda tensors, got one on cpu; takes float32, bfloat16, float16, got float8_e4m3fn",
        ]

    @pytest.mark.parametrize(
        ("call", "most", "reason"),
        [
            (lambda n: ops.layer_norm(torch.ones(2, n), n), 65536, "takes rows up to 65536, got 65537"),
            (lambda n: ops.layer_norm(torch.ones(2, n, 2), (n, 2)), 32768, "takes rows up to 65536, got 65538"),
            (lambda n: ops.add_layer_norm(*torch.ones(2, 3, n), n), 65536, "takes rows up to 65536, got 65537"),
            (lambda n: attention(n, 8), 256, "takes head sizes up to 256, got 257"),
            (lambda n: attention(8, n), 256, "takes head sizes up to 256, got 257"),
            (lambda n: variable_length(n, 8), 256, "takes head sizes up to 256, got 257"),
            (lambda n: variable_length(8, n), 256, "takes head sizes up to 256, got 257"),
        ],
    )
    def test_sizes(self, monkeypatch, call, most, reason):
        """The Triton kernels hold a row, or a head, up to a size; the others take any."""
        monkeypatch.setattr(backends, "_HAS_TRITON", False)  # for another reason than size
        for size, expected in ((most, False), (most + 1, True)):
            with fastformer.backend("triton", strict=True), pytest.raises(NotImplementedError) as error:
                call(size)
            assert (f"; {reason}\n" in str(error.value)) == expected

    @needs_library
    def test_several_reasons(self):
        class Tagged(Tensor):
            pass

        weight = torch.ones(8, dtype=torch.float8_e5m2, device="meta")
        with fastformer.backend("cpu", strict=True), pytest.raises(NotImplementedError) as error:
            backends.choose("layer_norm", X.as_subclass(Tagged), weight)
        assert "  cpu: takes plain tensors, got Tagged; takes cpu tensors, got one on meta; takes float32" in str(
            error.value
        )

    def test_said_once(self):
        def warned(call) -> list:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call()
            return caught

        def call() -> Tensor:
            with fastformer.backend("triton"):
                return ops.layer_norm(X, 8)

        first = warned(call)
        assert len(first) == 1 and first[0].category is UserWarning
        assert "fastformer.ops.layer_norm runs on plain PyTorch here" in str(first[0].message)
        assert "triton: takes cuda tensors, got one on cpu" in str(first[0].message)
        assert first[0].filename == __file__  # the caller's line, not fastformer's
        assert warned(call) == []
        with fastformer.backend("triton"):
            assert len(warned(lambda: ops.linear(X, W))) == 1  # another op, another message

    def test_runs_on_torch(self, recorder):
        with fastformer.backend("cuda"), pytest.warns(UserWarning):
            assert ran(recorder) == "torch"

    @needs_library
    def test_subclass_keeps_its_meaning(self):
        """A tensor subclass never reaches a kernel, which would read its memory behind its back."""
        seen = []

        class Noting(Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                seen.append(func.__name__)
                return super().__torch_function__(func, types, args, kwargs or {})

        with pytest.warns(UserWarning, match="takes plain tensors, got Noting"):
            output = ops.layer_norm(torch.randn(3, 8).as_subclass(Noting), 8)
        assert "layer_norm" in seen and isinstance(output, Noting)

    @needs_library
    def test_parameters_and_buffers_are_plain(self, recorder):
        weight, bias = torch.nn.Parameter(torch.ones(8)), torch.nn.Buffer(torch.ones(8))
        with warnings.catch_warnings(action="error"), fastformer.backend("cpu", strict=True):
            assert ran(recorder, lambda: ops.layer_norm(X, 8, weight, bias)) == "cpu"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torch_is_the_reference(case, recorder):
    options = case.options()

    def on_torch(**tensors):
        with fastformer.backend("torch", strict=True):
            return getattr(ops, case.op)(**tensors, **options)

    def expected(**tensors):
        return getattr(reference, case.op)(**tensors, **options)

    assert_op_close(on_torch, expected, case.tensors())
    assert ran(recorder, lambda: on_torch(**case.tensors())) == "torch"


def run_python(script: str, folder: Path, environment: dict[str, str] | None = None) -> str:
    """What the script prints, run in a folder from which fastformer is imported."""
    command = [sys.executable, "-W", "error::FutureWarning", "-c", script]
    environment = (environment or dict(os.environ)) | {"PYTHONPATH": str(folder)}
    finished = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


WITHOUT_LIBRARY = """
import warnings
import torch
import fastformer
from fastformer import backends, cuda_library, library, ops, reference
from cases import CASES

assert not library.available() and library.isas() == []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for case in CASES.values():
        for _ in range(2):
            tensors = {name: x.requires_grad_() for name, x in case.tensors().items()}
            torch.manual_seed(1)
            outputs = case(**tensors)
            torch.manual_seed(1)
            expected = getattr(reference, case.op)(**tensors, **case.options())
            expected = expected if isinstance(expected, tuple) else (expected,)
            for out, other in zip(outputs, expected, strict=True):
                torch.testing.assert_close(out, other)
            sum(out.sum() for out in outputs).backward()
told = sorted(str(w.message) for w in caught if "fastformer" in str(w.message))
assert len(told) == len({case.op for case in CASES.values()}), told
assert all("is not built" in message for message in told), told
with fastformer.backend("cpu", strict=True):
    try:
        ops.layer_norm(torch.ones(2, 3), 3)
    except NotImplementedError as error:
        print(error)
"""


def test_without_the_library(tmp_path):
    """A copy of the package as it is where nothing was compiled: all runs, it is said why slowly, strict raises."""
    shutil.copytree(PACKAGE, tmp_path / "fastformer", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("cases.py", "tensors.py"):
        shutil.copy(Path(__file__).parent / name, tmp_path)
    text = run_python(WITHOUT_LIBRARY, tmp_path, os.environ | {"FASTFORMER_ISA": ""})
    assert text.startswith("fastformer.ops.layer_norm: backend 'cpu' was asked for and can't take this call")
    assert f"cpu: {tmp_path}/fastformer/libfastformer_cpu.so is not built" in text


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_who_multiplies_by_weights_that_are_not_packed(dtype, trained, monkeypatch, recorder):
    """PyTorch; but a training step in float32 keeps less memory in the fused op, whose products are PyTorch's."""
    monkeypatch.delenv("FASTFORMER_BACKEND", raising=False)
    input, *weights = (torch.randn(*shape, dtype=dtype) for shape in ((4, 8), (16, 8), (8, 16)))
    with torch.set_grad_enabled(trained), recorder:
        ops.feed_forward(input, weights[0].requires_grad_(trained), None, weights[1], None)
    fused = any(name.startswith("fastformer") for name in recorder.names())
    assert fused == (trained and dtype == torch.float32)
