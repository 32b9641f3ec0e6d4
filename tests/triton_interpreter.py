"""Triton's interpreter, made to compute what a GPU computes. tests/conftest.py installs it where TRITON_INTERPRET=1.

Triton 3.9 as it is: bfloat16 is held as its bits in a uint16 and computed on as if these were numbers; float32 products
take no notice of `input_precision`; a load whose mask is off, and that names no `other`, gives 0 where a GPU gives
anything; dots are taken that no GPU takes; and nothing watches the memory. Here

- bfloat16 is held as float32, rounded to the nearest bfloat16 (ties to even) after every operation;
- ``tl.dot`` of float32 rounds its operands as "tf32" and "tf32x3" do, so that a forgotten `input_precision` shows;
- a float argument is a float32;
- such a load gives NaN, or the least integer;
- ``tl.dot`` wants a depth of 16 (8 for float32), as NVIDIA's tensor cores do;
- every access is checked by interpreted_memory.py.

The patches stay for the life of the process.
"""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace

import interpreted_memory
import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_BF16 = tl.bfloat16


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 numbers to the nearest bfloat16, ties to even, in float32."""
    bits = x.view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.float32(np.nan), nearest.view(np.float32))


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 numbers to 10 bits after the point; ties to even."""
    bits = x.view(np.uint32)
    nearest = (bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), nearest.view(np.float32), x)


def bf16_from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def bf16_to_bits(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)


def _dtype_in_memory(dtype: tl.dtype) -> np.dtype:
    return np.dtype(np.uint16) if dtype == _BF16 else _held_as(dtype)


_original_dtype = interpreter._get_np_dtype
_original_size_check = interpreter._validate_np_data_size
_original_check = TensorHandle.__post_init__
_original_conversion = interpreter._implicit_cvt


_NUMBERS = {
    dtype.name: np.dtype(np.float32) if dtype == _BF16 else _original_dtype(dtype)
    for dtype in map(tl.dtype, tl.dtype.SINT_TYPES + tl.dtype.UINT_TYPES + tl.dtype.FP_TYPES)
}


def _held_as(dtype: tl.dtype) -> np.dtype:
    element = dtype.scalar
    return np.dtype(np.uint64) if isinstance(element, tl.pointer_type) else _NUMBERS[element.name]


def _fits(data: np.ndarray, dtype: tl.dtype) -> bool:
    return dtype == _BF16 or _original_size_check(data, dtype)


def _round_new_handle(self: TensorHandle) -> None:
    """The result of every operation is a new handle."""
    _original_check(self)
    if self.dtype.scalar == _BF16 and self.data.dtype.kind == "f":  # a comparison's handle holds bools
        self.data = round_to_bf16(np.asarray(self.data, np.float32))


def _convert_argument(arg):
    if isinstance(arg, float):
        return tl.tensor(TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)
    if isinstance(arg, torch.Tensor):
        dtype = tl.str_to_ty(interpreter.triton.runtime.jit.mangle_type(arg), None)
        return tl.tensor(TensorHandle(np.array([interpreted_memory.address_of(arg)], np.uint64), dtype), dtype)
    return _original_conversion(arg)


class Builder(InterpreterBuilder):
    """What the interpreter does for each operation."""

    def cast_impl(self, src, dst_type):
        return TensorHandle(src.data.astype(_held_as(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if _BF16 not in (src.dtype.scalar, dst_type.scalar):
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        if rounding_mode == ir.ROUNDING_MODE.RTZ and src.data.dtype == np.float32:
            return TensorHandle(bf16_from_bits(bf16_to_bits(src.data)), dst_type.scalar)
        if 8 in (src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth):
            raise NotImplementedError(f"the interpreter has no cast from {src.dtype} to {dst_type}")
        return self.cast_impl(src, dst_type)

    def create_bitcast(self, src, dst_type):
        if _BF16 not in (src.dtype.scalar, dst_type.scalar):
            return super().create_bitcast(src, dst_type)
        bits = bf16_to_bits(src.data) if src.dtype.scalar == _BF16 else src.data.view(np.uint16)
        data = bf16_from_bits(bits) if dst_type.scalar == _BF16 else bits.view(_held_as(dst_type))
        return TensorHandle(data, dst_type.scalar)

    def create_fabs(self, arg):
        return self.unary_op(arg, np.abs)

    def create_erf(self, arg):
        return TensorHandle(torch.erf(torch.from_numpy(np.array(arg.data)).double()).numpy().astype(arg.data.dtype),
                            arg.dtype.scalar)  # fmt: skip

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar != tl.float32 or input_precision == ir.INPUT_PRECISION.IEEE:
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        high_a, high_b = round_to_tf32(a.data), round_to_tf32(b.data)
        product = np.matmul(high_a, high_b)
        if input_precision == ir.INPUT_PRECISION.TF32x3:
            low_a, low_b = round_to_tf32(a.data - high_a), round_to_tf32(b.data - high_b)
            product = np.matmul(low_a, high_b) + np.matmul(high_a, low_b) + product
        elif input_precision != ir.INPUT_PRECISION.TF32:
            raise NotImplementedError(f"the interpreter has no dot with input_precision={input_precision}")
        return TensorHandle(product + d.data, d.dtype.scalar)

    def create_masked_load(self, ptrs, mask, other, cache_policy, is_volatile):
        dtype = ptrs.get_element_ty()
        values = interpreted_memory.load(ptrs.data, mask.data, _dtype_in_memory(dtype))
        if dtype == _BF16:
            values = bf16_from_bits(values)
        return TensorHandle(np.where(mask.data, values, _undefined(dtype) if other is None else other.data), dtype)

    def create_masked_store(self, ptrs, value, mask, cache_policy):
        data = bf16_to_bits(value.data) if value.dtype.scalar == _BF16 else value.data
        interpreted_memory.store(ptrs.data, data, mask.data, _dtype_in_memory(ptrs.get_element_ty()))

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        addresses = interpreted_memory.atomic(ptr.data, mask.data, _dtype_in_memory(_atomic_dtype(ptr)))
        return super().create_atomic_rmw(rmwOp, TensorHandle(addresses, ptr.dtype), val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        everywhere = np.ones_like(ptr.data, dtype=bool)
        addresses = interpreted_memory.atomic(ptr.data, everywhere, _dtype_in_memory(_atomic_dtype(ptr)))
        return super().create_atomic_cas(TensorHandle(addresses, ptr.dtype), cmp, val, sem, scope)

    def create_atomic_poll(self, ptr, expected, timeout_ns, sem, scope):
        raise NotImplementedError("programs run one after another here: one that waits for another waits forever")


def _undefined(dtype: tl.dtype):
    """What a masked load gives where nothing is asked for."""
    held = _held_as(dtype)
    return held.type(np.nan) if held.kind == "f" else np.iinfo(held).min if held.kind == "i" else held.type(0)


def _atomic_dtype(ptr: TensorHandle) -> tl.dtype:
    if ptr.get_element_ty() == _BF16:
        raise NotImplementedError("the interpreter has no bfloat16 atomics")
    return ptr.get_element_ty()


class Executor:
    """A launch: every program of the grid, one after another."""

    def __init__(self, fn, arg_names, grid, pre_run_hooks=()):
        self.fn, self.grid = fn, grid
        annotations = inspect.get_annotations(fn)
        self.constexprs = [name for name in arg_names if annotations.get(name) in (tl.constexpr, "tl.constexpr")]

    def __call__(self, *args, **kwargs):
        names = inspect.signature(self.fn).parameters
        kwargs = {name: arg for name, arg in kwargs.items() if name in names}  # without num_warps and the like
        args = inspect.getcallargs(self.fn, *args, **kwargs)
        grid = self.grid(args) if callable(self.grid) else self.grid
        grid = (*grid, 1, 1)[:3]
        builder = interpreter.interpreter_builder
        builder.set_grid_dim(*grid)
        memory, silence = interpreted_memory.launch(self.fn.__name__, args), warnings.catch_warnings()
        with memory, silence, np.errstate(all="ignore"):
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of NaN
            args = {name: x if name in self.constexprs else interpreter._implicit_cvt(x) for name, x in args.items()}
            for program in np.ndindex(*grid):
                builder.set_grid_idx(*program)
                interpreted_memory.enter_program(program)
                self.fn(**args)


def _min_dot_size(lhs_type, rhs_type) -> tuple[int, int, int]:
    return (1, 1, 256 // lhs_type.scalar.primitive_bitwidth)


def install() -> None:
    interpreter._get_np_dtype = _held_as
    interpreter._validate_np_data_size = _fits
    interpreter._implicit_cvt = _convert_argument
    interpreter.GridExecutor = Executor
    TensorHandle.__post_init__ = _round_new_handle
    interpreter.interpreter_builder.__class__ = Builder
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = _min_dot_size
    # Once for all, instead of at each launch and each call of a device function.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


install()
