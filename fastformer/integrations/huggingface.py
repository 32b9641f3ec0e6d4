"""What the swapped models of transformers share: activations, masks and attention.

The config is left as it is: attention is fused where `config._attn_implementation` is "sdpa", the default of
transformers, and whoever sets "eager" or another one gets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations, pytorch_utils
from transformers.utils import output_capturing

from fastformer.backends import _warn_once
from fastformer.integrations import layers
from fastformer.integrations.fused import ACTIVATIONS, LINEARS, TRANSPOSED, Fused, Path

LINEARS.add(pytorch_utils.Conv1D)
TRANSPOSED.add(pytorch_utils.Conv1D)
for _class, _name in {
    activations.GELUActivation: "gelu",
    activations.NewGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
    activations.SiLUActivation: "silu",
}.items():
    ACTIVATIONS[_class] = lambda module, name=_name: name

WANTS_WEIGHTS = (
    "fastformer_output_attentions"  # the keyword argument that asks the attention layers of a call for weights
)
_NOT_FUSED = ("cache", "position_bias", "softcap")  # keyword arguments of an attention function


def attention_obstacles(module: nn.Module) -> list[str]:
    implementation = module.config._attn_implementation
    return [] if implementation == "sdpa" else [f"config._attn_implementation is {implementation!r}, not 'sdpa'"]


def takes(kwargs: dict[str, Any]) -> bool:
    return all(kwargs.get(name) is None for name in _NOT_FUSED)


def request_weights(model: nn.Module, attentions: Iterable[nn.Module], kwargs: dict[str, Any]) -> None:
    """Fused kernels never hold the attention weights: for output_attentions=True every layer of that call computes them
    as "eager" does. A layer that is not swapped can't, and then none does, as in the stock model."""
    if not kwargs.get("output_attentions") or model.config._attn_implementation != "sdpa":
        return
    if all(isinstance(module, Fused) for module in attentions):
        kwargs[WANTS_WEIGHTS] = True
        _warn_once("fastformer: output_attentions=True runs the eager attention of transformers, which is slower")


def is_watched(module: nn.Module) -> bool:
    """Hooks that capture outputs stay on the modules, and sleep until somebody asks for hidden states again."""
    hooks = [*module._forward_hooks.values()]
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(
        others
        or "forward" in module.__dict__
        or any(hook.__module__ != output_capturing.__name__ for hook in hooks)
        or (hooks and output_capturing._active_collector.get())
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    path: Path,
    eager: Callable[..., tuple[Tensor, Tensor]],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The context (B, Q, E) of query (B, H, Q, D), key, value (B, H, K, D), and the weights (B, H, Q, K) if asked for.

    As `transformers.integrations.sdpa_attention`: without a mask, several queries of a causal module are aligned to the
    top left, for keys beyond them can only be the empty rest of a static cache.
    """
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = module.is_causal
    is_causal = query.shape[2] > 1 and mask is None and is_causal
    if kwargs.get(WANTS_WEIGHTS):
        mask = _additive(mask, query, key, is_causal)
        context, weights = eager(module, query, key, value, mask, scaling=module.scaling, dropout=dropout_p)
        return context.flatten(2), weights
    context = layers.attention(
        query, key, value, mask, dropout_p=dropout_p, is_causal=is_causal, scale=module.scaling, path=path
    )
    return context, None


def _additive(mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool) -> Tensor | None:
    """The mask as the eager attention adds it."""
    if is_causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(query.dtype).min
    )
