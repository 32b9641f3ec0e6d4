"""What the tests of compiled kernels share: where they come from, and calls with their accuracy rule."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from unittest import mock

import eager
import pytest
import torch
from accuracy import assert_close_to_reference, assert_op_close
from attention import assert_attention_close, dense, tensors
from tensors import far_apart, randn

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


def relu_at_zero(dtype: torch.dtype) -> None:
    """Rows of zeros: the slope of ReLU at 0 is 0."""
    given = {"input": randn(40, 64, dtype=dtype), "weight": randn(48, 64, dtype=dtype) / 8}
    given["input"][::2] = 0
    assert_op_close(partial(ops.linear, activation="relu"), partial(eager.linear, activation="relu"), given)


def other_strides(dtype: torch.dtype) -> None:
    """A weight by columns, as transformers' Conv1D has it, and a residual that is a part of something wider."""
    given = {"input": randn(100, 96, dtype=dtype), "weight": randn(96, 136, dtype=dtype).t() / 96**0.5}
    given["residual"] = randn(100, 136, dtype=dtype, layout="wider rows")
    assert_op_close(ops.linear, eager.linear, given)


def linear_cross_entropy(dtype: torch.dtype, rows: int, width: int, classes: int, **options) -> None:
    given = {"input": randn(rows, width, dtype=dtype), "linear_weight": randn(classes, width, dtype=dtype) / width**0.5}
    options |= {"target": torch.randint(0, classes, (rows,)), "reduction": "none"}
    assert_op_close(
        partial(ops.linear_cross_entropy, **options), partial(reference.linear_cross_entropy, **options), given
    )


def loss_in_chunks(dtype: torch.dtype) -> None:
    """The gradients of 150 rows, 128 at a time."""
    from fastformer.kernels import linear_cross_entropy as kernels

    with mock.patch.object(kernels, "CHUNK_BYTES", 1):
        linear_cross_entropy(dtype, 150, 40, 72)


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


def padded(dtype: torch.dtype) -> None:
    """A mask of all queries, with holes in it."""
    mask = (torch.rand(300) < 0.8) & (torch.arange(300) < 270)
    attention(dtype, 2, 140, 300, 64, mask=mask)


def not_finite(dtype: torch.dtype) -> None:
    """What is hidden reaches no output, whatever it is."""
    given = tensors(1, 2, 70, 150, 64, 64, dtype)
    mask = torch.arange(150) < 90
    whole = dense(mask, True, (-1, -1), 70, 150)
    expected = eager.scaled_dot_product_attention(**given, mask=whole)
    ref64 = eager.scaled_dot_product_attention(**{name: x.double() for name, x in given.items()}, mask=whole)
    given["value"][..., 90:, :] = torch.nan
    given["value"][..., 95, 3] = torch.inf
    assert_close_to_reference(
        ops.scaled_dot_product_attention(**given, attn_mask=mask, is_causal=True), expected, ref64
    )


def nothing_seen(dtype: torch.dtype) -> None:
    given = [x.requires_grad_() for x in tensors(1, 2, 70, 140, 64, 64, dtype).values()]
    output = ops.scaled_dot_product_attention(*given, attn_mask=torch.zeros(140, dtype=torch.bool))
    results = [output, *torch.autograd.grad(output, given, torch.ones_like(output))]
    assert not any(x.any() for x in results), "not all are 0"


def far(op: Callable, name: str, given: dict[str, torch.Tensor], dim: int) -> None:
    """Elements beyond the 2^31st: the same bits as close together."""
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        results = [op(**given), op(**given | {name: far_apart(given[name], dim, Path(folder))})]
    assert torch.equal(*results), "far apart, the bits are others"


def far_query(dtype: torch.dtype) -> None:
    far(ops.scaled_dot_product_attention, "query", tensors(1, 1, 3, 40, 16, 16, dtype), dim=2)


def far_input(dtype: torch.dtype) -> None:
    far(ops.linear, "input", {"input": randn(3, 64, dtype=dtype), "weight": randn(24, 64, dtype=dtype)}, dim=0)


def far_residual(dtype: torch.dtype) -> None:
    given = {name: randn(3, 64, dtype=dtype) for name in ("input", "residual")} | {"weight": randn(64, dtype=dtype)}
    far(lambda **x: ops.add_layer_norm(**x, normalized_shape=64)[0], "residual", given, dim=0)


def varlen(dtype: torch.dtype) -> None:
    cu_seq_q, cu_seq_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 70, 71, 71, 151], [0, 70, 75, 78, 498]))
    given = {name: randn(n, 2, 64, dtype=dtype) for name, n in (("query", 151), ("key", 498), ("value", 498))}
    options = {"cu_seq_q": cu_seq_q, "cu_seq_k": cu_seq_k, "max_q": 80, "max_k": 420, "window_size": (-1, 0)}
    assert_op_close(partial(ops.varlen_attn, **options), partial(reference.varlen_attn, **options), given)


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "layer_norm": partial(layer_norm, rows=37, width=768),
    "layer_norm, ragged": partial(layer_norm, rows=9, width=1025),
    "layer_norm, two rows": partial(layer_norm, rows=2, width=768),
    "layer_norm, many rows": partial(layer_norm, rows=900, width=768),
    "layer_norm, wide": partial(layer_norm, rows=3, width=16500),
    "add_layer_norm": partial(add_layer_norm, rows=37, width=768),
    "add_layer_norm, dropout": partial(add_layer_norm, rows=9, width=1000, dropout_p=0.2),
    "add_layer_norm, far apart": far_residual,
    "linear": partial(linear, rows=100, width=200, out=136, activation="gelu"),
    "linear, ragged": partial(linear, rows=67, width=75, out=131, activation="gelu_tanh", dropout_p=0.2),
    "linear, deep": partial(linear, rows=20, width=2112, out=40),
    "linear, relu at zero": relu_at_zero,
    "linear, other strides": other_strides,
    "linear, far apart": far_input,
    "feed_forward": partial(feed_forward, rows=70, width=96, hidden=272),
    "attention": partial(attention, heads=1, queries=256, keys=256, size=64),
    "attention, long": partial(attention, heads=1, queries=400, keys=420, size=64, is_causal=True),
    "attention, causal": partial(attention, heads=2, queries=200, keys=200, size=64, kv_heads=1, is_causal=True),
    "attention, ragged": lambda dtype: attention(dtype, 1, 75, 301, 80, draws=4 if dtype == F32 else 1),
    # The last key that the last row of a tile sees is the first of its tile.
    "attention, window": partial(attention, heads=1, queries=128, keys=129, size=16, window_size=(3, 0)),
    "attention, mask": masked,
    "attention, float mask": lambda dtype: attention(dtype, 1, 70, 150, 64, mask=torch.randn(70, 150)),
    "attention, padding": padded,
    "attention, dropout": partial(attention, heads=4, queries=70, keys=150, size=64, kv_heads=2, dropout_p=0.2),
    "attention, not finite": not_finite,
    "attention, nothing seen": nothing_seen,
    "attention, far apart": far_query,
    "attention, wide": partial(attention, heads=1, queries=72, keys=420, size=128, window_size=(-1, 0)),
    "attention, widest": partial(attention, heads=1, queries=40, keys=140, size=256),
    "decode": lambda dtype: attention(dtype, 4, 1, 1000, 64, kv_heads=2, draws=4 if dtype == F32 else 1),
    "varlen_attn": varlen,
    "linear_cross_entropy": partial(linear_cross_entropy, rows=70, width=96, classes=272),
    "linear_cross_entropy, split": partial(linear_cross_entropy, rows=20, width=32, classes=1100, label_smoothing=0.1),
    "linear_cross_entropy, chunks": loss_in_chunks,
}


def check(source: str, case: str, dtype: str, **options) -> list[Finished]:
    """The launches of a call: right, and, in 16 bits, without a bank conflict in main loops; what nvcc compiled writes
    nothing twice, and fences its mbarriers. `options` are those of running_cuda or running_triton."""
    with running(source)(**options) as launches:
        CASES[case](DTYPES[dtype])
    assert launches
    for launch in launches:
        conflicts = launch.counts.conflicts_in_main_loops
        assert dtype == "float32" or conflicts == 0, f"{launch.kernel}: {conflicts} bank conflicts in main loops"
        if source.startswith("cuda"):
            assert launch.counts.same_writes == 0, f"{launch.kernel}: warps write the same at one place"
            assert launch.counts.unfenced_barriers == 0, f"{launch.kernel}: an mbarrier that is not fenced"
    return launches
