"""SelfAttention and CrossAttention: torch.nn.MultiheadAttention on the fused op.

Letters in shapes: B batch, Sq queries, Sk keys, H heads, D head size, E = H D.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastformer import ops
from fastformer.nn.linear import Linear
from fastformer.ops.common import check_probability


class _Attention(nn.Module):
    """The parameters of torch.nn.MultiheadAttention, and what follows the projection to query, key and value."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        batch_first: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads, got {embed_dim} for {num_heads} heads")
        check_probability(dropout=dropout)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, device=device, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, device=device, dtype=dtype)) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch.nn.MultiheadAttention; out_proj.weight is as torch.nn.Linear leaves it."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """query, key, value: (B, S, E), (S, B, E) or (S, E)."""
        sequence_dim = 1 if self.batch_first and query.dim() == 3 else 0
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).movedim(sequence_dim, -2) for x in (query, key, value)
        )  # (B, H, S, D) or (H, S, D)
        context = ops.scaled_dot_product_attention(
            query,
            key,
            value,
            _keep_or_add(attn_mask, key_padding_mask, (*query.shape[:-1], key.shape[-2])),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
        )
        return self.out_proj(context.movedim(-2, sequence_dim).flatten(-2))

    def _check(self, name: str, input: Tensor) -> None:
        if input.dim() not in (2, 3) or input.shape[-1] != self.embed_dim:
            batched = "(batch, length" if self.batch_first else "(length, batch"
            expected = f"{batched}, {self.embed_dim}) or (length, {self.embed_dim})"
            raise ValueError(f"{name}: expected {expected}, got {tuple(input.shape)}")

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}"


class SelfAttention(_Attention):
    """Multi-head attention of a sequence to itself, with the state_dict of torch.nn.MultiheadAttention.

    Vaswani et al., "Attention Is All You Need", 2017.

    Args:
        embed_dim: E, a multiple of num_heads.
        num_heads: H.
        dropout: probability, in training, that an attention probability is dropped.
        bias: False leaves in_proj_bias and out_proj.bias out.
        batch_first: inputs and outputs are (B, S, E), else (S, B, E).

    Raises:
        ValueError: embed_dim is no multiple of num_heads, or dropout no probability.
    """

    def forward(
        self,
        input: Tensor,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """
        Args:
            input: (B, S, E) with batch_first, else (S, B, E); (S, E) without a batch; in the weights' dtype.
            attn_mask: (S, S) or (B * H, S, S); bool, True = ignore, or floating, added to the scores.
            key_padding_mask: (B, S), without a batch (S,); bool, True = ignore, or floating, added to the scores. It is
                never expanded, and neither is is_causal, but beside an attn_mask it becomes one mask of (B, 1, S, S).
            is_causal: each position sees itself and those before it.

        Returns:
            input's shape and dtype (under autocast the autocast dtype).

        Raises:
            ValueError: a shape that does not fit.
            TypeError: a mask is neither bool nor floating; otherwise as :func:`ops.scaled_dot_product_attention`.
        """
        self._check("input", input)
        query, key, value = ops.linear(input, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self._attend(query, key, value, attn_mask, key_padding_mask, is_causal)


class CrossAttention(_Attention):
    """Multi-head attention of a sequence to another, `memory`; arguments and state_dict as :class:`SelfAttention`."""

    def forward(
        self,
        input: Tensor,
        memory: Tensor,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As :meth:`SelfAttention.forward`, but keys and values come from `memory`.

        input: (B, Sq, E), memory: (B, Sk, E), attn_mask: (Sq, Sk) or (B * H, Sq, Sk), key_padding_mask: (B, Sk);
        is_causal is aligned to the top left. Returns (B, Sq, E).
        """
        self._check("input", input)
        self._check("memory", memory)
        sizes = (self.embed_dim, 2 * self.embed_dim)
        weight, kv_weight = self.in_proj_weight.split(sizes)
        bias, kv_bias = (None, None) if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        query = ops.linear(input, weight, bias)
        key, value = ops.linear(memory, kv_weight, kv_bias).chunk(2, dim=-1)
        return self._attend(query, key, value, attn_mask, key_padding_mask, is_causal)


def _keep_or_add(attn_mask: Tensor | None, key_padding_mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Masks of torch.nn (True = ignore) as one of ops.scaled_dot_product_attention (True = keep).

    shape: (B, H, Sq, Sk), or (H, Sq, Sk) without a batch.
    """
    *heads, queries, keys = shape
    if attn_mask is not None:
        _check_mask("attn_mask", attn_mask, (queries, keys), (math.prod(heads), queries, keys))
        attn_mask = attn_mask.reshape(shape) if attn_mask.dim() == 3 else attn_mask
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, (*heads[:-1], keys))
        key_padding_mask = key_padding_mask[..., None, None, :]  # (B, 1, 1, Sk)
    masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    return sum(torch.where(mask, -math.inf, 0.0) if mask.dtype == torch.bool else mask for mask in masks)


def _check_mask(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: expected bool (True = ignore) or a floating dtype (added), got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")
