"""The raw ops of scaled_dot_product_attention: (B, H, S, D), any strides."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer.kernels.attention import call_of
from fastformer.kernels.attention_backward import attention_backward
from fastformer.kernels.attention_decode import attention_decode
from fastformer.kernels.attention_forward import attention_forward


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    output = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    call = call_of(
        query, key, value, attn_mask=attn_mask, max_queries=queries, max_keys=key.shape[2], dropout_p=dropout_p,
        seed=seed, is_causal=is_causal, scale=scale, window_left=window_left, window_right=window_right,
    )  # fmt: skip
    if not attention_decode(call, output, lse):
        attention_forward(call, output, lse)
    return output, lse


def scaled_dot_product_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query, grad_key, grad_value = (
        x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (query, key, value)
    )
    call = call_of(
        query, key, value, attn_mask=attn_mask, max_queries=query.shape[2], max_keys=key.shape[2],
        dropout_p=dropout_p, seed=seed, is_causal=is_causal, scale=scale, window_left=window_left,
        window_right=window_right,
    )  # fmt: skip
    attention_backward(call, grad_output, output, lse, grad_query, grad_key, grad_value)
    return grad_query, grad_key, grad_value
