"""What tests/ops does not reach of linear and feed_forward: every tile and operand layout with what each launch does,
every order of the threads, split products, the gradients of a bias over many rows."""

import eager
import pytest
import torch
from accuracy import assert_op_close

import fastformer
from fastformer import ops

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = FLOATS[1:]


@pytest.fixture(autouse=True)
def kernels(sim):
    with fastformer.backend("cuda", strict=True):
        yield


def tensors(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "input": torch.randn(rows, in_features).to(dtype),
        "weight": torch.randn(out_features, in_features).to(dtype) / in_features**0.5,
        "bias": torch.randn(out_features).to(dtype),
        "residual": torch.randn(rows, out_features).to(dtype),
    }


def fused(input, weight, bias, residual):
    return ops.linear(input, weight, bias, activation="gelu", dropout_p=0.1, residual=residual)


def expected(input, weight, bias, residual):
    return eager.linear(input, weight, bias, activation="gelu", dropout_p=0.1, residual=residual)


def tiles(size: int, tile: int) -> int:
    return -(-size // tile)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [(300, 136, 264), (200, 260, 136), (130, 131, 133)])
def test_four_steps_and_a_ragged_end_of_everything(order, copies, dtype, size):
    """Forward, and backward, whose products are of other operand layouts; large tiles of 16-bit numbers."""
    assert_op_close(fused, expected, tensors(*size, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [(300, 160, 264), (40, 160, 56), (130, 131, 133), (30, 70, 41)])
def test_no_bank_conflicts(sim, dtype, size):
    sim.options().count_conflicts = True
    given = {name: x.requires_grad_() for name, x in tensors(*size, dtype).items()}
    fused(**given).sum().backward()
    counted = [launch for launch in sim.launches() if launch.shared_wavefronts]
    products = {"linear", "input_gradient", "weight_gradient", "column_sums"}
    assert {launch.kernel.split()[1] for launch in counted} == products
    assert [launch.bank_conflicts for launch in counted] == [0] * len(counted)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "columns", "tile"), [(40, 56, 64), (300, 264, 128)])
def test_launches(sim, dtype, rows, columns, tile):
    """A tile for each block, an mma for each 16 x 8 x 16 of it, each operand once for each tile that reads it."""
    depth = 160
    given = tensors(rows, depth, columns, dtype)
    with torch.no_grad():
        ops.linear(**given)
    (launch,) = sim.launches()
    assert launch.kernel == f"fastformer_cuda linear (rows {rows}, columns {columns}, depth {depth})"
    tiles_m, tiles_n = tiles(rows, tile), tiles(columns, tile)
    assert launch.grid == (tiles_m * tiles_n, 1, 1) and launch.block == (128 if tile == 64 else 256, 1, 1)
    assert launch.mma == tiles_m * tiles_n * (tile // 16) * (tile // 8) * (depth // 16)
    assert launch.copied_bytes == 2 * depth * (tiles_n * rows + tiles_m * columns)


def test_more_rows_of_tiles_than_a_group(sim):
    """Tiles run in groups of 8 rows: here 9 rows of 3 small tiles."""
    assert_op_close(fused, expected, tensors(9 * 64 - 3, 20, 150, torch.float32))
    assert sim.launches()[0].grid == (27, 1, 1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_split_depth(sim, order, dtype):
    """One tile and a depth of 2,048 or more: each half of it is a block's, the parts are added in order."""
    given = tensors(20, 2100, 30, dtype)
    assert_op_close(fused, expected, given)
    found = [(launch.kernel.split("(")[0], launch.grid) for launch in sim.launches()[:2]]
    assert found == [("fastformer_cuda linear ", (1, 2, 1)), ("fastformer_cuda add_splits ", (1, 1, 1))]


@pytest.mark.parametrize("dtype", FLOATS)
def test_bias_gradient_of_many_rows(sim, dtype):
    given = tensors(1000, 3, 140, dtype)
    assert_op_close(fused, expected, given)
    assert [launch.grid for launch in sim.launches() if "column_sums" in launch.kernel] == [(2, 15, 1)]


@pytest.mark.parametrize("dtype", FLOATS)
def test_orders_give_the_same_bits(sim, dtype):
    given = tensors(150, 2100, 140, dtype)
    results = []
    for order in (sim.Order.forward, sim.Order.reverse, sim.Order.random):
        options = sim.options()
        options.threads = options.blocks = order
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        torch.manual_seed(1)
        output = fused(**leaves)
        results.append([output, *torch.autograd.grad(output.sum(), leaves.values())])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
def test_weight_by_columns_is_not_copied(recorder, dtype):
    """That of a transformers Conv1D, transposed: its columns are read as they are."""
    given = tensors(70, 64, 80, dtype)
    expected = ops.linear(**given)
    given["weight"] = given["weight"].t().contiguous().t()
    with recorder:
        found = ops.linear(**given)
    assert torch.equal(found, expected)
    assert recorder.names() == ["fastformer_cuda::linear"]


def test_opcheck():
    raw, seed = torch.ops.fastformer_cuda, torch.tensor(5)
    x, w1, w2 = torch.randn(4, 24), torch.randn(40, 24), torch.randn(16, 40)
    pre, grad = torch.randn(4, 40), torch.randn(4, 40)
    grad2, residual = torch.randn(4, 16), torch.randn(4, 16)
    needs = (True,) * 5
    for op, arguments in (
        (raw.linear, (x, w1, None, "gelu", 0.1, seed, None, True)),
        (raw.linear_backward, (grad, x, w1, pre, "gelu", 0.1, seed, True, True, False)),
        (raw.feed_forward, (x, w1, None, w2, None, "silu", 0.1, seed, 0.0, None, residual, True)),
        (raw.feed_forward_backward, (grad2, x, w1, w2, pre, "silu", 0.1, seed, 0.0, None, *needs)),
        (torch.ops.fastformer.linear, (x.clone().requires_grad_(), w1, None, None, 0.0, None, None, False, "cuda")),
    ):
        torch.library.opcheck(op.default, arguments)
