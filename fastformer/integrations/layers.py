"""The fused forwards of BERT and GPT-2 layers, for every library whose modules have the names of transformers.

Each has two ways, see `fused.Path`: the differentiable ops, and the raw ops on packed weights. The latter counts
microseconds, and reads the parameters from the modules' dicts.
Letters in shapes: B batch, Q queries, K keys, H heads, D head size, E = H D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastformer import ops
from fastformer.integrations import logits, tensor_parallel
from fastformer.integrations.fused import (
    ACTIVATIONS,
    DROPOUTS,
    LINEARS,
    NORMS,
    TRANSPOSED,
    Fused,
    Path,
    activation_of,
    dropout_p,
    fuse,
    weight_of,
)
from fastformer.integrations.padding import Tokens, is_only_wrapped, leaves_padding_out
from fastformer.integrations.stacks import Settings, StackedLayer, stack_of
from fastformer.integrations.tensor_parallel import is_sharded
from fastformer.packing import Packed, is_hooked

_raw = torch.ops.fastformer_cpu


def linear(module: nn.Module, x: Tensor, panels: Tensor | None, activation: str | None = None) -> Tensor:
    """activation(module(x)) of a plain linear, or of one that is split; on its packed weight, if given."""
    if panels is None and is_sharded(module._parameters["weight"]):
        return tensor_parallel.linear(module, x, activation, is_transposed=module.__class__ in TRANSPOSED)
    weight, bias = weight_of(module), module._parameters["bias"]
    if panels is not None:
        return _raw.packed_linear(x, panels, weight.shape[0], bias, activation, None)
    return ops.linear(x, weight, bias, activation=activation)


def feed_forward(
    linear1: nn.Module,
    linear2: nn.Module,
    x: Tensor,
    activation: str | None,
    *,
    hidden_dropout_p: float = 0.0,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """ops.feed_forward of two linears, plain or split."""
    if any(is_sharded(module._parameters["weight"]) for module in (linear1, linear2)):
        hidden = F.dropout(linear(linear1, x, None, activation), hidden_dropout_p)
        output = F.dropout(linear(linear2, hidden, None), dropout_p)
        return output if residual is None else output + residual
    weight1, weight2 = weight_of(linear1), weight_of(linear2)
    return ops.feed_forward(
        x, weight1, linear1.bias, weight2, linear2.bias, activation=activation, hidden_dropout_p=hidden_dropout_p,
        dropout_p=dropout_p, residual=residual,
    )  # fmt: skip


def layer_norm(module: nn.LayerNorm, x: Tensor, path: Path) -> Tensor:
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if path is Path.OPS:
        return ops.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
    return _raw.layer_norm(x, weight, bias, module.eps)[0]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout_p: float,
    is_causal: bool = False,
    scale: float,
    window_size: tuple[int, int] = (-1, -1),
    path: Path,
) -> Tensor:
    """(B, Q, E) of query (B, H, Q, D), key and value (B, H, K, D); the mask as in ops.scaled_dot_product_attention."""
    if path is Path.PACKED and _is_plain(query, key, value, mask):
        if mask is not None:
            mask = mask.expand(*query.shape[:3], key.shape[2])
            if mask.is_floating_point():
                mask = mask.to(torch.float64 if query.dtype == torch.float64 else torch.float32)
        arguments = query, key, value, mask, 0.0, None, is_causal, scale, *window_size
        context = _raw.scaled_dot_product_attention(*arguments)[0]
    else:
        context = ops.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale, window_size=window_size
        )
    return context.transpose(1, 2).flatten(2)


def _is_plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Can they go to the raw op, which checks nothing? A cache may hold keys of another dtype, or with gradients."""
    for x in (key, value):
        if type(x) is not Tensor or x.requires_grad or x.dtype != query.dtype or x.device != query.device:
            return False
    if key.shape != value.shape or key.shape[:2] != query.shape[:2] or key.shape[3] != query.shape[3]:
        return False
    return mask is None or (
        type(mask) is Tensor
        and (mask.dtype == torch.bool or (mask.is_floating_point() and not mask.requires_grad))
        and mask.device == query.device
    )


def is_residual(residual: Tensor, x: Tensor, features: int) -> bool:
    """Can a raw op add it to (..., features) from x?"""
    return (
        type(residual) is Tensor
        and residual.dtype == x.dtype
        and residual.device == x.device
        and residual.shape == (*x.shape[:-1], features)
    )


def missing_parameters(module: nn.Module, *names: str) -> list[str]:
    """What stops a module whose own parameters are computed: parametrized, pruned."""
    return [f"its {name} is no parameter" for name in names if name not in module._parameters]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, Q, E) -> (B, H, Q, D)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def split_qkv(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, Q, 3 E) -> three of (B, H, Q, D); under tensor parallelism H are some of the heads."""
    batch, length, width = qkv.shape
    return qkv.view(batch, length, 3, width // (3 * head_dim), head_dim).permute(2, 0, 3, 1, 4).unbind(0)


class LayerNorm(Fused):
    """A layer-norm that no fused layer takes along."""

    @staticmethod
    def own_obstacles(module: nn.Module) -> list[str]:
        obstacles, dims = missing_parameters(module, "weight", "bias"), len(module.normalized_shape)
        return obstacles if dims == 1 else [*obstacles, f"normalizes {dims} dimensions at once"]

    def groups(self):
        sizes = {tuple(p.shape) for p in self._parameters.values() if p is not None}
        return [] if sizes <= {tuple(self.normalized_shape)} else None

    def forward(self, input: Tensor) -> Tensor:
        fits = input.is_floating_point() and not input.is_nested and input.shape[-1:] == self.normalized_shape
        path, _ = self.choose(input) if fits else (Path.STOCK, None)
        return super().forward(input) if path is Path.STOCK else layer_norm(self, input, path)


class Linear(Fused):
    """A linear that no fused layer takes along, a language-model head. In training its logits wait for their loss, see
    logits.py. Else it is fused on packed weights only, for packing a vocabulary at each call of ops.linear takes longer
    than its product gains."""

    def groups(self):
        fits = self.bias is None or self.bias.shape == self.weight.shape[:1]
        return [[self.weight]] if fits else None

    def forward(self, input: Tensor) -> Tensor:
        path, packed = self.choose(input)
        if path is Path.PACKED:
            return linear(self, input, packed.panels[0])
        if path is Path.OPS and not is_hooked(self) and logits.may_wait(input, self.weight, self.bias):
            return logits.waiting(input, self.weight, self.bias)
        return super().forward(input)


FUSED_LAYER_NORM = fuse(nn.LayerNorm, LayerNorm)
FUSED_LINEAR = fuse(nn.Linear, Linear)


class BertSelfAttention(Fused):
    inner = {"query": LINEARS, "key": LINEARS, "value": LINEARS}
    takes_shards = True

    def groups(self):
        children = self.query, self.key, self.value
        weights = [weight_of(child) for child in children]
        same = len({w.shape for w in weights}) == len({child.bias is None for child in children}) == 1
        return [weights] if same and weights[0].shape[0] % self.num_attention_heads == 0 else None

    def project(self, x: Tensor, path: Path, packed: Packed | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (B, H, Q, D) each, of x (B, Q, E)."""
        if path is Path.PACKED:
            biases = [child._parameters["bias"] for child in packed.children]
            bias = None if biases[0] is None else torch.cat(biases)
            out_features = 3 * packed.children[0]._parameters["weight"].shape[0]
            qkv = _raw.packed_linear(x, packed.panels[0], out_features, bias, None, None)
            return split_qkv(qkv, self.attention_head_size)
        children = self.query, self.key, self.value
        outputs = [child(x) if path is Path.STOCK else linear(child, x, None) for child in children]
        # Of linears that are split there are only some of the heads.
        return tuple(x.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2) for x in outputs)

    def attend_tokens(self, x: Tensor, tokens: Tokens) -> Tensor:
        """(1, tokens, E): self-attention of each sequence."""
        path, packed = self.choose(x)
        heads, scale = self.project(x, path, packed), getattr(self, "scaling", None)
        return tokens.attention(*heads, path, self.dropout.p if self.training else 0.0, scale)


class BertOutput(Fused):
    """LayerNorm(dropout(dense(x)) + residual)"""

    inner = {"dense": LINEARS, "LayerNorm": NORMS, "dropout": DROPOUTS}
    takes_shards = True

    def groups(self):
        weight = weight_of(self.dense)
        return [[weight]] if weight.shape[:1] == self.LayerNorm.normalized_shape else None

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        path, packed = self.choose(hidden_states, residual)
        if path is Path.PACKED:
            dense, norm, _ = packed.children
            features = norm.normalized_shape[0]
            if is_residual(residual, hidden_states, features):
                bias = dense._parameters["bias"]
                total = _raw.packed_linear(hidden_states, packed.panels[0], features, bias, None, residual)
                return layer_norm(norm, total, path)
        if path is not Path.OPS:
            return super().forward(hidden_states, residual)
        output = linear(self.dense, hidden_states, None)
        return post_norm(output, residual, self.dropout, self.LayerNorm)


def post_norm(output: Tensor, residual: Tensor, dropout: nn.Dropout, norm: nn.LayerNorm) -> Tensor:
    shape, p = norm.normalized_shape, dropout_p(dropout)
    return ops.add_layer_norm(output, residual, shape, norm.weight, norm.bias, norm.eps, dropout_p=p)[0]


class BertLayer(StackedLayer):
    """The feed-forward network with its layer-norm. Each library puts the two containers first in `inner`."""

    inner = {
        "intermediate.dense": LINEARS,
        "intermediate.intermediate_act_fn": ACTIVATIONS,
        "output.dense": LINEARS,
        "output.LayerNorm": NORMS,
        "output.dropout": DROPOUTS,
    }
    takes_shards = True

    def groups(self):
        weight1, weight2 = weight_of(self.intermediate.dense), weight_of(self.output.dense)
        fits = weight1.shape == weight2.shape[::-1] and weight2.shape[:1] == self.output.LayerNorm.normalized_shape
        return [[weight1], [weight2]] if fits else None

    def feed_forward(self, x: Tensor) -> Tensor:
        """output(intermediate(x), x)"""
        path, packed = self.choose(x)
        if path is Path.STOCK:
            return self.output(self.intermediate(x), x)
        if path is Path.PACKED:
            dense1, act, dense2, norm, _ = packed.children[2:]
            hidden_features, features = dense1._parameters["weight"].shape
            total = _raw.packed_feed_forward(
                x, packed.panels[0], hidden_features, dense1._parameters["bias"],
                packed.panels[1], features, dense2._parameters["bias"], activation_of(act), x,
            )  # fmt: skip
            return layer_norm(norm, total, path)
        activation = activation_of(self.intermediate.intermediate_act_fn)
        output = feed_forward(self.intermediate.dense, self.output.dense, x, activation)
        return post_norm(output, x, self.output.dropout, self.output.LayerNorm)

    def members(self):
        return self.attention.self, self.attention.output, self

    def containers(self):
        return (self.attention,)

    def vectors(self):
        attention, norm1, norm2 = self.attention.self, self.attention.output.LayerNorm, self.output.LayerNorm
        return (
            norm1.weight, norm1.bias, attention.query.bias, attention.key.bias, attention.value.bias,
            self.attention.output.dense.bias, norm2.weight, norm2.bias, self.intermediate.dense.bias,
            self.output.dense.bias,
        )  # fmt: skip

    def settings(self):
        attention, norm1, norm2 = self.attention.self, self.attention.output.LayerNorm, self.output.LayerNorm
        if norm1.eps != norm2.eps or getattr(attention, "is_causal", False):
            return None
        heads, width = attention.num_attention_heads, norm2.normalized_shape[0]
        activation = activation_of(self.intermediate.intermediate_act_fn)
        return Settings(heads, activation, getattr(attention, "scaling", (width // heads) ** -0.5), norm1.eps)

    def read(self):
        attention, norm1, norm2 = self.attention.self, self.attention.output.LayerNorm, self.output.LayerNorm
        activation, own = self.intermediate.intermediate_act_fn, ("is_causal", "num_attention_heads", "scaling")
        return *((attention, name) for name in own), (norm1, "eps"), (norm2, "eps"), (activation, "approximate")


class BertEncoder(Fused):
    """The layers of an encoder, without the padding of the batch."""

    is_watched = staticmethod(is_hooked)

    def without_padding(self, hidden_states: Tensor, mask: Tensor) -> Tensor | None:
        """The last hidden states (B, S, E) of a batch with a padding mask (B, 1, 1, S); None where somebody looks at
        what happens inside. The layers are called with the Tokens in the place of a mask."""
        batch, length, _ = hidden_states.shape
        if mask.dtype != torch.bool or mask.shape != (batch, 1, 1, length) or batch == 0:
            return None
        if not leaves_padding_out(self, hidden_states):
            return None
        for layer in self.layer:
            if not isinstance(layer, BertLayer) or not isinstance(layer.attention.self, BertSelfAttention):
                return None
            modules = layer, layer.attention, layer.attention.self
            if any(self.is_watched(module) and not is_only_wrapped(module) for module in modules):
                return None
        tokens = Tokens(mask[:, 0, 0])
        x = tokens.gather(hidden_states)
        stack = stack_of(self, self.layer, x, self.is_watched)
        if stack is not None:
            x = stack.run(x, cu_seq=tokens.cu_seq, longest=tokens.longest)
        else:
            for layer in self.layer:
                x = layer(x, tokens)
        return tokens.scatter(x, hidden_states.shape)

    def stacked(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor | None:
        """The last hidden states (B, S, E) in one op, where that serves, for a mask (B, 1 or H, 1 or S, S)."""
        stack = stack_of(self, self.layer, hidden_states, self.is_watched)
        if stack is None:
            return None
        if mask is not None:
            (batch, length, _), heads = hidden_states.shape, stack.settings.heads
            wanted = (batch, heads, length, length)
            if type(mask) is not Tensor or mask.dim() != 4 or not mask.is_cpu or mask.requires_grad:
                return None
            if any(given not in (1, full) for given, full in zip(mask.shape, wanted, strict=True)):
                return None
            if mask.shape[3] != length or not (mask.dtype == torch.bool or mask.is_floating_point()):
                return None
            if mask.dtype != torch.bool:
                mask = mask.to(torch.float64 if hidden_states.dtype == torch.float64 else torch.float32)
        return stack.run(hidden_states, mask=mask)


class BertPredictionHeadTransform(Fused):
    inner = {"dense": LINEARS, "transform_act_fn": ACTIVATIONS, "LayerNorm": NORMS}

    def groups(self):
        weight = weight_of(self.dense)
        return [[weight]] if weight.shape[:1] == self.LayerNorm.normalized_shape else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        path, packed = self.choose(hidden_states)
        if path is Path.STOCK:
            return super().forward(hidden_states)
        panels = packed.panels[0] if packed else None
        hidden_states = linear(self.dense, hidden_states, panels, activation_of(self.transform_act_fn))
        return layer_norm(self.LayerNorm, hidden_states, path)


class GptAttention(Fused):
    inner = {"c_attn": LINEARS, "c_proj": LINEARS, "resid_dropout": DROPOUTS}
    takes_shards = True

    def groups(self):
        weight1, weight2 = weight_of(self.c_attn), weight_of(self.c_proj)
        fits = weight1.shape[0] == 3 * weight2.shape[1] and weight2.shape[1] % self.num_heads == 0
        return [[weight1], [weight2]] if fits else None

    def project(self, x: Tensor, path: Path, packed: Packed | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (B, H, Q, D) each, of x (B, Q, E)."""
        qkv = self.c_attn(x) if path is Path.STOCK else linear(self.c_attn, x, packed and packed.panels[0])
        return split_qkv(qkv, self.head_dim)

    def finish(self, context: Tensor, path: Path, packed: Packed | None) -> Tensor:
        """resid_dropout(c_proj(context))"""
        if path is Path.STOCK:
            return self.resid_dropout(self.c_proj(context))
        if path is Path.PACKED and not context.requires_grad:
            return linear(self.c_proj, context, packed.panels[1])
        p = dropout_p(self.resid_dropout)
        if is_sharded(self.c_proj.weight):
            return F.dropout(linear(self.c_proj, context, None), p)
        return ops.linear(context, weight_of(self.c_proj), self.c_proj.bias, dropout_p=p)


class GptBlock(StackedLayer):
    """The residual sum and the feed-forward network. Each library puts the container first in `inner`."""

    inner = {
        "mlp.c_fc": LINEARS,
        "mlp.act": ACTIVATIONS,
        "mlp.c_proj": LINEARS,
        "mlp.dropout": DROPOUTS,
        "ln_2": NORMS,
    }
    takes_shards = True

    def groups(self):
        weight1, weight2 = weight_of(self.mlp.c_fc), weight_of(self.mlp.c_proj)
        fits = weight1.shape == weight2.shape[::-1] and weight2.shape[:1] == self.ln_2.normalized_shape
        return [[weight1], [weight2]] if fits else None

    def feed_forward(self, attention_output: Tensor, residual: Tensor) -> Tensor:
        """x + mlp(ln_2(x)) for x = attention_output + residual"""
        path, packed = self.choose(attention_output, residual)
        if path is Path.PACKED and is_residual(residual, attention_output, packed.in_features):
            linear1, act, linear2, _, norm = packed.children[1:]
            weight1, weight2 = weight_of(linear1), weight_of(linear2)
            weight, bias = norm._parameters["weight"], norm._parameters["bias"]
            normed, x, *_ = _raw.add_layer_norm(attention_output, residual, weight, bias, norm.eps, 0.0, None)
            return _raw.packed_feed_forward(
                normed, packed.panels[0], weight1.shape[0], linear1._parameters["bias"],
                packed.panels[1], weight2.shape[0], linear2._parameters["bias"], activation_of(act), x,
            )  # fmt: skip
        if path is not Path.OPS:
            x = attention_output + residual
            return x + self.mlp(self.ln_2(x))
        norm, mlp = self.ln_2, self.mlp
        shape = norm.normalized_shape
        normed, x = ops.add_layer_norm(attention_output, residual, shape, norm.weight, norm.bias, norm.eps)
        p = dropout_p(mlp.dropout)
        return feed_forward(mlp.c_fc, mlp.c_proj, normed, activation_of(mlp.act), dropout_p=p, residual=x)

    def members(self):
        return self.attn, self, self.ln_1

    def vectors(self):
        attn, mlp = self.attn, self.mlp
        return (
            self.ln_1.weight, self.ln_1.bias, attn.c_attn.bias, None, None, attn.c_proj.bias,
            self.ln_2.weight, self.ln_2.bias, mlp.c_fc.bias, mlp.c_proj.bias,
        )  # fmt: skip

    def settings(self):
        attn, eps = self.attn, self.ln_1.eps
        if eps != self.ln_2.eps or not getattr(attn, "is_causal", True):
            return None
        return Settings(attn.num_heads, activation_of(self.mlp.act), attn.scaling, eps)

    def read(self):
        own = ((self.attn, name) for name in ("is_causal", "num_heads", "scaling"))
        return *own, (self.ln_1, "eps"), (self.ln_2, "eps"), (self.mlp.act, "approximate")
