"""BERT's heads for fine-tuning: classification of sequences and tokens, with a CRF or without, and answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastformer import ops

from .bert import PROBLEM_TYPES, BertConfig, BertModel, BertOutputWithLogits, BertPretrainedModel
from .layers import cross_entropy, init_weights


class BertForSequenceClassification(BertPretrainedModel):
    architecture = "BertForSequenceClassification"

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        init_weights(self.classifier, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> BertOutputWithLogits:
        """As BertModel; logits: (B, L).

        labels and loss by `config.problem_type`: "single_label_classification" (B,) int64, cross entropy;
        "multi_label_classification" (B, L) of 0 and 1, binary cross entropy; "regression" (B, L), or (B,) if L is 1,
        mean squared error. If it is None, one label is a regression, integer labels are single labels.
        """
        _, pooled = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        logits = self.classifier(self.dropout(pooled))
        return BertOutputWithLogits(None if labels is None else self.loss(logits, labels), logits)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem_type = self.config.problem_type
        if problem_type is None:
            integers = not labels.is_floating_point()
            problem_type = "regression" if self.config.num_labels == 1 else PROBLEM_TYPES[1 if integers else 2]
        if problem_type == "regression":
            return F.mse_loss(logits, labels.view_as(logits).to(logits.dtype))
        if problem_type == "single_label_classification":
            return cross_entropy(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


class BertForTokenClassification(BertPretrainedModel):
    architecture = "BertForTokenClassification"

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        init_weights(self.classifier, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> BertOutputWithLogits:
        """As BertModel; labels: (B, S) int64, -100 where a token has none. logits: (B, S, L)."""
        hidden_states, _ = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        logits = self.classifier(self.dropout(hidden_states))
        return BertOutputWithLogits(None if labels is None else cross_entropy(logits, labels), logits)


class LinearChainCrf(nn.Module):
    """The scores of neighbouring tags (Lafferty, McCallum, Pereira 2001), under the names of pytorch-crf."""

    def __init__(self, num_labels: int):
        super().__init__()
        self.start_transitions = nn.Parameter(torch.empty(num_labels))
        self.end_transitions = nn.Parameter(torch.empty(num_labels))
        self.transitions = nn.Parameter(torch.empty(num_labels, num_labels))  # from, to
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def forward(self, emissions: Tensor, tags: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean log-likelihood; see :func:`fastformer.ops.crf_log_likelihood`."""
        return ops.crf_log_likelihood(
            emissions, tags, self.transitions, self.start_transitions, self.end_transitions, mask
        )

    def decode(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """The best tags; see :func:`fastformer.ops.crf_decode`."""
        return ops.crf_decode(emissions, self.transitions, self.start_transitions, self.end_transitions, mask)


class BertCrfForTokenClassification(BertPretrainedModel):
    """Token classification whose tags are chosen together: a linear-chain CRF on top of the logits."""

    architecture = "BertCrfForTokenClassification"

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.crf = LinearChainCrf(config.num_labels)
        init_weights(self.classifier, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> BertOutputWithLogits:
        """As BertModel; labels: (B, S) int64, -100 where a token has none. logits: (B, S, L), what `decode` takes.

        The loss is minus the mean log-likelihood of the labelled tokens' tags; the others are not in the chain.
        """
        hidden_states, _ = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        logits = self.classifier(self.dropout(hidden_states))
        if labels is None:
            return BertOutputWithLogits(None, logits)
        mask = None if attention_mask is None else attention_mask.bool()
        return BertOutputWithLogits(-self.crf(logits, labels, mask), logits)

    def decode(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """The best tags, (B, S) int64, -100 where there is none.

        mask: (B, S) bool or integer, 1 for the tokens that have a tag: in training, those with a label.
        """
        return self.crf.decode(logits, None if mask is None else mask.bool())


class BertForQuestionAnsweringOutput(NamedTuple):
    loss: Tensor | None
    start_logits: Tensor  # (B, S)
    end_logits: Tensor  # (B, S)


class BertForQuestionAnswering(BertPretrainedModel):
    """Where an answer starts and ends in the passage (section 4.2 of the paper)."""

    architecture = "BertForQuestionAnswering"

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        init_weights(self.qa_outputs, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> BertForQuestionAnsweringOutput:
        """As BertModel; start_positions, end_positions: (B,) int64, S or more if the answer was cut off, below 0 as 0.

        The loss is the mean of the two, if both are given.
        """
        hidden_states, _ = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        start_logits, end_logits = self.qa_outputs(hidden_states).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss = position_loss(start_logits, start_positions)
            loss = (start_loss + position_loss(end_logits, end_positions)) / 2
        return BertForQuestionAnsweringOutput(loss, start_logits, end_logits)


def position_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Cross entropy of (B, S) logits over the positions; a position beyond the sequence does not count."""
    positions = positions.clamp(min=0)
    return cross_entropy(logits, positions.masked_fill(positions >= logits.size(1), -100))


def classifier_dropout(config: BertConfig) -> nn.Dropout:
    p = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if p is None else p)
