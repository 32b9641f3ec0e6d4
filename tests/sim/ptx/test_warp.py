"""Instructions of a warp: shuffles, votes, ldmatrix, mma."""

import numpy as np
import pytest

from ptx import tensor_core, warp
from ptx.faults import Fault
from ptx.testing import compute, kernel, launch

RNG = np.random.default_rng(0)
LANES = np.arange(32)
FULL = 0xFFFFFFFF


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """PTX ISA, shfl.sync, line by line: (the lane that is read, the predicate)."""
    bval, cval, mask = b & 31, c & 31, c >> 8 & 31
    max_lane = (lane & mask) | (cval & ~mask)
    min_lane = lane & mask
    match mode:
        case "up":
            j, pval = lane - bval, lane - bval >= max_lane
        case "down":
            j, pval = lane + bval, lane + bval <= max_lane
        case "bfly":
            j, pval = lane ^ bval, lane ^ bval <= max_lane
        case "idx":
            j = min_lane | (bval & ~mask)
            pval = j <= max_lane
    return (j if pval else lane), pval


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [1, 4, 16, 32])
def test_shuffles(mode, width):
    x = RNG.integers(0, 2**32, 256, dtype=np.uint32)
    c = (32 - width << 8) | (0 if mode == "up" else 31)
    for b in (0, 1, 3, 8, 31):
        text = f"shfl.sync.{mode}.b32 D0|D1, A, {b}, {c}, -1"
        found, inside = compute(text, ["b32", "pred"], ["b32"], x)
        for i in range(256):
            lane, pval = shuffled(mode, i % 32, b, c)
            assert (found[i], inside[i]) == (x[i - i % 32 + lane], pval)
        (alone,) = compute(text.replace("|D1", ""), ["b32"], ["b32"], x)
        assert np.array_equal(alone, found)


def test_shuffle_by_a_register():
    x, b = RNG.integers(0, 2**32, 256, dtype=np.uint32), RNG.integers(0, 32, 256, dtype=np.uint32)
    (found,) = compute("shfl.sync.idx.b32 D0, A, B, 31, -1", ["b32"], ["b32", "b32"], x, b)
    assert found.tolist() == [x[i - i % 32 + b[i]] for i in range(256)]


@pytest.mark.parametrize("name", ["add", "min", "max"])
@pytest.mark.parametrize("type_name", ["s32", "u32"])
def test_reductions(name, type_name):
    x = RNG.integers(0, 2**32, 256, dtype=np.uint32)
    (found,) = compute(f"redux.sync.{name}.{type_name} D0, A, -1", ["b32"], ["b32"], x)
    numbers = x.view(np.int32 if type_name == "s32" else np.uint32).reshape(-1, 32).tolist()
    wanted = [{"add": sum, "min": min, "max": max}[name](row) % 2**32 for row in numbers]
    assert found.tolist() == np.repeat(wanted, 32).tolist()


@pytest.mark.parametrize("opcode", ["min.f32", "max.f32", "min.NaN.f32", "max.NaN.f32"])
@pytest.mark.parametrize("member", [FULL, 0x00FFFF00])
def test_reductions_of_floats(opcode, member):
    """-0 is less than +0; NaN is left out, unless there is nothing else, or wanted."""
    x = RNG.normal(0, 1, 256).astype(np.float32)
    x[32:64], x[40] = 0, -0.0
    x[100], x[128:160] = np.nan, np.nan
    lanes = np.array([member >> i & 1 for i in range(32)], np.bool_)
    text = f"redux.sync.{opcode} D0, A, {member:#x}"
    if member == FULL:
        (found,) = compute(text, ["b32"], ["b32"], x.view(np.uint32))
    else:
        guarded = np.tile(lanes, 8)
        (found,) = compute(f"@B {text}", ["b32"], ["b32", "pred"], x.view(np.uint32), guarded)
    for row, got in zip(x.reshape(-1, 32), found.view(np.float32).reshape(-1, 32), strict=True):
        taken = row[lanes]
        known = [float(y) for y in taken if not np.isnan(y)]
        if not known or ("NaN" in opcode and len(known) < len(taken)):
            assert np.isnan(got[lanes]).all()
        else:
            choose = min if opcode.startswith("min") else max
            wanted = choose(known, key=lambda y: (y, np.copysign(1, y)))
            assert (got[lanes] == wanted).all() and (np.signbit(got[lanes]) == np.signbit(wanted)).all()


def test_votes():
    p = np.concatenate([np.zeros(32), np.ones(32), RNG.integers(0, 2, 192)]).astype(np.uint8)
    rows = p.reshape(-1, 32).tolist()
    (any_,) = compute("vote.sync.any.pred D0, A, -1", ["pred"], ["pred"], p)
    (all_,) = compute("vote.sync.all.pred D0, A, -1", ["pred"], ["pred"], p)
    (ballot,) = compute("vote.sync.ballot.b32 D0, A, -1", ["b32"], ["pred"], p)
    assert any_.tolist() == np.repeat([any(row) for row in rows], 32).tolist()
    assert all_.tolist() == np.repeat([all(row) for row in rows], 32).tolist()
    assert ballot.tolist() == np.repeat([sum(bit << i for i, bit in enumerate(row)) for row in rows], 32).tolist()


@pytest.mark.parametrize("order", ["together", "forward", "reverse", "random"])
def test_elections(order):
    """One of the lanes that take part leads, and all know which."""
    body = """
        setp.gt.u32 %p0, %r0, 10; mov.u32 %r5, 99; mov.u32 %r6, 0;
        @%p0 elect.sync %r5|%p1, 0xfffff800;
        @%p0 elect.sync _|%p2, 0xfffff800;
        @%p0 selp.u32 %r6, 1, 0, %p1;
        mad.wide.u32 %d2, %r0, 4, %d0; st.global.u32 [%d2], %r5;
        mad.wide.u32 %d2, %r0, 4, %d1; st.global.u32 [%d2], %r6;"""
    lanes, leads = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    launch(kernel(body, 2), lanes, leads, order=order, seed=3)
    leader = int(lanes[31])
    assert leader > 10 and lanes.tolist() == [99] * 11 + [leader] * 21
    assert leads.tolist() == [int(i == leader) for i in range(32)]
    assert order not in ("together", "reverse") or leader == {"together": 11, "reverse": 31}[order]


def test_part_of_a_warp():
    """Lanes 0 to 7 add, the others vote, each with their own member mask."""
    out = np.zeros(32, np.uint32)
    body = """
        setp.lt.u32 %p0, %r0, 8; setp.eq.s32 %p1, %r0, 9;
        @!%p0 bra $REST;
        redux.sync.add.s32 %r5, %r0, 255;
        bra.uni $JOIN;
    $REST:
        vote.sync.ballot.b32 %r5, %p1, 0xffffff00;
    $JOIN:
        bar.warp.sync -1;
        mad.wide.u32 %d1, %r0, 4, %d0; st.global.u32 [%d1], %r5;"""
    launch(kernel(body, 1), out)
    assert out.tolist() == [28] * 8 + [512] * 24


@pytest.mark.parametrize(
    "instruction", ["shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1", "redux.sync.add.s32 %r5, %r0, -1", "bar.warp.sync -1"]
)
def test_divergence(instruction):
    body = f"setp.lt.u32 %p0, %r0, 16; @%p0 {instruction};"
    with pytest.raises(Fault, match=r"lane 0: .* with member mask 0xffffffff is run by the lanes 0xffff .*divergence"):
        launch(kernel(body))


def test_shuffle_from_a_lane_outside():
    body = "setp.lt.u32 %p0, %r0, 16; @%p0 shfl.sync.idx.b32 %r5, %r0, 20, 31, 0xffff;"
    with pytest.raises(Fault, match="from a lane that does not take part"):
        launch(kernel(body))


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

    def places(layout, shape: list[int]) -> np.ndarray:
        linear = builder.to_linear_layout(layout._to_ir(builder), shape)
        elements = np.arange(2 ** len(linear.reg_bases))
        found = np.zeros((32, len(elements), 2), dtype=int)
        for bases, index in ((linear.lane_bases, LANES[:, None]), (linear.reg_bases, elements[None, :])):
            for bit, base in enumerate(bases):
                found ^= np.where((index >> bit & 1)[..., None], base, 0)
        return found

    def operand(index: int, width: int):
        return gluon.DotOperandLayout(operand_index=index, parent=result, k_width=width)

    shapes = {"a16": (0, 2, [16, 16]), "b16": (1, 2, [16, 8]), "a32": (0, 1, [16, 8]), "b32": (1, 1, [8, 8])}
    return {"d": places(result, [16, 8])} | {k: places(operand(i, w), s) for k, (i, w, s) in shapes.items()}


def fragment(matrix: np.ndarray, layout: np.ndarray) -> np.ndarray:
    """(32, registers) of 32 bits: what each lane holds of the matrix."""
    return np.ascontiguousarray(matrix[layout[..., 0], layout[..., 1]]).view(np.uint32)


def multiply(opcode: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Fragments of a warp, through memory: (32, 4)."""
    loads = []
    for i, (name, count) in enumerate((("4", 4), ("8", 2), ("10", 4))):
        loads.append(f"mad.wide.u32 %d5, %r0, {4 * count}, %d{i};")
        registers = ", ".join(f"%r{int(name) + j}" for j in range(count))
        loads.append(f"ld.global.v{count}.b32 {{{registers}}}, [%d5];")
    body = (
        "\n".join(loads)
        + f"""
        {opcode} {{%r14, %r15, %r16, %r17}}, {{%r4, %r5, %r6, %r7}}, {{%r8, %r9}}, {{%r10, %r11, %r12, %r13}};
        mad.wide.u32 %d5, %r0, 16, %d3; st.global.v4.b32 [%d5], {{%r14, %r15, %r16, %r17}};"""
    )
    d = np.zeros((32, 4), np.float32)
    counts = launch(kernel(body, 4), *map(np.ascontiguousarray, (a, b, c)), d)
    depth = 16 if "k16" in opcode else 8
    assert counts.mma == {opcode: 1} and counts.operations == 2 * 16 * 8 * depth
    return d


F16, BF16, TF32 = (
    f"mma.sync.aligned.{shape}.row.col.f32.{t}.{t}.f32"
    for shape, t in (("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "tf32"))
)


class TestMma:
    @pytest.mark.parametrize("opcode", [F16, BF16, TF32])
    def test_small_integers(self, opcode, layouts):
        """Every product and sum is exact, and tells where it came from."""
        kind, depth = ("32", 8) if opcode == TF32 else ("16", 16)
        a, b, c = (RNG.integers(-8, 8, shape).astype(np.float32) for shape in ((16, depth), (depth, 8), (16, 8)))
        bits = {
            F16: lambda x: x.astype(np.float16).view(np.uint16),
            BF16: lambda x: (x.view(np.uint32) >> 16).astype(np.uint16),
            TF32: lambda x: x.view(np.uint32) | 0x1FFF,  # its lowest bits do not count
        }[opcode]
        layout = layouts["d"][..., 0], layouts["d"][..., 1]
        d = multiply(opcode, fragment(bits(a), layouts[f"a{kind}"]), fragment(bits(b), layouts[f"b{kind}"]), c[layout])
        assert np.array_equal(d, (a @ b + c)[layout])

    @pytest.mark.parametrize("special", [np.inf, np.nan])
    def test_not_finite(self, layouts, special):
        """One such element of a reaches its row of d and no other."""
        a, b = np.ones((16, 16), np.float16), np.ones((16, 8), np.float16)
        a[11, 14] = special
        bits = [fragment(x.view(np.uint16), layouts[name]) for x, name in ((a, "a16"), (b, "b16"))]
        d = multiply(F16, *bits, np.zeros((32, 4), np.float32))
        assert np.array_equal(~np.isfinite(d), layouts["d"][..., 0] == 11)

    def test_part_of_a_warp(self):
        four = "{%r4, %r5, %r6, %r7}"
        body = f"setp.lt.u32 %p0, %r0, 31; @%p0 {F16} {four}, {four}, {{%r8, %r9}}, {four};"
        with pytest.raises(Fault, match=r"mma.*is run by the lanes 0x7fffffff only \(divergence\)"):
            launch(kernel(body))


class TestLdmatrix:
    @pytest.mark.parametrize("count", [1, 2, 4])
    @pytest.mark.parametrize("transpose", [False, True])
    def test_fragments(self, count, transpose):
        """PTX ISA: lane l gets row l / 4, columns 2 (l % 4) and the next, of the matrix or of the transposed one."""
        tile = RNG.integers(0, 2**16, (32, 8), dtype=np.uint16)
        rows = RNG.permutation(32).astype(np.uint32)  # each lane's row anywhere
        registers = ", ".join(f"%r{4 + i}" for i in range(count))
        body = f"""
            mov.u32 %r10, tile; mad.wide.u32 %d5, %r0, 16, %d0; ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d5];
            shl.b32 %r11, %r0, 4; add.s32 %r11, %r10, %r11; st.shared.v4.b32 [%r11], {{%r4, %r5, %r6, %r7}};
            bar.sync 0;
            mad.wide.u32 %d5, %r0, 4, %d1; ld.global.b32 %r12, [%d5]; shl.b32 %r12, %r12, 4; add.s32 %r12, %r10, %r12;
            ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transpose else ""}.shared.b16 {{{registers}}}, [%r12];
            mad.wide.u32 %d5, %r0, {4 * count}, %d2;
            st.global{f".v{count}" if count > 1 else ""}.b32 [%d5], {{{registers}}};
        """
        out = np.zeros((32, count), np.uint32)
        counts = launch(kernel(body, 3, ".shared .align 16 .b8 tile[512];"), tile, rows, out)
        matrices = tile[rows].reshape(4, 8, 8)[:count]
        if transpose:
            matrices = matrices.swapaxes(1, 2)
        pairs = np.ascontiguousarray(matrices).view(np.uint32)  # (count, row, pair of columns)
        assert np.array_equal(out, pairs[:, LANES // 4, LANES % 4].T)
        eights = rows[: 8 * count].reshape(count, 8) % 8  # 16 bytes are 4 banks: rows 8 apart meet
        met = sum(int(np.bincount(row).max()) - 1 for row in eights)
        assert counts.wavefronts == 4 + count + met and sum(counts.conflicts.values()) == met

    @pytest.mark.parametrize("count", [1, 2, 4])
    @pytest.mark.parametrize("transpose", [False, True])
    def test_the_other_way_round(self, count, transpose):
        """PTX ISA, stmatrix: lane l gives columns 2 (l % 4) and the next of row l / 4 of each matrix, or of its
        transpose."""
        pairs = RNG.integers(0, 2**32, (32, count), dtype=np.uint32)
        rows = RNG.permutation(8 * count).astype(np.uint32)
        body = f"""
            mad.wide.u32 %d5, %r0, {4 * count}, %d0;
            ld.global{f".v{count}" if count > 1 else ""}.b32 {{{", ".join(f"%r{4 + i}" for i in range(count))}}}, [%d5];
            mov.u32 %r10, tile; and.b32 %r11, %r0, {8 * count - 1}; mad.wide.u32 %d5, %r11, 4, %d1;
            ld.global.b32 %r12, [%d5]; shl.b32 %r12, %r12, 4; add.s32 %r12, %r10, %r12;
            stmatrix.sync.aligned.m8n8.x{count}{".trans" if transpose else ""}.shared.b16 [%r12],
                {{{", ".join(f"%r{4 + i}" for i in range(count))}}};
            bar.sync 0; setp.lt.u32 %p0, %r0, {8 * count}; @!%p0 bra $END;
            shl.b32 %r11, %r0, 4; add.s32 %r11, %r10, %r11; ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r11];
            mad.wide.u32 %d5, %r0, 16, %d2; st.global.v4.b32 [%d5], {{%r4, %r5, %r6, %r7}};
        $END:"""
        out = np.zeros((8 * count, 8), np.uint16)
        launch(kernel(body, 3, ".shared .align 16 .b8 tile[512];"), pairs, rows, out)
        matrices = np.zeros((count, 8, 8), np.uint16)
        for i in range(count):
            for lane in range(32):
                matrices[i, lane // 4, lane % 4 * 2 :][:2] = pairs[lane : lane + 1, i].view(np.uint16)
        if transpose:
            matrices = matrices.swapaxes(1, 2)
        assert np.array_equal(out[rows], matrices.reshape(-1, 8))

    def test_unaligned(self):
        body = "mov.u32 %r5, tile; add.s32 %r5, %r5, 8; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r6}, [%r5];"
        with pytest.raises(Fault, match="address 0x8 is not aligned to 16 bytes"):
            launch(kernel(body, 0, ".shared .align 16 .b8 tile[512];"))


def test_every_instruction_is_tested():
    named = {F16, BF16, TF32, "bar.warp.sync"} | {f"shfl.sync.{mode}.b32" for mode in ("up", "down", "bfly", "idx")}
    named |= {f"redux.sync.{name}.{t}32" for name in ("add", "min", "max") for t in "su"}
    named |= {f"redux.sync.{name}{nan}.f32" for name in ("min", "max") for nan in ("", ".NaN")}
    named |= {"vote.sync.any.pred", "vote.sync.all.pred", "vote.sync.ballot.b32"}
    named |= {"elect.sync"} | {
        f"stmatrix.sync.aligned.m8n8.x{n}{t}.shared.b16" for n in (1, 2, 4) for t in ("", ".trans")
    }
    named |= {f"ldmatrix.sync.aligned.m8n8.x{n}{t}.shared.b16" for n in (1, 2, 4) for t in ("", ".trans")}
    assert named == (warp.TABLE | tensor_core.TABLE).keys()
