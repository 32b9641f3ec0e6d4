"""DecoderLayer: torch.nn.TransformerDecoderLayer on the fused ops."""

from __future__ import annotations

from torch import Tensor, nn

from fastformer.nn.attention import CrossAttention, SelfAttention
from fastformer.nn.feed_forward import feed_forward
from fastformer.nn.layer_norm import LayerNorm
from fastformer.nn.linear import Linear
from fastformer.ops.common import check_activation, check_probability


class DecoderLayer(nn.Module):
    """Self-attention, attention to an encoder's output and feed-forward network, each with residual and layer norm.

    Arguments, defaults and state_dict are those of torch.nn.TransformerDecoderLayer, and it can stand in torch.nn's
    TransformerDecoder. (A decoder without an encoder is :class:`EncoderLayer` with is_causal=True.)

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias: as
            :class:`EncoderLayer`.

    Raises:
        ValueError: as :class:`EncoderLayer`.
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
        self.multihead_attn = CrossAttention(d_model, nhead, dropout, batch_first=batch_first, **factory)
        self.linear1 = Linear(d_model, dim_feedforward, **factory)
        self.linear2 = Linear(dim_feedforward, d_model, **factory)
        self.norm1 = LayerNorm(d_model, layer_norm_eps, **factory)
        self.norm2 = LayerNorm(d_model, layer_norm_eps, **factory)
        self.norm3 = LayerNorm(d_model, layer_norm_eps, **factory)

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
        """
        Args:
            tgt: (B, Sq, E) with batch_first, else (Sq, B, E); (Sq, E) without a batch; in the weights' dtype.
            memory: the encoder's output, (B, Sk, E) with batch_first, else (Sk, B, E); (Sk, E) without a batch.
            tgt_mask: (Sq, Sq) or (B * nhead, Sq, Sq), memory_mask: (Sq, Sk) or (B * nhead, Sq, Sk); bool,
                **True = ignore**, or floating, added to the scores.
            tgt_key_padding_mask: (B, Sq), memory_key_padding_mask: (B, Sk); bool, **True = ignore**, or floating.
            tgt_is_causal: each position sees itself and those before it; what training and generation need, without a
                tgt_mask. memory_is_causal: the same for the memory's positions.

        Returns:
            tgt's shape and dtype.

        Raises:
            ValueError, TypeError: as :meth:`SelfAttention.forward`.
        """
        masks = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask, "is_causal": tgt_is_causal}
        memory_masks = {
            "attn_mask": memory_mask,
            "key_padding_mask": memory_key_padding_mask,
            "is_causal": memory_is_causal,
        }
        p = self.dropout if self.training else 0.0
        network = self.linear1, self.linear2, self.activation, p
        if self.norm_first:
            normalized, x = self.norm2(self.self_attn(self.norm1(tgt), **masks), tgt, p)
            normalized, x = self.norm3(self.multihead_attn(normalized, memory, **memory_masks), x, p)
            return feed_forward(normalized, *network, dropout_p=p, residual=x)
        x, _ = self.norm1(self.self_attn(tgt, **masks), tgt, p)
        x, _ = self.norm2(self.multihead_attn(x, memory, **memory_masks), x, p)
        return self.norm3(feed_forward(x, *network), x, p)[0]

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, activation={self.activation!r}, norm_first={self.norm_first}"
