"""The specification itself: against plain Python integers, eager PyTorch and loops over elements."""

import doctest
import math
from functools import partial

import eager
import pytest
import torch
from accuracy import assert_op_close
from tensors import DTYPES, randn
from torch import Tensor
from torch.autograd import gradcheck

from fastformer import reference


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x32-10 in plain integers, after the paper."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 // 2**32 ^ c[1] ^ k0, p1 % 2**32, p0 // 2**32 ^ c[3] ^ k1, p0 % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def is_kept(seed: int, p: float, column: int, c1: int, c2: int, c3: int) -> bool:
    """The layout of the docstring for one element."""
    counter = (column // 64 * 16 + column % 16, c1, c2, c3)
    word = philox((seed % 2**32, seed // 2**32 % 2**32), counter)[column // 16 % 4]
    return word >= min(round(p * 2**32), 2**32 - 1)


SEEDS = [0, 1, -1, 7, 2**32, 2**63 - 1, -(2**63), 0x123456789ABCDEF, -0x123456789ABCDEF]


def test_examples_of_the_docstring():
    results = doctest.testmod(reference)
    assert results.attempted >= 5 and results.failed == 0


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [  # the known answers that are published with the generator
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox(key, counter, words):
    assert philox(key, counter) == list(words)
    seed = key[0] + key[1] * 2**32
    seed -= 2**64 * (seed >= 2**63)  # an int64
    assert [int(w) for w in reference.philox4x32(seed, *counter)] == list(words)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_row_mask(seed, p):
    rows, columns = 3, 150
    mask = reference.row_dropout_mask(torch.tensor(seed), p, rows, columns)
    expected = [[is_kept(seed, p, column, row, 0, 0) for column in range(columns)] for row in range(rows)]
    assert mask.tolist() == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_mask(seed):
    batch, heads, queries, keys = 2, 3, 2, 70
    mask = reference.attention_dropout_mask(torch.tensor(seed), 0.3, batch, heads, queries, keys, first_sequence=4)
    expected = [
        [[[is_kept(seed, 0.3, k, q, h, b + 4) for k in range(keys)] for q in range(queries)] for h in range(heads)]
        for b in range(batch)
    ]
    assert mask.tolist() == expected


@pytest.mark.parametrize(
    ("p", "threshold"),
    [(0.0, 0), (2**-33, 0), (2**-32, 1), (0.1, 429496730), (0.5, 2**31), (1 - 2**-33, 2**32 - 1), (1.0, 2**32 - 1)],
)
def test_threshold(p, threshold):
    assert reference.dropout_threshold(p) == threshold


def test_bits_at_the_threshold_are_kept():
    word = philox((7, 0), (0, 0, 0, 0))[0]
    for p, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
        assert reference.row_dropout_mask(torch.tensor(7), p, 1, 1).item() is kept


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_are_random(p):
    """Within five standard deviations: how many are kept, in a row, in a column, and in step with a neighbour."""
    mask = reference.row_dropout_mask(torch.tensor(3), p, 1000, 1024).double()
    deviation = math.sqrt(p * (1 - p))

    def assert_near(x: Tensor, expected: float, samples: int) -> None:
        assert (x - expected).abs().max() < 5 * deviation / math.sqrt(samples)

    assert_near(mask.mean(), 1 - p, mask.numel())
    assert_near(mask.mean(0), 1 - p, 1000)
    assert_near(mask.mean(1), 1 - p, 1024)
    centred = (mask - (1 - p)) / deviation
    for distance in (1, 16, 64):
        for x, y in ((centred[:, distance:], centred[:, :-distance]), (centred[distance:], centred[:-distance])):
            assert (x * y).mean().abs() < 5 / math.sqrt(x.numel())


def test_seeds_differ():
    torch.manual_seed(0)
    seeds = torch.stack([reference.draw_seed(torch.device("cpu")) for _ in range(1000)])
    assert seeds.dtype == torch.int64 and seeds.unique().numel() == 1000
    assert (seeds < 0).sum().item() in range(400, 600) and (seeds.abs() > 2**62).sum().item() in range(400, 600)


def test_dropout_scales():
    torch.manual_seed(1)
    output = reference.linear(torch.zeros(500, 1), torch.zeros(400, 1), torch.ones(400), dropout_p=0.2)
    assert set(output.unique().tolist()) == {0.0, 1.25}
    assert abs(output.mean().item() - 1) < 5 * 0.5 / math.sqrt(output.numel())
    assert not reference.linear(torch.zeros(5, 1), torch.zeros(4, 1), torch.ones(4), dropout_p=1.0).any()


def tensors(dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: randn(*shape, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", DTYPES)
class TestRows:
    """As eager PyTorch composes them, gradients too."""

    @pytest.mark.parametrize("activation", eager.ACTIVATIONS)
    @pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
    def test_linear(self, dtype, activation, p):
        given = tensors(dtype, input=(2, 7, 8), weight=(5, 8), bias=(5,))
        for residual in (None, randn(2, 7, 5, dtype=dtype), randn(5)):
            options = {"activation": activation, "dropout_p": p}
            calls = (partial(f, **options) for f in (reference.linear, eager.linear))
            assert_op_close(*calls, given | {"residual": residual})

    @pytest.mark.parametrize(("hidden_p", "p"), [(0.0, 0.0), (0.4, 0.2)])
    def test_feed_forward(self, dtype, hidden_p, p):
        given = tensors(dtype, input=(9, 8), weight1=(6, 8), bias1=(6,), weight2=(5, 6), bias2=(5,), residual=(9, 5))
        options = {"activation": "silu", "hidden_dropout_p": hidden_p, "dropout_p": p}
        assert_op_close(*(partial(f, **options) for f in (reference.feed_forward, eager.feed_forward)), given)

    def test_layer_norm(self, dtype):
        given = tensors(dtype, input=(9, 4, 8), weight=(4, 8), bias=(4, 8))
        options = {"normalized_shape": (4, 8), "eps": 0.1}
        assert_op_close(*(partial(f, **options) for f in (reference.layer_norm, eager.layer_norm)), given)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("weight", [None, torch.linspace(0.5, 2, 6)])
    def test_linear_cross_entropy(self, dtype, reduction, weight):
        given = tensors(dtype, input=(3, 4, 8), linear_weight=(6, 8), linear_bias=(6,))
        target = torch.arange(12).view(3, 4) % 7 - 1
        options = {"reduction": reduction, "ignore_index": -1, "label_smoothing": 0.1, "weight": weight}
        functions = (reference.linear_cross_entropy, eager.linear_cross_entropy)
        assert_op_close(*(partial(f, target=target, **options) for f in functions), given)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_crf_log_likelihood(self, dtype, reduction):
        given = tensors(dtype, emissions=(3, 6, 4), transitions=(4, 4), start=(4,), end=(4,))
        options = {"mask": torch.arange(18).view(3, 6) % 5 > 0, "reduction": reduction}
        tags = torch.arange(18).view(3, 6) % 4
        functions = (reference.crf_log_likelihood, eager.crf_log_likelihood)
        assert_op_close(*(partial(f, tags=tags.where(tags != 2, -100), **options) for f in functions), given)

    @pytest.mark.parametrize("p", [0.0, 0.4])
    def test_add_layer_norm(self, dtype, p):
        given = tensors(dtype, input=(9, 8), residual=(9, 8), weight=(8,), bias=(8,))
        fused = partial(reference.add_layer_norm, normalized_shape=8, dropout_p=p)
        assert_op_close(fused, partial(eager.add_layer_norm, dropout_p=p), given)

    @pytest.mark.parametrize("p", [0.0, 0.4])
    def test_embeddings(self, dtype, p):
        tables = {"word_embeddings": (9, 8), "position_embeddings": (5, 8), "token_type_embeddings": (2, 8)}
        given = tensors(dtype, **tables, weight=(8,), bias=(8,))
        ids = {"input_ids": torch.arange(12).view(3, 4) % 9, "position_ids": torch.arange(4)}
        ids["token_type_ids"] = torch.tensor([[0], [1], [1]])
        functions = (reference.embeddings, eager.embeddings)
        assert_op_close(*(partial(f, **ids, padding_idx=2, eps=0.1, dropout_p=p) for f in functions), given)


class TestAttention:
    @pytest.mark.parametrize("window_size", [(-1, -1), (0, 0), (2, -1), (-1, 0), (1, 3)])
    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (3, 7), (7, 3)])
    def test_what_a_query_sees(self, queries, keys, is_causal, window_size):
        kept = reference.attention_keeps(queries, keys, is_causal, window_size, torch.device("cpu"))
        expected = eager.visible(queries, keys, is_causal, window_size)
        assert expected.all() if kept is None else torch.equal(kept, expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("mask", [None, "bool", "float"])
    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize("scale", [None, 0.2])
    def test_as_torch(self, dtype, mask, is_causal, scale):
        given = tensors(dtype, query=(2, 4, 5, 8), key=(2, 2, 7, 8), value=(2, 2, 7, 8))
        attn_mask, whole = None, eager.visible(5, 7, is_causal)
        if mask == "bool":
            attn_mask = torch.rand(2, 1, 5, 7) < 0.7
            attn_mask[..., 0] = True
            whole = whole & attn_mask
        elif mask == "float":
            attn_mask = torch.randn(2, 1, 5, 7).to(dtype)
            whole = attn_mask.masked_fill(~whole, -torch.inf)
        options = {"attn_mask": attn_mask, "is_causal": is_causal, "enable_gqa": True, "scale": scale}
        function = partial(reference.scaled_dot_product_attention, **options)
        assert_op_close(function, partial(eager.scaled_dot_product_attention, mask=whole, scale=scale), given)

    def test_rows_without_keys(self):
        given = [randn(2, 3, 5, 8).requires_grad_() for _ in range(3)]
        mask = torch.ones(5, 5, dtype=torch.bool)
        mask[2] = False
        for attn_mask in (mask, torch.zeros(5, 5).masked_fill(~mask, -torch.inf)):
            output = reference.scaled_dot_product_attention(*given, attn_mask)
            assert not output[:, :, 2].any() and output[:, :, 3].all()
            gradients = torch.autograd.grad(output.sum(), given)
            assert all(g.isfinite().all() for g in gradients) and not gradients[0][:, :, 2].any()

    def test_dropout(self):
        """Of the probabilities, scaled: the mean stays that of the output without dropout."""
        query, key, value = (torch.randn(1, 1, 4, 8) for _ in range(3))
        torch.manual_seed(0)
        repeated = [x.expand(2000, 1, 4, 8) for x in (query, key, value)]
        output = reference.scaled_dot_product_attention(*repeated, dropout_p=0.3)
        torch.testing.assert_close(
            output.mean(0), reference.scaled_dot_product_attention(query, key, value)[0], atol=0.1, rtol=0
        )
        assert output.unique(dim=0).shape[0] > 1500

    @pytest.mark.parametrize("dropout_p", [0.0, 0.4])
    def test_varlen_as_padded(self, dropout_p):
        lengths, kept = [3, 0, 5], torch.arange(5) < torch.tensor([3, 0, 5])[:, None]
        padded = randn(3, 2, 5, 8)  # (B, H, S, D)
        packed = padded.transpose(1, 2)[kept]
        bounds = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
        torch.manual_seed(2)
        output = reference.varlen_attn(packed, packed, packed, bounds, bounds, 5, 5, dropout_p=dropout_p)
        torch.manual_seed(2)
        expected = reference.scaled_dot_product_attention(
            padded, padded, padded, kept[:, None, None], dropout_p=dropout_p
        )
        torch.testing.assert_close(output, expected.transpose(1, 2)[kept])
        assert output.shape == (sum(lengths), 2, 8)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (partial(reference.linear, activation="gelu", dropout_p=0.3), [(3, 4), (5, 4), (5,)]),
        (partial(reference.feed_forward, hidden_dropout_p=0.3, dropout_p=0.2), [(3, 4), (5, 4), (5,), (2, 5), (2,)]),
        (lambda x, w, b: reference.layer_norm(x, (4,), w, b), [(3, 4), (4,), (4,)]),
        (lambda x, r, w, b: reference.add_layer_norm(x, r, 4, w, b, dropout_p=0.3), [(3, 4), (3, 4), (4,), (4,)]),
        (partial(reference.scaled_dot_product_attention, dropout_p=0.3, is_causal=True), 3 * [(2, 2, 3, 4)]),
    ],
)
def test_gradcheck(function, shapes):
    def with_seed(*tensors):
        torch.manual_seed(3)
        return function(*tensors)

    assert gradcheck(with_seed, [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes])
