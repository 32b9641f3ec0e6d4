"""What tests/ops does not reach: widths to the largest, every order of the threads, what each launch does."""

import eager
import pytest
import torch
from accuracy import assert_op_close

import fastformer
from fastformer import ops, reference
from fastformer.backends import implementations

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 31, 512, 513, 1024, 1025, 2048, 4100, 8192, 8200, 16383, 16384)


@pytest.fixture(autouse=True)
def kernels(sim):
    with fastformer.backend("cuda", strict=True):
        yield


def tensors(rows: int, columns: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shapes = {"input": (rows, columns), "residual": (rows, columns), "weight": (columns,), "bias": (columns,)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def fused(input, residual, weight, bias):
    return ops.add_layer_norm(input, residual, input.shape[-1:], weight, bias, dropout_p=0.1)


def expected(input, residual, weight, bias):
    return eager.add_layer_norm(input, residual, weight, bias, dropout_p=0.1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", WIDTHS)
def test_widths(dtype, columns):
    if columns == 1:  # no variance: the outputs are the bias, compared by the op's own tests
        columns = 2
    assert_op_close(fused, expected, tensors(3, columns, dtype))


def test_largest_width_is_the_declared_one():
    most = {i.max_size for i in implementations() if i.backend == "cuda" and i.op.endswith("layer_norm")}
    assert most == {WIDTHS[-1]}
    with pytest.raises(RuntimeError, match="takes rows of up to 16384 columns, got 16385"):
        torch.ops.fastformer_cuda.layer_norm(torch.ones(2, 16385), None, None, 1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [96, 700, 2600])
def test_orders_give_the_same_bits(sim, dtype, columns):
    given = tensors(70, columns, dtype)
    results = []
    for order in (sim.Order.forward, sim.Order.reverse, sim.Order.random):
        options = sim.options()
        options.threads = options.blocks = order
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        torch.manual_seed(1)
        outputs = fused(**leaves)
        gradients = torch.autograd.grad([out.sum() for out in outputs], leaves.values())
        results.append([*outputs, *gradients])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_many_rows(sim):
    """The threads of the backward go from row to row."""
    given = tensors(6000, 8, torch.float32)
    assert_op_close(fused, expected, given)
    assert {launch.grid[0] for launch in sim.launches() if "backward" in launch.kernel} == {256}


def test_launches(sim):
    """Rows share a block while they have fewer than 4 warps; a wide row's gradients of weight and bias come apart."""
    input = torch.randn(10, 700, requires_grad=True)
    weight = torch.randn(700, requires_grad=True)
    ops.layer_norm(input, (700,), weight).sum().backward()
    found = [(launch.kernel.removeprefix("fastformer_cuda "), launch.grid, launch.block) for launch in sim.launches()]
    assert found == [
        ("layer_norm (rows 10, columns 700)", (5, 1, 1), (64, 2, 1)),
        ("layer_norm_backward (rows 10, columns 700)", (1, 1, 1), (64, 2, 1)),
        ("sum_groups (groups 2, columns 700)", (22, 2, 1), (32, 16, 1)),
    ]
    sim.clear_launches()
    ops.layer_norm(torch.randn(40, 4100, requires_grad=True), (4100,)).sum().backward()
    found = [(launch.kernel.removeprefix("fastformer_cuda "), launch.grid, launch.block) for launch in sim.launches()]
    assert found == [
        ("layer_norm (rows 40, columns 4100)", (40, 1, 1), (288, 1, 1)),
        ("layer_norm_backward (rows 40, columns 4100)", (10, 1, 1), (288, 1, 1)),
        ("layer_norm weights (rows 40, columns 4100)", (17, 2, 1), (256, 1, 1)),
        ("sum_groups (groups 2, columns 4100)", (129, 2, 1), (32, 16, 1)),
    ]


def test_mask_is_that_of_the_reference():
    for columns in (1, 15, 70, 520, 1030, 2100):
        for dtype in FLOATS:
            torch.manual_seed(5)
            s = ops.add_layer_norm(torch.ones(9, columns).to(dtype), torch.zeros(9, columns).to(dtype), columns,
                                   dropout_p=0.5)[1]  # fmt: skip
            torch.manual_seed(5)
            kept = reference.row_dropout_mask(reference.draw_seed(s.device), 0.5, 9, columns)
            assert torch.equal(s, torch.where(kept, 2.0, 0.0).to(dtype))


def test_opcheck():
    raw, seed = torch.ops.fastformer_cuda, torch.tensor(5)
    x, weight = torch.randn(4, 24), torch.randn(24)
    _, mean, rstd = raw.layer_norm(x, weight, None, 1e-5)
    for op, arguments in (
        (raw.layer_norm, (x, weight, None, 1e-5)),
        (raw.add_layer_norm, (x, x, weight, None, 1e-5, 0.1, seed)),
        (raw.layer_norm_backward, (x, x, weight, mean, rstd)),
        (raw.add_layer_norm_backward, (x, None, x, weight, mean, rstd, 0.1, seed, torch.bfloat16)),
        (torch.ops.fastformer.layer_norm, (x.clone().requires_grad_(), weight, None, 1e-5, "cuda")),
    ):
        torch.library.opcheck(op.default, arguments)
