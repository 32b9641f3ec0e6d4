"""scaled_dot_product_attention: everything that hides a key from a query, and leading dimensions."""

import eager
import pytest
import torch
from attention import SK, SQ, B, H, assert_attention_close, dense, small, tensors
from tensors import BACKEND, DTYPES, FLOATS, LAYOUTS, randn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastformer
from fastformer import backends, ops, reference

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
            given["key"], given["value"] = (
                given[name].detach()[..., :4, :].requires_grad_() for name in ("key", "value")
            )
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
        expected = eager.scaled_dot_product_attention(
            **{name: x.flatten(0, 1) for name, x in given.items()}, mask=whole
        )
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


class TestMaskThatWantsAGradient:
    def test_torch_gives_it(self, monkeypatch):
        """No kernel does: plain PyTorch takes the call, says so, and the gradient is right."""
        monkeypatch.setattr(backends, "_said", set())
        given = {name: x.requires_grad_() for name, x in small().items()}
        mask = torch.randn(1, H, SQ, SK, requires_grad=True)  # ALiBi, relative positions
        with (
            fastformer.backend(BACKEND),
            pytest.warns(UserWarning, match=f"{BACKEND}: gives no gradient for attn_mask"),
        ):
            output = ops.scaled_dot_product_attention(**given, attn_mask=mask)
        (gradient,) = torch.autograd.grad(output.square().sum(), mask)
        expected = eager.scaled_dot_product_attention(**given, mask=mask)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), mask)[0])

    def test_strict_raises(self):
        mask = torch.randn(SQ, SK, requires_grad=True)
        with pytest.raises(NotImplementedError, match=f"{BACKEND}: gives no gradient for attn_mask"):
            ops.scaled_dot_product_attention(**small(), attn_mask=mask)

    def test_kernels_without_gradients(self, recorder):
        mask = torch.randn(SQ, SK, requires_grad=True)
        with torch.no_grad(), recorder:
            ops.scaled_dot_product_attention(**small(), attn_mask=mask)
        assert f"fastformer_{BACKEND}::scaled_dot_product_attention" in recorder.names()
