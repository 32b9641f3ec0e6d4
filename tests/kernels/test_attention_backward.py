"""The backward of attention on the Triton kernels: what the op tests don't reach."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("wants TRITON_INTERPRET=1", allow_module_level=True)

from attention import assert_attention_close, tensors

import fastformer
from fastformer import ops
from fastformer.kernels import attention_backward
from fastformer.kernels.configs import Config


@pytest.fixture(autouse=True)
def triton():
    with fastformer.backend("triton", strict=True):
        yield


def gradients(given, grad_output, **options):
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    torch.manual_seed(5)
    output = ops.scaled_dot_product_attention(**leaves, enable_gqa=True, **options)
    return torch.autograd.grad(output, leaves.values(), grad_output)


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"window_size": (20, 25)}, {"window_size": (-1, 3), "dropout_p": 0.2}],
    ids=str,
)
def test_many_tiles(options):
    """At least four tiles each way, the last one ragged, of two query heads to a key head."""
    assert_attention_close(tensors(1, 2, 70, 83, 16, 16, torch.float32, kv_heads=1), **options)


@pytest.mark.parametrize("size", [(200, 24), (24, 200), (256, 256)])
def test_gradients_in_parts(size):
    """Heads of more than 128: the columns of the gradients of key and value are computed in two goes."""
    assert_attention_close(tensors(1, 2, 20, 18, *size, torch.float32, kv_heads=1), is_causal=True)


@pytest.mark.parametrize("block", [16, 32])
def test_dropout_of_narrow_tiles(monkeypatch, block):
    """Fewer keys in a tile than share their counters give the same mask."""
    given = tensors(2, 2, 20, 70, 16, 16, torch.float32)
    grad_output = torch.randn(2, 2, 20, 16)
    expected = gradients(given, grad_output, dropout_p=0.4)
    narrow = Config({"BLOCK_M": 16, "BLOCK_N": block})
    monkeypatch.setattr(attention_backward, "pick", lambda kernel, candidates, **key: narrow)
    torch.testing.assert_close(gradients(given, grad_output, dropout_p=0.4), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("hidden", ["left", "right", "middle", "all of one"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_padding(kind, hidden):
    """Tiles of keys that are hidden whole, on either side, or kept whole while others are not."""
    mask = torch.ones(2, 1, 1, 70, dtype=torch.bool)
    if hidden == "all of one":
        mask[1] = False
    else:
        mask[1, ..., {"left": slice(0, 39), "right": slice(25, 70), "middle": slice(17, 50)}[hidden]] = False
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    assert_attention_close(tensors(2, 2, 20, 70, 16, 16, torch.float32), mask)


def test_same_bits_each_time():
    given = tensors(1, 4, 40, 70, 16, 16, torch.float16, kv_heads=2)
    grad_output = torch.randn(1, 4, 40, 16).half()
    first, second = (gradients(given, grad_output, dropout_p=0.2, is_causal=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_padded_queries_change_no_bit():
    """Rows that see no key give zeros, and whatever the other gradients hold there stays out."""
    given = tensors(1, 2, 40, 40, 16, 16, torch.float32)
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    mask[..., 30:, :] = False
    grad_output = torch.randn(1, 2, 40, 16)
    expected = gradients(given, grad_output, attn_mask=mask)
    grad_output[:, :, 30:] = 1e30
    found = gradients(given, grad_output, attn_mask=mask)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert not found[0][:, :, 30:].any()


def test_strides_of_the_gradient():
    """What .sum() gives back: one number for all, stride 0."""
    given = tensors(1, 2, 20, 40, 16, 16, torch.float32)
    one = torch.ones(())
    found = gradients(given, one.expand(1, 2, 20, 16))
    expected = gradients(given, torch.ones(1, 2, 20, 16))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
