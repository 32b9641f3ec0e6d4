"""crf_log_likelihood and crf_decode."""

import itertools
from functools import partial

import eager
import pytest
import torch
from accuracy import assert_op_close, assert_strides_do_not_matter
from hypothesis import given
from hypothesis import strategies as st
from tensors import BACKEND, DTYPES, LAYOUTS, randn
from torch import Tensor
from torch.autograd import gradcheck

import fastformer
from fastformer import backends, ops, reference

pytestmark = pytest.mark.skipif(BACKEND not in backends.declared("crf_decode"), reason=f"no {BACKEND} kernel")

REDUCTIONS = ("mean", "sum", "none")
SIZES = [(3, 1, 4), (2, 7, 5), (5, 9, 16), (4, 12, 17), (33, 6, 9), (2, 20, 33)]  # sequences, positions, tags


def tensors(batch: int, length: int, tags: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"emissions": (batch, length, tags), "transitions": (tags, tags), "start": (tags,), "end": (tags,)}
    return {name: randn(*shape, dtype=dtype) for name, shape in shapes.items()}


def random_tags(batch: int, length: int, tags: int, missing: float = 0.0) -> Tensor:
    return torch.randint(tags, (batch, length)).where(torch.rand(batch, length) >= missing, -100)


def assert_close(*draws: dict[str, Tensor], **options) -> None:
    """By the accuracy rule. In float64, where eager would be its own reference, that is the specification: eager's sums
    are large, and lose digits (ten times as much as the kernel, measured in 80 bits)."""
    float64 = draws[0]["emissions"].dtype == torch.float64
    expected = specification if float64 else eager.crf_log_likelihood
    assert_op_close(partial(ops.crf_log_likelihood, **options), partial(expected, **options), *draws)


def specification(*, tags: Tensor, mask: Tensor | None = None, reduction: str = "mean", **given: Tensor) -> Tensor:
    unused = sum(x.flatten()[:0].sum() for x in given.values())  # 0: with one position transitions have no part in it
    return reference.crf_log_likelihood(**given, tags=tags, mask=mask, reduction=reduction) + unused


def assert_best(given: dict[str, Tensor], mask: Tensor | None = None) -> None:
    """The score of the decoded path, in float64, is that of the best; where nearly equal either may be chosen."""
    decoded = ops.crf_decode(**given, mask=mask)
    best = reference.crf_decode(**{name: x.double() for name, x in given.items()}, mask=mask)
    kept = torch.ones_like(best, dtype=torch.bool) if mask is None else mask
    assert decoded.dtype == torch.int64 and torch.equal(decoded == -100, ~kept)
    score, expected = (eager.path_scores(**given, tags=tags) for tags in (decoded, best))
    torch.testing.assert_close(score, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sizes(isa, dtype, size, reduction):
    draws = [tensors(*size, dtype) for _ in range(3)]
    assert_close(*draws, tags=random_tags(*size), reduction=reduction)
    assert_best(draws[0])


def test_one_tag(isa):
    """The only path has the probability 1, and nothing changes that."""
    leaves = {name: x.requires_grad_() for name, x in tensors(3, 7, 1).items()}
    log_likelihood = ops.crf_log_likelihood(**leaves, tags=random_tags(3, 7, 1), reduction="sum")
    for x in (log_likelihood, *torch.autograd.grad(log_likelihood, leaves.values())):
        torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_brute_force(isa, dtype, masked):
    """All paths, one by one: their probabilities, their sum, and the best."""
    for length, tags in ((1, 4), (3, 3), (5, 2), (6, 3)):
        given = tensors(1, length, tags, dtype)
        mask = torch.rand(1, length) >= masked
        mask[0, length // 2] = True
        paths = torch.tensor(list(itertools.product(range(tags), repeat=int(mask.sum()))))  # (paths, kept)
        all_tags = torch.full((len(paths), length), -100)
        all_tags[:, mask[0]] = paths
        many = given | {"emissions": given["emissions"].expand(len(paths), length, tags)}
        scores = eager.path_scores(**many, tags=all_tags)
        log_likelihood = ops.crf_log_likelihood(**many, tags=all_tags, reduction="none")
        torch.testing.assert_close(log_likelihood.double(), scores.log_softmax(0), rtol=0, atol=1e-5)
        assert torch.equal(ops.crf_decode(**given, mask=mask)[0], all_tags[scores.argmax()])


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("masked", [0.0, 0.3, 0.9])
def test_masks_with_holes(isa, missing, masked):
    """What is masked or has no tag is left out: bit for bit as if it were not there. NaN is not read there."""
    size = 12, 20, 9
    draws, tags = [tensors(*size) for _ in range(5)], random_tags(*size, missing)
    mask = torch.rand(size[:2]) >= masked
    for reduction in REDUCTIONS:
        assert_close(*draws, tags=tags, mask=mask, reduction=reduction)
    assert_best(draws[0], mask)

    kept, leaves = mask & (tags != -100), {name: x.requires_grad_() for name, x in draws[0].items()}
    log_likelihood = ops.crf_log_likelihood(**leaves, tags=tags, mask=mask, reduction="none")
    gradient = torch.autograd.grad(log_likelihood.sum(), leaves["emissions"])[0]
    assert not gradient[~kept].any()
    holed = leaves | {"emissions": leaves["emissions"].detach().masked_fill(~kept[..., None], torch.nan)}
    assert torch.equal(ops.crf_log_likelihood(**holed, tags=tags, mask=mask, reduction="none"), log_likelihood)
    decoded = ops.crf_decode(**holed, mask=kept)
    for b in range(size[0]):
        short = leaves | {"emissions": leaves["emissions"][b : b + 1, kept[b]].detach().requires_grad_()}
        alone = ops.crf_log_likelihood(**short, tags=tags[b : b + 1, kept[b]], reduction="none")
        assert torch.equal(alone[0], log_likelihood[b])
        assert torch.equal(torch.autograd.grad(alone.sum(), short["emissions"])[0][0], gradient[b, kept[b]])
        assert torch.equal(ops.crf_decode(**short)[0], decoded[b, kept[b]])


def test_tags_that_are_masked_may_be_anything():
    given, tags = tensors(2, 5, 3), random_tags(2, 5, 3)
    mask = torch.arange(5).expand(2, 5) != 2
    expected = ops.crf_log_likelihood(**given, tags=tags, mask=mask)
    assert torch.equal(ops.crf_log_likelihood(**given, tags=tags.masked_fill(~mask, 99), mask=mask), expected)


def test_nothing_kept():
    """Such a sequence has the log-likelihood 0 and no gradient, and counts in the mean."""
    leaves = {name: x.requires_grad_() for name, x in tensors(3, 4, 5).items()}
    tags = random_tags(3, 4, 5)
    tags[1] = -100
    losses = {r: ops.crf_log_likelihood(**leaves, tags=tags, reduction=r) for r in REDUCTIONS}
    assert losses["none"][1] == 0 and (losses["none"][[0, 2]] < 0).all()
    torch.testing.assert_close(losses["mean"], losses["none"].sum() / 3)
    gradient = torch.autograd.grad(losses["sum"], leaves["emissions"])[0]
    assert not gradient[1].any() and gradient[0].any()
    empty = torch.autograd.grad(ops.crf_log_likelihood(**leaves, tags=torch.full((3, 4), -100)), leaves.values())
    assert not any(grad.any() for grad in empty)
    assert (ops.crf_decode(**leaves, mask=torch.zeros(3, 4, dtype=torch.bool)) == -100).all()


@pytest.mark.parametrize("size", [(0, 4, 3), (2, 0, 3), (0, 0, 1)])
def test_empty(size):
    leaves = {name: x.requires_grad_() for name, x in tensors(*size).items()}
    tags = random_tags(*size)
    log_likelihood = ops.crf_log_likelihood(**leaves, tags=tags, reduction="none")
    assert log_likelihood.shape == size[:1] and not log_likelihood.any()
    assert ops.crf_log_likelihood(**leaves, tags=tags).isnan() == (size[0] == 0)
    gradients = torch.autograd.grad(log_likelihood.sum(), leaves.values())
    assert all(x.shape == grad.shape and not grad.any() for x, grad in zip(leaves.values(), gradients, strict=True))
    assert ops.crf_decode(**leaves).shape == size[:2]


def ruled_out(given: dict[str, Tensor], value: float) -> dict[str, Tensor]:
    """Tag 2 comes after tag 1 only and not at the start; no path ends in tag 0."""
    transitions, start, end = (given[name].clone() for name in ("transitions", "start", "end"))
    only = torch.arange(transitions.shape[0]) != 1
    transitions[only, 2] = start[2] = end[0] = value
    return given | {"transitions": transitions, "start": start, "end": end}


@pytest.mark.parametrize("value", [-torch.inf, -1e4])
@pytest.mark.parametrize("tags", [4, 19])
def test_what_is_ruled_out(isa, value, tags):
    """No path goes there, no gradient is NaN, and a path that goes there has probability 0."""
    draws = [ruled_out(tensors(6, 9, tags), value) for _ in range(5)]
    allowed = torch.tensor([[1, 2, 3, 1, 1, 2, 1, 2, 3]]).expand(6, 9)
    assert_close(*draws, tags=allowed, reduction="none")
    decoded = ops.crf_decode(**draws[0])
    assert (decoded[:, 0] != 2).all() and (decoded[:, -1] != 0).all()
    assert (decoded[:, :-1][decoded[:, 1:] == 2] == 1).all()
    log_likelihood = ops.crf_log_likelihood(**draws[0], tags=torch.full((6, 9), 2))
    assert log_likelihood == value if value == -torch.inf else log_likelihood < -9e4


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_scores_far_apart(isa, scale):
    """Sums of exp would overflow, and lose all but the largest."""
    draws = [{name: x * scale for name, x in tensors(4, 12, 7).items()} for _ in range(5)]
    assert_close(*draws, tags=random_tags(4, 12, 7), reduction="none")
    assert_best(draws[0])


def test_long_sequences(isa):
    """The score of 3000 steps is no sum of float32 numbers that lose their digits."""
    given, tags = tensors(1, 3000, 5), random_tags(1, 3000, 5)
    log_likelihood = ops.crf_log_likelihood(**given, tags=tags)
    exact = reference.crf_log_likelihood(**{name: x.double() for name, x in given.items()}, tags=tags)
    torch.testing.assert_close(log_likelihood.double(), exact, rtol=3e-7, atol=0)
    assert_best(given)


def test_marginals(isa):
    """The gradient of the score that all paths have together is a probability at each step."""
    given = tensors(3, 8, 6, torch.float32)
    given["emissions"].requires_grad_()
    tags = random_tags(3, 8, 6)
    gradient = torch.autograd.grad(ops.crf_log_likelihood(**given, tags=tags, reduction="sum"), given["emissions"])[0]
    marginals = torch.nn.functional.one_hot(tags, 6) - gradient
    assert (marginals > -1e-6).all()
    torch.testing.assert_close(marginals.sum(-1), torch.ones(3, 8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite(isa, value):
    """Such a sequence has the log-likelihood NaN, and so are its gradients; the others don't change."""
    given, tags = tensors(4, 6, 5), random_tags(4, 6, 5)
    clean = ops.crf_log_likelihood(**given, tags=tags, reduction="none")
    given["emissions"][2, 3, 1] = value
    given["emissions"].requires_grad_()
    log_likelihood = ops.crf_log_likelihood(**given, tags=tags.where(tags != 1, 2), reduction="none")
    (gradient,) = torch.autograd.grad(log_likelihood.sum(), given["emissions"])
    log_likelihood = ops.crf_log_likelihood(**given, tags=tags, reduction="none")
    others = torch.arange(4) != 2
    assert log_likelihood[2].isnan() and gradient[2].isnan().any()
    assert torch.equal(log_likelihood[others], clean[others]) and gradient[others].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, dtype, layout):
    given, tags = tensors(3, 8, 10, dtype), random_tags(3, 8, 10)
    given |= {"emissions": randn(3, 8, 10, dtype=dtype, layout=layout)}
    given |= {"transitions": randn(10, 10, dtype=dtype, layout=layout)}
    given |= {name: torch.stack(2 * [given[name]], 1)[:, 0] for name in ("start", "end")}
    mask = randn(3, 8, dtype=torch.bool, layout=layout)
    assert_strides_do_not_matter(partial(ops.crf_log_likelihood, tags=tags.mT.contiguous().mT, mask=mask), given)
    contiguous = {name: x.contiguous() for name, x in given.items()}
    assert torch.equal(ops.crf_decode(**given, mask=mask), ops.crf_decode(**contiguous, mask=mask.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_emissions_beside_float32_transitions(isa, dtype):
    """As autocast has it: nothing but the emissions is rounded, and the result is float32."""
    given, tags = tensors(4, 7, 9), random_tags(4, 7, 9, 0.2)
    given["emissions"] = given["emissions"].to(dtype)
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    wide = {name: x.detach().float().requires_grad_() for name, x in given.items()}
    results = []
    for operands in (leaves, wide):
        log_likelihood = ops.crf_log_likelihood(**operands, tags=tags)
        assert log_likelihood.dtype == torch.float32
        results.append((log_likelihood, *torch.autograd.grad(log_likelihood, operands.values())))
    assert all(torch.equal(x, y.to(x.dtype)) for x, y in zip(*results, strict=True))
    assert results[0][1].dtype == dtype
    assert torch.equal(ops.crf_decode(**leaves), ops.crf_decode(**wide))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.crf_log_likelihood(**wide, tags=tags).dtype == torch.float32


def test_same_again(threads):
    given = {name: x.requires_grad_() for name, x in tensors(50, 30, 11).items()}
    tags = random_tags(50, 30, 11, 0.2)
    runs = []
    for _ in range(3):
        loss = ops.crf_log_likelihood(**given, tags=tags)
        runs.append([loss.detach(), *torch.autograd.grad(loss, given.values())])
    with torch.no_grad():
        assert torch.equal(ops.crf_log_likelihood(**given, tags=tags), runs[0][0])
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(isa, reduction):
    tags, mask = random_tags(3, 5, 4, 0.2), torch.rand(3, 5) < 0.8
    names, operands = zip(*tensors(3, 5, 4, torch.float64).items(), strict=True)

    def function(*operands):
        given = dict(zip(names, operands, strict=True))
        return ops.crf_log_likelihood(**given, tags=tags, mask=mask, reduction=reduction)

    assert gradcheck(function, [x.requires_grad_() for x in operands])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_as_pytorch_crf(reduction):
    """Where that package is installed; its masks are without holes."""
    torchcrf = pytest.importorskip("torchcrf")
    given, tags = tensors(5, 12, 7), random_tags(5, 12, 7)
    mask = torch.arange(12) < torch.tensor([12, 3, 7, 1, 12])[:, None]
    crf = torchcrf.CRF(7, batch_first=True)
    with torch.no_grad():
        crf.transitions.copy_(given["transitions"])
        crf.start_transitions.copy_(given["start"])
        crf.end_transitions.copy_(given["end"])
    expected = crf(given["emissions"], tags, mask, reduction=reduction)
    torch.testing.assert_close(ops.crf_log_likelihood(**given, tags=tags, mask=mask, reduction=reduction), expected)
    decoded = ops.crf_decode(**given, mask=mask)
    assert [row[row >= 0].tolist() for row in decoded] == crf.decode(given["emissions"], mask)


@given(
    size=st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(("contiguous", *LAYOUTS)),
    masked=st.sampled_from([None, 0.0, 0.5]),
    missing=st.sampled_from([0.0, 0.5]),
)
def test_any_call(size, dtype, layout, masked, missing):
    torch.manual_seed(0)
    draws = [tensors(*size, dtype) | {"emissions": randn(*size, dtype=dtype, layout=layout)} for _ in range(5)]
    mask = None if masked is None else torch.rand(size[:2]) >= masked
    tags = random_tags(*size, missing)
    assert_close(*draws, tags=tags, mask=mask, reduction="none")
    assert_best(draws[0], mask)


class TestDecode:
    def test_first_of_equal_scores(self, isa):
        zeros = {name: torch.zeros_like(x) for name, x in tensors(2, 5, 20).items()}
        assert not ops.crf_decode(**zeros).any()

    def test_no_gradient(self, recorder):
        given = {name: x.requires_grad_() for name, x in tensors(2, 5, 4).items()}
        with recorder:
            assert not ops.crf_decode(**given).requires_grad
        assert [n for n in recorder.names() if n.startswith("fastformer")] == [f"fastformer_{BACKEND}::crf_decode"]

    @pytest.mark.parametrize("mask", [None, torch.tensor([[True, False, True], [False, True, True]])])
    def test_opcheck(self, mask):
        raw = getattr(torch.ops, f"fastformer_{BACKEND}").crf_decode
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(raw, (*tensors(2, 3, 4).values(), mask), test_utils=checks)

    def test_compiled_and_exported(self):
        torch._dynamo.reset()
        given = tensors(2, 6, 5)
        assert torch.equal(
            torch.compile(ops.crf_decode, backend="aot_eager", fullgraph=True)(**given), ops.crf_decode(**given)
        )

        class Module(torch.nn.Module):
            def forward(self, *operands: Tensor) -> Tensor:
                return ops.crf_decode(*operands)

        exported = torch.export.export(Module(), tuple(given.values())).module()
        assert torch.equal(exported(*given.values()), ops.crf_decode(**given))


@pytest.mark.parametrize("value", [5, -1, -101])
def test_tags_that_are_not_there(value):
    given, tags = tensors(2, 3, 5), random_tags(2, 3, 5)
    tags[1, 1] = value
    with pytest.raises(RuntimeError, match=f"tags: expected 0 to 4, or -100 where there is none, got {value}"):
        ops.crf_log_likelihood(**given, tags=tags)


E, Y, A, V = torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), torch.ones(4, 4), torch.ones(4)
M = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], Y, A, V, V), {}, TypeError, "emissions: expected a Tensor, got list"),
        ((E.long(), Y, A, V, V), {}, TypeError, "emissions: expected a floating dtype, got torch.int64"),
        (
            (E, Y, A.double(), V, V),
            {},
            TypeError,
            "start: expected torch.float64 as transitions has, got torch.float32",
        ),
        ((E, Y, *(x.double() for x in (A, V, V))), {}, TypeError, "transitions: expected torch.float32 as emissions"),
        ((E.double(), Y, A, V, V), {}, TypeError, "transitions: expected torch.float64 as emissions have"),
        ((E[0], Y, A, V, V), {}, ValueError, r"emissions: expected \(batch, positions, tags\), got \(3, 4\)"),
        ((E[..., :0], Y, A, V, V), {}, ValueError, r"emissions: expected \(batch, positions, tags\), got \(2, 3, 0\)"),
        ((E, Y, A[:3], V, V), {}, ValueError, r"transitions: expected shape \(4, 4\) .*, got \(3, 4\)"),
        ((E, Y, A, V[:3], V), {}, ValueError, r"start: expected shape \(4,\) .*, got \(3,\)"),
        ((E, Y, A, V, V[None]), {}, ValueError, r"end: expected shape \(4,\) .*, got \(1, 4\)"),
        ((E, Y, A, V, V.to("meta")), {}, ValueError, "end: expected on cpu as emissions is, got meta"),
        ((E, [0], A, V, V), {}, TypeError, "tags: expected an int64 Tensor, got list"),
        ((E, Y.int(), A, V, V), {}, TypeError, "tags: expected an int64 Tensor, got torch.int32"),
        ((E, Y[:1], A, V, V), {}, ValueError, r"tags: expected shape \(2, 3\) .*, got \(1, 3\)"),
        ((E, Y.to("meta"), A, V, V), {}, ValueError, "tags: expected on cpu as emissions are, got meta"),
        ((E, Y, A, V, V, M.long()), {}, TypeError, "mask: expected a bool Tensor, got torch.int64"),
        ((E, Y, A, V, V, M.mT), {}, ValueError, r"mask: expected shape \(2, 3\) .*, got \(3, 2\)"),
        ((E, Y, A, V, V, M.to("meta")), {}, ValueError, "mask: expected on cpu as emissions are, got meta"),
        ((E, Y, A, V, V), {"reduction": "max"}, ValueError, "reduction: expected one of 'mean', .*, got 'max'"),
    ],
)
def test_errors(raises_before_anything_runs, arguments, options, error, message):
    raises_before_anything_runs(partial(ops.crf_log_likelihood, *arguments, **options), error, message)
    if "tags" not in message and "reduction" not in message:
        emissions, _, *others = arguments
        raises_before_anything_runs(partial(ops.crf_decode, emissions, *others), error, message)


def test_strict_names_the_op():
    with fastformer.backend("triton", strict=True):
        for op, arguments in (("crf_log_likelihood", (E, Y, A, V, V)), ("crf_decode", (E, A, V, V))):
            with pytest.raises(NotImplementedError, match=rf"ops.{op}: backend 'triton' [\s\S]*has no kernel for {op}"):
                getattr(ops, op)(*arguments)
