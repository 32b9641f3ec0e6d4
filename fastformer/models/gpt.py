"""GPT-2 in plain eager PyTorch (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

Modules and state_dict names are those of transformers. Its checkpoints store the four weights of a block as
(in, out); here they are those of nn.Linear, (out, in), and are transposed when they are read or written.
Letters in shapes: B batch, S sequence, P past, K = P + S keys, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .generation import GenerationMixin, KeyValue, KeyValueCache, LayerCache
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


def extend(past: KeyValue | LayerCache | None, key: Tensor, value: Tensor) -> KeyValue:
    """Keys and values of all tokens, (B, H, K, D): those of the past, and these (B, H, S, D)."""
    if past is None:
        return key, value
    if isinstance(past, LayerCache):
        return past.append(key, value)
    return torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)


@dataclass(frozen=True)
class GptConfig(PretrainedConfig):
    """The defaults are GPT-2 small, 124M parameters.

    Raises:
        ValueError: n_embd is no multiple of n_head.
        NotImplementedError: an activation other than those in `layers.ACTIVATIONS`.
    """

    model_type: ClassVar[str] = "gpt2"
    only_supported: ClassVar[dict[str, Any]] = {
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "pruned_heads": {},
        "quantization_config": None,
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 * n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_heads(self.n_embd, self.n_head)
        check_activation("activation_function", self.activation_function)


class GptAttention(nn.Module):
    """Causal self-attention; c_attn gives query, key and value side by side."""

    def __init__(self, config: GptConfig, layer_idx: int):
        super().__init__()
        self.num_heads, self.head_dim = config.n_head, config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past: KeyValue | LayerCache | None = None
    ) -> tuple[Tensor, KeyValue]:
        query, key, value = (split_heads(x, self.head_dim) for x in self.c_attn(hidden_states).chunk(3, dim=-1))
        key, value = extend(past, key, value)
        length, key_length = query.size(2), key.size(2)
        is_causal = attention_mask is None and length == key_length  # needs no matrix
        if not is_causal and length > 1:  # the last query sees every key
            causal = torch.ones(length, key_length, dtype=torch.bool, device=query.device).tril(key_length - length)
            attention_mask = causal if attention_mask is None else causal & attention_mask
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=self.attn_dropout.p if self.training else 0.0,
            is_causal=is_causal,
            scale=self.scaling,
        )
        return self.resid_dropout(self.c_proj(merge_heads(context))), (key, value)


class GptMLP(nn.Module):
    def __init__(self, config: GptConfig):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, n_inner)
        self.act = ACTIVATIONS[config.activation_function]()
        self.c_proj = nn.Linear(n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class GptBlock(nn.Module):
    def __init__(self, config: GptConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GptAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GptMLP(config)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past: KeyValue | LayerCache | None = None
    ) -> tuple[Tensor, KeyValue]:
        """hidden_states: (B, S, H * D); attention_mask: (B, 1, 1 or S, K) bool, True = keep, or None; past: of P."""
        attention_output, present = self.attn(self.ln_1(hidden_states), attention_mask, past)
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.ln_2(hidden_states)), present


Past = list[KeyValue] | KeyValueCache


class GptModelOutput(NamedTuple):
    last_hidden_state: Tensor  # (B, S, H * D)
    past_key_values: Past | None


class GptPretrainedModel(PretrainedModel):
    config_class = GptConfig
    base_model_prefix = "transformer"
    transposed = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class GptModel(GptPretrainedModel):
    """The decoder without a head."""

    architecture = "GPT2Model"

    def __init__(self, config: GptConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GptBlock(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        init_weights(self, config.initializer_range)
        for block in self.h:  # the residual sum of 2 * n_layer terms keeps its variance (section 2.3 of the paper)
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                nn.init.normal_(projection.weight, std=config.initializer_range / math.sqrt(2 * config.n_layer))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Past | None = None,
        use_cache: bool = False,
    ) -> GptModelOutput:
        """
        Args:
            input_ids: (B, S) int64, the tokens after those in past_key_values.
            attention_mask: (B, K) bool or integer, 1 = keep, 0 = padding on either side; None keeps all. Or
                (B, 1, S, K) bool, True where a token may look at another one that is not behind it: the documents of a
                packed row keep apart.
            position_ids: (B, S) or (S,) int64; None is P ... K - 1, which left padding does not shift.
            past_key_values: what an earlier call returned, which is not changed; or a generation.KeyValueCache, empty
                at first, which this call appends to.
            use_cache: return the keys and values of all K tokens: one (key, value) of (B, H, K, D) a layer, or the
                KeyValueCache that was given.

        Raises:
            ValueError: input_ids, attention_mask or past_key_values that do not fit, more tokens than n_positions, or a
                KeyValueCache where gradients are needed.
            TypeError: an attention_mask in floating point, as if it were to be added.
        """
        hidden_states, mask = self.embed(input_ids, attention_mask, position_ids, past_key_values)
        return self.decode(hidden_states, mask, past_key_values, use_cache)

    def embed(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: Past | None
    ) -> tuple[Tensor, Tensor | None]:
        """What `decode` takes: embedded tokens (B, S, H * D) and a mask (B, 1, 1 or S, K) or None."""
        in_place = isinstance(past, KeyValueCache)
        layers = past.layers if in_place else past
        if layers is not None and len(layers) != len(self.h):
            raise ValueError(f"past_key_values must have {len(self.h)} layers, got {len(layers)}")
        past_length = past.length if in_place else layers[0][0].size(2) if layers else 0
        check_input_ids(input_ids, past_length, self.config.n_positions)
        batch, length = input_ids.shape
        key_length, mask = past_length + length, attention_mask
        if mask is None or mask.shape != (batch, 1, length, key_length) or mask.dtype != torch.bool:
            mask = padding_mask(attention_mask, batch, key_length)
        if position_ids is None:
            position_ids = torch.arange(past_length, key_length, device=input_ids.device)
        return self.drop(self.wte(input_ids) + self.wpe(position_ids)), mask

    def decode(self, hidden_states: Tensor, mask: Tensor | None, past: Past | None, use_cache: bool) -> GptModelOutput:
        """The layers and the last layer-norm."""
        in_place, presents = isinstance(past, KeyValueCache), []
        layers = (past.layers if in_place else past) or [None] * len(self.h)
        for block, layer in zip(self.h, layers, strict=True):
            hidden_states, present = block(hidden_states, mask, layer)
            if use_cache:
                presents.append(present)
        return GptModelOutput(self.ln_f(hidden_states), (past if in_place else presents) if use_cache else None)


class GptLMHeadOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor  # (B, S, V), or of the last ones only
    past_key_values: Past | None


class GptLMHeadModel(GenerationMixin, GptPretrainedModel):
    """Logits of the next token; lm_head.weight is that of the token embeddings."""

    architecture = "GPT2LMHeadModel"
    tied = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GptConfig):
        super().__init__(config)
        self.transformer = GptModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Past | None = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> GptLMHeadOutput:
        """As GptModel; labels: (B, S) int64, the input_ids themselves with -100 where nothing is to be predicted:
        the logits of each token are held against the label of the next. logits_to_keep: of so many last tokens; 0 is of
        all, as labels want it."""
        if labels is not None and logits_to_keep:
            raise ValueError(f"logits_to_keep must be 0 with labels, got {logits_to_keep}")
        hidden_states, past_key_values = self.transformer(
            input_ids, attention_mask, position_ids, past_key_values, use_cache
        )
        logits = self.lm_head(hidden_states[:, -logits_to_keep:])
        loss = None if labels is None else cross_entropy(logits[:, :-1], labels[:, 1:])
        return GptLMHeadOutput(loss, logits, past_key_values)
