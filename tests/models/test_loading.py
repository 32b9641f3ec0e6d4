"""Checkpoint folders: what is read, what is written, and what is refused and how it says so."""

import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastformer import models

BERT = dict(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
)
GPT = dict(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
CLASSES = {
    "BertModel": models.BertModel,
    "BertForPreTraining": models.BertForPreTraining,
    "BertForMaskedLM": models.BertForMaskedLM,
    "BertForSequenceClassification": models.BertForSequenceClassification,
    "BertForTokenClassification": models.BertForTokenClassification,
    "BertForQuestionAnswering": models.BertForQuestionAnswering,
    "GPT2Model": models.GptModel,
    "GPT2LMHeadModel": models.GptLMHeadModel,
}
IDS = torch.arange(1, 15).view(2, 7)


def config(architecture: str):
    return models.BertConfig(**BERT) if architecture.startswith("Bert") else models.GptConfig(**GPT)


def saved(architecture: str, folder: Path) -> models.PretrainedModel:
    torch.manual_seed(0)
    model = CLASSES[architecture](config(architecture)).eval()
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: x.contiguous() for name, x in edit(tensors).items()}, folder / "model.safetensors")


def same_outputs(ours, theirs) -> None:
    with torch.no_grad():
        outputs, expected = ours(IDS), theirs(IDS)
    for name, value in outputs._asdict().items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, getattr(expected, name), atol=1e-5, rtol=1e-5)


def same_weights(model, other) -> None:
    weights = other.state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@pytest.fixture(autouse=True)
def no_warnings_unless_expected():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# What is read and written


@pytest.mark.parametrize("architecture", CLASSES)
def test_round_trip(architecture: str, tmp_path) -> None:
    """What is saved comes back whole: here and in transformers, and again from what transformers saves."""
    model = saved(architecture, tmp_path / "ours")
    again = models.load(tmp_path / "ours")
    assert type(again) is CLASSES[architecture]
    same_weights(again, model)

    theirs, info = getattr(transformers, architecture).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    same_outputs(model, theirs.eval())
    theirs.save_pretrained(tmp_path / "theirs")
    same_weights(models.load(tmp_path / "theirs"), model)


@pytest.mark.parametrize("architecture", ["BertForPreTraining", "GPT2LMHeadModel"])
def test_shards(architecture: str, tmp_path) -> None:
    theirs = getattr(transformers, architecture)(
        transformers.BertConfig(**BERT) if architecture.startswith("Bert") else transformers.GPT2Config(**GPT)
    ).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same_outputs(models.load(tmp_path), theirs)


@pytest.mark.parametrize("architecture", ["BertForPreTraining", "GPT2LMHeadModel"])
def test_ties_hold_after_loading(architecture: str, tmp_path) -> None:
    saved(architecture, tmp_path)
    assert not {"lm_head.weight", "cls.predictions.decoder.weight"} & load_file(tmp_path / "model.safetensors").keys()
    model = models.load(tmp_path)
    for alias, source in model.tied.items():
        assert model.get_parameter(alias) is model.get_parameter(source)


def test_legacy_names_and_buffers(tmp_path) -> None:
    """gamma and beta, and constants among the weights, as in files from 2018 on."""

    def age(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        aged = {}
        for name, tensor in tensors.items():
            for new, old in names.items():
                name = name.replace(new, old)
            aged[name] = tensor
        decoder = {"cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone()}
        return {**aged, **decoder, "bert.embeddings.position_ids": torch.arange(16)[None]}

    model = saved("BertForPreTraining", tmp_path)
    edit_tensors(tmp_path, age)
    assert any(name.endswith("gamma") for name in load_file(tmp_path / "model.safetensors"))
    same_weights(models.load(tmp_path), model)


def test_gpt_buffers(tmp_path) -> None:
    model = saved("GPT2LMHeadModel", tmp_path)
    buffers = {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16), "transformer.h.0.attn.masked_bias": torch.ones(1)}
    edit_tensors(tmp_path, lambda tensors: {**tensors, **buffers})
    same_weights(models.load(tmp_path), model)


def test_a_tied_weight_is_read_under_either_name(tmp_path) -> None:
    model = saved("GPT2LMHeadModel", tmp_path)
    edit_tensors(tmp_path, lambda tensors: {"lm_head.weight": tensors.pop("transformer.wte.weight"), **tensors})
    same_weights(models.load(tmp_path), model)


@pytest.mark.parametrize(
    ("source", "target"),
    [("BertForPreTraining", "BertModel"), ("GPT2LMHeadModel", "GPT2Model"), ("GPT2Model", "GPT2LMHeadModel")],
)
def test_prefix_is_added_or_taken_off(source: str, target: str, tmp_path) -> None:
    model = saved(source, tmp_path)
    loaded = CLASSES[target].from_pretrained(tmp_path)
    base = getattr(loaded, loaded.base_model_prefix, loaded)
    same_weights(base, getattr(model, model.base_model_prefix, model))


def test_new_head_warns_and_is_initialised(tmp_path) -> None:
    base = saved("BertModel", tmp_path)
    with pytest.warns(UserWarning, match="newly initialised.*classifier.bias, classifier.weight"):
        model = models.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=7)
    same_weights(model.bert, base)
    assert model.config.num_labels == 7 and model.classifier.weight.shape == (7, 16)
    assert 0.01 < model.classifier.weight.std() < 0.03 and not model.classifier.bias.any()


def test_new_language_model_head_is_tied(tmp_path) -> None:
    base = saved("BertModel", tmp_path)
    with pytest.warns(UserWarning, match="cls.predictions.bias"):
        model = models.BertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(model.cls.predictions.decoder.weight, base.embeddings.word_embeddings.weight)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert not model.cls.predictions.bias.any()


def test_pooler_may_be_absent(tmp_path) -> None:
    saved("BertForMaskedLM", tmp_path)
    with pytest.warns(UserWarning, match="bert.pooler.dense.bias, bert.pooler.dense.weight"):
        models.BertModel.from_pretrained(tmp_path)


def test_labels_and_overrides(tmp_path) -> None:
    labels = {0: "O", 1: "PER", 2: "LOC"}
    config = models.BertConfig(**BERT, num_labels=3, id2label=labels, problem_type="single_label_classification")
    models.BertForTokenClassification(config).save_pretrained(tmp_path)
    assert models.load(tmp_path).config == config
    assert transformers.BertConfig.from_pretrained(tmp_path).id2label == labels
    assert models.BertForTokenClassification.from_pretrained(tmp_path, classifier_dropout=0.3).dropout.p == 0.3
    with pytest.raises(ValueError, match=r"classifier.(weight|bias) must have shape \(5,.*got \(3,"):
        models.BertForTokenClassification.from_pretrained(tmp_path, num_labels=5)
    with pytest.raises(TypeError, match="hidden"):
        models.BertForTokenClassification.from_pretrained(tmp_path, hidden=5)


def test_half_precision_file_is_read_in_the_default_dtype(tmp_path) -> None:
    saved("BertModel", tmp_path)
    edit_tensors(tmp_path, lambda tensors: {name: x.to(torch.float16) for name, x in tensors.items()})
    model = models.load(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    stored = load_file(tmp_path / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.equal(model.embeddings.word_embeddings.weight, stored.float())


def test_training_leaves_the_file_alone(tmp_path) -> None:
    saved("BertModel", tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = models.load(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


# What is refused


def test_no_folder(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder 'bert-base-uncased'.*nothing is downloaded"):
        models.load("bert-base-uncased")
    with pytest.raises(FileNotFoundError, match="no checkpoint: it has no config.json"):
        models.load(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "must hold a JSON object, got list")])
def test_broken_config(text: str, message: str, tmp_path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path)


def test_no_weights(tmp_path) -> None:
    saved("BertModel", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor model.safetensors.index.json"):
        models.load(tmp_path)


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_never_loaded(tmp_path) -> None:
    saved("BertModel", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ValueError, match="pickled .bin files.*AutoModel.from_pretrained.*save_pretrained"):
        models.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_broken_weights(tmp_path) -> None:
    saved("BertModel", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        models.load(tmp_path)
    path.write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ({}, ValueError, "must have a weight_map"),
        ({"weight_map": {"a": "../a.safetensors"}}, ValueError, "files of its own folder, got '../a.safetensors'"),
        ({"weight_map": {"a": "1.safetensors"}}, FileNotFoundError, "has no 1.safetensors"),
    ],
)
def test_broken_index(index: dict, error: type[Exception], message: str, tmp_path) -> None:
    saved("BertModel", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: {k: x for k, x in t.items() if "layer.1." not in k}, "lacks weights of BertModel.*and 8 more"),
        (lambda t: {**t, "encoder.layer.2.output.dense.bias": torch.ones(16)}, r"has no bert.encoder.layer.2"),
        (lambda t: {**t, "pooler.dense.bias": torch.ones(3)}, r"pooler.dense.bias must have shape \(16,\).*got \(3,\)"),
        (lambda t: {**t, "pooler.dense.bias": torch.ones(16, dtype=torch.int8)}, "must be floating point, got.*int8"),
        (lambda t: {"model.norm.weight": torch.ones(16)}, "lacks weights of BertModel"),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "another model"],
)
def test_weights_that_do_not_fit(edit, message: str, tmp_path) -> None:
    saved("BertModel", tmp_path)
    edit_tensors(tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path)


def test_an_untied_head_is_refused(tmp_path) -> None:
    saved("GPT2LMHeadModel", tmp_path)
    edit_tensors(tmp_path, lambda tensors: {**tensors, "lm_head.weight": torch.ones(50, 16)})
    with pytest.raises(ValueError, match="lm_head.weight must equal transformer.wte.weight"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "field", "value"),
    [
        ("BertModel", "position_embedding_type", "relative_key"),
        ("BertModel", "is_decoder", True),
        ("BertModel", "add_cross_attention", True),
        ("BertModel", "tie_word_embeddings", False),
        ("BertModel", "pruned_heads", {"0": [1]}),
        ("BertModel", "quantization_config", {"quant_method": "torchao"}),
        ("BertModel", "hidden_act", "quick_gelu"),
        ("GPT2Model", "reorder_and_upcast_attn", True),
        ("GPT2Model", "add_cross_attention", True),
        ("GPT2Model", "tie_word_embeddings", False),
        ("GPT2Model", "activation_function", "tanh"),
    ],
)
def test_config_fields_that_are_not_supported(architecture: str, field: str, value, tmp_path) -> None:
    saved(architecture, tmp_path)
    edit_config(tmp_path, **{field: value})
    with pytest.raises(NotImplementedError, match=field):
        models.load(tmp_path)


def test_another_architecture(tmp_path) -> None:
    saved("BertModel", tmp_path)
    with pytest.raises(ValueError, match="model_type must be 'gpt2', got 'bert'"):
        models.GptModel.from_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["BertForMultipleChoice"])
    with pytest.raises(NotImplementedError, match="'BertForMultipleChoice' is not supported, only BertModel, "):
        models.load(tmp_path)
    edit_config(tmp_path, model_type="t5")
    with pytest.raises(NotImplementedError, match="model_type='t5' is not supported, only bert, gpt2"):
        models.load(tmp_path)


def test_no_architecture_gives_the_base_model(tmp_path) -> None:
    saved("BertForMaskedLM", tmp_path)
    edit_config(tmp_path, architectures=None)
    with pytest.warns(UserWarning, match="pooler"):
        assert type(models.load(tmp_path)) is models.BertModel
