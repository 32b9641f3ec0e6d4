from collections.abc import Callable
from functools import partial

import eager
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_op_close, assert_strides_do_not_matter
from hypothesis import given
from hypothesis import strategies as st
from tensors import BACKEND, DTYPES, FLOATS, LAYOUTS, at_scale, randn
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck

import fastformer
from fastformer import ops
from fastformer.cli.measure import peak_memory

REDUCTIONS = ("mean", "sum", "none")
# (rows, in_features, classes): around tiles, panels of 8 to 64 columns and slices of 64 to 1024 classes
SIZES = [(5, 7, 16), (63, 65, 64), (16, 97, 63), (97, 128, 129), (70, 33, 1100), (2, 768, 700)]


def tensors(rows: int, in_features: int, classes: int, dtype: torch.dtype, **layout: str) -> dict[str, Tensor]:
    return {
        "input": randn(rows, in_features, dtype=dtype, **layout),
        "linear_weight": randn(classes, in_features, dtype=dtype, **layout) / max(in_features, 1) ** 0.5,
        "linear_bias": randn(classes, dtype=dtype),
    }


def labels(*shape: int, classes: int, ignored: float = 0.3, ignore_index: int = -100) -> Tensor:
    return torch.randint(classes, shape).where(torch.rand(shape) >= ignored, ignore_index)


def assert_close(*draws: dict[str, Tensor | None], slack: int = 0, **options) -> None:
    functions = (partial(f, **options) for f in (ops.linear_cross_entropy, eager.linear_cross_entropy))
    assert_op_close(*functions, *draws, slack=slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sizes(isa, dtype, size, reduction):
    target = labels(size[0], classes=size[2])
    target[0] = size[2] - 1
    assert_close(*(tensors(*size, dtype) for _ in range(5)), target=target, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 7, 1), (1, 1, 7), (7, 1, 1)])
def test_sizes_of_one(isa, dtype, size):
    draws = [tensors(*size, dtype) for _ in range(20)]
    assert_close(*draws, target=torch.zeros(size[0], dtype=torch.int64), reduction="none")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_options(isa, dtype, reduction, label_smoothing, weighted, bias):
    draws = [tensors(33, 20, 70, dtype) | ({} if bias else {"linear_bias": None}) for _ in range(5)]
    weight = torch.rand(70) if weighted else None
    target = labels(33, classes=70)
    assert_close(*draws, target=target, weight=weight, reduction=reduction, label_smoothing=label_smoothing)


@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignore_index(isa, ignore_index):
    """Also where it is a class: its rows are left out, and nothing else is."""
    target = labels(40, classes=10, ignore_index=ignore_index)
    for reduction in REDUCTIONS:
        draws = [tensors(40, 8, 10, torch.float32) for _ in range(20)]
        assert_close(*draws, target=target, reduction=reduction, ignore_index=ignore_index, label_smoothing=0.2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_weight_of_any_dtype(dtype):
    draws = [tensors(9, 8, 10, torch.float32) for _ in range(5)]
    weight = randn(20).abs().to(dtype)[::2]
    assert_close(*draws, target=labels(9, classes=10), weight=weight)


@pytest.mark.cpu_only
def test_several_chunks(isa, threads):
    """More rows than one chunk takes: shares of the weight's gradient are added up."""
    target = labels(2500, classes=33, ignored=0.1)
    for reduction in REDUCTIONS:
        assert_close(*(tensors(2500, 12, 33, torch.float32) for _ in range(3)), target=target, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_same_again(threads, reduction):
    """Bit for bit, and whether gradients are wanted or not."""
    rows = at_scale(300)
    given = {name: x.requires_grad_() for name, x in tensors(rows, 40, 700, torch.float32).items()}
    call = partial(ops.linear_cross_entropy, **given, target=labels(rows, classes=700), reduction=reduction)
    runs = []
    for _ in range(3):
        loss = call()
        runs.append([loss.detach(), *torch.autograd.grad(loss.sum(), given.values())])
    with torch.no_grad():
        assert torch.equal(call(), runs[0][0])
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_layouts(isa, dtype, layout, reduction):
    function = partial(ops.linear_cross_entropy, target=labels(30, classes=38), reduction=reduction)
    assert_strides_do_not_matter(function, tensors(30, 34, 38, dtype, layout=layout))


def test_strides_of_the_vectors():
    given, target = tensors(30, 34, 38, torch.float32), labels(30, classes=38)
    expected = ops.linear_cross_entropy(**given, target=target, weight=torch.ones(38))
    strided = given | {"linear_bias": torch.stack(2 * [given["linear_bias"]], 1)[:, 0]}
    doubled = target.repeat_interleave(2)[::2]
    assert torch.equal(ops.linear_cross_entropy(**strided, target=doubled, weight=torch.ones(1).expand(38)), expected)


@pytest.mark.parametrize("leading", [(), (2, 3), (1, 4, 1), (2, 1, 3, 2)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_leading_dimensions(leading, reduction):
    given = tensors(1, 12, 20, torch.float32)
    target = labels(*leading, classes=20, ignored=0)
    draws = [given | {"input": randn(*leading, 12)} for _ in range(5)]
    assert_close(*draws, target=target, reduction=reduction)
    if leading:
        function = partial(ops.linear_cross_entropy, target=target.mT.contiguous().mT, reduction=reduction)
        assert_strides_do_not_matter(function, given | {"input": randn(*leading, 12, layout="flipped")})


@pytest.mark.parametrize("size", [(0, 7, 5), (3, 0, 5), (0, 0, 0), (0, 7, 0)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_empty(size, reduction):
    target = torch.zeros(size[0], dtype=torch.int64)
    assert_close(*(tensors(*size, torch.float32) for _ in range(5)), target=target, reduction=reduction)


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, torch.ones(6)])
def test_nothing_labelled(rows, label_smoothing, weight):
    """The mean is NaN and the gradients are 0, as in torch; sum and single losses are 0."""
    given = {name: x.requires_grad_() for name, x in tensors(rows, 5, 6, torch.float32).items()}
    target = torch.full((rows,), -100)
    for reduction in REDUCTIONS:
        options = {"target": target, "weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
        loss = ops.linear_cross_entropy(**given, **options)
        assert loss.isnan() if reduction == "mean" else not loss.any()
        gradients = torch.autograd.grad(loss.sum(), given.values())
        assert all(x.shape == grad.shape and not grad.any() for x, grad in zip(given.values(), gradients, strict=True))


def test_ignored_rows_are_not_read(isa):
    given = {name: x.requires_grad_() for name, x in tensors(40, 8, 50, torch.float32).items()}
    target = labels(40, classes=50)
    with torch.no_grad():
        given["input"][target == -100] = torch.nan
    for reduction in REDUCTIONS:
        loss = ops.linear_cross_entropy(**given, target=target, reduction=reduction).sum()
        gradients = torch.autograd.grad(loss, given.values())
        assert loss.isfinite() and all(grad.isfinite().all() for grad in gradients)
        assert not gradients[0][target == -100].any() and gradients[0][target != -100].any(-1).all()


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_logits_far_from_zero(isa, shift):
    """exp of them would overflow, or be 0."""
    draws = [tensors(20, 8, 70, torch.float32) for _ in range(5)]
    for draw in draws:
        draw["linear_bias"] += shift
    for label_smoothing in (0.0, 0.1):
        assert_close(*draws, target=labels(20, classes=70), label_smoothing=label_smoothing, reduction="none")


@pytest.mark.parametrize("slack", [8])
def test_classes_that_are_ruled_out(isa, slack):
    """A bias of -inf, for more classes than a slice or tile holds."""
    draws = [tensors(20, 8, 2500, torch.float32) for _ in range(3)]
    for draw in draws:
        draw["linear_bias"][:1300] = -torch.inf
    assert_close(*draws, target=1300 + labels(20, classes=1200, ignored=0), reduction="none", slack=slack)
    with torch.no_grad():
        assert ops.linear_cross_entropy(**draws[0], target=torch.zeros(20, dtype=torch.int64)) == torch.inf
        target = torch.full((20,), 2000)
        assert ops.linear_cross_entropy(**draws[0], target=target, label_smoothing=0.1) == torch.inf


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite(isa, value):
    """Such a row has loss NaN and gradient NaN, as in eager; the others don't change."""
    given = tensors(20, 8, 130, torch.float32)
    clean = ops.linear_cross_entropy(**given, target=torch.arange(20), reduction="none")
    given["input"][7, 2] = value
    given = {name: x.requires_grad_() for name, x in given.items()}
    loss = ops.linear_cross_entropy(**given, target=torch.arange(20), reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), given["input"])
    others = torch.arange(20) != 7
    assert loss[7].isnan() and gradient[7].isnan().all()
    assert torch.equal(loss[others], clean[others]) and gradient[others].isfinite().all()
    assert ops.linear_cross_entropy(**given, target=torch.arange(20)).isnan()


def test_classes_without_weight():
    """Weights of 0 count for nothing, in the mean as well; of 0 alone they give NaN."""
    given = [tensors(40, 8, 10, torch.float32) for _ in range(5)]
    weight = (torch.arange(10) < 5).float()
    assert_close(*given, target=labels(40, classes=10), weight=weight, label_smoothing=0.1)
    loss = ops.linear_cross_entropy(**given[0], target=torch.full((40,), 7), weight=weight)
    assert loss.isnan() and eager.linear_cross_entropy(**given[0], target=torch.full((40,), 7), weight=weight).isnan()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_scaled_loss(dtype, scale):
    """As a gradient scaler has it: float16 gradients of a mean would be 0 before they are scaled."""
    draws = [tensors(200, 16, 600, dtype) for _ in range(2)]
    functions = (ops.linear_cross_entropy, eager.linear_cross_entropy)
    target = labels(200, classes=600)
    fused, expected = (lambda f=f, **given: f(**given, target=target) * scale for f in functions)
    if dtype == torch.float16 and scale > 1:  # the loss itself would be inf in float16
        fused, expected = (lambda f=f, **given: f(**given, target=target).float() * scale for f in functions)
    assert_op_close(fused, expected, *draws)


@pytest.mark.parametrize("wanted", ["input", "linear_weight", "linear_bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_gradient_alone(isa, wanted, reduction):
    given = tensors(50, 12, 90, torch.float32)
    call = partial(ops.linear_cross_entropy, target=labels(50, classes=90), reduction=reduction)
    given[wanted].requires_grad_()
    call(**given).square().sum().backward()
    alone = given[wanted].grad
    for x in given.values():
        x.grad = None
        x.requires_grad_()
    call(**given).square().sum().backward()
    assert torch.equal(alone, given[wanted].grad)


def test_tied_weights():
    """The embedding's own matrix: its gradient is the sum of both uses."""
    tokens, target = torch.randint(30, (4, 9)), labels(4, 9, classes=30)
    assert_op_close(
        lambda embedding: ops.linear_cross_entropy(F.embedding(tokens, embedding), embedding, target),
        lambda embedding: eager.linear_cross_entropy(F.embedding(tokens, embedding), embedding, target=target),
        *({"embedding": randn(30, 8)} for _ in range(5)),
    )


@pytest.mark.cpu_only
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weight", [None, torch.linspace(0.5, 2, 9, dtype=torch.float64)])
def test_gradcheck(isa, reduction, label_smoothing, weight):
    target = torch.tensor([3, -100, 8, 0])

    def function(*operands):
        given = dict(zip(("input", "linear_weight", "linear_bias"), operands, strict=True))
        options = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
        return ops.linear_cross_entropy(**given, target=target, **options)

    assert gradcheck(function, [x.requires_grad_() for x in tensors(4, 5, 9, torch.float64).values()])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_as_torch(reduction):
    """torch's own function of this name, where this torch has it."""
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy")
    given, target = tensors(20, 8, 30, torch.float32), labels(20, classes=30, ignored=0)
    loss = ops.linear_cross_entropy(**given, target=target, reduction=reduction, label_smoothing=0.1)
    expected = F.linear_cross_entropy(**given, target=target, reduction=reduction, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


@given(
    leading=st.lists(st.integers(0, 9), max_size=3),
    in_features=st.integers(1, 70),
    classes=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(("contiguous", *LAYOUTS)),
    reduction=st.sampled_from(["sum", "none"]),
    ignored=st.sampled_from([0.0, 0.5, 0.9]),
    bias=st.booleans(),
    weighted=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1]),
)
def test_any_call(leading, in_features, classes, dtype, layout, reduction, ignored, bias, weighted, label_smoothing):
    torch.manual_seed(0)
    given = tensors(1, in_features, classes, dtype) | ({} if bias else {"linear_bias": None})
    given["input"] = randn(*leading, in_features, dtype=dtype, layout=layout if leading else "contiguous")
    given["linear_weight"] = randn(classes, in_features, dtype=dtype, layout=layout) / in_features**0.5
    target, weight = labels(*leading, classes=classes, ignored=ignored), torch.rand(classes) if weighted else None
    options = {"target": target, "weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
    assert_close(given, **options, slack=16 * max(target.numel(), 1))


class TestCompiled:
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_one_graph_for_every_size(self, reduction):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")

        def call(input, linear_weight, target):
            return ops.linear_cross_entropy(input, linear_weight, target, reduction=reduction)

        compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
        linear_weight, counts = torch.randn(40, 8, requires_grad=True), []
        for rows in (20, 33, 50):
            input, target = torch.randn(rows, 8, requires_grad=True), labels(rows, classes=40)
            results = []
            for function in (compiled, call):
                loss = function(input, linear_weight, target)
                results.append([loss, *torch.autograd.grad(loss.sum(), (input, linear_weight))])
            assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
            counts.append(counter.frame_count)
        assert counts[0] == counts[1] == counts[2]

    def test_no_more_passes_than_gradients(self, recorder):
        """A mean keeps its gradients and multiplies them; nothing is computed twice."""
        given = {name: x.requires_grad_() for name, x in tensors(20, 8, 30, torch.float32).items()}
        with recorder:
            ops.linear_cross_entropy(**given, target=labels(20, classes=30)).backward()
        called = [name for name in recorder.names() if name.startswith("fastformer")]
        assert called == ["fastformer::linear_cross_entropy"]


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_loss_is_float32(self, dtype):
        """Products of 16-bit operands; the loss is not rounded, as autocast does it for cross_entropy."""
        given, target = tensors(20, 8, 30, torch.float32), labels(20, classes=30)
        with torch.autocast("cpu", dtype):
            loss = ops.linear_cross_entropy(**given, target=target)
            assert F.cross_entropy(F.linear(**_linear(given)), target).dtype == loss.dtype == torch.float32
        rounded = {name: x.to(dtype) for name, x in given.items()}
        expected = ops.linear_cross_entropy(**rounded, target=target)
        assert torch.equal(loss.to(dtype), expected)
        torch.testing.assert_close(
            loss, ops.linear_cross_entropy(**{name: x.float() for name, x in rounded.items()}, target=target)
        )

    def test_gradients_are_float32(self):
        given = {name: x.requires_grad_() for name, x in tensors(20, 8, 30, torch.float32).items()}
        for reduction in REDUCTIONS:
            with torch.autocast("cpu", torch.bfloat16):
                loss = ops.linear_cross_entropy(**given, target=labels(20, classes=30), reduction=reduction)
            assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(loss.sum(), given.values()))


def _linear(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"input": given["input"], "weight": given["linear_weight"], "bias": given["linear_bias"]}


class TestMemory:
    """Of the logits never more than 64 MiB are there; all of them would be 625 MiB. A quarter of that is allowed: what
    the system counts as the process's memory also moves by itself, by some 60 MiB on a busy machine."""

    ROWS, FEATURES, CLASSES = 8192, 16, 20000
    ALLOWED = ROWS * CLASSES * 4 // 4  # bytes

    def rise(self, call: Callable[[], object]) -> int:
        call()
        bytes = peak_memory(call)
        if bytes is None:
            pytest.skip("this system does not tell the peak of the resident memory")
        return bytes

    @pytest.mark.cpu_only
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_no_logits(self, reduction):
        given = tensors(self.ROWS, self.FEATURES, self.CLASSES, torch.float32)
        target = labels(self.ROWS, classes=self.CLASSES, ignored=0)
        call = partial(ops.linear_cross_entropy, **given, target=target, reduction=reduction)
        assert self.rise(call) < self.ALLOWED
        for x in given.values():
            x.requires_grad_()
        assert self.rise(lambda: torch.autograd.grad(call().sum(), given.values())) < self.ALLOWED


@pytest.mark.cpu_only
def test_targets_out_of_range():
    given = tensors(4, 5, 6, torch.float32)
    for value in (6, -1, -101):
        target = torch.tensor([0, 5, value, 1])
        with pytest.raises(RuntimeError, match=f"target: expected class indices from 0 to 5, .* got {value}"):
            ops.linear_cross_entropy(**given, target=target)
    with pytest.raises(RuntimeError, match="target: expected class indices from 0 to 5, or ignore_index 9, got -100"):
        ops.linear_cross_entropy(**given, target=torch.tensor([0, 5, 9, -100]), ignore_index=9)


@pytest.mark.skipif(BACKEND == "cpu", reason="the CPU kernels raise")
@pytest.mark.parametrize("value", [6, -1, 2**62])
def test_targets_out_of_range_make_nan(value):
    given = {name: x.requires_grad_() for name, x in tensors(4, 5, 6, torch.float32).items()}
    target = torch.tensor([0, 5, value, 1])
    for weight in (None, torch.ones(6)):
        loss = ops.linear_cross_entropy(**given, target=target, weight=weight, reduction="none")
        assert loss.isnan().tolist() == [False, False, True, False]
        loss = ops.linear_cross_entropy(**given, target=target, weight=weight)
        gradients = torch.autograd.grad(loss, given.values())
        assert loss.isnan() and all(grad.isnan().any() for grad in gradients)


X, W, T = torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], W, T), {}, TypeError, "input: expected a Tensor, got list"),
        ((X.long(), W, T), {}, TypeError, "input: expected a floating dtype, got torch.int64"),
        ((X, W.bfloat16(), T), {}, TypeError, "linear_weight: expected torch.float32 as input has, got torch.bfloat16"),
        ((X, W, T), {"linear_bias": torch.ones(5).double()}, TypeError, "linear_bias: expected torch.float32 as input"),
        ((X, W, T), {"weight": torch.ones(5).int()}, TypeError, "weight: expected a floating dtype, got torch.int32"),
        ((X, W, T), {"weight": torch.ones(5, device="meta")}, ValueError, "weight: expected on cpu as input is"),
        ((torch.ones(()), W, T), {}, ValueError, r"input: expected \(\.\.\., in_features\)"),
        ((X, W.t(), T), {}, ValueError, r"linear_weight: expected \(out_features, 3\) .*, got \(3, 5\)"),
        ((X, W, T), {"linear_bias": torch.ones(4)}, ValueError, r"linear_bias: expected shape \(5,\) .*, got \(4,\)"),
        ((X, W, T), {"weight": torch.ones(4)}, ValueError, r"weight: expected shape \(5,\) .*, got \(4,\)"),
        ((X, W, [0, 1]), {}, TypeError, "target: expected a Tensor, got list"),
        ((X, W, T.int()), {}, TypeError, "target: expected int64, got torch.int32"),
        ((X, W, T.to("meta")), {}, ValueError, "target: expected on cpu as input is, got meta"),
        ((X, W, T[:1]), {}, ValueError, r"target: expected shape \(2,\) \(input's leading dimensions\), got \(1,\)"),
        ((X, W, T[None]), {}, ValueError, r"target: expected shape \(2,\) .*, got \(1, 2\)"),
        ((X, W, torch.ones(2, 5)), {}, NotImplementedError, "target: expected class indices .*, got probabilities"),
        ((X, W, T), {"reduction": "max"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'max'"),
        ((X, W, T), {"label_smoothing": 1.5}, ValueError, "label_smoothing: expected a probability .*, got 1.5"),
        ((X, W, T), {"weight": torch.ones(5, requires_grad=True)}, NotImplementedError, "weight: .* get no gradient"),
    ],
)
def test_errors(raises_before_anything_runs, arguments, options, error, message):
    raises_before_anything_runs(partial(ops.linear_cross_entropy, *arguments, **options), error, message)


def test_strict_names_the_op():
    with fastformer.backend("cuda", strict=True), pytest.raises(NotImplementedError, match="linear_cross_entropy"):
        ops.linear_cross_entropy(X, W, T)


def test_backward_again():
    """Each adds the same gradient, whatever is done in between to what the one before gave."""
    tensors = {
        name: randn(*shape).requires_grad_() for name, shape in (("input", (6, 16)), ("linear_weight", (50, 16)))
    }
    loss = ops.linear_cross_entropy(**tensors, target=torch.arange(6))
    expected = torch.autograd.grad(loss, tensors.values(), retain_graph=True)
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        for x, grad in zip(tensors.values(), expected, strict=True):
            torch.testing.assert_close(x.grad, times * grad)
    for x in tensors.values():
        x.grad.zero_()
    loss.backward()
    for x, grad in zip(tensors.values(), expected, strict=True):
        torch.testing.assert_close(x.grad, grad)
