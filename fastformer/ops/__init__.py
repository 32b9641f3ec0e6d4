"""The fused ops: one function, one file, one name in every layer; :mod:`fastformer.reference` specifies them."""

from fastformer.ops.add_layer_norm import add_layer_norm
from fastformer.ops.crf import crf_decode, crf_log_likelihood
from fastformer.ops.embeddings import embeddings
from fastformer.ops.feed_forward import feed_forward
from fastformer.ops.layer_norm import layer_norm
from fastformer.ops.linear import linear
from fastformer.ops.linear_cross_entropy import linear_cross_entropy
from fastformer.ops.scaled_dot_product_attention import scaled_dot_product_attention
from fastformer.ops.varlen_attn import varlen_attn

__all__ = [
    "add_layer_norm",
    "crf_decode",
    "crf_log_likelihood",
    "embeddings",
    "feed_forward",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "scaled_dot_product_attention",
    "varlen_attn",
]
