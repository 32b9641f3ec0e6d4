"""Floating-point instructions and conversions."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from .table import Alu
from .values import bf16_to_float, dtype_of, float_to_bf16, halves, joined

TABLE: dict[str, Alu] = {}
SMALLEST = np.float32(2**-126)  # a subnormal number is less


def add(opcode: str, result: str, sources: str, function: Callable, wider: bool = False, optional: int = 0) -> None:
    TABLE[opcode] = Alu((result,), tuple(sources.split()), function, wider, optional)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers to zeros of their sign (.ftz)."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x)


def flushed(function: Callable) -> Callable:
    return lambda *x: flush(function(*map(flush, x)))


def in_double(function: Callable) -> Callable:
    """Computed in float64, rounded once more to float32: right for one sum, product, quotient or root."""
    return lambda *x: function(*(y.astype(np.float64) for y in x)).astype(np.float32)


def _sum_and_error(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b in float64, and what it lacks (Knuth 1969)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of float32, rounded once, but for results that are subnormal, which may be rounded twice.

    The product is exact in float64. Rounding the sum to float64 and then to float32 is wrong only where the first ends
    half way between two float32: the second must then go to the side of what the first left out.
    """
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    half_way = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if half_way.any():
        total, error = _sum_and_error(product, addend)
        nudge = half_way & (error != 0) & np.isfinite(total)
        total = np.where(nudge, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return total.astype(np.float32)


def fma_down(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of float32, rounded towards minus infinity."""
    total, error = _sum_and_error(a.astype(np.float64) * b, np.broadcast_to(c, a.shape).astype(np.float64))
    near = total.astype(np.float32)
    above = (near > total) | (near == total) & (error < 0)
    return np.where(above & np.isfinite(total), np.nextafter(near, np.float32(-np.inf)), near)


def _sign_aware(function: Callable, of_zeros: Callable) -> Callable:
    """min and max: the other numbers where one is NaN; -0 is less than +0."""

    def of_two(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        chosen = function(a, b)
        zeros = of_zeros(a.view(np.uint32), b.view(np.uint32)).view(np.float32)
        return np.where((a == 0) & (b == 0), zeros, chosen)

    return lambda *x: functools.reduce(of_two, x)


def or_nan(function: Callable) -> Callable:
    return lambda *x: np.where(functools.reduce(np.logical_or, map(np.isnan, x)), np.float32(np.nan), function(*x))


def flip_sign(x: np.ndarray) -> np.ndarray:
    bits = x.view(f"u{x.dtype.itemsize}")
    return (bits ^ bits.dtype.type(1 << (8 * x.dtype.itemsize - 1))).view(x.dtype)


def saturate(x: np.ndarray) -> np.ndarray:
    """To [0, 1]; NaN to 0."""
    return np.where(np.isnan(x), np.float32(0), np.clip(x, np.float32(0), np.float32(1)) + np.float32(0))


def to_tf32(x: np.ndarray) -> np.ndarray:
    """10 bits of fraction, to nearest, ties away from zero; NaN is 0x7fffffff."""
    bits = x.view(np.uint32)
    rounded = np.where(np.isinf(x), bits, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), rounded)


def float_to_half(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even; NaN is 0x7fff."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16)).view(np.float16)


def of_bf16(function: Callable) -> Callable:
    """Computed in float64, which has room for a product and for any sum whose rounding it could change."""
    return lambda *x: float_to_bf16(to_odd(function(*(bf16_to_float(y).astype(np.float64) for y in x))))


def of_f16(function: Callable) -> Callable:
    return lambda *x: float_to_half(function(*(y.astype(np.float64) for y in x)))


def pairs(function: Callable, dtype: type) -> Callable:
    """Of the low halves, and of the high ones."""

    def both(*x: np.ndarray) -> np.ndarray:
        low, high = zip(*map(halves, x), strict=True)
        return joined(*(function(*(y.view(dtype) for y in part)).view(np.uint16) for part in (low, high)))

    return both


def of_f32x2(function: Callable) -> Callable:
    return lambda *x: function(*(y.view(np.float32) for y in x)).view(np.uint64)


def to_odd(x: np.ndarray) -> np.ndarray:
    """float64 to float32, the last bit set where it is not exact: rounding it once more is then as from float64."""
    near = x.astype(np.float32)
    back = near.astype(np.float64)
    beyond = np.abs(back) > np.abs(x)
    cut = np.where(beyond, np.nextafter(near, np.float32(0)), near).view(np.uint32)
    odd = np.where(np.isfinite(x) & (back != x), cut | np.uint32(1), near.view(np.uint32))
    return odd.view(np.float32)


def _astype(dtype: np.dtype) -> Callable:
    return lambda x: x.astype(dtype)


least = _sign_aware(np.fmin, np.bitwise_or)
greatest = _sign_aware(np.fmax, np.bitwise_and)
_DIVIDE = in_double(np.divide)
_INVERT = in_double(np.reciprocal)

for _name, _function, _sources in (
    ("add", np.add, "f32 f32"),
    ("sub", np.subtract, "f32 f32"),
    ("mul", np.multiply, "f32 f32"),
    ("fma.rn", fma, "f32 f32 f32"),
    ("neg", flip_sign, "f32"),
    ("abs", np.abs, "f32"),
):
    add(f"{_name}.f32", "f32", _sources, _function)
    add(f"{_name}.ftz.f32", "f32", _sources, flushed(_function))
for _name in ("add", "sub", "mul"):
    add(f"{_name}.rn.f32", "f32", "f32 f32", TABLE[f"{_name}.f32"].function)
    for _rounding in ("", ".rn"):
        add(f"{_name}{_rounding}.f32x2", "f32x2", "f32x2 f32x2", of_f32x2(TABLE[f"{_name}.f32"].function))
    add(f"{_name}.f64", "f64", "f64 f64", TABLE[f"{_name}.f32"].function)
add("fma.rn.f32x2", "f32x2", "f32x2 f32x2 f32x2", of_f32x2(fma))
add("fma.rm.f32", "f32", "f32 f32 f32", fma_down)
for _name, _function in (("min", least), ("max", greatest)):  # of three on sm_100
    add(f"{_name}.f32", "f32", "f32 f32 f32", _function, optional=1)
    add(f"{_name}.ftz.f32", "f32", "f32 f32 f32", flushed(_function), optional=1)
    add(f"{_name}.NaN.f32", "f32", "f32 f32 f32", or_nan(_function), optional=1)
add("copysign.f32", "f32", "f32 f32", lambda a, b: np.copysign(b, a))  # the sign of a, the size of b
# Exact to a rounding; the approximations of a GPU (.approx, .full) are a unit or two in the last place worse.
add("div.rn.f32", "f32", "f32 f32", _DIVIDE)
add("div.full.f32", "f32", "f32 f32", _DIVIDE)
add("div.approx.f32", "f32", "f32 f32", _DIVIDE)
add("rcp.rn.f32", "f32", "f32", _INVERT)
add("sqrt.rn.f32", "f32", "f32", in_double(np.sqrt))
add("rcp.approx.ftz.f32", "f32", "f32", flushed(_INVERT))
add("rsqrt.approx.ftz.f32", "f32", "f32", flushed(in_double(lambda x: 1 / np.sqrt(x))))
add("ex2.approx.f32", "f32", "f32", in_double(np.exp2))
add("ex2.approx.ftz.f32", "f32", "f32", flushed(in_double(np.exp2)))
add("lg2.approx.f32", "f32", "f32", in_double(np.log2))
add("lg2.approx.ftz.f32", "f32", "f32", flushed(in_double(np.log2)))
add("tanh.approx.f32", "f32", "f32", in_double(np.tanh))

for _t in ("f16", "bf16"):
    add(f"neg.{_t}", _t, _t, flip_sign)
add("abs.f16", "f16", "f16", np.abs)
add("abs.bf16", "bf16", "bf16", lambda a: a & np.uint16(0x7FFF))
add("abs.f16x2", "f16x2", "f16x2", lambda a: a & np.uint32(0x7FFF7FFF))
add("abs.bf16x2", "bf16x2", "bf16x2", lambda a: a & np.uint32(0x7FFF7FFF))
for _name, _function, _count in (
    ("add", np.add, 2),
    ("sub", np.subtract, 2),
    ("mul", np.multiply, 2),
    ("fma.rn", lambda a, b, c: a * b + c, 3),
):
    for _t, _one, _dtype in (("f16", of_f16(_function), np.float16), ("bf16", of_bf16(_function), np.uint16)):
        add(f"{_name}.{_t}", _t, " ".join([_t] * _count), _one)
        add(f"{_name}.{_t}x2", f"{_t}x2", " ".join([f"{_t}x2"] * _count), pairs(_one, _dtype))

for _t, _widened in (("f16", lambda a: a.astype(np.float32)), ("bf16", bf16_to_float)):
    add(f"cvt.f32.{_t}", "f32", _t, _widened)
    add(f"sub.rn.f32.{_t}", "f32", f"{_t} f32", lambda a, b, widened=_widened: widened(a) - b)  # on sm_100
add("cvt.rn.f16.f32", "f16", "f32", float_to_half)
add("cvt.rn.bf16.f32", "bf16", "f32", float_to_bf16)
add("cvt.rn.f16x2.f32", "f16x2", "f32 f32", lambda a, b: joined(*(float_to_half(x).view(np.uint16) for x in (b, a))))
add("cvt.rn.bf16x2.f32", "bf16x2", "f32 f32", lambda a, b: joined(float_to_bf16(b), float_to_bf16(a)))
add("cvt.rna.tf32.f32", "tf32", "f32", to_tf32)
add("cvt.rni.f32.f32", "f32", "f32", np.rint)
add("cvt.sat.f32.f32", "f32", "f32", saturate)
for _t in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
    add(f"cvt.rn.f32.{_t}", "f32", _t, lambda a: a.astype(np.float32), wider=True)
for _t in ("u16", "s16", "u32", "s32"):
    add(f"cvt.rn.f16.{_t}", "f16", _t, lambda a: a.astype(np.float64).astype(np.float16), wider=True)
    add(f"cvt.rn.bf16.{_t}", "bf16", _t, lambda a: float_to_bf16(to_odd(a.astype(np.float64))), wider=True)
for _to in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
    for _from in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
        if _to != _from or _to in ("s64", "u64", "s32", "u32"):
            add(f"cvt.{_to}.{_from}", _to, _from, _astype(dtype_of(_to)), wider=True)
