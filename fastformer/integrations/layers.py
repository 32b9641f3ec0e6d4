"""The fused forwards of BERT and GPT-2 layers, for every library whose modules have the names of transformers.

Letters in shapes: B batch, Q queries, K keys, H heads, D head size, E = H D, N features inside the feed-forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastformer import ops
from fastformer.integrations.fused import (
    ACTIVATIONS,
    DROPOUTS,
    LINEARS,
    NORMS,
    Fused,
    Path,
    activation_of,
    dropout_p,
    fuse,
    weight_of,
)

_raw = torch.ops.fastformer_cpu


def linear(module: nn.Module, x: Tensor, path: Path, panels: Tensor | None, activation: str | None = None) -> Tensor:
    """activation(module(x)) of a plain linear, on OPS or PACKED."""
    weight, bias = weight_of(module), module._parameters["bias"]
    if path is Path.PACKED:
        return _raw.packed_linear(x, panels, weight.shape[0], bias, activation, None)
    return ops.linear(x, weight, bias, activation=activation)


def layer_norm(module: nn.LayerNorm, x: Tensor, path: Path) -> Tensor:
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if path is Path.PACKED:
        return _raw.layer_norm(x, weight, bias, module.eps)[0]
    return ops.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float,
    window_size: tuple[int, int] = (-1, -1),
    path: Path,
) -> Tensor:
    """(B, Q, E) of query (B, H, Q, D), key and value (B, H, K, D), and a mask as ops.scaled_dot_product_attention takes it."""
    if path is Path.PACKED and _is_plain(query, key, value, mask):
        if mask is not None:
            mask = mask.expand(*query.shape[:3], key.shape[2])
            if mask.is_floating_point():
                mask = mask.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
        context = _raw.scaled_dot_product_attention(
            query, key, value, mask, 0.0, None, is_causal, scale, *window_size
        )[0]
    else:
        context = ops.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale, window_size=window_size
        )
    return context.transpose(1, 2).flatten(2)


def _is_plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Can they go to the raw op unchecked? A cache may hold keys that need a gradient, or of another dtype."""
    for x in (key, value):
        if type(x) is not Tensor or x.requires_grad or x.dtype != query.dtype or x.device != query.device:
            return False
    if key.shape[:-1] != value.shape[:-1] or key.shape[:2] != query.shape[:2] or key.shape[-1] != query.shape[-1]:
        return False
    return mask is None or (
        type(mask) is Tensor
        and (mask.dtype == torch.bool or (mask.is_floating_point() and not mask.requires_grad))
        and mask.device == query.device
    )


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, Q, E) -> (B, H, Q, D)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def split_qkv(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, Q, 3 E) -> three of (B, H, Q, D)"""
    batch, length, width = qkv.shape
    return qkv.view(batch, length, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)


class LayerNorm(Fused):
    """A layer-norm that no fused layer around it takes along."""

    def groups(self):
        sizes = {p.shape for p in self._parameters.values() if p is not None}
        return [] if len(self.normalized_shape) == 1 and sizes <= {self.normalized_shape} else None

    def forward(self, input: Tensor) -> Tensor:
        path, _ = self.choose(input)
        if path is Path.STOCK or input.shape[-1:] != self.normalized_shape[-1:]:
            return super().forward(input)
        return layer_norm(self, input, path)


class Linear(Fused):
    """A linear that no fused layer around it takes along: a language-model head."""

    def groups(self):
        fits = self.bias is None or self.bias.shape == self.weight.shape[:1]
        return [[self.weight]] if fits else None

    def forward(self, input: Tensor) -> Tensor:
        path, panels = self.choose(input)
        if path is Path.STOCK:
            return super().forward(input)
        return linear(self, input, path, *panels or (None,))


FUSED_LAYER_NORM = fuse(nn.LayerNorm, LayerNorm)
FUSED_LINEAR = fuse(nn.Linear, Linear)


class BertSelfAttention(Fused):
    inner = {"query": LINEARS, "key": LINEARS, "value": LINEARS}

    def groups(self):
        weights = [weight_of(child) for child in (self.query, self.key, self.value)]
        biases = [child.bias is None for child in (self.query, self.key, self.value)]
        fits = len({w.shape for w in weights}) == len(set(biases)) == 1 and weights[0].shape[0] % self.num_attention_heads == 0
        return [weights] if fits else None

    def project(self, x: Tensor, path: Path, panels) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (B, H, Q, D) each, of x (B, Q, E)."""
        children = self.query, self.key, self.value
        if path is Path.PACKED:
            bias = None
            if children[0].bias is not None:
                bias = torch.cat([child.bias for child in children])
            out_features = 3 * children[0].weight.shape[0]
            qkv = _raw.packed_linear(x, panels[0], out_features, bias, None, None)
            return split_qkv(qkv, self.num_attention_heads)
        if path is Path.OPS:
            outputs = [linear(child, x, path, None) for child in children]
        else:
            outputs = [child(x) for child in children]
        return tuple(split_heads(output, self.num_attention_heads) for output in outputs)


class BertOutput(Fused):
    """LayerNorm(dropout(dense(x)) + residual)"""

    inner = {"dense": LINEARS, "dropout": DROPOUTS, "LayerNorm": NORMS}

    def groups(self):
        weight = weight_of(self.dense)
        return [[weight]] if self.LayerNorm.normalized_shape == weight.shape[:1] else None

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        path, panels = self.choose(hidden_states, residual)
        if path is Path.STOCK:
            return super().forward(hidden_states, residual)
        dense, norm = self.dense, self.LayerNorm
        if path is Path.PACKED:
            out_features = dense.weight.shape[0]
            if not _is_residual(residual, hidden_states, out_features):
                return super().forward(hidden_states, residual)
            total = _raw.packed_linear(hidden_states, panels[0], out_features, dense.bias, None, residual)
            return layer_norm(norm, total, path)
        output = linear(dense, hidden_states, path, None)
        return ops.add_layer_norm(
            output, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps, dropout_p=dropout_p(self.dropout)
        )[0]


class BertLayer(Fused):
    """The feed-forward network and what follows it; `inner` names the classes of the containers in each library."""

    inner = {
        "intermediate.dense": LINEARS,
        "intermediate.intermediate_act_fn": ACTIVATIONS,
        "output.dense": LINEARS,
        "output.dropout": DROPOUTS,
        "output.LayerNorm": NORMS,
    }

    def groups(self):
        weight1, weight2 = weight_of(self.intermediate.dense), weight_of(self.output.dense)
        fits = weight1.shape == weight2.shape[::-1] and self.output.LayerNorm.normalized_shape == weight2.shape[:1]
        return [[weight1], [weight2]] if fits else None

    def feed_forward(self, x: Tensor) -> Tensor:
        """output(intermediate(x), x)"""
        path, panels = self.choose(x)
        if path is Path.STOCK:
            return self.output(self.intermediate(x), x)
        intermediate, output = self.intermediate, self.output
        dense1, dense2, norm = intermediate.dense, output.dense, output.LayerNorm
        activation = activation_of(intermediate.intermediate_act_fn)
        if path is Path.PACKED:
            features = dense1.weight.shape
            total = _raw.packed_feed_forward(
                x, panels[0], features[0], dense1.bias, panels[1], features[1], dense2.bias, activation, x
            )
            return layer_norm(norm, total, path)
        hidden = ops.feed_forward(x, dense1.weight, dense1.bias, dense2.weight, dense2.bias, activation=activation)
        return ops.add_layer_norm(
            hidden, x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, dropout_p=dropout_p(output.dropout)
        )[0]


class BertPredictionHeadTransform(Fused):
    inner = {"dense": LINEARS, "transform_act_fn": ACTIVATIONS, "LayerNorm": NORMS}

    def groups(self):
        weight = weight_of(self.dense)
        return [[weight]] if self.LayerNorm.normalized_shape == weight.shape[:1] else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        path, panels = self.choose(hidden_states)
        if path is Path.STOCK:
            return super().forward(hidden_states)
        activation = activation_of(self.transform_act_fn)
        return layer_norm(self.LayerNorm, linear(self.dense, hidden_states, path, *panels or (None,), activation), path)


class GptAttention(Fused):
    inner = {"c_attn": LINEARS, "c_proj": LINEARS, "resid_dropout": DROPOUTS}

    def groups(self):
        weight1, weight2 = weight_of(self.c_attn), weight_of(self.c_proj)
        fits = weight1.shape == (3 * weight2.shape[1], weight2.shape[0]) and weight2.shape[1] % self.num_heads == 0
        return [[weight1], [weight2]] if fits else None

    def project(self, x: Tensor, path: Path, panels) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (B, H, Q, D) each, of x (B, Q, E)."""
        qkv = self.c_attn(x) if path is Path.STOCK else linear(self.c_attn, x, path, panels[0] if panels else None)
        return split_qkv(qkv, self.num_heads)

    def finish(self, context: Tensor, path: Path, panels) -> Tensor:
        """resid_dropout(c_proj(context))"""
        if path is Path.STOCK:
            return self.resid_dropout(self.c_proj(context))
        if path is Path.PACKED and not context.requires_grad:
            return linear(self.c_proj, context, path, panels[1])
        weight, bias = weight_of(self.c_proj), self.c_proj.bias
        return ops.linear(context, weight, bias, dropout_p=dropout_p(self.resid_dropout))


class GptBlock(Fused):
    """The residual sum and the feed-forward network; `inner` names the class of the container in each library."""

    inner = {
        "ln_2": NORMS,
        "mlp.c_fc": LINEARS,
        "mlp.act": ACTIVATIONS,
        "mlp.c_proj": LINEARS,
        "mlp.dropout": DROPOUTS,
    }

    def groups(self):
        weight1, weight2 = weight_of(self.mlp.c_fc), weight_of(self.mlp.c_proj)
        fits = weight1.shape == weight2.shape[::-1] and self.ln_2.normalized_shape == weight2.shape[:1]
        return [[weight1], [weight2]] if fits else None

    def feed_forward(self, attention_output: Tensor, residual: Tensor) -> Tensor:
        """x + mlp(ln_2(x)) for x = attention_output + residual"""
        path, panels = self.choose(attention_output, residual)
        if path is Path.PACKED and not _is_residual(residual, attention_output, residual.shape[-1]):
            path = Path.STOCK
        if path is Path.STOCK:
            x = attention_output + residual
            return x + self.mlp(self.ln_2(x))
        norm, mlp = self.ln_2, self.mlp
        linear1, linear2, activation = mlp.c_fc, mlp.c_proj, activation_of(mlp.act)
        weight1, weight2 = weight_of(linear1), weight_of(linear2)
        if path is Path.PACKED:
            normed, x, *_ = _raw.add_layer_norm(attention_output, residual, norm.weight, norm.bias, norm.eps, 0.0, None)
            return _raw.packed_feed_forward(
                normed, panels[0], weight1.shape[0], linear1.bias, panels[1], weight2.shape[0], linear2.bias, activation, x
            )
        normed, x = ops.add_layer_norm(
            attention_output, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps
        )
        return ops.feed_forward(
            normed, weight1, linear1.bias, weight2, linear2.bias,
            activation=activation, dropout_p=dropout_p(mlp.dropout), residual=x,
        )  # fmt: skip


def _is_residual(residual: Tensor, x: Tensor, features: int) -> bool:
    return type(residual) is Tensor and residual.dtype == x.dtype and residual.shape == (*x.shape[:-1], features)
