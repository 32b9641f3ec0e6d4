"""The reference models, fastformer.models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastformer.integrations import embeddings, layers, torch_nn
from fastformer.integrations.fused import CHILDREN, LINEARS, LOOKS_AT_PADDING, SWAPS, Fused, Path, fuse, weight_of
from fastformer.integrations.padding import Tokens, leaves_padding_out
from fastformer.integrations.stacks import infers_eagerly, stack_of
from fastformer.models import bert, bert_heads, gpt, transformer
from fastformer.models.generation import KeyValue, KeyValueCache, LayerCache
from fastformer.models.layers import split_heads
from fastformer.packing import is_hooked


class BertEmbeddings(embeddings.BertEmbeddings):
    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        token_types = input_ids.new_zeros(1) if token_type_ids is None else token_type_ids
        positions = position_ids
        if positions is None:
            positions = torch.arange(input_ids.size(1), device=input_ids.device)
        output = self.embed(input_ids, token_types, positions)
        return super().forward(input_ids, token_type_ids, position_ids) if output is None else output


class BertSelfAttention(layers.BertSelfAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | Tokens | None = None) -> Tensor:
        if isinstance(attention_mask, Tokens):
            return self.attend_tokens(hidden_states, attention_mask)
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

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | Tokens | None = None) -> Tensor:
        return self.feed_forward(self.attention(hidden_states, attention_mask))


class BertEncoder(layers.BertEncoder):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        output = None
        if attention_mask is not None and leaves_padding_out(self, hidden_states):
            attention_mask = None if attention_mask.all() else attention_mask
        if attention_mask is not None:
            output = self.without_padding(hidden_states, attention_mask)
        if output is None:
            output = self.stacked(hidden_states, attention_mask)
        return super().forward(hidden_states, attention_mask) if output is None else output


class GptAttention(layers.GptAttention):
    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past: KeyValue | LayerCache | None = None
    ) -> tuple[Tensor, KeyValue]:
        path, packed = self.choose(hidden_states, attention_mask)
        if path is Path.STOCK:
            return super().forward(hidden_states, attention_mask, past)
        query, key, value = self.project(hidden_states, path, packed)
        key, value = gpt.extend(past, key, value)
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
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past: KeyValue | LayerCache | None = None
    ) -> tuple[Tensor, KeyValue]:
        attention_output, present = self.attn(self.ln_1(hidden_states), attention_mask, past)
        return self.feed_forward(attention_output, hidden_states), present


class GptModel(Fused):
    def decode(
        self, hidden_states: Tensor, mask: Tensor | None, past: gpt.Past | None, use_cache: bool
    ) -> gpt.GptModelOutput:
        output = self.decode_stacked(hidden_states, mask, past, use_cache)
        return super().decode(hidden_states, mask, past, use_cache) if output is None else output

    def decode_stacked(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        past: gpt.Past | None,
        use_cache: bool,
        head: nn.Module | None = None,
        keep: int = 0,
    ) -> gpt.GptModelOutput | None:
        """In one op for all layers, with what a head makes of the last `keep` positions (0: all) in place of the hidden
        states; None where the modules have to be called one by one."""
        tail = (self.ln_f,) if head is None else (self.ln_f, head)
        stack = stack_of(self, self.h, hidden_states, tail=tail)
        if stack is None:
            return None
        (batch, length, width), heads = hidden_states.shape, stack.settings.heads
        cache = past if isinstance(past, KeyValueCache) else None
        if cache is None and (past is not None or use_cache):
            cache = _copied(past, len(self.h), hidden_states, heads)
            if cache is None:
                return None
        layers = cache.layers if cache else ()
        memory = [layer.reserve(hidden_states, batch, heads, length, width // heads) for layer in layers]
        if mask is not None and mask.all():
            mask = None
        output = stack.run(
            hidden_states,
            keep=0 if head is None else min(keep, length) or length,
            is_causal=True,
            mask=mask,
            caches=memory,
            past=cache.length if cache else 0,
        )
        for layer in layers:
            layer.length += length
        if not use_cache:
            return gpt.GptModelOutput(output, None)
        return gpt.GptModelOutput(output, cache if cache is past else [layer.memory for layer in layers])


class GptLMHeadModel(Fused):
    """The head in the same op as the layers."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: gpt.Past | None = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> gpt.GptLMHeadOutput:
        model = self.transformer
        if labels is None and logits_to_keep >= 0 and infers_eagerly() and isinstance(model, GptModel):
            if not is_hooked(model):
                embedded = model.embed(input_ids, attention_mask, position_ids, past_key_values)
                output = model.decode_stacked(*embedded, past_key_values, use_cache, self.lm_head, logits_to_keep)
                if output is not None:
                    return gpt.GptLMHeadOutput(None, *output)
        return super().forward(
            input_ids, attention_mask, position_ids, past_key_values, use_cache, labels, logits_to_keep
        )


def _copied(past: list[KeyValue] | None, num_layers: int, new: Tensor, heads: int) -> KeyValueCache | None:
    """Past keys and values with room for those of new tokens (B, S, E); None where they are not of new's kind."""
    batch, length, width = new.shape
    shape, kind = (batch, heads, past[0][0].size(2) if past else 0, width // heads), (new.dtype, new.device)
    cache = KeyValueCache(num_layers, shape[2] + length)
    for layer, pair in zip(cache.layers, past or (), strict=bool(past)):
        for x in pair:
            if type(x) is not Tensor or x.requires_grad or x.shape != shape or (x.dtype, x.device) != kind:
                return None
        layer.append(*pair)
    return cache


class TransformerAttention(Fused):
    inner = {"q_proj": LINEARS, "k_proj": LINEARS, "v_proj": LINEARS, "out_proj": LINEARS}
    takes_shards = True

    def groups(self):
        weights = [weight_of(self._modules[name]) for name in self.inner]
        fits = len({w.shape for w in weights}) == 1 and weights[0].shape[0] % self.num_heads == 0
        return [[w] for w in weights] if fits else None

    def key_value(self, hidden_states: Tensor) -> KeyValue:
        path, packed = self.choose(hidden_states)
        if path is Path.STOCK:
            return super().key_value(hidden_states)
        _, *panels, _ = packed.panels if packed else [None] * 4
        outputs = map(layers.linear, (self.k_proj, self.v_proj), [hidden_states] * 2, panels)
        key, value = map(split_heads, outputs, [self.head_dim] * 2)
        return key, value

    def forward(
        self, hidden_states: Tensor, key_value: KeyValue, attention_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        path, packed = self.choose(hidden_states, *key_value)
        if path is Path.STOCK:
            return super().forward(hidden_states, key_value, attention_mask, is_causal)
        query_panels, _, _, output_panels = packed.panels if packed else [None] * 4
        query = split_heads(layers.linear(self.q_proj, hidden_states, query_panels), self.head_dim)
        context = layers.attention(
            query,
            *key_value,
            attention_mask,
            dropout_p=self.dropout.p if self.training else 0.0,
            is_causal=is_causal,
            scale=query.shape[-1] ** -0.5,
            path=path,
        )
        return layers.linear(self.out_proj, context, output_panels)


class TransformerEncoderLayer(torch_nn.Layer):
    def sublayers(self, x: Tensor, attentions: Sequence[torch_nn.Attention]) -> Tensor:
        path, packed = self.choose(x)
        if path is Path.STOCK:
            return super().sublayers(x, attentions)
        return self.compute(x, attentions, path, packed)


class TransformerDecoderLayer(TransformerEncoderLayer):
    inner = torch_nn.TransformerDecoderLayer.inner
    attentions = 2


SWAPS.update(
    {
        bert.BertEmbeddings: fuse(bert.BertEmbeddings, BertEmbeddings),
        bert.BertEncoder: fuse(bert.BertEncoder, BertEncoder),
        bert.BertSelfAttention: fuse(bert.BertSelfAttention, BertSelfAttention),
        bert.BertOutput: BertOutput,
        bert.BertLayer: fuse(bert.BertLayer, BertLayer),
        bert.BertPredictionHeadTransform: fuse(bert.BertPredictionHeadTransform, layers.BertPredictionHeadTransform),
        gpt.GptLMHeadModel: fuse(gpt.GptLMHeadModel, GptLMHeadModel),
        gpt.GptModel: fuse(gpt.GptModel, GptModel),
        gpt.GptAttention: fuse(gpt.GptAttention, GptAttention),
        gpt.GptBlock: fuse(gpt.GptBlock, GptBlock),
        transformer.TransformerAttention: fuse(transformer.TransformerAttention, TransformerAttention),
        transformer.TransformerEncoderLayer: fuse(transformer.TransformerEncoderLayer, TransformerEncoderLayer),
        transformer.TransformerDecoderLayer: fuse(transformer.TransformerDecoderLayer, TransformerDecoderLayer),
    }
)
CHILDREN[bert.BertEmbeddings, "LayerNorm"] = layers.FUSED_LAYER_NORM
CHILDREN[bert.BertLMPredictionHead, "decoder"] = layers.FUSED_LINEAR
CHILDREN[gpt.GptBlock, "ln_1"] = layers.FUSED_LAYER_NORM
CHILDREN[gpt.GptModel, "ln_f"] = layers.FUSED_LAYER_NORM
CHILDREN[gpt.GptLMHeadModel, "lm_head"] = layers.FUSED_LINEAR
CHILDREN[transformer.TransformerForConditionalGeneration, "lm_head"] = layers.FUSED_LINEAR
LOOKS_AT_PADDING.add(bert_heads.BertForQuestionAnswering)
