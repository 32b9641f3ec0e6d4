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
        "weight": randn(columns, dtype=dtype),
        "bias": randn(columns, dtype=dtype),
    }


def fused(input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **options) -> Tensor:
    return ops.layer_norm(input, input.shape[-1:], weight, bias, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(isa, dtype, size):
    assert_op_close(fused, eager.layer_norm, tensors(*size, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [2, 3, 5])
def test_narrow(isa, dtype, columns):
    draws = [tensors(4, columns, dtype) for _ in range(20)]
    for draw in draws:
        draw["input"] += 3 * torch.arange(columns)  # no row is nearly constant, which would be all rounding errors
    assert_op_close(fused, eager.layer_norm, *draws)


@pytest.mark.parametrize("dtype", FLOATS)
def test_threads(threads, dtype):
    """So many rows that the backward is divided in chunks."""
    assert_op_close(fused, eager.layer_norm, tensors(at_scale(1500), 97, dtype))


def test_one_column(isa):
    """A row of one is its mean: the result is the bias, the gradients are 0 but for that of the bias."""
    given = {name: x.requires_grad_() for name, x in tensors(7, 1, torch.float32).items()}
    output = fused(**given)
    output.sum().backward()
    assert torch.equal(output, given["bias"].expand(7, 1))
    assert not given["input"].grad.any() and not given["weight"].grad.any()
    assert torch.equal(given["bias"].grad, torch.tensor([7.0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left_out", [("weight",), ("bias",), ("weight", "bias")])
def test_optional_operands(isa, dtype, left_out):
    assert_op_close(fused, eager.layer_norm, tensors(33, 50, dtype) | dict.fromkeys(left_out))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, dtype, layout):
    assert_strides_do_not_matter(fused, tensors(30, 34, dtype, layout=layout))


@pytest.mark.parametrize("leading", [(2, 3), (1, 4, 1), (2, 1, 3, 2)])
def test_leading_dimensions(leading):
    given = tensors(1, 20, torch.float32)
    assert_op_close(fused, eager.layer_norm, given | {"input": randn(*leading, 20)})
    for layout in LAYOUTS:
        assert_strides_do_not_matter(fused, given | {"input": randn(*leading, 20, layout=layout)})


def test_one_dimension():
    assert_op_close(fused, eager.layer_norm, tensors(1, 20, torch.float32) | {"input": randn(20)})


def test_weight_of_any_stride():
    given = tensors(9, 20, torch.float32)
    assert_strides_do_not_matter(fused, given | {"weight": randn(40)[::2], "bias": randn(1).expand(20)})


@pytest.mark.parametrize("shape", [(4,), [3, 4], (5, 3, 4), torch.Size([2, 5, 3, 4])])
def test_several_normalized_dimensions(shape):
    given = {"input": randn(2, 5, 3, 4), "weight": randn(*shape), "bias": randn(*shape)}
    call, expected = (partial(f, normalized_shape=shape) for f in (ops.layer_norm, eager.layer_norm))
    assert_op_close(call, expected, given)
    assert_op_close(call, expected, given | {"input": randn(2, 5, 4, 3).mT})


def test_number_as_normalized_shape():
    given = tensors(9, 20, torch.float32)
    assert torch.equal(ops.layer_norm(normalized_shape=20, **given), ops.layer_norm(normalized_shape=(20,), **given))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("left_out", [(), ("weight", "bias")])
def test_empty(shape, left_out):
    given = tensors(1, shape[-1], torch.float32) | {"input": randn(*shape)} | dict.fromkeys(left_out)
    assert_op_close(fused, eager.layer_norm, given)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 0.5])
def test_eps(isa, eps):
    given = tensors(20, 30, torch.float32)
    given["input"] *= 1e-2
    assert_op_close(partial(fused, eps=eps), partial(eager.layer_norm, eps=eps), given)


@pytest.mark.parametrize("dtype", FLOATS)
def test_mean_far_from_zero(isa, dtype):
    """E[x^2] - E[x]^2 would lose every digit here."""
    given = tensors(20, 70, dtype)
    given["input"] += 1000
    assert_op_close(fused, eager.layer_norm, given)


@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_in_float32(isa, dtype):
    """As autocast and mixed training have it; torch takes it, too."""
    given = tensors(20, 70, dtype) | {"weight": randn(70), "bias": randn(70)}
    assert_op_close(fused, eager.layer_norm, given)


@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("bias", DTYPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_each_of_its_own_dtype(dtype, weight, bias):
    """torch does not take it; gradients come in the dtype of each."""
    given = {"input": randn(20, 70, dtype=dtype), "weight": randn(70, dtype=weight), "bias": randn(70, dtype=bias)}
    expected = partial(reference.layer_norm, normalized_shape=(70,))
    assert_op_close(fused, lambda **kwargs: expected(**kwargs), given)


@pytest.mark.cpu_only  # float64
@pytest.mark.parametrize("columns", [1, 5, 33])
@pytest.mark.parametrize("left_out", [(), ("weight",), ("bias",)])
def test_gradcheck(isa, columns, left_out):
    given = {name: x for name, x in tensors(3, columns, torch.float64).items() if name not in left_out}

    def function(*inputs):
        return fused(**dict(zip(given, inputs, strict=True)))

    assert gradcheck(function, [x.requires_grad_() for x in given.values()])


@pytest.mark.parametrize("wanted", ["input", "weight", "bias"])
def test_one_gradient_alone(wanted):
    given = tensors(5, 6, torch.float32)
    given[wanted].requires_grad_()
    fused(**given).square().sum().backward()
    alone = given[wanted].grad
    for x in given.values():
        x.grad = None
        x.requires_grad_()
    fused(**given).square().sum().backward()
    assert torch.equal(alone, given[wanted].grad)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(isa, value):
    """As in eager, one such element makes its row NaN and leaves the others alone."""
    given = tensors(9, 37, torch.float32)
    clean = fused(**given)
    given["input"][4, 35] = value
    output = fused(**given)
    others = torch.arange(9) != 4
    assert output[4].isnan().all() and eager.layer_norm(**given)[4].isnan().all()
    assert torch.equal(output[others], clean[others])


@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    columns=st.integers(6, 140),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", *(layout for layout in LAYOUTS if layout != "broadcast columns")]),
    left_out=st.sets(st.sampled_from(["weight", "bias"])),
)
def test_any_call(shape, columns, dtype, layout, left_out):
    torch.manual_seed(0)
    given = tensors(1, columns, dtype)
    given["input"] = randn(*shape, columns, dtype=dtype, layout=layout if shape else "contiguous")
    assert_op_close(fused, eager.layer_norm, given | dict.fromkeys(left_out), slack=16)


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], 1), TypeError, "input: expected a Tensor, got list"),
        ((X.int(), 3), TypeError, "input: expected a floating dtype, got torch.int32"),
        ((X, 3, torch.ones(3).int()), TypeError, "weight: expected a floating dtype, got torch.int32"),
        ((X, 3, None, torch.ones(3).bool()), TypeError, "bias: expected a floating dtype, got torch.bool"),
        ((X, 2), ValueError, r"normalized_shape: expected the end of input's shape \(2, 3\), got \(2,\)"),
        ((X, ()), ValueError, r"normalized_shape: expected the end of .*, got \(\)"),
        ((X, (1, 2, 3)), ValueError, r"normalized_shape: expected the end of .*, got \(1, 2, 3\)"),
        ((torch.ones(()), 1), ValueError, r"normalized_shape: expected the end of input's shape \(\), got \(1,\)"),
        ((X, 3, torch.ones(2)), ValueError, r"weight: expected shape \(3,\) \(normalized_shape\), got \(2,\)"),
        ((X, 3, torch.ones(1, 3)), ValueError, r"weight: expected shape \(3,\) \(normalized_shape\), got \(1, 3\)"),
        ((X, (2, 3), None, torch.ones(3)), ValueError, r"bias: expected shape \(2, 3\) .*, got \(3,\)"),
        ((X, 3, torch.ones(3, device="meta")), ValueError, "weight: expected on cpu as input is, got meta"),
    ],
)
def test_errors(raises_before_anything_runs, arguments, error, message):
    raises_before_anything_runs(partial(ops.layer_norm, *arguments), error, message)
