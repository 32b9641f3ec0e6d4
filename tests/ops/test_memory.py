"""Attention never has a score matrix, forward or backward, and never writes a mask out."""

from functools import partial

import pytest
import torch
from torch import Tensor

from fastformer import ops
from fastformer.cli.measure import peak_memory

pytestmark = pytest.mark.cpu_only
SEQUENCE, SIZE = 4096, 32  # scores: 64 MiB in float32, 16 MiB as bool
INPUT_BYTES = SEQUENCE * SIZE * 4


def rise(call) -> int:
    """Bytes by which the memory of this process rises during the call, after a first one."""
    call()
    bytes = peak_memory(call)
    if bytes is None:
        pytest.skip("this system does not tell the peak of the resident memory")
    return bytes


def leaves(*leading: int, sequence: int = SEQUENCE) -> list[Tensor]:
    return [torch.randn(*leading, sequence, SIZE).requires_grad_() for _ in range(3)]


def backward(*inputs: Tensor, **options) -> None:
    output = ops.scaled_dot_product_attention(*inputs, **options)
    torch.autograd.grad(output, inputs, output)


def padding(*leading: int) -> Tensor:
    """The last thousand keys are padding."""
    return (torch.arange(SEQUENCE) < SEQUENCE - 1000).expand(*leading, 1, 1, SEQUENCE)


MASKS = {
    "none": {},
    "dropout": {"dropout_p": 0.1},
    "padding": {"attn_mask": padding(1)},
    "float padding": {"attn_mask": torch.zeros(1, 1, 1, SEQUENCE).masked_fill(~padding(1), -torch.inf)},
    "bfloat16 padding": {"attn_mask": torch.zeros(1, 1, 1, SEQUENCE, dtype=torch.bfloat16)},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_no_scores(options):
    inputs = leaves(1, 1)
    with torch.no_grad():
        assert rise(lambda: ops.scaled_dot_product_attention(*inputs, **options)) < 4 * INPUT_BYTES
    assert rise(lambda: backward(*inputs, **options)) < 8 * INPUT_BYTES


def test_masks_of_five_dimensions():
    """(2, 1, 1, 1, Sk) for (2, 2, 1, Sq, D): the leading dimensions can't be merged in a view."""
    inputs, mask = leaves(2, 2, 1), torch.stack([padding(1, 1), ~padding(1, 1)]).view(2, 1, 1, 1, SEQUENCE)
    with torch.no_grad():
        assert rise(lambda: ops.scaled_dot_product_attention(*inputs, attn_mask=mask)) < 4 * 4 * INPUT_BYTES


def test_grouped_query_repeats_nothing():
    query, (key, value, _) = torch.randn(1, 16, SEQUENCE, SIZE), leaves(1, 1)
    options = {"enable_gqa": True, "window_size": (64, 64)}
    with torch.no_grad():
        output = 16 * INPUT_BYTES
        assert rise(lambda: ops.scaled_dot_product_attention(query, key, value, **options)) < output + 8 * INPUT_BYTES


def test_varlen():
    query, key, value = (x[0, 0][:, None] for x in leaves(1, 1))
    bounds = torch.tensor([0, SEQUENCE], dtype=torch.int32)

    def call() -> None:
        output = ops.varlen_attn(query, key, value, bounds, bounds, SEQUENCE, SEQUENCE)
        torch.autograd.grad(output, (query, key, value), output)

    assert rise(call) < 8 * INPUT_BYTES


@pytest.mark.slow
def test_grows_with_the_length():
    rises = [rise(partial(backward, *leaves(1, 1, sequence=length))) for length in (4096, 8192, 16384)]
    assert rises[2] < 2.5 * rises[1] < 2.5**2 * rises[0]
