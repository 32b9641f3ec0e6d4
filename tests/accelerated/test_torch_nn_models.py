"""Whole models of torch's modules: what the swap does to them, and what it leaves as it was."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerated.small import assert_agrees, gradients, packed_modules, spread
from accelerated.small_torch import (
    IDS,
    MODES,
    PADDING,
    B,
    S,
    encoder,
    encoder_layer,
    randn,
    real,
    results_of,
    tagger,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastformer
from fastformer import library

pytestmark = [
    pytest.mark.skipif(not library.available(), reason="needs the op library"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:fastformer.accelerate.*no instructions for 8-bit"),
]


def scores(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(*IDS)


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


class TestWholeModels:
    @pytest.mark.parametrize("mode", MODES)
    def test_a_model_of_the_user(self, mode):
        assert_agrees(tagger(), results_of(lambda m: m(*IDS), [], mode))

    def test_report(self):
        model = fastformer.accelerate(tagger(), strict=True)
        assert [(row.name, row.module) for row in fastformer.report(model).fused] == [
            ("transformer.encoder", "TransformerEncoder"),
            ("transformer.encoder.layers.0", "TransformerEncoderLayer"),
            ("transformer.encoder.layers.0.self_attn", "MultiheadAttention"),
            ("transformer.encoder.norm", "LayerNorm"),
            ("transformer.decoder.layers.0", "TransformerDecoderLayer"),
            ("transformer.decoder.layers.0.self_attn", "MultiheadAttention"),
            ("transformer.decoder.layers.0.multihead_attn", "MultiheadAttention"),
            ("transformer.decoder.norm", "LayerNorm"),
            ("norm", "LayerNorm"),
            ("pooler", "MultiheadAttention"),
        ]
        assert not fastformer.report(model).left

    def test_restore(self):
        model = tagger()
        before, state, expected = classes(model), copy.deepcopy(model.state_dict()), scores(model)
        attributes = [set(module.__dict__) for module in model.modules()]
        scores(fastformer.accelerate(model))
        assert packed_modules(model) and [*model.state_dict()] == [*state]
        fastformer.restore(model)
        assert classes(model) == before and [set(module.__dict__) for module in model.modules()] == attributes
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(scores(model), expected)

    def test_pickle_is_stock_and_deepcopy_accelerated(self):
        model = tagger()
        stock = classes(model)
        expected = scores(fastformer.accelerate(model, unpad=False))
        loaded, copied = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
        assert classes(loaded) == stock and classes(copied) == classes(model) != stock
        assert not any(name.startswith("_fastformer") for module in loaded.modules() for name in module.__dict__)
        for other in (loaded, copied):
            torch.testing.assert_close(scores(other), expected, atol=1e-5, rtol=1e-4)

    def test_backend_torch_runs_the_stock_forward(self):
        model, x = encoder(), randn(B, S, 64)
        fused = fastformer.accelerate(copy.deepcopy(model))
        with torch.no_grad(), fastformer.backend("torch"):
            assert torch.equal(fused(x, src_key_padding_mask=PADDING), model(x, src_key_padding_mask=PADDING))

    def test_an_edited_weight_is_seen(self):
        model = fastformer.accelerate(tagger())
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                before = scores(model)
                parameter.data += randn(*parameter.shape) * 0.3
                after = scores(model)
                with fastformer.backend("torch"):
                    torch.testing.assert_close(after, scores(model), atol=1e-4, rtol=1e-4)
                assert not torch.allclose(before, after, atol=1e-4), name

    def test_forward_mode_differentiation(self, slow_path):
        model = fastformer.accelerate(encoder_layer(batch_first=True).double()).requires_grad_(False)
        x, direction = (randn(B, S, 64, seed=seed).double() for seed in (0, 1))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            _, tangent = torch.func.jvp(model, (x,), (direction,))
        difference = (model(x + 1e-5 * direction) - model(x - 1e-5 * direction)) / 2e-5
        torch.testing.assert_close(tangent, difference, atol=1e-5, rtol=1e-5)

    def test_int8(self):
        model = tagger()
        expected = scores(model)
        fastformer.accelerate(model, quantize="int8", strict=True)
        output = scores(model)
        assert {p.dtype for m in packed_modules(model) for p in m._fastformer_packed.panels} == {torch.int8}
        assert F.cosine_similarity(output, expected, dim=-1).min() > 0.99 and not torch.equal(output, expected)
        assert "fused, int8" in str(fastformer.report(model))
        with torch.no_grad():
            stack, x = fastformer.accelerate(encoder(), quantize="int8"), randn(B, S, 64)
            together = stack(x, src_key_padding_mask=PADDING)
            torch.testing.assert_close(together[1, :3], stack(x[1:2, :3])[0])


def change_hook(model: nn.Module) -> None:
    model.linear1.register_forward_hook(lambda module, args, output: output * 1.1)


def change_child(model: nn.Module) -> None:
    model.linear2 = nn.Sequential(model.linear2, nn.Tanh())


def change_parametrization(model: nn.Module) -> None:
    parametrizations.weight_norm(model.linear1)


def change_pruning(model: nn.Module) -> None:
    prune.random_unstructured(model.self_attn, "in_proj_weight", 0.5)


def change_attention(model: nn.Module) -> None:
    parametrizations.spectral_norm(model.self_attn, "in_proj_weight")


def change_norm(model: nn.Module) -> None:
    model.norm1 = nn.Identity()


def change_activation(model: nn.Module) -> None:
    model.activation.register_forward_hook(lambda module, args, output: output * 1.1)


def change_class(model: nn.Module) -> None:
    class Louder(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * 1.1

    model.norm2.__class__ = Louder


CHANGES = (change_hook, change_child, change_parametrization, change_pruning, change_attention, change_norm,
           change_activation, change_class)  # fmt: skip


class TestWhatStopsFusion:
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("change", CHANGES)
    def test_changes_inside(self, change, when, slow_path):
        stock, x = encoder_layer(activation=nn.GELU(), batch_first=True), randn(B, S, 64)
        fused = copy.deepcopy(stock)
        if when == "after":
            with torch.no_grad():
                fastformer.accelerate(fused)(x)
        for model in (stock, fused):
            torch.manual_seed(0)
            change(model)
        report = fastformer.report(fused if when == "after" else fastformer.accelerate(fused))
        assert len(report.left) == 1
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(fused(x), stock(x), atol=1e-5, rtol=1e-4)

    def test_hooks_on_layers_and_attention_run(self):
        """With the arguments that torch gives: this hook asks for the weights."""
        model, x, seen = fastformer.accelerate(encoder()), randn(B, S, 64), []

        def ask(module, args, kwargs):
            return args, {**kwargs, "need_weights": True}

        attention = model.layers[1].self_attn
        attention.register_forward_pre_hook(ask, with_kwargs=True)
        attention.register_forward_hook(lambda module, args, output: seen.append(output[1]))
        model.layers[0].register_forward_hook(lambda *_: seen.append("layer"))
        with torch.no_grad():
            model(x, src_key_padding_mask=PADDING)
        assert seen[0] == "layer" and seen[1].shape == (B, S, S)
        assert (seen[1].transpose(1, 2)[PADDING] == 0).all()

    def test_subclasses_are_left(self):
        class Mine(nn.TransformerEncoderLayer):
            def forward(self, src, *args, **kwargs):
                return super().forward(src, *args, **kwargs) * 1.1

        model, x = spread(Mine(64, 4, 80, 0.0, batch_first=True)), randn(B, S, 64)
        expected = model(x)
        report = fastformer.report(fastformer.accelerate(model))
        assert [row.name for row in report.left] == [""] and "not a TransformerEncoderLayer" in str(report)
        assert [row.name for row in report.fused] == ["self_attn", "norm1", "norm2"]  # which it calls
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


class TestCompiled:
    @pytest.fixture(autouse=True)
    def forget_graphs(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize(
        ("build", "mode"),
        [
            ("encoder", "inference"),
            pytest.param("encoder", "training", marks=pytest.mark.slow),
            pytest.param("model of the user", "inference", marks=pytest.mark.slow),
            ("model of the user", "training"),
        ],
    )
    def test_one_graph(self, build, mode):
        model = encoder() if build == "encoder" else tagger()
        inputs, given = ([randn(B, S, 64)], {"src_key_padding_mask": PADDING}) if build == "encoder" else (IDS, {})
        select = functools.partial(real, padding=PADDING, layout="batch first") if given else lambda x: x
        fused = fastformer.accelerate(copy.deepcopy(model))
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        outs = []
        for m, forward in ((fused, compiled), (model, model)):
            m.train(mode == "training")
            with torch.set_grad_enabled(mode == "training"):
                out = select(forward(*inputs, **given))
            if mode == "training":
                out.square().mean().backward()
            outs.append({"output": out.detach(), **gradients(m)})
        for name, tensor in outs[1].items():
            torch.testing.assert_close(outs[0][name], tensor, atol=1e-4, rtol=1e-3)

    @pytest.mark.slow
    def test_export(self):
        model = fastformer.accelerate(encoder())
        program = torch.export.export(model, (randn(B, S, 64),), {"src_key_padding_mask": PADDING})
        with torch.no_grad():
            out = program.module()(randn(B, S, 64), src_key_padding_mask=PADDING)
            expected = model(randn(B, S, 64), src_key_padding_mask=PADDING)
        torch.testing.assert_close(out[~PADDING], expected[~PADDING], atol=1e-5, rtol=1e-4)
