"""The raw attention ops: sizes around the kernels' blocks, what must not change a bit, and what is never read."""

import math

import pytest
import torch
from accuracy import assert_close_to_reference
from tensors import DTYPES, randn
from torch import Tensor

from fastformer import reference

raw = torch.ops.fastformer_cpu

# (batch, heads, kv heads, queries, keys, head size, head size of value); blocks are 48 queries x 256 keys.
SIZES = [
    (2, 2, 2, 20, 20, 32, 32),
    (1, 2, 1, 48, 256, 64, 64),
    (1, 1, 1, 49, 257, 80, 96),
    (1, 2, 2, 97, 515, 128, 20),
    (1, 4, 2, 130, 70, 33, 64),
    (4, 3, 3, 1, 600, 72, 64),
    (2, 4, 2, 1, 90, 32, 32),
    (2, 2, 1, 60, 300, 64, 256),
    (1, 1, 1, 300, 5, 256, 7),
]
HIDING = {
    "nothing": {},
    "causal": {"is_causal": True},
    "window": {"window_size": (40, 3)},
    "causal window": {"is_causal": True, "window_size": (260, -1)},
}


def inputs(batch, heads, kv_heads, queries, keys, size, value_size, dtype=torch.float32) -> list[Tensor]:
    """In memory (B, S, H, D), as a model's projections are."""
    return [
        randn(batch, rows, h, columns, dtype=dtype).transpose(1, 2)
        for rows, h, columns in ((queries, heads, size), (keys, kv_heads, size), (keys, kv_heads, value_size))
    ]


def attend(qkv, mask=None, *, dropout_p=0.0, is_causal=False, window_size=(-1, -1), grad_output=None) -> list[Tensor]:
    """Output, lse and, for a grad_output, the gradients of query, key and value."""
    query, key, _ = qkv
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    seed = torch.tensor(12345) if dropout_p else None
    options = (dropout_p, seed, is_causal, query.shape[-1] ** -0.5, *window_size)
    output, lse = raw.scaled_dot_product_attention(*qkv, mask, *options)
    if grad_output is None:
        return [output, lse]
    return [
        output, lse,
        *raw.scaled_dot_product_attention_backward(grad_output, *qkv, mask, output, lse, *options),
    ]  # fmt: skip


def attend_packed(qkv, bounds, longest, *, dropout_p=0.0, window_size=(-1, -1), grad_output) -> list[Tensor]:
    seed = torch.tensor(12345) if dropout_p else None
    options = (bounds, bounds, longest, longest, dropout_p, seed, qkv[0].shape[-1] ** -0.5, *window_size)
    output, lse = raw.varlen_attn(*qkv, *options)
    return [output, lse, *raw.varlen_attn_backward(grad_output, *qkv, output, lse, *options)]


def expected(qkv, dtype, grad_output, **options) -> list[Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
    output = reference.scaled_dot_product_attention(*leaves, enable_gqa=True, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(dtype))]


def log_sum_exp(query, key, mask=None, is_causal=False, window_size=(-1, -1)) -> Tensor:
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.double() @ key.mT * query.shape[-1] ** -0.5
    kept = reference.attention_keeps(query.shape[2], key.shape[2], is_causal, window_size, query.device)
    for hidden in (kept, mask):
        scores = scores if hidden is None else scores.masked_fill(~hidden, -math.inf)
    return scores.logsumexp(-1)


def grad_like(qkv) -> Tensor:
    query, _, value = qkv
    return randn(*query.shape[:3], value.shape[3], dtype=query.dtype)


@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(isa, dtype, size, hiding):
    qkv = inputs(*size, dtype)
    grad_output = grad_like(qkv)
    output, lse, *gradients = attend(qkv, **HIDING[hiding], grad_output=grad_output)
    eager = expected(qkv, dtype, grad_output, **HIDING[hiding])
    exact = expected(qkv, torch.float64, grad_output, **HIDING[hiding])
    for name, out, *judges in zip(("output", "dQ", "dK", "dV"), [output, *gradients], eager, exact, strict=True):
        assert_close_to_reference(out, *judges, name, slack=1)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(lse.double(), log_sum_exp(*qkv[:2], **HIDING[hiding]), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_blocks_without_keys(isa, kind):
    """Whole blocks of keys hidden, at the front, in the middle, at the end; a row hidden whole; all of a sequence."""
    qkv = inputs(2, 2, 2, 60, 1100, 32, 32)
    kept = torch.zeros(2, 1, 60, 1100, dtype=torch.bool)
    kept[0, :, :, 270:280] = kept[0, :, 7:, 900:905] = kept[0, :, 30, 400] = True
    kept[0, :, 3] = False
    mask = kept if kind == "bool" else torch.zeros(kept.shape).masked_fill(~kept, -math.inf)
    grad_output = grad_like(qkv)
    output, lse, *gradients = attend(qkv, mask, grad_output=grad_output)
    eager = expected(qkv, torch.float32, grad_output, attn_mask=mask)
    exact = expected(qkv, torch.float64, grad_output, attn_mask=mask.double() if kind == "float" else mask)
    for name, out, *judges in zip(("output", "dQ", "dK", "dV"), [output, *gradients], eager, exact, strict=True):
        assert_close_to_reference(out, *judges, name, slack=1)
    torch.testing.assert_close(lse.double(), log_sum_exp(*qkv[:2], kept), atol=2e-6, rtol=1e-6)
    hidden = ~kept.any(-1).expand(2, 2, 60)
    assert (lse[hidden] == -math.inf).all() and not output[hidden].any() and not gradients[0][hidden].any()


@pytest.mark.parametrize("broadcast", ["queries", "keys", "both", "heads"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_mask_strides(isa, dtype, broadcast):
    """A mask is read where it lies: broadcast, or every second element of another tensor."""
    shape = {"queries": (2, 3, 1, 300), "keys": (2, 3, 50, 1), "both": (2, 3, 1, 1), "heads": (2, 1, 50, 300)}
    qkv = inputs(2, 3, 3, 50, 300, 16, 16)
    grad_output = grad_like(qkv)
    mask = randn(*shape[broadcast], 2, dtype=dtype)[..., 0]
    dense = mask.expand(2, 3, 50, 300).contiguous()
    for out, given in zip(
        attend(qkv, mask, grad_output=grad_output), attend(qkv, dense, grad_output=grad_output), strict=True
    ):
        assert torch.equal(out, given)


class TestSameBits:
    """What decides how the work is cut does not decide what comes out."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "size", [(1, 1, 1, 700, 700, 64, 64), (1, 6, 2, 300, 520, 32, 48), (3, 4, 4, 65, 65, 16, 16)]
    )
    @pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window_size": (70, 0), "dropout_p": 0.2}], ids=str)
    def test_threads(self, dtype, size, options):
        qkv = inputs(*size, dtype)
        grad_output = grad_like(qkv)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attend(qkv, **options, grad_output=grad_output))
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))

    @pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3}, {"window_size": (9, 0)}], ids=str)
    def test_packed_and_padded(self, isa, options):
        lengths = [5, 130, 1, 0, 64, 300]
        longest, kept = max(lengths), torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        padded = inputs(len(lengths), 2, 2, longest, longest, 32, 24)
        grad_output = grad_like(padded) * kept[:, None, :, None]
        if "window_size" in options:  # aligned to the end of each sequence: padded, a mask of the queries' own
            query, key = torch.arange(longest)[:, None], torch.arange(longest)
            mask = kept[:, None, None] & (key <= query) & (key >= query - 9)
            expected = attend(padded, mask, grad_output=grad_output)
        else:
            expected = attend(padded, kept[:, None, None], **options, grad_output=grad_output)
        pack = [x.transpose(1, 2)[kept] for x in (*padded, grad_output)]
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        output, lse, *gradients = attend_packed(pack[:3], bounds, longest, **options, grad_output=pack[3])
        for out, given in zip([output, *gradients], [expected[0], *expected[2:]], strict=True):
            assert torch.equal(out, given.transpose(1, 2)[kept])
        assert torch.equal(lse, expected[1].transpose(1, 2)[kept].mT)

    @pytest.mark.parametrize("queries", [2, 7, 8, 50])  # one alone takes another way: test_sizes
    def test_fewer_queries(self, isa, queries):
        query, key, value = inputs(1, 2, 2, 100, 600, 40, 24)
        few = attend((query[:, :, :queries], key, value))
        for out, given in zip(few, attend((query, key, value)), strict=True):
            assert torch.equal(out, given[:, :, :queries])

    def test_strides(self, isa):
        qkv = inputs(2, 2, 2, 60, 70, 32, 32)
        grad_output = grad_like(qkv)
        wide = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in qkv]
        for layout in ([x.contiguous() for x in qkv], wide, [x.mT.contiguous().mT for x in qkv]):
            results = zip(attend(layout, grad_output=grad_output), attend(qkv, grad_output=grad_output), strict=True)
            assert all(torch.equal(out, given) for out, given in results)

    def test_unlimited_windows(self):
        qkv = inputs(1, 2, 2, 60, 70, 32, 32)
        for window_size in ((2**63 - 1, 2**63 - 1), (70, 70), (69, 2**40)):
            assert all(map(torch.equal, attend(qkv, window_size=window_size), attend(qkv)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_never_read(isa, dtype):
    """Keys and values behind the last and before the first that a mask keeps may hold anything."""
    qkv = inputs(2, 2, 2, 30, 330, 24, 24, dtype)
    grad_output = grad_like(qkv)
    kept = torch.zeros(2, 1, 1, 330, dtype=torch.bool)
    kept[0, ..., 21:300] = kept[1, ..., 290:301] = True
    clean = attend(qkv, kept, grad_output=grad_output)
    hidden = ~kept[:, :, 0, :, None]
    query, key, value = qkv
    dirty = attend((query, key.masked_fill(hidden, math.nan), value.masked_fill(hidden, math.inf)), kept,
                   grad_output=grad_output)  # fmt: skip
    assert all(map(torch.equal, dirty, clean))


def test_lowest_number_is_not_minus_infinity(isa):
    """A row whose every key has the lowest number added sees all of them alike."""
    qkv = inputs(1, 1, 1, 20, 300, 16, 16)
    output, _ = attend(qkv, torch.full((1, 1, 20, 300), torch.finfo(torch.float32).min))
    torch.testing.assert_close(output, qkv[2].mean(2, keepdim=True).expand_as(output))


def test_layout():
    """Outputs and gradients lie in memory as (B, S, H, D), whatever the inputs do."""
    qkv = [x.contiguous() for x in inputs(2, 3, 3, 20, 30, 16, 8)]
    output, lse, *gradients = attend(qkv, grad_output=grad_like(qkv))
    assert lse.is_contiguous()
    assert all(x.transpose(1, 2).is_contiguous() for x in (output, *gradients))


@pytest.mark.parametrize(
    "bounds, longest, message",
    [([1, 5, 9], 9, "begin with 0"), ([0, 5, 3, 9], 9, "from 5|5 and"), ([0, 9], 5, "9"), ([0, 5, 8], 9, "rows"),
     ([0, 5, 12], 12, "rows")],
)  # fmt: skip
def test_bounds_that_make_no_sense(bounds, longest, message):
    qkv = [randn(9, 2, 8) for _ in range(3)]
    with pytest.raises(RuntimeError, match=message):
        attend_packed(qkv, torch.tensor(bounds, dtype=torch.int32), longest, grad_output=randn(9, 2, 8))
