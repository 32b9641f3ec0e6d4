"""Bulk copies: of boxes of tensors, with tensor maps, and of bytes; and the checks that watch over them."""

import itertools

import numpy as np
import pytest

from ptx import bulk
from ptx.faults import Fault
from ptx.machine import ORDERS
from ptx.tensor_map import TensorMap, unpack
from ptx.testing import aligned, kernel, launch

RNG = np.random.default_rng(0)
SHARED = ".shared .align 1024 .b8 tile[8192]; .shared .align 8 .b8 bars[64];"
INIT = """mov.u32 %r8, tile; mov.u32 %r9, bars; setp.eq.u32 %p0, %r0, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%r9], 1; fence.proxy.async.shared::cta; bar.sync 0;"""
ARRIVE = "@%p0 mbarrier.arrive.shared::cta.b64 _, [%r9];"
EXPECT = "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], {};"
WAIT = "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r9], 0; @!done bra again; }"
# The first bytes of the tile to %d0, 4 a thread
OUT = """shl.b32 %r10, %r0, 2; add.s32 %r11, %r8, %r10; ld.shared.b32 %r12, [%r11];
    mad.wide.u32 %d2, %r0, 4, %d0; st.global.b32 [%d2], %r12;"""
DTYPES = {np.uint8: 0, np.uint16: 1, np.int32: 3, np.float16: 6, np.float32: 7}


def map_of(x: np.ndarray, box: tuple[int, ...], swizzle: int = 0) -> TensorMap:
    """box: as x, the outermost dimension first."""
    kind = DTYPES[x.dtype.type]
    return TensorMap(kind, x.ctypes.data, x.shape[::-1], x.strides[-2::-1], box[::-1], swizzle)


def load(x: np.ndarray, box: tuple[int, ...], corner: tuple[int, ...], swizzle: int = 0, whole=None, **options):
    """(what is in shared memory, counts); `whole`: what x is a part of."""
    size = int(np.prod(box)) * x.itemsize
    found = aligned(np.zeros(-(-size // 128) * 128, np.uint8))
    coordinates = ", ".join(map(str, corner[::-1]))
    copy = f"cp.async.bulk.tensor.{x.ndim}d.shared::cta.global.mbarrier::complete_tx::bytes"
    body = f"{INIT} {EXPECT.format(size)} @%p0 {copy} [%r8], [%d18, {{{coordinates}}}], [%r9]; {WAIT}"
    body += f"setp.ge.u32 %p2, %r0, {size // 4}; @%p2 bra $END; {OUT} $END:"
    threads = -(-size // 4 // 32) * 32
    text = kernel(body, 2, SHARED, maps=1)
    counts = launch(
        text, found, x if whole is None else whole, threads=threads, maps=[map_of(x, box, swizzle)], **options
    )
    return found[:size], counts


def box_of(x: np.ndarray, box: tuple[int, ...], corner: tuple[int, ...]) -> np.ndarray:
    """With zeros outside."""
    result = np.zeros(box, x.dtype)
    for place in itertools.product(*map(range, box)):
        there = tuple(a + b for a, b in zip(corner, place, strict=True))
        if all(0 <= i < n for i, n in zip(there, x.shape, strict=True)):
            result[place] = x[there]
    return result


class TestBoxes:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "shape,box,corner",
        [
            ((64,), (32,), (16,)),
            ((20, 32), (4, 16), (3, 16)),
            ((20, 32), (8, 16), (-3, -5)),  # outside, below
            ((20, 32), (8, 32), (16, 9)),  # above
            ((20, 32), (8, 16), (30, 40)),  # all of it
            ((3, 5, 32), (2, 3, 16), (1, -1, 4)),
            ((2, 3, 5, 32), (1, 2, 3, 16), (1, 1, 2, 24)),
            ((2, 2, 3, 5, 16), (2, 1, 2, 2, 16), (0, 1, 2, 1, 3)),
        ],
    )
    def test_loads(self, dtype, shape, box, corner):
        x = aligned(RNG.integers(1, 100, shape).astype(dtype))
        found, counts = load(x, box, corner)
        wanted = box_of(x, box, corner)
        assert np.array_equal(found.view(dtype), wanted.ravel())
        assert counts.copied_bytes == np.count_nonzero(wanted) * x.itemsize and counts.unfenced_barriers == 0

    def test_strides(self):
        """Rows that are a part of longer ones."""
        x = aligned(RNG.integers(0, 2**16, (20, 64), dtype=np.uint16))
        part = x[:, 8:40]
        found, _ = load(part, (8, 32), (15, 16), whole=x)
        assert np.array_equal(found.view(np.uint16), box_of(part, (8, 32), (15, 16)).ravel())

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("swizzle,width", [(1, 32), (2, 64), (3, 128)])
    def test_swizzles(self, swizzle, width, order):
        """Triton's layouts of shared memory: base b is where the byte pair whose number has bit b alone comes from."""
        pytest.importorskip("triton")
        from triton._C import libtriton
        from triton.experimental.gluon import language as gluon

        context = libtriton.ir.context()
        libtriton.ir.load_dialects(context)
        builder = libtriton.gluon_ir.GluonOpBuilder(context)
        layout = gluon.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=16, rank=2)
        columns = width // 2
        bases = builder.to_linear_layout(layout._to_ir(builder), [16, columns]).offset_bases
        x = aligned(RNG.integers(0, 2**16, (40, 96), dtype=np.uint16))
        found, _ = load(x, (16, columns), (5, 8), swizzle, order=order)
        for number, value in enumerate(found.view(np.uint16)):
            row = column = 0
            for bit, base in enumerate(bases):
                if number >> bit & 1:
                    row, column = row ^ base[0], column ^ base[1]
            assert value == x[5 + row, 8 + column]

    @pytest.mark.parametrize("swizzle,width", [(0, 32), (1, 32), (2, 64), (3, 128)])
    def test_saves(self, swizzle, width):
        """A load and a save of the same box move what is inside of the tensor, and nothing else."""
        x = aligned(RNG.integers(1, 2**16, (20, 48), dtype=np.uint16))
        y = aligned(np.zeros_like(x))
        corner, box = (17, 48 - width // 4), (8, width // 2)
        where = f"{{{corner[1]}, {corner[0]}}}"
        size = 8 * width
        body = f"""{INIT} {EXPECT.format(size)}
            @%p0 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r8],
                [%d18, {where}], [%r9]; {WAIT}
            @%p0 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d19, {where}], [%r8];
            @%p0 cp.async.bulk.commit_group; @%p0 cp.async.bulk.wait_group.read 0;"""
        text = kernel(body, 2, SHARED, maps=2)
        counts = launch(text, x, y, maps=[map_of(x, box, swizzle), map_of(y, box, swizzle)])
        wanted = np.zeros_like(x)
        wanted[17:, corner[1] :] = x[17:, corner[1] :]
        assert np.array_equal(y, wanted)
        assert counts.stored_bytes == counts.copied_bytes == 3 * width // 2
        assert 128 * counts.wavefronts == 2 * size and not counts.conflicts  # boxes that are inside or not

    def test_sectors(self):
        """Rows of 64 bytes are 2 sectors, or 3 where they begin in one's middle."""
        x = aligned(np.ones((16, 64), np.float16))
        for column, wanted in ((0, 2), (8, 3)):
            _, counts = load(x, (4, 32), (0, column))
            assert counts.sectors == 4 * wanted + 256 // 32


class TestBytes:
    BODY = f"""{INIT} {EXPECT.format(512)}
        @%p0 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r8], [%d1+16], 512, [%r9]; {WAIT}"""

    def test_there_and_back(self):
        x, y = RNG.integers(0, 256, 1024, dtype=np.uint8), np.zeros(1024, np.uint8)
        body = (
            self.BODY
            + """mov.u32 %r5, 496;
            @%p0 cp.async.bulk.global.shared::cta.bulk_group [%d0+32], [%r8+16], %r5;
            @%p0 cp.async.bulk.commit_group; @%p0 cp.async.bulk.wait_group 0;"""
        )
        x, y = aligned(x), aligned(y)
        launch(kernel(body, 2, SHARED), y, x)
        assert np.array_equal(y[32:528], x[32:528]) and not y[:32].any() and not y[528:].any()

    @pytest.mark.parametrize(
        "old,new,message",
        [
            ("[%d1+16]", "[%d1+8]", "not all are multiples of 16"),
            (", 512,", ", 520,", "not all are multiples of 16"),
            ("[%d1+16]", "[%d1+528]", "512 bytes outside of every tensor"),
            ("[%r8]", "[%r8+7696]", "of shared memory"),
        ],
    )
    def test_bounds(self, old, new, message):
        text = kernel(self.BODY.replace(old, new), 2, SHARED)
        with pytest.raises(Fault, match=message):
            launch(text, aligned(np.zeros(128, np.uint8)), aligned(np.zeros(1024, np.uint8)))


class TestFaults:
    """A box of 512 bytes is copied to the tile; all threads read it."""

    COPY = "@%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r8], [%d18, {0, 0}], [%r9];"
    BODY = INIT + EXPECT.format(512) + COPY + WAIT + OUT

    def run(self, body: str, order: str = "together", change=lambda m: m) -> np.ndarray:
        x, out = aligned(RNG.integers(0, 2**16, (8, 32), dtype=np.uint16)), np.zeros(128, np.uint32)
        m = change(map_of(x, (8, 32)))
        launch(kernel(body, 2, SHARED, maps=1), out, x, threads=128, order=order, maps=[m])
        assert np.array_equal(out.view(np.uint16).reshape(8, 32), x)

    @pytest.mark.parametrize("order", ORDERS)
    def test_none(self, order):
        self.run("prefetch.tensormap [%d18];" + self.BODY, order)

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize(
        "old,new,message",
        [
            (WAIT, "", "to which a copy is under way|which nobody wrote"),
            (" 0; @!done", " 1; @!done", "to which a copy is under way|which nobody wrote"),
            (EXPECT.format(512), EXPECT.format(496), "-16 bytes"),
            (EXPECT.format(512), EXPECT.format(528), "lacks 0 of 1 arrivals and 16 bytes"),
            (EXPECT.format(512) + COPY, COPY + ARRIVE, "it is complete, but copies to it are under way"),
            (
                "@%p0 cp.async.bulk",
                "setp.lt.u32 %p1, %r0, 2; @%p1 cp.async.bulk",
                "copies to where|a copy is under way",
            ),
            ("[%r8], [%d18", "[%r8+64], [%d18", "a box at byte 64, which is no multiple of 128"),
            ("[%r8], [%d18", "[%r8+7808], [%d18", "bytes .* to .* of .* of shared memory|where an mbarrier is"),
            ("@%p0 cp.async.bulk", "add.s64 %d18, %d18, 64; @%p0 cp.async.bulk", "not a tensor map"),
            ("@%p0 cp.async.bulk", "add.s64 %d18, %d18, 8; @%p0 cp.async.bulk", "which is no multiple of 64"),
            (".2d.", ".3d.", "a tensor map of 2 dimensions"),
        ],
    )
    def test_of_one_copy(self, old, new, message, order):
        body = self.BODY.replace(old, new)
        if ".3d." in body:
            body = body.replace("{0, 0}", "{0, 0, 0}")
        with pytest.raises(Fault, match=message):
            self.run(body, order)

    @pytest.mark.parametrize("place", [8, 0])
    def test_another_mbarrier(self, place):
        """Two copies, the second of which warp 1 waits for, or also for the first, which it reads."""
        two = "@%p0 mbarrier.init.shared::cta.b64 [%r9+8], 1;" + INIT + EXPECT.format(512) + self.COPY
        two += EXPECT.format(512).replace("%r9", "%r9+8")
        two += self.COPY.replace("%r9", "%r9+8").replace("%r8", "%r8+512") + WAIT.replace("%r9", "%r13")
        body = "mov.u32 %r9, bars; setp.eq.u32 %p0, %r0, 0; setp.lt.u32 %p1, %r0, 32; add.s32 %r13, %r9, 8;"
        body += "@%p1 mov.u32 %r13, %r9;" + two + "@%p1 bra $END;"
        body += WAIT.replace("%r9", f"%r9+{place}") + OUT + "$END:"
        x, out = aligned(RNG.integers(0, 2**16, (8, 32), dtype=np.uint16)), np.zeros(64, np.uint32)
        text = kernel(body, 2, SHARED, maps=1)
        if place == 0:
            launch(text, out, x, threads=64, maps=[map_of(x, (8, 32))])
        else:
            with pytest.raises(Fault, match="race: .* warp 1, lane 0 reads what a bulk copy wrote.*without a wait for"):
                launch(text, out, x, threads=64, maps=[map_of(x, (8, 32))])

    @pytest.mark.parametrize("fence", ["", "fence.mbarrier_init.release.cluster;", "fence.proxy.async;"])
    def test_fences_of_the_initialization(self, fence):
        x = aligned(RNG.integers(0, 2**16, (8, 32), dtype=np.uint16))
        text = kernel(self.BODY.replace("fence.proxy.async.shared::cta;", fence), 2, SHARED, maps=1)
        counts = launch(text, np.zeros(128, np.uint32), x, threads=128, maps=[map_of(x, (8, 32))])
        assert counts.unfenced_barriers == (not fence)

    @pytest.mark.parametrize("fence", ["", "fence.proxy.async;", "fence.proxy.async.shared::cluster;"])
    def test_fences_of_what_was_written(self, fence):
        """Each thread writes, one saves all of it. A fence helps before the barrier, and behind it."""
        x = aligned(np.zeros(128, np.uint32))
        save = "@%p0 cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r8], 512; @%p0 cp.async.bulk.commit_group;"
        save += "@%p0 cp.async.bulk.wait_group.read 0;"
        body = INIT + "shl.b32 %r10, %r0, 2; add.s32 %r11, %r8, %r10; st.shared.b32 [%r11], %r0;"
        for between in (fence + "bar.sync 0;", "bar.sync 0;" + fence):
            text = kernel(body + between + save, 1, SHARED)
            if fence:
                launch(text, x, threads=128)
                assert x.tolist() == list(range(128))
            else:
                with pytest.raises(Fault, match="the async proxy reads byte 0 .* with no fence.proxy.async in between"):
                    launch(text, x, threads=128)
        over = body + "bar.sync 0;" + fence + EXPECT.format(512) + self.COPY + WAIT + OUT
        if fence:
            self.run(over)
        else:
            with pytest.raises(Fault, match="the async proxy writes byte 0 of shared memory, which warp 0 wrote"):
                self.run(over)

    @pytest.mark.parametrize(
        "old,new,message",
        [
            (
                "@%p0 cp.async.bulk.wait_group.read 0;",
                "",
                "write to byte .*, which a wgmma or a bulk copy that is under",
            ),
            ("wait_group.read 0", "wait_group.read 1", "write to byte .*, which a wgmma or a bulk copy that is under"),
            (
                "@%p0 cp.async.bulk.commit_group;",
                "",
                "write to byte .*, which a wgmma or a bulk copy that is under way",
            ),
            ("bar.sync 2;", "", "race: .* writes where warp 0 read"),
        ],
    )
    def test_of_a_save(self, old, new, message):
        body = (
            INIT
            + """shl.b32 %r10, %r0, 2; add.s32 %r11, %r8, %r10; st.shared.b32 [%r11], %r0;
            fence.proxy.async.shared::cta; bar.sync 1;
            @%p0 cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r8], 512;
            @%p0 cp.async.bulk.commit_group; @%p0 cp.async.bulk.wait_group.read 0; bar.sync 2;
            st.shared.b32 [%r11], 7;"""
        )
        launch(kernel(body, 1, SHARED), aligned(np.zeros(128, np.uint32)), threads=128)
        with pytest.raises(Fault, match=message):
            launch(kernel(body.replace(old, new), 1, SHARED), aligned(np.zeros(128, np.uint32)), threads=128)

    def test_not_waited_for_at_the_end(self):
        body = INIT + "@%p0 st.shared.v4.b32 [%r8], {%r0, %r0, %r0, %r0}; fence.proxy.async.shared::cta;"
        body += "@%p0 cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r8], 16; @%p0 cp.async.bulk.commit_group;"
        with pytest.raises(Fault, match="lane 0 ends without a wait for its bulk copies"):
            launch(kernel(body, 1, SHARED), aligned(np.zeros(128, np.uint32)))


class TestPipeline:
    """Warp 0 copies 6 boxes through 2 stages, the others sum them: full and empty barriers, as kernels do it."""

    BODY = """
        mov.u32 %r8, tile; mov.u32 %r9, bars; setp.eq.u32 %p0, %r0, 0; mov.u32 %r10, 0; mov.u32 %r7, 0;
        @%p0 mbarrier.init.shared::cta.b64 [%r9], 1; @%p0 mbarrier.init.shared::cta.b64 [%r9+8], 1;
        @%p0 mbarrier.init.shared::cta.b64 [%r9+16], 64; @%p0 mbarrier.init.shared::cta.b64 [%r9+24], 64;
        fence.mbarrier_init.release.cluster; bar.sync 0;
        setp.ge.u32 %p1, %r0, 32; @%p1 bra $CONSUMER;
        @!%p0 bra $END;
    $PRODUCER:
        and.b32 %r11, %r10, 1; shr.u32 %r12, %r10, 1; and.b32 %r12, %r12, 1; xor.b32 %r12, %r12, 1;
        mad.lo.s32 %r13, %r11, 8, %r9; mad.lo.s32 %r14, %r11, 256, %r8; shl.b32 %r15, %r10, 2;
        { .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r13+16], %r12; @!done bra again; }
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r13], 256;
        cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r14], [%d18, {0, %r15}], [%r13];
        add.s32 %r10, %r10, 1; setp.lt.u32 %p2, %r10, 6; @%p2 bra $PRODUCER;
        bra.uni $END;
    $CONSUMER:
        and.b32 %r11, %r10, 1; shr.u32 %r12, %r10, 1; and.b32 %r12, %r12, 1; sub.s32 %r16, %r0, 32;
        mad.lo.s32 %r13, %r11, 8, %r9; mad.lo.s32 %r14, %r11, 256, %r8; mad.lo.s32 %r14, %r16, 4, %r14;
        { .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r13], %r12; @!done bra again; }
        ld.shared.b32 %r15, [%r14]; add.s32 %r7, %r7, %r15;
        mbarrier.arrive.shared::cta.b64 _, [%r13+16];
        add.s32 %r10, %r10, 1; setp.lt.u32 %p2, %r10, 6; @%p2 bra $CONSUMER;
        mad.wide.u32 %d2, %r16, 4, %d0; st.global.b32 [%d2], %r7;
    $END:"""

    def run(self, body: str, order: str) -> None:
        x, out = aligned(RNG.integers(0, 1000, (24, 16), dtype=np.int32)), np.zeros(64, np.int32)
        launch(kernel(body, 2, SHARED, maps=1), out, x, threads=96, order=order, maps=[map_of(x, (4, 16))], seed=1)
        assert np.array_equal(out, x.reshape(6, 64).sum(0))

    @pytest.mark.parametrize("order", ORDERS)
    def test_sums(self, order):
        self.run(self.BODY, order)

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize(
        "old,new,message",
        [
            (
                "[%r13+16], %r12; @!done",
                "[%r13+16], 1; @!done",
                "1 arrivals; the mbarrier at byte 8192, in phase 0, lacks 0 of 1",
            ),
            ("xor.b32 %r12, %r12, 1;", "", "deadlock"),
            ("mbarrier.arrive.shared::cta.b64 _, [%r13+16];", "", "deadlock"),
            ("[%r9+16], 64", "[%r9+16], 32", "race: .* writes where warp . read|under way|deadlock"),
            ("256;\n        cp", "192;\n        cp", "deadlock: .*-64 bytes"),
            ("[%r13], %r12; @!done", "[%r13], 0; @!done", "race|under way|arrivals"),
        ],
    )
    def test_mistakes(self, old, new, message, order):
        assert old in self.BODY
        with pytest.raises(Fault, match=message):
            self.run(self.BODY.replace(old, new), order)


class TestMaps:
    GOOD = {"type": 6, "address": 4096, "sizes": (64, 20), "strides": (256,), "box": (64, 8), "swizzle": 3}

    def test_bytes(self):
        m = TensorMap(**self.GOOD)
        assert len(m.tobytes()) == 128
        back = unpack(m.tobytes())
        assert back.tobytes() == m.tobytes() and back.strides == (256,)

    @pytest.mark.parametrize(
        "change",
        [{"address": 4104}, {"strides": (264,)}, {"box": (64, 257)}, {"box": (4, 8)}, {"swizzle": 2}, {"swizzle": 4},
         {"sizes": (0, 20)}, {"type": 12}, {"steps": (1, 2)}, {"interleave": 1}, {"fill": 1}, {"strides": ()}],
    )  # fmt: skip
    def test_what_the_driver_refuses(self, change):
        with pytest.raises(ValueError, match="a tensor map whose .*can't be or is not known"):
            TensorMap(**self.GOOD | change)


def test_every_instruction_is_tested():
    """Of loads in both spaces and with .tile one each: they are the same functions."""
    named = {f"cp.async.bulk.tensor.{n}d.{s}.global{t}.mbarrier::complete_tx::bytes" for n in range(1, 6)
             for s in ("shared::cta", "shared::cluster") for t in ("", ".tile")}  # fmt: skip
    named |= {f"cp.async.bulk.tensor.{n}d.global.shared::cta{t}.bulk_group" for n in range(1, 6) for t in ("", ".tile")}
    named |= {f"cp.async.bulk.{s}.global.mbarrier::complete_tx::bytes" for s in ("shared::cta", "shared::cluster")}
    named |= {"cp.async.bulk.global.shared::cta.bulk_group", "cp.async.bulk.commit_group", "prefetch.tensormap"}
    assert named | {"cp.async.bulk.wait_group", "cp.async.bulk.wait_group.read"} == bulk.TABLE.keys()
