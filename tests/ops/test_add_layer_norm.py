from functools import partial

import eager
import pytest
import torch
from accuracy import assert_op_close, assert_strides_do_not_matter
from hypothesis import given
from hypothesis import strategies as st
from tensors import DTYPES, FLOATS, LAYOUTS, at_scale, randn
from torch import Tensor
from torch.autograd import gradcheck

from fastformer import ops, reference

SIZES = [(5, 7), (17, 16), (16, 17), (63, 63), (65, 64), (1, 65), (3, 97), (130, 768), (2, 3072)]


def tensors(rows: int, columns: int, dtype: torch.dtype, **layout: str) -> dict[str, Tensor]:
    return {
        "input": randn(rows, columns, dtype=dtype, **layout),
        "residual": randn(rows, columns, dtype=dtype, **layout),
        "weight": randn(columns, dtype=dtype),
        "bias": randn(columns, dtype=dtype),
    }


def fused(
    input: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    return ops.add_layer_norm(input, residual, input.shape[-1:], weight, bias, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(isa, dtype, size):
    assert_op_close(fused, eager.add_layer_norm, tensors(*size, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [2, 3, 5])
def test_narrow(isa, dtype, columns):
    draws = [tensors(4, columns, dtype) for _ in range(20)]
    for draw in draws:
        draw["input"] += 3 * torch.arange(columns)  # no row is nearly constant, which would be all rounding errors
    assert_op_close(fused, eager.add_layer_norm, *draws)


@pytest.mark.parametrize("dtype", FLOATS)
def test_threads(threads, dtype):
    call, expected = (partial(f, dropout_p=0.2) for f in (fused, eager.add_layer_norm))
    assert_op_close(call, expected, tensors(at_scale(1500), 97, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left_out", [("weight",), ("bias",), ("weight", "bias")])
def test_optional_operands(isa, dtype, left_out):
    assert_op_close(fused, eager.add_layer_norm, tensors(33, 50, dtype) | dict.fromkeys(left_out))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_one_output_alone(isa, which, p):
    """Post-norm models use the first only; the second alone is dropout and addition."""
    names = ["input", "residual", "weight", "bias"] if which == 0 else ["input", "residual"]
    given = {name: x for name, x in tensors(20, 50, torch.float32).items() if name in names}

    def one(function):
        return lambda **tensors: function(**tensors, dropout_p=p)[which]

    assert_op_close(one(fused), one(eager.add_layer_norm), given)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, dtype, layout):
    assert_strides_do_not_matter(partial(fused, dropout_p=0.2), tensors(30, 34, dtype, layout=layout))


@pytest.mark.parametrize("leading", [(2, 3), (1, 4, 1), (2, 1, 3, 2)])
def test_leading_dimensions(leading):
    given = tensors(1, 20, torch.float32) | {"input": randn(*leading, 20), "residual": randn(*leading, 20)}
    call, expected = (partial(f, dropout_p=0.2) for f in (fused, eager.add_layer_norm))
    assert_op_close(call, expected, given)
    for layout in LAYOUTS:
        assert_strides_do_not_matter(call, given | {"input": randn(*leading, 20, layout=layout)})
        assert_strides_do_not_matter(call, given | {"residual": randn(*leading, 20, layout=layout)})


def test_one_dimension():
    given = tensors(1, 20, torch.float32) | {"input": randn(20), "residual": randn(20)}
    assert_op_close(fused, eager.add_layer_norm, given)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_several_normalized_dimensions(p):
    """The rows of the dropout are those that are normalized."""
    given = {"input": randn(5, 3, 4), "residual": randn(5, 4, 3).mT, "weight": randn(3, 4), "bias": randn(3, 4)}

    def expected(input, residual, weight, bias):
        flat = [x.flatten(-2) for x in (input, residual, weight, bias)]
        return tuple(x.view(input.shape) for x in eager.add_layer_norm(*flat, dropout_p=p))

    assert_op_close(partial(ops.add_layer_norm, normalized_shape=(3, 4), dropout_p=p), expected, given)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("left_out", [(), ("weight", "bias")])
def test_empty(shape, left_out):
    given = tensors(1, shape[-1], torch.float32) | {"input": randn(*shape), "residual": randn(*shape)}
    assert_op_close(fused, eager.add_layer_norm, given | dict.fromkeys(left_out))


@pytest.mark.parametrize("dtype", FLOATS)
def test_mean_far_from_zero(isa, dtype):
    given = tensors(20, 70, dtype)
    given["residual"] += 1000
    assert_op_close(fused, eager.add_layer_norm, given)


@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_eps(eps):
    given = tensors(20, 70, torch.float32)
    assert_op_close(partial(fused, eps=eps), partial(eager.add_layer_norm, eps=eps), given)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_residual_of_another_dtype(isa, dtype, residual_dtype, p):
    """As under autocast: the sum and what follows in the wider dtype, gradients in the dtype of each."""
    given = tensors(20, 70, dtype) | {"residual": randn(20, 70, dtype=residual_dtype)}
    wider = torch.promote_types(dtype, residual_dtype)
    given |= {"weight": randn(70, dtype=wider), "bias": randn(70, dtype=wider)}
    call, expected = (partial(f, dropout_p=p) for f in (fused, eager.add_layer_norm))
    assert_op_close(call, expected, given)


@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("bias", DTYPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_each_of_its_own_dtype(dtype, weight, bias):
    given = tensors(20, 70, dtype) | {"weight": randn(70, dtype=weight), "bias": randn(70, dtype=bias)}
    assert_op_close(fused, partial(reference.add_layer_norm, normalized_shape=70), given)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_accuracy(isa, dtype, p):
    call, expected = (partial(f, dropout_p=p) for f in (fused, eager.add_layer_norm))
    assert_op_close(call, expected, tensors(37, 130, dtype))


@pytest.mark.cpu_only  # float64
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("left_out", [(), ("weight",), ("bias",)])
def test_gradcheck(isa, p, left_out):
    given = {name: x for name, x in tensors(3, 9, torch.float64).items() if name not in left_out}

    def function(*inputs):
        torch.manual_seed(3)
        return fused(**dict(zip(given, inputs, strict=True)), dropout_p=p)

    assert gradcheck(function, [x.requires_grad_() for x in given.values()])


@pytest.mark.parametrize("wanted", ["input", "residual", "weight", "bias"])
def test_one_gradient_alone(wanted):
    given = tensors(5, 6, torch.float32)
    given[wanted].requires_grad_()
    fused(**given)[0].square().sum().backward()
    alone = given[wanted].grad
    for x in given.values():
        x.grad = None
        x.requires_grad_()
    fused(**given)[0].square().sum().backward()
    assert torch.equal(alone, given[wanted].grad)


@pytest.mark.parametrize("name", ["input", "residual"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(isa, name, value):
    given = tensors(9, 37, torch.float32)
    clean = fused(**given)
    given[name][4, 35] = value
    output, s = fused(**given)
    others = torch.arange(9) != 4
    assert output[4].isnan().all()
    assert torch.equal(s.isfinite().logical_not().nonzero(), torch.tensor([[4, 35]]))
    assert torch.equal(output[others], clean[0][others]) and torch.equal(s[others], clean[1][others])


@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    columns=st.integers(6, 140),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layouts=st.tuples(*2 * [st.sampled_from(("contiguous", *LAYOUTS[:4], *LAYOUTS[6:]))]),
    left_out=st.sets(st.sampled_from(["weight", "bias"])),
    p=st.sampled_from([0.0, 0.2]),
)
def test_any_call(shape, columns, dtypes, layouts, left_out, p):
    torch.manual_seed(0)
    given = tensors(1, columns, torch.promote_types(*dtypes))
    for name, dtype, layout in zip(("input", "residual"), dtypes, layouts, strict=True):
        given[name] = randn(*shape, columns, dtype=dtype, layout=layout if shape else "contiguous")
    call, expected = (partial(f, dropout_p=p) for f in (fused, eager.add_layer_norm))
    assert_op_close(call, expected, given | dict.fromkeys(left_out), slack=16)


class TestDropout:
    @pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
    @pytest.mark.parametrize("columns", [1, 15, 16, 63, 64, 65, 200])
    def test_mask_is_that_of_the_reference(self, isa, p, columns):
        torch.manual_seed(5)
        s = fused(torch.ones(2, 35, columns), torch.zeros(2, 35, columns), dropout_p=p)[1].view(70, columns)
        torch.manual_seed(5)
        kept = reference.row_dropout_mask(reference.draw_seed(s.device), p, 70, columns)
        scale = torch.tensor(1 / (1 - p) if p < 1 else 0.0)
        assert torch.equal(s, torch.where(kept, scale, 0.0))

    def test_backward_has_the_same_mask(self, isa):
        input, residual = torch.ones(40, 100, requires_grad=True), torch.zeros(40, 100, requires_grad=True)
        _, s = fused(input, residual, dropout_p=0.3)
        s.sum().backward()
        assert torch.equal(input.grad, s.detach())
        assert torch.equal(residual.grad, torch.ones(40, 100))
        assert 0 < (s == 0).sum() < s.numel()

    def test_seeds(self):
        call = partial(fused, randn(20, 64), randn(20, 64), dropout_p=0.5)
        torch.manual_seed(5)
        first, second = call()[0], call()[0]
        torch.manual_seed(5)
        assert torch.equal(call()[0], first)
        assert not torch.equal(first, second)


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], X, 3), {}, TypeError, "input: expected a Tensor, got list"),
        ((X.int(), X, 3), {}, TypeError, "input: expected a floating dtype, got torch.int32"),
        ((X, [1.0], 3), {}, TypeError, "residual: expected a Tensor, got list"),
        ((X, X.int(), 3), {}, TypeError, "residual: expected a floating dtype, got torch.int32"),
        ((X, X, 3, torch.ones(3).int()), {}, TypeError, "weight: expected a floating dtype, got torch.int32"),
        ((X, X, 2), {}, ValueError, r"normalized_shape: expected the end of input's shape \(2, 3\), got \(2,\)"),
        ((X, X, 3, torch.ones(2)), {}, ValueError, r"weight: expected shape \(3,\) .*, got \(2,\)"),
        ((X, X, 3, None, torch.ones(2)), {}, ValueError, r"bias: expected shape \(3,\) .*, got \(2,\)"),
        ((X, X[:1], 3), {}, ValueError, r"residual: expected shape \(2, 3\) \(input's\), got \(1, 3\)"),
        ((X, X.to("meta"), 3), {}, ValueError, "residual: expected on cpu as input is, got meta"),
        ((X, X, 3), {"dropout_p": 1.1}, ValueError, "dropout_p: expected a probability from 0 to 1, got 1.1"),
    ],
)
def test_errors(raises_before_anything_runs, arguments, options, error, message):
    raises_before_anything_runs(partial(ops.add_layer_norm, *arguments, **options), error, message)
