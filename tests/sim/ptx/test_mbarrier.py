"""mbarrier objects: phases, who waits, what is known after a wait, and their misuse."""

import numpy as np
import pytest

from ptx import mbarrier
from ptx.faults import Fault
from ptx.machine import ORDERS
from ptx.testing import kernel, launch

SHARED = ".shared .align 16 .b8 tile[512]; .shared .align 8 .b8 bars[64];"
# %r9: the barrier; %r4: the thread's 4 bytes of the tile; %r5: those of the thread at the other end of 128
INIT = """mov.u32 %r9, bars; setp.eq.u32 %p0, %r0, 0; mov.u32 %r6, tile; shl.b32 %r7, %r0, 2; add.s32 %r4, %r6, %r7;
    xor.b32 %r7, %r7, 508; add.s32 %r5, %r6, %r7; @%p0 mbarrier.init.shared::cta.b64 [%r9], {count}; bar.sync 0;"""
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%r9];"
WAIT = """{{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r9], {parity};
    @!done bra.uni again; }}"""
STORE = "mad.wide.u32 %d1, %r2, 4, %d0; st.global.b32 [%d1], %r8;"


def run(body: str, count: int = 128, threads: int = 128, **options) -> np.ndarray:
    out = np.zeros(threads * options.get("blocks", 1), np.uint32)
    text = kernel(INIT.format(count=count) + body, 1, SHARED)
    launch(text, out, threads=threads, **options)
    return out


class TestWaits:
    EXCHANGE = "st.shared.b32 [%r4], %r0;" + ARRIVE + WAIT.format(parity=0) + "ld.shared.b32 %r8, [%r5];" + STORE

    @pytest.mark.parametrize("order", ORDERS)
    def test_as_a_barrier(self, order):
        assert run(self.EXCHANGE, order=order, blocks=2).tolist() == 2 * list(range(127, -1, -1))

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("kind", ["test_wait", "try_wait", "try_wait.acquire.cta"])
    def test_a_state(self, order, kind):
        """The state of an arrival stands for its phase."""
        wait = f"again: mbarrier.{kind}.shared::cta.b64 %p1, [%r9], %d5; @!%p1 bra again;"
        body = "st.shared.b32 [%r4], %r0; mbarrier.arrive.release.cta.shared::cta.b64 %d5, [%r9];" + wait
        assert run(body + "ld.shared.b32 %r8, [%r5];" + STORE, order=order).tolist() == list(range(127, -1, -1))

    @pytest.mark.parametrize("order", ORDERS)
    def test_phases(self, order):
        """Five, whose parities alternate; each thread adds what the one at the other end wrote, plus the phase."""
        body = f"""
            mov.u32 %r10, 0; mov.u32 %r8, 0;
        $LOOP:
            and.b32 %r11, %r10, 1; add.s32 %r12, %r0, %r10; st.shared.b32 [%r4], %r12;
            {ARRIVE} {WAIT.format(parity="%r11")}
            ld.shared.b32 %r12, [%r5]; add.s32 %r8, %r8, %r12; bar.sync 0;
            add.s32 %r10, %r10, 1; setp.lt.u32 %p1, %r10, 5; @%p1 bra $LOOP; {STORE}"""
        assert run(body, order=order).tolist() == [5 * (127 - i) + 10 for i in range(128)]

    def test_the_phase_before_is_over(self):
        """A new barrier lets parity 1 pass, and nothing is known after it."""
        body = "st.shared.b32 [%r4], %r0;" + WAIT.format(parity=1) + "ld.shared.b32 %r8, [%r5];"
        with pytest.raises(Fault, match="race: .* reads what warp 3 wrote"):
            run(body)

    def test_an_arrival_of_several(self):
        body = "@%p0 mbarrier.arrive.shared::cta.b64 _, [%r9], 3;" + WAIT.format(parity=0)
        run(body, count=3)
        with pytest.raises(Fault, match="lacks 1 of 4 arrivals and 0 bytes"):
            run(body, count=4)

    def test_without_an_arrival_nothing_is_known(self):
        """Warp 0 does not arrive: what it wrote is not known."""
        body = "st.shared.b32 [%r4], %r0; setp.lt.u32 %p1, %r0, 32; @!%p1 " + ARRIVE
        with pytest.raises(Fault, match="race: .* warp 3, lane 0 reads what warp 0 wrote"):
            run(body + WAIT.format(parity=0) + "ld.shared.b32 %r8, [%r5];", count=96)

    @pytest.mark.parametrize("order", ORDERS)
    def test_deadlock(self, order):
        with pytest.raises(Fault, match=r"deadlock: block \(0, 0, 0\): warps \[0, 1, 2, 3\] wait for the mbarrier at"):
            run(ARRIVE + WAIT.format(parity=0), count=129, order=order)

    def test_expected_bytes_that_do_not_come(self):
        for opcode in ("arrive.expect_tx.shared::cta.b64 _,", "expect_tx.relaxed.cta.shared::cta.b64"):
            body = f"@%p0 mbarrier.{opcode} [%r9], 48;" + (ARRIVE if "relaxed" in opcode else "")
            with pytest.raises(Fault, match="lacks 0 of .* arrivals and 48 bytes"):
                run(body + WAIT.format(parity=0), count=128 if "relaxed" in opcode else 1)


class TestMisuse:
    @pytest.mark.parametrize(
        "body,message",
        [
            ("add.s32 %r9, %r9, 8;" + ARRIVE, "at byte 520 is no mbarrier that is initialized"),
            ("add.s32 %r9, %r9, 4;" + ARRIVE, "is not aligned to 8 bytes"),
            (ARRIVE + "@%p0 mbarrier.arrive.shared::cta.b64 _, [%r9], 129;", "129 arrivals; the mbarrier at byte 512"),
            ("@%p0 mbarrier.init.shared::cta.b64 [%r9], 1;", "where an mbarrier is"),
            ("@%p0 st.shared.b64 [%r9], 0;", "write to byte 512 of shared memory, where an mbarrier is"),
            ("@%p0 ld.shared.b32 %r8, [%r9];", "read of byte 512 of shared memory, where an mbarrier is"),
            ("@%p0 mbarrier.inval.shared::cta.b64 [%r9]; bar.sync 0;" + ARRIVE, "at byte 512 is no mbarrier"),
            ("mbarrier.inval.shared::cta.b64 [%r9];", "of one place by 32 lanes"),
            (ARRIVE + "@%p0 mbarrier.inval.shared::cta.b64 [%r9];", "race: .* writes where warp 1 read"),
            (WAIT.format(parity=2), "a parity of 2"),
            ("@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 0x7fffffff;", "more than 1048575 can't be"),
            ("mov.u64 %d5, 1;" + WAIT.replace(".parity", "").format(parity="%d5"), "the state is not of it"),
        ],
    )
    def test_faults(self, body, message):
        with pytest.raises(Fault, match=message):
            run(body)

    def test_no_barrier_behind_the_initialization(self):
        text = kernel(INIT.format(count=128).replace("bar.sync 0;", "") + ARRIVE, 0, SHARED)
        with pytest.raises(Fault, match="race: .* warp 1, lane 0 reads what warp 0 wrote, byte 512"):
            launch(text, threads=128)

    def test_counts(self):
        for count in (0, 2**20):
            with pytest.raises(Fault, match=f"an mbarrier of {count} arrivals"):
                run("", count=count)

    def test_the_memory_is_free_after_inval(self):
        body = ARRIVE + WAIT.format(parity=0) + "bar.sync 0; @%p0 mbarrier.inval.shared::cta.b64 [%r9];"
        body += "@%p0 st.shared.b64 [%r9], 7; @%p0 ld.shared.b32 %r8, [%r9];" + STORE
        assert run(body)[0] == 7

    def test_again_at_the_same_place(self):
        again = "bar.sync 0; @%p0 mbarrier.inval.shared::cta.b64 [%r9];"
        again += "@%p0 mbarrier.init.shared::cta.b64 [%r9], 64; bar.sync 0; setp.lt.u32 %p1, %r0, 64; @%p1 "
        body = TestWaits.EXCHANGE + again + ARRIVE + WAIT.format(parity=0)
        assert run(body).tolist() == list(range(127, -1, -1))


def test_every_instruction_is_tested():
    """In one space and order; .shared is .shared::cta, and the orders are those that arrivals and waits have anyway."""
    waits = {f"mbarrier.{kind}{parity}" for kind in ("test_wait", "try_wait") for parity in ("", ".parity")}
    waits |= {"mbarrier.arrive", "mbarrier.arrive.expect_tx"}
    ordered = {x + o for x in waits for o in ("", ".acquire.cta" if "wait" in x else ".release.cta")}
    named = {f"{x}.{s}.b64" for x in ordered | {"mbarrier.init", "mbarrier.inval", "mbarrier.expect_tx.relaxed.cta"}
             for s in ("shared", "shared::cta")}  # fmt: skip
    fences = {"fence.proxy.async", "fence.proxy.async.shared::cta", "fence.proxy.async.shared::cluster"}  # test_bulk.py
    assert named | fences | {"fence.mbarrier_init.release.cluster"} == mbarrier.TABLE.keys()
