"""Planted faults of memory, each found by the interpreter and told with kernel, argument, program and offset."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("wants TRITON_INTERPRET=1", allow_module_level=True)

import interpreted_memory
import triton
import triton.language as tl
from interpreted_memory import MemoryFault

X, OUT = torch.arange(40.0), torch.zeros(40)


@triton.jit
def copy_kernel(x_ptr, out_ptr, shift, count, x_stride, out_stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (i + shift) * x_stride, mask=i < count)
    tl.store(out_ptr + i * out_stride, x, mask=i < count)


def copy(x=X, out=OUT, shift=0, count=40, x_stride=1, out_stride=1):
    copy_kernel[(3,)](x, out, shift, count, x_stride, out_stride, 16)


def test_no_fault():
    copy()
    assert torch.equal(OUT, X)
    copy(X[::2], OUT[::2], 0, 20, 2, 2)
    copy(X[5:], OUT[:35], 0, 35)


def test_load_behind_the_end():
    with pytest.raises(MemoryFault) as fault:
        copy(shift=3)
    assert str(fault.value) == (
        "copy_kernel, program (2, 0, 0): load of x_ptr (shape (40,), strides (1,), torch.float32): "
        "3 of 8 lanes are outside the tensor, the first at offset 40 from the first element"
    )


def test_load_before_the_beginning():
    with pytest.raises(MemoryFault, match=r"program \(0, 0, 0\): load of x_ptr .* offset -2 "):
        copy(shift=-2)


def test_store_behind_the_end():
    with pytest.raises(MemoryFault, match=r"program \(2, 0, 0\): store of out_ptr .* 8 of 16 lanes .* offset 40 "):
        copy(x=torch.zeros(48), count=48)


def test_outside_a_view():
    """The memory is there, but it is not the argument's."""
    with pytest.raises(MemoryFault, match=r"load of x_ptr .* offset 35 "):
        copy(x=X[:35])
    with pytest.raises(MemoryFault, match=r"load of x_ptr .* offset 1 "):
        copy(x=X[::2], count=20)
    with pytest.raises(MemoryFault, match=r"store of out_ptr .* offset 3 "):
        copy(out=torch.zeros(10, 5)[:, :3], count=15)


def test_far_outside():
    """An offset that leads to another argument is one outside of its own."""
    with pytest.raises(MemoryFault, match=r"load of x_ptr .* outside the tensor"):
        copy(shift=1_000_000)


def test_lanes_write_one_address():
    with pytest.raises(MemoryFault, match=r"store of out_ptr .* written twice by one store, with different values"):
        copy(out_stride=0)
    with pytest.raises(MemoryFault, match=r"written twice by one store, with the same value"):
        copy(x=torch.ones(40), out_stride=0)


@triton.jit
def neighbour_kernel(x_ptr, out_ptr, distance, BLOCK: tl.constexpr):
    i = (tl.program_id(0) + 1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i + distance))


@pytest.mark.parametrize(
    "distance, fault",
    [
        (16, r"program \(1, 0, 0\): store of x_ptr and out_ptr .* 16 of 16 lanes .* in a race with program number 0"),
        (1, r"program \(1, 0, 0\): store of x_ptr and out_ptr .* 1 of 16 lanes .* in a race with program number 0"),
        (-1, r"program \(1, 0, 0\): load of x_ptr and out_ptr .* 1 of 16 lanes .* in a race with program number 0"),
    ],
)
def test_race_of_a_load_with_a_store(distance, fault):
    x = torch.zeros(100)
    neighbour_kernel[(3,)](x, x, 0, 16)  # in place
    with pytest.raises(MemoryFault, match=fault):
        neighbour_kernel[(3,)](x, x, distance, 16)


@triton.jit
def overlap_kernel(out_ptr, step, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0) * step + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32))


def test_race_of_two_stores():
    overlap_kernel[(3,)](OUT, 8, 8)
    with pytest.raises(
        MemoryFault, match=r"program \(1, 0, 0\): store of out_ptr .* 1 of 8 lanes are in a race .* number 0"
    ):
        overlap_kernel[(3,)](OUT, 7, 8)


@triton.jit
def atomic_kernel(out_ptr, count, PLAIN: tl.constexpr):
    tl.atomic_add(out_ptr + tl.arange(0, 4), 1.0, mask=tl.arange(0, 4) < count)
    if PLAIN:
        tl.load(out_ptr)


def test_atomics():
    out = torch.zeros(3)
    atomic_kernel[(5,)](out, 3, False)
    assert out.tolist() == [5, 5, 5]
    with pytest.raises(MemoryFault, match=r"load of out_ptr .* in a race with an atomic"):
        atomic_kernel[(5,)](out, 3, True)
    with pytest.raises(MemoryFault, match=r"atomic of out_ptr .* outside the tensor"):
        atomic_kernel[(5,)](out, 4, False)


@triton.jit
def descriptor_kernel(x_ptr, out_ptr, rows, SIZE: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [rows, SIZE], [SIZE, 1], [SIZE, SIZE])
    out = tl.make_tensor_descriptor(out_ptr, [rows, SIZE], [SIZE, 1], [SIZE, SIZE])
    out.store([0, 0], x.load([0, 0]))


def test_descriptors():
    x, out = torch.randn(10, 16), torch.zeros(10, 16)
    descriptor_kernel[(1,)](x, out, 10, 16)
    assert torch.equal(x, out)
    with pytest.raises(MemoryFault, match=r"load of x_ptr .* outside the tensor"):
        descriptor_kernel[(1,)](x, out, 11, 16)


@triton.jit
def no_argument_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(tl.load(x_ptr).to(tl.pointer_type(tl.float32))))


@pytest.mark.parametrize("address", [0, 16, OUT.data_ptr(), 18 << 44, 1 << 62], ids=hex)
def test_address_from_nowhere(address):
    """Null, one of the process's own, and behind the last argument."""
    with pytest.raises(MemoryFault, match=f"load at {address:#x}, which was made from no tensor argument"):
        no_argument_kernel[(1,)](torch.tensor([address]), OUT)


@triton.jit
def misaligned_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load((x_ptr + 1).to(tl.pointer_type(tl.float32))))


def test_misaligned():
    with pytest.raises(MemoryFault, match="not aligned to 4 bytes"):
        misaligned_kernel[(1,)](torch.zeros(8, dtype=torch.uint8), OUT)


def test_filled_with_nan():
    with interpreted_memory.filled_with_nan():
        for x in (torch.empty(3), torch.empty_like(X), X.new_empty(4), torch.empty_strided((2, 3), (5, 1))):
            assert x.isnan().all()
        assert torch.empty(3, dtype=torch.int32).min() == torch.iinfo(torch.int32).max
