"""Each op in a few lines of plain PyTorch: the specification that every kernel, fake and test answers to.

Any device, any floating dtype (16-bit attention and layer-norm are computed in float32), differentiable by
autograd. The signatures are those of :mod:`fastformer.ops`. Shapes: B batch, H heads, S sequence (Sq queries, Sk
keys), D head size, M rows, N columns.

Dropout
-------
Nothing is stored: whether an element is kept is a function of a 64-bit seed and of where the element is. The bits come
from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with key
(seed mod 2^32, seed div 2^32). A counter (c0, c1, c2, c3) gives four words of 32 bits, for four columns 16 apart;
64 neighbouring columns take 16 counters:

    c0 = column div 64 * 16 + column mod 16,  word = column div 16 mod 4
    attention: column = key,                         (c1, c2, c3) = (query, query head, sequence of the batch)
    rows:      column = index in the last dimension, (c1, c2, c3) = (row mod 2^32, row div 2^32, 0)

Query and key are positions inside their sequence, rows count over all leading dimensions. An element is kept where its
word is >= min(round(p 2^32), 2^32 - 1), and scaled by 1 / (1 - p), or 0 for p = 1. Each public function draws one seed
per dropout with torch's generator of the input's device, the hidden one first. ``philox4x32`` gives the published
vectors:

    >>> [hex(int(w)) for w in philox4x32(0, 0, 0, 0, 0)]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    >>> seed = 0x299f31d0a4093822  # the key (a4093822, 299f31d0)
    >>> [hex(int(w)) for w in philox4x32(seed, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    ['0xd16cfe09', '0x94fdcceb', '0x5001e420', '0x24126ea1']
    >>> row_dropout_mask(torch.tensor(7), 0.5, 2, 70)[:, [0, 1, 16, 63, 64, 69]].int().tolist()
    [[1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0]]
    >>> attention_dropout_mask(torch.tensor(7), 0.5, 1, 2, 2, 3).int().tolist()
    [[[[1, 0, 0], [0, 0, 1]], [[0, 1, 0], [0, 0, 1]]]]
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK32 = 0xFFFFFFFF

ACTIVATIONS = {
    None: lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def philox4x32(seed: Tensor | int, c0, c1, c2, c3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits (in int64) for each counter; the counters broadcast."""
    x0, x1, x2, x3 = (torch.as_tensor(c, dtype=torch.int64) for c in (c0, c1, c2, c3))
    seed = torch.as_tensor(seed, dtype=torch.int64)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        product0, product1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x2 = ((product1 >> 32) & _MASK32) ^ x1 ^ k0, ((product0 >> 32) & _MASK32) ^ x3 ^ k1
        x1, x3 = product1 & _MASK32, product0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return x0, x1, x2, x3


def dropout_threshold(p: float) -> int:
    """Bits below it drop the element."""
    return min(round(p * 2**32), _MASK32)


def _kept(seed: Tensor, p: float, columns: int, c1, c2, c3) -> Tensor:
    """(..., columns) bool; c1, c2, c3 have a last dimension of 1."""
    blocks = -(-columns // 64)
    counters = torch.arange(blocks * 16, device=seed.device)
    words = torch.stack(torch.broadcast_tensors(*philox4x32(seed, counters, c1, c2, c3)), dim=-1)
    words = words.unflatten(-2, (blocks, 16)).transpose(-1, -2).flatten(-3)  # (..., block, word, 16) -> (..., column)
    return words[..., :columns] >= dropout_threshold(p)


def row_dropout_mask(seed: Tensor, p: float, rows: int, columns: int) -> Tensor:
    """(rows, columns) bool, True = kept."""
    row = torch.arange(rows, device=seed.device)[:, None]
    return _kept(seed, p, columns, row & _MASK32, row >> 32, 0)


def attention_dropout_mask(
    seed: Tensor, p: float, batch: int, heads: int, queries: int, keys: int, *, first_sequence: int = 0
) -> Tensor:
    """(batch, heads, queries, keys) bool, True = kept; the batch's sequences count from `first_sequence`."""
    sequence, head, query = (torch.arange(n, device=seed.device) for n in (batch, heads, queries))
    sequence = sequence + first_sequence
    return _kept(seed, p, keys, query[:, None], head[:, None, None], sequence[:, None, None, None])


def draw_seed(device: torch.device) -> Tensor:
    """One int64 from torch's generator of the device: manual_seed, checkpointing and CUDA graphs reach it."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def _drop(x: Tensor, kept: Tensor, p: float) -> Tensor:
    return torch.where(kept, x * (1 / (1 - p) if p < 1 else 0.0), 0.0)


def _dropout(x: Tensor, p: float) -> Tensor:
    """Dropout over the rows of the last dimension."""
    if p == 0:
        return x
    kept = row_dropout_mask(draw_seed(x.device), p, x.numel() // max(x.shape[-1], 1), x.shape[-1])
    return _drop(x, kept.view(x.shape), p)


def _widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def attention_keeps(
    queries: int, keys: int, is_causal: bool, window_size: tuple[int, int], device: torch.device
) -> Tensor | None:
    """(Sq, Sk) bool of what causality (aligned to the top left) and the window (to the bottom right) keep."""
    left, right = window_size
    if not is_causal and left < 0 and right < 0:
        return None
    query, key = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    kept = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if is_causal:
        kept &= key <= query
    diagonal = query + (keys - queries)
    if left >= 0:
        kept &= key >= diagonal - left
    if right >= 0:
        kept &= key <= diagonal + right
    return kept


def _attention(
    query, key, value, attn_mask, dropout_p, is_causal, scale, window_size, seed, first_sequence=0
) -> Tensor:
    """(B, H, S, D), as many key as query heads."""
    q, k, v = _widen(query), _widen(key), _widen(value)
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    kept = attention_keeps(q.shape[-2], k.shape[-2], is_causal, window_size, q.device)
    if kept is not None:
        scores = scores.masked_fill(~kept, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    masked = (scores == -math.inf).all(-1, keepdim=True)  # rows without a key give 0
    probabilities = scores.masked_fill(masked, 0).softmax(-1).masked_fill(masked, 0)
    if dropout_p > 0:
        batch, heads, queries, keys = probabilities.shape
        mask = attention_dropout_mask(seed, dropout_p, batch, heads, queries, keys, first_sequence=first_sequence)
        probabilities = _drop(probabilities, mask, dropout_p)
    return (probabilities @ v).to(query.dtype)


def scaled_dot_product_attention(
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
    """softmax(scale Q K^T + mask) V; see :func:`fastformer.ops.scaled_dot_product_attention`."""
    leading = query.shape[:-3]
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    q, k, v = (x.flatten(0, -4) if x.dim() > 4 else x[(None,) * (4 - x.dim())] for x in (query, key, value))
    if attn_mask is not None and query.dim() > 4:
        attn_mask = attn_mask.expand(*leading, query.shape[-3], query.shape[-2], key.shape[-2]).flatten(0, -4)
    seed = draw_seed(query.device) if dropout_p > 0 else None
    output = _attention(q, k, v, attn_mask, dropout_p, is_causal, scale, window_size, seed)
    return output.reshape(*query.shape[:-1], value.shape[-1])


def varlen_attn(
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
    """Attention within each of the sequences that are laid end to end; see :func:`fastformer.ops.varlen_attn`."""
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    seed = draw_seed(query.device) if dropout_p > 0 else None
    bounds_q, bounds_k = cu_seq_q.tolist(), cu_seq_k.tolist()
    for name, bounds, x in (("cu_seq_q", bounds_q, query), ("cu_seq_k", bounds_k, key)):
        if bounds[0] != 0 or bounds[-1] != len(x) or bounds != sorted(bounds):
            raise RuntimeError(f"{name}: expected to go up from 0 to {len(x)}, got {bounds}")
    if len(bounds_q) == 1:
        bounds_q = bounds_k = [0, 0]  # no sequence: as one that is empty
    outputs = []
    for i in range(len(bounds_q) - 1):
        q = query[bounds_q[i] : bounds_q[i + 1]].transpose(0, 1)[None]  # (1, H, S, D)
        k, v = (x[bounds_k[i] : bounds_k[i + 1]].transpose(0, 1)[None] for x in (key, value))
        output = _attention(q, k, v, None, dropout_p, False, scale, window_size, seed, first_sequence=i)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def layer_norm(
    input: Tensor, normalized_shape, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """(input - mean) / sqrt(variance + eps) * weight + bias; see :func:`fastformer.ops.layer_norm`."""
    widened = (None if x is None else x.to(_widen(input).dtype) for x in (weight, bias))
    return F.layer_norm(_widen(input), _as_tuple(normalized_shape), *widened, eps).to(input.dtype)


def _as_tuple(normalized_shape) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """s = dropout(input) + residual; returns (layer_norm(s), s)."""
    rows = input.flatten(-len(_as_tuple(normalized_shape)))
    s = _dropout(_widen(rows), dropout_p).view(input.shape) + _widen(residual)
    s = s.to(torch.promote_types(input.dtype, residual.dtype))
    return layer_norm(s, normalized_shape, weight, bias, eps), s


def embeddings(
    input_ids: Tensor,
    word_embeddings: Tensor,
    position_ids: Tensor | None = None,
    position_embeddings: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    token_type_embeddings: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """dropout(layer_norm(word + token type + position)); see :func:`fastformer.ops.embeddings`."""
    s = _widen(F.embedding(input_ids, word_embeddings, padding_idx))
    for ids, table in ((token_type_ids, token_type_embeddings), (position_ids, position_embeddings)):
        if table is not None:
            s = s + _widen(F.embedding(ids, table))
    return _dropout(layer_norm(s, s.shape[-1], weight, bias, eps), dropout_p).to(word_embeddings.dtype)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """dropout(activation(input @ weight.T + bias)) + residual"""
    output = _dropout(ACTIVATIONS[activation](F.linear(input, weight, bias)), dropout_p)
    return output if residual is None else output + residual


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str | None = "gelu",
    hidden_dropout_p: float = 0.0,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """dropout(W2 hidden_dropout(activation(W1 input))) + residual"""
    hidden = linear(input, weight1, bias1, activation=activation, dropout_p=hidden_dropout_p)
    return linear(hidden, weight2, bias2, dropout_p=dropout_p, residual=residual)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target, ...)"""
    logits = F.linear(input[None], linear_weight, linear_bias).flatten(0, -2)
    loss = F.cross_entropy(
        logits,
        target.flatten(),
        None if weight is None else weight.to(logits.dtype),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    return loss.view(target.shape) if reduction == "none" else loss


def _chain_first(kept: Tensor, emissions: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The positions that are kept before all others, in order; emissions of the others as 0."""
    order = (~kept).long().argsort(dim=1, stable=True)  # (B, S)
    emissions = emissions.masked_fill(~kept[..., None], 0)
    emissions = emissions.gather(1, order[..., None].expand(emissions.shape))
    return kept.gather(1, order), emissions, *(x.gather(1, order) for x in others)


def crf_log_likelihood(
    emissions: Tensor,
    tags: Tensor,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """score(tags) - log(sum over all tags of exp(score)); see :func:`fastformer.ops.crf_log_likelihood`."""
    dtype = transitions.dtype
    kept = tags != -100 if mask is None else mask & (tags != -100)
    kept, emissions, tags = _chain_first(kept, _widen(emissions), tags.masked_fill(~kept, 0))
    transitions, start, end = _widen(transitions), _widen(start), _widen(end)
    rows = torch.arange(len(tags), device=tags.device)
    # (B, T): log of the sum over the tags before, and the score, both less what was largest: long sums lose digits.
    alpha = start.expand(len(tags), -1)
    score, last = start.new_zeros(len(tags)), torch.zeros_like(rows)
    for step in range(tags.shape[1]):
        tag, now = tags[:, step], kept[:, step]
        arrived = (alpha[:, :, None] + transitions).logsumexp(1) if step else alpha
        alpha = torch.where(now[:, None], arrived + emissions[:, step], alpha)
        moved = transitions[last, tag] if step else start[tag]
        score = torch.where(now, score + moved + emissions[rows, step, tag], score)
        last = torch.where(now, tag, last)
        largest = alpha.detach().amax(1).clamp(min=torch.finfo(alpha.dtype).min)
        alpha, score = alpha - largest[:, None], score - largest
    result = torch.where(kept.any(1), score + end[last] - (alpha + end).logsumexp(1), 0.0).to(dtype)
    return result if reduction == "none" else result.mean() if reduction == "mean" else result.sum()


def crf_decode(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The tags with the largest score, -100 where masked; see :func:`fastformer.ops.crf_decode`."""
    batch, length, tags = emissions.shape
    given = torch.ones(batch, length, dtype=torch.bool, device=emissions.device) if mask is None else mask
    positions = torch.arange(length, device=given.device).expand(batch, length)
    kept, emissions, positions = _chain_first(given, _widen(emissions), positions)
    transitions, start, end = _widen(transitions), _widen(start), _widen(end)
    best, before = start.expand(batch, -1), []
    stay = torch.arange(tags, device=given.device)
    for step in range(length):
        now = kept[:, step, None]
        arrived, tag = (best[:, :, None] + transitions).max(1) if step else (best, stay.expand(batch, -1))
        best = torch.where(now, arrived + emissions[:, step], best)
        before.append(torch.where(now, tag, stay))
    tag, decoded = (best + end).argmax(1), []
    for step in reversed(before):
        decoded.append(tag)
        tag = step.gather(1, tag[:, None])[:, 0]
    if not decoded:
        return positions.clone()
    chain = torch.stack(decoded[::-1], 1)
    return torch.full_like(positions, -100).scatter(1, positions, chain.masked_fill(~kept, -100))
