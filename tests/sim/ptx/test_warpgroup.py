"""wgmma, in every layout of shared memory that its descriptors can name, and setmaxnreg."""

import numpy as np
import pytest

from ptx import warpgroup
from ptx.faults import Fault
from ptx.machine import ORDERS
from ptx.parse import PtxError
from ptx.testing import aligned, kernel, launch

RNG = np.random.default_rng(0)
MODES = {0: 0, 128: 1, 64: 2, 32: 3}  # PTX ISA, matrix descriptor: bits 62 and 63
KINDS = {"f16": (np.uint16, 16), "bf16": (np.uint16, 16), "tf32": (np.uint32, 8)}  # and the depth
SHARED = ".shared .align 1024 .b8 tile[65536]; .shared .align 8 .b8 bars[8];"


def bits(x: np.ndarray, kind: str) -> np.ndarray:
    """Of small integers."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    whole = x.astype(np.float32).view(np.uint32)
    return (whole >> 16).astype(np.uint16) if kind == "bf16" else whole | 0x1FFF  # whose lowest bits do not count


@pytest.fixture(scope="module")
def builder():
    pytest.importorskip("triton")
    from triton._C import libtriton

    context = libtriton.ir.context()
    libtriton.ir.load_dialects(context)
    result = libtriton.gluon_ir.GluonOpBuilder(context)
    result.keeps = context  # alive
    return result


def spread(counts: list[np.ndarray], bases: list[list]) -> np.ndarray:
    """Where each of the numbers lies: the bases of its bits, combined by xor."""
    found = np.zeros((*np.broadcast_shapes(*(x.shape for x in counts)), 2), int)
    for numbers, each in zip(counts, bases, strict=True):
        for bit, base in enumerate(each):
            found ^= np.where((numbers >> bit & 1)[..., None], base, 0)
    return found


def in_registers(builder, shape: list[int], depth: int, width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Triton's layout of d, or, with `width`, of a: (rows, columns), of shape (128 threads, numbers of each)."""
    from triton.experimental.gluon import language as gluon

    columns = 8 if width else shape[1]
    layout = gluon.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, depth])
    if width:
        layout = gluon.DotOperandLayout(operand_index=0, parent=layout, k_width=width)
    linear = builder.to_linear_layout(layout._to_ir(builder), shape)
    thread, number = np.arange(128)[:, None], np.arange(2 ** len(linear.reg_bases))[None, :]
    parts = [thread % 32, thread // 32, number], [linear.lane_bases, linear.warp_bases, linear.reg_bases]
    return tuple(np.moveaxis(spread(*parts), -1, 0))


def in_shared(builder, matrix: np.ndarray, width: int, transposed: bool) -> tuple[np.ndarray, int, int]:
    """(numbers of the image, leading and stride offset in bytes) of a matrix (rows, depth). Swizzled: Triton's layout;
    else core matrices of 8 x 16 bytes, one behind the other, as the PTX ISA draws them."""
    rows, depth = matrix.shape
    size = matrix.itemsize
    if width:
        from triton.experimental.gluon import language as gluon

        options = {"element_bitwidth": 8 * size, "rank": 2, "transposed": transposed}
        layout = gluon.NVMMASharedLayout(swizzle_byte_width=width, **options)
        bases = builder.to_linear_layout(layout._to_ir(builder), [rows, depth]).offset_bases
        place = spread([np.arange(rows * depth)], [bases])
        return matrix[place[:, 0], place[:, 1]], width * depth if transposed else 16, 8 * width
    if transposed:
        image = matrix.reshape(rows // 8, 8, depth // 8, 8).transpose(0, 2, 3, 1)  # k along the rows of a core matrix
        return image.ravel(), 128, 16 * depth
    chunk = 16 // size
    image = matrix.reshape(rows // 8, 8, depth // chunk, chunk).transpose(0, 2, 1, 3)
    return image.ravel(), 128, 8 * depth * size


def descriptor(start: int, leading: int, stride: int, width: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | MODES[width] << 62


FILL = """mov.u32 %r8, tile; mov.u32 %r9, bars; setp.eq.u32 %p0, %r0, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%r9], 1; fence.proxy.async.shared::cta; bar.sync 0;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], {size};
    @%p0 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r8], [%d0], {size}, [%r9];
    {{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r9], 0; @!done bra again; }}"""


def moves(what: str, pointer: str, count: int, name: str) -> str:
    """Loads or stores `count` registers of each thread."""
    lines = [f"mad.wide.u32 %d6, %r0, {4 * count}, {pointer};"]
    for i in range(count):
        parts = (f"%{name}{i}", f"[%d6+{4 * i}]")
        lines.append(f"{what}.global.b32 {', '.join(parts if what == 'ld' else parts[::-1])};")
    return "\n".join(lines)


def registers(name: str, count: int) -> str:
    return "{" + ", ".join(f"%{name}{i}" for i in range(count)) + "}"


def multiply(
    builder, kind: str, columns: int, steps: int, a_width: int | None, b_width: int, transposed=(False, False),
    signs=(1, 1), adds: bool = True, order: str = "together",
) -> None:  # fmt: skip
    """d = a b + c, of `steps` depths, one product after the other; a_width None: a from registers."""
    depth = KINDS[kind][1]
    a, b = (RNG.integers(-4, 5, (n, steps * depth)).astype(np.float32) for n in (64, columns))
    c = RNG.integers(-8, 9, (64, columns)).astype(np.float32)
    image, start, descriptors = np.zeros(65536, np.uint8), 0, []
    for matrix, width, turned in ((a, a_width, transposed[0]), (b, b_width, transposed[1])):
        if width is None:
            descriptors.append(None)
            continue
        numbers, leading, stride = in_shared(builder, bits(matrix, kind), width, turned)
        image[start : start + numbers.nbytes] = np.ascontiguousarray(numbers).view(np.uint8)
        step = (2 * stride if width else 2 * leading) if turned else (32 if width else 2 * leading)
        descriptors.append([descriptor(start + i * step, leading, stride, width) for i in range(steps)])
        start += -(-numbers.nbytes // 1024) * 1024
    count, lines = columns // 2, []
    opcode = f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind}"
    fragments = np.zeros((128, 4 * steps), np.uint32)
    turns = [] if kind == "tf32" else [int(x) for x in (transposed if descriptors[0] else transposed[1:])]
    flags = ", ".join(map(str, [*signs, *turns]))
    for i in range(steps):
        left = "%d8" if descriptors[0] else "{" + ", ".join(f"%a{4 * i + j}" for j in range(4)) + "}"
        if descriptors[0]:
            lines.append(f"mov.b64 %d8, {descriptors[0][i]:#x};")
        else:
            where = in_registers(builder, [64, depth], depth, 2 if depth == 16 else 1)
            part = bits(a[:, i * depth : (i + 1) * depth], kind)[where]
            fragments[:, 4 * i : 4 * i + 4] = np.ascontiguousarray(part).view(np.uint32)
        lines.append(
            f"mov.b64 %d9, {descriptors[1][i]:#x}; {opcode} {registers('c', count)}, {left}, %d9, %p3, {flags};"
        )
        lines.append("setp.eq.u32 %p3, %r0, %r0;")
    body = f"""
        .reg .b32 %c<{count}>; .reg .b32 %a<{4 * steps}>; {FILL.format(size=start)}
        {moves("ld", "%d1", count, "c")} {moves("ld", "%d2", 4 * steps, "a")}
        setp.{"eq" if adds else "ne"}.u32 %p3, %r0, %r0;
        wgmma.fence.sync.aligned; {"".join(lines)} wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        {moves("st", "%d1", count, "c")}"""
    where = in_registers(builder, [64, columns], depth)
    d = aligned(c[where])
    counts = launch(kernel(body, 3, SHARED), aligned(image[:start]), d, fragments, threads=128, order=order)
    wanted = signs[0] * signs[1] * (a @ b.T) + c
    if not adds:  # the first product alone leaves out c
        wanted = wanted - c
    assert np.array_equal(d, wanted[where])
    assert counts.mma == {opcode: 4 * steps} and counts.operations == 2 * 64 * columns * depth * steps
    read = 32 * steps * (columns + 64 * (a_width is not None))  # bytes, 128 at a time; and those of the copy
    assert 128 * counts.wavefronts == read + start and not counts.conflicts


class TestProducts:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("columns", [8, 32, 256])
    @pytest.mark.parametrize("width", MODES)
    @pytest.mark.parametrize("from_registers", [False, True])
    def test_rows_along_the_depth(self, builder, kind, columns, width, from_registers):
        size = KINDS[kind][0]().itemsize
        steps = max(width // size // KINDS[kind][1], 1) if width else 2
        multiply(builder, kind, columns, steps, None if from_registers else width, width)

    @pytest.mark.parametrize("kind", ["f16", "bf16"])
    @pytest.mark.parametrize("columns", [16, 64, 128])
    @pytest.mark.parametrize("width", MODES)
    @pytest.mark.parametrize("transposed", [(False, True), (True, False), (True, True)])
    def test_transposed(self, builder, kind, columns, width, transposed):
        """Rows along M and N; of two depths, if no matrix is along the depth and too narrow for it."""
        if columns < width // 2:
            pytest.skip("fewer columns than a row has")
        steps = 1 if width == 32 and not all(transposed) else 2
        depth_width = width if steps * 16 == width // 2 or not width else {1: 32, 2: 64}[steps]
        widths = [width if turned else depth_width for turned in transposed]
        multiply(builder, kind, columns, steps, *widths, transposed)
        if not transposed[0]:
            multiply(builder, kind, columns, steps, None, width, transposed)

    @pytest.mark.parametrize("signs", [(1, -1), (-1, 1), (-1, -1)])
    @pytest.mark.parametrize("from_registers", [False, True])
    def test_signs(self, builder, signs, from_registers):
        multiply(builder, "f16", 16, 4, None if from_registers else 128, 128, signs=signs)

    @pytest.mark.parametrize("order", ORDERS)
    def test_without_what_was_there(self, builder, order):
        multiply(builder, "bf16", 16, 4, 128, 128, adds=False, order=order)

    @pytest.mark.parametrize("columns", [24, 40, 72, 136, 248])
    def test_columns(self, builder, columns):
        """Of one and the same number each: every one is there."""
        body = FAULTS.replace("m64n8k16", f"m64n{columns}k16").replace("%c<4>", f"%c<{columns // 2}>")
        body = body.replace(registers("c", 4), registers("c", columns // 2))
        body = body.replace("// moved", "".join(f"mov.b32 %c{i}, 0;" for i in range(4, columns // 2)))
        d = np.zeros((128, columns // 2), np.float32)
        body = body.split("// stores")[0] + moves("st", "%d1", columns // 2, "c")
        launch(kernel(body, 2, SHARED), ones(), d, threads=128)
        assert (d == 16).all()


def ones() -> np.ndarray:
    return aligned(np.ones(32768, np.float16))


# d = a b of 64 x 16 and 16 x 8 ones; both in core matrices that lie one behind the other
FAULTS = f"""
    .reg .b32 %c<4>; .reg .b32 %a<4>; {FILL.format(size=65536)}
    mov.b32 %a0, 0x3c003c00; mov.b32 %a1, %a0; mov.b32 %a2, %a0; mov.b32 %a3, %a0;
    mov.b32 %c0, 0; mov.b32 %c1, 0; mov.b32 %c2, 0; mov.b32 %c3, 0; // moved
    mov.b64 %d8, {descriptor(0, 128, 256, 0):#x}; mov.b64 %d9, {descriptor(2048, 128, 256, 0):#x};
    setp.eq.u32 %p3, %r0, %r0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {registers("c", 4)}, %d8, %d9, %p3, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0; // waited
    // stores
    {moves("st", "%d1", 4, "c")}"""
WAIT = "wgmma.wait_group.sync.aligned 0;"
A = "{%a0, %a1, %a2, %a3}"
PRODUCT = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {registers('c', 4)}, {A}, %d9, %p3, 1, 1, 0;"
MISTAKES = {
    "no fence": ("wgmma.fence.sync.aligned;", "", "%c0 was used by another instruction: a wgmma.fence lacks"),
    "a change behind the fence": ("aligned;\n    wgmma.mma", "aligned; mov.b32 %c2, 0; wgmma.mma", "%c2 was used by"),
    "a read behind the fence": ("aligned;\n    wgmma.mma", "aligned; mov.b32 %r5, %c1; wgmma.mma", "%c1 was used by"),
    "a fragment behind the fence": (
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%c0, %c1, %c2, %c3}, %d8, %d9, %p3, 1, 1, 0, 0;",
        f"mov.b32 %a1, %a0; {PRODUCT}",
        "%a. was used by another instruction: a wgmma.fence lacks",
    ),
    "no wait": (WAIT, "", "%c0 is used by a wgmma that is under way: a wgmma.wait_group lacks"),
    "a wait that leaves a group": (WAIT, WAIT.replace("0", "1"), "%c0 is used by a wgmma that is under way"),
    "no commit": ("wgmma.commit_group.sync.aligned;", "", "%c0 is used by a wgmma that is under way"),
    "a fragment that is under way": (
        WAIT,
        f"wgmma.fence.sync.aligned; {PRODUCT} mov.b32 %a2, 0; {WAIT}",
        "%a2 is used by",
    ),
    "another shape": (
        WAIT,
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%c0, %c1, %c2, %c3, %r4, %r5, %r6, %r7}, %d8, %d9, %p3, 1,"
        f" 1, 0, 0; {WAIT}",
        "of another shape|%r4 was used",
    ),
    "written under way": (
        WAIT,
        f"@%p0 st.shared.b32 [%r8], 0; {WAIT}",
        "which a wgmma or a bulk copy that is under way",
    ),
    "a copy under way": (
        WAIT,
        f"cp.async.ca.shared.global [%r8], [%d0], 4; {WAIT}",
        "copy to byte 0 of shared memory, which a wgmma or a bulk copy",
    ),
    "no fence of the proxy": (
        "wgmma.fence.sync.aligned;",
        "@%p0 st.shared.b32 [%r8], 0x3c003c00; bar.sync 0; wgmma.fence.sync.aligned;",
        "the async proxy reads byte 0 .*, which warp 0 wrote, with no fence.proxy.async in between",
    ),
    "no barrier": (
        "wgmma.fence.sync.aligned;",
        "@%p0 st.shared.b32 [%r8+2048], 0; fence.proxy.async; wgmma.fence.sync.aligned;",
        "race: .* warp 1, lane 0 reads what warp 0 wrote",
    ),
    "no wait for the copy": (" 0; @!done", " 1; @!done", "to which a copy is under way"),
    "an end without a wait": (WAIT, "ret;", "warp 0 ends without a wait for its wgmma"),
    "matrices that differ": (
        "setp.eq.u32 %p3",
        "setp.gt.u32 %p4, %r0, 63; @%p4 add.s64 %d9, %d9, 16; setp.eq.u32 %p3",
        "warp 2 runs another wgmma than warp 0 of its warpgroup",
    ),
    "lanes that differ": (
        "setp.eq.u32 %p3",
        "setp.gt.u32 %p4, %r0, 63; @%p0 add.s64 %d9, %d9, 16; setp.eq.u32 %p3",
        "the lanes of a warp have different matrix descriptors",
    ),
    "a warp that does not take part": (
        "wgmma.fence.sync.aligned;",
        "setp.gt.u32 %p4, %r0, 95; @%p4 ret; wgmma.fence.sync.aligned;",
        "warp 3 runs fewer wgmma than others of its warpgroup",
    ),
    "a part of a warp": (
        "\n    wgmma.mma",
        "\n    @!%p0 wgmma.mma",
        r"is run by the lanes 0xfffffffe only \(divergence",
    ),
    "outside": (f"{descriptor(2048, 128, 256, 0):#x}", f"{descriptor(65520, 1024, 256, 0):#x}", "of 65544 of shared"),
    "a base offset": ("mov.b64 %d8, 0x", "mov.b64 %d8, 0x2000", "a matrix descriptor .* with a base offset"),
}


class TestFaults:
    def run(self, body: str, threads: int = 128, **options) -> np.ndarray:
        d = np.zeros((threads, 4), np.float32)
        launch(kernel(body, 2, SHARED), ones(), d, threads=threads, **options)
        return d

    @pytest.mark.parametrize("order", ORDERS)
    def test_none(self, order):
        assert (self.run(FAULTS, order=order) == 16).all()
        assert (self.run(FAULTS, order=order, threads=256) == 16).all()

    @pytest.mark.parametrize("name", MISTAKES)
    def test_mistakes(self, name):
        old, new, message = MISTAKES[name]
        assert old in FAULTS
        with pytest.raises(Fault, match=message):
            self.run(FAULTS.replace(old, new))

    def test_half_a_warpgroup(self):
        with pytest.raises(Fault, match="in a block of 2 warps"):
            self.run(FAULTS, threads=64)

    def test_late(self):
        """Two groups, of which the first is waited for: the other's registers stay under way."""
        two = f"""wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r4, %r5, %r6, %r7}}, %d8, %d9, %p3, 1, 1, 0, 0;
            wgmma.commit_group.sync.aligned; {WAIT.replace("0", "1")}"""
        zero = "mov.b32 %r4, 0; mov.b32 %r5, 0; mov.b32 %r6, 0; mov.b32 %r7, 0;"
        body = FAULTS.replace(WAIT, two).replace("setp.eq.u32 %p3", zero + "setp.eq.u32 %p3")
        assert (self.run(body + "wgmma.wait_group.sync.aligned 0;") == 16).all()
        with pytest.raises(Fault, match="%r5 is used by a wgmma that is under way"):
            self.run(body + "mov.b32 %c0, %r5; wgmma.wait_group.sync.aligned 0;")

    @pytest.mark.parametrize(
        "old,new,message",
        [
            (", 1, 1, 0, 0;", ", 1, 2, 0, 0;", "is not one of"),
            (", 1, 1, 0, 0;", ", 1, 1, 0;", "7 operands"),
            ("{%c0, %c1, %c2, %c3}", "{%c0, %c1, %c2}", "3 registers in the place of 4"),
            ("{%c0, %c1, %c2, %c3}", "{%c0, %c1, %c2, %c2}", "each once"),
            ("m64n8k16", "m64n12k16", "is not known"),
            (".f32.f16.f16", ".f16.f16.f16", "is not known"),
            ("wait_group.sync.aligned 0", "wait_group.sync.aligned 8", "is not one of"),
        ],
    )
    def test_forms(self, old, new, message):
        with pytest.raises(PtxError, match=message):
            self.run(FAULTS.replace(old, new))


class TestRegisterCounts:
    BODY = (
        "shr.u32 %r5, %r0, 7; setp.eq.u32 %p0, %r5, 0; @%p0 bra $ONE; setmaxnreg.inc.sync.aligned.u32 {}; bra.uni $END;"
    )
    BODY += "$ONE: setmaxnreg.dec.sync.aligned.u32 24; $END:"

    def test_what_a_block_has(self):
        """65536: one warpgroup with 24, and two with 240 or 248."""
        launch(kernel(self.BODY.format(240)), threads=384)
        with pytest.raises(Fault, match="want 66560 registers, of 65536"):
            launch(kernel(self.BODY.format(248)), threads=384)

    def test_forms(self):
        for count in (20, 25, 264):
            with pytest.raises(PtxError, match="is not one of"):
                launch(kernel(self.BODY.format(count)), threads=384)
        with pytest.raises(Fault, match="divergence"):
            launch(kernel("setp.eq.u32 %p0, %r0, 0; @%p0 setmaxnreg.dec.sync.aligned.u32 24;"), threads=128)


def test_every_instruction_is_tested():
    named = {f"wgmma.mma_async.sync.aligned.m64n{n}k{KINDS[kind][1]}.f32.{kind}.{kind}" for n in range(8, 257, 8)
             for kind in KINDS}  # fmt: skip
    named |= {f"wgmma.{name}.sync.aligned" for name in ("fence", "commit_group", "wait_group")}
    assert named | {f"setmaxnreg.{name}.sync.aligned.u32" for name in ("inc", "dec")} == warpgroup.TABLE.keys()
