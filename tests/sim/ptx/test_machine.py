"""Branches, barriers, orders, and what is not known."""

import numpy as np
import pytest

from ptx.faults import Fault
from ptx.flow import blocks_of
from ptx.machine import ORDERS
from ptx.parse import PtxError, parse
from ptx.program import Program
from ptx.testing import HEADER, kernel, launch

STORE = "mad.wide.u32 %d1, %r2, 4, %d0; st.global.b32 [%d1], %r5;"
TILE = ".shared .align 16 .b8 tile[512];"


class TestBranches:
    @pytest.mark.parametrize("order", ORDERS)
    def test_loops_of_different_length(self, order):
        """Thread i sums 0 to i; all meet behind the loop, where a warp instruction wants them together."""
        body = f"""
            mov.u32 %r5, 0; mov.u32 %r6, 0;
        $LOOP:
            add.s32 %r5, %r5, %r6; add.s32 %r6, %r6, 1;
            setp.le.u32 %p0, %r6, %r2;
            @%p0 bra $LOOP;
            redux.sync.max.u32 %r7, %r6, -1;
            {STORE}
            add.s64 %d1, %d1, 1024; st.global.b32 [%d1], %r7;"""
        out = np.zeros(512, np.uint32)
        launch(kernel(body, 1), out, blocks=2, threads=128, order=order)
        assert out[:256].tolist() == [i * (i + 1) // 2 for i in range(256)]
        assert out[256:].tolist() == np.repeat(np.arange(32, 257, 32), 32).tolist()

    @pytest.mark.parametrize("order", ORDERS)
    def test_code_that_stands_behind_what_follows_it(self, order):
        """The odd lanes' branch stands at the end: the others must wait for them all the same."""
        body = f"""
            and.b32 %r6, %r0, 1; setp.eq.s32 %p0, %r6, 1; mov.u32 %r5, 100;
            @%p0 bra $ODD;
        $JOIN:
            redux.sync.add.u32 %r5, %r5, -1;
            {STORE} ret;
        $ODD:
            mov.u32 %r5, 1;
            bra.uni $JOIN;"""
        out = np.zeros(128, np.uint32)
        launch(kernel(body, 1), out, threads=128, order=order)
        assert out.tolist() == [16 * 101] * 128

    def test_loops_in_loops(self):
        """sum over i < 4 of (i * n), n the thread's, by counting; some threads leave early."""
        body = f"""
            mov.u32 %r5, 0; mov.u32 %r6, 0; setp.gt.u32 %p1, %r0, 60; @%p1 ret;
        $OUTER:
            mul.lo.u32 %r7, %r6, %r0; mov.u32 %r8, 0;
        $INNER:
            setp.ge.u32 %p0, %r8, %r7; @%p0 bra $NEXT;
            add.s32 %r5, %r5, 1; add.s32 %r8, %r8, 1; bra.uni $INNER;
        $NEXT:
            add.s32 %r6, %r6, 1; setp.lt.u32 %p0, %r6, 4; @%p0 bra $OUTER;
            {STORE}"""
        out = np.full(64, 7, np.uint32)
        text = kernel(body, 1)
        launch(text, out, threads=64)
        assert out.tolist() == [6 * n for n in range(61)] + [7] * 3
        assert max(len(block.loops) for block in blocks_of(parse(text, "k"))) == 2

    def test_registers_start_as_nan(self):
        out = np.zeros(32, np.float32)
        launch(kernel("mad.wide.u32 %d1, %r2, 4, %d0; add.f32 %r5, %r6, 0f3F800000; st.global.f32 [%d1], %r5;", 1), out)
        assert np.isnan(out).all()


class TestBarriers:
    EXCHANGE = """mov.u32 %r6, tile; shl.b32 %r7, %r0, 2; add.s32 %r4, %r6, %r7;
        xor.b32 %r7, %r7, 508; add.s32 %r8, %r6, %r7;
        st.shared.b32 [%r4], %r0; {} ld.shared.b32 %r5, [%r8];"""

    @pytest.mark.parametrize("order", ORDERS)
    def test_exchange(self, order):
        out = np.zeros(256, np.uint32)
        launch(kernel(self.EXCHANGE.format("bar.sync 0;") + STORE, 1, TILE), out, blocks=2, threads=128, order=order)
        assert out.tolist() == 2 * list(range(127, -1, -1))

    @pytest.mark.parametrize("order", ORDERS)
    def test_producer_and_consumer(self, order):
        """Warp 0 writes and arrives; warp 1 waits, and reads; then the same the other way round, 3 times."""
        body = f"""
            mov.u32 %r6, tile; shl.b32 %r7, %r0, 2; and.b32 %r7, %r7, 127; add.s32 %r6, %r6, %r7;
            mov.u32 %r9, 0; mov.u32 %r5, 0; setp.ge.u32 %p0, %r0, 32; @%p0 bra $CONSUMER;
        $PRODUCER:
            add.s32 %r10, %r9, %r0; st.shared.b32 [%r6], %r10; bar.arrive 1, 64; bar.sync 2, 64;
            add.s32 %r9, %r9, 1; setp.lt.u32 %p1, %r9, 3; @%p1 bra $PRODUCER;
            bra.uni $END;
        $CONSUMER:
            bar.sync 1, 64; ld.shared.b32 %r10, [%r6]; add.s32 %r5, %r5, %r10; bar.arrive 2, 64;
            add.s32 %r9, %r9, 1; setp.lt.u32 %p1, %r9, 3; @%p1 bra $CONSUMER;
        $END:
            {STORE}"""
        out = np.zeros(64, np.uint32)
        launch(kernel(body, 1, TILE), out, threads=64, order=order)
        assert out[32:].tolist() == [3 * i + 3 for i in range(32)]
        with pytest.raises(Fault, match="race|deadlock|ends while|second time"):
            launch(kernel(body.replace("bar.sync 2, 64;", ""), 1, TILE), out, threads=64, order=order)

    @pytest.mark.parametrize("order", ORDERS)
    def test_a_part_of_a_warp(self, order):
        body = "setp.lt.u32 %p0, %r0, 48; @!%p0 bra $END; bar.sync 0; $END: mov.u32 %r5, 0;"
        with pytest.raises(Fault, match=r"warp 1, lane 0: bar.sync is run by the lanes 0xffff only \(divergence\)"):
            launch(kernel(body), threads=64, order=order)

    @pytest.mark.parametrize("order", ORDERS)
    def test_a_warp_that_does_not_come(self, order):
        body = "setp.lt.u32 %p0, %r0, 64; @!%p0 bra $END; bar.sync 0; $END: mov.u32 %r5, 0;"
        with pytest.raises(
            Fault, match=r"deadlock: block \(0, 0, 0\): barrier 0 of 96 threads has warps \[0, 1\]|\[1, 0\]"
        ):
            launch(kernel(body), threads=96, order=order)

    def test_an_arrival_too_many(self):
        with pytest.raises(Fault, match="comes to barrier 1 a second time"):
            launch(kernel("bar.arrive 1, 96; bar.arrive 1, 96;"), threads=64)
        with pytest.raises(Fault, match=r"ends while warps \[0, 1\] have arrived at barrier 1, of 96 threads"):
            launch(kernel("bar.arrive 1, 96;"), threads=64)

    def test_different_numbers_of_threads(self):
        body = "shr.u32 %r5, %r0, 5; mad.lo.s32 %r5, %r5, 32, 64; bar.sync 1, %r5;"
        with pytest.raises(Fault, match="barrier 1 of 96 threads, where others wait for 64"):
            launch(kernel(body), threads=64)


class TestUnknown:
    """Whatever is not known is an error that names it and its line, before anything runs."""

    @pytest.mark.parametrize(
        "instruction,message",
        [
            ("frobnicate.b32 %r4, %r5", "frobnicate.b32 is not known"),
            ("add.sat.s32 %r4, %r5, %r6", "add.sat.s32 is not known"),
            ("add.rn.f32.bf16 %r4, %r5, %h1", "add.rn.f32.bf16 is not known"),
            ("ld.global.v8.b32 {%r4, %r5}, [%d0]", "ld.global.v8.b32 is not known"),
            ("ld.global.L1::evict_last.b32 %r4, [%d0]", "is not known"),
            ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r4}, {%r4}, {%r4}, {%r4}", "m8n8k4"),
            ("atom.global.add.f32 %r4, [%d0], %r5", "atom.global.add.f32 is not known"),
            ("mov.u32 %r4, %clock", "operand %clock is not known"),
            ("mov.u32 %r4, nobody", "nobody is not known"),
            ("add.s32 %r4, %r5", "2 operands"),
            ("add.s32 %r4, %r5, %r6, %r7", "4 operands"),
            ("add.s32 %r4, %r5, %d1", "can't be an operand of type s32"),
            ("add.s64 %r4, %d1, %d2", "%r4 of type b32 can't hold a result of type s64"),
            ("add.s32 %r4, %r5, 0f3F800000", "0f3F800000 is not of type s32"),
            ("add.f32 %r4, %r5, 1", "1 is not of type f32"),
            ("add.u16 %h1, %h2, 65536", "65536 is not of type u16"),
            ("setp.lt.s32 %r4, %r5, %r6", "can't hold a result of type pred"),
            ("selp.b32 %r4, %r5, %r6, %r7", "can't be an operand of type pred"),
            ("ld.global.b32 %r4, [%r5]", "%r5 of type b32 can't be an address"),
            ("ld.shared.b32 %r4, [%d5]", None),
            ("ld.global.v2.b32 {%r4, %r5, %r6}, [%d0]", "3 registers in the place of 2"),
            ("bra $NOWHERE", "no such label"),
            ("cp.async.ca.shared.global [%r4], [%d0], 12", "12 bytes"),
            ("@%p0 bar.sync 0", "a barrier under a predicate is not known"),
            ("call foo", "is not known"),
        ],
    )
    def test_instructions(self, instruction, message):
        text = kernel(f"bar.warp.sync -1;\n{instruction};", 1, TILE)
        if message is None:  # a 64-bit register may hold an address in shared memory
            Program(parse(text, "k"))
            return
        with pytest.raises(PtxError) as caught:
            launch(text, np.zeros(1))
        assert message in str(caught.value)
        if message.endswith("is not known") and "line" in str(caught.value):
            line = next(i for i, x in enumerate(text.splitlines(), 1) if instruction in x)
            assert f"line {line}: " in str(caught.value)

    @pytest.mark.parametrize(
        "text,message",
        [
            (".func (.reg .b32 %r) f() { ret; }", "not known outside of a kernel"),
            (".visible .entry k() { .reg .b128 %q; ret; }", "registers of a type that is not known"),
            (".visible .entry k() { .local .align 4 .b8 depot[4]; ret; }", "not known in a kernel"),
            (".visible .entry k(.param .b32 a[4]) { ret; }", "not a parameter that is known"),
            (".visible .entry k() .frobnicate 4 { ret; }", "directive .frobnicate is not known"),
            (".visible .entry k() { .reg .b32 %r; mov.u32 %r, 0; }", "does not end with ret"),
            (".visible .entry other() {\n ret;\n}", "no kernel k in this text, which has other"),
        ],
    )
    def test_texts(self, text, message):
        with pytest.raises(PtxError, match=message):
            launch(f"{HEADER}\n{text}")

    def test_launches(self):
        for threads in (48, 2048):
            with pytest.raises(ValueError, match=f"blocks of {threads} threads"):
                launch(kernel(""), threads=threads)
        with pytest.raises(ValueError, match="0 bytes of parameters, 8 wanted"):
            launch(kernel("", 1))
        with pytest.raises(ValueError, match="order is one of together"):
            launch(kernel(""), order="backwards")
