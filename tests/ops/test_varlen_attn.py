from functools import partial
from itertools import accumulate

import eager
import pytest
import torch
from accuracy import assert_op_close, assert_strides_do_not_matter
from hypothesis import given
from hypothesis import strategies as st
from tensors import DTYPES, FLOATS, LAYOUTS, randn
from torch import Tensor
from torch.autograd import gradcheck

import fastformer
from fastformer import ops, reference

# The lengths of the sequences, of queries and keys.
LENGTHS = [
    ([5], [5]),
    ([1, 1, 1], [1, 7, 2]),
    ([7, 16, 17], [7, 16, 17]),
    ([63, 1, 65], [64, 97, 2]),
    ([0, 5, 0, 3], [0, 5, 0, 3]),
    ([130], [200]),
]


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def sequences(lengths_q: list[int], lengths_k: list[int]) -> dict:
    """What tells varlen_attn the lengths."""
    return {
        "cu_seq_q": bounds(lengths_q),
        "cu_seq_k": bounds(lengths_k),
        "max_q": max(lengths_q, default=0),
        "max_k": max(lengths_k, default=0),
    }


def tensors(
    lengths_q: list[int], lengths_k: list[int], dtype: torch.dtype, heads: int = 2, kv_heads: int = 2, **layout: str
) -> dict[str, Tensor]:
    return {
        "query": randn(sum(lengths_q), heads, 16, dtype=dtype, **layout),
        "key": randn(sum(lengths_k), kv_heads, 16, dtype=dtype, **layout),
        "value": randn(sum(lengths_k), kv_heads, 16, dtype=dtype, **layout),
    }


def assert_varlen_close(
    given: dict[str, Tensor] | list[dict[str, Tensor]], lengths: tuple[list[int], list[int]], slack: int = 0, **options
) -> None:
    """`given`: one draw of tensors, or several that are judged as one."""
    draws, where = given if isinstance(given, list) else [given], sequences(*lengths)
    if "dropout_p" in options:
        expected = partial(reference.varlen_attn, **where, **options, enable_gqa=True)
    else:
        expected = partial(eager.varlen_attn, lengths_q=lengths[0], lengths_k=lengths[1], **options)
    assert_op_close(partial(ops.varlen_attn, **where, **options, enable_gqa=True), expected, *draws, slack=slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_each_sequence_for_itself(dtype, lengths):
    assert_varlen_close(tensors(*lengths, dtype, heads=6, kv_heads=6), lengths)


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets(isa, dtype):
    lengths = [40, 3, 0, 70], [50, 3, 0, 33]
    given = [tensors(*lengths, dtype, heads=4) for _ in range(4)]
    assert_varlen_close(given, lengths, window_size=(20, 5), scale=0.3)
    assert_varlen_close(given, lengths, window_size=(20, 5), dropout_p=0.2)


@pytest.mark.parametrize("window_size", [(-1, 0), (0, 0), (3, -1), (2, 3), (100, 100)])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_windows(backend, lengths, window_size):
    """The last query of a sequence at its last key. More queries than keys: some see none and give 0."""
    given = tensors(*lengths, torch.float32)
    with fastformer.backend(backend):
        output = ops.varlen_attn(**given, **sequences(*lengths), window_size=window_size)
    parts = [given["query"].split(lengths[0]), *(given[name].split(lengths[1]) for name in ("key", "value"))]
    for q, k, v, out in zip(*parts, output.split(lengths[0]), strict=True):
        kept = eager.visible(len(q), len(k), window_size=window_size)
        sees = kept.any(-1)
        q, k, v = (x.transpose(0, 1)[None] for x in (q[sees], k, v))
        expected = torch.zeros_like(out)
        expected[sees] = eager.scaled_dot_product_attention(q, k, v, kept[sees])[0].transpose(0, 1)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_as_padded(backend, dropout_p):
    """The same sequences in (B, H, S, D) with a padding mask, the dropout mask too."""
    lengths = [7, 70, 1, 64]
    given = {name: x.requires_grad_() for name, x in tensors(lengths, lengths, torch.float32).items()}
    batch, longest = len(lengths), max(lengths)
    kept = torch.arange(longest) < torch.tensor(lengths)[:, None]

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(batch, longest, *x.shape[1:]).masked_scatter(kept[..., None, None], x)
        return padded.transpose(1, 2)

    with fastformer.backend(backend):
        torch.manual_seed(5)
        output = ops.varlen_attn(**given, **sequences(lengths, lengths), dropout_p=dropout_p)
        torch.manual_seed(5)
        padded = ops.scaled_dot_product_attention(
            *(pad(x) for x in given.values()), attn_mask=kept[:, None, None], dropout_p=dropout_p
        )
    expected = padded.transpose(1, 2)[kept]
    torch.testing.assert_close(output, expected)
    weight = torch.randn_like(output)
    gradients = [torch.autograd.grad((out * weight).sum(), given.values()) for out in (output, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_mask_is_that_of_the_reference(isa, p):
    """Equal probabilities and the identity for value. The third sequence has number 2, and positions begin at 0."""
    lengths = [3, 9, 65]
    value = torch.cat([torch.eye(length, 65) for length in lengths])[:, None].expand(-1, 2, -1)
    query = torch.zeros(sum(lengths), 2, 4)
    torch.manual_seed(5)
    output = ops.varlen_attn(query, query, value, **sequences(lengths, lengths), dropout_p=p)
    torch.manual_seed(5)
    kept = reference.attention_dropout_mask(reference.draw_seed(output.device), p, 3, 2, 65, 65)
    for i, out in enumerate(output.split(lengths)):
        n = len(out)
        expected = kept[i, :, :n, :n].transpose(0, 1) if p < 1 else torch.zeros(n, 2, n)
        assert torch.equal(out[..., :n] != 0, expected.bool()) and not out[..., n:].any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_query(dtype, kv_heads):
    lengths = [9, 20]
    given = tensors(lengths, lengths, dtype, heads=4, kv_heads=kv_heads)
    assert_varlen_close(given, (lengths, lengths), window_size=(-1, 0))


class TestStrides:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, dtype, layout):
        lengths = [9, 20]
        function = partial(ops.varlen_attn, **sequences(lengths, lengths), dropout_p=0.2)
        assert_strides_do_not_matter(function, tensors(lengths, lengths, dtype, layout=layout))

    def test_one_product_for_all_three(self):
        lengths = [9, 20]
        given = dict(zip(("query", "key", "value"), randn(29, 3, 2, 16).unbind(1), strict=True))
        assert_strides_do_not_matter(partial(ops.varlen_attn, **sequences(lengths, lengths)), given)

    def test_bounds(self):
        """Every second element of a vector."""
        lengths = [9, 20]
        given, options = tensors(lengths, lengths, torch.float32), sequences(lengths, lengths)
        expected = ops.varlen_attn(**given, **options)
        strided = torch.stack([options["cu_seq_q"], torch.full((3,), 77, dtype=torch.int32)], 1)[:, 0]
        assert not strided.is_contiguous()
        assert torch.equal(ops.varlen_attn(**given, **options | {"cu_seq_q": strided, "cu_seq_k": strided}), expected)

    def test_output_is_contiguous(self):
        given = tensors([9], [9], torch.float32)
        assert ops.varlen_attn(**given, **sequences([9], [9])).is_contiguous()


@pytest.mark.parametrize("longest", [20, 21, 1000])
def test_longest_may_be_more(longest):
    lengths = [9, 20]
    given, options = tensors(lengths, lengths, torch.float32), sequences(lengths, lengths)
    output = ops.varlen_attn(**given, **options | {"max_q": longest, "max_k": longest})
    assert torch.equal(output, ops.varlen_attn(**given, **options))


@pytest.mark.parametrize("lengths", [([], []), ([0], [0]), ([0, 0], [0, 0]), ([3, 2], [0, 4]), ([0, 2], [5, 1])])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_empty(backend, lengths, dropout_p):
    """No sequence, or one without queries or without keys, whose rows are 0."""
    given = {name: x.requires_grad_() for name, x in tensors(*lengths, torch.float32).items()}
    with fastformer.backend(backend):
        output = ops.varlen_attn(**given, **sequences(*lengths), dropout_p=dropout_p)
        gradients = torch.autograd.grad(output.sum(), given.values())
    assert output.shape == (sum(lengths[0]), 2, 16)
    for out, keys in zip(output.split(lengths[0] or [0]), lengths[1], strict=False):
        assert keys or not out.any()
    assert all(g.shape == x.shape and g.isfinite().all() for g, x in zip(gradients, given.values(), strict=True))


@pytest.mark.cpu_only  # float64
@pytest.mark.parametrize("options", [{}, {"window_size": (2, 1)}, {"dropout_p": 0.4}, {"scale": -0.7}], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_gradcheck(options, kv_heads):
    lengths = [2, 0, 3], [4, 1, 1]  # with a window, a query of the last sees no key
    given = tensors(*lengths, torch.float64, kv_heads=kv_heads)

    def function(query, key, value):
        torch.manual_seed(3)
        return ops.varlen_attn(query, key, value, **sequences(*lengths), enable_gqa=True, **options)

    assert gradcheck(function, [x.requires_grad_() for x in given.values()], fast_mode=False)


def test_nan_stays_in_its_sequence():
    lengths = [9, 20, 4]
    given, options = tensors(lengths, lengths, torch.float32), sequences(lengths, lengths)
    clean = ops.varlen_attn(**given, **options)
    given["key"][12, 1, 3] = torch.nan
    output = ops.varlen_attn(**given, **options)
    assert output[9:29, 1].isnan().all()
    clean[9:29, 1] = torch.nan
    torch.testing.assert_close(output, clean, rtol=0, atol=0, equal_nan=True)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), max_size=5),
    groups=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(("contiguous", *LAYOUTS[:4], *LAYOUTS[6:])),
    window_size=st.tuples(st.integers(-1, 30), st.integers(-1, 30)),
    dropout_p=st.sampled_from([0.0, 0.25]),
)
def test_any_call(lengths, groups, dtype, layout, window_size, dropout_p):
    torch.manual_seed(0)
    lengths_q, lengths_k = [q for q, _ in lengths], [k for _, k in lengths]
    given = tensors(lengths_q, lengths_k, dtype, heads=2 * groups, layout=layout)
    options = {"dropout_p": dropout_p} if dropout_p else {}
    assert_varlen_close(given, (lengths_q, lengths_k), slack=16, window_size=window_size, **options)


X = torch.ones(5, 2, 8)
CU = bounds([2, 3])
GIVEN = {"query": X, "key": X, "value": X, "cu_seq_q": CU, "cu_seq_k": CU, "max_q": 3, "max_k": 3}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query: expected a Tensor, got list"),
        ({"query": X.int()}, TypeError, "query: expected a floating dtype, got torch.int32"),
        ({"key": X.half()}, TypeError, "key: expected torch.float32 as query has, got torch.float16"),
        ({"cu_seq_q": CU.long()}, TypeError, "cu_seq_q: expected int32, got torch.int64"),
        ({"cu_seq_k": CU.float()}, TypeError, "cu_seq_k: expected int32, got torch.float32"),
        ({"cu_seq_k": [0, 2, 5]}, TypeError, "cu_seq_k: expected a Tensor, got list"),
        ({"cu_seq_q": CU.to("meta")}, ValueError, "cu_seq_q: expected on cpu as query is, got meta"),
        ({"query": X[None]}, ValueError, r"query: expected \(tokens, heads, head size\), got \(1, 5, 2, 8\)"),
        ({"key": X[None]}, ValueError, "query, key, value: expected the same number of dimensions"),
        ({"key": X[..., :4]}, ValueError, "key: expected query's head size"),
        ({"value": X[:4]}, ValueError, "value: expected key's shape but for the head size"),
        ({"key": X[:, :1], "value": X[:, :1]}, ValueError, "key: expected as many heads as query"),
        ({"cu_seq_q": CU[None]}, ValueError, r"cu_seq_q: expected \(batch \+ 1,\).*, got \(1, 3\)"),
        ({"cu_seq_q": CU[:0], "cu_seq_k": CU[:0]}, ValueError, r"cu_seq_q: expected \(batch \+ 1,\).*, got \(0,\)"),
        ({"cu_seq_k": CU[:2]}, ValueError, r"cu_seq_k: expected \(batch \+ 1,\) as cu_seq_q, got \(2,\)"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p: expected a probability from 0 to 1, got 1.5"),
        ({"window_size": (-5, 0)}, ValueError, r"window_size: expected .*, got \(-5, 0\)"),
    ],
)
def test_errors(raises_before_anything_runs, wrong, error, message):
    raises_before_anything_runs(partial(ops.varlen_attn, **GIVEN | wrong), error, message)


@pytest.mark.parametrize("name", ["cu_seq_q", "cu_seq_k"])
@pytest.mark.parametrize("values", [[1, 2, 5], [0, 6, 5], [0, 2, 4], [0, 2, 6], [-1, 2, 5]])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_bounds_that_do_not_fit(backend, name, values, grad):
    """The kernel would read what is not there."""
    wrong = {name: torch.tensor(values, dtype=torch.int32), "query": X.clone().requires_grad_(grad)}
    with fastformer.backend(backend), pytest.raises(RuntimeError, match=name):
        ops.varlen_attn(**GIVEN | wrong)
