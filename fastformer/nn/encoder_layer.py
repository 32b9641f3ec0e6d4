"""EncoderLayer: torch.nn.TransformerEncoderLayer on the fused ops."""

from __future__ import annotations

from torch import Tensor, nn

from fastformer.nn.attention import SelfAttention
from fastformer.nn.feed_forward import feed_forward
from fastformer.nn.layer_norm import LayerNorm
from fastformer.nn.linear import Linear
from fastformer.ops.common import check_activation, check_probability


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward network, each with residual and layer norm.

    Arguments, defaults and state_dict are those of torch.nn.TransformerEncoderLayer, and it can stand in torch.nn's
    TransformerEncoder. Post-norm as in BERT (Vaswani et al., "Attention Is All You Need", 2017) or, with norm_first,
    pre-norm as in GPT-2 (Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020). A decoder-only
    model is pre-norm layers called with is_causal=True, and a LayerNorm after the last.

    Args:
        d_model: size E of the hidden states, a multiple of nhead.
        nhead: number of heads.
        dim_feedforward: size of the feed-forward network's hidden activation.
        dropout: probability, in training, of all dropouts: attention probabilities, hidden activation, both outputs.
        activation: "gelu" (erf), "gelu_tanh", "relu" or "silu".
        layer_norm_eps: eps of the layer norms.
        batch_first: inputs and outputs are (B, S, E), else (S, B, E).
        norm_first: pre-norm.
        bias: False leaves out the biases of linear layers and layer norms.

    Raises:
        ValueError: d_model is no multiple of nhead, dropout no probability, or activation none of those named.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_probability(dropout=dropout)
        check_activation(activation)
        factory = {"bias": bias, "device": device, "dtype": dtype}
        self.dropout = dropout
        self.activation = activation
        self.norm_first = norm_first
        self.self_attn = SelfAttention(d_model, nhead, dropout, batch_first=batch_first, **factory)
        self.linear1 = Linear(d_model, dim_feedforward, **factory)
        self.linear2 = Linear(dim_feedforward, d_model, **factory)
        self.norm1 = LayerNorm(d_model, layer_norm_eps, **factory)
        self.norm2 = LayerNorm(d_model, layer_norm_eps, **factory)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """
        Args:
            src: (B, S, E) with batch_first, else (S, B, E); (S, E) without a batch; in the weights' dtype.
            src_mask: (S, S) or (B * nhead, S, S); bool, **True = ignore**, or floating, added to the scores.
            src_key_padding_mask: (B, S), without a batch (S,); bool, **True = ignore**, or floating.
            is_causal: each position sees itself and those before it; a src_mask applies as well, but is not needed.

        Returns:
            src's shape and dtype.

        Raises:
            ValueError, TypeError: as :meth:`SelfAttention.forward`.
        """
        masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        p = self.dropout if self.training else 0.0
        network = self.linear1, self.linear2, self.activation, p
        if self.norm_first:
            normalized, x = self.norm2(self.self_attn(self.norm1(src), **masks), src, p)
            return feed_forward(normalized, *network, dropout_p=p, residual=x)
        x, _ = self.norm1(self.self_attn(src, **masks), src, p)
        return self.norm2(feed_forward(x, *network), x, p)[0]

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, activation={self.activation!r}, norm_first={self.norm_first}"
