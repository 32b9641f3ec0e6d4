"""Outputs, losses and gradients of accelerated models, against the stock ones, by the accuracy rule."""

import copy

import pytest
import torch
import transformers
from accelerated.small import (
    MODELS,
    VOCABULARY,
    B,
    S,
    assert_agrees,
    bert,
    gpt2,
    gradients,
    ids,
    logits,
    padding,
    reference_gpt,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastformer
from fastformer import library, models

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the op library")

INPUTS = {
    "no mask": {},
    "all ones": {"attention_mask": torch.ones(B, S, dtype=torch.long)},
    "right padding": {"attention_mask": padding("right")},
    "left padding": {"attention_mask": padding("left")},
    "bool mask": {"attention_mask": padding("right").bool()},
}


def where_kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, S, V) -> (tokens, V): what stands behind the mask is nobody's business."""
    return x if mask is None else x[mask.bool()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("model", MODELS)
def test_logits(model, inputs, dtype):
    given = INPUTS[inputs]

    def results(m: nn.Module) -> dict[str, Tensor]:
        return {"logits": where_kept(logits(m, **given), given.get("attention_mask"))}

    assert_agrees(MODELS[model](), results, dtype)


@pytest.mark.parametrize("training", [False, True], ids=["eval mode", "train mode"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("model", MODELS)
def test_loss_and_gradients(model, inputs, training):
    given = INPUTS[inputs]
    labels = ids().masked_fill(given.get("attention_mask", torch.ones(B, S)) == 0, -100)

    def results(m: nn.Module) -> dict[str, Tensor]:
        m.train(training)
        loss = m(input_ids=ids(), labels=labels, **given).loss
        loss.backward()
        return {"loss": loss.detach(), **gradients(m)}

    assert_agrees(MODELS[model](), results)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
@pytest.mark.parametrize("library_of", [transformers, models], ids=["transformers", "reference"])
def test_activations(library_of, activation, mode):
    def results(m: nn.Module) -> dict[str, Tensor]:
        if mode == "inference":
            return {"logits": logits(m)}
        out = m(input_ids=ids()).logits
        out.square().mean().backward()
        return {"logits": out.detach(), **gradients(m)}

    assert_agrees(bert(library=library_of, hidden_act=activation), results)


ARCHITECTURES = [
    "BertForPreTraining",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("library_of", [transformers, models], ids=["transformers", "reference"])
def test_heads_of_bert(library_of, architecture):
    def results(m: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad():
            out = m(input_ids=ids(), attention_mask=padding("right"), token_type_ids=ids() % 2)
        fields = out.items() if isinstance(out, dict) else out._asdict().items()
        return {
            name: where_kept(x, padding("right")) if x.shape[:2] == (B, S) else x for name, x in fields if x is not None
        }

    assert_agrees(bert(architecture, library_of), results)


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_hidden_states(model):
    def results(m: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad():
            states = m(input_ids=ids(), output_hidden_states=True).hidden_states
        assert len(states) == 3
        return {f"hidden state {i}": state for i, state in enumerate(states)}

    assert_agrees(MODELS[model](), results)


@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_attention_weights(model, mode, padded):
    """output_attentions gives what the eager attention gives; the stock model with "sdpa" gives nothing."""
    fused = MODELS[model]()
    eager = copy.deepcopy(fused)
    eager.set_attn_implementation("eager")
    fastformer.accelerate(fused)
    given = {"input_ids": ids(), "output_attentions": True}
    if padded:
        given["attention_mask"] = padding(padded)
    with torch.set_grad_enabled(mode == "training"):
        out, expected = fused(**given), eager(**given)
    assert len(out.attentions) == len(expected.attentions) == 2
    kept = given.get("attention_mask", torch.ones(B, S)).bool()
    for weights, wanted in zip(out.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(weights.transpose(1, 2)[kept], wanted.transpose(1, 2)[kept], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.logits[kept], expected.logits[kept], atol=1e-5, rtol=1e-4)
    again = fused(input_ids=ids())
    assert again.get("attentions") is None


def test_attention_weights_when_one_layer_is_left():
    model = bert()
    model.bert.encoder.layer[1].attention.self.query.register_forward_hook(lambda *_: None)
    fastformer.accelerate(model)
    out = model(input_ids=ids(), output_attentions=True)
    assert len(out.attentions) == 0  # as in the stock model: not one layer's under another's number


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_attention_weights_of_a_layer_with_a_later_hook(model):
    fused = fastformer.accelerate(MODELS[model]())
    expected = fused(input_ids=ids(), output_attentions=True).attentions
    layer = (fused.bert.encoder.layer if model == "bert" else fused.transformer.h)[1]
    projection = layer.attention.self.query if model == "bert" else layer.attn.c_attn
    projection.register_forward_hook(lambda module, args, output: output * 2)
    weights = fused(input_ids=ids(), output_attentions=True).attentions
    torch.testing.assert_close(weights[0], expected[0])
    assert not torch.allclose(weights[1], expected[1], atol=1e-3)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


MASKS_4D = {
    "bool, per query": random(B, 1, S, S) < 0.5,
    "bool, per head": random(B, 3, S, S) < 0.5,
    "bool, one for all": random(1, 1, S, S) < 0.5,
    "bool, per key": padding("left").bool()[:, None, None, :],
    "bool, expanded": padding("left").bool()[:, None, None, :].expand(B, 1, S, S),
    "float": random(B, 1, S, S),
    "float, expanded": random(1, 1, 1, S).expand(B, 1, S, S),
}
for _mask in MASKS_4D.values():
    if _mask.dtype == torch.bool and _mask.shape[2] == S and _mask.stride(2):
        _mask.diagonal(dim1=2, dim2=3).fill_(True)  # no query without a key


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("mask", MASKS_4D)
@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_masks_of_the_user(model, mask, mode):
    """They replace the causal mask, too."""
    given = MASKS_4D[mask]

    def results(m: nn.Module) -> dict[str, Tensor]:
        dtype = m.get_input_embeddings().weight.dtype
        typed = given if given.dtype == torch.bool else given.to(dtype)
        if mode == "inference":
            return {"logits": logits(m, attention_mask=typed)}
        out = m(input_ids=ids(), attention_mask=typed).logits
        out.square().mean().backward()
        return {"logits": out.detach(), **gradients(m)}

    assert_agrees(MODELS[model](), results)


def test_bert_as_decoder():
    """Causal, with a cache, and left padding."""

    def results(m: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad():
            whole = m(input_ids=ids(), attention_mask=padding("left")).logits
            first = m(input_ids=ids()[:, :8], use_cache=True)
            rest = m(input_ids=ids()[:, 8:], past_key_values=first.past_key_values)
        return {"whole": where_kept(whole, padding("left")), "chunk": rest.logits}

    assert_agrees(bert("BertLMHeadModel", is_decoder=True), results)


def test_cross_attention_is_left():
    for model, architecture in ((bert("BertLMHeadModel", is_decoder=True, add_cross_attention=True), "bert"),
                                (gpt2(add_cross_attention=True), "gpt2")):  # fmt: skip
        states, mask = torch.randn(B, 7, 48), torch.ones(B, 7)
        mask[0, 4:] = 0
        inputs = dict(encoder_hidden_states=states, encoder_attention_mask=mask)
        expected = logits(model, **inputs)
        fastformer.accelerate(model)
        left = {row.name for row in fastformer.report(model).left}
        assert len(left) == 2 and all("crossattention" in name for name in left), architecture
        torch.testing.assert_close(logits(model, **inputs), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits(model), logits(fastformer.restore(model)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False},
                                    {"reorder_and_upcast_attn": True}, {"n_inner": 100}])  # fmt: skip
def test_options_of_gpt2(config):
    assert_agrees(gpt2(**config), lambda m: {"logits": logits(m)})
    if "reorder_and_upcast_attn" not in config:
        assert_agrees(reference_gpt(**config), lambda m: {"logits": logits(m)})


def test_chunked_feed_forward_is_left():
    model = bert(chunk_size_feed_forward=4, max_position_embeddings=40)
    inputs = {"input_ids": ids(length=12)}
    expected = logits(model, **inputs)
    report = fastformer.report(fastformer.accelerate(model))
    assert {row.module for row in report.left} == {"BertLayer"} and "chunk_size_feed_forward" in str(report)
    torch.testing.assert_close(logits(model, **inputs), expected, atol=1e-5, rtol=1e-4)
    model.bert.encoder.layer[0].chunk_size_feed_forward = 0
    fastformer.accelerate(model)
    assert len(fastformer.report(model).left) == 1
    model.bert.encoder.layer[0].chunk_size_feed_forward = 4  # and back again, after it was swapped
    torch.testing.assert_close(logits(model, **inputs), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_empty_batch(model):
    fused = fastformer.accelerate(MODELS[model]())
    assert logits(fused, input_ids=ids()[:0]).shape == (0, S, VOCABULARY)


@pytest.mark.parametrize("model", MODELS)
def test_autocast(model):
    """As exact as the stock model under autocast; the dtypes are the same."""
    eager = MODELS[model]()
    fused = fastformer.accelerate(copy.deepcopy(eager))
    exact = logits(copy.deepcopy(eager).double())
    for training in (False, True):
        outs = []
        for m in (fused, eager):
            m.train(training)
            with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
                outs.append(m(input_ids=ids()).logits)
        assert outs[0].dtype == outs[1].dtype == torch.bfloat16
        errors = [(out.double() - exact).abs().max().item() for out in outs]
        assert errors[0] <= 2 * errors[1], f"error {errors[0]:.3g}, stock {errors[1]:.3g}"


@pytest.mark.parametrize("model", MODELS)
def test_dropout(model):
    """On in train mode, and then about the right share is dropped; off in eval mode."""
    names = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    if "gpt" in model:
        names = {"resid_pdrop": 0.3, "attn_pdrop": 0.3}
    build = {
        "bert": bert,
        "gpt2": gpt2,
        "reference bert": lambda **c: bert(library=models, **c),
        "reference gpt": reference_gpt,
    }
    eager = build[model](**names)
    fused = fastformer.accelerate(copy.deepcopy(eager))
    torch.testing.assert_close(logits(fused), logits(eager), atol=1e-5, rtol=1e-4)
    spreads = []
    for m in (fused, eager):
        m.train()
        samples = torch.stack([logits(m) for _ in range(40)])
        spreads.append(samples.std(0).mean().item())
    assert spreads[0] == pytest.approx(spreads[1], rel=0.15)
    torch.manual_seed(3)
    first = logits(fused)
    torch.manual_seed(3)
    assert torch.equal(first, logits(fused))


def test_dropout_left_on_in_eval_mode():
    """Monte-Carlo dropout: modules decide for themselves."""
    model = fastformer.accelerate(bert(hidden_dropout_prob=0.3))
    fixed = logits(model)
    for module in model.bert.encoder.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), fixed)


@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model, reentrant):
    def results(m: nn.Module) -> dict[str, Tensor]:
        m.train()
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        layers = m.bert.encoder.layer if model == "bert" else m.transformer.h
        calls = []
        hook = layers[0].output.dense if model == "bert" else layers[0].mlp.c_proj  # a module inside would see a call
        assert not hook._forward_hooks
        original = type(layers[0]).feed_forward
        type(layers[0]).feed_forward = lambda *args: calls.append(1) or original(*args)
        try:
            m(input_ids=ids(), labels=ids()).loss.backward()
        finally:
            type(layers[0]).feed_forward = original
        assert len(calls) == 4  # two layers, each forward and recomputed
        return gradients(m)

    eager = MODELS[model]()
    fused = fastformer.accelerate(copy.deepcopy(eager))
    out = results(fused)
    eager(input_ids=ids(), labels=ids()).loss.backward()
    for name, gradient in gradients(eager).items():
        torch.testing.assert_close(out[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_backend_torch_runs_the_stock_forward(model):
    eager = MODELS[model]()
    fused = fastformer.accelerate(copy.deepcopy(eager))
    with fastformer.backend("torch"):
        assert torch.equal(
            logits(fused, attention_mask=padding("right")), logits(eager, attention_mask=padding("right"))
        )


def test_a_missing_backend_is_said_once(recwarn):
    model = fastformer.accelerate(bert())
    with fastformer.backend("triton"):
        out = logits(model)
    with fastformer.backend("torch"):
        assert torch.equal(out, logits(model))
    assert any("triton" in str(w.message) for w in recwarn)
    with pytest.raises(NotImplementedError, match="triton"), fastformer.backend("triton", strict=True):
        logits(model)


@pytest.mark.parametrize("model", MODELS)
def test_forward_mode_differentiation(model):
    """The kernels know no tangents: under torch.func the stock forward runs."""
    fused = fastformer.accelerate(MODELS[model]().double()).requires_grad_(False)
    name = next(n for n, _ in fused.named_parameters() if n.endswith(("dense.weight", "c_fc.weight")))
    weight = fused.get_parameter(name).detach()
    direction = torch.randn_like(weight)

    def f(weight: Tensor) -> Tensor:
        return torch.func.functional_call(fused, {name: weight}, (), {"input_ids": ids()}).logits

    with sdpa_kernel(SDPBackend.MATH):  # torch's other CPU kernel knows none either
        out, tangent = torch.func.jvp(f, (weight,), (direction,))
    difference = (f(weight + 1e-5 * direction) - f(weight - 1e-5 * direction)) / 2e-5
    assert tangent.abs().max() > 0.1
    torch.testing.assert_close(tangent, difference, atol=1e-5 * tangent.abs().max().item(), rtol=0)
    torch.testing.assert_close(out, logits(fused), atol=1e-9, rtol=0)


def test_tangents_of_the_input():
    """With frozen weights nothing but the hidden states tells that a derivative is asked for."""
    layer = fastformer.accelerate(bert("BertModel").double()).requires_grad_(False).encoder.layer[0]
    x, direction = torch.randn(2, 5, 48, dtype=torch.float64), torch.randn(2, 5, 48, dtype=torch.float64)
    layer(x)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        _, tangent = torch.func.jvp(layer, (x,), (direction,))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction)))
    difference = (layer(x + 1e-5 * direction) - layer(x - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close(tangent, difference, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(dual.tangent, tangent)
