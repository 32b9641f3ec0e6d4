"""What the op tests of attention do not reach: keys that are split between programs, and tiles that are skipped."""

import os

import pytest
import torch
from attention import assert_attention_close, tensors
from tensors import randn
from torch import Tensor

import fastformer
from fastformer import reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs on Triton's interpreter", allow_module_level=True)

from fastformer.kernels import attention, attention_decode
from fastformer.kernels import attention_forward as forward_module
from fastformer.kernels.attention import call_of, head_blocks
from fastformer.kernels.attention_decode import attention_decode as decode
from fastformer.kernels.attention_forward import attention_forward
from fastformer.kernels.configs import Config

KEYS = 300  # 10 tiles of 32, in two parts


def padding(*lengths: int) -> Tensor:
    """(B, 1, 1, Sk) bool"""
    return (torch.arange(KEYS) < torch.tensor(lengths)[:, None])[:, None, None]


def call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    dropout_p: float = 0.0,
):
    """The call, and tensors of NaN for its results."""
    batch, heads, queries, _ = query.shape
    if mask is not None:
        mask = mask.expand(batch, heads, queries, key.shape[2])
    given = call_of(
        query, key, value, attn_mask=mask, max_queries=queries, max_keys=key.shape[2], dropout_p=dropout_p,
        seed=torch.tensor(7), scale=0.3, window_left=window[0], window_right=window[1],
    )  # fmt: skip
    output = torch.full((batch, queries, heads, value.shape[3]), torch.nan).transpose(1, 2)
    return given, output, torch.full((batch, heads, queries), torch.nan)


def expected(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: tuple[int, int]):
    """Output and lse, computed in float64."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.double(), *(x.double().repeat_interleave(groups, 1) for x in (key, value))
    scores = q @ k.mT * 0.3
    kept = reference.attention_keeps(q.shape[2], k.shape[2], False, window, q.device)
    if kept is not None:
        scores = scores.masked_fill(~kept, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    lse = scores.logsumexp(-1)
    output = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp() @ v
    return output.float(), lse.float()


class TestDecode:
    @pytest.mark.parametrize(("queries", "heads"), [(1, 2), (1, 6), (3, 8)])
    @pytest.mark.parametrize("hidden", ["nothing", "window", "padding", "a sequence", "by head", "float"])
    def test_parts(self, queries, heads, hidden):
        """Two key heads; the keys are split."""
        query, key, value = randn(2, heads, queries, 24), randn(2, 2, KEYS, 24), randn(2, 2, KEYS, 20)
        mask = {
            "padding": padding(40, 290),  # the second part of the first sequence sees nothing
            "a sequence": padding(0, KEYS),
            "by head": torch.rand(1, heads, 1, KEYS) < 0.5,
            "float": torch.randn(2, 1, queries, KEYS),
        }.get(hidden)
        window = (150, 0) if hidden == "window" else (-1, -1)
        given, output, lse = call(query, key, value, mask, window)
        assert decode(given, output, lse)
        torch.testing.assert_close((output, lse), expected(query, key, value, mask, window))

    def test_packed(self):
        """As the same sequences by themselves; the last has no keys."""
        lengths_q, lengths_k = [1, 2, 1], [300, 200, 0]
        query, key, value = randn(4, 4, 16), randn(500, 2, 16), randn(500, 2, 16)
        cu_seq_q, cu_seq_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 3, 4], [0, 300, 500, 500]))
        given = call_of(
            query, key, value, cu_seq_q=cu_seq_q, cu_seq_k=cu_seq_k, max_queries=2, max_keys=300, dropout_p=0.0,
            seed=None, scale=0.3, window_left=-1, window_right=0,
        )  # fmt: skip
        output, lse = torch.full_like(query, torch.nan), torch.full((4, 4), torch.nan)
        assert decode(given, output, lse)
        parts = query.split(lengths_q), key.split(lengths_k), value.split(lengths_k)
        results = [expected(*(x.transpose(0, 1)[None] for x in qkv), None, (-1, 0)) for qkv in zip(*parts, strict=True)]
        torch.testing.assert_close(output, torch.cat([out[0].transpose(0, 1) for out, _ in results]))
        torch.testing.assert_close(lse, torch.cat([x[0] for _, x in results], dim=1))

    def test_nan(self):
        """In a value that one query sees and the other does not."""
        query, key, value = randn(1, 2, 2, 16), randn(1, 2, KEYS, 16), randn(1, 2, KEYS, 16)
        value[0, 1, -1, 5] = torch.nan
        given, output, lse = call(query, key, value, window=(-1, 0))
        assert decode(given, output, lse)
        assert output.isnan().nonzero().tolist() == [[0, 1, 1, 5]]

    @pytest.mark.parametrize(("queries", "heads", "keys"), [(17, 2, KEYS), (5, 8, KEYS), (1, 2, 100)])
    def test_not_for_every_call(self, queries, heads, keys):
        """Too many queries for a tile, or one part and nothing to share."""
        given, output, lse = call(randn(2, heads, queries, 16), *(randn(2, 2, keys, 16) for _ in range(2)))
        assert not decode(given, output, lse) and output.isnan().all()

    def test_number_of_parts(self, monkeypatch):
        monkeypatch.setattr(attention_decode, "_multiprocessors", lambda device: 100)
        given, output, _ = call(randn(1, 4, 1, 16), *(randn(1, 4, 5000, 16) for _ in range(2)))
        assert attention_decode._parts(given, output.device, 32) == 32  # at most
        assert attention_decode._parts(given, output.device, 64) == 19  # four tiles of keys each
        given, output, _ = call(randn(10, 4, 1, 16), *(randn(10, 4, 5000, 16) for _ in range(2)))
        assert attention_decode._parts(given, output.device, 64) == 5  # two programs for each multiprocessor


class TestTiles:
    """A value of NaN is seen where a tile that should be skipped is not, and where one that should not be is."""

    @pytest.mark.parametrize("hidden", ["padding", "left padding", "hole", "band", "block"])
    def test_skipped(self, hidden):
        queries = 100
        query, key, value = randn(2, 1, queries, 16), randn(2, 1, KEYS, 16), randn(2, 1, KEYS, 16)
        window, mask = (-1, -1), None
        if hidden == "padding":
            mask = padding(70, 290)
        elif hidden == "left padding":
            mask = ~padding(70, 290)
        elif hidden == "hole":
            mask = padding(70, 290) | ~padding(150, 295)
        elif hidden == "band":
            window = (40, 3)
        else:  # each query sees the keys of one block of 64
            mask = (torch.arange(queries)[:, None] // 40 == torch.arange(KEYS) // 64).expand(2, 1, -1, -1)
        given, output, lse = call(query, key, value, mask, window)
        attention_forward(given, output, lse)
        torch.testing.assert_close((output, lse), expected(query, key, value, mask, window))
        if hidden in ("padding", "left padding", "hole"):
            value = value.masked_fill(~mask.mT, torch.nan)  # of all keys that nobody sees
            given, with_nan, _ = call(query, key, value, mask, window)
            attention_forward(given, with_nan, lse)
            torch.testing.assert_close(with_nan, output)


@pytest.mark.parametrize("size, value_size", [(80, 80), (96, 40), (20, 144)], ids=str)
class TestTwoTiles:
    """A head whose columns are two tiles, as 64 and 16."""

    def test_blocks(self, size, value_size):
        sizes = {20: (32,), 40: (32, 16), 80: (64, 16), 96: (64, 32), 144: (128, 16)}
        assert (head_blocks(size, 16, 256), head_blocks(value_size, 16, 256)) == (sizes[size], sizes[value_size])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("options", [{}, {"is_causal": True, "dropout_p": 0.2}], ids=str)
    def test_op(self, size, value_size, dtype, options):
        with fastformer.backend("triton", strict=True):
            assert_attention_close(tensors(2, 2, 37, 41, size, value_size, dtype, kv_heads=1), **options)

    def test_decode(self, size, value_size):
        query, key, value = randn(2, 4, 1, size), randn(2, 2, KEYS, size), randn(2, 2, KEYS, value_size)
        given, output, lse = call(query, key, value)
        assert decode(given, output, lse)
        torch.testing.assert_close((output, lse), expected(query, key, value, None, (-1, -1)))

    def test_nan(self, size, value_size):
        """In the last column, of a key that one query sees and of one that nobody sees."""
        query, key, value = randn(1, 1, 40, size), randn(1, 1, 40, size), randn(1, 1, 40, value_size)
        value[0, 0, 39, -1] = torch.nan
        mask = (torch.arange(40) < 39).expand(1, 1, 40, 40).clone()
        for seen, nans in ((False, []), (True, [[0, 0, 7, value_size - 1]])):
            mask[0, 0, 7, 39] = seen
            given, output, lse = call(query, key, value, mask)
            attention_forward(given, output, lse)
            assert output.isnan().nonzero().tolist() == nans


class TestReloads:
    """Rows that stay, loaded in every turn anew, a tile of their columns at a time: as for wide heads on RDNA."""

    @pytest.fixture(autouse=True)
    def reloads(self, monkeypatch):
        monkeypatch.setattr(attention, "reloads", lambda size: True)

    @pytest.mark.parametrize("size", [1, 16, 64, 72, 80, 100, 128, 160, 200, 256])
    @pytest.mark.parametrize("most", [32, 64])
    def test_blocks(self, size, most):
        """All but the last equal, none too large, none for nothing."""
        *whole, last = head_blocks(size, 16, most)
        assert len(set(whole)) <= 1 and last <= most and sum(whole) < size <= sum(whole) + last

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("size, value_size", [(80, 80), (96, 20), (200, 24)], ids=str)
    @pytest.mark.parametrize(
        "options",
        [{"scale": -0.3}, {"is_causal": True, "dropout_p": 0.2}, {"mask": True, "window_size": (9, 12)}],
        ids=str,
    )
    def test_op(self, size, value_size, dtype, options):
        mask = randn(1, 2, 37, 41).to(dtype) if "mask" in options else None
        options = {name: option for name, option in options.items() if name != "mask"}
        with fastformer.backend("triton", strict=True):
            assert_attention_close(tensors(2, 2, 37, 41, size, value_size, dtype, kv_heads=1), mask, **options)

    @pytest.mark.parametrize("hidden", ["nothing", "padding", "band"])
    def test_decode(self, hidden):
        query, key, value = randn(2, 4, 3, 80), randn(2, 2, KEYS, 80), randn(2, 2, KEYS, 40)
        mask = padding(70, 290) if hidden == "padding" else None
        window = (40, 3) if hidden == "band" else (-1, -1)
        given, output, lse = call(query, key, value, mask, window)
        assert decode(given, output, lse)
        torch.testing.assert_close((output, lse), expected(query, key, value, mask, window))

    def test_nan(self):
        """Of a key that nobody sees: it is left out in the second pass."""
        query, key, value = randn(1, 2, 40, 80), randn(1, 2, KEYS, 80), randn(1, 2, KEYS, 80)
        mask = padding(290) & (torch.arange(KEYS) != 33)
        outputs = []
        for values in (value, value.masked_fill(~mask.mT, torch.nan)):
            given, output, lse = call(query, key, values, mask)
            attention_forward(given, output, lse)
            outputs.append(output)
        torch.testing.assert_close(outputs[1], outputs[0])


class TestDropout:
    @pytest.mark.parametrize("keys", [16, 32, 128])
    def test_keys_of_a_tile(self, keys, monkeypatch):
        """They do not change what is dropped."""
        query, key, value = randn(2, 2, 70, 16), randn(2, 2, KEYS, 16), randn(2, 2, KEYS, 16)
        outputs = []
        for block_n in (64, keys):
            config = Config({"BLOCK_M": 32, "BLOCK_N": block_n})
            monkeypatch.setattr(forward_module, "pick", lambda *args, config=config, **key: config)
            given, output, lse = call(query, key, value, window=(200, 3), dropout_p=0.4)
            attention_forward(given, output, lse)
            outputs.append(output)
        torch.testing.assert_close(outputs[1], outputs[0])

    def test_hidden_nan(self):
        """The second pass, which leaves it out, drops the same."""
        query, key, value = randn(2, 1, 40, 16), randn(2, 1, KEYS, 16), randn(2, 1, KEYS, 16)
        mask = padding(70, 290) & (torch.arange(KEYS) != 33)
        outputs = []
        for values in (value, value.masked_fill(~mask.mT, torch.nan)):
            given, output, lse = call(query, key, values, mask, dropout_p=0.4)
            attention_forward(given, output, lse)
            outputs.append(output)
        torch.testing.assert_close(outputs[1], outputs[0])
