"""The raw ops of varlen_attn: (T, H, D), sequences laid end to end."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer.kernels.attention import call_of
from fastformer.kernels.attention_backward import attention_backward
from fastformer.kernels.attention_decode import attention_decode
from fastformer.kernels.attention_forward import attention_forward


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = query.shape
    output = query.new_empty(tokens, heads, value.shape[-1])
    lse = query.new_empty(heads, tokens, dtype=torch.float32)
    call = call_of(
        query, key, value, cu_seq_q=cu_seq_q, cu_seq_k=cu_seq_k, max_queries=max_q, max_keys=max_k,
        dropout_p=dropout_p, seed=seed, scale=scale, window_left=window_left, window_right=window_right,
    )  # fmt: skip
    if not attention_decode(call, output, lse):
        attention_forward(call, output, lse)
    return output, lse


def varlen_attn_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    call = call_of(
        query, key, value, cu_seq_q=cu_seq_q, cu_seq_k=cu_seq_k, max_queries=max_q, max_keys=max_k,
        dropout_p=dropout_p, seed=seed, scale=scale, window_left=window_left, window_right=window_right,
    )  # fmt: skip
    attention_backward(call, grad_output, output, lse, grad_query, grad_key, grad_value)
    return grad_query, grad_key, grad_value
