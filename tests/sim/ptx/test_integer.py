"""Integer instructions against Python's integers."""

import numpy as np
import pytest

from ptx import integer, moves
from ptx.testing import compute

RNG = np.random.default_rng(0)
SIZES = {"s16": 16, "u16": 16, "b16": 16, "s32": 32, "u32": 32, "b32": 32, "s64": 64, "u64": 64, "b64": 64, "pred": 1}
SPECIAL = [0, 1, 2, 3, 7, 31, 32, 63, 64, 127, 128, 255, 256]


def values(type_name: str, count: int = 256) -> list[int]:
    """Python integers: small ones, the ends of the range, and any."""
    if type_name == "pred":
        return RNG.integers(0, 2, count).tolist()
    size = SIZES[type_name]
    any_bits = [int.from_bytes(RNG.bytes(8), "little") % 2**size for _ in range(count)]
    edges = [*SPECIAL, 2 ** (size - 1) - 1, 2 ** (size - 1), 2**size - 1, 2**size - 2]
    some = np.where(RNG.integers(0, 2, count) == 1, RNG.integers(0, len(edges), count), -1).tolist()
    chosen = [x if i < 0 else edges[i] for x, i in zip(any_bits, some, strict=True)]
    return [as_type(x, type_name) for x in chosen]


def as_type(bits: int, type_name: str) -> int:
    size = SIZES[type_name]
    bits %= 2**size
    return bits - 2**size if type_name[0] == "s" and bits >= 2 ** (size - 1) else bits


def kind_of(type_name: str) -> str:
    return "pred" if type_name == "pred" else f"b{SIZES[type_name]}"


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(a: int, position: int, length: int, type_name: str) -> int:
    """PTX ISA, bfe: bit by bit."""
    position, length, most = position & 255, length & 255, 31
    sign = 0 if type_name[0] == "u" or length == 0 else a >> min(position + length - 1, most) & 1
    bits = [a >> position + i & 1 if i < length and position + i <= most else sign for i in range(32)]
    return sum(bit << i for i, bit in enumerate(bits))


def inserted(a: int, b: int, position: int, length: int) -> int:
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i <= 31:
            b = b & ~(1 << position + i) | (a >> i & 1) << position + i
    return b


def permuted(a: int, b: int, selector: int) -> int:
    both = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    result = []
    for i in range(4):
        choice = selector >> 4 * i & 15
        byte = both[choice & 7]
        result.append((255 if byte & 128 else 0) if choice & 8 else byte)
    return int.from_bytes(bytes(result), "little")


def expected(opcode: str, type_name: str, x: list[int]) -> int | None:
    """None where PTX leaves it open."""
    size = SIZES[type_name]
    match opcode.split(".")[:-1]:
        case ["add"]:
            return x[0] + x[1]
        case ["sub"]:
            return x[0] - x[1]
        case ["mul", "lo" | "wide"]:
            return x[0] * x[1]
        case ["mul", "hi"]:
            return x[0] * x[1] >> size
        case ["mad", "lo" | "wide"]:
            return x[0] * x[1] + x[2]
        case ["div"]:
            return truncated(x[0], x[1]) if x[1] else None
        case ["rem"]:
            return x[0] - truncated(x[0], x[1]) * x[1] if x[1] else None
        case ["min"]:
            return min(x)
        case ["max"]:
            return max(x)
        case ["neg"]:
            return -x[0]
        case ["abs"]:
            return abs(x[0])
        case ["not"]:
            return ~x[0]
        case ["and"]:
            return x[0] & x[1]
        case ["or"]:
            return x[0] | x[1]
        case ["xor"]:
            return x[0] ^ x[1]
        case ["shl"]:
            return x[0] << min(x[1], size)
        case ["shr"]:
            return x[0] >> min(x[1], size)
        case ["bfe"]:
            return field(x[0] % 2**32, x[1], x[2], type_name)
        case ["bfi"]:
            return inserted(*x)
        case ["prmt"]:
            return permuted(*x)
        case ["popc"]:
            return bin(x[0]).count("1")
        case ["selp"]:
            return x[0] if x[2] else x[1]
        case ["cvta", "param"]:  # generic addresses of parameters begin behind those of memory
            return x[0] + (1 << 56)
        case ["mov"] | ["cvta", "to", "global"]:
            return x[0]
        case ["setp", name]:
            return int({"eq": x[0] == x[1], "ne": x[0] != x[1], "lt": x[0] < x[1], "le": x[0] <= x[1],
                        "gt": x[0] > x[1], "ge": x[0] >= x[1]}[name])  # fmt: skip
    raise KeyError(opcode)


FLOATING = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")  # test_floating.py
TABLE = {opcode: alu for opcode, alu in (integer.TABLE | moves._ALU).items() if opcode.split(".")[-1] not in FLOATING}


@pytest.mark.parametrize("opcode", sorted(TABLE))
def test_instruction(opcode):
    alu = TABLE[opcode]
    operands = [values(t) for t in alu.sources]
    type_name = opcode.split(".")[-1]
    arrays = [np.array([v % 2 ** SIZES[t] for v in x], np.uint64) for x, t in zip(operands, alu.sources, strict=True)]
    arrays = [x.astype(f"u{max(SIZES[t], 8) // 8}") for x, t in zip(arrays, alu.sources, strict=True)]
    text = f"{opcode} D0, {', '.join('ABCD'[: len(operands)])}"
    (found,) = compute(text, [kind_of(alu.results[0])], [kind_of(t) for t in alu.sources], *arrays)
    wanted = [expected(opcode, type_name, list(x)) for x in zip(*operands, strict=True)]
    for got, want, x in zip(found.tolist(), wanted, zip(*operands, strict=True), strict=True):
        if want is not None:
            assert got == want % 2 ** SIZES[alu.results[0]], x


@pytest.mark.parametrize("opcode", ["sub.s32", "shl.b32", "setp.lt.u32", "min.s32", "mul.hi.u32"])
def test_immediates(opcode):
    x = values("u32")
    signed = opcode.endswith("s32")
    for number in (0, 5, 31, 2**31 - 1, -1 if signed else 2**32 - 1):
        result = ["pred" if opcode.startswith("setp") else "b32"]
        (found,) = compute(f"{opcode} D0, A, {number}", result, ["b32"], np.array(x, np.uint32))
        for got, a in zip(found.tolist(), x, strict=True):
            operands = [as_type(a, opcode[-3:]), number]
            assert got == expected(opcode, opcode[-3:], operands) % 2 ** (1 if "setp" in opcode else 32)


class TestMov:
    def test_pack(self):
        low, high = (RNG.integers(0, 2**16, 256, dtype=np.uint16) for _ in range(2))
        (found,) = compute("mov.b32 D0, {A, B}", ["b32"], ["b16", "b16"], low, high)
        assert found.tolist() == [a + b * 65536 for a, b in zip(low.tolist(), high.tolist(), strict=True)]

    def test_pack_with_a_number(self):
        high = RNG.integers(0, 2**16, 256, dtype=np.uint16)
        (found,) = compute("mov.b32 D0, {0, A}", ["b32"], ["b16"], high)
        assert found.tolist() == [b * 65536 for b in high.tolist()]

    def test_unpack(self):
        x = RNG.integers(0, 2**64, 256, dtype=np.uint64)
        low, high = compute("mov.b64 {D0, D1}, A", ["b32", "b32"], ["b64"], x)
        assert [a + b * 2**32 for a, b in zip(low.tolist(), high.tolist(), strict=True)] == x.tolist()
        (high,) = compute("mov.b64 {_, D0}, A", ["b32"], ["b64"], x)
        assert high.tolist() == [a >> 32 for a in x.tolist()]

    def test_special_registers(self):
        (found,) = compute("mov.u32 D0, %ctaid.x", ["b32"], ["b32"], np.zeros(1024, np.uint32))
        assert found.tolist() == [i // 256 for i in range(1024)]
        (found,) = compute("mov.u32 D0, %laneid", ["b32"], ["b32"], np.zeros(1024, np.uint32))
        assert found.tolist() == [i % 32 for i in range(1024)]
