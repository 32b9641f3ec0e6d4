"""linear_cross_entropy on the Triton kernels: what the op tests don't reach."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("wants TRITON_INTERPRET=1", allow_module_level=True)

import eager
from accuracy import assert_op_close
from tensors import randn

import fastformer
from fastformer import ops
from fastformer.kernels import linear_cross_entropy


def test_gradients_in_chunks(monkeypatch):
    """The logits of 300 rows are computed 128 rows at a time."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 1)
    target = torch.randint(33, (300,))
    given = {"input": randn(300, 16), "linear_weight": randn(33, 16), "linear_bias": randn(33)}
    with fastformer.backend("triton", strict=True):
        assert_op_close(
            lambda **tensors: ops.linear_cross_entropy(target=target, **tensors),
            lambda **tensors: eager.linear_cross_entropy(target=target, **tensors),
            given,
        )
