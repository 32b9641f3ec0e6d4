"""One call of every op and of its main options: what holds for all of them is tested on these."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensors import BACKEND, randn
from torch import Tensor

from fastformer import backends, ops


@dataclass(frozen=True)
class Case:
    op: str
    shapes: dict[str, tuple[int, ...]]  # of the tensors by name
    options: Callable[[], dict]

    def tensors(self, dtype: torch.dtype = torch.float32, scale: int = 1) -> dict[str, Tensor]:
        """Random ones; the first dimension of what is no weight is `scale` times as large."""
        scaled = ("input", "residual", "query", "key", "value")
        sizes = {name: (s[0] * scale, *s[1:]) if name in scaled else s for name, s in self.shapes.items()}
        return {name: randn(*size, dtype=dtype) / len(size) for name, size in sizes.items()}

    @property
    def one_size(self) -> bool:
        """Does an option hold the tensors to the sizes that are given here?"""
        return not {"attn_mask", "cu_seq_q", "target", "tags", "input_ids"}.isdisjoint(self.options())

    @property
    def gradients_with_the_output(self) -> bool:
        """Does the forward compute the gradients, so that the backward needs no raw op?"""
        return self.op == "linear_cross_entropy" and self.options().get("reduction") != "none"

    def __call__(self, **tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = getattr(ops, self.op)(**tensors, **self.options())
        return outputs if isinstance(outputs, tuple) else (outputs,)


def _case(op: str, shapes: dict[str, tuple[int, ...]], **options) -> Case:
    return Case(op, shapes, lambda: {name: x() if callable(x) else x for name, x in options.items()})


_LAYER_NORM = {"input": (6, 5, 20), "weight": (20,), "bias": (20,)}
_LINEAR = {"input": (6, 5, 20), "weight": (36, 20), "bias": (36,), "residual": (6, 5, 36)}
_FEED_FORWARD = {
    "input": (6, 5, 20),
    "weight1": (40, 20),
    "bias1": (40,),
    "weight2": (24, 40),
    "bias2": (24,),
    "residual": (6, 5, 24),
}
_ATTENTION = {"query": (2, 4, 9, 8), "key": (2, 4, 11, 8), "value": (2, 4, 11, 10)}
_GROUPED = {"query": (3, 4, 9, 8), "key": (3, 2, 11, 8), "value": (3, 2, 11, 10)}
_PACKED = {"query": (14, 4, 8), "key": (16, 2, 8), "value": (16, 2, 10)}


_CROSS_ENTROPY = {"input": (6, 5, 20), "linear_weight": (36, 20), "linear_bias": (36,)}


_EMBEDDINGS = {
    "word_embeddings": (36, 20),
    "position_embeddings": (9, 20),
    "token_type_embeddings": (2, 20),
    "weight": (20,),
    "bias": (20,),
}


_CRF = {"emissions": (4, 6, 5), "transitions": (5, 5), "start": (5,), "end": (5,)}


def labels() -> Tensor:
    """(6, 5) classes, every third -100."""
    return torch.arange(30).where(torch.arange(30) % 3 > 0, -100).view(6, 5)


def words() -> Tensor:
    """(6, 5) of 36 words, some of them often."""
    return torch.arange(30).view(6, 5) ** 2 % 36


def token_types() -> Tensor:
    """(6, 5) of 2"""
    return torch.arange(30).view(6, 5) % 5 // 3


def tags() -> Tensor:
    """(4, 6) of 5 tags, every seventh -100."""
    return (torch.arange(24) % 5).where(torch.arange(24) % 7 > 0, -100).view(4, 6)


def padding_mask() -> Tensor:
    """(B, 1, 1, Sk) bool: the second sequence has 6 keys."""
    return (torch.arange(11) < torch.tensor([11, 6])[:, None])[:, None, None]


def bounds(*values: int) -> Callable[[], Tensor]:
    return lambda: torch.tensor(values, dtype=torch.int32)


_ALL = {
    "layer_norm": _case("layer_norm", _LAYER_NORM, normalized_shape=20),
    "layer_norm of two dimensions": _case(
        "layer_norm", {"input": (6, 5, 4), "weight": (5, 4), "bias": (5, 4)}, normalized_shape=(5, 4), eps=0.3
    ),
    "layer_norm without weight": _case("layer_norm", {"input": (6, 5, 20)}, normalized_shape=20),
    "add_layer_norm": _case("add_layer_norm", _LAYER_NORM | {"residual": (6, 5, 20)}, normalized_shape=20),
    "add_layer_norm, dropout": _case(
        "add_layer_norm", _LAYER_NORM | {"residual": (6, 5, 20)}, normalized_shape=20, eps=0.3, dropout_p=0.3
    ),
    "linear": _case("linear", _LINEAR),
    "linear, no bias": _case("linear", {"input": (6, 5, 20), "weight": (36, 20)}),
    "linear, gelu, dropout": _case("linear", _LINEAR, activation="gelu", dropout_p=0.3),
    "feed_forward": _case("feed_forward", _FEED_FORWARD),
    "feed_forward, dropout": _case("feed_forward", _FEED_FORWARD, hidden_dropout_p=0.2, dropout_p=0.3),
    "feed_forward, no activation": _case("feed_forward", _FEED_FORWARD, activation=None),
    "embeddings": _case(
        "embeddings", _EMBEDDINGS, input_ids=words, position_ids=lambda: torch.arange(3, 8), token_type_ids=token_types,
        eps=1e-12,
    ),
    "embeddings, words alone, dropout": _case(
        "embeddings", {"word_embeddings": (36, 20)}, input_ids=words, padding_idx=0, eps=0.3, dropout_p=0.3
    ),
    "linear_cross_entropy": _case("linear_cross_entropy", _CROSS_ENTROPY, target=labels),
    "linear_cross_entropy, each row": _case(
        "linear_cross_entropy", _CROSS_ENTROPY, target=labels, weight=lambda: torch.linspace(0.5, 2, 36),
        reduction="none", label_smoothing=0.1,
    ),
    "crf_log_likelihood": _case("crf_log_likelihood", _CRF, tags=tags),
    "crf_log_likelihood, sum, mask": _case(
        "crf_log_likelihood", _CRF, tags=tags, mask=lambda: torch.arange(24).view(4, 6) % 5 > 0, reduction="sum"
    ),
    "attention": _case("scaled_dot_product_attention", _ATTENTION),
    "attention, causal, dropout": _case("scaled_dot_product_attention", _ATTENTION, is_causal=True, dropout_p=0.3),
    "attention, padding mask": _case("scaled_dot_product_attention", _ATTENTION, attn_mask=padding_mask),
    "attention, float mask": _case(
        "scaled_dot_product_attention", _ATTENTION, attn_mask=lambda: torch.linspace(-1, 1, 99).view(9, 11)
    ),
    "attention, grouped, window": _case(
        "scaled_dot_product_attention", _GROUPED, enable_gqa=True, window_size=(3, 2), scale=0.4
    ),
    "varlen_attn": _case(
        "varlen_attn", _PACKED, cu_seq_q=bounds(0, 5, 14), cu_seq_k=bounds(0, 9, 16), max_q=9, max_k=9, enable_gqa=True
    ),
    "varlen_attn, causal, dropout": _case(
        "varlen_attn", _PACKED, cu_seq_q=bounds(0, 5, 14), cu_seq_k=bounds(0, 5, 16), max_q=9, max_k=11,
        enable_gqa=True, window_size=(-1, 0), dropout_p=0.3, scale=0.7,
    ),
}  # fmt: skip
CASES = {name: case for name, case in _ALL.items() if BACKEND in backends.declared(case.op)}
