"""What the models share: activations, heads, masks, the loss and the initial weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,  # x * Phi(x), with erf
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def check_activation(field: str, name: str) -> None:
    if name not in ACTIVATIONS:
        raise NotImplementedError(f"{field}={name!r} is not supported, only {', '.join(ACTIVATIONS)}")


def check_heads(hidden_size: int, num_heads: int) -> None:
    if hidden_size % num_heads:
        raise ValueError(f"the hidden size must be a multiple of the number of heads, got {hidden_size}, {num_heads}")


def check_input_ids(input_ids: Tensor, past_length: int, max_length: int) -> None:
    """input_ids: (B, S), positions past_length ... past_length + S - 1 of a model that knows max_length of them."""
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have shape (batch, length), got {tuple(input_ids.shape)}")
    if (length := past_length + input_ids.size(1)) > max_length:
        raise ValueError(f"input_ids must end within the model's {max_length} positions, got a length of {length}")


def padding_mask(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """(B, S), 1 = keep and 0 = padding, as a (B, 1, 1, S) bool mask that broadcasts over heads and queries."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, length):
        got = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must have shape (batch, length) = {(batch, length)}, got {got}")
    if attention_mask.is_floating_point():
        raise TypeError(f"attention_mask must be bool or integer, 1 to keep a token, got {attention_mask.dtype}")
    return attention_mask.bool()[:, None, None, :]


def split_heads(hidden_states: Tensor, head_dim: int) -> Tensor:
    """(B, S, H * D) -> (B, H, S, D); under tensor parallelism H are some of the heads."""
    return hidden_states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(context: Tensor) -> Tensor:
    """(B, H, S, D) -> (B, S, H * D)"""
    return context.transpose(1, 2).flatten(2)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels other than -100, in float32 at least. logits: (..., classes), labels: (...)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(dtype).flatten(0, -2), labels.flatten())


def init_weights(module: nn.Module, std: float) -> None:
    """Normal(0, std) weights and zero biases in every linear and embedding of a module, as in BERT and GPT-2."""
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            nn.init.normal_(child.weight, std=std)
        if isinstance(child, nn.Linear) and child.bias is not None:
            nn.init.zeros_(child.bias)
        if isinstance(child, nn.Embedding) and child.padding_idx is not None:
            with torch.no_grad():
                child.weight[child.padding_idx].zero_()
