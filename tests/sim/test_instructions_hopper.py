"""The instructions of sm_90a in the simulator: against layouts of Triton's compiler or definitions in numpy, and a
pipeline of them with faults, each of which is caught."""

import re

import numpy as np
import pytest
import torch
from test_instructions import LANES, RNG, bfloat16_bits, integers


def swizzled(tile: np.ndarray) -> np.ndarray:
    """PTX ISA, 128 bytes of swizzling: of row r of 64 elements, chunk c of 8 is where chunk c ^ (r % 8) would be."""
    chunks = tile.reshape(-1, 8, 8)
    rows = np.arange(len(chunks))
    found = np.empty_like(chunks)
    for c in range(8):
        found[rows, c ^ rows % 8] = chunks[:, c]
    return found.reshape(tile.shape)


def test_swizzle_is_that_of_triton():
    pytest.importorskip("triton")
    from triton._C import libtriton
    from triton.experimental.gluon import language as gluon

    context = libtriton.ir.context()
    libtriton.ir.load_dialects(context)
    builder = libtriton.gluon_ir.GluonOpBuilder(context)
    layout = gluon.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    linear = builder.to_linear_layout(layout._to_ir(builder), [64, 64])
    offsets = np.arange(64 * 64)
    places = np.zeros((64 * 64, 2), dtype=int)
    for bit, base in enumerate(linear.offset_bases):
        places ^= np.where((offsets >> bit & 1)[:, None], base, 0)
    tile = np.arange(64 * 64).reshape(64, 64)
    assert np.array_equal(swizzled(tile).ravel(), tile[places[:, 0], places[:, 1]])


class TestCopies:
    @pytest.mark.parametrize("place", [(0, 0), (64, 8), (100, 35), (-8, -3), (0, 40), (120, 0)])
    def test_box(self, sim, order, copies, place):
        """What is outside of the matrix is zero; lazy: NaN before the wait."""
        matrix = RNG.integers(1, 2**16, (37, 120), dtype=np.uint16)
        x, y = place
        padded = np.zeros((64 + 37 + 64, 64 + 120 + 64), np.uint16)
        padded[64:101, 64:184] = matrix
        expected = swizzled(padded[64 + y : 64 + y + 16, 64 + x : 64 + x + 64])
        before, after = sim.tma_load(matrix, 16, x, y)
        assert np.array_equal(after, expected)
        assert np.array_equal(before, np.full_like(expected, 0xFFFF) if copies == "lazy" else expected)
        assert sim.launches()[-1].copied_bytes == 2 * np.count_nonzero(expected)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({}, None),
            ({"offset": 1}, "the data is not aligned to 16 bytes"),
            ({"sizes": [0, 4]}, r"sizes are 1 to 2\^32"),
            ({"stride": 126}, "strides are multiples of 16 bytes"),
            ({"box": 32}, "rows of a box are the 128 bytes"),
        ],
    )
    def test_map(self, sim, change, message):
        given = {"offset": 0, "sizes": [60, 4], "stride": 128, "box": 64} | change
        data = np.zeros(1024, np.uint16)
        data = data[-data.ctypes.data % 16 // 2 :][:512]
        if message is None:
            return sim.tensor_map(data, *given.values())
        with pytest.raises(RuntimeError, match=message):
            sim.tensor_map(data, *given.values())


def accumulators(n: int) -> np.ndarray:
    """(128, n / 2, (row, column)): PTX ISA, "Register fragments and shared memory matrix layouts", of d."""
    thread, i = np.arange(128)[:, None], np.arange(n // 2)
    rows = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    columns = i // 4 * 8 + thread % 4 * 2 + i % 2
    return np.stack([rows, columns], -1)


@pytest.mark.parametrize("n", [128, 256])
def test_accumulators_are_those_of_triton(n):
    pytest.importorskip("triton")
    from triton._C import libtriton
    from triton.experimental.gluon import language as gluon

    context = libtriton.ir.context()
    libtriton.ir.load_dialects(context)
    builder = libtriton.gluon_ir.GluonOpBuilder(context)
    layout = gluon.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 16])
    linear = builder.to_linear_layout(layout._to_ir(builder), [64, n])
    found = np.zeros((4, 32, n // 2, 2), dtype=int)
    for bases, index in (
        (linear.warp_bases, np.arange(4)[:, None, None]),
        (linear.lane_bases, LANES[:, None]),
        (linear.reg_bases, np.arange(n // 2)),
    ):
        for bit, base in enumerate(bases):
            found ^= np.where((index >> bit & 1)[..., None], base, 0)
    assert np.array_equal(found.reshape(128, n // 2, 2), accumulators(n))


@pytest.mark.parametrize("n", [128, 256])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
class TestWgmma:
    @pytest.mark.parametrize("a_depth", [True, False])
    @pytest.mark.parametrize("b_depth", [True, False])
    @pytest.mark.parametrize("accumulate", [True, False])
    def test_product(self, sim, order, copies, dtype, n, a_depth, b_depth, accumulate):
        """Four of them along a depth of 64. Small integers: every product and sum is exact."""
        a, b, c = integers(64, 64), integers(n, 64), integers(64, n)
        bits_a, bits_b = (
            bfloat16_bits(x) if dtype == "bf16" else x.astype(np.float16).view(np.uint16)
            for x in (a if a_depth else a.T.copy(), b if b_depth else b.T.copy())
        )
        places = accumulators(n)
        rows, columns = places[..., 0], places[..., 1]
        d = getattr(sim, f"wgmma_{dtype}_{n}")(bits_a, bits_b, a_depth, b_depth, c[rows, columns], accumulate)
        expected = a.astype(np.float64) @ b.T.astype(np.float64) + (c if accumulate else 0)
        assert np.array_equal(d, expected[rows, columns])
        assert sim.launches()[-1].wgmma == 4

    def test_not_finite(self, sim, dtype, n):
        a, b = np.ones((64, 64), np.float32), np.ones((n, 64), np.float32)
        a[11, 14] = np.nan
        bits = [
            torch.from_numpy(x).to(torch.float16 if dtype == "f16" else torch.bfloat16).view(torch.int16).numpy()
            for x in (a, b)
        ]
        d = getattr(sim, f"wgmma_{dtype}_{n}")(
            *(x.view(np.uint16) for x in bits), True, True, np.zeros((128, n // 2), np.float32), False
        )
        assert np.array_equal(np.isnan(d), accumulators(n)[..., 0] == 11)


def test_pipeline(sim, order, copies):
    assert np.array_equal(sim.pipeline(""), np.full((128, 64), 320.0))
    launch = sim.launches()[-1]
    assert (launch.wgmma, launch.copied_bytes) == (20, 5 * 192 * 128)


CAUGHT = {
    "no initialisation": "mbarrier.*: this barrier has not been initialised",
    "no fence of the initialisation": "cp.async.bulk.tensor: no fence after the barrier's initialisation",
    "no wait for an empty stage": "(cp.async.bulk.tensor: a (copy has still to write|wgmma may still read) there|"
    "mbarrier.arrive: more arrivals than the 1 of a phase|deadlock)",
    "wrong parity of an empty stage": "deadlock: no thread can go on",
    "too many bytes expected": r"deadlock: no thread can go on[^$]*threads 0-127: mbarrier.try_wait at",
    "no wait for a full stage": "wgmma: a tile: a copy has still to write there|deadlock",
    "no fence of the registers": "wgmma: no wgmma.fence since the registers could change",
    "a warp multiplies another tile": "the warps of warpgroup 0 did not all do the same wgmma",
    "a lane gives another tile": "wgmma: lanes of a warp give different descriptors",
    "a tile behind the end": "wgmma: a tile: out of bounds",
    "no commit": "(a wgmma may still read there|the block ends while a wgmma is under way)",
    "no wait before a stage is given back": "cp.async.bulk.tensor: a wgmma may still read there",
    "a store where it is multiplied": "store_shared: a wgmma may still read there",
    "a stage is left unread": "the block ends while a copy is under way",
    "one stage for both": "cp.async.bulk.tensor: a (copy has still to write|wgmma may still read) there",
}


@pytest.mark.parametrize("fault", CAUGHT)
def test_caught(sim, order, fault):
    """Whatever the order of the threads; copies and products end as late as they may."""
    sim.options().lazy_copies = True
    with pytest.raises(RuntimeError, match=CAUGHT[fault]) as error:
        sim.pipeline(fault)
    assert str(error.value).startswith("pipeline: block (0,0,0), thread (")
    assert np.array_equal(sim.pipeline(""), np.full((128, 64), 320.0))  # the simulator goes on after it


@pytest.mark.parametrize("fault", ["an arrival less", "an arrival more"])
def test_caught_in_some_orders(sim, fault):
    """A stage is given back too early: threads as they come do not notice."""
    options = sim.options()
    options.lazy_copies = True
    messages = []
    for options.threads in (sim.Order.forward, sim.Order.reverse, sim.Order.random):
        try:
            sim.pipeline(fault)
        except RuntimeError as error:
            messages.append(str(error))
    assert len(messages) >= 2
    assert all(re.search("a (copy has still to write|wgmma may still read) there", message) for message in messages)


@pytest.mark.parametrize("fault", ["too few bytes expected", "wrong parity of a full stage"])
def test_what_has_not_come(sim, order, fault):
    sim.options().lazy_copies = True
    with pytest.raises(RuntimeError, match="a copy has still to write there|has still to get|deadlock"):
        sim.pipeline(fault)


def test_read_before_the_wait(sim, order, copies):
    d = sim.pipeline("d is read before the wait")
    assert np.isnan(d[:, 0]).all() == (copies == "lazy") and (d[:, 1:] == 320).all()
