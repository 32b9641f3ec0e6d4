"""The matrix product for sm_90a: tiles, operand layouts, more steps than stages, split depths, and what it leaves to
the kernel of sm_80. The op tests run it where FASTFORMER_SIM has the word hopper."""

import pytest
import torch
from accuracy import assert_op_close
from test_cuda_matmul import HALVES, expected, fused, tensors, tiles

import fastformer
from fastformer import ops

BLOCK = (384, 1, 1)


@pytest.fixture(autouse=True)
def kernels(sim):
    sim.options().hopper = True
    with fastformer.backend("cuda", strict=True):
        yield


def products(sim) -> list:
    names = ("linear", "input_gradient", "weight_gradient")
    return [launch for launch in sim.launches() if launch.kernel.split()[1] in names]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [(264, 328, 136), (300, 392, 520), (72, 648, 40)])
def test_more_steps_than_stages_and_a_ragged_end_of_everything(sim, order, copies, dtype, size):
    """Forward, and backward, whose products are of other operand layouts; tiles of 128 and 256 columns."""
    assert_op_close(fused, expected, tensors(*size, dtype))
    assert all(launch.block == BLOCK and launch.wgmma for launch in products(sim))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [(300, 136, 264), (40, 72, 56), (520, 72, 264)])
def test_no_bank_conflicts(sim, dtype, size):
    """Of the product on its way to the epilogue; those of wgmma and TMA are not counted."""
    sim.options().count_conflicts = True
    given = {name: x.requires_grad_() for name, x in tensors(*size, dtype).items()}
    fused(**given).sum().backward()
    assert len(products(sim)) == 3
    assert [(launch.shared_wavefronts > 0, launch.bank_conflicts) for launch in products(sim)] == [(True, 0)] * 3


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "columns", "width"), [(40, 56, 128), (300, 264, 128), (500, 512, 256)])
def test_launches(sim, dtype, rows, columns, width):
    """A tile for each block, two products of 64 x `width` x 16 for each 16 of its depth, in steps of 64; each operand
    once for each tile that reads it."""
    depth = 160
    given = tensors(rows, depth, columns, dtype)
    with torch.no_grad():
        ops.linear(**given)
    (launch,) = sim.launches()
    assert launch.kernel == f"fastformer_cuda linear (rows {rows}, columns {columns}, depth {depth})"
    tiles_m, tiles_n = tiles(rows, 128), tiles(columns, width)
    assert launch.grid == (tiles_m * tiles_n, 1, 1) and launch.block == BLOCK
    assert launch.wgmma == tiles_m * tiles_n * 2 * 4 * tiles(depth, 64)
    assert launch.mma == launch.ldmatrix == 0
    assert launch.copied_bytes == 2 * depth * (tiles_n * rows + tiles_m * columns)


def test_more_rows_of_tiles_than_a_group(sim):
    """Tiles run in groups of 8 rows: here 9 rows of 3 tiles."""
    assert_op_close(fused, expected, tensors(9 * 128 - 3, 24, 264, torch.bfloat16))
    assert sim.launches()[0].grid == (27, 1, 1)


@pytest.mark.parametrize("dtype", HALVES)
def test_split_depth(sim, order, dtype):
    """One tile and a depth of 2,048 or more: each half of it is a block's, the parts are added in order."""
    assert_op_close(fused, expected, tensors(24, 2104, 32, dtype))
    found = [(launch.kernel.split("(")[0], launch.grid, launch.block) for launch in sim.launches()[:2]]
    assert found == [
        ("fastformer_cuda linear ", (1, 2, 1), BLOCK),
        ("fastformer_cuda add_splits ", (1, 1, 1), (128, 1, 1)),
    ]


@pytest.mark.parametrize("dtype", HALVES)
def test_orders_give_the_same_bits(sim, dtype):
    given = tensors(152, 2104, 136, dtype)
    results = []
    for order in (sim.Order.forward, sim.Order.reverse, sim.Order.random):
        options = sim.options()
        options.threads = options.blocks = order
        options.lazy_copies = order != sim.Order.forward
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        torch.manual_seed(1)
        output = fused(**leaves)
        results.append([output, *torch.autograd.grad(output.sum(), leaves.values())])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, from an address on that is not a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


@pytest.mark.parametrize(
    ("what", "change", "taken"),
    [
        ("as it is", lambda given: given, True),
        ("rows of a larger matrix", lambda given: given | {"input": given["input"].repeat(1, 2)[:, 72:]}, True),
        ("a weight by columns", lambda given: given | {"weight": given["weight"].t().contiguous().t()}, True),
        ("an address that is not aligned", lambda given: given | {"weight": shifted(given["weight"])}, False),
        (
            "rows from their second element on",
            lambda given: given | {"input": given["input"].repeat(1, 2)[:, 1:73]},
            False,
        ),
        ("a depth of 70", lambda given: {name: x[:, :70].contiguous() for name, x in given.items()}, False),
        ("the same row again and again", lambda given: given | {"input": given["input"][:1].expand(40, 72)}, False),
        ("float32", lambda given: {name: x.float() for name, x in given.items()}, False),
    ],
)
def test_what_tma_takes(sim, what, change, taken):
    """The rest is computed by the kernel for sm_80, to the same accuracy."""
    given = change({name: x for name, x in tensors(40, 72, 56, torch.bfloat16).items() if name in ("input", "weight")})
    assert_op_close(ops.linear, torch.nn.functional.linear, given)
    assert (sim.launches()[0].block == BLOCK) == taken
