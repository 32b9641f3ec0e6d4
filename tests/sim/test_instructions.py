"""Each instruction of the simulator against a definition of its own, in numpy or Triton."""

import numpy as np
import pytest
import torch

from fastformer import reference

RNG = np.random.default_rng(0)
LANES = np.arange(32)


@pytest.fixture(scope="module")
def layouts():
    """Triton's layouts of the fragments of mma: name -> (32 lanes, elements of a lane, (row, column))."""
    pytest.importorskip("triton")
    from triton._C import libtriton
    from triton.experimental.gluon import language as gluon

    context = libtriton.ir.context()
    libtriton.ir.load_dialects(context)
    builder = libtriton.gluon_ir.GluonOpBuilder(context)
    result = gluon.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])

    def operand(index: int, width: int):
        return gluon.DotOperandLayout(operand_index=index, parent=result, k_width=width)

    def places(layout, shape: list[int]) -> np.ndarray:
        linear = builder.to_linear_layout(layout._to_ir(builder), shape)
        elements = np.arange(2 ** len(linear.reg_bases))
        found = np.zeros((32, len(elements), 2), dtype=int)
        for bases, index in ((linear.lane_bases, LANES[:, None]), (linear.reg_bases, elements[None, :])):
            for bit, base in enumerate(bases):
                found ^= np.where((index >> bit & 1)[..., None], base, 0)
        return found

    return {
        "d": places(result, [16, 8]),
        "a16": places(operand(0, 2), [16, 16]),
        "b16": places(operand(1, 2), [16, 8]),
        "a32": places(operand(0, 1), [16, 8]),
        "b32": places(operand(1, 1), [8, 8]),
    }


def fragment(matrix: np.ndarray, layout: np.ndarray) -> np.ndarray:
    """(32, registers) of 32 bits: what each lane holds of the matrix."""
    elements = matrix[layout[..., 0], layout[..., 1]]
    return np.ascontiguousarray(elements).view(np.uint32)


def assert_mma(multiply, bits_a, bits_b, a, b, layouts, kind):
    """Small integers: every product and sum is exact, and each of them tells where it came from."""
    c = RNG.integers(-8, 8, (16, 8)).astype(np.float32)
    d = multiply(
        fragment(bits_a, layouts[f"a{kind}"]),
        fragment(bits_b, layouts[f"b{kind}"]),
        c[layouts["d"][..., 0], layouts["d"][..., 1]],
    )
    expected = a.astype(np.float64) @ b.astype(np.float64) + c
    assert np.array_equal(d, expected[layouts["d"][..., 0], layouts["d"][..., 1]])


def integers(*shape: int) -> np.ndarray:
    return RNG.integers(-8, 8, shape).astype(np.float32)


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) >> 16).astype(np.uint16)


class TestMma:
    def test_f16(self, sim, order, layouts):
        a, b = integers(16, 16), integers(16, 8)
        bits = [x.astype(np.float16).view(np.uint16) for x in (a, b)]
        assert_mma(sim.mma_f16, *bits, a, b, layouts, 16)

    def test_bf16(self, sim, order, layouts):
        a, b = integers(16, 16), integers(16, 8)
        assert_mma(sim.mma_bf16, bfloat16_bits(a), bfloat16_bits(b), a, b, layouts, 16)

    def test_tf32(self, sim, order, layouts):
        a, b = integers(16, 8), integers(8, 8)
        assert_mma(sim.mma_tf32, a, b, a, b, layouts, 32)

    def test_tf32_reads_the_upper_bits(self, sim, layouts):
        a, b = integers(16, 8), integers(8, 8)
        noisy = [(x.view(np.uint32) | 0x1FFF).view(np.float32) for x in (a, b)]
        assert_mma(sim.mma_tf32, *noisy, a, b, layouts, 32)

    def test_count(self, sim):
        zeros = np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32), np.zeros((32, 4), np.float32)
        sim.mma_f16(*zeros)
        assert sim.launches()[-1].mma == 1

    @pytest.mark.parametrize("special", [np.inf, np.nan])
    def test_not_finite(self, sim, layouts, special):
        """One such element of a reaches its row of d and no other."""
        a, b = np.ones((16, 16), np.float16), np.ones((16, 8), np.float16)
        a[11, 14] = special
        d = sim.mma_f16(
            fragment(a.view(np.uint16), layouts["a16"]),
            fragment(b.view(np.uint16), layouts["b16"]),
            np.zeros((32, 4), np.float32),
        )
        assert np.array_equal(~np.isfinite(d), layouts["d"][..., 0] == 11)


class TestLdmatrix:
    @pytest.mark.parametrize("count", [1, 2, 4])
    @pytest.mark.parametrize("transpose", [False, True])
    def test_fragments(self, sim, order, count, transpose):
        """PTX ISA: lane l gets row l / 4, columns 2 (l % 4) and the next, of the matrix or of the transposed one."""
        tile = RNG.integers(0, 2**16, (64, 8), dtype=np.uint16)
        rows = RNG.permutation(64)[:32] * 8  # each lane's row anywhere
        registers = sim.ldmatrix(count, transpose, tile.ravel(), rows)
        matrices = tile[rows // 8].reshape(4, 8, 8)[:count]
        if transpose:
            matrices = matrices.swapaxes(1, 2)
        pairs = np.ascontiguousarray(matrices).view(np.uint32)  # (count, row, pair of columns)
        assert np.array_equal(registers, pairs[:, LANES // 4, LANES % 4].T)

    def test_feeds_mma(self, sim, layouts):
        """The usual addresses give a by ldmatrix.x4 and b, of which the rows are stored, by ldmatrix.x2.trans."""
        a, b = integers(16, 16).astype(np.float16), integers(16, 8).astype(np.float16)
        registers_a = sim.ldmatrix(4, False, a.view(np.uint16).ravel(), LANES % 16 * 16 + LANES // 16 * 8)
        registers_b = sim.ldmatrix(2, True, b.view(np.uint16).ravel(), LANES % 16 * 8)
        assert np.array_equal(registers_a, fragment(a.view(np.uint16), layouts["a16"]))
        assert np.array_equal(registers_b, fragment(b.view(np.uint16), layouts["b16"]))

    def test_unaligned_row(self, sim):
        with pytest.raises(RuntimeError, match=r"ldmatrix: block \(0,0,0\), thread .*not aligned to 16 bytes"):
            sim.ldmatrix(4, False, np.zeros(512, np.uint16), LANES * 8 + 4)

    def test_row_out_of_bounds(self, sim):
        with pytest.raises(RuntimeError, match="ldmatrix: the row .*out of bounds, bytes 496 to 512 of .* of 496"):
            sim.ldmatrix(4, False, np.zeros(248, np.uint16), LANES * 8)


class TestShuffles:
    @pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
    @pytest.mark.parametrize("n", [0, 1, 3, 8, 31])
    def test_source_lane(self, sim, order, width, n):
        """PTX ISA, shfl.sync: outside of the segment of `width` lanes a lane keeps its own value."""
        values = RNG.integers(-(2**31), 2**31, 32, dtype=np.int32)
        first = LANES // width * width
        up, down, xor = LANES - n, LANES + n, LANES ^ n
        assert np.array_equal(sim.shfl(values, n, width), values[first + n % width])
        assert np.array_equal(sim.shfl_up(values, n, width), values[np.where(up >= first, up, LANES)])
        assert np.array_equal(sim.shfl_down(values, n, width), values[np.where(down < first + width, down, LANES)])
        assert np.array_equal(sim.shfl_xor(values, n, width), values[np.where(xor < first + width, xor, LANES)])

    @pytest.mark.parametrize("values", [np.zeros(32), np.ones(32), LANES == 7, LANES % 3, LANES // 9 - 1])
    def test_votes(self, sim, order, values):
        values = values.astype(np.int32)
        ballot = sum(1 << int(lane) for lane in LANES[values != 0])
        same = [sum(1 << int(lane) for lane in LANES[values == value]) for value in values]

        def bits(x) -> np.ndarray:
            return sim_result(x).view(np.uint32)

        def sim_result(call) -> np.ndarray:
            return call(values, 0, 32)

        assert np.all(bits(sim.ballot) == ballot)
        assert np.array_equal(bits(sim.match_any), np.array(same, np.uint32))
        for call, expected in (
            (sim.any, values.any()),
            (sim.all, values.all()),
            (sim.syncthreads_count, (values != 0).sum()),
            (sim.syncthreads_or, values.any()),
            (sim.syncthreads_and, values.all()),
            (sim.reduce_add, values.sum()),
            (sim.reduce_min, values.min()),
            (sim.reduce_max, values.max()),
            (sim.reduce_xor, np.bitwise_xor.reduce(values)),
        ):
            assert np.all(sim_result(call) == expected)

    def test_partial_masks(self, sim, order):
        values = np.arange(32, dtype=np.int32)
        assert sim.partial_masks(values, 0, 32).tolist() == 16 * [120] + 16 * [376]


class TestConversions:
    def test_every_float16(self, sim):
        bits = np.arange(2**16, dtype=np.uint16)
        expected = bits.view(np.float16).astype(np.float32)
        assert np.array_equal(sim.from_f16(bits), expected, equal_nan=True)
        finite = np.isfinite(expected)
        assert np.array_equal(sim.to_f16(expected)[finite], bits[finite])

    def test_every_bfloat16(self, sim):
        bits = np.arange(2**16, dtype=np.uint16)
        expected = (bits.astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(sim.from_bf16(bits), expected, equal_nan=True)
        number = ~np.isnan(expected)
        assert np.array_equal(sim.to_bf16(expected)[number], bits[number])

    def test_rounding(self, sim):
        """To nearest even: any float32, those half way between two float16 or bfloat16, and their neighbours."""
        any_bits = RNG.integers(0, 2**32, 100000, dtype=np.uint32)
        half_way = (RNG.integers(0, 2**16, 5000, dtype=np.uint32) << 16) + 0x8000
        numbers = RNG.normal(0, 1e-5, 50000).astype(np.float32)  # float16 has subnormals there
        halves = np.arange(2**15, dtype=np.uint16).view(np.float16).astype(np.float32)
        halves = halves[np.isfinite(halves)]
        halves = (halves[:-1] + halves[1:]) / 2
        bits = np.concatenate([any_bits, half_way - 1, half_way, half_way + 1])
        x = np.concatenate([bits.view(np.float32), numbers, halves, -halves, np.nextafter(halves, np.float32(9))])
        x = x[~np.isnan(x)]
        with np.errstate(over="ignore"):
            assert np.array_equal(sim.to_f16(x), x.astype(np.float16).view(np.uint16))
        expected = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(sim.to_bf16(x), expected)

    def test_not_a_number(self, sim):
        x = np.array([np.nan, -np.nan], np.float32)
        assert np.isnan(sim.from_f16(sim.to_f16(x))).all() and np.isnan(sim.from_bf16(sim.to_bf16(x))).all()

    def test_tf32(self, sim):
        """10 bits of fraction, to nearest, ties away from zero."""
        x = RNG.normal(0, 1, 10000).astype(np.float32)
        ties = (np.float32(1) + np.arange(1, 400, 2) * np.float32(2**-11)).astype(np.float32)
        x = np.concatenate([x, ties, -ties])
        fraction, exponent = np.frexp(x.astype(np.float64))
        expected = np.ldexp(np.trunc(fraction * 2**11 + np.copysign(0.5, fraction)), exponent - 11)
        assert np.array_equal(sim.to_tf32(x).view(np.float32), expected.astype(np.float32))

    def test_approximations(self, sim):
        x = RNG.uniform(-20, 20, 1000).astype(np.float32)
        np.testing.assert_allclose(sim.exp2_approx(x), np.exp2(x.astype(np.float64)), rtol=2e-7)
        np.testing.assert_allclose(sim.tanh_approx(x), np.tanh(x.astype(np.float64)), rtol=2e-7)
        np.testing.assert_allclose(sim.reciprocal_approx(x), 1 / x.astype(np.float64), rtol=2e-7)
        limits = np.array([-np.inf, -127, -126, 128, np.inf, np.nan], np.float32)
        assert np.array_equal(
            sim.exp2_approx(limits), np.array([0, 0, 2**-126, np.inf, np.inf, np.nan], np.float32), equal_nan=True
        )

    def test_integers(self, sim):
        for x, y in RNG.integers(0, 2**32, (50, 2)).tolist():
            assert sim.umulhi(x, y) == x * y >> 32
            assert sim.brev(x) == int(f"{x:032b}"[::-1], 2)
            both = x.to_bytes(4, "little") + y.to_bytes(4, "little")
            assert sim.byte_perm(x, y, 0x6240) == int.from_bytes([both[i] for i in (0, 4, 2, 6)], "little")

    def test_philox(self, sim):
        for seed, *counter in RNG.integers(0, 2**32, (20, 5)).tolist():
            expected = [int(word) for word in reference.philox4x32(seed << 20, *counter)]
            assert sim.philox(seed << 20, *counter) == expected


class TestAsynchronousCopies:
    @pytest.mark.parametrize("size", [4, 8, 16])
    def test_bytes(self, sim, order, copies, size):
        """Zeros after the valid bytes; before the wait, a lazy copy is all NaN."""
        source = RNG.integers(0, 256, 32 * size, dtype=np.uint8)
        for valid in (0, 1, size // 2, size):
            before, after = getattr(sim, f"cp_async_{size}")(source, valid)
            expected = np.where(np.arange(size) < valid, source.reshape(32, size), 0)
            assert np.array_equal(after.reshape(32, size), expected)
            assert np.all(before == 255) if copies == "lazy" else np.array_equal(before, after)
            assert sim.launches()[-1].copied_bytes == 32 * valid

    def test_groups(self, sim, copies):
        assert sim.copies_after_wait() == ([3, 2, 1, 0] if copies == "lazy" else [3, 3, 3, 3])


class TestThreads:
    def test_indices(self, sim, order):
        grid, block = (3, 2, 4), (5, 3, 2)
        found = sim.indices(grid, block)
        for name, sizes, columns in (("block", grid, found[:, 0, :3]), ("thread", block, found[0, :, 3:])):
            x, y, z = np.meshgrid(*(np.arange(n) for n in sizes), indexing="ij")
            expected = np.stack([x, y, z], -1).transpose(2, 1, 0, 3).reshape(-1, 3)
            assert np.array_equal(columns, expected), name

    def test_order(self, sim, order):
        found = sim.order_of_threads(3, 64)
        assert sorted(found) == list(range(192))
        blocks = np.array(found).reshape(3, 64) // 64
        assert np.all(blocks == blocks[:, :1])  # one block after the other
        if order == "random":
            assert found != sorted(found) and found != sorted(found, reverse=True)
        else:
            assert np.array_equal(blocks[:, 0], [0, 1, 2] if order == "forward" else [2, 1, 0])
            # The last thread that comes to the barrier goes on first.
            assert found[:2] == ([63, 0] if order == "forward" else [128, 191])

    def test_random_order_by_seed(self, sim):
        options = sim.options()
        options.threads = sim.Order.random
        orders = []
        for seed in (1, 2, 1):
            options.seed = seed
            orders.append(sim.order_of_threads(1, 64))
        assert orders[0] == orders[2] != orders[1]

    def test_named_barriers(self, sim, order):
        assert sim.named_barriers(5) == sum(range(160))

    def test_last_block(self, sim, order):
        assert sim.last_block_sums(7, 96) == sum(range(7 * 96))
