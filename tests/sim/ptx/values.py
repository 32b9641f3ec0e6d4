"""PTX types as numpy arrays. A register holds the bits of all threads of a team, unsigned; an operation looks at
them in its own type."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .parse import Immediate, Instruction, Negated, Operand, PtxError, Register, Sink, Special, Symbol

if TYPE_CHECKING:
    from .machine import Team

# Type -> (the numpy type in which it is computed, the class of registers that hold it). numpy has no bfloat16; pairs
# and tf32 are bits: the functions of an instruction convert them.
TYPES = {
    "pred": (np.bool_, "pred"),
    **{f"{letter}{n}": (getattr(np, f"uint{n}"), f"b{max(n, 16)}") for letter in "ub" for n in (8, 16, 32, 64)},
    **{f"s{n}": (getattr(np, f"int{n}"), f"b{max(n, 16)}") for n in (8, 16, 32, 64)},
    **{f"f{n}": (getattr(np, f"float{n}"), f"b{n}") for n in (16, 32, 64)},
    "bf16": (np.uint16, "b16"),
    **dict.fromkeys(("f16x2", "bf16x2", "tf32"), (np.uint32, "b32")),
    "f32x2": (np.uint64, "b64"),
}
STORAGE = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
WIDTHS = {"pred": 0, "b16": 2, "b32": 4, "b64": 8}

Reader = Callable[["Team"], np.ndarray]
Writer = Callable[["Team", np.ndarray, "np.ndarray | None"], None]


def dtype_of(type_name: str) -> np.dtype:
    return np.dtype(TYPES[type_name][0])


def immediate(operand: Immediate, type_name: str, instruction: Instruction) -> np.generic:
    """In the numpy type of `type_name`."""
    dtype, text = dtype_of(type_name), operand.text
    if text[:2] in ("0f", "0F", "0d", "0D"):
        bits = int(text[2:], 16)
        number = np.uint32(bits).view(np.float32) if len(text) == 10 else np.uint64(bits).view(np.float64)
        if type_name == "b32" and len(text) == 10:
            return np.uint32(bits)
        if type_name == "b64" and len(text) == 18:
            return np.uint64(bits)
        if dtype != number.dtype:
            raise PtxError(f"{instruction}: {text} is not of type {type_name}")
        return number
    bits = int(text.removesuffix("U"), 0)
    if type_name == "pred":
        return np.bool_(bits != 0)
    size = 8 * dtype.itemsize
    if not -(2 ** (size - 1)) <= bits < 2**size or type_name in ("f32", "f64"):
        raise PtxError(f"{instruction}: {text} is not of type {type_name}")
    return np.array(bits % 2**size, np.dtype(f"u{dtype.itemsize}")).view(dtype)[()]


def reader(operand: Operand, type_name: str, instruction: Instruction, wider: bool = False) -> Reader:
    """What gives the operand's values, of all threads or a scalar. `wider`: the low bits of a wider register do."""
    dtype, kind = TYPES[type_name]
    if isinstance(operand, Register):
        i, storage = operand.index, STORAGE[operand.kind]
        if operand.kind == kind and dtype == storage:
            return lambda team: team.registers[i]
        if WIDTHS[operand.kind] == np.dtype(dtype).itemsize and "pred" not in (kind, operand.kind):
            return lambda team: team.registers[i].view(dtype)
        narrower = np.dtype(dtype).itemsize < WIDTHS[operand.kind]
        if narrower and kind != "pred" and (wider or np.dtype(dtype).itemsize == 1):
            unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
            return lambda team: team.registers[i].astype(unsigned).view(dtype)
    elif isinstance(operand, Negated) and kind == operand.register.kind == "pred":
        j = operand.register.index
        return lambda team: ~team.registers[j]
    elif isinstance(operand, Immediate):
        constant = immediate(operand, type_name, instruction)
        return lambda team: constant
    elif isinstance(operand, Special) and type_name in ("u32", "s32", "b32"):
        name = operand.name
        return lambda team: team.special(name).view(dtype)
    elif isinstance(operand, Symbol) and type_name in ("u32", "s32", "b32", "u64", "b64", "s64"):
        symbol = operand.name
        return lambda team: dtype(team.batch.launch.program.address_of(symbol))
    raise PtxError(f"{instruction}: {operand} can't be an operand of type {type_name}")


def writer(operand: Operand, type_name: str, instruction: Instruction, wider: bool = False) -> Writer:
    """What stores values of the type, of the threads in a mask. `wider`: a wider register is filled up, by the sign."""
    dtype, kind = TYPES[type_name]
    if isinstance(operand, Sink):
        return lambda team, values, mask: None
    if not isinstance(operand, Register):
        raise PtxError(f"{instruction}: {operand} can't be a result of type {type_name}")
    i, storage = operand.index, STORAGE[operand.kind]
    same = (operand.kind == "pred") == (kind == "pred") and WIDTHS[operand.kind] == WIDTHS[kind]
    if not same and not (wider and 0 < WIDTHS[kind] < WIDTHS[operand.kind]):
        raise PtxError(f"{instruction}: {operand.name} of type {operand.kind} can't hold a result of type {type_name}")
    extend = np.dtype(dtype).itemsize != np.dtype(storage).itemsize
    between = np.dtype(f"{'i' if type_name[0] == 's' else 'u'}{np.dtype(storage).itemsize}")

    def write(team: Team, values: np.ndarray, mask: np.ndarray | None) -> None:
        if extend:
            values = values.astype(between)
        values = values.view(storage)
        if values.ndim == 0:
            values = np.full(team.size, values)
        registers = team.registers
        registers[i] = values if mask is None else np.where(mask, values, registers[i])

    return write


def bf16_to_float(bits: np.ndarray) -> np.ndarray:
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def float_to_bf16(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even; NaN is 0x7fff."""
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def halves(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Low and high 16 bits."""
    return bits.astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)


def joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
