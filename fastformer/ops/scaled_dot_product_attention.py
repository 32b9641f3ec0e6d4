"""scaled_dot_product_attention: tiles with an online softmax, never a score matrix; memory grows with S."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from fastformer import backends, library, reference
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

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, Tensor? seed, bool is_causal,"
    " float scale, int window_left, int window_right) -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor output, Tensor lse, float"
    " dropout_p, Tensor? seed, bool is_causal, float scale, int window_left, int window_right) -> (Tensor, Tensor,"
    " Tensor)"
)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """``dropout(softmax(scale * query @ key.mT + mask)) @ value``.

    As ``torch.nn.functional.scaled_dot_product_attention``, with log-sum-exp tiles as in Dao, "FlashAttention-2",
    2023. Beyond
    torch: a row whose keys are all masked gives 0 with zero gradients, masks combine with is_causal, and window_size.

    Args:
        query: (..., H, Sq, D), key: (..., H, Sk, D), value: (..., H, Sk, Dv); float32, bfloat16, float16 or
            float64; any strides. With enable_gqa key and value may have fewer heads, a divisor of H.
        attn_mask: broadcasts to (..., H, Sq, Sk) and is never materialized: a padding mask is (B, 1, 1, Sk). bool
            (True = keep), a float tensor that is added to the scores, or torch.nn.attention.bias.causal_lower_right
            / causal_upper_left.
        dropout_p: dropout of the probabilities; always on where > 0. The mask is that of :mod:`fastformer.reference`.
        is_causal: query i sees the keys up to i (aligned to the top left).
        scale: 1 / sqrt(D) if None.
        window_size: (left, right), how many keys a query sees on each side of its own position, aligned to the
            bottom right as in :func:`varlen_attn`; -1 for all. (-1, 0) is causal for a chunk of queries after a KV
            cache.

    Returns:
        (..., H, Sq, Dv) in query's dtype, laid out in memory as (..., Sq, H, Dv). Under autocast in the autocast dtype.

    Raises:
        TypeError: an operand is not floating, the dtypes differ, or attn_mask is neither bool nor floating.
        ValueError: a shape, probability or window that does not fit.
    """
    query, key, value = autocast(query, key, value)
    check_floating(query=query, key=key, value=value)
    check_probability(dropout_p=dropout_p)
    check_window(window_size)
    check_heads(query, key, value, enable_gqa, head_dim=-3)
    if query.dim() < 3:
        query, key, value = query[None], key[None], value[None]
        output = scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window_size=window_size
        )
        return output[0]
    if isinstance(attn_mask, CausalBias):
        _check_causal_bias(attn_mask, query, key)
        if attn_mask.variant == CausalVariant.UPPER_LEFT:
            is_causal = True
        else:
            window_size = (window_size[0], 0)
        attn_mask = None
    _check_mask(attn_mask, query, key)
    float_mask = attn_mask if attn_mask is not None and attn_mask.dtype != torch.bool else None
    # torch multiplies bfloat16 where the machine has instructions for it; the kernels compute in float32.
    faster = query.dtype == torch.bfloat16 and dropout_p == 0 and library.multiplies_bfloat16()
    faster = faster and query.is_cpu
    options = is_causal or tuple(window_size) != (-1, -1), attn_mask is not None, dropout_p > 0
    operands, head_size = (query, key, value), max(query.shape[-1], value.shape[-1])
    backend = backends.choose(
        "scaled_dot_product_attention", *operands, mask=float_mask, size=head_size, torch_is_faster=faster,
        options=options,
    )  # fmt: skip
    if backend == "torch":
        return _torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window_size)
    q, k, v = (_four_dims(x) for x in (query, key, value))
    if attn_mask is not None:
        attn_mask = _expand_mask(attn_mask, query, key)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    seed = seed_for(dropout_p, query)
    arguments = (q, k, v, attn_mask, dropout_p, seed, is_causal, scale, *window_size)
    if needs_grad(query, key, value):
        output = torch.ops.fastformer.scaled_dot_product_attention(*arguments, backend)[0]
    else:
        output = raw(backend).scaled_dot_product_attention(*arguments)[0]
    return output if query.dim() == 4 else output.reshape(*query.shape[:-1], value.shape[-1])


def _torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window_size) -> Tensor:
    """torch's own kernels; for dropout the reference, whose mask is that of every backend."""
    if dropout_p > 0:
        return reference.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window_size=window_size
        )
    if attn_mask is not None or tuple(window_size) != (-1, -1):
        kept = reference.attention_keeps(query.shape[-2], key.shape[-2], is_causal, window_size, query.device)
        is_causal = False
        if attn_mask is None:
            attn_mask = kept
        elif attn_mask.dtype == torch.bool:
            attn_mask = attn_mask if kept is None else attn_mask & kept
        else:
            attn_mask = attn_mask.to(query.dtype)
            attn_mask = attn_mask if kept is None else attn_mask.masked_fill(~kept, -math.inf)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


def check_window(window_size: tuple[int, int]) -> None:
    if not isinstance(window_size, tuple | list) or len(window_size) != 2 or any(size < -1 for size in window_size):
        raise ValueError(f"window_size: expected (left, right), each -1 (all) or more, got {window_size}")


def check_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, head_dim: int) -> None:
    """Dimensions, head sizes and numbers of heads (at `head_dim`). Raises ValueError."""
    shapes = f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() or query.dim() < 2:
        raise ValueError(f"query, key, value: expected the same number of dimensions, at least 2; {shapes}")
    if query.shape[-1] != key.shape[-1] or query.shape[-1] == 0:
        raise ValueError(f"key: expected query's head size, at least 1; {shapes}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"value: expected key's shape but for the head size; {shapes}")
    if query.dim() < 3:
        return
    heads, kv_heads = query.shape[head_dim], key.shape[head_dim]
    if head_dim == -3 and query.shape[:-3] != key.shape[:-3]:
        raise ValueError(f"key: expected query's leading dimensions; {shapes}")
    if heads != kv_heads and not enable_gqa:
        raise ValueError(f"key: expected as many heads as query (or enable_gqa=True); {shapes}")
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"key: expected a number of heads that divides query's; {shapes}")


def _check_causal_bias(bias: CausalBias, query: Tensor, key: Tensor) -> None:
    shape, expected = (bias.seq_len_q, bias.seq_len_kv), (query.shape[-2], key.shape[-2])
    if shape != expected:
        raise ValueError(f"attn_mask: expected a causal bias of (Sq, Sk) = {expected}, got {shape}")


def _check_mask(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    if attn_mask is None:
        return
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask: expected bool or a floating dtype, got {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask: expected on {query.device} as query is, got {attn_mask.device}")
    shape = (*query.shape[:-1], key.shape[-2])
    fits = attn_mask.dim() <= len(shape) and all(
        m in (1, s) for m, s in zip(reversed(attn_mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {shape}, got {tuple(attn_mask.shape)}")


def _four_dims(x: Tensor) -> Tensor:
    return x.flatten(0, -4) if x.dim() >= 4 else x[None]


def _expand_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """(B, H, Sq, Sk), stride 0 where it broadcasts; bool or the compute dtype."""
    if attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.detach().to(compute_dtype(query.dtype))
    leading, heads = query.shape[:-3], query.shape[-3:-1]
    attn_mask = attn_mask[(None,) * (query.dim() - attn_mask.dim())]
    attn_mask = _four_dims(attn_mask.expand(*leading, -1, -1, -1))  # may copy, but what is still to broadcast
    return attn_mask.expand(-1, *heads, key.shape[-2])


def _fake(query, key, value, attn_mask, dropout_p, seed, is_causal, scale, window_left, window_right):
    batch, heads, queries, _ = query.shape
    output = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    return output, query.new_empty(batch, heads, queries, dtype=compute_dtype(query.dtype))


def _fake_backward(
    grad_output, query, key, value, attn_mask, output, lse, dropout_p, seed, is_causal, scale, window_left, window_right
):
    return tuple(
        x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (query, key, value)
    )


def _setup_context(ctx, inputs, output):
    query, key, value, attn_mask, ctx.dropout_p, seed, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(query, key, value, attn_mask, seed, *output)


def _backward(ctx, grad_output, grad_lse):
    query, key, value, attn_mask, seed, output, lse = ctx.saved_tensors
    grads = raw(ctx.backend).scaled_dot_product_attention_backward(
        grad_output, query, key, value, attn_mask, output, lse, ctx.dropout_p, seed, *ctx.options
    )
    return (*grads, *(None,) * 7)


register("scaled_dot_product_attention", _SCHEMA, _BACKWARD_SCHEMA, _fake, _setup_context, _backward, _fake_backward)
