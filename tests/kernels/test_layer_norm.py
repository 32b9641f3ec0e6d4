"""layer_norm and add_layer_norm on the Triton kernels: what the op tests don't reach."""

import os
from functools import partial

import eager
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("wants TRITON_INTERPRET=1", allow_module_level=True)

from accuracy import assert_op_close
from tensors import FLOATS, LAYOUTS, randn

import fastformer
from fastformer import ops, reference

WIDE = [1025, 2048, 2500]  # more columns than the interpreter's tiles: rows that go by in chunks


@pytest.fixture(autouse=True)
def triton():
    with fastformer.backend("triton", strict=True):
        yield


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", WIDE)
def test_wide_rows(dtype, columns):
    given = {"input": randn(35, columns, dtype=dtype), "residual": randn(35, columns, dtype=dtype)}
    given |= {"weight": randn(columns, dtype=dtype), "bias": randn(columns, dtype=dtype)}
    call = partial(ops.add_layer_norm, normalized_shape=columns, dropout_p=0.3)
    assert_op_close(call, partial(eager.add_layer_norm, dropout_p=0.3), given)


@pytest.mark.parametrize("columns", WIDE)
def test_mask_of_wide_rows(columns):
    torch.manual_seed(5)
    s = ops.add_layer_norm(torch.ones(20, columns), torch.zeros(20, columns), columns, dropout_p=0.5)[1]
    torch.manual_seed(5)
    kept = reference.row_dropout_mask(reference.draw_seed(s.device), 0.5, 20, columns)
    assert torch.equal(s, torch.where(kept, 2.0, 0.0))


@pytest.mark.parametrize("columns", [97, 128, 1500])
@pytest.mark.parametrize("value", [0.0, 3.3, -1e4, 1.1e6])
def test_constant_rows(columns, value):
    """Nothing but rounding errors deviates from the mean: the output is the bias."""
    x = torch.full((5, columns), value, requires_grad=True)
    weight, bias = randn(columns).requires_grad_(), randn(columns)
    output = ops.layer_norm(x, columns, weight, bias, eps=1e-12)
    assert torch.equal(output, bias.expand(5, columns))
    output.backward(torch.ones(5, columns))
    assert x.grad.isfinite().all() and not weight.grad.any()


@pytest.mark.parametrize("columns", [97, 1500])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_gradients(columns, layout):
    """Gradients come as views, too: expanded by a sum, or slices of wider ones."""
    x, residual = randn(20, columns).requires_grad_(), randn(20, columns).requires_grad_()
    weight = randn(columns).requires_grad_()
    outputs = ops.add_layer_norm(x, residual, columns, weight)
    given = randn(20, columns, layout=layout), randn(20, columns, layout=layout)
    gradients = torch.autograd.grad(outputs, (x, residual, weight), given, retain_graph=True)
    expected = torch.autograd.grad(outputs, (x, residual, weight), [g.contiguous() for g in given])
    assert all(torch.equal(g, e) for g, e in zip(gradients, expected, strict=True))


def test_rows_beyond_those_of_all_programs():
    """In the backward each program takes several tiles of rows in turn, the last one in part."""
    given = {"input": randn(333, 70), "weight": randn(70), "bias": randn(70)}
    assert_op_close(partial(ops.layer_norm, normalized_shape=70), eager.layer_norm, given)
