"""Elements beyond the 2^31st, in tensors whose rows lie far apart in a sparse file: the same bits as close together."""

from pathlib import Path

import pytest
import torch
from tensors import far_apart
from torch import Tensor

RAW = torch.ops.fastformer_cuda


@pytest.fixture(autouse=True)
def simulator(sim):
    pass


def assert_same_bits(op, given: dict[str, Tensor], name: str, dim: int, folder: Path) -> None:
    close = op(**given)
    far = op(**given | {name: far_apart(given[name], dim, folder)})
    assert all(torch.equal(x, y) for x, y in zip(close, far, strict=True))


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["sequence", "head", "row"])
@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_attention(name, dim, tmp_path):
    given = {key: torch.randn(3, 2, 3, 16).bfloat16() for key in ("query", "key", "value")}
    given["attn_mask"] = torch.randn(3, 2, 3, 3)
    options = (0.0, None, True, 0.3, -1, -1)

    def forward(query, key, value, attn_mask):
        return RAW.scaled_dot_product_attention(query, key, value, attn_mask, *options)

    output, lse = forward(**given)

    def backward(query, key, value, attn_mask):
        return RAW.scaled_dot_product_attention_backward(output, query, key, value, attn_mask, output, lse, *options)

    assert_same_bits(forward, given, name, dim, tmp_path)
    assert_same_bits(backward, given, name, dim, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["query", "key", "value", "grad_output"])
def test_varlen_attn(name, dtype, tmp_path):
    given = {key: torch.randn(5, 2, 16).to(dtype) for key in ("query", "key", "value", "grad_output")}
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    options = (bounds, bounds, 3, 3, 0.0, None, 0.3, -1, 0)

    def forward_and_backward(query, key, value, grad_output):
        output, lse = RAW.varlen_attn(query, key, value, *options)
        return output, *RAW.varlen_attn_backward(grad_output, query, key, value, output, lse, *options)

    assert_same_bits(forward_and_backward, given, name, 0, tmp_path)


@pytest.mark.parametrize("name", ["input", "residual", "grad_output", "grad_sum"])
def test_add_layer_norm(name, tmp_path):
    given = {key: torch.randn(4, 24) for key in ("input", "residual", "grad_output", "grad_sum")}
    weight, dropout = torch.randn(24), (0.1, torch.tensor(5))

    def forward_and_backward(input, residual, grad_output, grad_sum):
        output, total, mean, rstd = RAW.add_layer_norm(input, residual, weight, None, 1e-5, *dropout)
        backward = RAW.add_layer_norm_backward
        return output, *backward(grad_output, grad_sum, total, weight, mean, rstd, *dropout, torch.float32)

    assert_same_bits(forward_and_backward, given, name, 0, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("name", ["input", "weight", "residual", "grad_output"])
def test_linear(name, dim, dtype, tmp_path):
    depth = 24 if dim == 0 else 3
    shapes = {"input": (3, depth), "weight": (3, depth), "residual": (3, 3), "grad_output": (3, 3)}
    given = {key: torch.randn(shape).to(dtype) for key, shape in shapes.items()}

    def forward_and_backward(input, weight, residual, grad_output):
        output, pre_activation = RAW.linear(input, weight, None, "gelu", 0.0, None, residual, True)
        needs = (True, True, True)
        return output, *RAW.linear_backward(grad_output, input, weight, pre_activation, "gelu", 0.0, None, *needs)

    assert_same_bits(forward_and_backward, given, name, dim, tmp_path)


def test_sizes_that_are_refused():
    """Lengths of attention are 32-bit numbers: the message comes before anything of that size is allocated."""
    x = torch.ones(1, 1, 1, 8)
    long = x.expand(1, 1, 2**30, 8)
    for query, key in ((x, long), (long, x)):
        with pytest.raises(RuntimeError, match=r"takes sizes up to 2\^30 - 1, got 1073741824"):
            RAW.scaled_dot_product_attention(query, key, key, None, 0.0, None, False, 1.0, -1, -1)
