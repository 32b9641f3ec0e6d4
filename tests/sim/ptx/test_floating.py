"""Floating-point instructions against exact arithmetic on fractions, rounded here."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from ptx import floating, integer, moves
from ptx.testing import compute

RNG = np.random.default_rng(0)
FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "tf32": (11, -126, 127)}
NUMPY = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
KINDS = {"f16": "b16", "bf16": "b16", "f32": "b32", "f64": "b64", "pred": "pred", "tf32": "b32"}
KINDS |= {"f16x2": "b32", "bf16x2": "b32"} | {f"{s}{n}": f"b{max(n, 16)}" for s in "us" for n in (8, 16, 32, 64)}


def rounded(x: Fraction, type_name: str, mode: str = "even") -> float:
    """A fraction to the format: to nearest, ties to even or away from zero, or down."""
    precision, least, most = FORMATS[type_name]
    if x == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(x))) if abs(x) < 2**1000 else 1000, least)
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent and exponent > least:
        exponent -= 1
    unit = Fraction(2) ** (exponent - precision + 1)
    steps, rest = divmod(x / unit, 1)
    if mode == "even":
        steps += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and steps % 2 == 1)
    elif mode == "away":
        steps += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and x > 0)
    result = steps * unit
    largest = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** most
    if abs(result) > largest:
        return math.copysign(math.inf, x) if mode != "down" or x < 0 else float(largest)
    return float(result)


def numbers(type_name: str, count: int = 256) -> np.ndarray:
    """As bits: any, ordinary ones, special ones."""
    if type_name == "pred":
        return RNG.integers(0, 2, count, dtype=np.uint8)
    if type_name[0] in "us":
        dtype = np.dtype(f"{'i' if type_name[0] == 's' else 'u'}{int(type_name[1:]) // 8}")
        return RNG.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, count, dtype, endpoint=True)
    if type_name.endswith("x2"):
        low, high = (numbers(type_name[:-2], count) for _ in range(2))
        return low.astype(np.uint32) | high.astype(np.uint32) << 16
    x = np.concatenate(
        [RNG.normal(0, 1, count // 2), RNG.normal(0, 1, count - count // 2) * 10.0 ** RNG.integers(-4, 5)]
    )
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 2.0**-130, -(2.0**-149), 3.4e38, 1e-7, 65504.0, 0.5, 3.0]
    chosen = RNG.integers(0, 4, count) == 0
    x[chosen] = np.array(special)[RNG.integers(0, len(special), chosen.sum())]
    if type_name == "bf16":
        return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    with np.errstate(over="ignore"):
        return x.astype(NUMPY[type_name]).view(f"u{np.dtype(NUMPY[type_name]).itemsize}")


@np.errstate(invalid="ignore")
def floats(bits: np.ndarray, type_name: str) -> np.ndarray:
    if type_name[0] in "us":
        return bits
    if type_name == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if type_name == "tf32":
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)
    if type_name == "pred":
        return bits.astype(bool)
    return bits.view(NUMPY[type_name]).astype(np.float64)


def same(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


def root(x: Fraction) -> float:
    """The nearest float32: that of the integer root of x with many more bits."""
    scaled = math.isqrt(int(x * 4**200))
    exact = scaled * scaled == x * 4**200
    return rounded(Fraction(scaled * 2 + (not exact), 2 * 2**200), "f32")


def evaluate(name: str, x: list[float], type_name: str) -> float:
    """By IEEE 754; NaN and infinities by Python's floats, finite numbers exactly."""
    if any(map(math.isnan, x)):
        return math.nan
    with np.errstate(all="ignore"):
        a, b, c = (*map(np.float64, x), np.float64(0), np.float64(0))[:3]
        coarse = {
            "add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b, "div": lambda: a / b,
            "fma": lambda: a * b + c, "rcp": lambda: 1 / a, "sqrt": lambda: np.sqrt(a), "cvt": lambda: a,
        }[name]()  # fmt: skip
    finite = all(map(math.isfinite, x)) and not math.isnan(coarse)
    if not finite or (name in ("div", "rcp") and x[-1] == 0):
        return float(coarse)
    f = [*map(Fraction, x)]
    mode = "down" if name == "fma down" else "even"
    exact = {
        "add": lambda: f[0] + f[1], "sub": lambda: f[0] - f[1], "mul": lambda: f[0] * f[1], "div": lambda: f[0] / f[1],
        "fma": lambda: f[0] * f[1] + f[2], "rcp": lambda: 1 / f[0], "cvt": lambda: f[0],
        "sqrt": lambda: Fraction(root(f[0])),
    }[name]()  # fmt: skip
    result = rounded(exact, type_name, mode)
    return result if result != 0 or exact != 0 else float(coarse)


def signed(result: float, exact_sign: float) -> float:
    return math.copysign(result, exact_sign) if result == 0 else result


EXACT = [
    *(
        f"{name}.f32"
        for name in ("add", "sub", "mul", "fma.rn", "rcp.rn", "sqrt.rn", "div.rn", "div.full", "div.approx")
    ),
    *(f"{name}.rn.f32" for name in ("add", "sub", "mul")),
    *(f"{name}.{t}" for name in ("add", "sub", "mul", "fma.rn") for t in ("f16", "bf16", "f16x2", "bf16x2")),
]


def run(opcode: str, bits: list[np.ndarray]) -> np.ndarray:
    alu = TABLE[opcode]
    text = f"{opcode} D0, {', '.join('ABCD'[: len(bits)])}"
    (found,) = compute(text, [KINDS[alu.results[0]]], [KINDS[t] for t in alu.sources[: len(bits)]], *bits)
    return found


TABLE = {
    opcode: alu
    for opcode, alu in (floating.TABLE | integer.TABLE | moves._ALU).items()
    if opcode in floating.TABLE or opcode.split(".")[-1] in ("f16", "bf16", "f32", "f64")
}


@pytest.mark.parametrize("opcode", EXACT)
def test_rounding(opcode):
    """Sums, products, quotients and roots are the exact ones, rounded once. Underflow is tested below."""
    name, type_name = opcode.split(".")[0], opcode.split(".")[-1]
    bits = [numbers(type_name) for _ in TABLE[opcode].sources]
    found = run(opcode, bits)
    if type_name.endswith("x2"):
        type_name = type_name[:-2]
        pairs = [x.view(np.uint16).reshape(-1, 2) for x in [found, *bits]]
        found, bits = pairs[0].ravel(), [x.ravel() for x in pairs[1:]]
    for i, x in enumerate(zip(*(floats(b, type_name).tolist() for b in bits), strict=True)):
        wanted, got = evaluate(name, list(x), type_name), float(floats(found[i : i + 1], type_name)[0])
        if 0 < abs(wanted) < 2.0**-126 and name in ("div", "sqrt", "fma"):
            assert abs(got - wanted) <= 2.0**-149, x
        else:
            assert (math.isnan(got) and math.isnan(wanted)) or got == wanted, x


OF_TWO_TYPES = ["sub.rn.f32.f16", "sub.rn.f32.bf16"]


@pytest.mark.parametrize("opcode", OF_TWO_TYPES)
def test_of_two_types(opcode):
    """16 bits less 32 bits, rounded once."""
    of = opcode.split(".")[-1]
    a, b = numbers(of), numbers("f32")
    for got, *x in zip(floats(run(opcode, [a, b]), "f32"), floats(a, of), floats(b, "f32"), strict=True):
        wanted = evaluate("sub", x, "f32")
        assert (math.isnan(got) and math.isnan(wanted)) or got == wanted, x


def test_fma_ties():
    """Products whose sum with c lies next to the middle of two float32: float64 alone rounds them twice."""
    a = np.full(300, 1 + 2**-12, np.float32)
    b = np.float32(1) + np.arange(300).astype(np.float32) * np.float32(2**-23)
    for c in (2.0**-30, -(2.0**-30), 2.0**-60, -(2.0**-60), 2.0**25, 2.0**50 + 2.0**27):
        operands = [a, b, np.full(300, c, np.float32)]
        found = run("fma.rn.f32", operands).view(np.float32)
        for got, x in zip(found.tolist(), zip(*(y.tolist() for y in operands), strict=True), strict=True):
            assert got == evaluate("fma", list(x), "f32"), x


def test_fma_down():
    operands = [RNG.normal(0, 1, 512).astype(np.float32) for _ in range(3)]
    found = run("fma.rm.f32", operands).view(np.float32)
    for got, (a, b, c) in zip(found.tolist(), zip(*(x.tolist() for x in operands), strict=True), strict=True):
        assert got == rounded(Fraction(a) * Fraction(b) + Fraction(c), "f32", "down")


FLUSHED = ["add.ftz.f32", "mul.ftz.f32", "sub.ftz.f32", "fma.rn.ftz.f32", "abs.ftz.f32"]


@pytest.mark.parametrize("opcode", FLUSHED)
def test_subnormals_are_flushed(opcode):
    small = np.array([2.0**-127, -(2.0**-127), 2.0**-126, 1.0], np.float32)
    count = len(TABLE[opcode].sources)
    found = run(opcode, [small] * count).view(np.float32)
    flushed = [np.copysign(0, x) if abs(x) < 2.0**-126 else x for x in small.tolist()]
    wanted = {
        "add": lambda x: x + x, "mul": lambda x: x * x, "sub": lambda x: x - x, "fma": lambda x: x * x + x, "abs": abs,
    }[opcode.split(".")[0]]  # fmt: skip
    wanted = [wanted(x) for x in flushed]
    wanted = [0.0 if abs(x) < 2.0**-126 else float(np.float32(x)) for x in wanted]
    assert found.tolist() == wanted


@pytest.mark.parametrize("opcode", ["min.f32", "max.f32", "min.NaN.f32", "max.NaN.f32", "min.ftz.f32", "max.ftz.f32"])
@pytest.mark.parametrize("count", [2, 3])
def test_min_and_max(opcode, count):
    bits = [numbers("f32") for _ in range(count)]
    for got, *x in zip(floats(run(opcode, bits), "f32"), *(floats(b, "f32") for b in bits), strict=True):
        if "ftz" in opcode:
            x = [math.copysign(0, y) if abs(y) < 2.0**-126 else y for y in x]
        known = [y for y in x if not math.isnan(y)]
        if "NaN" in opcode and len(known) < count or not known:
            assert math.isnan(got)
        else:  # -0 is less than +0
            choose = min if opcode.startswith("min") else max
            assert same(got, choose(known, key=lambda y: (y, math.copysign(1, y)))), x


@pytest.mark.parametrize("opcode", ["neg.f32", "neg.ftz.f32", "abs.f32", "neg.f16", "neg.bf16", "abs.f16", "abs.bf16"])
def test_signs(opcode):
    type_name = opcode.split(".")[-1]
    bits = numbers(type_name)
    found = run(opcode, [bits])
    top = np.array(1 << 8 * bits.dtype.itemsize - 1, bits.dtype)
    wanted = bits ^ top if opcode.startswith("neg") else bits & ~top
    keep = ~np.isnan(floats(bits, type_name))
    if "ftz" in opcode:
        keep &= (np.abs(floats(bits, type_name)) >= 2.0**-126) | (floats(bits, type_name) == 0)
    assert np.array_equal(found[keep], wanted[keep])


F32X2 = [x for x in floating.TABLE if x.endswith(".f32x2")]


@pytest.mark.parametrize("opcode", F32X2)
def test_pairs_in_64_bits(opcode):
    """Of low halves, and of high ones."""
    parts = [[numbers("f32") for _ in range(2)] for _ in floating.TABLE[opcode].sources]
    wide = [low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32) for low, high in parts]
    (found,) = compute(f"{opcode} D0, {', '.join('ABC'[: len(wide)])}", ["b64"], ["b64"] * len(wide), *wide)
    for i, got in enumerate(np.ascontiguousarray(found).view(np.uint32).reshape(-1, 2).T):
        wanted = run(opcode.removesuffix("x2"), [pair[i] for pair in parts])
        nan = np.isnan(wanted.view(np.float32))
        assert np.array_equal(got[~nan], wanted[~nan]) and np.isnan(got.view(np.float32)[nan]).all()


def test_other_signs():
    x = numbers("bf16x2")
    for opcode in ("abs.f16x2", "abs.bf16x2"):
        assert np.array_equal(run(opcode, [x]), x & 0x7FFF7FFF)
    a, b = numbers("f32"), numbers("f32")
    assert np.array_equal(run("copysign.f32", [a, b]), b & 0x7FFFFFFF | a & 0x80000000)


COMPARISONS = [x for x in TABLE if x.startswith("setp.")]


@pytest.mark.parametrize("opcode", [x for x in COMPARISONS if x.endswith("x2")])
def test_comparisons_of_pairs(opcode):
    """Of low halves, and of high ones."""
    a, b = (numbers(opcode.split(".")[-1]) for _ in range(2))
    b = np.where(RNG.integers(0, 2, len(a)) == 0, a, b)
    found = compute(f"{opcode} D0|D1, A, B", ["pred", "pred"], ["b32", "b32"], a, b)
    for got, shift in zip(found, (0, 16), strict=True):
        halves = [(x >> np.uint32(shift)).astype(np.uint16) for x in (a, b)]
        assert np.array_equal(got, run(opcode.removesuffix("x2"), halves))


@pytest.mark.parametrize(
    "opcode", [x for x in COMPARISONS if not x.endswith("x2")], ids=lambda x: x.removeprefix("setp.")
)
def test_comparisons(opcode):
    _, name, type_name = opcode.split(".")
    bits = [numbers(type_name) for _ in range(2)]
    bits[1] = np.where(RNG.integers(0, 3, len(bits[0])) == 0, bits[0], bits[1])
    found = run(opcode, bits)
    for got, a, b in zip(found, *(floats(x, type_name) for x in bits), strict=True):
        unordered = math.isnan(a) or math.isnan(b)
        if name in ("num", "nan"):
            assert got == (unordered == (name == "nan"))
        elif unordered:
            assert got == name.endswith("u")
        else:
            bare = name.removesuffix("u")
            wanted = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[bare]
            assert got == wanted, (a, b)


@pytest.mark.parametrize("opcode", ["selp.f32", "selp.f64", "mov.f32", "mov.f64"])
def test_bits_are_kept(opcode):
    """Those of a NaN, too."""
    type_name = opcode.split(".")[-1]
    dtype = f"u{np.dtype(NUMPY[type_name]).itemsize}"
    a, b = (RNG.integers(0, 2 ** (8 * np.dtype(dtype).itemsize), 256, dtype=dtype) for _ in range(2))
    p = RNG.integers(0, 2, 256, dtype=np.uint8)
    if opcode.startswith("mov"):
        assert np.array_equal(run(opcode, [a]), a)
    else:
        assert np.array_equal(run(opcode, [a, b, p]), np.where(p != 0, a, b))


APPROXIMATIONS = {
    "ex2.approx.f32": np.exp2,
    "ex2.approx.ftz.f32": np.exp2,
    "lg2.approx.f32": lambda x: np.log2(np.abs(x)),
    "lg2.approx.ftz.f32": lambda x: np.log2(np.abs(x)),
    "tanh.approx.f32": np.tanh,
    "rcp.approx.ftz.f32": lambda x: 1 / x,
    "rsqrt.approx.ftz.f32": lambda x: 1 / np.sqrt(np.abs(x)),
}


@pytest.mark.parametrize("opcode", APPROXIMATIONS)
def test_approximations(opcode):
    x = RNG.uniform(-20, 20, 512).astype(np.float32)
    if opcode.startswith(("lg2", "rsqrt")):
        x = np.abs(x)
    found = run(opcode, [x]).view(np.float32)
    np.testing.assert_allclose(found, APPROXIMATIONS[opcode](x.astype(np.float64)), rtol=2**-23)


def test_limits_of_approximations():
    x = np.array([-np.inf, -200, -126.5, -126, 128, np.inf, np.nan], np.float32)
    wanted = np.array([0, 0, 0, 2**-126, np.inf, np.inf, np.nan], np.float32)
    assert np.array_equal(run("ex2.approx.ftz.f32", [x]).view(np.float32), wanted, equal_nan=True)
    x = np.array([0.0, -0.0, np.inf, 2.0**-127, 2.0**127], np.float32)
    wanted = np.array([np.inf, -np.inf, 0, np.inf, 0], np.float32)
    assert np.array_equal(run("rcp.approx.ftz.f32", [x]).view(np.float32), wanted)
    assert np.isnan(run("sqrt.rn.f32", [np.array([-1], np.float32)]).view(np.float32)).all()


OF_INTEGERS = [x for x in floating.TABLE if re.match(r"cvt\.rn\.b?f(16|32)\.[us]\d+$", x)]
BETWEEN_INTEGERS = [x for x in floating.TABLE if re.match(r"cvt\.[us]\d+\.[us]\d+$", x)]


class TestConversions:
    @pytest.mark.parametrize("to", ["f16", "bf16"])
    def test_narrower(self, to):
        """Any bits; NaN becomes NaN."""
        bits = np.concatenate([numbers("f32"), RNG.integers(0, 2**32, 2048, dtype=np.uint32)])
        ties = (RNG.integers(0, 2**16, 512, dtype=np.uint32) << 16) + 0x8000
        bits = np.concatenate([bits, ties, ties + 1, ties - 1, np.float32(1 + np.arange(64) * 2**-12).view(np.uint32)])
        found = floats(run(f"cvt.rn.{to}.f32", [bits]), to)
        for got, x in zip(found.tolist(), floats(bits, "f32").tolist(), strict=True):
            assert same(got, signed(evaluate("cvt", [x], to), x) if not math.isnan(x) else math.nan), x

    @pytest.mark.parametrize("to", ["f16", "bf16"])
    def test_pairs(self, to):
        """The first operand is the upper half."""
        a, b = numbers("f32"), numbers("f32")
        found = run(f"cvt.rn.{to}x2.f32", [a, b])
        high, low = (run(f"cvt.rn.{to}.f32", [x]) for x in (a, b))
        assert np.array_equal(found, low.astype(np.uint32) | high.astype(np.uint32) << 16)

    @pytest.mark.parametrize("of", ["f16", "bf16"])
    def test_wider(self, of):
        bits = np.arange(2**16, dtype=np.uint16)
        found = run(f"cvt.f32.{of}", [bits]).view(np.float32)
        assert np.array_equal(floats(found.view(np.uint32), "f32"), floats(bits, of), equal_nan=True)

    def test_tf32(self):
        bits = np.concatenate([numbers("f32"), np.float32(1 + np.arange(1, 400, 2) * 2.0**-11).view(np.uint32)])
        for got, x in zip(floats(run("cvt.rna.tf32.f32", [bits]), "tf32"), floats(bits, "f32"), strict=True):
            if math.isfinite(x) and abs(x) < 3.4e38:
                assert got == rounded(Fraction(x), "tf32", "away"), x
            else:
                assert same(got, x) or abs(x) >= 3.4e38

    def test_to_integers_of_float32(self):
        x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e20, -0.0, 3.2, np.inf], np.float32)
        assert run("cvt.rni.f32.f32", [x]).view(np.float32).tolist() == [
            0,
            2,
            2,
            -0.0,
            -2,
            np.float32(1e20),
            0,
            3,
            np.inf,
        ]

    def test_saturate(self):
        x = np.array([-1, -0.0, 0.25, 1, 7, np.inf, -np.inf, np.nan], np.float32)
        found = run("cvt.sat.f32.f32", [x]).view(np.float32)
        assert found.tolist() == [0, 0, 0.25, 1, 1, 1, 0, 0] and not np.signbit(found).any()

    @pytest.mark.parametrize("opcode", OF_INTEGERS)
    def test_of_integers(self, opcode):
        _, _, to, of = opcode.split(".")
        x = numbers(of)
        found = floats(run(opcode, [x]), to)
        for got, number in zip(found.tolist(), x.tolist(), strict=True):
            assert got == rounded(Fraction(number), to)

    @pytest.mark.parametrize("opcode", BETWEEN_INTEGERS)
    def test_between_integers(self, opcode):
        """The low bits, or those that the sign or zero fills up, in registers that may be wider."""
        _, to, of = opcode.split(".")
        x = numbers(of)
        bits = int(KINDS[to][1:])
        for got, number in zip(run(opcode, [x]).tolist(), x.tolist(), strict=True):
            low = number % 2 ** int(to[1:])
            if to[0] == "s" and low >= 2 ** (int(to[1:]) - 1):
                low -= 2 ** int(to[1:])
            assert got == low % 2**bits, number

    def test_of_a_wider_register(self):
        x = RNG.integers(0, 2**64, 256, dtype=np.uint64)
        (found,) = compute("cvt.s64.s32 D0, A", ["b64"], ["b64"], x)
        assert np.array_equal(found.view(np.int64), x.astype(np.uint32).view(np.int32).astype(np.int64))


def test_every_instruction_is_tested():
    families = ("setp.", "cvt.", "min.", "max.", "neg.", "abs.", "selp.", "mov.", "add.f64", "sub.f64", "mul.f64")
    others = {*F32X2, *EXACT, *OF_TWO_TYPES, *APPROXIMATIONS, *FLUSHED, "fma.rm.f32", "copysign.f32"}
    assert not [opcode for opcode in TABLE if opcode not in others and not opcode.startswith(families)]


def test_float64():
    a, b = (RNG.normal(0, 1, 256) for _ in range(2))
    for name, wanted in (("add", a + b), ("sub", a - b), ("mul", a * b)):
        assert np.array_equal(run(f"{name}.f64", [a, b]).view(np.float64), wanted)
