"""The transformer modules of torch.nn.

They compute what torch computes without its fast path of nested tensors. Letters in shapes: B batch, S positions,
L queries, H heads, D head size, E = H D; sequences are (B, S, E), (S, B, E) or, without a batch, (S, E).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len

import fastformer.nn
from fastformer import backends, ops
from fastformer.integrations import layers
from fastformer.integrations.fused import (
    ACTIVATIONS,
    DROPOUTS,
    FUSED_ALREADY,
    LINEARS,
    NORMS,
    SWAPS,
    Fused,
    Path,
    activation_of,
    dropout_p,
    fuse,
)
from fastformer.integrations.padding import Tokens, leaves_padding_out
from fastformer.nn.attention import _keep_or_add
from fastformer.packing import Packed, is_hooked

_raw = torch.ops.fastformer_cpu

LINEARS.add(NonDynamicallyQuantizableLinear)  # out_proj of nn.MultiheadAttention
NORMS.add(layers.FUSED_LAYER_NORM)
FUSED_ALREADY.add(fastformer.nn.LayerNorm)

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
_PANEL = 64  # output features: a multiple of what a panel of packed weights holds


class MultiheadAttention(Fused):
    inner = {"out_proj": LINEARS}

    @staticmethod
    def own_obstacles(module: nn.MultiheadAttention) -> list[str]:
        obstacles = layers.missing_parameters(module, *_PROJECTIONS)
        if module.bias_k is not None or module.bias_v is not None:
            obstacles.append("has bias_k and bias_v (add_bias_kv)")
        if module.add_zero_attn:
            obstacles.append("has add_zero_attn")
        return obstacles

    def groups(self):
        embed_dim, bias, (weights, _) = self.embed_dim, self.in_proj_bias, self._projections()
        features = embed_dim, self.kdim, self.vdim
        fits = all(w.shape == (embed_dim, n) for w, n in zip(weights, features, strict=True))
        fits = fits and (bias is None or bias.shape == (3 * embed_dim,)) and self.num_heads * self.head_dim == embed_dim
        if not fits or self.out_proj.weight.shape != (embed_dim, embed_dim):
            return None
        if self.in_proj_weight is not None and embed_dim % _PANEL == 0:
            return [weights, [self.out_proj.weight]]  # three times whole panels: each of them can be used alone
        return [*([weight] for weight in weights), [self.out_proj.weight]]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        path, packed = Path.STOCK, None
        if need_weights:
            backends._warn_once(_WEIGHTS)
        elif self._fits(query, key, value, key_padding_mask, attn_mask, is_causal):
            path, packed = self.choose(query, key, value, key_padding_mask, attn_mask)
        if path is Path.STOCK:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        heads = [self._split_heads(x) for x in self.project(query, key, value, packed)]
        is_causal = is_causal and key_padding_mask is None  # as in torch, which then looks at the mask
        mask = None
        if not is_causal:
            mask = _keep_or_add(attn_mask, _batched(key_padding_mask, query), (*heads[0].shape[:3], heads[1].shape[2]))
        context = layers.attention(
            *heads,
            mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.head_dim**-0.5,
            path=path,
        )
        if query.dim() == 2:
            context = context[0]
        elif not self.batch_first:
            context = context.transpose(0, 1)
        return self.finish(context, packed), None

    def _fits(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Is it a call that torch takes, but for dtypes? For the others it has its own words."""
        if query.is_nested or key.is_nested or value.is_nested or (is_causal and attn_mask is None):
            return False
        if not query.dim() == key.dim() == value.dim() or query.dim() not in (2, 3):
            return False
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != (self.embed_dim, self.kdim, self.vdim):
            return False
        if not query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled(query.device.type):
            return False
        if not query.device == key.device == value.device or not all(map(_is_mask, (key_padding_mask, attn_mask))):
            return False
        positions = 1 if self.batch_first and query.dim() == 3 else 0
        batch = query.shape[1 - positions] if query.dim() == 3 else 1
        if key.shape[:-1] != value.shape[:-1] or (query.dim() == 3 and key.shape[1 - positions] != batch):
            return False
        length, keys = query.shape[positions], key.shape[positions]
        padding_shape = (keys,) if query.dim() == 2 else (batch, keys)
        return (key_padding_mask is None or key_padding_mask.shape == padding_shape) and (
            attn_mask is None or attn_mask.shape in ((length, keys), (batch * self.num_heads, length, keys))
        )

    def _projections(self) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """Weights and biases that make query, key and value."""
        weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        return weights, (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)

    def project(self, query: Tensor, key: Tensor, value: Tensor, packed: Packed | None) -> Sequence[Tensor]:
        """Query, key and value (..., E), laid out as they came."""
        panels = packed.panels[:-1] if packed else []
        if query is key is value and self.in_proj_weight is not None and len(panels) < 2:
            weight, bias = self.in_proj_weight, self.in_proj_bias
            if not packed:
                return ops.linear(query, weight, bias).chunk(3, -1)
            return _raw.packed_linear(query, panels[0], weight.shape[0], bias, None, None).chunk(3, -1)
        inputs, (weights, biases) = (query, key, value), self._projections()
        if not packed:
            return [ops.linear(*operands) for operands in zip(inputs, weights, biases, strict=True)]
        if len(panels) == 1:
            panels = panels[0].chunk(3)
        return [
            _raw.packed_linear(x, panel, self.embed_dim, bias, None, None)
            for x, panel, bias in zip(inputs, panels, biases, strict=True)
        ]

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, H, S, D)"""
        if x.dim() == 2:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return layers.split_heads(x, self.num_heads)

    def finish(self, context: Tensor, packed: Packed | None) -> Tensor:
        return layers.linear(self.out_proj, context, packed and packed.panels[-1])

    def attend_tokens(self, x: Tensor, tokens: Tokens, path: Path, packed: Packed | None) -> Tensor:
        """(1, tokens, E): self-attention of each sequence."""
        heads = [layers.split_heads(y, self.num_heads) for y in self.project(x, x, x, packed)]
        return self.finish(tokens.attention(*heads, path, self.dropout if self.training else 0.0), packed)


_WEIGHTS = (
    "fastformer: nn.MultiheadAttention runs its stock forward where it is called with need_weights=True, its default:"
    " fused attention never holds the weights"
)


def _is_mask(mask: Tensor | None) -> bool:
    return mask is None or mask.dtype == torch.bool or mask.is_floating_point()


def _batched(key_padding_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """(B, S)"""
    return key_padding_mask[None] if key_padding_mask is not None and query.dim() == 2 else key_padding_mask


_FUNCTIONS = ((F.relu, "relu"), (torch.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu"))


def _activation(layer: nn.Module) -> str | None:
    """What ops.feed_forward calls it; None for one that it does not know."""
    activation = layer.activation
    if isinstance(activation, nn.Module):
        plain = type(activation) in ACTIVATIONS and not is_hooked(activation)
        return activation_of(activation) if plain else None
    return next((name for function, name in _FUNCTIONS if activation is function), None)


Attention = Callable[[Tensor], Tensor]


def _call(
    module: nn.Module, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool, *memory: Tensor
) -> Attention:
    """The module's attention to its input or, where it is given, to the memory, called as torch's layers call it."""

    def attention(x: Tensor) -> Tensor:
        keys = memory[0] if memory else x
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "is_causal": is_causal}
        return module(x, keys, keys, need_weights=False, **masks)[0]

    return attention


class Layer(Fused):
    """All of an encoder or decoder layer but its attention, which is called."""

    inner = {
        "linear1": LINEARS,
        "linear2": LINEARS,
        "dropout": DROPOUTS,
        "dropout1": DROPOUTS,
        "dropout2": DROPOUTS,
        "norm1": NORMS,
        "norm2": NORMS,
    }
    takes_shards = True
    attentions = 1

    @staticmethod
    def own_obstacles(module: nn.Module) -> list[str]:
        if _activation(module):
            return []
        activation = module.activation
        if type(activation) in ACTIVATIONS:
            return ["activation has hooks"]
        name = getattr(activation, "__qualname__", type(activation).__qualname__)
        return [f"activation is {name}, not relu, gelu or silu"]

    def groups(self):
        weight1, weight2 = self.linear1.weight, self.linear2.weight
        fits = weight1.shape == weight2.shape[::-1] and all(
            norm.normalized_shape == weight2.shape[:1] for norm in self._numbered("norm")
        )
        return [[weight1], [weight2]] if fits else None

    def _numbered(self, name: str) -> list[nn.Module]:
        return [self._modules[f"{name}{i + 1}"] for i in range(self.attentions + 1)]

    def choose_for(self, x: Tensor, *masks: Tensor | None) -> tuple[Path, Packed | None]:
        if x.is_nested or not all(map(_is_mask, masks)):
            return Path.STOCK, None
        return self.choose(x)

    def compute(self, x: Tensor, attentions: Sequence[Attention], path: Path, packed: Packed | None) -> Tensor:
        """x through one attention after the other and the feed-forward network, each with dropout, sum and norm."""
        norms, dropouts = self._numbered("norm"), self._numbered("dropout")
        y = layers.layer_norm(norms[0], x, path) if self.norm_first else x
        for i, attention in enumerate(attentions):
            y, dropout, norm = attention(y), dropouts[i], norms[i + 1 if self.norm_first else i]
            if path is Path.PACKED and (y.requires_grad or not layers.is_residual(y, x, x.shape[-1])):
                path = Path.OPS
            if path is Path.PACKED:
                y, total, *_ = _raw.add_layer_norm(
                    y, x, norm._parameters["weight"], norm._parameters["bias"], norm.eps, 0.0, None
                )
            else:
                y, total = ops.add_layer_norm(
                    y, x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, dropout_p=dropout_p(dropout)
                )
            x = total if self.norm_first else y
        x = self._feed_forward(y, x, dropouts[-1], path, packed)
        return x if self.norm_first else layers.layer_norm(norms[-1], x, path)

    def _feed_forward(
        self, x: Tensor, residual: Tensor, dropout: nn.Dropout, path: Path, packed: Packed | None
    ) -> Tensor:
        linear1, linear2, activation = self.linear1, self.linear2, _activation(self)
        if path is Path.PACKED:
            return _raw.packed_feed_forward(
                x, packed.panels[0], linear1.weight.shape[0], linear1.bias,
                packed.panels[1], linear2.weight.shape[0], linear2.bias, activation, residual,
            )  # fmt: skip
        p = {"hidden_dropout_p": dropout_p(self.dropout), "dropout_p": dropout_p(dropout)}
        return layers.feed_forward(linear1, linear2, x, activation, **p, residual=residual)


class TransformerEncoderLayer(Layer):
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        path, packed = self.choose_for(src, src_mask, src_key_padding_mask)
        if path is Path.STOCK:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

        attention = _call(self.self_attn, src_mask, src_key_padding_mask, is_causal)
        return self.compute(src, [attention], path, packed)


class TransformerDecoderLayer(Layer):
    inner = {**Layer.inner, "dropout3": DROPOUTS, "norm3": NORMS}
    attentions = 2

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        path, packed = self.choose_for(tgt)
        if path is Path.STOCK:
            return super().forward(
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal,
                memory_is_causal,
            )  # fmt: skip

        attentions = [
            _call(self.self_attn, tgt_mask, tgt_key_padding_mask, tgt_is_causal),
            _call(self.multihead_attn, memory_mask, memory_key_padding_mask, memory_is_causal, memory),
        ]
        return self.compute(tgt, attentions, path, packed)


class TransformerEncoder(Fused):
    """With a padding mask it leaves the padding out; then 0 stands there."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        batch_first = self.layers[0].self_attn.batch_first
        if backends._requested()[0] == "torch" or not self._fits(src, mask, src_key_padding_mask, batch_first):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        if mask is None and not is_causal and self._has_padding(src, src_key_padding_mask):
            choices = self._choose_for_tokens(src, batch_first)
            if choices:
                return self._without_padding(src, ~src_key_padding_mask, batch_first, choices)
        is_causal = _detect_is_causal_mask(mask, is_causal, _get_seq_len(src, batch_first))
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
        return output if self.norm is None else self.norm(output)

    @staticmethod
    def _fits(src: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, batch_first: bool) -> bool:
        """Is it a call that torch takes, as far as the encoder can tell? For the others it has its own words."""
        if src.is_nested or not all(map(_is_mask, (mask, key_padding_mask))):
            return False
        batch_shape = src.shape[:-1] if batch_first or src.dim() != 3 else src.shape[1::-1]
        return key_padding_mask is None or key_padding_mask.shape == batch_shape

    def _has_padding(self, src: Tensor, key_padding_mask: Tensor | None) -> bool:
        """Is it a call in which padding is left out?"""
        if key_padding_mask is None or key_padding_mask.dtype != torch.bool or src.dim() != 3:
            return False
        return leaves_padding_out(self, src) and bool(key_padding_mask.any())

    def _choose_for_tokens(self, src: Tensor, batch_first: bool) -> list[tuple] | None:
        """The paths of each layer and its attention; None where one is not fused, or somebody looks at what happens
        inside."""
        if self.norm is not None and (type(self.norm) not in NORMS or is_hooked(self.norm)):
            return None
        choices = []
        for layer in self.layers:
            if not isinstance(layer, TransformerEncoderLayer) or not isinstance(layer.self_attn, MultiheadAttention):
                return None
            if is_hooked(layer) or is_hooked(layer.self_attn) or layer.self_attn.batch_first != batch_first:
                return None
            choices.append((*layer.choose(src), *layer.self_attn.choose(src)))
            if Path.STOCK in choices[-1]:
                return None
        return choices

    def _without_padding(self, src: Tensor, kept: Tensor, batch_first: bool, choices: list[tuple]) -> Tensor:
        tokens = Tokens(kept, batch_first)
        x = tokens.gather(src)
        for layer, (path, packed, *choice) in zip(self.layers, choices, strict=True):

            def attention(y: Tensor, module=layer.self_attn, choice=choice) -> Tensor:
                return module.attend_tokens(y, tokens, *choice)

            x = layer.compute(x, [attention], path, packed)
        return tokens.scatter(x if self.norm is None else self.norm(x), src.shape)


SWAPS.update(
    {
        nn.TransformerEncoder: fuse(nn.TransformerEncoder, TransformerEncoder),
        nn.TransformerEncoderLayer: fuse(nn.TransformerEncoderLayer, TransformerEncoderLayer),
        nn.TransformerDecoderLayer: fuse(nn.TransformerDecoderLayer, TransformerDecoderLayer),
        nn.MultiheadAttention: fuse(nn.MultiheadAttention, MultiheadAttention),
        nn.LayerNorm: layers.FUSED_LAYER_NORM,
    }
)
