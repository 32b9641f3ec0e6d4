"""nn.MultiheadAttention and nn.LayerNorm."""

import copy

import pytest
import torch
from accelerated.small import assert_agrees, spread
from accelerated.small_torch import (
    LAYOUTS,
    MASKS,
    MODES,
    PADDING,
    SIZES,
    B,
    L,
    S,
    masks_of,
    no_first,
    randn,
    results_of,
    sequence,
    typed,
)
from torch import Tensor, nn

import fastformer
from fastformer import backends, library

pytestmark = [
    pytest.mark.skipif(not library.available(), reason="needs the op library"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:fastformer.accelerate.*no instructions for 8-bit"),
]


class TestMultiheadAttention:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("kind", ["self", "memory", "three inputs"])
    @pytest.mark.parametrize("sizes", SIZES)
    def test_as_in_torch(self, sizes, kind, layout, mask, mode):
        (width, heads), queries = SIZES[sizes], S if kind == "self" else L
        module = spread(nn.MultiheadAttention(width, heads, batch_first=layout == "batch first"))
        inputs = [sequence(S if i else queries, width, layout, seed=i) for i in range(3)]
        masks = masks_of(mask, heads, queries, layout)

        def call(m: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            given = {n: typed(x, query.dtype) if isinstance(x, Tensor) else x for n, x in masks.items()}
            if kind == "self":
                key = value = query
            elif kind == "memory":
                value = key
            return m(query, key, value, need_weights=False, **given)[0]

        used = {"self": 1, "memory": 2, "three inputs": 3}[kind]
        run = lambda m, *xs: call(m, *xs, *inputs[used:])  # noqa: E731
        assert_agrees(module, results_of(run, inputs[:used], mode))

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_dtypes(self, dtype, mode):
        module = spread(nn.MultiheadAttention(64, 4, batch_first=True))

        def call(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return m(x, y, y, PADDING, need_weights=False)[0]

        inputs = [sequence(n, 64, "batch first").to(dtype) for n in (L, S)]
        assert_agrees(module, results_of(call, inputs, mode), dtype)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("options", [{"bias": False}, {"kdim": 20, "vdim": 24}, {"kdim": 20, "bias": False}])
    def test_options(self, options, mode):
        module = spread(nn.MultiheadAttention(64, 4, **options))
        widths = 64, options.get("kdim", 64), options.get("vdim", 64)
        inputs = [sequence(S if i else L, width, "sequence first", i) for i, width in enumerate(widths)]
        assert_agrees(module, results_of(lambda m, *xs: m(*xs, PADDING, need_weights=False)[0], inputs, mode))

    def test_a_padding_mask_is_never_materialized(self, recorder):
        module = fastformer.accelerate(nn.MultiheadAttention(64, 4, batch_first=True))
        x = randn(B, S, 64)
        for grad in (False, True):
            with torch.set_grad_enabled(grad), recorder:
                module(x, x, x, PADDING, need_weights=False)
        calls = [args for func, args in recorder.calls if func.name().endswith("::scaled_dot_product_attention")]
        assert len(calls) == 2
        for args in calls:
            assert args[3].dtype == torch.bool and args[3].shape == (B, 4, S, S) and args[3].stride()[1:3] == (0, 0)

    def test_the_mask_decides_where_the_hint_is_wrong(self):
        """Beside a padding mask, as in torch."""
        module, mask = nn.MultiheadAttention(48, 3, batch_first=True).eval(), no_first(randn(S, S) > 0)
        x = randn(B, S, 48)
        fused = fastformer.accelerate(copy.deepcopy(module))
        for options in ({"key_padding_mask": PADDING, "attn_mask": mask}, {"attn_mask": mask}):
            outs = [m(x, x, x, need_weights=False, is_causal=True, **options)[0] for m in (fused, module)]
            torch.testing.assert_close(*outs)

    def test_a_query_without_a_key_gives_0(self):
        module = fastformer.accelerate(nn.MultiheadAttention(64, 4, bias=False, batch_first=True)).eval()
        x, mask = randn(B, S, 64).requires_grad_(), torch.zeros(S, S, dtype=torch.bool)
        mask[2] = True
        out = module(x, x, x, attn_mask=mask, need_weights=False)[0]
        out.sum().backward()
        assert (out[:, 2] == 0).all() and x.grad.isfinite().all()
        with torch.no_grad():
            torch.testing.assert_close(module(x, x, x, attn_mask=mask, need_weights=False)[0], out)

    def test_gradient_of_a_mask(self):
        module, x = nn.MultiheadAttention(48, 3).eval(), randn(S, B, 48)
        grads = []
        for m in (fastformer.accelerate(copy.deepcopy(module)), module):
            bias = randn(S, S).requires_grad_()
            m(x, x, x, attn_mask=bias, need_weights=False)[0].square().sum().backward()
            grads.append(bias.grad)
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("average", [True, False])
    def test_weights_when_they_are_wanted(self, average, monkeypatch):
        monkeypatch.setattr(backends, "_said", set())
        module, x = nn.MultiheadAttention(64, 4).eval(), randn(S, B, 64)
        expected = module(x, x, x, average_attn_weights=average)
        fastformer.accelerate(module)
        with pytest.warns(UserWarning, match="need_weights=True, its default"):
            outs = module(x, x, x, average_attn_weights=average)
        assert all(torch.equal(*pair) for pair in zip(outs, expected, strict=True))

    @pytest.mark.parametrize(
        ("options", "reason"), [({"add_bias_kv": True}, "add_bias_kv"), ({"add_zero_attn": True}, "add_zero_attn")]
    )
    def test_left(self, options, reason):
        module, x = nn.MultiheadAttention(64, 4, **options).eval(), randn(S, B, 64)
        expected = module(x, x, x, need_weights=False)[0]
        with pytest.warns(UserWarning, match=reason):
            fastformer.accelerate(module)
        assert reason in str(fastformer.report(module))
        assert torch.equal(module(x, x, x, need_weights=False)[0], expected)

    def test_dropout(self):
        module = nn.MultiheadAttention(64, 4, dropout=0.3, batch_first=True)
        x, spreads = randn(B, S, 64), []
        for m in (fastformer.accelerate(copy.deepcopy(module)), module):
            samples = torch.stack([m(x, x, x, need_weights=False)[0] for _ in range(60)]).detach()
            spreads.append(samples.std(0).mean().item())
        assert spreads[0] == pytest.approx(spreads[1], rel=0.15)

    @pytest.mark.parametrize("wrong", [
        {"key_padding_mask": torch.zeros(B, S + 1, dtype=torch.bool)},
        {"key_padding_mask": torch.zeros(S, dtype=torch.bool)},
        {"key_padding_mask": torch.zeros(B, S, dtype=torch.long)},
        {"attn_mask": torch.zeros(S, S + 1)},
        {"attn_mask": torch.zeros(B, S, S)},
        {"attn_mask": torch.zeros(1, B, S, S)},
        {"attn_mask": torch.zeros(S, S, dtype=torch.long)},
        {"is_causal": True},
        {"query": torch.zeros(S, B, 47)},
        {"query": torch.zeros(S, B, 48, dtype=torch.float64)},
        {"query": torch.zeros(S)},
        {"key": torch.zeros(S + 1, B, 48)},
        {"key": torch.zeros(S, 48)},
    ])  # fmt: skip
    @pytest.mark.parametrize("grad", [True, False])
    def test_errors_are_torchs(self, wrong, grad):
        module, x = nn.MultiheadAttention(48, 3).eval(), randn(S, B, 48)
        given = {"query": x, "key": x, "value": x, "need_weights": False, **wrong}
        messages = []
        for m in (module, fastformer.accelerate(copy.deepcopy(module))):
            with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, AssertionError)) as caught:
                m(**given)
            messages.append((caught.type, str(caught.value)))
        assert messages[0] == messages[1]


class TestLayerNorm:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("options", [{}, {"bias": False}, {"eps": 0.1}])
    def test_as_in_torch(self, options, mode):
        module = nn.Sequential(nn.Linear(30, 30), spread(nn.LayerNorm(30, **options)))
        assert_agrees(module, results_of(lambda m, x: m(x), [randn(4, 6, 30)], mode))

    def test_without_parameters(self):
        module, x = nn.Sequential(nn.LayerNorm(30, elementwise_affine=False)), randn(4, 30)
        expected = module(x)
        fastformer.accelerate(module)
        torch.testing.assert_close(module(x), expected)

    def test_several_dimensions_are_left(self):
        module, x = nn.Sequential(nn.LayerNorm((6, 30)), nn.LayerNorm(30)), randn(4, 6, 30)
        expected = module(x)
        left = fastformer.report(fastformer.accelerate(module)).left
        assert [row.reasons for row in left] == [("normalizes 2 dimensions at once",)]
        torch.testing.assert_close(module(x), expected)

    @pytest.mark.parametrize("x", [torch.ones(2, 30, dtype=torch.long), torch.ones(2, 29)])
    def test_errors_are_torchs(self, x):
        module = fastformer.accelerate(nn.LayerNorm(30))
        with torch.no_grad(), pytest.raises(RuntimeError):
            module(x)

    def test_own_modules_need_no_swap(self):
        module = nn.Sequential(fastformer.nn.LayerNorm(30), nn.LayerNorm(30))
        assert len(fastformer.report(fastformer.accelerate(module)).rows) == 1
