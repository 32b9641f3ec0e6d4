from functools import partial

import eager
import pytest
import torch
from accuracy import assert_op_close, assert_strides_do_not_matter
from hypothesis import given
from hypothesis import strategies as st
from tensors import DTYPES, FLOATS, LAYOUTS, randn
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastformer
from fastformer import ops, reference

# (batch, heads, queries, keys, head size, head size of value)
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 7, 16, 17, 5),
    (1, 2, 63, 65, 64, 64),
    (2, 1, 64, 64, 32, 32),
    (1, 2, 97, 130, 16, 24),
    (3, 2, 1, 97, 64, 64),
    (1, 1, 200, 7, 8, 128),
]
B, H, SQ, SK = 4, 6, 9, 11  # of the tests of masks


def tensors(
    batch: int, heads: int, queries: int, keys: int, size: int, value_size: int, dtype: torch.dtype, kv_heads: int = 0
) -> dict[str, Tensor]:
    return {
        "query": randn(batch, heads, queries, size, dtype=dtype),
        "key": randn(batch, kv_heads or heads, keys, size, dtype=dtype),
        "value": randn(batch, kv_heads or heads, keys, value_size, dtype=dtype),
    }


def small(dtype: torch.dtype = torch.float32, **options: int) -> dict[str, Tensor]:
    return tensors(B, H, SQ, SK, 8, 10, dtype, **options)


def dense(mask: Tensor | None, is_causal: bool, window_size: tuple[int, int], queries: int, keys: int) -> Tensor | None:
    """One mask for all that hides a key, as eager PyTorch wants it."""
    kept = eager.visible(queries, keys, is_causal, window_size)
    if mask is None:
        return None if kept.all() else kept
    return mask & kept if mask.dtype == torch.bool else mask.masked_fill(~kept, -torch.inf)


def assert_attention_close(
    given: dict[str, Tensor],
    mask: Tensor | None = None,
    is_causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    dropout_p: float = 0.0,
    scale: float | None = None,
    slack: int = 0,
) -> None:
    fused = partial(
        ops.scaled_dot_product_attention, attn_mask=mask, is_causal=is_causal, window_size=window_size,
        dropout_p=dropout_p, scale=scale, enable_gqa=True,
    )  # fmt: skip
    whole = dense(mask, is_causal, window_size, given["query"].shape[-2], given["key"].shape[-2])
    expected = partial(eager.scaled_dot_product_attention, mask=whole, dropout_p=dropout_p, scale=scale)
    assert_op_close(fused, expected, given, slack=slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(dtype, size):
    draws = 10 if size == SIZES[0] else 1
    for window_size in ((-1, -1), (-1, 0)):
        fused = partial(ops.scaled_dot_product_attention, window_size=window_size)
        expected = partial(eager.scaled_dot_product_attention, mask=dense(None, False, window_size, *size[2:4]))
        assert_op_close(fused, expected, *(tensors(*size, dtype) for _ in range(draws)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets(isa, dtype):
    given = tensors(2, 4, 40, 70, 33, 20, dtype, kv_heads=2)
    mask = torch.rand(2, 1, 1, 70) < 0.7
    assert_attention_close(given, mask, window_size=(50, 60), dropout_p=0.2)


MASK_SHAPES = [
    (SK,), (1, SK), (SQ, 1), (SQ, SK), (1, 1, SK), (H, 1, SK), (1, SQ, SK), (H, SQ, SK),
    (1, 1, 1, SK), (B, 1, 1, SK), (1, H, 1, SK), (B, 1, SQ, SK), (B, H, SQ, 1), (B, H, SQ, SK), (1, 1, 1, 1), (),
]  # fmt: skip


class TestMasks:
    @pytest.mark.parametrize("shape", MASK_SHAPES)
    @pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window_size": (3, 4)}])
    def test_bool(self, shape, options):
        assert_attention_close(small(), torch.rand(shape) < 0.7, **options)

    @pytest.mark.parametrize("shape", MASK_SHAPES)
    @pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window_size": (3, 4)}])
    def test_float(self, shape, options):
        assert_attention_close(small(), torch.randn(shape), **options)

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("lowest", ["-inf", "min"])
    def test_additive_padding(self, dtype, lowest):
        """As transformers writes it: 0 for a key, the lowest number or -inf for padding."""
        value = -torch.inf if lowest == "-inf" else torch.finfo(dtype).min
        mask = torch.zeros(B, 1, 1, SK, dtype=dtype)
        mask[0, ..., 6:] = value
        given = small(dtype)
        assert_attention_close(given, mask)
        with torch.no_grad():
            padded = ops.scaled_dot_product_attention(**given, attn_mask=mask)
            kept = ops.scaled_dot_product_attention(**given, attn_mask=mask == 0)
        assert torch.equal(padded, kept)

    @pytest.mark.parametrize("mask_dtype", DTYPES)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    def test_float_mask_of_another_dtype(self, backend, dtype, mask_dtype):
        given, mask = small(dtype), torch.randn(SQ, SK).to(mask_dtype)
        with fastformer.backend(backend), torch.no_grad():
            output = ops.scaled_dot_product_attention(**given, attn_mask=mask)
        exact = eager.scaled_dot_product_attention(*(x.double() for x in given.values()), mask.double())
        tolerance = max(torch.finfo(dtype).eps, 0 if backend == "cpu" else torch.finfo(mask_dtype).eps)
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), exact, rtol=0, atol=8 * tolerance)

    @pytest.mark.parametrize("kind", ["bool", "float"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strides(self, kind, layout):
        dtype = torch.bool if kind == "bool" else torch.float32
        mask = randn(B, H, SQ, SK, dtype=dtype, layout=layout)
        given = {name: x.requires_grad_() for name, x in small().items()}
        output, expected = (ops.scaled_dot_product_attention(**given, attn_mask=m) for m in (mask, mask.contiguous()))
        assert torch.equal(output, expected)
        gradients, others = (torch.autograd.grad(out.square().sum(), given.values()) for out in (output, expected))
        assert all(torch.equal(x, y) for x, y in zip(gradients, others, strict=True))

    def test_mask_stays(self):
        for mask in (torch.rand(SQ, SK) < 0.5, torch.randn(SQ, SK)):
            before = mask.clone()
            ops.scaled_dot_product_attention(**small(), attn_mask=mask)
            assert torch.equal(mask, before)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
class TestRowsWithoutKeys:
    """Such a row gives 0 and gradients of 0, and leaves the other rows alone."""

    @pytest.mark.parametrize("form", ["bool", "float", "bool of one sequence", "window", "causal and mask"])
    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    def test_zero(self, backend, form, dropout_p):
        given = {name: x.requires_grad_() for name, x in small().items()}
        mask, options = torch.ones(B, 1, SQ, SK, dtype=torch.bool), {}
        if form == "bool of one sequence":
            mask[1] = False
        elif form == "window":  # aligned to the bottom right: with 11 keys, only what lies 5 left of the diagonal
            given["key"], given["value"] = (given[name].detach()[..., :4, :].requires_grad_() for name in ("key", "value"))
            mask, options = None, {"window_size": (-1, 0)}
        elif form == "causal and mask":
            mask[..., :3], options = False, {"is_causal": True}
        else:
            mask[..., 2:5, :] = False
        keys = given["key"].shape[-2]
        empty = ~dense(mask, options.get("is_causal", False), options.get("window_size", (-1, -1)), SQ, keys).any(-1)
        if form == "float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        with fastformer.backend(backend):
            output = ops.scaled_dot_product_attention(**given, attn_mask=mask, dropout_p=dropout_p, **options)
        empty = empty.expand(output.shape[:-1])
        assert empty.any() and not output[empty].any()
        assert output.isfinite().all() and output[~empty].any(-1).sum() > 0.5 * (~empty).sum()
        gradients = torch.autograd.grad(output, given.values(), torch.randn_like(output))
        assert all(g.isfinite().all() for g in gradients)
        assert not gradients[0][empty].any()

    def test_equals_torch_elsewhere(self, backend):
        given = small()
        mask = torch.ones(SQ, SK, dtype=torch.bool)
        mask[3] = False
        with fastformer.backend(backend):
            output = ops.scaled_dot_product_attention(**given, attn_mask=mask)
        expected = eager.scaled_dot_product_attention(**given)
        others = torch.arange(SQ) != 3
        torch.testing.assert_close(output[:, :, others], expected[:, :, others])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
class TestCausalBias:
    @pytest.mark.parametrize(("queries", "keys"), [(9, 9), (4, 9), (9, 4), (1, 9)])
    def test_upper_left(self, backend, queries, keys):
        given = tensors(B, H, queries, keys, 8, 8, torch.float32)
        with fastformer.backend(backend):
            output = ops.scaled_dot_product_attention(**given, attn_mask=causal_upper_left(queries, keys))
            assert torch.equal(output, ops.scaled_dot_product_attention(**given, is_causal=True))
        torch.testing.assert_close(
            output, eager.scaled_dot_product_attention(**given, mask=torch.ones(queries, keys).tril().bool())
        )

    @pytest.mark.parametrize(("queries", "keys"), [(9, 9), (4, 9), (1, 9)])
    def test_lower_right(self, backend, queries, keys):
        given = tensors(B, H, queries, keys, 8, 8, torch.float32)
        with fastformer.backend(backend):
            output = ops.scaled_dot_product_attention(**given, attn_mask=causal_lower_right(queries, keys))
        mask = torch.ones(queries, keys).tril(keys - queries).bool()
        torch.testing.assert_close(output, eager.scaled_dot_product_attention(**given, mask=mask))

    def test_with_window(self, backend):
        given = tensors(B, H, 6, 9, 8, 8, torch.float32)
        with fastformer.backend(backend):
            output = ops.scaled_dot_product_attention(**given, attn_mask=causal_lower_right(6, 9), window_size=(2, 2))
        mask = eager.visible(6, 9, window_size=(2, 0))
        torch.testing.assert_close(output, eager.scaled_dot_product_attention(**given, mask=mask))

    def test_two_dimensions(self, backend):
        given = {name: x[0, 0] for name, x in tensors(1, 1, 6, 9, 8, 8, torch.float32).items()}
        with fastformer.backend(backend):
            output = ops.scaled_dot_product_attention(**given, attn_mask=causal_lower_right(6, 9))
        mask = torch.ones(6, 9).tril(3).bool()
        torch.testing.assert_close(output, torch.nn.functional.scaled_dot_product_attention(**given, attn_mask=mask))


@pytest.mark.parametrize(("is_causal", "window_size"), [
    (False, (0, 0)), (False, (3, -1)), (False, (-1, 2)), (False, (2, 3)), (False, (100, 100)), (False, (-1, 0)),
    (True, (-1, -1)), (True, (4, -1)), (True, (2, 3)),
])  # fmt: skip
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 12), (1, 12), (70, 80)])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_windows(backend, queries, keys, is_causal, window_size):
    """As aligned in the docstrings, key by key; rows without any are tested above."""
    given = tensors(1, 2, queries, keys, 8, 8, torch.float32)
    with fastformer.backend(backend):
        output = ops.scaled_dot_product_attention(**given, is_causal=is_causal, window_size=window_size)
    kept = eager.visible(queries, keys, is_causal, window_size)
    expected = eager.scaled_dot_product_attention(**given, mask=kept | ~kept.any(-1, keepdim=True))
    torch.testing.assert_close(output, expected * kept.any(-1, keepdim=True))


class TestLeadingDimensions:
    @pytest.mark.parametrize("leading", [(), (6,), (2, 3, 4), (2, 1, 3, 2)])
    @pytest.mark.parametrize("options", [{}, {"is_causal": True, "dropout_p": 0.3}])
    def test_as_four(self, leading, options):
        """No, one, three or four leading dimensions give what (B, H, S, D) gives, the dropout mask too."""
        heads = leading[-1] if leading else 1
        four = tensors(max(torch.Size(leading[:-1]).numel(), 1), heads, SQ, SK, 8, 10, torch.float32)
        given = {name: x.reshape(*leading, *x.shape[-2:]).requires_grad_() for name, x in four.items()}
        torch.manual_seed(5)
        output = ops.scaled_dot_product_attention(**given, **options)
        torch.manual_seed(5)
        expected = ops.scaled_dot_product_attention(**four, **options)
        assert output.shape == (*leading, SQ, 10)
        assert torch.equal(output.reshape(expected.shape), expected)
        gradients = torch.autograd.grad(output.sum(), given.values())
        assert [g.shape for g in gradients] == [x.shape for x in given.values()]

    @pytest.mark.parametrize("leading", [(), (3,), (2, 2, 3)])
    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    def test_as_the_reference(self, leading, dropout_p):
        given = {
            "query": randn(*leading, SQ, 8), "key": randn(*leading, SK, 8), "value": randn(*leading, SK, 10),
        }  # fmt: skip
        torch.manual_seed(5)
        output = ops.scaled_dot_product_attention(**given, dropout_p=dropout_p)
        torch.manual_seed(5)
        if not leading:
            given = {name: x[None] for name, x in given.items()}
            output = output[None]
        torch.testing.assert_close(output, reference.scaled_dot_product_attention(**given, dropout_p=dropout_p))

    @pytest.mark.parametrize(
        "shape", [(SK,), (SQ, SK), (H, 1, SK), (4, 1, 1, SK), (B, 1, 1, 1, SK), (1, 4, 1, 1, SK), (B, 4, H, SQ, SK)]
    )
    @pytest.mark.parametrize("kind", ["bool", "float"])
    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    def test_masks_of_five(self, backend, kind, shape):
        given = {name: x.view(B, 4, *x.shape[1:]) for name, x in tensors(4 * B, H, SQ, SK, 8, 8, torch.float32).items()}
        mask = torch.randn(shape)
        if kind == "bool":
            mask = mask < 0.5
            mask[..., 0] = True
        with fastformer.backend(backend):
            output = ops.scaled_dot_product_attention(**given, attn_mask=mask)
        whole = mask.expand(B, 4, H, SQ, SK).flatten(0, 1)
        expected = eager.scaled_dot_product_attention(**{name: x.flatten(0, 1) for name, x in given.items()}, mask=whole)
        torch.testing.assert_close(output.flatten(0, 1), expected)

    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_masks_of_three_and_two(self, kind):
        given = {name: x[0] for name, x in small().items()}
        for shape in ((SK,), (SQ, SK), (H, 1, SK), (H, SQ, SK)):
            mask = torch.randn(shape)
            if kind == "bool":
                mask = mask < 0.5
                mask[..., 0] = True
            output = ops.scaled_dot_product_attention(**given, attn_mask=mask)
            expected = eager.scaled_dot_product_attention(
                **{name: x[None] for name, x in given.items()}, mask=mask.expand(1, H, SQ, SK)
            )
            torch.testing.assert_close(output[None], expected)
            if mask.dim() < 3:
                alone = ops.scaled_dot_product_attention(*(x[0] for x in given.values()), attn_mask=mask)
                assert torch.equal(alone, output[0])


class TestGroupedQuery:
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_accuracy(self, dtype, kv_heads):
        assert_attention_close(tensors(2, 4, SQ, SK, 8, 10, dtype, kv_heads=kv_heads), is_causal=True)

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
            torch.zeros(2, 3, queries, 4), torch.zeros(2, 3, keys, 4), torch.eye(keys).expand(2, 3, keys, keys), dropout_p=p
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
        output = ops.scaled_dot_product_attention(torch.randn(2, 3, 40, 8), torch.randn(2, 3, 40, 8), value, dropout_p=p)
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


class TestMaskThatWantsAGradient:
    def test_torch_gives_it(self):
        """No kernel does: plain PyTorch takes the call, says so, and the gradient is right."""
        given = {name: x.requires_grad_() for name, x in small(torch.float64).items()}
        mask = torch.randn(1, H, SQ, SK, dtype=torch.float64, requires_grad=True)  # ALiBi, relative positions
        with fastformer.backend("cpu"), pytest.warns(UserWarning, match="cpu: gives no gradient for attn_mask"):
            output = ops.scaled_dot_product_attention(**given, attn_mask=mask)
        (gradient,) = torch.autograd.grad(output.square().sum(), mask)
        expected = eager.scaled_dot_product_attention(**given, mask=mask)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), mask)[0])

    def test_strict_raises(self):
        mask = torch.randn(SQ, SK, requires_grad=True)
        with pytest.raises(NotImplementedError, match="cpu: gives no gradient for attn_mask"):
            ops.scaled_dot_product_attention(**small(), attn_mask=mask)

    def test_kernels_without_gradients(self, recorder):
        mask = torch.randn(SQ, SK, requires_grad=True)
        with torch.no_grad(), recorder:
            ops.scaled_dot_product_attention(**small(), attn_mask=mask)
        assert "fastformer_cpu::scaled_dot_product_attention" in recorder.names()


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
        ((Q, K, K), {"attn_mask": torch.ones(4, 5).int()}, TypeError, "attn_mask: expected bool or a floating dtype, got"),
        ((Q, K.to("meta"), K), {}, ValueError, "key: expected on cpu as query is, got meta"),
        ((Q, K[0], K[0]), {}, ValueError, "query, key, value: expected the same number of dimensions"),
        ((Q[0, 0, 0], Q[0, 0, 0], Q[0, 0, 0]), {}, ValueError, "expected the same number of dimensions, at least 2"),
        ((Q, K[..., :7], K), {}, ValueError, "key: expected query's head size"),
        ((Q[..., :0], K[..., :0], K), {}, ValueError, "key: expected query's head size, at least 1"),
        ((Q, K, K[:, :, :4]), {}, ValueError, "value: expected key's shape but for the head size"),
        ((Q, K[:1], K[:1]), {}, ValueError, "key: expected query's leading dimensions"),
        ((Q, K[:, :1], K[:, :1]), {}, ValueError, r"key: expected as many heads as query \(or enable_gqa=True\)"),
        ((Q, K[:, :2], K[:, :2]), {"enable_gqa": True}, ValueError, "key: expected a number of heads that divides query's"),
        ((Q, K[:, :0], K[:, :0]), {"enable_gqa": True}, ValueError, "key: expected a number of heads that divides query's"),
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
