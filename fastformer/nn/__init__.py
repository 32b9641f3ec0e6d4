"""Modules on the fused ops, for people who build their own model.

Arguments and state_dicts are those of torch.nn, down to the order of the parameters (so that optimizer checkpoints fit,
too) and the random numbers that initialize them:

    EncoderLayer    torch.nn.TransformerEncoderLayer; with is_causal=True it is the layer of a decoder-only model (GPT)
    DecoderLayer    torch.nn.TransformerDecoderLayer
    SelfAttention   torch.nn.MultiheadAttention(x, x, x)
    CrossAttention  torch.nn.MultiheadAttention(x, memory, memory)
    FeedForward     linear1 and linear2 of the layers above
    LayerNorm       torch.nn.LayerNorm, which can add a residual first
    Linear          torch.nn.Linear

Masks mean what they mean in torch.nn: in a bool mask **True is ignored**, the opposite of
:func:`fastformer.ops.scaled_dot_product_attention` and of an attention_mask in transformers; a float mask is added to
the scores. Three things differ from torch.nn: ``is_causal=True`` is no hint but is applied, and needs no mask beside
it; attention in which every key is ignored gives 0 instead of NaN; activations are named, not passed as functions.
"""

from fastformer.nn.attention import CrossAttention, SelfAttention
from fastformer.nn.decoder_layer import DecoderLayer
from fastformer.nn.encoder_layer import EncoderLayer
from fastformer.nn.feed_forward import FeedForward
from fastformer.nn.layer_norm import LayerNorm
from fastformer.nn.linear import Linear

__all__ = ["CrossAttention", "DecoderLayer", "EncoderLayer", "FeedForward", "LayerNorm", "Linear", "SelfAttention"]
