"""GPT-2 of transformers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2 as stock

from fastformer.integrations import layers
from fastformer.integrations.fused import CHILDREN, SWAPS, Fused, Path, fuse
from fastformer.integrations.huggingface import (
    WANTS_WEIGHTS,
    attend,
    attention_obstacles,
    is_watched,
    request_weights,
    takes,
)
from fastformer.integrations.key_value_cache import growing_layers
from fastformer.integrations.stacks import infers_eagerly, stack_of
from fastformer.packing import drop, is_hooked


class GPT2Model(Fused):
    @functools.wraps(stock.GPT2Model.forward)
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ):
        if self.training:
            drop(self)
        others = token_type_ids, inputs_embeds, encoder_hidden_states, encoder_attention_mask
        if input_ids is not None and not any(other is not None for other in others):
            output = self.stacked(input_ids, past_key_values, attention_mask, position_ids, use_cache, kwargs)
            if output is not None:
                hidden_states, cache = output
                return BaseModelOutputWithPastAndCrossAttentions(hidden_states, past_key_values=cache)
        request_weights(self, (block.attn for block in self.h), kwargs)
        return super().forward(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            **kwargs,
        )

    def stacked(
        self,
        input_ids: Tensor,
        cache: Cache | None,
        mask: Tensor | None,
        position_ids: Tensor | None,
        use_cache: bool | None,
        kwargs: dict[str, Any],
        head: nn.Module | None = None,
        keep: int = 0,
    ) -> tuple[Tensor, Cache | None] | None:
        """The last hidden states, or what a head makes of the last `keep` of them (0: all), and the cache, by one op.
        None for a call that is not the plain one of generation."""
        if not infers_eagerly():
            return None
        config = self.config
        if any(kwargs.get(name, getattr(config, name, default)) != default for name, default in _PLAIN.items()):
            return None
        if input_ids.dim() != 2 or input_ids.numel() == 0 or is_hooked(self.drop):
            return None
        self.warn_if_padding_and_no_attention_mask(input_ids, mask)
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        layers = () if cache is None else growing_layers(cache, len(self.h))
        if layers is None or (cache is not None and not use_cache):
            return None
        batch, length = input_ids.shape
        past = layers[0].get_seq_length() if layers else 0
        if mask is not None:
            if mask.shape != (batch, past + length):
                return None
            mask = None if mask.all() else mask.bool()[:, None, None]
        elif position_ids is not None and not past:
            return None  # positions that begin anew would be sequences of their own
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=input_ids.device)[None]
        x = self.wte(input_ids) + self.wpe(position_ids)
        tail = (self.ln_f,) if head is None else (self.ln_f, head)
        stack = stack_of(self, self.h, x, is_watched, tail)
        if stack is None:
            return None
        heads = stack.settings.heads
        memory = [layer.reserve(x, (batch, heads, length, x.shape[-1] // heads)) for layer in layers]
        if None in memory or any(layer.get_seq_length() != past for layer in layers):
            return None
        keep = 0 if head is None else min(keep, length) or length
        x = stack.run(x, keep=keep, is_causal=True, mask=mask, caches=memory, past=past)
        for layer in layers:
            layer.advance(length)
        return x, cache


# What a plain call's keyword arguments are, or the config's values of the same names.
_PLAIN = {
    "output_attentions": False, "output_hidden_states": False, "return_dict": True, "is_causal": True,
    "add_cross_attention": False, "debug_io": False, "cache": None, "position_bias": None, "softcap": None,
}  # fmt: skip


class GPT2LMHeadModel(Fused):
    """The head in the same op as the layers."""

    @functools.wraps(stock.GPT2LMHeadModel.forward)
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ):
        model, others = self.transformer, (token_type_ids, inputs_embeds, encoder_hidden_states, encoder_attention_mask)
        is_plain = input_ids is not None and not any(other is not None for other in (*others, labels))
        is_plain = is_plain and isinstance(logits_to_keep, int) and logits_to_keep >= 0
        if is_plain and isinstance(model, GPT2Model) and not is_watched(model):
            output = model.stacked(
                input_ids,
                past_key_values,
                attention_mask,
                position_ids,
                use_cache,
                kwargs,
                self.lm_head,
                logits_to_keep,
            )
            if output is not None:
                logits, cache = output
                return CausalLMOutputWithCrossAttentions(logits=logits, past_key_values=cache)
        return super().forward(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


class GPT2Attention(layers.GptAttention):
    @staticmethod
    def own_obstacles(module: nn.Module) -> list[str]:
        return ["cross-attention is not fused"] if module.is_cross_attention else attention_obstacles(module)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        path, packed = self.choose(hidden_states, attention_mask)
        if (
            (path is Path.STOCK and WANTS_WEIGHTS not in kwargs)
            or encoder_hidden_states is not None
            or not takes(kwargs)
        ):
            return super().forward(
                hidden_states, past_key_values, attention_mask, encoder_hidden_states, encoder_attention_mask,
                output_attentions, **kwargs,
            )  # fmt: skip
        query, key, value = self.project(hidden_states, path, packed)
        if past_key_values is not None:
            if isinstance(past_key_values, EncoderDecoderCache):
                past_key_values = past_key_values.self_attention_cache
            key, value = past_key_values.update(key, value, self.layer_idx)
        dropout_p = self.attn_dropout.p if self.training else 0.0
        context, weights = attend(
            self, query, key, value, attention_mask, dropout_p, path, stock.eager_attention_forward, kwargs
        )
        return self.finish(context, path, packed), weights


class GPT2Block(layers.GptBlock):
    inner = {"mlp": {stock.GPT2MLP}, **layers.GptBlock.inner}

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            return super().forward(
                hidden_states, past_key_values, attention_mask, encoder_hidden_states, encoder_attention_mask,
                use_cache, **kwargs,
            )  # fmt: skip
        attention_output, _ = self.attn(
            self.ln_1(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        return self.feed_forward(attention_output, hidden_states)


SWAPS.update(
    {
        stock.GPT2LMHeadModel: fuse(stock.GPT2LMHeadModel, GPT2LMHeadModel),
        stock.GPT2Model: fuse(stock.GPT2Model, GPT2Model),
        stock.GPT2Attention: fuse(stock.GPT2Attention, GPT2Attention),
        stock.GPT2Block: fuse(stock.GPT2Block, GPT2Block),
    }
)
for _owner, _name in ((stock.GPT2Block, "ln_1"), (stock.GPT2Model, "ln_f")):
    CHILDREN[_owner, _name] = layers.FUSED_LAYER_NORM
for _owner in (stock.GPT2LMHeadModel, stock.GPT2DoubleHeadsModel):
    CHILDREN[_owner, "lm_head"] = layers.FUSED_LINEAR
