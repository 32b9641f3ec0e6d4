"""What accelerate and restore do to a model, and what they leave as it was."""

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from accelerated.small import MODELS, bert, gpt2, ids, logits, padding
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastformer
from fastformer import library
from fastformer.integrations import fused as swapped

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the op library")


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return MODELS[request.param]()


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_restore_gives_the_stock_model_back(model):
    before, state, expected = classes(model), copy.deepcopy(model.state_dict()), logits(model)
    attributes = [set(module.__dict__) for module in model.modules()]
    assert fastformer.accelerate(model) is model
    assert classes(model) != before
    logits(model)
    assert fastformer.restore(model) is model
    assert classes(model) == before
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert [*model.state_dict()] == [*state]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_twice_is_once(model):
    fastformer.accelerate(model)
    once = classes(model)
    assert classes(fastformer.accelerate(model)) == once
    fastformer.restore(fastformer.restore(model))
    assert not any(isinstance(module, swapped.Fused) for module in model.modules())


def test_swapped_classes_look_like_the_stock_ones(model):
    stock = classes(model)
    config = copy.deepcopy(model.config)
    fastformer.accelerate(model)
    for module, cls in zip(model.modules(), stock, strict=True):
        assert isinstance(module, cls)
        parameters = [list(inspect.signature(c.forward).parameters) for c in (type(module), cls)]
        assert parameters[0] == parameters[1]  # generate and Trainer read it
        names = [(c.__name__, c.__qualname__, c.__module__) for c in (type(module), cls)]
        assert names[0] == names[1]
    assert repr(model) == repr(fastformer.restore(copy.deepcopy(model)))
    assert model.config == config


def test_deepcopy_is_accelerated(model):
    fastformer.accelerate(model)
    copied = copy.deepcopy(model)
    assert classes(copied) == classes(model)
    assert fastformer.report(copied) == fastformer.report(model)
    torch.testing.assert_close(logits(copied), logits(model))
    fastformer.restore(copied)
    assert fastformer.report(model).fused and not fastformer.report(copied).fused


def test_pickle_is_stock(model):
    stock = classes(model)
    fastformer.accelerate(model)
    logits(model)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        loaded = pickle.loads(pickle.dumps(model, protocol))
        assert classes(loaded) == stock
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_pickle_needs_no_fastformer(tmp_path):
    """An accelerated model of transformers is read in a process that never imports fastformer."""
    model = fastformer.accelerate(bert())
    torch.save(model, tmp_path / "model.pt")
    torch.save((ids(), logits(model)), tmp_path / "expected.pt")
    code = f"""
import sys, torch
model = torch.load(r"{tmp_path}/model.pt", weights_only=False)
ids, expected = torch.load(r"{tmp_path}/expected.pt")
with torch.no_grad():
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
assert not any(name.startswith("fastformer") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("build", [bert, gpt2])
def test_save_and_load(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "stock")
    fastformer.accelerate(model)
    model.save_pretrained(tmp_path / "accelerated")
    names = {path.name for path in (tmp_path / "stock").iterdir()}
    assert names == {path.name for path in (tmp_path / "accelerated").iterdir()}
    for name in names:
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "accelerated" / name).read_bytes(), name
    loaded = type(model).from_pretrained(tmp_path / "accelerated").eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-4)


def test_ties_hold():
    model = fastformer.accelerate(gpt2())
    assert model.lm_head.weight is model.transformer.wte.weight
    model.resize_token_embeddings(70)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert logits(model).shape[-1] == 70
    with fastformer.backend("torch"):
        expected = logits(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


def test_a_shared_config_stays_the_same():
    config = bert().config
    first, second = (transformers.BertModel(config).eval() for _ in range(2))
    fastformer.accelerate(first)
    assert second.config is first.config and config._attn_implementation == "sdpa"
    assert not fastformer.report(second).fused


@pytest.mark.parametrize(("build", "implementation"), [(bert, "eager"), (gpt2, "eager"), (bert, "flex_attention")])
def test_another_attention_implementation_is_respected(build, implementation):
    model = fastformer.accelerate(build())
    expected = logits(model)
    model.set_attn_implementation(implementation)
    left = fastformer.report(model).left
    assert len(left) == 2 and all(implementation in row.reasons[0] for row in left)
    if implementation == "eager":
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
        stock = fastformer.restore(copy.deepcopy(model))
        given = {"input_ids": ids(), "attention_mask": padding("right"), "output_attentions": True}
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                out, wanted = model(**given), stock(**given)
            assert len(out.attentions) == 2
            torch.testing.assert_close(out.attentions, wanted.attentions, atol=1e-5, rtol=1e-4)
    model.set_attn_implementation("sdpa")
    assert not fastformer.report(model).left
    assert torch.equal(logits(model), expected)


class LoraLinear(nn.Module):
    """In the place of a dense layer, as PEFT has it: of the same name, with a weight, and more."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base_layer = base
        generator = torch.Generator().manual_seed(0)
        out_features, in_features = base.bias.shape[0], base.weight.numel() // base.bias.shape[0]
        self.a = nn.Parameter(torch.randn(in_features, 2, generator=generator) * 0.3)
        self.b = nn.Parameter(torch.randn(2, out_features, generator=generator) * 0.3)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.a @ self.b


LoraLinear.__name__ = LoraLinear.__qualname__ = "Linear"


def dense_layers(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D))
        and (".layer." in name or ".h." in name or "transform" in name or "decoder" in name)
        and module.bias is not None
    ]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_replaced_dense_layer_is_called(model, when, training):
    """Each in turn; frozen but for the adapter, as LoRA trains."""
    for name in dense_layers(model):
        eager = copy.deepcopy(model).requires_grad_(False)
        owner, _, attribute = name.rpartition(".")
        fused = copy.deepcopy(eager)
        if when == "after":
            fastformer.accelerate(fused)
            logits(fused)
        for m in (eager, fused):
            setattr(m.get_submodule(owner), attribute, LoraLinear(m.get_submodule(name)))
        if when == "before":
            fastformer.accelerate(fused)
        left = fastformer.report(fused).left
        assert left and all(any("Linear" in reason for reason in row.reasons) for row in left), name
        if not training:
            torch.testing.assert_close(logits(fused), logits(eager), atol=1e-5, rtol=1e-4, msg=name)
            assert not torch.allclose(logits(fused), logits(model), atol=1e-3), name
            continue
        gradients = []
        for m in (fused, eager):
            m(input_ids=ids()).logits.square().mean().backward()
            gradients.append(m.get_submodule(name).a.grad)
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3, msg=name)


def inner_modules(model: nn.Module) -> list[str]:
    """The modules without children in the layers: what a fused forward might bypass."""
    return [
        name
        for name, module in model.named_modules()
        if (".layer." in name or ".h." in name or name.startswith("cls")) and not list(module.children())
    ]


HOOKS = {
    "forward": lambda module, change: module.register_forward_hook(lambda m, args, out: change(out)),
    "pre": lambda module, change: module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:])),
    "own forward": lambda module, change: setattr(
        module, "forward", lambda *args, f=module.forward, **kwargs: change(f(*args, **kwargs))
    ),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_inner_modules_are_called(model, hook):
    """Registered after the first inference: the result is that of the stock model with the same hook."""
    for name in inner_modules(model):
        eager = copy.deepcopy(model)
        fused = fastformer.accelerate(copy.deepcopy(model))
        logits(fused)
        for m in (fused, eager):
            HOOKS[hook](m.get_submodule(name), lambda x: x * 1.5)
        torch.testing.assert_close(logits(fused), logits(eager), atol=1e-5, rtol=1e-4, msg=name)


def test_backward_hooks_on_inner_modules_are_called(model):
    for name in inner_modules(model):
        calls = {}
        for kind, m in (("fused", fastformer.accelerate(copy.deepcopy(model))), ("eager", copy.deepcopy(model))):
            count = calls[kind] = []
            m.get_submodule(name).register_full_backward_hook(lambda *_, count=count: count.append(1))
            m(input_ids=ids()).logits.sum().backward()
        assert len(calls["fused"]) == len(calls["eager"]), name


def test_hooks_on_layers_do_not_stop_them(model):
    expected = logits(model)
    seen = []
    for module in model.modules():
        if (
            list(module.children())
            and "Output" not in type(module).__name__
            and "Intermediate" not in type(module).__name__
        ):
            if not type(module).__name__.endswith("MLP"):
                module.register_forward_hook(lambda module, args, out: seen.append(module))
    report = fastformer.report(fastformer.accelerate(model))
    assert not report.left
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    hooked = [module for module in model.modules() if module._forward_hooks]
    called = [module for module in hooked if not isinstance(module, (nn.ModuleList, nn.ModuleDict))]
    assert {id(module) for module in called} == {id(module) for module in seen}


def test_parametrization_stops_a_layer(model):
    name = next(n for n in dense_layers(model))
    parametrizations.weight_norm(model.get_submodule(name))
    expected = logits(model)
    fastformer.accelerate(model)
    assert len(fastformer.report(model).left) == 1
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


def test_tensor_subclass_stops_a_layer(model):
    class Quantized(nn.Parameter):
        pass

    dense = model.get_submodule(dense_layers(model)[0])
    dense.weight = Quantized(dense.weight.detach())
    expected = logits(model)
    fastformer.accelerate(model)
    report = fastformer.report(model)
    assert len(report.left) == 1 and "Quantized" in str(report)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


def test_unknown_activation_stops_a_layer():
    model = bert(hidden_act="quick_gelu")
    expected = logits(model)
    report = fastformer.report(fastformer.accelerate(model))
    assert {row.module for row in report.left} == {"BertLayer", "BertPredictionHeadTransform"}
    assert "QuickGELUActivation" in str(report)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


def test_activation_that_is_a_function():
    model = bert()
    expected = logits(model)
    intermediate = model.bert.encoder.layer[0].intermediate
    del intermediate.intermediate_act_fn
    intermediate.intermediate_act_fn = nn.functional.gelu
    report = fastformer.report(fastformer.accelerate(model))
    assert [row.name for row in report.left] == ["bert.encoder.layer.0"] and "is no module" in str(report)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


def test_subclasses_are_left():
    class MyLayer(transformers.models.bert.modeling_bert.BertLayer):
        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(hidden_states, *args, **kwargs) * 1.1

    model = bert()
    model.bert.encoder.layer[1].__class__ = MyLayer
    expected = logits(model)
    report = fastformer.report(fastformer.accelerate(model))
    assert [row.name for row in report.left] == ["bert.encoder.layer.1"] and "MyLayer" in str(report)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


def test_strict_swaps_nothing_if_anything_is_left(model):
    name = dense_layers(model)[0]
    dense = model.get_submodule(name)
    handle = dense.register_forward_hook(lambda *_: None)
    before = classes(model)
    with pytest.raises(NotImplementedError, match="has hooks"):
        fastformer.accelerate(model, strict=True)
    assert classes(model) == before
    handle.remove()
    assert not fastformer.report(fastformer.accelerate(model, strict=True)).left


def test_strict_backend_raises_where_a_layer_is_left():
    model = fastformer.accelerate(bert())
    with fastformer.backend("cpu", strict=True):
        logits(model)
        model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_: None)
        with pytest.raises(NotImplementedError, match="output.dense has hooks"):
            logits(model)


def test_unknown_model():
    for unknown in (
        nn.Linear(3, 3),
        transformers.T5Model(transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)),
    ):
        before = classes(unknown)
        with pytest.raises(ValueError, match=f"{type(unknown).__name__}.*BERT and GPT-2"):
            fastformer.accelerate(unknown)
        assert classes(unknown) == before
        assert not fastformer.report(unknown).rows
    for options in ({"weights": "int8"}, {"quantize": "int4"}, {"quantize": "int8", "weights": "bfloat16"}):
        with pytest.raises(ValueError, match="weights|quantize"):
            fastformer.accelerate(bert(), **options)


def test_models_inside_of_others_are_found():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = bert("BertModel"), nn.Linear(48, 3)

    report = fastformer.report(fastformer.accelerate(Tagger()))
    assert report.fused and all(row.name.startswith("encoder") for row in report.rows)


def test_dtypes_and_devices_that_no_backend_takes():
    model = bert()
    model.bert.encoder.layer[0].to("meta")
    report = fastformer.report(fastformer.accelerate(model))
    assert any("meta" in reason for row in report.left for reason in row.reasons)


def test_report_groups_equal_layers():
    model = bert(num_hidden_layers=5)
    assert str(fastformer.report(model)).endswith("0 of 26 modules fused")
    fastformer.accelerate(model)
    model.bert.encoder.layer[2].output.dense.register_forward_hook(lambda *_: None)
    assert str(fastformer.report(model)) == "\n".join(
        [
            "bert                                     BertModel                    fused",
            "bert.embeddings                          BertEmbeddings               fused",
            "bert.embeddings.LayerNorm                LayerNorm                    fused",
            "bert.encoder                             BertEncoder                  fused",
            "bert.encoder.layer.0-1,3-4               BertLayer                    fused",
            "bert.encoder.layer.0-4.attention.self    BertSelfAttention            fused",
            "bert.encoder.layer.0-4.attention.output  BertSelfOutput               fused",
            "bert.encoder.layer.0-1,3-4.output        BertOutput                   fused",
            "bert.encoder.layer.2                     BertLayer                    stock: output.dense has hooks",
            "bert.encoder.layer.2.output              BertOutput                   stock: dense has hooks",
            "cls.predictions.transform                BertPredictionHeadTransform  fused",
            "cls.predictions.decoder                  Linear                       fused",
            "24 of 26 modules fused",
        ]
    )


def test_without_the_op_library(monkeypatch):
    monkeypatch.setattr(library, "_problem", "the op library is not built")
    model = bert()
    before = classes(model)
    with pytest.warns(UserWarning, match="swapped nothing.*is not built"):
        fastformer.accelerate(model)
    assert classes(model) == before
    assert "is not built" in str(fastformer.report(model))
    with pytest.raises(NotImplementedError, match="is not built"):
        fastformer.accelerate(model, strict=True)


def test_an_old_transformers(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(NotImplementedError, match="4.57.1.*>= 5.20"):
        fastformer.accelerate(bert())
