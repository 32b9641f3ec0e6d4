"""The reference models, fastformer.models."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer.integrations import layers
from fastformer.integrations.fused import CHILDREN, SWAPS, Path, fuse
from fastformer.models import bert, gpt


class BertSelfAttention(layers.BertSelfAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        path, packed = self.choose(hidden_states, attention_mask)
        if path is Path.STOCK:
            return super().forward(hidden_states, attention_mask)
        query, key, value = self.project(hidden_states, path, packed)
        dropout_p = self.dropout.p if self.training else 0.0
        return layers.attention(
            query, key, value, attention_mask, dropout_p=dropout_p, scale=query.shape[-1] ** -0.5, path=path
        )


BertOutput = fuse(bert.BertOutput, layers.BertOutput)


class BertLayer(layers.BertLayer):
    inner = {
        "intermediate": {bert.BertIntermediate},
        "output": {bert.BertOutput, BertOutput},
        **layers.BertLayer.inner,
    }

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.feed_forward(self.attention(hidden_states, attention_mask))


class BertEncoder(layers.BertEncoder):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        output = None
        if attention_mask is not None:
            output = self.without_padding(hidden_states, attention_mask)
        if output is None:
            output = self.stacked(hidden_states, attention_mask)
        return super().forward(hidden_states, attention_mask) if output is None else output


class GptAttention(layers.GptAttention):
    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past: gpt.KeyValue | None = None
    ) -> tuple[Tensor, gpt.KeyValue]:
        path, packed = self.choose(hidden_states, attention_mask)
        if path is Path.STOCK:
            return super().forward(hidden_states, attention_mask, past)
        query, key, value = self.project(hidden_states, path, packed)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        context = layers.attention(
            query,
            key,
            value,
            attention_mask,
            dropout_p=self.attn_dropout.p if self.training else 0.0,
            scale=self.scaling,
            window_size=(-1, 0),  # causal, the last query at the last key
            path=path,
        )
        return self.finish(context, path, packed), (key, value)


class GptBlock(layers.GptBlock):
    inner = {"mlp": {gpt.GptMLP}, **layers.GptBlock.inner}

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past: gpt.KeyValue | None = None
    ) -> tuple[Tensor, gpt.KeyValue]:
        attention_output, present = self.attn(self.ln_1(hidden_states), attention_mask, past)
        return self.feed_forward(attention_output, hidden_states), present


SWAPS.update(
    {
        bert.BertEncoder: fuse(bert.BertEncoder, BertEncoder),
        bert.BertSelfAttention: fuse(bert.BertSelfAttention, BertSelfAttention),
        bert.BertOutput: BertOutput,
        bert.BertLayer: fuse(bert.BertLayer, BertLayer),
        bert.BertPredictionHeadTransform: fuse(bert.BertPredictionHeadTransform, layers.BertPredictionHeadTransform),
        gpt.GptAttention: fuse(gpt.GptAttention, GptAttention),
        gpt.GptBlock: fuse(gpt.GptBlock, GptBlock),
    }
)
CHILDREN[bert.BertEmbeddings, "LayerNorm"] = layers.FUSED_LAYER_NORM
CHILDREN[bert.BertLMPredictionHead, "decoder"] = layers.FUSED_LINEAR
CHILDREN[gpt.GptBlock, "ln_1"] = layers.FUSED_LAYER_NORM
CHILDREN[gpt.GptModel, "ln_f"] = layers.FUSED_LAYER_NORM
CHILDREN[gpt.GptLMHeadModel, "lm_head"] = layers.FUSED_LINEAR
