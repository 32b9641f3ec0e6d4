from functools import partial

import eager
import pytest
import torch
from accuracy import assert_op_close, assert_strides_do_not_matter
from hypothesis import given
from hypothesis import strategies as st
from tensors import DTYPES, FLOATS, LAYOUTS, randn
from torch import Tensor
from torch.autograd import gradcheck

from fastformer import ops, reference

ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu", "silu")
# (rows, in_features, out_features): around tiles, panels of 8 to 64 columns and blocks of 128 in depth, and larger
SIZES = [
    (5, 7, 16),
    (7, 17, 15),
    (63, 65, 64),
    (16, 97, 63),
    (65, 768, 7),
    (97, 128, 129),
    (200, 260, 65),
    (6, 3072, 32),
]


def tensors(rows: int, in_features: int, out_features: int, dtype: torch.dtype, **layout: str) -> dict[str, Tensor]:
    return {
        "input": randn(rows, in_features, dtype=dtype, **layout),
        "weight": randn(out_features, in_features, dtype=dtype, **layout) / max(in_features, 1) ** 0.5,
        "bias": randn(out_features, dtype=dtype),
        "residual": randn(rows, out_features, dtype=dtype, **layout),
    }


def assert_linear_close(*draws: dict[str, Tensor | None], slack: int = 0, **options) -> None:
    assert_op_close(partial(ops.linear, **options), partial(eager.linear, **options), *draws, slack=slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(isa, dtype, size):
    assert_linear_close(tensors(*size, dtype), activation="gelu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 7, 1), (1, 1, 7), (7, 1, 1)])
def test_sizes_of_one(isa, dtype, size):
    assert_linear_close(*(tensors(*size, dtype) for _ in range(20)), activation="gelu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("left_out", [(), ("bias",), ("residual",), ("bias", "residual")])
def test_activations_and_optional_operands(isa, dtype, activation, left_out):
    assert_linear_close(tensors(33, 40, 50, dtype) | dict.fromkeys(left_out), activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(isa, activation):
    given = tensors(9, 16, 48, torch.float32) | {"bias": torch.linspace(-40, 40, 48)}
    assert_linear_close(given, activation=activation)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, dtype, layout):
    function = partial(ops.linear, activation="gelu", dropout_p=0.2)
    assert_strides_do_not_matter(function, tensors(30, 34, 38, dtype, layout=layout))


@pytest.mark.parametrize("leading", [(2, 3), (1, 4, 1), (2, 1, 3, 2)])
def test_leading_dimensions(leading):
    given = tensors(1, 12, 20, torch.float32) | {"input": randn(*leading, 12), "residual": randn(*leading, 20)}
    assert_linear_close(given, activation="silu")
    for layout in LAYOUTS:
        given |= {"input": randn(*leading, 12, layout=layout), "residual": randn(*leading, 20, layout=layout)}
        assert_strides_do_not_matter(partial(ops.linear, activation="silu"), given)


def test_permuted_heads():
    """What attention gives: (B, H, S, D) in memory, read as (B, S, H, D)."""
    given = tensors(1, 12, 20, torch.float32) | {"input": randn(2, 3, 4, 12).transpose(1, 2), "residual": None}
    assert_strides_do_not_matter(ops.linear, given)


def test_one_dimension():
    given = tensors(1, 12, 20, torch.float32)
    assert_linear_close(given | {"input": randn(12), "residual": randn(20)}, activation="relu")


@pytest.mark.parametrize("shape", [(20,), (1, 20), (3, 1), (4, 1, 20), (1, 1, 1), ()])
def test_residual_broadcasts(shape):
    given = tensors(1, 12, 20, torch.float32) | {"input": randn(4, 3, 12), "residual": randn(*shape)}
    assert_linear_close(given, activation="gelu")


def test_bias_of_any_stride():
    given = tensors(9, 12, 20, torch.float32)
    for bias in (randn(40)[::2], randn(1).expand(20)):
        assert_strides_do_not_matter(ops.linear, given | {"bias": bias})


@pytest.mark.parametrize("size", [(0, 7, 5), (3, 0, 5), (3, 7, 0), (0, 0, 0), (3, 0, 0)])
@pytest.mark.parametrize("left_out", [(), ("bias", "residual")])
def test_empty(size, left_out):
    assert_linear_close(tensors(*size, torch.float32) | dict.fromkeys(left_out), activation="gelu")
    with torch.no_grad():
        assert ops.linear(torch.randn(2, 0, 4), torch.randn(3, 4)).shape == (2, 0, 3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("residual_dtype", DTYPES)
def test_residual_of_another_dtype(dtype, residual_dtype):
    given = tensors(17, 24, 33, dtype) | {"residual": randn(17, 33, dtype=residual_dtype)}
    assert_linear_close(given, activation="gelu")
    with torch.no_grad():
        assert ops.linear(**given).dtype == torch.promote_types(dtype, residual_dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_accuracy(isa, dtype, p):
    assert_linear_close(tensors(37, 40, 130, dtype), activation="gelu", dropout_p=p)


@pytest.mark.cpu_only  # float64
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(isa, activation, p):
    given = [x.requires_grad_() for x in tensors(3, 4, 7, torch.float64).values()]
    given[2] = (given[2].detach() + 3).requires_grad_()  # relu: away from its kink

    def function(input, weight, bias, residual):
        torch.manual_seed(3)
        return ops.linear(input, weight, bias, activation=activation, dropout_p=p, residual=residual)

    assert gradcheck(function, given)


@pytest.mark.parametrize("wanted", ["input", "weight", "bias", "residual"])
def test_one_gradient_alone(wanted):
    given = tensors(5, 6, 7, torch.float32)
    given[wanted].requires_grad_()
    ops.linear(**given, activation="gelu").sum().backward()
    alone = given[wanted].grad
    for x in given.values():
        x.grad = None
        x.requires_grad_()
    ops.linear(**given, activation="gelu").sum().backward()
    assert torch.equal(alone, given[wanted].grad)


def test_relu_at_zero(isa):
    """The slope is 0 there, as in torch."""
    input = torch.zeros(3, 4, requires_grad=True)
    ops.linear(input, torch.randn(5, 4), activation="relu").sum().backward()
    assert not input.grad.any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays(isa, activation):
    given = tensors(9, 20, 30, torch.float32)
    clean = ops.linear(**given, activation=activation)
    given["input"][4, 7] = torch.nan
    output = ops.linear(**given, activation=activation)
    assert output[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(output[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinities_as_eager(isa, dtype, activation):
    """In float64: of float32 eager makes gelu(inf) NaN in vectors and inf where one number is left over."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([torch.inf, -torch.inf, largest, -largest, 80, -80, 0, -0.0], dtype=dtype)
    output = ops.linear(torch.ones(1, 1, dtype=dtype), x[:, None], activation=activation)[0]
    expected = eager.ACTIVATIONS[activation](x.double()).to(dtype)
    torch.testing.assert_close(output, expected, atol=0, rtol=4 * torch.finfo(dtype).eps, equal_nan=True)


@given(
    rows=st.lists(st.integers(0, 9), max_size=3),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(("contiguous", *LAYOUTS)),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    residual=st.sampled_from([None, "full", "row", "column"]),
)
def test_any_call(rows, in_features, out_features, dtype, layout, activation, bias, residual):
    torch.manual_seed(0)
    shape = (*rows, out_features)
    residual_shape = {"full": shape, "row": shape[-1:], "column": (*rows, 1)}.get(residual)
    given = {
        "input": randn(*rows, in_features, dtype=dtype, layout=layout if rows else "contiguous"),
        "weight": randn(out_features, in_features, dtype=dtype, layout=layout) / in_features**0.5,
        "bias": randn(out_features, dtype=dtype) if bias else None,
        "residual": randn(*residual_shape, dtype=dtype) if residual_shape else None,
    }
    assert_linear_close(given, activation=activation, slack=16)


class TestDropout:
    @pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
    @pytest.mark.parametrize("columns", [1, 15, 16, 63, 64, 65, 200])
    def test_mask_is_that_of_the_reference(self, isa, p, columns):
        ones = partial(ops.linear, torch.zeros(2, 35, 3), torch.zeros(columns, 3), torch.ones(columns), dropout_p=p)
        torch.manual_seed(5)
        output = ones().view(70, columns)
        torch.manual_seed(5)
        kept = reference.row_dropout_mask(reference.draw_seed(output.device), p, 70, columns)
        expected = torch.full((), 1 / (1 - p) if p < 1 else 0.0)  # ones, scaled
        assert torch.equal(output, torch.where(kept, expected, 0.0))

    def test_bits_at_the_threshold_are_kept(self, isa):
        torch.manual_seed(5)
        word = int(reference.philox4x32(reference.draw_seed(torch.device("cpu")), 0, 0, 0, 0)[0])
        for p, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
            torch.manual_seed(5)
            output = ops.linear(torch.ones(1, 1), torch.ones(1, 1), dropout_p=p)
            assert (output.item() != 0) is kept

    def test_seeds(self):
        call = partial(ops.linear, torch.ones(64, 1), torch.ones(64, 1), dropout_p=0.5)
        torch.manual_seed(5)
        first, second = call(), call()
        torch.manual_seed(5)
        assert torch.equal(call(), first)
        assert not torch.equal(first, second)

    def test_backward_has_the_same_mask(self, isa):
        input = torch.ones(40, 100, requires_grad=True)
        output = ops.linear(input, torch.eye(100), dropout_p=0.3)
        output.sum().backward()
        assert torch.equal(input.grad, output.detach())
        assert 0 < (output == 0).sum() < output.numel()

    def test_activation_comes_first(self):
        """gelu(dropout(x)) and dropout(gelu(x)) differ where x is scaled."""
        x = randn(40, 100)
        output = ops.linear(x, torch.eye(100), activation="gelu", dropout_p=0.5)
        kept = output != 0
        torch.testing.assert_close(output[kept], 2 * torch.nn.functional.gelu(x)[kept])

    def test_residual_is_not_dropped(self):
        input = torch.ones(8, 8, requires_grad=True)
        residual = randn(8, 8).requires_grad_()
        output = ops.linear(input, torch.eye(8), dropout_p=1.0, residual=residual)
        output.sum().backward()
        assert torch.equal(output, residual)
        assert torch.equal(input.grad, torch.zeros(8, 8)) and torch.equal(residual.grad, torch.ones(8, 8))


X, W, B = torch.ones(2, 3), torch.ones(5, 3), torch.ones(5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], W), {}, TypeError, "input: expected a Tensor, got list"),
        ((X.long(), W), {}, TypeError, "input: expected a floating dtype, got torch.int64"),
        ((X, W.int()), {}, TypeError, "weight: expected a floating dtype, got torch.int32"),
        ((X, W.bfloat16()), {}, TypeError, "weight: expected torch.float32 as input has, got torch.bfloat16"),
        ((X, W, B.double()), {}, TypeError, "bias: expected torch.float32 as input has, got torch.float64"),
        ((X, W, B.to("meta")), {}, ValueError, "bias: expected on cpu as input is, got meta"),
        (
            (X, W),
            {"residual": torch.ones(2, 5).int()},
            TypeError,
            "residual: expected a floating dtype, got torch.int32",
        ),
        ((torch.ones(()), W), {}, ValueError, r"input: expected \(\.\.\., in_features\)"),
        ((X, W.t()), {}, ValueError, r"weight: expected \(out_features, 3\) .*, got \(3, 5\)"),
        ((X, B), {}, ValueError, r"weight: expected \(out_features, 3\) .*, got \(5,\)"),
        ((X, W[None]), {}, ValueError, r"weight: expected .*, got \(1, 5, 3\)"),
        ((X, W, B[:4]), {}, ValueError, r"bias: expected shape \(5,\) .*, got \(4,\)"),
        ((X, W, B[None]), {}, ValueError, r"bias: expected shape \(5,\) .*, got \(1, 5\)"),
        ((X, W), {"activation": "GELU"}, ValueError, "activation: expected one of None, 'gelu', .*, got 'GELU'"),
        ((X, W), {"dropout_p": -0.1}, ValueError, "dropout_p: expected a probability from 0 to 1, got -0.1"),
        ((X, W), {"dropout_p": 1.5}, ValueError, "dropout_p: expected a probability from 0 to 1, got 1.5"),
        ((X, W), {"dropout_p": float("nan")}, ValueError, "dropout_p: expected a probability from 0 to 1, got nan"),
        ((X, W), {"residual": torch.ones(3, 5)}, ValueError, r"residual: expected .* \(2, 5\), got \(3, 5\)"),
        ((X, W), {"residual": torch.ones(4, 2, 5)}, ValueError, r"residual: expected .* \(2, 5\), got \(4, 2, 5\)"),
    ],
)
def test_errors(raises_before_anything_runs, arguments, options, error, message):
    raises_before_anything_runs(partial(ops.linear, *arguments, **options), error, message)
