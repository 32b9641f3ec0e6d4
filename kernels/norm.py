"""layer_norm and add_layer_norm, forward and backward: kernels and launches that both ops share.

    s = dropout(input) + residual, or input         x_hat = (s - mean) rstd         output = x_hat weight + bias
    h = grad_output weight                          grad_s = rstd (h - mean(h) - x_hat mean(h x_hat)) + grad_sum
    grad_weight = sum(grad_output x_hat)            grad_bias = sum(grad_output)

Tiling: a program has BLOCK_M whole rows in registers (BLOCK_N columns, the next power of two); statistics, sums and
products are float32. Rows too wide for that go by in chunks of BLOCK_N columns (the `wide_` kernels). The backward is
run by as many programs as the GPU holds at once; each sums its rows' share of the gradients of weight and bias, and
`sum_shares_kernel` adds them up: in a fixed order, without atomics.

Bytes moved: every operand and result once, the minimum (wide rows again from cache: three times forward, twice
backward, and once more from memory for grad_weight), beside 8 bytes a column and program for the shares. Operations:
about 10 an element forward and 15 backward, and 25 for each that dropout decides on. Bound: memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.configs import Config, pick, target
from fastformer.kernels.philox import dropout_keeps
from fastformer.reference import dropout_threshold


@triton.jit
def _tile(first_row, rows, first_column, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows (BLOCK_M, 1) int64, columns (1, BLOCK_N), and which elements there are."""
    row = first_row + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
    column = first_column + tl.arange(0, BLOCK_N)[None, :]
    inside = row < rows
    if COLUMNS % BLOCK_N != 0:
        inside = inside & (column < COLUMNS)
    return row, column, inside


@triton.jit
def _offset(row, stride, column, VECTOR: tl.constexpr):
    """VECTOR divides the stride: said so that the compiler knows it, and takes so many neighbours at once."""
    return row * (stride // VECTOR * VECTOR) + column


@triton.jit
def _load(pointer, row, stride, column, inside, VECTOR: tl.constexpr):
    """A tile in float32."""
    return tl.load(pointer + _offset(row, stride, column, VECTOR), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, row, stride, column, inside, x, VECTOR: tl.constexpr):
    tl.store(pointer + _offset(row, stride, column, VECTOR), x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _load_columns(pointer, column, COLUMNS: tl.constexpr):
    """(1, BLOCK_N) of weight or bias, in float32."""
    return tl.load(pointer + column, mask=column < COLUMNS, other=0.0).to(tl.float32)


@triton.jit
def _dropout(x, seed_ptr, threshold, scale, row, first_column, BLOCK_N: tl.constexpr):
    seed = tl.load(seed_ptr)
    kept = dropout_keeps(seed, threshold.to(tl.uint32), first_column, BLOCK_N, row.to(tl.uint32), row >> 32, 0)
    return tl.where(kept, x * scale, 0.0)


@triton.jit
def _load_sum(
    input_ptr, residual_ptr, sum_ptr, seed_ptr, input_stride, residual_stride, threshold, scale,
    row, column, inside, first_column, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The rows to normalize, in float32: input, or the sum as sum_ptr will have it."""
    x = _load(input_ptr, row, input_stride, column, inside, VECTOR)
    if residual_ptr is not None:
        if seed_ptr is not None:
            x = _dropout(x, seed_ptr, threshold, scale, row, first_column, BLOCK_N)
        x += _load(residual_ptr, row, residual_stride, column, inside, VECTOR)
        x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _statistics(first_mean, deviations, squares, eps, COLUMNS: tl.constexpr):
    """(mean, rstd) from a first mean, the sum of the deviations from it and that of their squares: exact also where
    the mean is large beside the variance."""
    shift = deviations / COLUMNS
    variance = squares / COLUMNS - shift * shift
    variance = tl.where(variance < 0, 0.0, variance)  # a constant row's rounding errors; NaN stays
    return first_mean + shift, tl.rsqrt(variance + eps)


@triton.jit
def _normalize(x, mean, rstd, weight_ptr, bias_ptr, column, COLUMNS: tl.constexpr):
    y = (x - mean) * rstd
    if weight_ptr is not None:
        y *= _load_columns(weight_ptr, column, COLUMNS)
    if bias_ptr is not None:
        y += _load_columns(bias_ptr, column, COLUMNS)
    return y


@triton.jit(do_not_specialize=["rows", "input_stride", "residual_stride", "threshold"])
def forward_kernel(
    input_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, output_ptr, sum_ptr, mean_ptr, rstd_ptr,
    rows, input_stride, residual_stride, eps, threshold, scale,
    COLUMNS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    row, column, inside = _tile(first_row, rows, 0, COLUMNS, BLOCK_M, BLOCK_N)
    x = _load_sum(
        input_ptr, residual_ptr, sum_ptr, seed_ptr, input_stride, residual_stride, threshold, scale,
        row, column, inside, 0, VECTOR, BLOCK_N,
    )  # fmt: skip
    if sum_ptr is not None:
        _store(sum_ptr, row, COLUMNS, column, inside, x, VECTOR)
    mean = tl.sum(x, axis=1, keep_dims=True) / COLUMNS
    d = x - mean
    if COLUMNS % BLOCK_N != 0:
        d = tl.where(column < COLUMNS, d, 0.0)
    deviations, squares = tl.sum(d, axis=1, keep_dims=True), tl.sum(d * d, axis=1, keep_dims=True)
    mean, rstd = _statistics(mean, deviations, squares, eps, COLUMNS)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = _normalize(x, mean, rstd, weight_ptr, bias_ptr, column, COLUMNS)
    _store(output_ptr, row, COLUMNS, column, inside, y, VECTOR)


# In the wide kernels `chunks` is no constant: the compiler would unroll the loops until the registers spill.
@triton.jit(do_not_specialize=["rows", "input_stride", "residual_stride", "threshold", "chunks"])
def wide_forward_kernel(
    input_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, output_ptr, sum_ptr, mean_ptr, rstd_ptr,
    rows, input_stride, residual_stride, eps, threshold, scale, chunks,
    COLUMNS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for chunk in range(chunks):
        first_column = chunk * BLOCK_N
        row, column, inside = _tile(first_row, rows, first_column, COLUMNS, BLOCK_M, BLOCK_N)
        x = _load_sum(
            input_ptr, residual_ptr, sum_ptr, seed_ptr, input_stride, residual_stride, threshold, scale,
            row, column, inside, first_column, VECTOR, BLOCK_N,
        )  # fmt: skip
        total += x
        if sum_ptr is not None:  # computed anew below: no barrier makes other threads' stores visible on every GPU
            _store(sum_ptr, row, COLUMNS, column, inside, x, VECTOR)
    mean = tl.sum(total, axis=1, keep_dims=True) / COLUMNS
    deviations, squares = tl.zeros_like(total), tl.zeros_like(total)
    for chunk in range(chunks):
        first_column = chunk * BLOCK_N
        row, column, inside = _tile(first_row, rows, first_column, COLUMNS, BLOCK_M, BLOCK_N)
        x = _load_sum(
            input_ptr, residual_ptr, sum_ptr, seed_ptr, input_stride, residual_stride, threshold, scale,
            row, column, inside, first_column, VECTOR, BLOCK_N,
        )  # fmt: skip
        d = tl.where(inside, x - mean, 0.0)
        deviations += d
        squares += d * d
    deviations, squares = tl.sum(deviations, axis=1, keep_dims=True), tl.sum(squares, axis=1, keep_dims=True)
    mean, rstd = _statistics(mean, deviations, squares, eps, COLUMNS)
    for chunk in range(chunks):
        first_column = chunk * BLOCK_N
        row, column, inside = _tile(first_row, rows, first_column, COLUMNS, BLOCK_M, BLOCK_N)
        x = _load_sum(
            input_ptr, residual_ptr, sum_ptr, seed_ptr, input_stride, residual_stride, threshold, scale,
            row, column, inside, first_column, VECTOR, BLOCK_N,
        )  # fmt: skip
        y = _normalize(x, mean, rstd, weight_ptr, bias_ptr, column, COLUMNS)
        _store(output_ptr, row, COLUMNS, column, inside, y, VECTOR)
    row = first_row + tl.arange(0, BLOCK_M)[:, None]
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _load_gradients(
    grad_output_ptr, x_ptr, mean_ptr, rstd_ptr, grad_output_stride, x_stride,
    row, rows, column, inside, VECTOR: tl.constexpr,
):  # fmt: skip
    """(grad_output, x_hat, rstd), 0 outside."""
    mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    x_hat = (_load(x_ptr, row, x_stride, column, inside, VECTOR) - mean) * rstd
    x_hat = tl.where(inside, x_hat, 0.0)
    return _load(grad_output_ptr, row, grad_output_stride, column, inside, VECTOR), x_hat, rstd


@triton.jit
def _store_gradients(
    grad, grad_sum_ptr, seed_ptr, grad_input_ptr, grad_residual_ptr, grad_sum_stride, threshold, scale,
    row, column, inside, first_column, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From the gradient of what was normalized those of residual and input."""
    if grad_sum_ptr is not None:
        grad += _load(grad_sum_ptr, row, grad_sum_stride, column, inside, VECTOR)
    if grad_residual_ptr is not None:
        _store(grad_residual_ptr, row, COLUMNS, column, inside, grad, VECTOR)
    if seed_ptr is not None:
        grad = _dropout(grad, seed_ptr, threshold, scale, row, first_column, BLOCK_N)
    _store(grad_input_ptr, row, COLUMNS, column, inside, grad, VECTOR)


@triton.jit
def _store_share(pointer, share, column, COLUMNS: tl.constexpr):
    """The sum over the rows of a tile, to this program's row of (programs, COLUMNS)."""
    first = tl.program_id(0).to(tl.int64) * COLUMNS
    tl.store(pointer + (first + column), tl.sum(share, axis=0, keep_dims=True), mask=column < COLUMNS)


@triton.jit(do_not_specialize=["rows", "grad_output_stride", "grad_sum_stride", "x_stride", "threshold"])
def backward_kernel(
    grad_output_ptr, grad_sum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    grad_input_ptr, grad_residual_ptr, weight_shares_ptr, bias_shares_ptr,
    rows, grad_output_stride, grad_sum_stride, x_stride, threshold, scale,
    COLUMNS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_N)[None, :]
    if weight_ptr is not None:
        weight = _load_columns(weight_ptr, column, COLUMNS)
    grad_weight, grad_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_row in range(tl.program_id(0).to(tl.int64) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row, column, inside = _tile(first_row, rows, 0, COLUMNS, BLOCK_M, BLOCK_N)
        grad_output, x_hat, rstd = _load_gradients(
            grad_output_ptr, x_ptr, mean_ptr, rstd_ptr, grad_output_stride, x_stride,
            row, rows, column, inside, VECTOR,
        )  # fmt: skip
        grad_weight += grad_output * x_hat
        grad_bias += grad_output
        h = grad_output
        if weight_ptr is not None:
            h *= weight
        mean_h = tl.sum(h, axis=1, keep_dims=True) / COLUMNS
        mean_hx = tl.sum(h * x_hat, axis=1, keep_dims=True) / COLUMNS
        _store_gradients(
            rstd * (h - mean_h - x_hat * mean_hx), grad_sum_ptr, seed_ptr, grad_input_ptr, grad_residual_ptr,
            grad_sum_stride, threshold, scale, row, column, inside, 0, COLUMNS, VECTOR, BLOCK_N,
        )  # fmt: skip
    _store_share(weight_shares_ptr, grad_weight, column, COLUMNS)
    _store_share(bias_shares_ptr, grad_bias, column, COLUMNS)


@triton.jit(do_not_specialize=["rows", "grad_output_stride", "grad_sum_stride", "x_stride", "threshold", "chunks"])
def wide_backward_kernel(
    grad_output_ptr, grad_sum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, grad_input_ptr, grad_residual_ptr,
    rows, grad_output_stride, grad_sum_stride, x_stride, threshold, scale, chunks,
    COLUMNS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    sum_h, sum_hx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for chunk in range(chunks):
        first_column = chunk * BLOCK_N
        row, column, inside = _tile(first_row, rows, first_column, COLUMNS, BLOCK_M, BLOCK_N)
        h, x_hat, _ = _load_gradients(
            grad_output_ptr, x_ptr, mean_ptr, rstd_ptr, grad_output_stride, x_stride,
            row, rows, column, inside, VECTOR,
        )  # fmt: skip
        if weight_ptr is not None:
            h *= _load_columns(weight_ptr, column, COLUMNS)
        sum_h += h
        sum_hx += h * x_hat
    mean_h = tl.sum(sum_h, axis=1, keep_dims=True) / COLUMNS
    mean_hx = tl.sum(sum_hx, axis=1, keep_dims=True) / COLUMNS
    for chunk in range(chunks):
        first_column = chunk * BLOCK_N
        row, column, inside = _tile(first_row, rows, first_column, COLUMNS, BLOCK_M, BLOCK_N)
        h, x_hat, rstd = _load_gradients(
            grad_output_ptr, x_ptr, mean_ptr, rstd_ptr, grad_output_stride, x_stride,
            row, rows, column, inside, VECTOR,
        )  # fmt: skip
        if weight_ptr is not None:
            h *= _load_columns(weight_ptr, column, COLUMNS)
        _store_gradients(
            rstd * (h - mean_h - x_hat * mean_hx), grad_sum_ptr, seed_ptr, grad_input_ptr, grad_residual_ptr,
            grad_sum_stride, threshold, scale, row, column, inside, first_column, COLUMNS, VECTOR, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "grad_output_stride", "x_stride"])
def wide_shares_kernel(
    grad_output_ptr, x_ptr, mean_ptr, rstd_ptr, weight_shares_ptr, bias_shares_ptr, rows, grad_output_stride, x_stride,
    COLUMNS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first_column = tl.program_id(1) * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)[None, :]
    grad_weight, grad_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_row in range(tl.program_id(0).to(tl.int64) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row, column, inside = _tile(first_row, rows, first_column, COLUMNS, BLOCK_M, BLOCK_N)
        grad_output, x_hat, _ = _load_gradients(
            grad_output_ptr, x_ptr, mean_ptr, rstd_ptr, grad_output_stride, x_stride,
            row, rows, column, inside, VECTOR,
        )  # fmt: skip
        grad_weight += grad_output * x_hat
        grad_bias += grad_output
    _store_share(weight_shares_ptr, grad_weight, column, COLUMNS)
    _store_share(bias_shares_ptr, grad_bias, column, COLUMNS)


@triton.jit(do_not_specialize=["programs"])
def sum_shares_kernel(
    weight_shares_ptr, bias_shares_ptr, grad_weight_ptr, grad_bias_ptr, programs,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first_column = tl.program_id(0) * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)[None, :]
    grad_weight, grad_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, programs, BLOCK_M):
        program, column, inside = _tile(first, programs, first_column, COLUMNS, BLOCK_M, BLOCK_N)
        grad_weight += tl.load(weight_shares_ptr + (program * COLUMNS + column), mask=inside, other=0.0)
        grad_bias += tl.load(bias_shares_ptr + (program * COLUMNS + column), mask=inside, other=0.0)
    tl.store(grad_weight_ptr + column, tl.sum(grad_weight, axis=0, keep_dims=True), mask=column < COLUMNS)
    tl.store(grad_bias_ptr + column, tl.sum(grad_bias, axis=0, keep_dims=True), mask=column < COLUMNS)


def _rows(x: Tensor | None) -> Tensor | None:
    """(rows, columns): copied where columns are not next to each other, or the rows have no common stride."""
    if x is None:
        return None
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _dropout_arguments(dropout_p: float) -> tuple[int, float]:
    """(threshold, scale)"""
    return dropout_threshold(dropout_p), 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def _pick(kernel: str, rows: Tensor, dropout: bool, candidates: Callable[[int], list[Config]]) -> Config:
    width = max(triton.next_power_of_2(rows.shape[1]), 64 if dropout else 1)
    if target() == "interpreter":
        return Config({"BLOCK_M": 16, "BLOCK_N": min(width, 1024)})
    return pick(kernel, candidates(width), width=width, dtype=rows.dtype, dropout=dropout)


# 8 elements a thread: with 16, sm_80 spills registers.
_WIDE = [Config({"BLOCK_M": 1, "BLOCK_N": n}, num_warps=n // 256, num_stages=1) for n in (4096, 2048)]

_SUM_SHARES = Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=1)


def _forward_configs(width: int) -> list[Config]:
    """32 elements a thread; one warp to each row as long as that is enough, then reductions need no barrier."""
    if width > 16384:
        return _WIDE
    warps = 4 if width <= 256 else max(1, width // 1024)
    return [
        Config({"BLOCK_M": max(1, w * elements // width), "BLOCK_N": width}, num_warps=w, num_stages=1)
        for w, elements in ((warps, 1024), (2 * warps, 512), (warps, 512), (4 * warps, 512))
        if w <= 16 and width <= w * elements
    ]


def _backward_configs(width: int) -> list[Config]:
    """16 elements a thread, for it has its shares of both gradients beside them."""
    if width > 8192:
        return _WIDE
    warps = max(4, width // 512)
    return [
        Config({"BLOCK_M": max(1, w * elements // width), "BLOCK_N": width}, num_warps=w, num_stages=1)
        for w, elements in ((warps, 256 if target() == "sm_100" else 512), (warps, 256), (2 * warps, 256))
        if w <= 16 and width <= w * elements
    ]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _programs(device: torch.device, config: Config) -> int:
    """How many share the rows of a backward: 16 warps for each multiprocessor, which has the registers for them."""
    return _multiprocessors(device) * max(1, 16 // config.num_warps)


def forward(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """(output, sum, mean, rstd); no sum without a residual."""
    dtype = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    output = input.new_empty(input.shape, dtype=dtype)
    total = None if residual is None else torch.empty_like(output)
    rows, columns = math.prod(input.shape[:-1]), input.shape[-1]
    mean, rstd = (input.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if output.numel() == 0:
        return output, total, mean, rstd
    x, r = _rows(input), _rows(residual)
    strides = x.stride(0), _stride(r)
    config = _pick("norm_forward", x, dropout_p > 0, _forward_configs)
    operands = x, r, _contiguous(weight), _contiguous(bias), seed, output, total, mean, rstd
    scalars = rows, *strides, eps, *_dropout_arguments(dropout_p)
    shape = {"COLUMNS": columns, "VECTOR": math.gcd(8, columns, *strides), **config.arguments()}
    grid = (triton.cdiv(rows, config.tiles["BLOCK_M"]),)
    chunks = triton.cdiv(columns, config.tiles["BLOCK_N"])
    if chunks == 1:
        forward_kernel[grid](*operands, *scalars, **shape)
    else:
        wide_forward_kernel[grid](*operands, *scalars, chunks, **shape)
    return output, total, mean, rstd


def backward(
    grad_output: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    dropout_p: float, seed: Tensor | None, grad_input: Tensor, grad_residual: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fills grad_input and grad_residual; returns (grad_weight, grad_bias)."""
    columns = x.shape[-1]
    if x.numel() == 0:
        return mean.new_zeros(columns), mean.new_zeros(columns)
    g, gs, x = _rows(grad_output), _rows(grad_sum), _rows(x)
    rows = x.shape[0]
    strides = g.stride(0), _stride(gs), x.stride(0)
    scalars = rows, *strides, *_dropout_arguments(dropout_p)
    config = _pick("norm_backward", x, dropout_p > 0, _backward_configs)
    shape = {"COLUMNS": columns, "VECTOR": math.gcd(8, columns, *strides), **config.arguments()}
    tiles = triton.cdiv(rows, config.tiles["BLOCK_M"])
    programs = min(tiles, _programs(x.device, config))
    shares = mean.new_empty(2, programs, columns)
    operands = g, gs, x, _contiguous(weight), mean, rstd, seed, grad_input, grad_residual
    chunks = triton.cdiv(columns, config.tiles["BLOCK_N"])
    if chunks == 1:
        backward_kernel[(programs,)](*operands, *shares, *scalars, **shape)
    else:
        wide_backward_kernel[(tiles,)](*operands, *scalars, chunks, **shape)
        wide_shares_kernel[(programs, chunks)](g, x, mean, rstd, *shares, rows, strides[0], strides[2], **shape)
    grad_weight, grad_bias = mean.new_empty(columns), mean.new_empty(columns)
    sum_shares_kernel[(triton.cdiv(columns, _SUM_SHARES.tiles["BLOCK_N"]),)](
        *shares, grad_weight, grad_bias, programs, COLUMNS=columns, **_SUM_SHARES.arguments()
    )
    return grad_weight, grad_bias
