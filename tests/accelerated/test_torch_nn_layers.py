"""The layers of nn.Transformer and its encoder, which leaves padding out."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from accelerated.small import assert_agrees
from accelerated.small_torch import (
    LAYOUTS,
    MODES,
    PADDING,
    SEQUENCES,
    SIZES,
    B,
    L,
    S,
    decoder_layer,
    encoder,
    encoder_layer,
    masks_of,
    no_first,
    randn,
    real,
    results_of,
    sequence,
    typed,
)
from torch import Tensor, nn

import fastformer
from fastformer import library

pytestmark = [
    pytest.mark.skipif(not library.available(), reason="needs the op library"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:fastformer.accelerate.*no instructions for 8-bit"),
]


ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "nn.ReLU": nn.ReLU(), "nn.GELU": nn.GELU(), "tanh": nn.GELU("tanh"),
               "silu": F.silu}  # fmt: skip

FUNCTIONS = ("relu", "gelu", "silu")


class TestLayers:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
    @pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
    @pytest.mark.parametrize(
        ("build", "activation"),
        [*((encoder_layer, name) for name in ACTIVATIONS), *((decoder_layer, name) for name in FUNCTIONS)],
    )
    def test_options(self, build, activation, norm_first, bias, mode, slow_path):
        layer = build(
            activation=ACTIVATIONS[activation], norm_first=norm_first, bias=bias, layer_norm_eps=1e-3, batch_first=True
        )
        inputs = [sequence(S, 64, "batch first"), sequence(L, 64, "batch first", 1)]
        assert_agrees(layer, results_of(lambda m, *xs: m(*xs), inputs[: 1 + (build is decoder_layer)], mode))

    @pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.GELU("tanh")])
    def test_activation_modules_of_a_decoder(self, activation):
        """A copy of a decoder layer forgets them, in torch: nothing is copied here."""
        layer = fastformer.accelerate(decoder_layer(activation=activation))
        inputs = sequence(L, 64, "sequence first"), sequence(S, 64, "sequence first")
        with torch.no_grad():
            outs = layer(*inputs), fastformer.restore(layer)(*inputs)
        torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("mask", ["padding", "mask per head", "both", "both float", "causal"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("sizes", SIZES)
    def test_encoder_masks(self, sizes, layout, mask, mode, slow_path):
        width, heads = SIZES[sizes]
        layer = encoder_layer(width, heads, batch_first=layout == "batch first")
        masks = masks_of(mask, heads, S, layout)

        def call(m: nn.Module, x: Tensor) -> Tensor:
            given = [typed(masks.get(name), x.dtype) for name in ("attn_mask", "key_padding_mask")]
            return m(x, *given, is_causal=masks.get("is_causal", False))

        select = functools.partial(real, padding=PADDING if "key_padding_mask" in masks else None, layout=layout)
        assert_agrees(layer, results_of(call, [sequence(S, width, layout)], mode, select))

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("mask", ["padding", "mask per head", "both float", "causal and padding"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("sizes", SIZES)
    def test_decoder_masks(self, sizes, layout, mask, mode):
        width, heads = SIZES[sizes]
        layer = decoder_layer(width, heads, batch_first=layout == "batch first", norm_first=True)
        masks, memory_masks = (masks_of(mask, heads, n, layout) for n in (S, S))

        def call(m: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
            given = {
                f"{side}_{kind}": typed(of.get(name), x.dtype)
                for side, of in (("tgt", masks), ("memory", memory_masks))
                for kind, name in (("mask", "attn_mask"), ("key_padding_mask", "key_padding_mask"))
            }
            return m(x, memory, tgt_is_causal=masks.get("is_causal", False), **given)

        inputs = [sequence(S, width, layout, seed) for seed in (0, 1)]
        assert_agrees(layer, results_of(call, inputs, mode))

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("build", [encoder_layer, decoder_layer])
    def test_autocast(self, build, training, slow_path):
        layer = build(norm_first=training, batch_first=True)
        inputs = [sequence(S, 64, "batch first"), sequence(L, 64, "batch first", 1)][: 1 + (build is decoder_layer)]
        exact = copy.deepcopy(layer).double()(*(x.double() for x in inputs))
        outs = []
        for m in (fastformer.accelerate(copy.deepcopy(layer)), layer):
            with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
                outs.append(m.train(training)(*inputs))
        assert outs[0].dtype == outs[1].dtype
        errors = [(out.double() - exact).abs().max().item() for out in outs]
        assert errors[0] <= 2 * errors[1]

    @pytest.mark.parametrize("norm_first", [True, False])
    @pytest.mark.parametrize("build", [encoder_layer, decoder_layer])
    def test_dropout(self, build, norm_first):
        layer = build(dropout=0.2, norm_first=norm_first, batch_first=True).train()
        inputs = [sequence(S, 64, "batch first")] * (1 + (build is decoder_layer))
        fused, spreads = fastformer.accelerate(copy.deepcopy(layer)), []
        for m in (fused, layer):
            spreads.append(torch.stack([m(*inputs) for _ in range(60)]).detach().std(0).mean().item())
        assert spreads[0] == pytest.approx(spreads[1], rel=0.15)
        outs = []
        for _ in range(2):
            torch.manual_seed(3)
            outs.append(fused(*inputs))
        assert torch.equal(*outs) and not torch.equal(outs[0], fused(*inputs))

    def test_frozen_layer_behind_attention_with_gradients(self):
        """Its own weights are packed, but what comes out of the attention has gradients."""
        layer = encoder_layer(batch_first=True).requires_grad_(False)
        layer.self_attn.requires_grad_(True)
        x = sequence(S, 64, "batch first")
        grads = []
        for m in (fastformer.accelerate(copy.deepcopy(layer)), layer):
            m(x).square().sum().backward()
            grads.append(m.self_attn.in_proj_weight.grad)
        torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("build", [encoder_layer, decoder_layer])
    def test_other_activation_is_left(self, build):
        layer = build(activation=lambda x: x.clamp(min=0.1))
        inputs = [sequence(S, 64, "sequence first")] * (1 + (build is decoder_layer))
        expected = layer(*inputs)
        report = fastformer.report(fastformer.accelerate(layer))
        assert [row.name for row in report.left] == [""] and "not relu, gelu or silu" in str(report)
        torch.testing.assert_close(layer(*inputs), expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("wrong", [
        {"src_key_padding_mask": torch.zeros(B, S + 1, dtype=torch.bool)},
        {"src_key_padding_mask": torch.zeros(B, S, dtype=torch.long)},
        {"src_mask": torch.zeros(S, S + 1)},
        {"src_mask": torch.zeros(S, S, dtype=torch.long)},
        {"src": torch.zeros(S, B, 63)},
    ])  # fmt: skip
    def test_errors_are_torchs(self, wrong):
        layer = encoder_layer()
        types = []
        for m in (layer, fastformer.accelerate(copy.deepcopy(layer))):
            with pytest.raises((RuntimeError, AssertionError)) as caught:
                m(**{"src": randn(S, B, 64), **wrong})
            types.append((caught.type, str(caught.value)))
        assert types[0] == types[1]


class TestEncoder:
    @pytest.mark.parametrize("layout", ["batch first", "sequence first"])
    @pytest.mark.parametrize("norm_first", [True, False])
    @pytest.mark.parametrize("norm", [True, False])
    @pytest.mark.parametrize("padding", ["right", "left", "holes"])
    @pytest.mark.parametrize("mode", MODES)
    def test_padding_is_left_out(self, mode, padding, norm, norm_first, layout, tokens_of):
        model = encoder(norm=norm, norm_first=norm_first, batch_first=layout == "batch first")
        mask = {"right": PADDING, "left": PADDING.flip(1), "holes": no_first(randn(B, S) > 0)}[padding]

        def call(m: nn.Module, x: Tensor) -> Tensor:
            return real(m(x, src_key_padding_mask=mask), mask, layout)

        assert_agrees(model, results_of(call, [sequence(S, 64, layout)], mode))
        seen = tokens_of(model)
        with torch.set_grad_enabled(mode == "training"):
            out = model(sequence(S, 64, layout), src_key_padding_mask=mask)
        assert seen == [int((~mask).sum())]
        assert (out[mask if layout == "batch first" else mask.T] == 0).all()

    def test_each_sequence_as_if_alone(self):
        model, x = fastformer.accelerate(encoder()), randn(B, S, 64)
        with torch.no_grad():
            together = model(x, src_key_padding_mask=PADDING)
            for i, n in enumerate(SEQUENCES):
                torch.testing.assert_close(together[i, :n], model(x[i : i + 1, :n])[0])

    def test_dropout_without_padding(self, tokens_of):
        """The mask of the attention is that of the padded batch; all gradients are those of what was computed."""
        model, x = fastformer.accelerate(encoder().train()), randn(B, S, 64)
        for layer in model.layers:
            layer.self_attn.dropout = 0.4
        seen, outs = tokens_of(model), []
        for unpad in (True, False):
            fastformer.accelerate(model, unpad=unpad)
            torch.manual_seed(1)
            outs.append(model(x, src_key_padding_mask=PADDING)[~PADDING])
        assert seen == [sum(SEQUENCES), B * S]
        torch.testing.assert_close(*outs)
        fastformer.accelerate(model).double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.2

        def encode(x: Tensor) -> Tensor:
            torch.manual_seed(1)
            return model(x, src_key_padding_mask=PADDING)

        assert torch.autograd.gradcheck(encode, x.double().requires_grad_(), fast_mode=True)
        assert set(seen[2:]) == {sum(SEQUENCES)}

    def test_autocast(self, tokens_of, slow_path):
        model, x = encoder(), randn(B, S, 64)
        exact = copy.deepcopy(model).double()(x.double(), src_key_padding_mask=PADDING)
        fused = fastformer.accelerate(copy.deepcopy(model))
        seen = tokens_of(fused)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outs = [m(x, src_key_padding_mask=PADDING) for m in (fused, model)]
        assert seen == [sum(SEQUENCES)] and outs[0].dtype == outs[1].dtype
        errors = [(out.double() - exact)[~PADDING].abs().max().item() for out in outs]
        assert errors[0] <= 2 * errors[1]

    def test_the_batch_as_it_is(self, tokens_of):
        """Without padding, with masks, unpad=False, and where a hook looks on."""
        model, x = fastformer.accelerate(encoder()), randn(B, S, 64)
        expected = model(x, src_key_padding_mask=PADDING)[~PADDING].detach()
        seen, batch = tokens_of(model), B * S
        hooked = [model.layers[0], model.layers[1].self_attn, model.norm]
        with torch.no_grad():
            model(x)
            model(x, src_key_padding_mask=torch.zeros_like(PADDING))
            model(x, mask=torch.zeros(S, S), src_key_padding_mask=PADDING)
            for module in hooked:
                handle = module.register_forward_hook(lambda *_: None)
                torch.testing.assert_close(model(x, src_key_padding_mask=PADDING)[~PADDING], expected)
                handle.remove()
        assert seen == [batch] * 6
        with torch.no_grad():
            fastformer.accelerate(model, unpad=False)
            torch.testing.assert_close(model(x, src_key_padding_mask=PADDING)[~PADDING], expected)
            torch.testing.assert_close(copy.deepcopy(model)(x, src_key_padding_mask=PADDING)[~PADDING], expected)
            assert seen == [batch] * 7
            fastformer.accelerate(model)
            model(x, src_key_padding_mask=PADDING)
            assert seen[7:] == [sum(SEQUENCES)]

    def test_a_layer_that_is_left(self):
        model, x = encoder(), randn(B, S, 64)
        with torch.no_grad():
            model.layers[0].linear1.register_forward_hook(lambda module, args, out: out * 1.1)
            expected = model(x, src_key_padding_mask=PADDING)
            fastformer.accelerate(model)
            out = model(x, src_key_padding_mask=PADDING)
        torch.testing.assert_close(out[~PADDING], expected[~PADDING], atol=1e-5, rtol=1e-4)

    def test_a_sequence_of_nothing_but_padding(self):
        model, x, mask = encoder(), randn(B, S, 64), PADDING.clone()
        mask[1] = True
        with torch.no_grad():
            expected = model(x, src_key_padding_mask=mask)
            out = fastformer.accelerate(model)(x, src_key_padding_mask=mask)
        torch.testing.assert_close(out[~mask], expected[~mask], atol=1e-5, rtol=1e-4)
        assert (out[mask] == 0).all()

    @pytest.mark.parametrize("mask", ["float", "bool"])
    def test_causal_mask_is_found(self, mask, recorder):
        """And then the kernel has none."""
        model, x = fastformer.accelerate(encoder()), randn(B, S, 64)
        causal = nn.Transformer.generate_square_subsequent_mask(S)
        with torch.no_grad(), recorder:
            model(x, mask=causal if mask == "float" else causal.isinf())
        calls = [args for func, args in recorder.calls if "attention" in func.name()]
        assert len(calls) == 2 and all(args[3] is None and args[6] for args in calls)

    def test_nested_tensors_run_the_stock_forward(self):
        model = encoder(norm=False)
        nested = torch.nested.nested_tensor([randn(n, 64) for n in SEQUENCES])
        with torch.no_grad():
            expected = model.layers[0](nested)
            out = fastformer.accelerate(model).layers[0](nested)
        assert all(torch.equal(*pair) for pair in zip(out.unbind(), expected.unbind(), strict=True))

    @pytest.mark.parametrize("wrong", [
        {"src_key_padding_mask": torch.zeros(B, S + 1, dtype=torch.bool)},
        {"src_key_padding_mask": torch.zeros(B, S, dtype=torch.long)},
        {"mask": torch.zeros(S, S + 1)},
        {"mask": torch.zeros(S, S, dtype=torch.long)},
        {"src": torch.zeros(B, S, 63)},
    ])  # fmt: skip
    @pytest.mark.parametrize("grad", [True, False])
    def test_errors_are_torchs(self, wrong, grad):
        model = encoder()
        types = []
        for m in (model, fastformer.accelerate(copy.deepcopy(model))):
            with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, AssertionError)) as caught:
                m(**{"src": randn(B, S, 64), **wrong})
            types.append(caught.type)
        assert types[0] is types[1]
