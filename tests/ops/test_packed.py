"""The raw ops on packed weights, which swapped modules call: bit for bit the results of those that pack themselves."""

import pytest
import torch
from tensors import DTYPES, randn

from fastformer import library

pytestmark = pytest.mark.cpu_only
raw = torch.ops.fastformer_cpu
ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu", "silu")
SIZES = [(1, 1, 1), (7, 17, 15), (6, 65, 64), (33, 128, 130), (130, 40, 200)]  # rows, in, out


def linear(input, weight, bias, activation, residual):
    return raw.linear(input, weight, bias, activation, 0.0, None, residual, False)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_linear(isa, dtype, size):
    rows, in_features, out_features = size
    input, weight = randn(rows, in_features, dtype=dtype), randn(out_features, in_features, dtype=dtype)
    bias, residual = randn(out_features, dtype=dtype), randn(rows, out_features, dtype=dtype)
    for activation in ACTIVATIONS:
        for rest in ((bias, activation, residual), (None, activation, None)):
            packed = raw.packed_linear(input, raw.pack_weight(weight), out_features, *rest)
            assert torch.equal(packed, linear(input, weight, *rest))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 33, 250])
def test_feed_forward(isa, threads, dtype, rows):
    input, residual = randn(rows, 20, dtype=dtype), randn(rows, 24, dtype=dtype)
    weights = randn(70, 20, dtype=dtype), randn(24, 70, dtype=dtype)
    biases = randn(70, dtype=dtype), randn(24, dtype=dtype)
    first, second = (raw.pack_weight(weight) for weight in weights)
    packed = raw.packed_feed_forward(input, first, 70, biases[0], second, 24, biases[1], "gelu", residual)
    expected = raw.feed_forward(
        input, weights[0], biases[0], weights[1], biases[1], "gelu", 0.0, None, 0.0, None, residual, False
    )[0]
    assert torch.equal(packed, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_of_the_weight(isa, dtype):
    """Those of transformers' Conv1D are (in_features, out_features)."""
    for layout in ("transposed", "columns", "rows", "wider rows", "broadcast rows", "broadcast columns", "unaligned"):
        weight = randn(40, 33, dtype=dtype, layout=layout)
        packed = raw.pack_weight(weight)
        assert torch.equal(packed, raw.pack_weight(weight.contiguous()))
        assert raw.is_packed([weight], [1], [packed])


class TestIsPacked:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_edit_of_a_whole_matrix(self, isa, dtype):
        """Three of them in a row, as query, key and value: each is looked at."""
        weights = [randn(rows, 33, dtype=dtype) for rows in (40, 17, 40)]
        packed = raw.pack_weight(torch.cat(weights))
        assert raw.is_packed(weights, [len(weights)], [packed])
        for i, weight in enumerate(weights):
            edited = [*weights[:i], weight * 1.01, *weights[i + 1 :]]
            assert not raw.is_packed(edited, [len(edited)], [packed])

    def test_edit_of_a_low_rank(self):
        """As a merged LoRA: no element stays."""
        weight = randn(64, 48)
        packed = raw.pack_weight(weight)
        weight += 1e-3 * randn(64, 1) @ randn(1, 48)
        assert not raw.is_packed([weight], [1], [packed])

    def test_other_shapes_and_dtypes(self):
        weight = randn(40, 33)
        packed = raw.pack_weight(weight)
        assert not raw.is_packed([weight[:, :32]], [1], [packed])
        assert not raw.is_packed([torch.cat(100 * [weight])], [1], [packed])
        assert not raw.is_packed([weight.double()], [1], [packed])

    def test_not_a_number(self):
        weight = torch.full((4, 4), torch.nan)
        assert raw.is_packed([weight], [1], [raw.pack_weight(weight)])


class TestWrongPack:
    @pytest.fixture
    def packed(self):
        return raw.pack_weight(randn(40, 33))

    def test_dtype(self, packed):
        with pytest.raises(RuntimeError, match="pack it again"):
            raw.packed_linear(randn(2, 33, dtype=torch.float64), packed, 40, None, None, None)

    def test_out_features(self, packed):
        with pytest.raises(RuntimeError, match="pack it again"):
            raw.packed_linear(randn(2, 33), packed, 400, None, None, None)

    def test_in_features(self, packed):
        """It would read behind the rows of the input."""
        with pytest.raises(RuntimeError, match="pack it again"):
            raw.packed_linear(randn(2, 32), packed, 40, None, None, None)

    @pytest.mark.skipif(len(library.isas()) < 2, reason="one instruction set")
    def test_instruction_set(self, packed):
        before = library.isa()
        raw.set_isa("baseline")
        try:
            with pytest.raises(RuntimeError, match="pack it again"):
                raw.packed_linear(randn(2, 33), packed, 40, None, None, None)
        finally:
            raw.set_isa(before)
