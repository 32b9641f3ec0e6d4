"""The encoder-decoder Transformer in plain eager PyTorch (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

One vocabulary for both languages: the embeddings of source and target and the weight of the head are the same. Layers
have the names of torch.nn.TransformerEncoderLayer and TransformerDecoderLayer, but for query, key and value, which are
linears of their own.
Letters in shapes: B batch, S source, T target, P past, K keys, H heads, D head size, E = H D, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastformer import ops

from .generation import KeyValue, KeyValueCache, LayerCache, continued, search
from .layers import (
    ACTIVATIONS,
    check_activation,
    check_heads,
    check_input_ids,
    merge_heads,
    padding_mask,
    split_heads,
)
from .loading import PretrainedConfig, PretrainedModel


@dataclass(frozen=True)
class TransformerConfig(PretrainedConfig):
    """The defaults are the paper's base model, 65M parameters with its vocabulary.

    Raises:
        ValueError: d_model is no multiple of nhead.
        NotImplementedError: an activation other than those in `layers.ACTIVATIONS`.
    """

    model_type: ClassVar[str] = "transformer"

    vocab_size: int = 37000
    d_model: int = 512
    nhead: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    dim_feedforward: int = 2048
    dropout: float = 0.1
    activation: str = "relu"
    layer_norm_eps: float = 1e-5
    norm_first: bool = False  # pre-norm, with a layer-norm behind the last layer
    n_positions: int = 1024  # tokens of a source or a target, at most: positions have no parameters
    label_smoothing: float = 0.1
    pad_token_id: int = 0
    bos_token_id: int = 1  # what the decoder begins with
    eos_token_id: int = 2

    def __post_init__(self) -> None:
        check_heads(self.d_model, self.nhead)
        check_activation("activation", self.activation)


class TransformerAttention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V in every head, then a projection. Keys and values are made apart: the decoder keeps
    those of the past and of the encoder's output."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.num_heads, self.head_dim = config.nhead, config.d_model // config.nhead
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.dropout)  # on the attention weights

    def key_value(self, hidden_states: Tensor) -> KeyValue:
        """(B, K, E) -> (B, H, K, D) each"""
        projections = self.k_proj, self.v_proj
        key, value = (split_heads(linear(hidden_states), self.head_dim) for linear in projections)
        return key, value

    def forward(
        self, hidden_states: Tensor, key_value: KeyValue, attention_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """hidden_states: (B, T, E); attention_mask: (B, 1, 1, K) bool, True = keep, or None."""
        context = F.scaled_dot_product_attention(
            split_heads(self.q_proj(hidden_states), self.head_dim),
            *key_value,
            attn_mask=attention_mask,
            dropout_p=self.dropout.p if self.training else 0.0,
            is_causal=is_causal,
        )
        return self.out_proj(merge_heads(context))


Sublayer = Callable[[Tensor], Tensor]


class TransformerEncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with dropout, residual and layer-norm."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm_first = config.norm_first
        self.self_attn = TransformerAttention(config)
        self.linear1 = nn.Linear(config.d_model, config.dim_feedforward)
        self.activation = ACTIVATIONS[config.activation]()
        self.dropout = nn.Dropout(config.dropout)
        self.linear2 = nn.Linear(config.dim_feedforward, config.d_model)
        self.norm1 = nn.LayerNorm(config.d_model, config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.d_model, config.layer_norm_eps)
        self.dropout1 = nn.Dropout(config.dropout)
        self.dropout2 = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """hidden_states: (B, S, E); attention_mask: (B, 1, 1, S) bool, True = keep, or None."""

        def self_attention(x: Tensor) -> Tensor:
            return self.self_attn(x, self.self_attn.key_value(x), attention_mask)

        return self.sublayers(hidden_states, [self_attention])

    def sublayers(self, x: Tensor, attentions: Sequence[Sublayer]) -> Tensor:
        """x through one attention after the other and the feed-forward network."""
        for i, sublayer in enumerate((*attentions, self.feed_forward), 1):
            norm, dropout = getattr(self, f"norm{i}"), getattr(self, f"dropout{i}")
            x = x + dropout(sublayer(norm(x))) if self.norm_first else norm(x + dropout(sublayer(x)))
        return x

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class TransformerDecoderLayer(TransformerEncoderLayer):
    """Causal self-attention, attention to the encoder's output and a feed-forward network."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.multihead_attn = TransformerAttention(config)
        self.norm3 = nn.LayerNorm(config.d_model, config.layer_norm_eps)
        self.dropout3 = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        memory: Tensor | KeyValue,
        memory_mask: Tensor | None = None,
        past: LayerCache | None = None,
    ) -> Tensor:
        """hidden_states: (B, T, E), of all tokens of the target, or of the one behind those in `past`, which gets its
        key and value; memory: the encoder's output (B, S, E), or `multihead_attn.key_value` of it; memory_mask:
        (B, 1, 1, S) or None."""

        def self_attention(x: Tensor) -> Tensor:
            key_value = self.self_attn.key_value(x)
            if past is not None:
                key_value = past.append(*key_value)
            return self.self_attn(x, key_value, is_causal=past is None)

        def cross_attention(x: Tensor) -> Tensor:
            key_value = self.multihead_attn.key_value(memory) if isinstance(memory, Tensor) else memory
            return self.multihead_attn(x, key_value, memory_mask)

        return self.sublayers(hidden_states, [self_attention, cross_attention])


class TransformerOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor | None  # (B, T, V)


class TransformerForConditionalGeneration(PretrainedModel):
    """Encoder, decoder, and logits of the target's next token: for translation."""

    config_class = TransformerConfig
    architecture = "TransformerForConditionalGeneration"
    base_model_prefix = "model"
    tied = {"lm_head.weight": "embedding.weight"}

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(TransformerEncoderLayer(config) for _ in range(config.num_encoder_layers))
        self.decoder = nn.ModuleList(TransformerDecoderLayer(config) for _ in range(config.num_decoder_layers))
        norms = (
            nn.LayerNorm(config.d_model, config.layer_norm_eps) if config.norm_first else nn.Identity() for _ in "12"
        )
        self.encoder_norm, self.decoder_norm = norms
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        with torch.no_grad():
            self.embedding.weight[config.pad_token_id].zero_()
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> TransformerOutput:
        """
        Args:
            input_ids: (B, S) int64, the source.
            attention_mask: (B, S) bool or integer, 1 = keep, 0 = padding; None keeps all.
            decoder_input_ids: (B, T) int64, bos_token_id and the target without its last token; padding may stand on
                its right. None takes them from the labels.
            labels: (B, T) int64, the target with eos_token_id at its end, -100 behind it. With them the loss is
                computed, smoothed by config.label_smoothing, and the logits never exist.

        Raises:
            ValueError: another shape, more than n_positions tokens, or neither decoder_input_ids nor labels.
            TypeError: an attention_mask in floating point, as if it were to be added.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoder_input_ids must be given where there are no labels")
            decoder_input_ids = self.shifted(labels)
        mask = self.mask(input_ids, attention_mask)
        hidden_states = self.decode(decoder_input_ids, self.encode(input_ids, mask), mask)
        if labels is None:
            return TransformerOutput(None, self.lm_head(hidden_states))
        smoothing = self.config.label_smoothing
        return TransformerOutput(
            ops.linear_cross_entropy(hidden_states, self.lm_head.weight, labels, label_smoothing=smoothing), None
        )

    def shifted(self, labels: Tensor) -> Tensor:
        """What the decoder reads to say the labels (B, T)."""
        begin = labels.new_full((labels.size(0), 1), self.config.bos_token_id)
        tokens = labels.masked_fill(labels == -100, self.config.pad_token_id)
        return torch.cat([begin, tokens[:, :-1]], 1)

    def mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        check_input_ids(input_ids, 0, self.config.n_positions)
        return padding_mask(attention_mask, *input_ids.shape)

    def embed(self, tokens: Tensor, begin: int = 0) -> Tensor:
        """(B, T) tokens, the first of them at position `begin` -> (B, T, E)"""
        hidden_states = self.embedding(tokens) * math.sqrt(self.config.d_model)
        return self.dropout(hidden_states + sinusoids(begin, hidden_states))

    def encode(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """(B, S, E) of the source (B, S), to which the decoder attends; mask: (B, 1, 1, S) or None."""
        hidden_states = self.embed(input_ids)
        for layer in self.encoder:
            hidden_states = layer(hidden_states, mask)
        return self.encoder_norm(hidden_states)

    def decode(
        self,
        tokens: Tensor,
        memory: Tensor | list[KeyValue],
        mask: Tensor | None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """(B, T, E) of the target's tokens (B, T); memory: what `encode` returned, or each layer's key_value of it.
        With a cache T is 1, the token behind those in the cache."""
        begin = cache.length if cache else 0
        check_input_ids(tokens, begin, self.config.n_positions)
        hidden_states = self.embed(tokens, begin)
        pasts = cache.layers if cache else [None] * len(self.decoder)
        memories = [memory] * len(self.decoder) if isinstance(memory, Tensor) else memory
        for layer, layer_memory, past in zip(self.decoder, memories, pasts, strict=True):
            hidden_states = layer(hidden_states, layer_memory, mask, past)
        return self.decoder_norm(hidden_states)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int, num_beams: int = 1
    ) -> Tensor:
        """The target of each source: by the likeliest token each time, or with num_beams by beam search, which judges
        by the mean of the tokens' log-probabilities. For a model in eval mode.

        Args:
            input_ids, attention_mask: as in `forward`.
            max_new_tokens: of a target, eos_token_id included.

        Returns:
            (B, the most tokens of a target) int64, without bos_token_id; eos_token_id and padding at the end.

        Raises:
            ValueError: an argument out of its range, or of another shape.
            TypeError: an attention_mask in floating point.
        """
        if not 1 <= max_new_tokens <= self.config.n_positions:
            raise ValueError(f"max_new_tokens must be 1 to {self.config.n_positions}, got {max_new_tokens}")
        if num_beams < 1:
            raise ValueError(f"num_beams must be 1 or more, got {num_beams}")
        steps = _Steps(self, input_ids, attention_mask, max_new_tokens)
        begin = input_ids.new_full((input_ids.size(0), 1), self.config.bos_token_id)
        end = max_new_tokens, (self.config.eos_token_id,), self.config.pad_token_id
        if num_beams > 1:
            return search(steps, begin, *end, num_beams)[:, 1:]
        return continued(steps, begin, *end, partial(torch.argmax, dim=-1))[:, 1:]


class _Steps:
    """A model with the keys and values of a source and of the target so far."""

    def __init__(
        self,
        model: TransformerForConditionalGeneration,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        max_new_tokens: int,
    ):
        self.model, self.mask = model, model.mask(input_ids, attention_mask)
        encoded = model.encode(input_ids, self.mask)
        self.memory = [layer.multihead_attn.key_value(encoded) for layer in model.decoder]
        self.cache = KeyValueCache(model.config.num_decoder_layers, max_new_tokens)
        self.sources = torch.arange(input_ids.size(0), device=input_ids.device)  # whose target each sequence is

    def logits(self, tokens: Tensor) -> Tensor:
        logits = self.model.lm_head(self.model.decode(tokens, self.memory, self.mask, self.cache)[:, -1])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)
        sources = self.sources[rows]
        if not torch.equal(sources, self.sources):  # they are, where the beams of a source change places
            self.memory = [(key[rows], value[rows]) for key, value in self.memory]
            self.mask = None if self.mask is None else self.mask[rows]
            self.sources = sources


def sinusoids(begin: int, like: Tensor) -> Tensor:
    """(T, E): sin and cos in turn, their wavelengths from 2 pi to 10000 * 2 pi; section 3.5 of the paper."""
    length, width = like.shape[-2:]
    position = torch.arange(begin, begin + length, dtype=torch.float32, device=like.device)
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32, device=like.device) / width)
    angle = position[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width].to(like.dtype)
