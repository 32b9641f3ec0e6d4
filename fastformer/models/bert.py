"""BERT in plain eager PyTorch (Devlin et al. 2018, https://arxiv.org/abs/1810.04805).

Modules and state_dict names are those of transformers, so its checkpoints load as they are.
Letters in shapes: B batch, S sequence, H heads, D head size, V vocabulary, L labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import (
    ACTIVATIONS,
    check_activation,
    check_heads,
    check_input_ids,
    cross_entropy,
    init_weights,
    merge_heads,
    padding_mask,
    split_heads,
)
from .loading import PretrainedConfig, PretrainedModel

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True)
class BertConfig(PretrainedConfig):
    """The defaults are BERT-base, uncased.

    Raises:
        ValueError: hidden_size is no multiple of the heads; id2label or problem_type do not fit.
        NotImplementedError: an activation other than those in `layers.ACTIVATIONS`.
    """

    model_type: ClassVar[str] = "bert"
    only_supported: ClassVar[dict[str, Any]] = {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "pruned_heads": {},
        "quantization_config": None,
    }

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    num_labels: int = 2
    id2label: dict[int, str] | None = None
    problem_type: str | None = None  # None: told from num_labels and the dtype of the labels

    def __post_init__(self) -> None:
        check_heads(self.hidden_size, self.num_attention_heads)
        check_activation("hidden_act", self.hidden_act)
        if self.id2label is not None and len(self.id2label) != self.num_labels:
            raise ValueError(f"id2label must name num_labels = {self.num_labels} labels, got {len(self.id2label)}")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"problem_type must be None or one of {PROBLEM_TYPES}, got {self.problem_type!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BertConfig:
        if id2label := values.get("id2label"):
            id2label = {int(index): label for index, label in id2label.items()}
            values = {**values, "id2label": id2label, "num_labels": len(id2label)}
        return super().from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        id2label = self.id2label or {index: f"LABEL_{index}" for index in range(values.pop("num_labels"))}
        return {**values, "id2label": id2label, "label2id": {label: index for index, label in id2label.items()}}


class BertEmbeddings(nn.Module):
    """LayerNorm(word + token type + position)"""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.size(1), device=input_ids.device)
        embeddings = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(embeddings + self.position_embeddings(position_ids)))


class BertSelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V in every head (Vaswani et al. 2017)"""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)  # on the attention weights

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        context = F.scaled_dot_product_attention(
            split_heads(self.query(hidden_states), self.attention_head_size),
            split_heads(self.key(hidden_states), self.attention_head_size),
            split_heads(self.value(hidden_states), self.attention_head_size),
            attn_mask=attention_mask,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return merge_heads(context)


class BertIntermediate(nn.Module):
    """The first half of the feed-forward network: activation(W1 x)"""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = ACTIVATIONS[config.hidden_act]()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


class BertOutput(nn.Module):
    """LayerNorm(dropout(W x) + residual): the end of the attention and of the feed-forward network"""

    def __init__(self, in_features: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config.hidden_size, config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.output(self.self(hidden_states, attention_mask), hidden_states)


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config.intermediate_size, config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """hidden_states: (B, S, H * D); attention_mask: (B, 1, 1, S) bool, True = keep, or None."""
        attention_output = self.attention(hidden_states, attention_mask)
        return self.output(self.intermediate(attention_output), attention_output)


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask)
        return hidden_states


class BertPooler(nn.Module):
    """tanh(W x) of the first token, [CLS]"""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_states[:, 0]))


class BertModelOutput(NamedTuple):
    last_hidden_state: Tensor  # (B, S, H * D)
    pooler_output: Tensor | None  # (B, H * D)


class BertPretrainedModel(PretrainedModel):
    config_class = BertConfig
    base_model_prefix = "bert"
    optional = ("bert.pooler.",)


class BertModel(BertPretrainedModel):
    """The encoder without a head."""

    architecture = "BertModel"

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        init_weights(self, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> BertModelOutput:
        """
        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S) bool or integer, 1 = keep, 0 = padding; None keeps all.
            token_type_ids: (B, S) int64, 0 for the first sentence and 1 for the second; None is all 0.
            position_ids: (B, S) or (S,) int64; None is 0 ... S - 1.

        Raises:
            ValueError: input_ids or attention_mask of another shape, or a sequence longer than the model knows.
            TypeError: an attention_mask in floating point, as if it were to be added.
        """
        check_input_ids(input_ids, 0, self.config.max_position_embeddings)
        mask = padding_mask(attention_mask, *input_ids.shape)
        hidden_states = self.encoder(self.embeddings(input_ids, token_type_ids, position_ids), mask)
        return BertModelOutput(hidden_states, None if self.pooler is None else self.pooler(hidden_states))


class BertPredictionHeadTransform(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = ACTIVATIONS[config.hidden_act]()
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))


class BertLMPredictionHead(nn.Module):
    """Logits of every word, (B, S, V). decoder.weight is that of the word embeddings, decoder.bias is `bias`."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden_states))


TIED_DECODER = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


class BertOutputWithLogits(NamedTuple):
    loss: Tensor | None
    logits: Tensor


class BertForPreTrainingOutput(NamedTuple):
    loss: Tensor | None
    prediction_logits: Tensor  # (B, S, V)
    seq_relationship_logits: Tensor  # (B, 2): [:, 0] the second sentence follows, [:, 1] it is a random one


class BertForPreTraining(BertPretrainedModel):
    """The two heads of the paper's pre-training: masked language model and next sentence."""

    architecture = "BertForPreTraining"
    tied = TIED_DECODER

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = nn.ModuleDict(
            {"predictions": BertLMPredictionHead(config), "seq_relationship": nn.Linear(config.hidden_size, 2)}
        )
        init_weights(self.cls, config.initializer_range)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
    ) -> BertForPreTrainingOutput:
        """As BertModel; labels: (B, S) int64, -100 where no word is to be predicted; next_sentence_label: (B,) int64.

        The loss is the sum of those whose labels are given.
        """
        hidden_states, pooled = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        prediction_logits = self.cls.predictions(hidden_states)
        seq_relationship_logits = self.cls.seq_relationship(pooled)
        loss = None
        if labels is not None:
            loss = cross_entropy(prediction_logits, labels)
        if next_sentence_label is not None:
            next_sentence_loss = cross_entropy(seq_relationship_logits, next_sentence_label)
            loss = next_sentence_loss if loss is None else loss + next_sentence_loss
        return BertForPreTrainingOutput(loss, prediction_logits, seq_relationship_logits)


class BertForMaskedLM(BertPretrainedModel):
    architecture = "BertForMaskedLM"
    tied = TIED_DECODER

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = nn.ModuleDict({"predictions": BertLMPredictionHead(config)})
        init_weights(self.cls, config.initializer_range)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> BertOutputWithLogits:
        """As BertModel; labels: (B, S) int64, -100 where no word is to be predicted. logits: (B, S, V)."""
        hidden_states, _ = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        logits = self.cls.predictions(hidden_states)
        return BertOutputWithLogits(None if labels is None else cross_entropy(logits, labels), logits)
