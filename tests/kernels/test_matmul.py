"""The matrix product: what the op tests don't reach, through the interpreter, and what it compiles to, without it."""

import os

import pytest
import torch
import triton
import triton.language as tl
from aot import compiling_for
from torch import Tensor

from fastformer import reference
from fastformer.kernels import matmul as module
from fastformer.kernels.activations import activation_and_slope
from fastformer.kernels.matmul import matmul

SIXTEEN = (torch.bfloat16, torch.float16)

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not _INTERPRETED, reason="wants TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(_INTERPRETED, reason="wants the compiler: no TRITON_INTERPRET")


@pytest.fixture
def launches(monkeypatch) -> list[tuple[bool, tuple]]:
    """(is it the persistent kernel?, its arguments) of each product."""
    noted = []

    class Noting:
        def __init__(self, key: tuple[bool, str], kernel) -> None:
            self.key, self.kernel = key, kernel

        def __getitem__(self, grid):
            noted.append((self.key[0], grid))
            return self.kernel[grid]

    monkeypatch.setattr(module, "KERNELS", {key: Noting(key, kernel) for key, kernel in module.KERNELS.items()})
    return noted


def operand(rows: int, columns: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    return (torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns)).to(dtype)


@interpreted
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_tma_reads_rows_and_columns(launches, dtype, a_transposed, b_transposed):
    """Several tiles for each program, the last ones ragged."""
    a, b = operand(136, 88, a_transposed, dtype), operand(88, 104, b_transposed, dtype)
    out = matmul(a, b)
    assert launches == [(True, (8,))]  # of 20 tiles
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=torch.finfo(dtype).eps, atol=1e-4)


@interpreted
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_both_schedules_agree(launches, dtype):
    """17 to the row: TMA can't read that."""
    a, wide, bias = operand(70, 17, False, dtype), operand(17, 24, True, dtype), torch.randn(24).to(dtype)
    padded = torch.zeros(70, 24, dtype=dtype)
    padded[:, :17] = a
    b = torch.zeros(24, 24, dtype=dtype).t()
    b[:17] = wide
    outs = [matmul(*operands, bias=bias, activation="gelu") for operands in ((padded, b), (a, wide))]
    assert [persistent for persistent, _ in launches] == [True, False]
    assert torch.equal(*outs)


@interpreted
@pytest.mark.parametrize("dtype", (torch.float32, *SIXTEEN))
@pytest.mark.parametrize("rows", [3, 20])
def test_split_depth(launches, dtype, rows):
    """The epilogue comes after the last part; ragged parts; row sums; the same bits in every run."""
    a, b = operand(rows, 1000, False, dtype) / 32, operand(1000, 40, True, dtype)
    bias, residual = torch.randn(40).to(dtype), torch.randn(rows, 40).to(dtype)
    sums, pre = torch.empty(rows, dtype=dtype), torch.empty(rows, 40, dtype=dtype)
    seed = torch.tensor(5)

    def product() -> Tensor:
        return matmul(
            a, b, bias=bias, activation="silu", dropout_p=0.3, seed=seed, residual=residual, pre_activation=pre,
            sums=sums,
        )  # fmt: skip

    out = product()
    assert launches[0][1][-1] > 1  # parts, or programs of the one tile
    wide = a.double() @ b.double() + bias.double()
    kept = reference.row_dropout_mask(seed, 0.3, rows, 40)
    expected = torch.where(kept, torch.nn.functional.silu(wide) / 0.7, 0.0) + residual.double()
    unit = torch.finfo(dtype).eps
    for got, exact in ((out, expected), (pre, wide), (sums, a.double().sum(1))):
        torch.testing.assert_close(got.double(), exact, rtol=unit, atol=8 * unit)
    assert torch.equal(product(), out)


@interpreted
def test_row_index_beyond_32_bits():
    """Dropout counts rows in 64 bits."""

    @triton.jit
    def keeps(out_ptr, seed_ptr, threshold, first_row):
        rows = first_row + tl.arange(0, 4).to(tl.int64)
        kept = module.row_dropout_keeps(seed_ptr, threshold, rows, 0, 64)
        tl.store(out_ptr + tl.arange(0, 4)[:, None] * 64 + tl.arange(0, 64)[None, :], kept.to(tl.int8))

    seed, first = torch.tensor(7), 2**32 - 2
    out = torch.empty(4, 64, dtype=torch.int8)
    keeps[(1,)](out, seed, reference.dropout_threshold(0.5), first)
    row = first + torch.arange(4)[:, None]
    expected = reference._kept(seed, 0.5, 64, row & 0xFFFFFFFF, row >> 32, 0)
    assert torch.equal(out.bool(), expected)


@triton.jit
def _apply(x_ptr, y_ptr, slope_ptr, ACTIVATION: tl.constexpr, COUNT: tl.constexpr):
    offsets = tl.arange(0, COUNT)
    y, slope = activation_and_slope(tl.load(x_ptr + offsets), ACTIVATION)
    tl.store(y_ptr + offsets, y)
    tl.store(slope_ptr + offsets, slope)


@interpreted
@pytest.mark.parametrize("activation", [a for a in reference.ACTIVATIONS if a])
def test_slopes(activation):
    """From one end of float32 to the other: exact near 0, nothing overflows, NaN stays."""
    ends = [1e38, -1e38, 3.4e38, -3.4e38, 1e19, -1e19, 100.0, -100.0, 1e-38, -1e-38, 0.0]
    x = torch.cat([torch.tensor([*ends, float("nan")]), torch.linspace(-12, 12, 256 - len(ends) - 1)])
    y, slope = torch.empty_like(x), torch.empty_like(x)
    _apply[(1,)](x, y, slope, activation, len(x))
    wide = x.double().requires_grad_()
    expected = reference.ACTIVATIONS[activation](wide)
    expected.sum().backward()
    for got, exact in ((y, expected.detach()), (slope, wide.grad)):
        assert got[len(ends)].isnan() == exact[len(ends)].isnan()
        finite = x.isfinite() & exact.isfinite()
        assert got[finite].isfinite().all()
        torch.testing.assert_close(got[finite].double(), exact[finite], rtol=1e-6, atol=1e-6)


def ptx(target: str, dtype: torch.dtype, columns: int = 128) -> str:
    with compiling_for(target) as kernels:
        matmul(torch.empty(256, columns, dtype=dtype), torch.empty(192, columns, dtype=dtype).t())
    return kernels[0].compiled.asm["ptx"]


@compiled
@pytest.mark.parametrize("target", ["sm_90", "sm_100", "sm_120"])
def test_operands_come_through_tma(target):
    assert "cp.async.bulk.tensor.2d" in ptx(target, torch.bfloat16)
    assert "cp.async.bulk.tensor" not in ptx(target, torch.bfloat16, columns=129)  # rows that are not aligned


@compiled
def test_sixteen_bytes_a_thread_without_tma():
    assert "cp.async.cg.shared.global [ " in ptx("sm_80", torch.bfloat16)


@compiled
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_float32_is_what_was_asked_for(target):
    exact = ptx(target, torch.float32)
    assert "fma.rn.f32" in exact and "mma." not in exact and "tf32" not in exact
    torch.set_float32_matmul_precision("high")
    try:
        assert "tf32" in ptx(target, torch.float32)
    finally:
        torch.set_float32_matmul_precision("highest")


@compiled
def test_compiled_once_for_any_number_of_rows():
    with compiling_for("sm_90") as kernels:
        for rows in (1000, 2048, 4097):
            matmul(torch.empty(rows, 4096, dtype=torch.bfloat16), torch.empty(4096, 4096, dtype=torch.bfloat16))
    assert len({kernel.hash for kernel in kernels}) == 1
