from functools import partial

import eager
import pytest
import torch
from accuracy import assert_close_to_reference, assert_op_close, assert_strides_do_not_matter
from attention import SK, SQ, B, H, assert_attention_close, dense, small, tensors
from hypothesis import given
from hypothesis import strategies as st
from tensors import DTYPES, FLOATS, LAYOUTS, randn
from torch.autograd import gradcheck
from torch.nn.attention.bias import causal_lower_right

import fastformer
from fastformer import ops, reference

# (batch, heads, queries, keys, head size)
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 3, 7, 16, 17),
    (1, 2, 63, 65, 64),
    (2, 1, 64, 64, 32),
    (1, 2, 97, 130, 16),
    (3, 2, 1, 97, 64),
    (1, 1, 200, 7, 128),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(dtype, size):
    draws = 10 if size[2] * size[3] < 2000 else 1
    for window_size in ((-1, -1), (-1, 0)):
        fused = partial(ops.scaled_dot_product_attention, window_size=window_size)
        expected = partial(eager.scaled_dot_product_attention, mask=dense(None, False, window_size, *size[2:4]))
        assert_op_close(fused, expected, *(tensors(*size, size[-1], dtype) for _ in range(draws)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_size", [1, 5, 64, 80])
def test_value_of_another_head_size(dtype, value_size):
    """Here eager keeps the probabilities for the backward: more exact where few keys are seen, hence the slack."""
    given = tensors(2, 3, 33, 70, 24, value_size, dtype)
    assert_attention_close(given, is_causal=True, slack=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets(isa, dtype):
    given = tensors(2, 4, 40, 70, 33, 33, dtype, kv_heads=2)
    mask = torch.rand(2, 1, 1, 70) < 0.7
    assert_attention_close(given, mask, window_size=(50, 60), dropout_p=0.2)


@pytest.mark.cpu_only
class TestOneQueryOfManyKeys:
    """Their memory is what it waits for: the keys may be cut into parts, whose results are merged."""

    @pytest.mark.parametrize("keys", [512, 513, 1100])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_accuracy(self, isa, dtype, keys):
        cases = (4, (-1, -1), (2, 1, 1)), (2, (-1, 0), (1, 4, 1)), (4, (700, 0), (2, 4, 1))
        for kv_heads, window_size, shape in cases:
            given = tensors(2, 4, 1, keys, 16, 24, dtype, kv_heads=kv_heads)
            for mask in (None, torch.rand(*shape, keys) < 0.7):
                output = ops.scaled_dot_product_attention(
                    **given, attn_mask=mask, window_size=window_size, enable_gqa=True
                )
                whole, doubles = (
                    dense(mask, False, window_size, 1, keys),
                    {name: x.double() for name, x in given.items()},
                )
                expected = (eager.scaled_dot_product_attention(**x, mask=whole) for x in (given, doubles))
                assert_close_to_reference(output, *expected)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_keys_that_are_masked_change_nothing(self, dtype):
        """As many as make parts of their own; and where none is left the output is 0."""
        query, key, value = randn(2, 3, 1, 8, dtype=dtype), *(randn(2, 3, 1300, 8, dtype=dtype) for _ in range(2))
        keep = torch.zeros(2, 1, 1, 1300, dtype=torch.bool)
        keep[0, ..., :600] = True
        for mask in (keep, torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)):
            output = ops.scaled_dot_product_attention(query, key, value, mask)
            alone = ops.scaled_dot_product_attention(query[:1], key[:1, :, :600], value[:1, :, :600])
            assert torch.equal(output[:1], alone) and not output[1].any()

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_threads_and_batches_give_the_same_bits(self, dtype):
        given = [randn(3, 2, n, 8, dtype=dtype) for n in (1, 1300, 1300)]
        outputs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append(ops.scaled_dot_product_attention(*given))
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
        for i in range(3):
            assert torch.equal(ops.scaled_dot_product_attention(*(x[i : i + 1] for x in given)), outputs[0][i : i + 1])

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_bad_values_are_not_lost(self, bad):
        query, key, value = randn(1, 1, 1, 8), randn(1, 1, 1300, 8), randn(1, 1, 1300, 8)
        key[..., 600, :] = bad
        expected = eager.scaled_dot_product_attention(query, key, value)
        assert torch.equal(ops.scaled_dot_product_attention(query, key, value).isnan(), expected.isnan())


class TestGroupedQuery:
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_accuracy(self, dtype, kv_heads):
        assert_attention_close(tensors(2, 4, 20, 33, 8, 8, dtype, kv_heads=kv_heads), is_causal=True)

    @pytest.mark.parametrize("dims", [3, 5])
    def test_leading_dimensions(self, dims):
        four = tensors(2, 4, SQ, SK, 8, 8, torch.float32, kv_heads=2)
        expected = ops.scaled_dot_product_attention(**four, enable_gqa=True)
        given = {name: x[0] if dims == 3 else x[:, None] for name, x in four.items()}
        output = ops.scaled_dot_product_attention(**given, enable_gqa=True)
        assert torch.equal(output, expected[0] if dims == 3 else expected[:, None])

    def test_dropout_is_of_the_query_head(self):
        torch.manual_seed(5)
        output = ops.scaled_dot_product_attention(
            torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, SK, 8), torch.eye(SK).expand(1, 2, SK, SK),
            dropout_p=0.5, enable_gqa=True,
        )  # fmt: skip
        torch.manual_seed(5)
        kept = reference.attention_dropout_mask(reference.draw_seed(output.device), 0.5, 1, 4, 3, SK)
        assert torch.equal(output != 0, kept)


class TestStrides:
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, dtype, layout):
        given = {name: randn(*x.shape, dtype=dtype, layout=layout) for name, x in small(dtype).items()}
        assert_strides_do_not_matter(partial(ops.scaled_dot_product_attention, is_causal=True, dropout_p=0.2), given)

    def test_one_product_for_all_three(self):
        """(B, S, 3, H, D) in memory, as a model's one projection for query, key and value gives it."""
        qkv = randn(B, SK, 3, H, 8)
        given = dict(zip(("query", "key", "value"), qkv.permute(2, 0, 3, 1, 4), strict=True))
        assert_strides_do_not_matter(ops.scaled_dot_product_attention, given)

    def test_output_is_laid_out_for_the_next_product(self):
        """(..., Sq, H, Dv) in memory: merging the heads copies nothing; so do the gradients."""
        given = {name: x.requires_grad_() for name, x in small().items()}
        output = ops.scaled_dot_product_attention(**given)
        assert output.transpose(1, 2).is_contiguous()
        gradients = torch.autograd.grad(output.sum(), given.values())
        assert all(g.transpose(1, 2).is_contiguous() for g in gradients)


@pytest.mark.parametrize("scale", [None, 1.0, 0.3, 2, 0.0, -0.5])
@pytest.mark.parametrize("dtype", FLOATS)
def test_scale(dtype, scale):
    assert_attention_close(small(dtype), scale=scale)


@pytest.mark.parametrize("size", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (2, 2, 0, 0)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.3}])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_empty(backend, size, options):
    given = {name: x.requires_grad_() for name, x in tensors(*size, 8, 10, torch.float32).items()}
    with fastformer.backend(backend):
        output = ops.scaled_dot_product_attention(**given, **options)
        gradients = torch.autograd.grad(output.sum(), given.values())
    assert output.shape == (*size[:3], 10) and not output.any()  # without keys: rows of 0
    assert all(g.shape == x.shape and not g.any() for g, x in zip(gradients, given.values(), strict=True))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0, 3, 8), (2, 0, 3, 4, 8), (2, 2, 3, 0, 8)])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_empty_of_any_dimensions(backend, shape):
    x = torch.randn(shape)
    with fastformer.backend(backend):
        assert ops.scaled_dot_product_attention(x, x, x).shape == shape


class TestDropout:
    @pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
    @pytest.mark.parametrize("keys", [1, 16, 63, 64, 65, 130])
    def test_mask_is_that_of_the_reference(self, isa, p, keys):
        """Equal probabilities and the identity for value: the output is the mask."""
        queries = 35
        torch.manual_seed(5)
        output = ops.scaled_dot_product_attention(
            torch.zeros(2, 3, queries, 4),
            torch.zeros(2, 3, keys, 4),
            torch.eye(keys).expand(2, 3, keys, keys),
            dropout_p=p,
        )
        torch.manual_seed(5)
        kept = reference.attention_dropout_mask(reference.draw_seed(output.device), p, 2, 3, queries, keys)
        if p == 1:
            assert not output.any()
        else:
            assert torch.equal(output != 0, kept)
            torch.testing.assert_close(output[kept], torch.full_like(output[kept], 1 / keys / (1 - p)))

    @pytest.mark.parametrize("p", [0.3, 1.0])
    def test_backward_has_the_same_mask(self, isa, p):
        """The gradient of value for an identity is the transpose of the dropped probabilities."""
        torch.manual_seed(5)
        value = torch.eye(40).expand(2, 3, 40, 40).clone().requires_grad_()
        output = ops.scaled_dot_product_attention(
            torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40, 8), value, dropout_p=p
        )
        (gradient,) = torch.autograd.grad(output, value, torch.eye(40).expand(2, 3, 40, 40))
        torch.testing.assert_close(gradient, output.detach().mT)
        assert torch.equal(gradient != 0, output.mT != 0)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
    def test_accuracy(self, dtype, p):
        assert_attention_close(tensors(2, 2, 33, 70, 16, 16, dtype), dropout_p=p)

    def test_seeds(self):
        call = partial(ops.scaled_dot_product_attention, **small(), dropout_p=0.5)
        torch.manual_seed(5)
        first, second = call(), call()
        torch.manual_seed(5)
        assert torch.equal(call(), first)
        assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"window_size": (2, 1)},
        {"scale": 0.7},
        {"attn_mask": torch.arange(5) < 4},
        {"attn_mask": torch.arange(15).view(3, 5) % 5 > 1},
        {"attn_mask": torch.tensor([[True] * 5, [False] * 5, [True] * 5])},
        {"attn_mask": torch.linspace(-1, 1, 15).view(3, 5)},
        {"dropout_p": 0.4},
        {"dropout_p": 0.4, "is_causal": True},
    ],
    ids=str,
)
@pytest.mark.cpu_only  # float64
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_gradcheck(options, kv_heads):
    given = tensors(2, 2, 3, 5, 4, 6, torch.float64, kv_heads=kv_heads)

    def function(query, key, value):
        torch.manual_seed(3)
        return ops.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)

    assert gradcheck(function, [x.requires_grad_() for x in given.values()])


@pytest.mark.parametrize("wanted", ["query", "key", "value"])
def test_one_gradient_alone(wanted):
    given = small()
    given[wanted].requires_grad_()
    ops.scaled_dot_product_attention(**given).square().sum().backward()
    alone = given[wanted].grad
    for x in given.values():
        x.grad = None
        x.requires_grad_()
    ops.scaled_dot_product_attention(**given).square().sum().backward()
    assert torch.equal(alone, given[wanted].grad)


class TestNotFinite:
    def test_nan_in_a_query(self):
        given = small()
        clean = ops.scaled_dot_product_attention(**given)
        given["query"][1, 2, 3, 4] = torch.nan
        output = ops.scaled_dot_product_attention(**given)
        assert output[1, 2, 3].isnan().all()
        assert torch.equal(output.isnan().any(-1).nonzero(), torch.tensor([[1, 2, 3]]))
        clean[1, 2, 3] = torch.nan
        torch.testing.assert_close(output, clean, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("name", ["key", "value"])
    def test_nan_in_a_key(self, name):
        """Every query that sees it gets it, no other: causal, from the fifth on."""
        given = small()
        given[name][1, 2, 4] = torch.nan
        output = ops.scaled_dot_product_attention(**given, is_causal=True)
        nan = output.isnan()
        assert nan[1, 2, 4:].all()
        assert nan.sum() == nan[1, 2, 4:].numel()

    def test_nan_in_a_float_mask(self):
        mask = torch.zeros(SQ, SK)
        mask[3, 5] = torch.nan
        output = ops.scaled_dot_product_attention(**small(), attn_mask=mask)
        assert output[:, :, 3].isnan().all() and output.isnan().sum() == output[:, :, 3].numel()

    def test_gradients(self):
        given = {name: x.requires_grad_() for name, x in small().items()}
        with torch.no_grad():
            given["query"][1, 2, 3, 4] = torch.nan
        gradients = torch.autograd.grad(ops.scaled_dot_product_attention(**given).sum(), given.values())
        assert gradients[0][1, 2, 3].isnan().all() and all(g[1, 2].isnan().any() for g in gradients)
        others = [g[0] for g in gradients]
        assert all(g.isfinite().all() for g in others)


@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 2, 80, 80, 40, 40))),
    groups=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(("contiguous", *LAYOUTS[:4], *LAYOUTS[6:])),
    is_causal=st.booleans(),
    left=st.integers(-1, 30),
    right=st.integers(-1, 30),
    mask=st.sampled_from([None, "bool", "float"]),
    broadcast=st.sets(st.integers(0, 2)),
    dropout_p=st.sampled_from([0.0, 0.25]),
)
def test_any_call(sizes, groups, dtype, layout, is_causal, left, right, mask, broadcast, dropout_p):
    torch.manual_seed(0)
    batch, heads, queries, keys, size, value_size = sizes
    shapes = {"query": (heads * groups, queries, size), "key": (heads, keys, size), "value": (heads, keys, value_size)}
    given = {name: randn(batch, *shape, dtype=dtype, layout=layout) for name, shape in shapes.items()}
    attn_mask = None
    if mask:
        full = (batch, heads * groups, queries, keys)
        attn_mask = torch.randn([1 if i in broadcast else n for i, n in enumerate(full)]).to(dtype)
        attn_mask = attn_mask < 0.5 if mask == "bool" else attn_mask
    assert_attention_close(given, attn_mask, is_causal, (left, right), dropout_p, slack=16)


Q = torch.ones(2, 3, 4, 8)
K = torch.ones(2, 3, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], K, K), {}, TypeError, "query: expected a Tensor, got list"),
        ((Q.int(), K, K), {}, TypeError, "query: expected a floating dtype, got torch.int32"),
        ((Q, K.half(), K), {}, TypeError, "key: expected torch.float32 as query has, got torch.float16"),
        ((Q, K, K.double()), {}, TypeError, "value: expected torch.float32 as query has, got torch.float64"),
        (
            (Q, K, K),
            {"attn_mask": torch.ones(4, 5).int()},
            TypeError,
            "attn_mask: expected bool or a floating dtype, got",
        ),
        ((Q, K.to("meta"), K), {}, ValueError, "key: expected on cpu as query is, got meta"),
        ((Q, K[0], K[0]), {}, ValueError, "query, key, value: expected the same number of dimensions"),
        ((Q[0, 0, 0], Q[0, 0, 0], Q[0, 0, 0]), {}, ValueError, "expected the same number of dimensions, at least 2"),
        ((Q, K[..., :7], K), {}, ValueError, "key: expected query's head size"),
        ((Q[..., :0], K[..., :0], K), {}, ValueError, "key: expected query's head size, at least 1"),
        ((Q, K, K[:, :, :4]), {}, ValueError, "value: expected key's shape but for the head size"),
        ((Q, K[:1], K[:1]), {}, ValueError, "key: expected query's leading dimensions"),
        ((Q, K[:, :1], K[:, :1]), {}, ValueError, r"key: expected as many heads as query \(or enable_gqa=True\)"),
        (
            (Q, K[:, :2], K[:, :2]),
            {"enable_gqa": True},
            ValueError,
            "key: expected a number of heads that divides query's",
        ),
        (
            (Q, K[:, :0], K[:, :0]),
            {"enable_gqa": True},
            ValueError,
            "key: expected a number of heads that divides query's",
        ),
        ((Q, K, K), {"attn_mask": torch.ones(5, 4).bool()}, ValueError, r"attn_mask: .* \(2, 3, 4, 5\), got \(5, 4\)"),
        ((Q, K, K), {"attn_mask": torch.ones(3, 1, 1, 5)}, ValueError, r"attn_mask: .* got \(3, 1, 1, 5\)"),
        ((Q, K, K), {"attn_mask": torch.ones(1, 2, 3, 4, 5)}, ValueError, r"attn_mask: .* got \(1, 2, 3, 4, 5\)"),
        ((Q, K, K), {"attn_mask": causal_lower_right(4, 6)}, ValueError, r"attn_mask: .* \(4, 5\), got \(4, 6\)"),
        ((Q, K, K), {"attn_mask": torch.ones(4, 5, device="meta")}, ValueError, "attn_mask: expected on cpu"),
        ((Q, K, K), {"dropout_p": -0.5}, ValueError, "dropout_p: expected a probability from 0 to 1, got -0.5"),
        ((Q, K, K), {"window_size": (-2, 0)}, ValueError, r"window_size: expected \(left, right\), .*, got \(-2, 0\)"),
        ((Q, K, K), {"window_size": (1, 2, 3)}, ValueError, r"window_size: expected .*, got \(1, 2, 3\)"),
        ((Q, K, K), {"window_size": 3}, ValueError, r"window_size: expected .*, got 3"),
    ],
)
def test_errors(raises_before_anything_runs, arguments, options, error, message):
    raises_before_anything_runs(partial(ops.scaled_dot_product_attention, *arguments, **options), error, message)
