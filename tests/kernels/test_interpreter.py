"""The mended interpreter computes what torch computes."""

import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("wants TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

SIXTEEN = (torch.bfloat16, torch.float16)
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.3e38, -3.3e38, 1e-40, 65504.0, 1.0]


def numbers(dtype: torch.dtype, count: int = 256) -> Tensor:
    return torch.cat([torch.tensor(SPECIAL), torch.randn(count - len(SPECIAL)) * 3]).to(dtype)


def same(out: Tensor, expected: Tensor) -> None:
    assert out.dtype == expected.dtype
    assert torch.equal(out.nan_to_num(nan=12345), expected.nan_to_num(nan=12345))
    assert torch.equal(out.isnan(), expected.isnan())


@triton.jit
def add(x, y):
    return x + y


@triton.jit
def subtract(x, y):
    return x - y


@triton.jit
def multiply(x, y):
    return x * y


@triton.jit
def divide(x, y):
    return (x / y).to(x.dtype)


@triton.jit
def negate(x, y):
    return -x


@triton.jit
def absolute(x, y):
    return tl.abs(x)


@triton.jit
def largest(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def select(x, y):
    return tl.where(x < y, x, y)


@triton.jit
def compare(x, y):
    return tl.where(x >= y, 1.0, 0.0) + tl.where(x == y, 2.0, 0.0) + tl.where(x != y, 4.0, 0.0)


@triton.jit
def chain(x, y):
    return x * y + x - y * 0.3


@triton.jit
def exponential(x, y):
    return tl.exp(x.to(tl.float32)).to(x.dtype)


OPERATIONS = [
    (add, lambda x, y: x + y),
    (subtract, lambda x, y: x - y),
    (multiply, lambda x, y: x * y),
    (divide, lambda x, y: x / y),
    (negate, lambda x, y: -x),
    (absolute, lambda x, y: x.abs()),
    (largest, torch.maximum),
    (select, lambda x, y: torch.where(x < y, x, y)),
    (compare, lambda x, y: ((x >= y) * 1.0 + (x == y) * 2.0 + (x != y) * 4.0).to(x.dtype)),
    (chain, lambda x, y: x * y + x - y * torch.tensor(0.3).to(y.dtype)),
    (exponential, lambda x, y: x.float().exp().to(x.dtype)),
]


@triton.jit
def elementwise_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr, function: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, function(tl.load(x_ptr + i), tl.load(y_ptr + i)))


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("function, expected", OPERATIONS, ids=[function.fn.__name__ for function, _ in OPERATIONS])
def test_elementwise(function, expected, dtype):
    x, y = numbers(dtype), numbers(dtype).flip(0)
    out = torch.empty_like(x)
    elementwise_kernel[(1,)](x, y, out, x.numel(), function)
    same(out, expected(x, y))


@triton.jit
def cast_kernel(x_ptr, out_ptr, through: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x if through is None else x.to(through))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_casts_of_floats(source, target):
    """Ties, halves above and below, the largest and the smallest numbers; by a store and by .to()."""
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-8 - 2**-20, 1 + 2**-11, 1 + 3 * 2**-11])
    x = torch.cat([numbers(torch.float32, 250), ties]).to(source)
    for through in (None, {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[target]):
        out = torch.empty(256, dtype=target)
        cast_kernel[(1,)](x, out, through, 256)
        same(out, x.to(target))


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_casts_of_integers(dtype):
    x = torch.arange(-300, 212, dtype=torch.int32)
    out = torch.empty(512, dtype=dtype)
    cast_kernel[(1,)](x, out, None, 512)
    same(out, x.to(dtype))
    back = torch.empty(512, dtype=torch.int32)
    cast_kernel[(1,)](out, back, None, 512)
    same(back, out.to(torch.int32))


@triton.jit
def bits_kernel(x_ptr, out_ptr, back_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    bits = x.to(tl.int16, bitcast=True)
    tl.store(out_ptr + i, bits)
    tl.store(back_ptr + i, bits.to(x.dtype, bitcast=True))


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_bits(dtype):
    x = torch.randn(64).to(dtype)
    bits, back = torch.empty(64, dtype=torch.int16), torch.empty_like(x)
    bits_kernel[(1,)](x, bits, back, 64)
    same(bits, x.view(torch.int16))
    same(back, x)


@triton.jit
def reduce_kernel(x_ptr, sum_ptr, max_ptr, argmax_ptr, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * COLUMNS + tl.arange(0, COLUMNS))
    tl.store(sum_ptr + row, tl.sum(x, 0))
    tl.store(max_ptr + row, tl.max(x, 0))
    tl.store(argmax_ptr + row, tl.argmax(x, 0))


def test_reductions():
    """A sum of bfloat16 is one of float32, rounded once; tl.max drops NaN, as it does on a GPU."""
    x = torch.randn(4, 128).bfloat16()
    x[1, 3] = float("nan")
    total, largest, where = torch.empty(4).bfloat16(), torch.empty(4).bfloat16(), torch.empty(4, dtype=torch.int32)
    reduce_kernel[(4,)](x, total, largest, where, 128)
    torch.testing.assert_close(total, x.float().sum(1).bfloat16(), rtol=2**-8, atol=0, equal_nan=True)
    without_nan = x.nan_to_num(nan=-float("inf"))
    same(largest, without_nan.amax(1))
    same(where, without_nan.argmax(1).int())


@triton.jit
def dot_kernel(x_ptr, y_ptr, out_ptr, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    offsets = i[:, None] * SIZE + i[None, :]
    out = tl.dot(tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), input_precision=PRECISION)
    tl.store(out_ptr + offsets, out)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_dot_accumulates_in_float32(dtype):
    x, y = torch.randn(2, 64, 64).to(dtype)
    out = torch.empty(64, 64)
    dot_kernel[(1,)](x, y, out, "ieee", 64)
    assert (out.double() - x.double() @ y.double()).abs().max() < 1e-4


@pytest.mark.parametrize(
    "precision, least, most", [("ieee", 0, 2e-5), ("tf32x3", 0, 4e-5), ("tf32", 1e-3, 5e-2), (None, 1e-3, 5e-2)]
)
def test_dot_precision(precision, least, most):
    """A forgotten input_precision is tf32, on a GPU and here."""
    x, y = torch.randn(2, 64, 64)
    out = torch.empty(64, 64)
    dot_kernel[(1,)](x, y, out, precision, 64)
    assert least <= (out.double() - x.double() @ y.double()).abs().max() <= most


def test_shallow_dot_is_refused():
    x, y = torch.randn(2, 8, 8).half()
    with pytest.raises(Exception, match="K >= 16"):
        dot_kernel[(1,)](x, y, torch.empty(8, 8), "ieee", 8)


@triton.jit
def integer_kernel(x_ptr, y_ptr, product_ptr, high_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(product_ptr + i, x * y)
    tl.store(high_ptr + i, tl.umulhi(x, y))


def test_integers_wrap():
    x, y = torch.randint(0, 2**32, (2, 64), dtype=torch.int64)
    product, high = (torch.empty(64, dtype=torch.uint32) for _ in range(2))
    integer_kernel[(1,)](x.to(torch.uint32), y.to(torch.uint32), product, high, 64)
    full = [int(a) * int(b) for a, b in zip(x, y, strict=True)]
    assert product.tolist() == [p % 2**32 for p in full]
    assert high.tolist() == [p >> 32 for p in full]


@triton.jit
def masked_load_kernel(x_ptr, out_ptr, count, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < count))


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN])
def test_masked_load_without_other_is_undefined(dtype):
    x, out = torch.randn(5).to(dtype), torch.empty(16, dtype=dtype)
    masked_load_kernel[(1,)](x, out, 5, 16)
    assert torch.equal(out[:5], x) and out[5:].isnan().all()


@triton.jit
def float_argument_kernel(out_ptr, value):
    tl.store(out_ptr, value * 3 - 0.3)


def test_float_arguments_are_float32():
    out = torch.empty(1)
    float_argument_kernel[(1,)](out, 0.1)
    assert out.item() != torch.tensor(0.1 * 3 - 0.3).item()
    assert out.item() == (torch.tensor(0.1) * 3 - 0.3).item()


@triton.jit
def descriptor_kernel(x_ptr, out_ptr, rows, columns, SIZE: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [rows, columns], [columns, 1], [SIZE, SIZE])
    out = tl.make_tensor_descriptor(out_ptr, [columns, rows], [rows, 1], [SIZE, SIZE])
    i, j = tl.program_id(0) * SIZE, tl.program_id(1) * SIZE
    out.store([j, i], x.load([i, j]).T)


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN])
def test_descriptors(dtype):
    x = torch.randn(24, 40).to(dtype)
    out = torch.empty(40, 24, dtype=dtype)
    descriptor_kernel[(2, 3)](x, out, 24, 40, 16)
    same(out, x.T.contiguous())
