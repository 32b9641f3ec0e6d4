"""accelerate(model, weights="bfloat16"), and models in 16 bits: packed in half the memory, computed as before."""

import copy

import pytest
import torch
from accelerated.small import MODELS, B, S, assert_all_close, bert, gpt2, ids, logits, padding
from torch import Tensor, nn

import fastformer
from fastformer import backends, library, packing
from fastformer.integrations.fused import weight_of

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the op library")


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return MODELS[request.param]()


def narrow(model: nn.Module) -> nn.Module:
    return fastformer.accelerate(model, weights="bfloat16", strict=True)


def panel_dtypes(model: nn.Module) -> set[torch.dtype]:
    packs = [packing.kept(module) for module in model.modules()]
    return {panels.dtype for packed in packs if packed for panels in packed.panels}


def round_matrices(model: nn.Module) -> nn.Module:
    """A copy with the weights rounded that accelerate packs; embeddings, biases and layer-norms are as they were."""
    model = copy.deepcopy(model)
    heads = [module for name, module in model.named_modules() if name.endswith(("lm_head", "decoder"))]
    for head in heads:  # from the embedding, which stays
        head.weight = nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            embeds = "embeddings" in name or ".wte" in name or ".wpe" in name
            if parameter.dim() == 2 and not embeds and "pooler" not in name and "seq_relationship" not in name:
                parameter.copy_(parameter.bfloat16().float())
    return model


def results(model: nn.Module) -> dict[str, Tensor]:
    mask = padding("right")
    padded = logits(model, attention_mask=mask)[mask.bool()]
    return {"whole": logits(model), "padded": padded, "one": logits(model, input_ids=ids()[:1, :1])}


def test_outputs_are_those_of_rounded_weights(model):
    """By the rule of accuracy, against the rounded model in float32 and float64."""
    rounded = round_matrices(model)
    exact = results(model)
    outputs = results(narrow(model))
    assert panel_dtypes(model) == {torch.bfloat16}
    assert_all_close(outputs, results(rounded), results(rounded.double()))
    assert not torch.allclose(outputs["whole"], exact["whole"], atol=1e-4)


def test_equals_a_rounded_model_that_is_accelerated(model):
    """Bit for bit: a product with panels in 16 bits is that with their values in float32."""
    rounded = fastformer.accelerate(round_matrices(model))
    outputs, expected = results(narrow(model)), results(rounded)
    assert panel_dtypes(rounded) == {torch.float32}
    for name in outputs:
        assert torch.equal(outputs[name], expected[name]), name


def test_weights_stay(model):
    state, expected = copy.deepcopy(model.state_dict()), logits(model)
    logits(narrow(model))
    for name, x in model.state_dict().items():
        assert torch.equal(x, state[name]) and x.dtype == state[name].dtype
    fastformer.restore(model)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert torch.equal(logits(model), expected)
    assert not any(name.startswith("_fastformer") for module in model.modules() for name in module.__dict__)


def test_an_edit_is_seen(model):
    before = logits(narrow(model))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name and "wt" not in name:
            parameter.data.mul_(-1)
    after, fresh = logits(model), logits(narrow(copy.deepcopy(model)))
    assert torch.equal(after, fresh) and not torch.allclose(after, before, atol=1e-3)


def test_switch(model):
    rounded = logits(narrow(model))
    exact = logits(fastformer.accelerate(model))
    assert panel_dtypes(model) == {torch.float32} and not torch.equal(exact, rounded)
    assert not torch.equal(logits(fastformer.accelerate(model, quantize="int8")), exact)
    assert panel_dtypes(model) == {torch.int8}
    assert torch.equal(logits(narrow(model)), rounded)


def test_training_uses_the_weights_as_they_are(model):
    runs = []
    for kept in (fastformer.accelerate(copy.deepcopy(model)), narrow(copy.deepcopy(model))):
        loss = kept.train()(input_ids=ids(), labels=ids()).loss
        runs.append([loss, *torch.autograd.grad(loss, [p for p in kept.parameters() if p.requires_grad])])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_inference_with_gradients_says_so(model, monkeypatch):
    monkeypatch.setattr(backends, "_said", set())
    expected = logits(model)
    with pytest.warns(UserWarning, match="weights in bfloat16 are for inference on CPUs without gradients"):
        output = narrow(model)(input_ids=ids()).logits
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


class TestReport:
    def test_bytes(self):
        model = narrow(gpt2())
        assert "MB" not in str(fastformer.report(model))  # nothing is packed yet
        logits(model)
        rows = fastformer.report(model).rows
        matrices = [module for module in model.modules() if module.__class__.__name__ in ("Conv1D", "Linear")]
        floats = sum(4 * weight_of(module).numel() for module in matrices)
        assert sum(row.float_bytes for row in rows) == floats
        packed = sum(row.packed_bytes for row in rows)
        assert floats / 2 <= packed < floats * 0.75  # columns are filled up to whole panels
        assert {row.weights for row in rows if row.packed_bytes} == {"bfloat16"}
        text = str(fastformer.report(model))
        assert "fused, bfloat16" in text and "MB less than in float32" in text

    def test_float64(self):
        model = bert().double()
        with pytest.raises(
            NotImplementedError, match="bfloat16 takes float32, bfloat16 and float16 weights, got float64"
        ):
            narrow(model)
        assert not fastformer.report(model).fused

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="weights: expected None or 'bfloat16', got 'float16'"):
            fastformer.accelerate(bert(), weights="float16")
        with pytest.raises(ValueError, match="weights: expected None beside quantize='int8', got 'bfloat16'"):
            fastformer.accelerate(bert(), quantize="int8", weights="bfloat16")


@pytest.mark.parametrize("options", [{}, {"weights": "bfloat16"}, {"quantize": "int8"}], ids=str)
@pytest.mark.filterwarnings("ignore:fastformer.accelerate.*no instructions for 8-bit")
def test_the_head_stays_tied(options):
    """One matrix serves embedding and head, before and after, and one packed copy of it is made."""
    model = fastformer.accelerate(gpt2(), **options)
    before = logits(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert packing.kept(model.transformer.wte) is None and len(packing.kept(model.lm_head).panels) == 1
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1.5)
    after = logits(model)
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.equal(after, logits(fastformer.accelerate(copy.deepcopy(model), **options)))
    assert fastformer.restore(model).lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("options", [{}, {"weights": "bfloat16"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits(dtype, options, monkeypatch):
    """Packed in their own dtype, or in bfloat16 where that is asked for: no more memory than the weights."""
    monkeypatch.setattr(library, "multiplies_bfloat16", lambda: False)
    for make in (bert, gpt2):
        eager = make().to(dtype)
        exact = copy.deepcopy(eager).double()
        model = fastformer.accelerate(copy.deepcopy(eager), **options)
        outputs = results(model)
        assert panel_dtypes(model) == {torch.bfloat16 if options else dtype}
        packed = sum(row.packed_bytes for row in fastformer.report(model).rows)
        assert packed < 0.75 * sum(row.float_bytes for row in fastformer.report(model).rows)
        if not options or dtype == torch.bfloat16:  # the same values
            assert_all_close(outputs, results(eager), results(exact))


def test_generation():
    """Token by token as at once."""
    model = narrow(gpt2())
    tokens = model.generate(
        ids(),
        attention_mask=torch.ones_like(ids()),
        max_new_tokens=8,
        pad_token_id=0,
        do_sample=False,
        eos_token_id=None,
    )
    whole = logits(model, input_ids=tokens)
    assert tokens.shape == (B, S + 8)
    assert torch.equal(whole[:, S - 1 : -1].argmax(-1), tokens[:, S:])
