"""Activations and their slopes on float32 tiles, and the pass over rows that applies them outside of a product.

Nothing overflows to NaN for a finite number, and NaN stays. Infinities give what the formulas give, as in PyTorch.
The pass moves its operands once (2 reads and 1 write for a gradient), some 30 operations each: bound by memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.configs import target
from fastformer.kernels.philox import dropout_keeps
from fastformer.reference import dropout_threshold


@triton.jit
def _exp(x):
    """To about 2 units in the last place: 2^n e^r with n = round(x / ln 2). exp2(x / ln 2) loses bits far from 0."""
    n = tl.floor(tl.minimum(tl.maximum(x * 1.4426950408889634, -127.0), 127.0) + 0.5)
    r = (x - n * 0.693145751953125) - n * 1.42860682030941723212e-6  # ln 2 in two parts, the first of 16 bits
    return tl.exp2(r * 1.4426950408889634) * tl.exp2(n)


@triton.jit
def activation_and_slope(x, ACTIVATION: tl.constexpr):
    """The activation of x and its derivative, for float32 x; what isn't used is not computed."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817)  # e^(-x^2 / 2) / sqrt(2 pi)
        y, slope = x * cdf, cdf + x * density
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = 1 / (1 + e^-2u) for u = sqrt(2 / pi) (x + 0.044715 x^3), here in units of ln 2
        near = tl.minimum(tl.maximum(x, -16.0), 16.0)  # beyond it the sigmoid is 0 or 1
        doubled_u = x * (2.302208198144325 + 0.1029432395800235 * near * near)
        sigmoid, rest = 1.0 / (1.0 + tl.exp2(-doubled_u)), 1.0 / (1.0 + tl.exp2(doubled_u))
        y = x * sigmoid
        slope = sigmoid + x * sigmoid * rest * (1.5957691216057308 + 0.2140644488178007 * near * near)
    elif ACTIVATION == "silu":
        sigmoid, rest = 1.0 / (1.0 + _exp(-x)), 1.0 / (1.0 + _exp(x))
        y, slope = x * sigmoid, sigmoid + x * sigmoid * rest
    elif ACTIVATION == "relu":
        y, slope = tl.where(x < 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION is None, "unknown activation")
        y, slope = x, tl.full(x.shape, 1.0, tl.float32)
    return y, slope


@triton.jit
def row_dropout_keeps(seed_ptr, threshold, rows, first_column, COLUMNS: tl.constexpr):
    """(rows, COLUMNS) bool; rows is int64, the index over all leading dimensions."""
    c1, c2 = rows.to(tl.uint32)[:, None], (rows >> 32).to(tl.uint32)[:, None]
    return dropout_keeps(tl.load(seed_ptr), threshold.to(tl.uint32), first_column, COLUMNS, c1, c2, 0)


@triton.jit(do_not_specialize=["M", "threshold", "scale"])
def _activation_rows(
    x_ptr, stride_xm, stride_xn,  # (M, N): what the activation is applied to; None without one
    grad_ptr, stride_gm, stride_gn,  # (M, N): what its slope is multiplied by; None: gives the activation itself
    out_ptr,  # (M, N), contiguous
    seed_ptr, threshold, scale,  # None: no dropout
    M, N,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first_column = tl.program_id(1) * BLOCK_N
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    if x_ptr is not None:
        x_ptrs = x_ptr + rows[:, None] * stride_xm + columns[None, :].to(tl.int64) * stride_xn
        out, slope = activation_and_slope(tl.load(x_ptrs, inside, other=0.0).to(tl.float32), ACTIVATION)
    if grad_ptr is not None:
        grad_ptrs = grad_ptr + rows[:, None] * stride_gm + columns[None, :].to(tl.int64) * stride_gn
        out = tl.load(grad_ptrs, inside, other=0.0).to(tl.float32)
        if x_ptr is not None:
            out *= slope
    if seed_ptr is not None:
        out = tl.where(row_dropout_keeps(seed_ptr, threshold, rows, first_column, BLOCK_N), out * scale, 0.0)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], out.to(out_ptr.dtype.element_ty), inside)


def dropout_arguments(dropout_p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """seed_ptr, threshold and scale of a kernel."""
    return seed if dropout_p > 0 else None, dropout_threshold(dropout_p), 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def activation_rows(
    x: Tensor | None, grad: Tensor | None, activation: str | None, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """dropout(activation(x)), or without it the gradient in front of both: dropout(grad) * activation'(x).

    x, grad: (M, N), any strides. x may be None where there is no activation.
    """
    given = x if grad is None else grad
    M, N = given.shape
    out = torch.empty(M, N, dtype=given.dtype, device=given.device)
    if out.numel() == 0:
        return out
    BLOCK_M, BLOCK_N = (16, 64) if target() == "interpreter" else (16, 128)
    _activation_rows[triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N)](
        x, *(x.stride() if x is not None else (0, 0)), grad, *(grad.stride() if grad is not None else (0, 0)), out,
        *dropout_arguments(dropout_p, seed), M, N, ACTIVATION=activation, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out
