"""What the tests of compiled kernels share: where they come from, and calls with their accuracy rule."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import eager
import pytest
import torch
from accuracy import assert_op_close
from attention import assert_attention_close, tensors
from tensors import randn

from fastformer import ops, reference

from .launch import Finished

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bfloat16": BF16, "float16": F16, "float32": F32}
Running = Callable[..., AbstractContextManager[list[Finished]]]


def running(source: str) -> Running:
    """running_cuda or running_triton, for the GPU that may stand behind the name, else sm_80; skips where its compiler
    is missing."""
    compiler, target = (source + " sm_80").split()[:2]
    if compiler == "cuda":
        from . import cuda

        if problem := cuda.why_not():
            pytest.skip(problem)
        return partial(cuda.running_cuda, target)
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: the PTX of the Triton kernels can't be made")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("with TRITON_INTERPRET=1 nothing is compiled")
    from .triton_kernels import running_triton

    return partial(running_triton, target)


def layer_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    given = {"input": randn(rows, width, dtype=dtype)}
    given |= {name: randn(width, dtype=dtype) for name in ("weight", "bias")}
    expected = partial(torch.nn.functional.layer_norm, normalized_shape=(width,))
    assert_op_close(partial(ops.layer_norm, normalized_shape=width), expected, given)


def add_layer_norm(dtype: torch.dtype, rows: int, width: int, dropout_p: float = 0.0) -> None:
    given = {name: randn(rows, width, dtype=dtype) for name in ("input", "residual")}
    given |= {name: randn(width, dtype=dtype) for name in ("weight", "bias")}

    def expected(input, residual, weight, bias):
        total = eager.dropout(input, dropout_p) + residual
        return torch.nn.functional.layer_norm(total, (width,), weight, bias), total

    assert_op_close(partial(ops.add_layer_norm, normalized_shape=width, dropout_p=dropout_p), expected, given)


def linear(dtype: torch.dtype, rows: int, width: int, out: int, **options) -> None:
    given = {"input": randn(rows, width, dtype=dtype), "weight": randn(out, width, dtype=dtype) / width**0.5}
    given |= {"bias": randn(out, dtype=dtype), "residual": randn(rows, out, dtype=dtype)}
    assert_op_close(partial(ops.linear, **options), partial(eager.linear, **options), given)


def feed_forward(dtype: torch.dtype, rows: int, width: int, hidden: int, **options) -> None:
    given = {"input": randn(rows, width, dtype=dtype), "weight1": randn(hidden, width, dtype=dtype) / width**0.5}
    given |= {"bias1": randn(hidden, dtype=dtype), "weight2": randn(width, hidden, dtype=dtype) / hidden**0.5}
    given |= {"bias2": randn(width, dtype=dtype)}
    assert_op_close(partial(ops.feed_forward, **options), partial(eager.feed_forward, **options), given)


def linear_cross_entropy(dtype: torch.dtype, rows: int, width: int, classes: int) -> None:
    given = {"input": randn(rows, width, dtype=dtype), "linear_weight": randn(classes, width, dtype=dtype) / width**0.5}
    target = torch.randint(0, classes, (rows,))
    options = {"target": target, "reduction": "none"}
    assert_op_close(
        partial(ops.linear_cross_entropy, **options), partial(reference.linear_cross_entropy, **options), given
    )


def attention(
    dtype: torch.dtype, heads: int, queries: int, keys: int, size: int, kv_heads: int = 0, mask=None, draws=1, **options
):
    given = [tensors(1, heads, queries, keys, size, size, dtype, kv_heads) for _ in range(draws)]
    assert_attention_close(given, mask, **options)


def masked(dtype: torch.dtype) -> None:
    """float32: the largest error of one draw is a matter of chance."""
    mask = torch.rand(1, 1, 1, 150) < 0.8
    draws = 4 if dtype == F32 else 1
    attention(dtype, 2, 70, 150, 32, mask=mask, draws=draws, window_size=(90, 20), dropout_p=0.2)


def varlen(dtype: torch.dtype) -> None:
    lengths = [70, 1, 0, 150]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    rows = sum(lengths)
    given = {name: randn(rows, 2, 64, dtype=dtype) for name in ("query", "key", "value")}
    options = {"cu_seq_q": bounds, "cu_seq_k": bounds, "max_q": 150, "max_k": 150, "window_size": (-1, 0)}
    assert_op_close(partial(ops.varlen_attn, **options), partial(reference.varlen_attn, **options), given)


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "layer_norm": partial(layer_norm, rows=37, width=768),
    "layer_norm, ragged": partial(layer_norm, rows=9, width=1025),
    "add_layer_norm": partial(add_layer_norm, rows=37, width=768),
    "add_layer_norm, dropout": partial(add_layer_norm, rows=9, width=1000, dropout_p=0.2),
    "linear": partial(linear, rows=100, width=200, out=136, activation="gelu"),
    "linear, ragged": partial(linear, rows=67, width=75, out=131, activation="gelu_tanh", dropout_p=0.2),
    "feed_forward": partial(feed_forward, rows=70, width=96, hidden=272),
    "attention": partial(attention, heads=1, queries=256, keys=256, size=64),
    "attention, causal": partial(attention, heads=2, queries=200, keys=200, size=64, kv_heads=1, is_causal=True),
    "attention, ragged": partial(attention, heads=1, queries=75, keys=301, size=80),
    "attention, mask": masked,
    "attention, float mask": lambda dtype: attention(dtype, 1, 70, 150, 64, mask=torch.randn(70, 150)),
    "attention, wide": partial(attention, heads=1, queries=40, keys=140, size=128, is_causal=True),
    "decode": partial(attention, heads=4, queries=1, keys=1000, size=64, kv_heads=2),
    "varlen_attn": varlen,
    "linear_cross_entropy": partial(linear_cross_entropy, rows=70, width=96, classes=272),
}
