"""GPT-2 of transformers."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.models.gpt2 import modeling_gpt2 as stock

from fastformer.integrations import layers
from fastformer.integrations.fused import CHILDREN, SWAPS, Fused, Path, fuse
from fastformer.integrations.huggingface import WANTS_WEIGHTS, attend, attention_obstacles, request_weights, takes


class GPT2Model(Fused):
    @functools.wraps(stock.GPT2Model.forward)
    def forward(self, *args: Any, **kwargs: Any):
        request_weights(self, (block.attn for block in self.h), kwargs)
        return super().forward(*args, **kwargs)


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
        stock.GPT2Model: fuse(stock.GPT2Model, GPT2Model),
        stock.GPT2Attention: fuse(stock.GPT2Attention, GPT2Attention),
        stock.GPT2Block: fuse(stock.GPT2Block, GPT2Block),
    }
)
for _owner, _name in ((stock.GPT2Block, "ln_1"), (stock.GPT2Model, "ln_f")):
    CHILDREN[_owner, _name] = layers.FUSED_LAYER_NORM
for _owner in (stock.GPT2LMHeadModel, stock.GPT2DoubleHeadsModel):
    CHILDREN[_owner, "lm_head"] = layers.FUSED_LINEAR
