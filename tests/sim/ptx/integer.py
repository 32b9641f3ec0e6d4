"""Integer, logical and predicate instructions, and moves."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from .table import Alu
from .values import bf16_to_float, dtype_of, halves

TABLE: dict[str, Alu] = {}


def add(opcode: str, result: str, sources: str, function: Callable) -> None:
    TABLE[opcode] = Alu((result,), tuple(sources.split()), function)


def bits_of(type_name: str) -> int:
    return 8 * dtype_of(type_name).itemsize


def shift_left(x: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Amounts of the width and more give 0."""
    width = 8 * x.dtype.itemsize - 1
    clamped = np.minimum(n, np.uint32(width)).astype(x.dtype)
    return np.where(n > np.uint32(width), x.dtype.type(0), x << clamped)


def shift_right(x: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Unsigned: amounts of the width and more give 0. Signed: they give the sign."""
    width = 8 * x.dtype.itemsize - 1
    clamped = np.minimum(n, np.uint32(width)).astype(x.dtype)
    shifted = x >> clamped
    return shifted if x.dtype.kind == "i" else np.where(n > np.uint32(width), x.dtype.type(0), shifted)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero. PTX says nothing of division by 0: all bits set here."""
    zero = b == 0
    divisor = np.where(zero, b.dtype.type(1), b)
    result = a // divisor
    if a.dtype.kind == "i":
        result = result + ((result * divisor != a) & ((a < 0) != (divisor < 0)))
    return np.where(zero, ~a.dtype.type(0), result)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """With the sign of a; of division by 0, all bits set."""
    return np.where(b == 0, ~a.dtype.type(0), a - quotient(a, b) * b)


def wide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    dtype = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(dtype) * b.astype(dtype)


def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (wide(a, b) >> (8 * a.dtype.itemsize)).astype(a.dtype)


def bit_field(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """`length` bits from `position` on; signed: the last of them fills up, that of a where the field ends behind it."""
    position = (position & np.uint32(255)).astype(np.int64)
    length = (length & np.uint32(255)).astype(np.int64)
    if a.dtype.kind == "u":
        kept = np.minimum(length, 32)
        return ((a.astype(np.int64) >> np.minimum(position, 32)) & ((np.int64(1) << kept) - 1)).astype(a.dtype)
    shifted = a.astype(np.int64) >> np.minimum(position, 31)  # a's sign goes on for ever
    left = 64 - np.clip(length, 1, 64)
    return np.where(length == 0, np.int32(0), (shifted << left >> left).astype(np.int32))


def bit_field_insert(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """`length` bits of a in those of b, from `position` on."""
    position, length = (np.minimum(n & np.uint32(255), np.uint32(32)).astype(np.uint64) for n in (position, length))
    mask = (((np.uint64(1) << length) - np.uint64(1)) << position).astype(np.uint32)
    return b & ~mask | (a.astype(np.uint64) << position).astype(np.uint32) & mask


def permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Byte i of the result is number s[i] of the eight of (b, a), or its sign where bit 3 of s[i] is set."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint32(0)
    for i in range(4):
        choice = selector >> np.uint32(4 * i)
        byte = (both >> ((choice & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte >> np.uint32(7) != 0, np.uint32(255), np.uint32(0))
        result = result | np.where(choice & np.uint32(8) != 0, sign, byte) << np.uint32(8 * i)
    return result


for _t in ("s16", "u16", "s32", "u32", "s64", "u64"):
    _n = bits_of(_t)
    for _name, _function in (("add", np.add), ("sub", np.subtract), ("min", np.minimum), ("max", np.maximum)):
        add(f"{_name}.{_t}", _t, f"{_t} {_t}", _function)
    add(f"mul.lo.{_t}", _t, f"{_t} {_t}", np.multiply)
    add(f"mad.lo.{_t}", _t, f"{_t} {_t} {_t}", lambda a, b, c: a * b + c)
    add(f"div.{_t}", _t, f"{_t} {_t}", quotient)
    add(f"rem.{_t}", _t, f"{_t} {_t}", remainder)
    add(f"shr.{_t}", _t, f"{_t} u32", shift_right)
    if _n < 64:
        _twice = f"{_t[0]}{2 * _n}"
        add(f"mul.wide.{_t}", _twice, f"{_t} {_t}", wide)
        add(f"mul.hi.{_t}", _t, f"{_t} {_t}", high)
        add(f"mad.wide.{_t}", _twice, f"{_t} {_t} {_twice}", lambda a, b, c: wide(a, b) + c)
    if _t[0] == "s":
        add(f"neg.{_t}", _t, _t, np.negative)
        add(f"abs.{_t}", _t, _t, np.abs)

for _t in ("b16", "b32", "b64"):
    add(f"shl.{_t}", _t, f"{_t} u32", shift_left)
for _t in ("pred", "b16", "b32", "b64"):
    add(f"not.{_t}", _t, _t, np.invert)
    for _name in ("and", "or", "xor"):
        add(f"{_name}.{_t}", _t, f"{_t} {_t}", getattr(np, f"bitwise_{_name}"))

add("bfe.u32", "u32", "u32 u32 u32", bit_field)
add("bfe.s32", "s32", "s32 u32 u32", bit_field)
add("bfi.b32", "b32", "b32 b32 u32 u32", bit_field_insert)
add("prmt.b32", "b32", "b32 b32 u32", permute_bytes)
add("popc.b32", "u32", "b32", lambda a: np.bitwise_count(a).astype(np.uint32))

# Comparisons. Those of floats are false where a number is NaN, with a "u" behind the name true.
COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def _unordered(compare: Callable, widen: Callable) -> Callable:
    def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = widen(a), widen(b)
        return compare(a, b) | np.isnan(a) | np.isnan(b)

    return function


def _ordered(compare: Callable, widen: Callable) -> Callable:
    def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = widen(a), widen(b)
        return compare(a, b) & ~(np.isnan(a) | np.isnan(b))

    return function


def _of_halves(compare: Callable, dtype: type) -> Callable:
    def function(a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
        pairs = zip(halves(a), halves(b), strict=True)
        return [compare(x.view(dtype), y.view(dtype)) for x, y in pairs]

    return function


for _name, _compare in COMPARISONS.items():
    for _t in ("s16", "u16", "s32", "u32", "s64", "u64"):
        add(f"setp.{_name}.{_t}", "pred", f"{_t} {_t}", _compare)
    for _t in ("b16", "b32", "b64"):
        if _name in ("eq", "ne"):
            add(f"setp.{_name}.{_t}", "pred", f"{_t} {_t}", _compare)
    for _t in ("f16", "bf16", "f32", "f64"):
        _widen = bf16_to_float if _t == "bf16" else lambda x: x
        add(f"setp.{_name}.{_t}", "pred", f"{_t} {_t}", _ordered(_compare, _widen))
        add(f"setp.{_name}u.{_t}", "pred", f"{_t} {_t}", _unordered(_compare, _widen))
        if _t in ("f16", "bf16"):
            _both = _of_halves(TABLE[f"setp.{_name}.{_t}"].function, np.float16 if _t == "f16" else np.uint16)
            TABLE[f"setp.{_name}.{_t}x2"] = Alu(("pred", "pred"), (f"{_t}x2", f"{_t}x2"), _both)
for _t in ("f32", "f64"):
    add(f"setp.num.{_t}", "pred", f"{_t} {_t}", lambda a, b: ~(np.isnan(a) | np.isnan(b)))
    add(f"setp.nan.{_t}", "pred", f"{_t} {_t}", lambda a, b: np.isnan(a) | np.isnan(b))

for _t in ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"):
    _bits = f"b{bits_of(_t)}" if _t[0] == "f" else _t  # a selected NaN keeps its bits
    add(f"selp.{_t}", _t, f"{_t} {_t} pred", lambda a, b, p: np.where(p, a, b))
for _t in ("pred", "b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"):
    add(f"mov.{_t}", _t, _t, lambda a: a)
add("cvta.to.global.u64", "u64", "u64", lambda a: a)
add("cvta.param.u64", "u64", "u64", lambda a: a + np.uint64(1 << 56))  # memory.PARAMETERS
