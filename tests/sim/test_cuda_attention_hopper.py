"""Attention forward for sm_90a: many tiles, every order of the threads, what each launch does, and what it leaves to
the kernel for sm_80. The op tests run it where FASTFORMER_SIM has the word hopper."""

from functools import partial

import eager
import pytest
import torch
from accuracy import assert_close_to_reference, assert_op_close
from attention import assert_attention_close, dense, tensors
from test_cuda_attention import gradients, named

import fastformer
from fastformer import ops, reference

HALVES = (torch.bfloat16, torch.float16)
BLOCK = (384, 1, 1)


@pytest.fixture(autouse=True)
def kernels(sim):
    sim.options().hopper = True
    with fastformer.backend("cuda", strict=True):
        yield


def blocks(sim) -> set[tuple[int, int, int]]:
    return {launch.block for launch in named(sim.launches(), "attention_forward")}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [8, 64, 80, 128])
def test_head_sizes(sim, dtype, size):
    assert_attention_close(tensors(1, 2, 37, 75, size, size, dtype), is_causal=True)
    assert blocks(sim) == {BLOCK}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [64, 128])
def test_many_tiles(sim, order, copies, dtype, size):
    """4 and more tiles of keys, 3 of queries, the last ones not full; some seen by one consumer of a block alone."""
    given = tensors(1, 2, 290, 520, size, size - 24, dtype, kv_heads=1)
    assert_attention_close(given, window_size=(180, 30))
    assert blocks(sim) == {BLOCK}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["padding", "padding on both sides", "holes", "float"])
def test_masks_of_all_queries(sim, dtype, kind):
    given = tensors(2, 2, 140, 300, 64, 64, dtype)
    mask = torch.arange(300) < torch.tensor([70, 300])[:, None, None, None]
    if kind == "padding on both sides":
        mask = mask & (torch.arange(300) >= 20)
    if kind == "holes":
        mask = mask & (torch.rand(2, 2, 1, 300) < 0.8)
    if kind == "float":
        mask = torch.randn(2, 1, 1, 300).masked_fill(~mask, -torch.inf)
    assert_attention_close(given, mask, is_causal=kind == "holes")
    assert blocks(sim) == {BLOCK}


@pytest.mark.parametrize("dtype", HALVES)
def test_varlen_of_many_tiles(sim, order, dtype):
    lengths = [200, 0, 3, 150]
    bounds = torch.tensor([0, 200, 200, 203, 353], dtype=torch.int32)
    given = {name: torch.randn(353, 2, 64).to(dtype) for name in ("query", "key", "value")}
    where = dict(cu_seq_q=bounds, cu_seq_k=bounds, max_q=max(lengths), max_k=max(lengths), window_size=(-1, 0))
    assert_op_close(partial(ops.varlen_attn, **where), partial(reference.varlen_attn, **where), given)
    assert blocks(sim) == {BLOCK}


@pytest.mark.parametrize("dtype", HALVES)
def test_orders_give_the_same_bits(sim, dtype):
    """Of threads and blocks, with copies and products at once and as late as can be."""
    given = tensors(1, 2, 140, 300, 128, 128, dtype, kv_heads=1)
    results = []
    for order in (sim.Order.forward, sim.Order.reverse, sim.Order.random):
        options = sim.options()
        options.threads = options.blocks = order
        options.lazy_copies = order != sim.Order.forward
        results.append(gradients(given, is_causal=True, enable_gqa=True))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("size", [64, 128])
def test_skipped_tiles(sim, size):
    """Causal: of 300 rows, the first 64 see one tile of 128 keys, so do the next; then two and two; then three, and the
    last consumer has no rows. Each multiplies a tile once for 16 of the head and once for 16 of the keys."""
    given = tensors(1, 1, 300, 300, size, size, torch.bfloat16)
    ops.scaled_dot_product_attention(**given, is_causal=True)
    (launch,) = sim.launches()
    assert launch.wgmma == (1 + 1 + 2 + 2 + 3) * (size // 16 + 128 // 16) and launch.mma == 0
    # Queries once; keys and values of each tile for each block that sees some of it.
    assert launch.copied_bytes == 2 * size * (300 + 2 * (128 + 256 + 300))


def test_no_keys_at_all(sim):
    given = tensors(1, 1, 140, 140, 64, 64, torch.bfloat16)
    assert not any(x.any() for x in gradients(given, attn_mask=torch.zeros(140, dtype=torch.bool)))


@pytest.mark.parametrize("size", [64, 128])
def test_no_bank_conflicts(sim, size):
    sim.options().count_conflicts = True
    ops.scaled_dot_product_attention(**tensors(1, 1, 140, 130, size, size, torch.float16))
    (launch,) = sim.launches()
    assert launch.shared_wavefronts > 0 and launch.bank_conflicts == 0


@pytest.mark.parametrize("dtype", HALVES)
def test_hidden_values_that_are_not_finite(dtype):
    """Those behind the padding, and of keys in the future, reach no output. Such a row is summed in another order."""
    given = tensors(1, 2, 140, 150, 64, 64, dtype)
    mask = torch.arange(150) < 90
    whole = dense(mask, True, (-1, -1), 140, 150)
    expected = eager.scaled_dot_product_attention(**given, mask=whole)
    ref64 = eager.scaled_dot_product_attention(**{name: x.double() for name, x in given.items()}, mask=whole)
    given["value"][..., 90:, :] = torch.nan
    given["value"][..., 95, 3] = torch.inf
    hidden = ops.scaled_dot_product_attention(**given, attn_mask=mask, is_causal=True)
    assert_close_to_reference(hidden, expected, ref64)


def test_packed_neighbours_that_are_not_finite():
    """A tile of a sequence has rows of the next one, too: nothing of them comes through."""
    bounds = torch.tensor([0, 50, 130], dtype=torch.int32)
    q, k, v = torch.randn(3, 130, 2, 64).bfloat16()
    first = [x[None, :50].transpose(1, 2) for x in (q, k, v)]
    expected = eager.scaled_dot_product_attention(*first)
    ref64 = eager.scaled_dot_product_attention(*(x.double() for x in first))
    k[50:], v[50:] = torch.nan, torch.inf
    output = ops.varlen_attn(q, k, v, bounds, bounds, 80, 80)[None, :50].transpose(1, 2)
    assert_close_to_reference(output, expected, ref64)


@pytest.mark.parametrize(
    ("what", "change", "options", "taken"),
    [
        ("as it is", lambda x: x, {}, True),
        ("rows and heads in another order", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), {}, True),
        (
            "an address that is not aligned",
            lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
            {},
            False,
        ),
        ("the same sequence again and again", lambda x: x[:1].expand(2, 2, 70, 64), {}, False),
        ("a head of 60", lambda x: x[..., :60].contiguous(), {}, False),
        ("a head of 136", lambda x: x.repeat(1, 1, 1, 3)[..., :136].contiguous(), {}, False),
        ("float32", lambda x: x.float(), {}, False),
        ("dropout", lambda x: x, {"dropout_p": 0.1}, False),
        ("a mask of all queries", lambda x: x, {"attn_mask": torch.arange(70) < 40}, True),
        ("a mask of each query", lambda x: x, {"attn_mask": torch.ones(70, 70).tril().bool()}, False),
    ],
)
def test_what_it_takes(sim, what, change, options, taken):
    given = {name: change(x) for name, x in tensors(2, 2, 70, 70, 64, 64, torch.bfloat16).items()}
    mask = options.pop("attn_mask", None)
    assert_attention_close(given, mask, **options)
    assert blocks(sim) == {BLOCK if taken else (128, 1, 1)}
