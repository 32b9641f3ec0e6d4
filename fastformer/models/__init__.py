"""Reference BERT, GPT-2 and encoder-decoder Transformer in plain eager PyTorch, read from checkpoint folders: for BERT
and GPT-2 those of Hugging Face."""

from __future__ import annotations

from pathlib import Path

from .bert import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel
from .bert_heads import (
    BertCrfForTokenClassification,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from .gpt import GptConfig, GptLMHeadModel, GptModel
from .loading import PretrainedModel, read_config
from .transformer import TransformerConfig, TransformerForConditionalGeneration

__all__ = [
    "BertConfig",
    "BertCrfForTokenClassification",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "GptConfig",
    "GptLMHeadModel",
    "GptModel",
    "TransformerConfig",
    "TransformerForConditionalGeneration",
    "load",
]

BASE_MODELS: dict[str, type[PretrainedModel]] = {
    model.config_class.model_type: model for model in (BertModel, GptModel, TransformerForConditionalGeneration)
}
ARCHITECTURES: dict[str, type[PretrainedModel]] = {
    model.architecture: model
    for model in (
        BertModel,
        BertForPreTraining,
        BertForMaskedLM,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertCrfForTokenClassification,
        BertForQuestionAnswering,
        GptModel,
        GptLMHeadModel,
        TransformerForConditionalGeneration,
    )
}


def load(folder: str | Path) -> PretrainedModel:
    """The model of a checkpoint folder, of the class that its config.json names: the first of `architectures`, or
    the model without a head if it names none.

    Raises:
        NotImplementedError: a model_type or architecture that is not here; also what `from_pretrained` raises.
    """
    config = read_config(folder)
    model_type = config.get("model_type")
    if model_type not in BASE_MODELS:
        supported = ", ".join(BASE_MODELS)
        raise NotImplementedError(f"{folder}: model_type={model_type!r} is not supported, only {supported}")
    architecture = next(iter(config.get("architectures") or ()), BASE_MODELS[model_type].architecture)
    if architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise NotImplementedError(f"{folder}: architecture {architecture!r} is not supported, only {supported}")
    return ARCHITECTURES[architecture].from_pretrained(folder)
