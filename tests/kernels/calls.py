"""Calls whose kernels are compiled and measured against their budgets: the shapes of BERT and GPT."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastformer import ops

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Not written, so that large ones take no memory."""
    return torch.empty(shape, dtype=dtype).requires_grad_()


def train(outputs: Tensor | tuple[Tensor, ...], *inputs: Tensor) -> None:
    """Runs the backward."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, inputs, [torch.empty_like(out) for out in outputs])


def layer_norm(dtype: torch.dtype, width: int = 768, batch: int = 8, sequence: int = 512) -> None:
    x, weight, bias = empty(batch, sequence, width, dtype=dtype), *(empty(width, dtype=dtype) for _ in range(2))
    train(ops.layer_norm(x, width, weight, bias), x, weight, bias)


def add_layer_norm(
    dtype: torch.dtype, width: int = 768, batch: int = 8, sequence: int = 512, dropout_p: float = 0.0
) -> None:
    x, residual = (empty(batch, sequence, width, dtype=dtype) for _ in range(2))
    weight, bias = (empty(width, dtype=dtype) for _ in range(2))
    train(ops.add_layer_norm(x, residual, width, weight, bias, dropout_p=dropout_p), x, residual, weight, bias)


def linear(
    dtype: torch.dtype, width: int = 768, out: int = 768, batch: int = 8, sequence: int = 512, **options
) -> None:
    x, residual = (empty(batch, sequence, n, dtype=dtype) for n in (width, out))
    weight, bias = empty(out, width, dtype=dtype), empty(out, dtype=dtype)
    train(ops.linear(x, weight, bias, residual=residual, **options), x, weight, bias, residual)


def linear_forward(dtype: torch.dtype, width: int = 768, out: int = 768, rows: int = 1) -> None:
    with torch.no_grad():
        ops.linear(empty(rows, width, dtype=dtype), empty(out, width, dtype=dtype), empty(out, dtype=dtype))


def feed_forward(
    dtype: torch.dtype, width: int = 768, hidden: int = 3072, batch: int = 8, sequence: int = 512, **options
) -> None:
    x, residual = (empty(batch, sequence, width, dtype=dtype) for _ in range(2))
    weights = empty(hidden, width, dtype=dtype), empty(width, hidden, dtype=dtype)
    biases = empty(hidden, dtype=dtype), empty(width, dtype=dtype)
    inputs = x, weights[0], biases[0], weights[1], biases[1]
    train(ops.feed_forward(*inputs, residual=residual, **options), *inputs, residual)


def heads(dtype: torch.dtype, batch: int, count: int, sequence: int, size: int) -> Tensor:
    """(B, H, S, D) as a view of (B, S, H D): how models call."""
    return empty(batch, sequence, count * size, dtype=dtype).view(batch, sequence, count, size).transpose(1, 2)


def attention(
    dtype: torch.dtype,
    size: int = 64,
    batch: int = 8,
    count: int = 12,
    sequence: int = 512,
    kv_heads: int = 0,
    **options,
) -> None:
    query, *key_value = (heads(dtype, batch, n, sequence, size) for n in (count, *2 * [kv_heads or count]))
    train(ops.scaled_dot_product_attention(query, *key_value, **options), query, *key_value)


def one_query(dtype: torch.dtype, size: int = 64, batch: int = 8, count: int = 12, keys: int = 512) -> None:
    """As where one learned query sums a sequence up."""
    query, *key_value = (heads(dtype, batch, count, n, size) for n in (1, keys, keys))
    train(ops.scaled_dot_product_attention(query, *key_value), query, *key_value)


def masked_attention(dtype: torch.dtype, mask_dtype: torch.dtype = torch.bool, sequence: int = 512, **options) -> None:
    mask = torch.empty(options.get("batch", 8), 1, 1, sequence, dtype=mask_dtype)
    attention(dtype, sequence=sequence, attn_mask=mask, **options)


def decode(
    dtype: torch.dtype, size: int = 64, batch: int = 1, count: int = 12, sequence: int = 1024, **options
) -> None:
    """One query a head against a cache that has room for more."""
    kv_heads = options.pop("kv_heads", count)
    with torch.no_grad():
        cache = [empty(batch, kv_heads, 2 * sequence, size, dtype=dtype)[:, :, :sequence] for _ in range(2)]
        ops.scaled_dot_product_attention(heads(dtype, batch, count, 1, size), *cache, **options)


def varlen(dtype: torch.dtype, size: int = 64, count: int = 12, rows: int = 3000, **options) -> None:
    query, key, value = (empty(rows, count, size, dtype=dtype) for _ in range(3))
    bounds = torch.empty(9, dtype=torch.int32)
    train(ops.varlen_attn(query, key, value, bounds, bounds, 512, 512, **options), query, key, value)


def linear_cross_entropy(
    dtype: torch.dtype, width: int = 768, classes: int = 30522, rows: int = 4096, **options
) -> None:
    x, weight = empty(rows, width, dtype=dtype), empty(classes, width, dtype=dtype)
    train(ops.linear_cross_entropy(x, weight, torch.zeros(rows, dtype=torch.int64)), x, weight)


Call = Callable[[torch.dtype], None]
CALLS: dict[str, Call] = {
    "layer_norm 768": layer_norm,
    "layer_norm 4096": lambda dtype: layer_norm(dtype, 4096),
    "add_layer_norm 768": add_layer_norm,
    "add_layer_norm 1024, dropout": lambda dtype: add_layer_norm(dtype, 1024, dropout_p=0.1),
    "add_layer_norm 65536, dropout": lambda dtype: add_layer_norm(dtype, 65536, batch=1, dropout_p=0.1),
    "linear 768 to 768, dropout": lambda dtype: linear(dtype, dropout_p=0.1),
    "linear 1024 to 4096, gelu": lambda dtype: linear(dtype, 1024, 4096, activation="gelu"),
    "linear 768 to 2304, one row": lambda dtype: linear_forward(dtype, out=2304),
    "feed_forward 768, gelu": lambda dtype: feed_forward(dtype, dropout_p=0.1),
    "feed_forward 1600, gelu_tanh": lambda dtype: feed_forward(dtype, 1600, 6400, activation="gelu_tanh"),
    "attention 64": attention,
    "attention 64, padding, dropout": lambda dtype: masked_attention(dtype, dropout_p=0.1),
    "attention 64, causal": lambda dtype: attention(dtype, is_causal=True, sequence=1024),
    "attention 64, float mask": lambda dtype: masked_attention(dtype, dtype),
    "attention 64, one query": one_query,
    "attention 16": lambda dtype: attention(dtype, 16),
    "attention 32": lambda dtype: attention(dtype, 32),
    "attention 80, causal": lambda dtype: attention(dtype, 80, is_causal=True),
    "attention 96": lambda dtype: attention(dtype, 96),
    "attention 128, causal": lambda dtype: attention(dtype, 128, is_causal=True, sequence=2048),
    "attention 128, grouped, window": lambda dtype: attention(
        dtype, 128, count=32, kv_heads=8, window_size=(256, 0), enable_gqa=True
    ),
    "attention 256, causal": lambda dtype: attention(dtype, 256, is_causal=True),
    "decode 64": decode,
    "decode 128, grouped": lambda dtype: decode(dtype, 128, batch=4, count=32, kv_heads=8, enable_gqa=True),
    "varlen_attn 64": varlen,
    "varlen_attn 128, causal": lambda dtype: varlen(dtype, 128, window_size=(-1, 0)),
    "linear_cross_entropy 768 to 30522": linear_cross_entropy,
}
# What is compiled: dtypes, and float32 after torch.set_float32_matmul_precision("high"), on NVIDIA's tensor cores
# (layer-norm has nothing to multiply).
KINDS = {"bfloat16": BF16, "float32": FP32, "float16": FP16, "tf32x3": FP32}


def cases(targets: Iterable[str]) -> list[tuple[str, str, str]]:
    """(target, call, kind) of all that is compiled."""
    return [
        (target, call, kind)
        for kind in KINDS
        for call in CALLS
        for target in targets
        if kind != "tf32x3" or (target.startswith("sm_") and "layer_norm" not in call)
    ]
