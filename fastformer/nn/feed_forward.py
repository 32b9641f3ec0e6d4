"""FeedForward: both linear layers of a transformer's feed-forward network as one op."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastformer import ops
from fastformer.backends import _warn_once
from fastformer.nn.linear import Linear
from fastformer.ops.common import check_activation, check_probability
from fastformer.reference import ACTIVATIONS


class FeedForward(nn.Module):
    """``dropout(linear2(dropout(activation(linear1(input))))) + residual``.

    The position-wise feed-forward network of Vaswani et al., "Attention Is All You Need", 2017. The state_dict is that
    of the feed-forward half of torch.nn.TransformerEncoderLayer: linear1.*, linear2.*. Where one of them does more than
    :class:`Linear` (hooks, an adapter such as LoRA), both are called as modules, without the fused op, and a warning
    says so once.

    Args:
        d_model: size of the last dimension of input and output.
        dim_feedforward: size of the hidden activation.
        dropout: probability, in training, that an element of the hidden activation or of the output is dropped.
        activation: "gelu" (erf), "gelu_tanh", "relu", "silu" or None.
        bias: False leaves both biases out.

    Raises:
        ValueError: dropout is no probability, or activation none of these.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | None = "gelu",
        *,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_probability(dropout=dropout)
        check_activation(activation)
        self.dropout = dropout
        self.activation = activation
        self.linear1 = Linear(d_model, dim_feedforward, bias, device, dtype)
        self.linear2 = Linear(dim_feedforward, d_model, bias, device, dtype)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """input: (..., d_model) in the weights' dtype; residual: broadcasts to it, any floating dtype.

        Returns (..., d_model), in the wider of the two dtypes. Raises as :func:`ops.feed_forward`.
        """
        p = self.dropout if self.training else 0.0
        return feed_forward(input, self.linear1, self.linear2, self.activation, p, p, residual)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, activation={self.activation!r}"


def feed_forward(
    input: Tensor,
    linear1: nn.Module,
    linear2: nn.Module,
    activation: str | None,
    hidden_dropout_p: float,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """The op on the weights of two modules, or the modules themselves where the op would pass over what they do."""
    if _is_plain(linear1) and _is_plain(linear2):
        return ops.feed_forward(
            input, linear1.weight, linear1.bias, linear2.weight, linear2.bias, activation=activation,
            hidden_dropout_p=hidden_dropout_p, dropout_p=dropout_p, residual=residual,
        )  # fmt: skip
    _warn_once("fastformer.nn: linear1 or linear2 has hooks or another forward, so the feed-forward layer is not fused")
    hidden = F.dropout(ACTIVATIONS[activation](linear1(input)), hidden_dropout_p)
    output = F.dropout(linear2(hidden), dropout_p)
    return output if residual is None else output + residual


def _is_plain(linear: nn.Module) -> bool:
    hooks = linear._forward_pre_hooks, linear._forward_hooks, linear._backward_pre_hooks, linear._backward_hooks
    return type(linear).forward is Linear.forward and not any(hooks)
