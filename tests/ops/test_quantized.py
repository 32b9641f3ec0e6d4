"""The raw ops on 8-bit weights: exact sums of what was rounded, the same on every instruction set."""

import pytest
import torch
from tensors import FLOATS, randn
from torch import Tensor

from fastformer import library, reference

pytestmark = pytest.mark.cpu_only
raw = torch.ops.fastformer_cpu
ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu", "silu")
# rows, in, out: one and many tiles, blocks and panels, with and without a rest
SIZES = [(1, 1, 1), (7, 17, 15), (6, 65, 64), (17, 128, 130), (33, 600, 70), (200, 1100, 65), (300, 3000, 33)]
GROUP = 768  # depths with a scale and a zero of their own


def quantized_rows(x: Tensor) -> Tensor:
    """x as its 8 bits see it, in float64."""
    return torch.cat([quantized_group(group) for group in x.split(GROUP, -1)], -1)


def quantized_group(x: Tensor) -> Tensor:
    """scale * (value - zero), with 0 among the values."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    inverse = torch.where(high > low, 255 / (high - low), 0)
    zero = (-low * inverse).round()
    value = ((x * inverse).double() + zero).round().clamp(0, 255)
    return (value - zero) * ((high - low) / 255).double()


def quantized_columns(weight: Tensor) -> Tensor:
    largest = weight.abs().amax(-1, keepdim=True)
    value = (weight * torch.where(largest > 0, 127 / largest, 0)).round()
    return value.double() * (largest / 127).double()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_linear(int8_isa, threads, dtype, size):
    """Within the roundings of float of the exact product of the rounded values."""
    rows, in_features, out_features = size
    input, weight = randn(rows, in_features, dtype=dtype), randn(out_features, in_features, dtype=dtype)
    bias, residual = randn(out_features, dtype=dtype), randn(rows, out_features, dtype=dtype)
    product = quantized_rows(input.float()) @ quantized_columns(weight.float()).T
    for activation in ACTIVATIONS:
        output = raw.packed_linear(input, raw.quantize_weight(weight), out_features, bias, activation, residual)
        exact = reference.ACTIVATIONS[activation](product + bias) + residual
        # A value halfway between two may go either way: in one of a row's products.
        step = (input.float().abs().max() * weight.float().abs().max() * 2 / 255).item()
        error, unit = (output.double() - exact).abs(), torch.finfo(dtype).eps
        assert error.max() <= 2 * step + 4 * unit * exact.abs().max()
        assert error.mean() <= (2 * unit + 1e-6) * exact.abs().max()


@pytest.mark.parametrize("size", SIZES)
def test_same_sums_everywhere(size):
    """Bit for bit, on every instruction set, with one thread and with two."""
    rows, in_features, out_features = size
    input, weight, bias = randn(rows, in_features), randn(out_features, in_features), randn(out_features)
    before, outputs, packed = library.isa(), [], []
    for isa in library.isas():
        raw.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            packed.append(raw.quantize_weight(weight))
            outputs.append(raw.packed_linear(input, packed[-1], out_features, bias, None, None))
    raw.set_isa(before)
    assert all(torch.equal(x, packed[0]) for x in packed)
    assert all(torch.equal(x, outputs[0]) for x in outputs)


def test_rows_do_not_depend_on_one_another(int8_isa):
    input, packed = randn(50, 130), raw.quantize_weight(randn(70, 130))
    together = raw.packed_linear(input, packed, 70, None, None, None)
    one_by_one = [raw.packed_linear(row[None], packed, 70, None, None, None) for row in input]
    assert torch.equal(together, torch.cat(one_by_one))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 33, 250])
@pytest.mark.parametrize("features", [70, 1500, 1600])
def test_feed_forward(int8_isa, threads, dtype, rows, features):
    """As two products, the hidden activation in float between them: in one, two or three groups."""
    input, residual = randn(rows, 20, dtype=dtype), randn(rows, 24, dtype=dtype)
    weights, biases = (randn(features, 20, dtype=dtype), randn(24, features, dtype=dtype)), (randn(features), randn(24))
    first, second = (raw.quantize_weight(weight) for weight in weights)
    output = raw.packed_feed_forward(input, first, features, biases[0], second, 24, biases[1], "gelu", residual)
    hidden = raw.packed_linear(input.float(), first, features, biases[0], "gelu", None)
    expected = raw.packed_linear(hidden, second, 24, biases[1], None, residual.float())
    assert torch.equal(output, expected.to(dtype))


def test_error_is_that_of_8_bits(int8_isa):
    """Of normal numbers: each rounding adds about 1/255 of a row's range, over sqrt(12), and they add up as noise."""
    input, weight = randn(64, 768), randn(96, 768)
    output = raw.packed_linear(input, raw.quantize_weight(weight), 96, None, None, None)
    exact = input.double() @ weight.double().T
    assert (output - exact).norm() / exact.norm() < 0.015


class TestSpecialValues:
    def test_zeros(self, int8_isa):
        input, weight = randn(9, 40), randn(11, 40)
        input[2], weight[5], bias = 0, 0, randn(11)
        output = raw.packed_linear(input, raw.quantize_weight(weight), 11, bias, None, None)
        assert torch.equal(output[2], bias) and torch.equal(output[:, 5], bias[5].expand(9))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_not_finite(self, int8_isa, value):
        """Its row, or its column, is NaN; no other is touched."""
        input, weight = randn(9, 40), randn(11, 40)
        clean = raw.packed_linear(input, raw.quantize_weight(weight), 11, None, None, None)
        bad_input, bad_weight = input.clone(), weight.clone()
        bad_input[3, 39], bad_weight[10, 0] = value, value
        rows = raw.packed_linear(bad_input, raw.quantize_weight(weight), 11, None, None, None)
        columns = raw.packed_linear(input, raw.quantize_weight(bad_weight), 11, None, None, None)
        others = [i for i in range(9) if i != 3]
        assert rows[3].isnan().all() and torch.equal(rows[others], clean[others])
        assert columns[:, 10].isnan().all() and torch.equal(columns[:, :10], clean[:, :10])

    @pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e20, 1e37])
    def test_far_from_one(self, int8_isa, scale):
        input, packed = randn(5, 64), raw.quantize_weight(randn(6, 64))
        output = raw.packed_linear(input * scale, packed, 6, None, None, None)
        expected = raw.packed_linear(input, packed, 6, None, None, None)
        if scale == 1e-37:  # below 2^-110 of a largest value a row counts as 0
            assert not output.any()
        else:
            torch.testing.assert_close(output / scale, expected, rtol=1e-5, atol=2e-2)

    @pytest.mark.parametrize("size", [(0, 5, 6), (3, 0, 6), (3, 5, 0), (0, 0, 0)])
    def test_empty(self, int8_isa, size):
        rows, in_features, out_features = size
        packed = raw.quantize_weight(torch.empty(out_features, in_features))
        output = raw.packed_linear(torch.empty(rows, in_features), packed, out_features, None, None, None)
        assert output.shape == (rows, out_features) and not output.any()

    def test_largest_sums(self, int8_isa):
        """65,536 products of the largest values fit into 32 bits."""
        input, weight = torch.ones(2, 65536), torch.ones(3, 65536)
        output = raw.packed_linear(input, raw.quantize_weight(weight), 3, None, None, None)
        torch.testing.assert_close(output, torch.full((2, 3), 65536.0), rtol=1e-6, atol=0)
        with pytest.raises(RuntimeError, match="at most 65536 in_features"):
            raw.quantize_weight(torch.ones(1, 65537))


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_layout_of_the_weight(dtype):
    for layout in ("transposed", "columns", "rows", "wider rows", "broadcast rows", "broadcast columns", "unaligned"):
        weight = randn(40, 33, dtype=dtype, layout=layout)
        packed = raw.quantize_weight(weight)
        assert torch.equal(packed, raw.quantize_weight(weight.contiguous()))
        assert raw.is_packed([weight], [1], [packed])


@pytest.mark.parametrize("dtype", FLOATS)
def test_is_packed(dtype):
    """Also an edit too small to move any 8-bit value is seen."""
    weights = [randn(rows, 33, dtype=dtype) for rows in (40, 17, 70)]
    packed = raw.quantize_weight(torch.cat(weights))
    assert raw.is_packed(weights, [len(weights)], [packed])
    for i in range(3):
        edited = list(weights)
        edited[i] = torch.nextafter(weights[i], torch.full_like(weights[i], torch.inf))
        assert not raw.is_packed(edited, [len(edited)], [packed])
    assert not raw.is_packed(weights[:2], [2], [raw.quantize_weight(randn(57, 34, dtype=dtype))])


def test_packed_for_another_product():
    packed = raw.quantize_weight(randn(70, 40))
    for input, out_features in ((randn(3, 140), 70), (randn(3, 40), 140), (randn(3, 40).double(), 70)):
        with pytest.raises(RuntimeError, match="quantized for another shape, or for float64"):
            raw.packed_linear(input, packed, out_features, None, None, None)
