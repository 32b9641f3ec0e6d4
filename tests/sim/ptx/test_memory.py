"""ld, st and cp.async, and the checks that watch over them."""

import numpy as np
import pytest

from ptx.checks import wavefronts_of_units
from ptx.faults import Fault
from ptx.parse import PtxError
from ptx.testing import aligned, kernel, launch

RNG = np.random.default_rng(0)
TILE = ".shared .align 16 .b8 tile[512];"
# %r4: the thread's 4 bytes of the tile; %r5: those of the next thread of 128
PLACES = "mov.u32 %r6, tile; shl.b32 %r7, %r0, 2; add.s32 %r4, %r6, %r7; add.s32 %r7, %r7, 4; and.b32 %r7, %r7, 511; add.s32 %r5, %r6, %r7;"  # noqa: E501


@pytest.mark.parametrize("space", ["global", "shared", "volatile.global"])
@pytest.mark.parametrize("type_name", ["b8", "u16", "b16", "b32", "f32", "u64", "b64"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_vectors(space, type_name, count):
    size = int(type_name[1:]) // 8
    if size * count > 16:
        pytest.skip("there is no such access")
    x = aligned(RNG.integers(0, 256, 32 * size * count, dtype=np.uint8))
    out = aligned(np.zeros_like(x))
    letter = {1: "h", 2: "h", 4: "r", 8: "d"}[size]
    registers = ", ".join(f"%{letter}{5 + i}" for i in range(count))
    access = (f"v{count}." if count > 1 else "") + type_name
    between = ""
    if space == "shared":
        between = f"mov.u32 %r12, tile; mad.lo.s32 %r12, %r0, {size * count}, %r12;"
        between += f"st.shared.{access} [%r12], {{{registers}}};"
        between += f"mov.b{max(size, 2) * 8} %{letter}5, 0; ld.shared.{access} {{{registers}}}, [%r12];"
    load = "global" if space == "shared" else space
    body = f"""mul.wide.u32 %d3, %r0, {size * count}; add.s64 %d2, %d0, %d3; add.s64 %d3, %d1, %d3;
        ld.{load}.{access} {{{registers}}}, [%d2]; {between} st.global.{access} [%d3], {{{registers}}};"""
    counts = launch(kernel(body, 2, TILE), x, out)
    assert np.array_equal(out, x)
    assert counts.loaded_bytes == counts.stored_bytes == x.size
    assert counts.sectors == 2 * x.size // 32
    assert counts.wavefronts == (2 * -(-x.size // 128) if space == "shared" else 0) and not counts.conflicts


@pytest.mark.parametrize("of", ["s8", "u8", "s16", "u16", "s32", "u32"])
def test_loads_fill_up_wider_registers(of):
    x = RNG.integers(0, 256, 32 * int(of[1:]) // 8, dtype=np.uint8)
    out = np.zeros(32, np.uint64)
    body = f"mad.wide.u32 %d2, %r0, {int(of[1:]) // 8}, %d0; ld.global.{of} %d3, [%d2];"
    body += "mad.wide.u32 %d2, %r0, 8, %d1; st.global.b64 [%d2], %d3;"
    launch(kernel(body, 2), x, out)
    signed = np.dtype(f"{'i' if of[0] == 's' else 'u'}{int(of[1:]) // 8}")
    assert np.array_equal(out.view(np.int64), x.view(signed).astype(np.int64))


def test_sectors():
    """Every second 4 bytes: twice the sectors; the same 4 bytes: one."""
    for stride, wanted in ((4, 4), (8, 8), (32, 32), (0, 1)):
        counts = launch(
            kernel(f"mad.wide.u32 %d2, %r0, {stride}, %d0; ld.global.b32 %r5, [%d2];", 1),
            aligned(np.zeros(256, np.uint32)),
        )
        assert counts.sectors == wanted


@pytest.mark.parametrize(
    "stride,size,conflicts",
    [(4, 4, 0), (8, 4, 1), (128, 4, 31), (0, 4, 0), (132, 4, 0), (16, 16, 0), (32, 16, 4), (8, 8, 0), (16, 8, 2)],
)
def test_bank_conflicts(stride, size, conflicts):
    """32 banks of 4 bytes, 8 bytes by halves of a warp, 16 by quarters; lanes that write the same word do not count."""
    registers = {4: "b32 [%r5], %r9", 8: "v2.b32 [%r5], {%r9, %r9}", 16: "v4.b32 [%r5], {%r9, %r9, %r9, %r9}"}[size]
    body = f"mov.u32 %r9, 1; mov.u32 %r5, tile; mad.lo.s32 %r5, %r0, {stride}, %r5; st.shared.{registers};"
    counts = launch(kernel(body, 0, ".shared .align 16 .b8 tile[4400];"))
    assert sum(counts.conflicts.values()) == conflicts
    assert counts.wavefronts == max(size // 4, 1) + conflicts


@pytest.mark.parametrize("stride,count", [(16, 1), (32, 2), (80, 1), (128, 8), (0, 8)])
def test_bank_conflicts_of_units(stride, count):
    """Of 8 times 16 bytes: banks are 8 of these."""
    assert wavefronts_of_units(np.arange(3)[:, None] * 48 + np.arange(8) * stride) == (3 * count, 3)


class TestCopies:
    BODY = """mov.u32 %r5, tile; mad.lo.s32 %r5, %r0, {size}, %r5; mad.wide.u32 %d3, %r0, {size}, %d0;
        ld.global.u32 %r6, [%d1];
        cp.async.{cache}.shared.global [%r5], [%d3], {size}{valid};
        cp.async.commit_group; {wait}
        {load} mad.wide.u32 %d3, %r0, {size}, %d2; {store}"""

    def run(self, size: int, valid: int | None = None, wait: str = "cp.async.wait_group 0;", cache: str = "ca"):
        x, out = RNG.integers(0, 256, 32 * size, dtype=np.uint8), np.zeros(32 * size, np.uint8)
        letters = {4: "b32 {}", 8: "v2.b32 {}", 16: "v4.b32 {}"}[size]
        registers = "{" + ", ".join(f"%r{8 + i}" for i in range(size // 4)) + "}"
        load = "ld.shared." + letters.format(f"{registers}, [%r5];")
        store = "st.global." + letters.format(f"[%d3], {registers};")
        source = "" if valid is None else ", %r6"
        body = self.BODY.format(size=size, valid=source, wait=wait, load=load, store=store, cache=cache)
        counts = launch(kernel(body, 3, TILE), x, np.array([valid or 0], np.uint32), out)
        return x, out, counts

    @pytest.mark.parametrize("size", [4, 8, 16])
    def test_bytes(self, size):
        """Zeros after the valid bytes."""
        for valid in (None, 0, 1, size // 2, size - 1, size):
            x, out, counts = self.run(size, valid)
            count = size if valid is None else valid
            assert np.array_equal(out.reshape(32, size), np.where(np.arange(size) < count, x.reshape(32, size), 0))
            assert counts.copied_bytes == 32 * count

    def test_past_the_cache(self):
        x, out, _ = self.run(16, cache="cg")
        assert np.array_equal(x, out)
        with pytest.raises(PtxError, match="8 bytes"):
            self.run(8, cache="cg")

    @pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;"])
    def test_not_waited_for(self, wait):
        with pytest.raises(Fault, match="read of byte 0 of shared memory, to which a copy is under way"):
            self.run(16, wait=wait)

    def test_an_earlier_group(self):
        x, out, _ = self.run(16, wait="cp.async.commit_group; cp.async.wait_group 1;")
        assert np.array_equal(x, out)

    def test_nothing_is_read_of_no_bytes(self):
        body = """mov.u32 %r5, tile; mad.lo.s32 %r5, %r0, 16, %r5; mov.u32 %r6, {};
            cp.async.cg.shared.global [%r5], [%d0+1048576], 16, %r6; cp.async.commit_group; cp.async.wait_group 0;"""
        launch(kernel(body.format(0), 1, TILE), np.zeros(4, np.uint32))
        with pytest.raises(Fault, match="outside of every tensor"):
            launch(kernel(body.format(16), 1, TILE), np.zeros(4, np.uint32))


class TestBounds:
    def test_global(self):
        x = np.zeros(40, np.float32)
        body = "mad.wide.u32 %d2, %r2, 4, %d0; st.global.b32 [%d2], %r2;"
        pattern = (
            r"k: block \(1, 0, 0\), warp 0, lane 8: 4 bytes outside of every tensor, at byte 160 of the 160 of array 0"
        )
        with pytest.raises(Fault, match=pattern):
            launch(kernel(body, 1), x, blocks=2)

    def test_a_vector_over_the_end(self):
        with pytest.raises(Fault, match="16 bytes outside of every tensor"):
            launch(kernel("ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d0];", 1), np.zeros(3, np.float32))

    def test_two_tensors(self):
        """Lanes may go to different tensors."""
        x, y = np.zeros(16, np.uint32), np.zeros(16, np.uint32)
        body = "setp.lt.u32 %p0, %r0, 16; selp.b64 %d2, %d0, %d1, %p0; and.b32 %r5, %r0, 15;"
        launch(kernel(body + "mad.wide.u32 %d2, %r5, 4, %d2; st.global.b32 [%d2], %r0;", 2), x, y)
        assert x.tolist() == list(range(16)) and y.tolist() == list(range(16, 32))

    def test_predicates_keep_from_it(self):
        x = np.zeros(20, np.uint32)
        body = "setp.lt.u32 %p0, %r0, 20; mad.wide.u32 %d2, %r0, 4, %d0; @%p0 st.global.b32 [%d2], %r0;"
        launch(kernel(body, 1), x)
        assert x.tolist() == list(range(20))

    def test_shared(self):
        body = "mov.u32 %r5, tile; mad.lo.s32 %r5, %r0, 32, %r5; st.shared.b32 [%r5], %r0;"
        with pytest.raises(Fault, match="warp 0, lane 16: bytes 512 to 516 of 512 of shared memory"):
            launch(kernel(body, 0, TILE))

    def test_dynamic_shared(self):
        body = "mov.u32 %r5, tile; mad.lo.s32 %r5, %r0, 4, %r5; st.shared.b32 [%r5], %r0;"
        text = kernel(body, 0, ".extern .shared .align 16 .b8 tile[];")
        launch(text, dynamic_shared=128)
        with pytest.raises(Fault, match="bytes 124 to 128 of 124 of shared memory"):
            launch(text, dynamic_shared=124)

    @pytest.mark.parametrize("space,register", [("global", "%d2"), ("shared", "%r5")])
    def test_alignment(self, space, register):
        body = f"""mov.u32 %r5, tile; add.s32 %r5, %r5, 4; add.s64 %d2, %d0, 4;
            st.{space}.v2.b32 [{register}], {{%r0, %r0}};"""
        with pytest.raises(Fault, match="is not aligned to 8 bytes"):
            launch(kernel(body, 1, TILE), np.zeros(8, np.uint64))


class TestSharedMemory:
    def test_never_written(self):
        with pytest.raises(Fault, match="lane 31: read of byte 128 of shared memory, which nobody wrote"):
            launch(kernel(f"{PLACES} st.shared.b32 [%r4], %r0; ld.shared.b32 %r8, [%r5];", 0, TILE))

    RACES = {
        "read after write": ("st.shared.b32 [%r4], %r0;", "ld.shared.b32 %r8, [%r5];", "reads what warp 1 wrote"),
        "write after read": (
            "st.shared.b32 [%r4], %r0; bar.sync 0; ld.shared.b32 %r8, [%r5];",
            "st.shared.b32 [%r4], %r8;",
            "writes where warp . read",
        ),
        "write after write": ("st.shared.b32 [%r4], %r0;", "st.shared.b32 [%r5], %r0;", "writes where warp 1 wrote"),
    }

    @pytest.mark.parametrize("order", ["together", "forward", "reverse", "random"])
    @pytest.mark.parametrize("name", RACES)
    def test_races(self, name, order):
        before, after, message = self.RACES[name]
        if order != "together":
            message = ""  # which of its warps meet depends on the order
        launch(kernel(f"{PLACES} {before} bar.sync 0; {after}", 0, TILE), threads=128, order=order)
        with pytest.raises(Fault, match=f"race: .*{message}.* with no barrier in between|which nobody wrote"):
            launch(kernel(f"{PLACES} {before} {after}", 0, TILE), threads=128, order=order)

    def test_a_barrier_of_others_does_not_help(self):
        """Warps 0 and 1 meet at barrier 1, 2 and 3 at barrier 2."""
        meet = "shr.u32 %r9, %r0, 6; add.s32 %r9, %r9, 1; bar.sync %r9, 64;"
        with pytest.raises(Fault, match="warp 1, lane 31 reads what warp 2 wrote"):
            launch(kernel(f"{PLACES} st.shared.b32 [%r4], %r0; {meet} ld.shared.b32 %r8, [%r5];", 0, TILE), threads=128)

    def test_the_same_value(self):
        """Warps may write the same at once; it is counted."""
        counts = launch(kernel("mov.u32 %r5, tile; st.shared.b32 [%r5], 7;", 0, TILE), threads=64)
        assert counts.same_writes == 32
        with pytest.raises(Fault, match="race: .* writes where another thread writes something else at once"):
            launch(kernel("mov.u32 %r5, tile; st.shared.b32 [%r5], %r0;", 0, TILE), threads=64)

    def test_copies_race_as_well(self):
        copy = "cp.async.ca.shared.global [%r4], [%d0], 4; cp.async.commit_group; cp.async.wait_group 0;"
        launch(kernel(f"{PLACES} {copy} bar.sync 0; ld.shared.b32 %r8, [%r5];", 1, TILE), np.zeros(4), threads=128)
        with pytest.raises(Fault, match="race: .* reads what warp 1 wrote"):
            launch(kernel(f"{PLACES} {copy} ld.shared.b32 %r8, [%r5];", 1, TILE), np.zeros(4), threads=128)


class TestLanesOfAWarp:
    """%r4: the lane's own place, %r5: its neighbour's."""

    PLACES = "mov.u32 %r6, tile; mad.lo.s32 %r4, %r0, 4, %r6; xor.b32 %r5, %r0, 1; mad.lo.s32 %r5, %r5, 4, %r6;"
    RACES = {
        "read after write": ("st.shared.b32 [%r4], %r0;", "ld.shared.b32 %r8, [%r5];", "reads what .* wrote"),
        "write after read": (
            "st.shared.b32 [%r4], %r0; bar.sync 0; ld.shared.b32 %r8, [%r4];",
            "add.s32 %r8, %r8, 1; st.shared.b32 [%r5], %r8;",
            "writes where .* read",
        ),
        "write after reads": (
            "mov.u32 %r8, 1; st.shared.b32 [%r4], %r0; bar.sync 0; ld.shared.b32 %r8, [%r6];",
            "setp.eq.u32 %p0, %r0, 0; @%p0 st.shared.b32 [%r6], %r3;",
            "writes where .* read",
        ),
        "write after write": (
            "st.shared.b32 [%r4], %r0;",
            "add.s32 %r8, %r0, 50; st.shared.b32 [%r5], %r8;",
            "writes where .* wrote",
        ),
        "ldmatrix after write": (
            "st.shared.b32 [%r4], %r0;",
            "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r8}, [%r6];",
            "reads what .* wrote",
        ),
    }

    @pytest.mark.parametrize("name", RACES)
    def test_races(self, name):
        before, after, message = self.RACES[name]
        launch(kernel(f"{self.PLACES} {before} bar.warp.sync -1; {after}", 0, TILE))
        launch(kernel(f"{self.PLACES} {before} bar.sync 0; {after}", 0, TILE))
        for between in ("", "vote.sync.any.pred %p1, %p1, -1;"):  # it waits for the others, but orders no memory
            with pytest.raises(Fault, match=f"race: .*{message.replace('.*', 'another lane of its warp')}"):
                launch(kernel(f"{self.PLACES} {before} {between} {after}", 0, TILE))

    def test_its_own(self):
        """What the lane itself wrote and read, or all lanes write alike, or ldmatrix has read for all."""
        own = "st.shared.b32 [%r4], %r0; ld.shared.b32 %r8, [%r4]; st.shared.b32 [%r4], %r8;"
        alike = "bar.warp.sync -1; st.shared.b32 [%r6], %r3; st.shared.b32 [%r6], %r3;"
        read = "bar.warp.sync -1; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r8}, [%r6]; st.shared.b32 [%r5], %r0;"
        launch(kernel(f"{self.PLACES} {own} {alike} {read}", 0, TILE))


class TestGlobalMemory:
    NEXT = "add.s32 %r5, %r2, 1; and.b32 %r5, %r5, 63; mad.wide.u32 %d2, %r2, 4, %d0; mad.wide.u32 %d3, %r5, 4, %d0;"

    @pytest.mark.parametrize("order", ["together", "forward", "reverse", "random"])
    @pytest.mark.parametrize(
        "accesses",
        [
            "st.global.b32 [%d2], %r0; ld.global.b32 %r6, [%d3];",
            "ld.global.b32 %r6, [%d3]; st.global.b32 [%d2], %r0;",
            "st.global.b32 [%d0], %r0;",
        ],
    )
    def test_races_of_blocks(self, accesses, order):
        with pytest.raises(Fault, match="race: .* array 0|something else at once"):
            launch(kernel(self.NEXT + accesses, 1), np.zeros(64, np.uint32), blocks=2, order=order)

    def test_races_of_warps(self):
        launch(kernel(f"{self.NEXT} st.global.b32 [%d2], %r0; bar.sync 0; ld.global.b32 %r6, [%d3];", 1),
               np.zeros(64, np.uint32), threads=64)  # fmt: skip
        with pytest.raises(Fault, match="race: .* reads what warp 1 wrote, in array 0, with no barrier"):
            launch(kernel(f"{self.NEXT} st.global.b32 [%d2], %r0; ld.global.b32 %r6, [%d3];", 1),
                   np.zeros(64, np.uint32), threads=64)  # fmt: skip

    def test_blocks_may_read_the_same(self):
        launch(kernel("ld.global.b32 %r6, [%d0];", 1), np.zeros(64, np.uint32), blocks=64, threads=64)
