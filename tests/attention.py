"""What the tests of attention share: random tensors, and the accuracy rule for all the ways to hide a key."""

from functools import partial

import eager
import torch
from accuracy import assert_op_close
from tensors import randn
from torch import Tensor

from fastformer import ops

B, H, SQ, SK = 4, 6, 9, 11  # of small()


def tensors(
    batch: int, heads: int, queries: int, keys: int, size: int, value_size: int, dtype: torch.dtype, kv_heads: int = 0
) -> dict[str, Tensor]:
    return {
        "query": randn(batch, heads, queries, size, dtype=dtype),
        "key": randn(batch, kv_heads or heads, keys, size, dtype=dtype),
        "value": randn(batch, kv_heads or heads, keys, value_size, dtype=dtype),
    }


def small(dtype: torch.dtype = torch.float32, **options: int) -> dict[str, Tensor]:
    return tensors(B, H, SQ, SK, 8, 8, dtype, **options)


def dense(mask: Tensor | None, is_causal: bool, window_size: tuple[int, int], queries: int, keys: int) -> Tensor | None:
    """One mask for all that hides a key, as eager PyTorch wants it."""
    kept = eager.visible(queries, keys, is_causal, window_size)
    if mask is None:
        return None if kept.all() else kept
    return mask & kept if mask.dtype == torch.bool else mask.masked_fill(~kept, -torch.inf)


def assert_attention_close(
    given: dict[str, Tensor] | list[dict[str, Tensor]],
    mask: Tensor | None = None,
    is_causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    dropout_p: float = 0.0,
    scale: float | None = None,
    slack: int = 0,
) -> None:
    """Of one draw, or of several of the same sizes, which are judged as one."""
    draws = given if isinstance(given, list) else [given]
    fused = partial(
        ops.scaled_dot_product_attention, attn_mask=mask, is_causal=is_causal, window_size=window_size,
        dropout_p=dropout_p, scale=scale, enable_gqa=True,
    )  # fmt: skip
    whole = dense(mask, is_causal, window_size, draws[0]["query"].shape[-2], draws[0]["key"].shape[-2])
    expected = partial(eager.scaled_dot_product_attention, mask=whole, dropout_p=dropout_p, scale=scale)
    assert_op_close(fused, expected, *draws, slack=slack)
