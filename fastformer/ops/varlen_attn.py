"""varlen_attn: attention within each of the sequences that are laid end to end, without padding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastformer import backends, reference
from fastformer.ops.common import (
    autocast,
    check_floating,
    check_probability,
    compute_dtype,
    needs_grad,
    raw,
    register,
    seed_for,
)
from fastformer.ops.scaled_dot_product_attention import check_heads, check_window

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor cu_seq_k, int max_q, int max_k, float dropout_p,"
    " Tensor? seed, float scale, int window_left, int window_right) -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, Tensor cu_seq_q, Tensor"
    " cu_seq_k, int max_q, int max_k, float dropout_p, Tensor? seed, float scale, int window_left, int window_right)"
    " -> (Tensor, Tensor, Tensor)"
)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of sequences of different lengths, laid end to end.

    As ``torch.nn.attention.varlen.varlen_attn``.

    Args:
        query: (Tq, H, D), key: (Tk, H, D), value: (Tk, H, Dv); float32, bfloat16, float16 or float64; any strides. With
            enable_gqa key and value may have fewer heads, a divisor of H.
        cu_seq_q, cu_seq_k: (B + 1) int32, where each sequence begins; the last is Tq or Tk.
        max_q, max_k: the longest sequence.
        scale: 1 / sqrt(D) if None.
        window_size: (left, right), how many keys a query sees on each side of its own position, the last query at
            the last key of its sequence; -1 for all. (-1, 0) is causal.
        dropout_p: dropout of the probabilities; always on where > 0. The mask is that of the same sequences padded.

    Returns:
        (Tq, H, Dv) in query's dtype. Under autocast in the autocast dtype.

    Raises:
        TypeError: an operand is not floating, the dtypes differ, or cu_seq_* are not int32.
        ValueError: a shape, probability or window that does not fit.
        RuntimeError: cu_seq_* do not begin at 0, go down, or do not end at the number of rows.
    """
    query, key, value = autocast(query, key, value)
    check_floating(query=query, key=key, value=value)
    check_probability(dropout_p=dropout_p)
    check_window(window_size)
    if query.dim() != 3:
        raise ValueError(f"query: expected (tokens, heads, head size), got {tuple(query.shape)}")
    check_heads(query, key, value, enable_gqa, head_dim=1)
    for name, bounds in (("cu_seq_q", cu_seq_q), ("cu_seq_k", cu_seq_k)):
        if not isinstance(bounds, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(bounds).__name__}")
        if bounds.dtype != torch.int32:
            raise TypeError(f"{name}: expected int32, got {bounds.dtype}")
        if bounds.device != query.device:
            raise ValueError(f"{name}: expected on {query.device} as query is, got {bounds.device}")
        if bounds.dim() != 1 or bounds.numel() == 0 or bounds.shape != cu_seq_q.shape:
            raise ValueError(f"{name}: expected (batch + 1,) as cu_seq_q, got {tuple(bounds.shape)}")
    head_size, options = max(query.shape[-1], value.shape[-1]), (tuple(window_size) != (-1, -1), dropout_p > 0)
    backend = backends.choose("varlen_attn", query, key, value, size=head_size, options=options)
    if backend == "torch":
        return reference.varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size,
            enable_gqa=enable_gqa, dropout_p=dropout_p,
        )  # fmt: skip
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    seed = seed_for(dropout_p, query)
    arguments = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, dropout_p, seed, scale, *window_size)
    if needs_grad(query, key, value):
        return torch.ops.fastformer.varlen_attn(*arguments, backend)[0]
    return raw(backend).varlen_attn(*arguments)[0]


def _fake(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, dropout_p, seed, scale, window_left, window_right):
    tokens, heads, _ = query.shape
    lse = query.new_empty(heads, tokens, dtype=compute_dtype(query.dtype))
    return query.new_empty(tokens, heads, value.shape[-1]), lse


def _fake_backward(
    grad_output, query, key, value, output, lse, cu_seq_q, cu_seq_k, max_q, max_k, dropout_p, seed, scale,
    window_left, window_right,
):  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup_context(ctx, inputs, output):
    query, key, value, cu_seq_q, cu_seq_k, *ctx.longest, ctx.dropout_p, seed, scale, left, right, ctx.backend = inputs
    ctx.options = scale, left, right
    ctx.save_for_backward(query, key, value, *output, cu_seq_q, cu_seq_k, seed)


def _backward(ctx, grad_output, grad_lse):
    *tensors, seed = ctx.saved_tensors
    grads = raw(ctx.backend).varlen_attn_backward(
        grad_output, *tensors, *ctx.longest, ctx.dropout_p, seed, *ctx.options
    )
    return (*grads, *(None,) * 10)


register("varlen_attn", _SCHEMA, _BACKWARD_SCHEMA, _fake, _setup_context, _backward, _fake_backward)
