"""BERT of transformers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert import modeling_bert as stock

from fastformer.integrations import embeddings, layers
from fastformer.integrations.fused import CHILDREN, LOOKS_AT_PADDING, SWAPS, UNSUPPORTED, Fused, Path, fuse
from fastformer.integrations.huggingface import (
    WANTS_WEIGHTS,
    attend,
    attention_obstacles,
    is_watched,
    request_weights,
    takes,
)
from fastformer.integrations.padding import Tokens


class BertModel(Fused):
    @functools.wraps(stock.BertModel.forward)
    def forward(self, *args: Any, **kwargs: Any):
        request_weights(self, (layer.attention.self for layer in self.encoder.layer), kwargs)
        return super().forward(*args, **kwargs)

    def _create_attention_masks(self, attention_mask, encoder_attention_mask, **kwargs: Any):
        """An encoder's padding stays (B, 1, 1, S), which broadcasts over the queries."""
        if (
            attention_mask is None
            or attention_mask.dim() != 2
            or encoder_attention_mask is not None
            or self.config.is_decoder
            or self.config._attn_implementation != "sdpa"
        ):
            return super()._create_attention_masks(attention_mask, encoder_attention_mask, **kwargs)
        mask = attention_mask.to(device=kwargs["embedding_output"].device, dtype=torch.bool)
        if not torch.compiler.is_compiling() and mask.all():
            return None, None
        mask = mask[:, None, None, :]
        mask.is_padding = True  # not so a user's own mask of this shape: the results at its places may matter
        return mask, None


class BertEmbeddings(embeddings.BertEmbeddings):
    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        output = None
        if input_ids is not None and inputs_embeds is None:
            positions, token_types = position_ids, token_type_ids
            if positions is None:
                positions = self.position_ids[:, past_key_values_length : input_ids.shape[1] + past_key_values_length]
            if token_types is None:
                token_types = self.token_type_ids.expand(positions.shape[0], -1).gather(1, positions)
            output = self.embed(input_ids, token_types, positions)
        if output is None:
            output = super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length)
        return output


class BertSelfAttention(layers.BertSelfAttention):
    own_obstacles = staticmethod(attention_obstacles)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Tokens | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(attention_mask, Tokens):
            return self.attend_tokens(hidden_states, attention_mask), None
        path, packed = self.choose(hidden_states, attention_mask)
        if (path is Path.STOCK and WANTS_WEIGHTS not in kwargs) or not takes(kwargs):
            return super().forward(hidden_states, attention_mask, past_key_values, **kwargs)
        query, key, value = self.project(hidden_states, path, packed)
        if past_key_values is not None:
            if isinstance(past_key_values, EncoderDecoderCache):
                past_key_values = past_key_values.self_attention_cache
            key, value = past_key_values.update(key, value, self.layer_idx)
        dropout_p = self.dropout.p if self.training else 0.0
        return attend(self, query, key, value, attention_mask, dropout_p, path, stock.eager_attention_forward, kwargs)


class _Output(layers.BertOutput):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return super().forward(hidden_states, input_tensor)


class BertEncoder(layers.BertEncoder):
    is_watched = staticmethod(is_watched)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ):
        others = encoder_hidden_states, encoder_attention_mask, past_key_values, kwargs.get(WANTS_WEIGHTS)
        output = None
        if all(other is None for other in others) and takes(kwargs) and not kwargs.get("is_causal"):
            if hasattr(attention_mask, "is_padding"):
                output = self.without_padding(hidden_states, attention_mask)
            if output is None:
                output = self.stacked(hidden_states, attention_mask)
        if output is not None:
            return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=output)
        return super().forward(
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            use_cache,
            **kwargs,
        )


BertOutput = fuse(stock.BertOutput, _Output)


class BertLayer(layers.BertLayer):
    inner = {
        "intermediate": {stock.BertIntermediate},
        "output": {stock.BertOutput, BertOutput},
        **layers.BertLayer.inner,
    }

    @staticmethod
    def own_obstacles(module: nn.Module) -> list[str]:
        return ["config.chunk_size_feed_forward is set"] if module.chunk_size_feed_forward else []

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Tokens | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        in_chunks = self.chunk_size_feed_forward and not isinstance(attention_mask, Tokens)
        if encoder_hidden_states is not None or in_chunks:
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values, **kwargs
            )
        output, _ = self.attention(hidden_states, attention_mask, past_key_values=past_key_values, **kwargs)
        return self.feed_forward(output)

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        return self.feed_forward(attention_output)


SWAPS.update(
    {
        stock.BertModel: fuse(stock.BertModel, BertModel),
        stock.BertEmbeddings: fuse(stock.BertEmbeddings, BertEmbeddings),
        stock.BertEncoder: fuse(stock.BertEncoder, BertEncoder),
        stock.BertSelfAttention: fuse(stock.BertSelfAttention, BertSelfAttention),
        stock.BertSelfOutput: fuse(stock.BertSelfOutput, _Output),
        stock.BertOutput: BertOutput,
        stock.BertLayer: fuse(stock.BertLayer, BertLayer),
        stock.BertPredictionHeadTransform: fuse(stock.BertPredictionHeadTransform, layers.BertPredictionHeadTransform),
    }
)
CHILDREN[stock.BertEmbeddings, "LayerNorm"] = layers.FUSED_LAYER_NORM
CHILDREN[stock.BertLMPredictionHead, "decoder"] = layers.FUSED_LINEAR
UNSUPPORTED[stock.BertCrossAttention] = "cross-attention is not fused"
LOOKS_AT_PADDING.add(stock.BertForQuestionAnswering)
