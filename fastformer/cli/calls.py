"""Calls of every op and of its main options, and each op as eager PyTorch composes it: what `verify` and `tune` run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastformer
from fastformer import backends, ops, reference

Function = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """A call of `fastformer.ops.<op>` on random tensors."""

    op: str
    what: str  # sizes and options, for people
    shapes: dict[str, tuple[int, ...]]  # of the floating tensors, by argument
    options: dict[str, Any] = field(default_factory=dict)  # the other arguments; a function gives its tensor
    wide: tuple[str, ...] = ()  # the tensors that are float32 whatever the dtype

    def tensors(self, device: torch.device, dtype: torch.dtype, draw: int = 0) -> dict[str, Tensor]:
        """Normal numbers, the weights scaled so that outputs are about as large as inputs, query and key so that
        attention is spread over several keys; the same for each draw."""
        generator = torch.Generator().manual_seed(draw)
        drawn = {name: torch.randn(shape, generator=generator) for name, shape in self.shapes.items()}
        for name, x in drawn.items():
            if "weight" in name and x.dim() == 2:
                x /= math.sqrt(x.shape[1])
            elif name in ("query", "key"):
                x /= 2
        return {name: x.to(device, torch.float32 if name in self.wide else dtype) for name, x in drawn.items()}

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    def bind(self, function: Function, device: torch.device) -> Function:
        """The function of the tensors that calls `function` with the options."""
        return partial(function, **{name: x(device) if callable(x) else x for name, x in self.options.items()})

    @property
    def fused(self) -> Function:
        return getattr(ops, self.op)

    @property
    def eager(self) -> Function:
        return EAGER[self.op]


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """torch's own, with dropout composed in the tensors' dtype."""
    if dropout_p == 0:
        with fastformer.backend("torch"):
            return ops.scaled_dot_product_attention(
                query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa, window_size=window_size
            )
    seed = reference.draw_seed(query.device)
    keeps = reference.attention_keeps(query.shape[-2], key.shape[-2], is_causal, window_size, query.device)
    return _attend(query, key, value, keeps, attn_mask, dropout_p, scale, seed)


def _attend(query, key, value, keeps, attn_mask, dropout_p, scale, seed, sequence: int = 0) -> Tensor:
    """(B, H, S, D), as many key heads as query heads or a divisor."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    for mask in (keeps, attn_mask):
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    probabilities = scores.softmax(-1)
    if dropout_p > 0:
        kept = reference.attention_dropout_mask(seed, dropout_p, *scores.shape, first_sequence=sequence)
        probabilities = probabilities * (kept.to(query.dtype) / (1 - dropout_p))
    return probabilities @ value


def eager_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """One sequence after the other, composed in the tensors' dtype."""
    seed = reference.draw_seed(query.device) if dropout_p > 0 else None
    bounds = zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], cu_seq_k.tolist(), cu_seq_k.tolist()[1:], strict=False)
    outputs = []
    for i, (first_q, end_q, first_k, end_k) in enumerate(bounds):
        q = query[first_q:end_q].transpose(0, 1)[None]
        k, v = (x[first_k:end_k].transpose(0, 1)[None] for x in (key, value))
        keeps = reference.attention_keeps(end_q - first_q, end_k - first_k, False, window_size, query.device)
        outputs.append(_attend(q, k, v, keeps, None, dropout_p, scale, seed, sequence=i)[0].transpose(0, 1))
    return torch.cat(outputs)


def eager_layer_norm(input: Tensor, normalized_shape: int, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    weight, bias = (None if x is None else x.to(input.dtype) for x in (weight, bias))
    return F.layer_norm(input, (normalized_shape,), weight, bias, eps)


def eager_add_layer_norm(
    input: Tensor, residual: Tensor, normalized_shape: int, weight=None, bias=None, eps: float = 1e-5, *, dropout_p=0.0
) -> tuple[Tensor, Tensor]:
    s = (input if dropout_p == 0 else _drop_rows(input, dropout_p)) + residual
    return eager_layer_norm(s, normalized_shape, weight, bias, eps), s


def eager_embeddings(
    input_ids: Tensor,
    word_embeddings: Tensor,
    position_ids: Tensor,
    position_embeddings: Tensor,
    token_type_ids: Tensor,
    token_type_embeddings: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dropout_p: float = 0.0,
) -> Tensor:
    s = F.embedding(input_ids, word_embeddings) + F.embedding(token_type_ids, token_type_embeddings)
    s = eager_layer_norm(s + F.embedding(position_ids, position_embeddings), s.shape[-1], weight, bias)
    return s if dropout_p == 0 else _drop_rows(s, dropout_p)


def _drop_rows(x: Tensor, p: float) -> Tensor:
    kept = reference.row_dropout_mask(reference.draw_seed(x.device), p, x.shape[:-1].numel(), x.shape[-1])
    return x * (kept.view(x.shape).to(x.dtype) / (1 - p))


def eager_linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, **options: Any
) -> Tensor:
    logits = F.linear(input, linear_weight, linear_bias)
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), **options)


EAGER: dict[str, Function] = {
    "scaled_dot_product_attention": eager_attention,
    "varlen_attn": eager_varlen_attn,
    "layer_norm": eager_layer_norm,
    "add_layer_norm": eager_add_layer_norm,
    "embeddings": eager_embeddings,
    "linear": reference.linear,  # which composes it in the tensors' dtype
    "feed_forward": reference.feed_forward,
    "linear_cross_entropy": eager_linear_cross_entropy,
    "crf_log_likelihood": reference.crf_log_likelihood,
    "crf_decode": reference.crf_decode,
}


def main_options(quick: bool) -> list[Call]:
    """Small sizes that are no multiples of a tile; unless `quick`, those of BERT-base and of larger heads as well."""
    calls = list(_options(batch=2, heads=2, head_dim=40, queries=70, keys=75, width=100, hidden=136))
    if not quick:
        calls += _options(batch=2, heads=4, head_dim=64, queries=200, keys=210, width=768, hidden=1536)
        calls += _options(batch=1, heads=2, head_dim=128, queries=270, keys=300, width=1024, hidden=1000)
    return [call for call in calls if call.op in backends.OPS]


def _options(batch: int, heads: int, head_dim: int, queries: int, keys: int, width: int, hidden: int) -> Iterator[Call]:
    rows, vector = (batch, queries, width), (width,)
    norm = {"input": rows, "weight": vector, "bias": vector}
    sum_norm = {"input": rows, "residual": rows, "weight": vector, "bias": vector}
    size = "x".join(map(str, rows))
    yield Call("layer_norm", size, norm, {"normalized_shape": width})
    yield Call("layer_norm", f"{size}, no weight", {"input": rows}, {"normalized_shape": width})
    yield Call("add_layer_norm", size, sum_norm, {"normalized_shape": width})
    dropout = {"normalized_shape": width, "dropout_p": 0.3}
    yield Call("add_layer_norm", f"{size}, dropout, float32 residual", sum_norm, dropout, wide=("residual",))

    tables, ids = embedding_tables(hidden, queries, width), embedding_ids(batch, queries, hidden)
    yield Call("embeddings", f"{size} of {hidden} words", tables, ids)
    yield Call("embeddings", f"{size} of {hidden} words, dropout", tables, ids | {"dropout_p": 0.3})

    linear = {"input": rows, "weight": (hidden, width), "bias": (hidden,)}
    size = f"{size} to {hidden}"
    yield Call("linear", f"{size}, no bias", {"input": rows, "weight": (hidden, width)})
    for activation in ("gelu", "gelu_tanh", "relu", "silu"):
        yield Call("linear", f"{size}, {activation}", linear, {"activation": activation})
    residual = linear | {"residual": (batch, queries, hidden)}
    yield Call("linear", f"{size}, gelu, dropout, residual", residual, {"activation": "gelu", "dropout_p": 0.3})

    network = {"input": rows, "weight1": (hidden, width), "bias1": (hidden,)}
    network |= {"weight2": (width, hidden), "bias2": vector}
    yield Call("feed_forward", f"{size}, gelu", network)
    yield Call(
        "feed_forward", f"{size}, gelu_tanh, dropouts, residual", network | {"residual": rows},
        {"activation": "gelu_tanh", "hidden_dropout_p": 0.2, "dropout_p": 0.3},
    )  # fmt: skip

    attention = {"query": (batch, heads, queries, head_dim)}
    attention |= {name: (batch, heads, keys, head_dim) for name in ("key", "value")}
    grouped = attention | {name: (batch, heads // 2, keys, head_dim) for name in ("key", "value")}
    size = f"{batch}x{heads}x{queries}x{head_dim}, {keys} keys"
    padding, bias = partial(padding_mask, batch, keys), partial(position_bias, queries, keys)
    for what, options in (
        ("", {}),
        (", causal", {"is_causal": True}),
        (", padding mask", {"attn_mask": padding}),
        (", float mask", {"attn_mask": bias}),
        (", dropout", {"dropout_p": 0.3}),
        # With dropout, each query sees several keys. Where it sees one, eager's gradient is exactly 0, and that of
        # every kernel that starts from the log-sum-exp is the difference of two equal sums.
        (", causal, padding mask, dropout", {"window_size": (-1, 0), "attn_mask": padding, "dropout_p": 0.3}),
    ):
        yield Call("scaled_dot_product_attention", size + what, attention, options)
    yield Call(
        "scaled_dot_product_attention", f"{size}, grouped, window", grouped,
        {"enable_gqa": True, "window_size": (40, 20), "scale": 0.2},
    )  # fmt: skip

    lengths, past = (queries, 1, queries // 2), 9  # keys before the first query
    packed = {"query": (sum(lengths), heads, head_dim)}
    packed |= {name: (sum(lengths) + past * len(lengths), heads, head_dim) for name in ("key", "value")}
    options = {"cu_seq_q": partial(bounds, lengths), "cu_seq_k": partial(bounds, [n + past for n in lengths])}
    options |= {"max_q": queries, "max_k": queries + past}
    size = f"{' + '.join(map(str, lengths))} queries, {heads}x{head_dim}"
    yield Call("varlen_attn", size, packed, options)
    yield Call("varlen_attn", f"{size}, causal, dropout", packed, options | {"window_size": (-1, 0), "dropout_p": 0.3})

    tokens, classes = batch * queries, hidden + 3
    logits = {"input": (tokens, width), "linear_weight": (classes, width)}
    some = {"target": partial(targets, tokens, classes), "reduction": "none"}
    size = f"{tokens}x{width} to {classes}"
    yield Call("linear_cross_entropy", size, logits, some)
    yield Call(
        "linear_cross_entropy", f"{size}, bias, label smoothing", logits | {"linear_bias": (classes,)},
        some | {"label_smoothing": 0.1},
    )  # fmt: skip

    emissions = {"emissions": (batch, queries, heads + 7)}
    emissions |= {"transitions": (heads + 7, heads + 7), "start": (heads + 7,), "end": (heads + 7,)}
    holes = {"mask": partial(kept_positions, batch, queries)}
    size = "x".join(map(str, emissions["emissions"]))
    tagged = {"tags": lambda device: targets(batch * queries, heads + 7, device).view(batch, queries)}
    yield Call("crf_log_likelihood", size, emissions, tagged | {"reduction": "none"})
    yield Call("crf_log_likelihood", f"{size}, mask", emissions, tagged | holes)
    yield Call("crf_decode", f"{size}, mask", emissions, holes)


def embedding_tables(words: int, positions: int, width: int) -> dict[str, tuple[int, ...]]:
    tables = {"word_embeddings": words, "position_embeddings": positions, "token_type_embeddings": 2}
    return {name: (rows, width) for name, rows in tables.items()} | {"weight": (width,), "bias": (width,)}


def embedding_ids(batch: int, length: int, words: int) -> dict[str, Function]:
    """Two sentences of random words in each row."""

    def input_ids(device: torch.device) -> Tensor:
        return torch.randint(words, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)

    def token_type_ids(device: torch.device) -> Tensor:
        return (torch.arange(length, device=device) > length // 2).long()[None]

    def position_ids(device: torch.device) -> Tensor:
        return torch.arange(length, device=device)

    return {"input_ids": input_ids, "position_ids": position_ids, "token_type_ids": token_type_ids}


def padding_mask(batch: int, keys: int, device: torch.device) -> Tensor:
    """(B, 1, 1, Sk) bool: sequences from full length down to half of it."""
    lengths = torch.linspace(keys, keys / 2, batch).long()
    return (torch.arange(keys) < lengths[:, None])[:, None, None].to(device)


def position_bias(queries: int, keys: int, device: torch.device) -> Tensor:
    """(Sq, Sk): less for keys that are farther away."""
    return -0.05 * (torch.arange(queries)[:, None] - torch.arange(keys)).abs().float().to(device)


def bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(B + 1,) int32"""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)


def targets(rows: int, classes: int, device: torch.device) -> Tensor:
    """(rows,) int64, every seventh ignored."""
    drawn = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
    drawn[::7] = -100
    return drawn.to(device)


def kept_positions(batch: int, length: int, device: torch.device) -> Tensor:
    """(B, S) bool: a padding mask with every fifth position masked as well."""
    return padding_mask(batch, length, device)[:, 0, 0] & (torch.arange(length, device=device) % 5 > 0)


def results(function: Function, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The outputs, and the gradients of all tensors for a fixed weighted sum of the outputs, unless these are integers;
    in `dtype` if given."""
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in tensors.items()}
    torch.manual_seed(1)  # the same dropout in every run
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = {"output" if i == 0 else f"output {i}": out.detach() for i, out in enumerate(outputs)}
    if not outputs[0].is_floating_point():
        return {name: out.double() for name, out in named.items()}
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    gradients = torch.autograd.grad(outputs, leaves.values(), weights)
    return named | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
