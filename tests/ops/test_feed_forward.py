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
# (rows, in_features, hidden_features, out_features): around tiles, panels and row blocks (96), and larger
SIZES = [(7, 16, 17, 63), (63, 65, 64, 7), (97, 17, 65, 16), (96, 32, 128, 32), (5, 96, 768, 97), (200, 40, 97, 65)]


def tensors(
    rows: int, in_features: int, hidden: int, out_features: int, dtype: torch.dtype, **layout: str
) -> dict[str, Tensor]:
    return {
        "input": randn(rows, in_features, dtype=dtype, **layout),
        "weight1": randn(hidden, in_features, dtype=dtype, **layout) / max(in_features, 1) ** 0.5,
        "bias1": randn(hidden, dtype=dtype),
        "weight2": randn(out_features, hidden, dtype=dtype, **layout) / max(hidden, 1) ** 0.5,
        "bias2": randn(out_features, dtype=dtype),
        "residual": randn(rows, out_features, dtype=dtype, **layout),
    }


def assert_feed_forward_close(*draws: dict[str, Tensor | None], slack: int = 0, **options) -> None:
    assert_op_close(partial(ops.feed_forward, **options), partial(eager.feed_forward, **options), *draws, slack=slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(isa, dtype, size):
    assert_feed_forward_close(tensors(*size, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (1, 7, 1, 7), (1, 1, 7, 1), (7, 1, 1, 1)])
def test_sizes_of_one(isa, dtype, size):
    assert_feed_forward_close(*(tensors(*size, dtype) for _ in range(20)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [7, 97, 250])
def test_threads(threads, dtype, rows):
    """Few rows share each product, many are divided in blocks."""
    assert_feed_forward_close(tensors(rows, 48, 192, 40, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("left_out", [(), ("bias1",), ("bias2",), ("residual",), ("bias1", "bias2", "residual")])
def test_activations_and_optional_operands(isa, dtype, activation, left_out):
    given = tensors(33, 20, 70, 24, dtype) | dict.fromkeys(left_out)
    assert_feed_forward_close(given, activation=activation)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, dtype, layout):
    function = partial(ops.feed_forward, hidden_dropout_p=0.1, dropout_p=0.2)
    assert_strides_do_not_matter(function, tensors(30, 34, 70, 38, dtype, layout=layout))


@pytest.mark.parametrize("leading", [(2, 3), (1, 4, 1), (2, 1, 3, 2)])
def test_leading_dimensions(leading):
    given = tensors(1, 12, 30, 20, torch.float32) | {"input": randn(*leading, 12), "residual": randn(*leading, 20)}
    assert_feed_forward_close(given)
    for layout in LAYOUTS:
        given |= {"input": randn(*leading, 12, layout=layout), "residual": randn(*leading, 20, layout=layout)}
        assert_strides_do_not_matter(ops.feed_forward, given)


def test_one_dimension():
    given = tensors(1, 12, 30, 20, torch.float32) | {"input": randn(12), "residual": randn(20)}
    assert_feed_forward_close(given)


@pytest.mark.parametrize("shape", [(20,), (3, 1), (4, 1, 20), ()])
def test_residual_broadcasts(shape):
    given = tensors(1, 12, 30, 20, torch.float32) | {"input": randn(4, 3, 12), "residual": randn(*shape)}
    assert_feed_forward_close(given)


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("left_out", [(), ("bias1", "bias2", "residual")])
def test_empty(size, left_out):
    assert_feed_forward_close(tensors(*size, torch.float32) | dict.fromkeys(left_out))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("residual_dtype", DTYPES)
def test_residual_of_another_dtype(dtype, residual_dtype):
    given = tensors(17, 24, 40, 33, dtype) | {"residual": randn(17, 33, dtype=residual_dtype)}
    assert_feed_forward_close(given)
    with torch.no_grad():
        assert ops.feed_forward(**given).dtype == torch.promote_types(dtype, residual_dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("hidden_p", "p"), [(0.1, 0.0), (0.0, 0.1), (0.5, 0.3), (1.0, 0.5)])
def test_dropout_accuracy(isa, dtype, hidden_p, p):
    assert_feed_forward_close(tensors(37, 20, 130, 40, dtype), hidden_dropout_p=hidden_p, dropout_p=p)


@pytest.mark.cpu_only  # float64
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("hidden_p", "p"), [(0.0, 0.0), (0.4, 0.2)])
def test_gradcheck(isa, activation, hidden_p, p):
    given = tensors(3, 4, 6, 5, torch.float64)
    given["bias1"] += 3  # relu: away from its kink

    def function(*inputs):
        torch.manual_seed(3)
        named = dict(zip(given, inputs, strict=True))
        return ops.feed_forward(**named, activation=activation, hidden_dropout_p=hidden_p, dropout_p=p)

    assert gradcheck(function, [x.requires_grad_() for x in given.values()])


@pytest.mark.parametrize("wanted", ["input", "weight1", "bias1", "weight2", "bias2", "residual"])
def test_one_gradient_alone(wanted):
    given = tensors(5, 6, 7, 8, torch.float32)
    given[wanted].requires_grad_()
    ops.feed_forward(**given).sum().backward()
    alone = given[wanted].grad
    for x in given.values():
        x.grad = None
        x.requires_grad_()
    ops.feed_forward(**given).sum().backward()
    assert torch.equal(alone, given[wanted].grad)


def test_nan_stays(isa):
    given = tensors(9, 20, 40, 30, torch.float32)
    clean = ops.feed_forward(**given)
    given["input"][4, 7] = torch.nan
    output = ops.feed_forward(**given)
    assert output[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(output[others], clean[others])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinities_as_eager(isa, activation):
    """In float64: see test_linear."""
    input = torch.tensor([[torch.inf], [-torch.inf], [3e38], [-3e38]])
    output = ops.feed_forward(input, torch.ones(1, 1), None, torch.ones(1, 1), None, activation=activation)
    expected = eager.ACTIVATIONS[activation](input.double()).float()
    torch.testing.assert_close(output, expected, equal_nan=True)


@given(
    rows=st.lists(st.integers(0, 9), max_size=3),
    features=st.tuples(st.integers(1, 70), st.integers(1, 140), st.integers(1, 70)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(("contiguous", *LAYOUTS)),
    activation=st.sampled_from(ACTIVATIONS),
    left_out=st.sets(st.sampled_from(["bias1", "bias2", "residual"])),
)
def test_any_call(rows, features, dtype, layout, activation, left_out):
    torch.manual_seed(0)
    given = tensors(2, *features, dtype, layout=layout)
    given["input"] = randn(*rows, features[0], dtype=dtype, layout=layout if rows else "contiguous")
    given["residual"] = randn(*rows, features[2], dtype=dtype)
    assert_feed_forward_close(given | dict.fromkeys(left_out), activation=activation, slack=16)


class TestDropout:
    @pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
    @pytest.mark.parametrize("hidden_p", [0.0, 0.1, 0.5])
    def test_masks_are_those_of_the_reference(self, isa, hidden_p, p):
        """The hidden activation is 1, the second product the identity."""
        rows, columns = 130, 70
        torch.manual_seed(5)
        output = ops.feed_forward(
            torch.zeros(rows, 3), torch.zeros(columns, 3), torch.ones(columns), torch.eye(columns), None,
            activation=None, hidden_dropout_p=hidden_p, dropout_p=p,
        )  # fmt: skip
        torch.manual_seed(5)
        expected = torch.ones(rows, columns)
        for probability in (hidden_p, p):
            if probability:
                seed = reference.draw_seed(output.device)
                kept = reference.row_dropout_mask(seed, probability, rows, columns)
                expected *= kept * (torch.tensor(1 / (1 - probability)) if probability < 1 else 0.0)
        assert torch.equal(output, expected)

    def test_backward_has_the_same_masks(self, isa):
        """With an identity for each product, the output and the gradient are both masks times their scales."""
        input = torch.ones(40, 100, requires_grad=True)
        output = ops.feed_forward(
            input, torch.eye(100), None, torch.eye(100), None, activation=None, hidden_dropout_p=0.3, dropout_p=0.2
        )
        output.sum().backward()
        torch.testing.assert_close(input.grad, output.detach(), rtol=1e-6, atol=0)
        assert torch.equal(input.grad == 0, output == 0) and 0 < (output == 0).sum() < output.numel()

    def test_seeds(self):
        given = tensors(20, 8, 16, 32, torch.float32)
        call = partial(ops.feed_forward, **given, hidden_dropout_p=0.5, dropout_p=0.5)
        torch.manual_seed(5)
        first, second = call(), call()
        torch.manual_seed(5)
        assert torch.equal(call(), first)
        assert not torch.equal(first, second)


GIVEN = {
    "input": torch.ones(2, 3),
    "weight1": torch.ones(5, 3),
    "bias1": torch.ones(5),
    "weight2": torch.ones(4, 5),
    "bias2": torch.ones(4),
}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "input: expected a Tensor, got list"),
        ({"input": torch.ones(2, 3).int()}, TypeError, "input: expected a floating dtype, got torch.int32"),
        ({"weight1": torch.ones(5, 3).half()}, TypeError, "weight1: expected torch.float32 as input has"),
        ({"bias1": torch.ones(5).half()}, TypeError, "bias1: expected torch.float32 as input has, got torch.float16"),
        ({"weight2": torch.ones(4, 5).double()}, TypeError, "weight2: expected torch.float32 as input has"),
        ({"bias2": torch.ones(4).bfloat16()}, TypeError, "bias2: expected torch.float32 as input has"),
        ({"residual": torch.ones(2, 4).bool()}, TypeError, "residual: expected a floating dtype, got torch.bool"),
        ({"weight2": torch.ones(4, 5, device="meta")}, ValueError, "weight2: expected on cpu as input is, got meta"),
        ({"input": torch.ones(())}, ValueError, r"input: expected \(\.\.\., in_features\)"),
        ({"weight1": torch.ones(3, 5)}, ValueError, r"weight1: expected \(out_features, 3\) .*, got \(3, 5\)"),
        ({"weight2": torch.ones(5, 4)}, ValueError, r"weight2: expected \(out_features, 5\) .*, got \(5, 4\)"),
        ({"bias1": torch.ones(4)}, ValueError, r"bias1: expected shape \(5,\) .*, got \(4,\)"),
        ({"bias2": torch.ones(5)}, ValueError, r"bias2: expected shape \(4,\) .*, got \(5,\)"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of .*, got 'tanh'"),
        ({"dropout_p": 2}, ValueError, "dropout_p: expected a probability from 0 to 1, got 2"),
        ({"hidden_dropout_p": -1}, ValueError, "hidden_dropout_p: expected a probability from 0 to 1, got -1"),
        ({"residual": torch.ones(3, 4)}, ValueError, r"residual: expected .* \(2, 4\), got \(3, 4\)"),
    ],
)
def test_errors(raises_before_anything_runs, wrong, error, message):
    raises_before_anything_runs(partial(ops.feed_forward, **GIVEN | wrong), error, message)
