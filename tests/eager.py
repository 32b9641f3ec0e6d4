"""Each op as eager PyTorch composes it, in any dtype: what the fused ops are judged by, with their dropout masks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer import reference

ACTIVATIONS = {
    None: lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def dropout(x: Tensor, p: float) -> Tensor:
    if p == 0:
        return x
    seed = reference.draw_seed(x.device)
    return apply_dropout(x, reference.row_dropout_mask(seed, p, x.shape[:-1].numel(), x.shape[-1]).view(x.shape), p)


def apply_dropout(x: Tensor, kept: Tensor, p: float) -> Tensor:
    return x * (kept.to(x.dtype) / (1 - p)) if p < 1 else x * 0


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    output = dropout(ACTIVATIONS[activation](F.linear(input, weight, bias)), dropout_p)
    return output if residual is None else output + residual


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None = None,
    activation: str | None = "gelu",
    hidden_dropout_p: float = 0.0,
    dropout_p: float = 0.0,
) -> Tensor:
    hidden = linear(input, weight1, bias1, activation=activation, dropout_p=hidden_dropout_p)
    return linear(hidden, weight2, bias2, residual, dropout_p=dropout_p)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    **options,
) -> Tensor:
    logits = F.linear(input, linear_weight, linear_bias)
    weight = None if weight is None else weight.to(logits.dtype)
    loss = F.cross_entropy(logits.view(target.numel(), logits.shape[-1]), target.flatten(), weight, **options)
    return loss.view(target.shape) if loss.dim() else loss


def path_scores(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, tags: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """(B,): of the tags of each sequence; those of -100 are left out."""
    scores = []
    for rows, path in zip(emissions.to(dtype), tags, strict=True):
        rows, path = rows[path != -100], path[path != -100].tolist()
        score = rows.new_zeros(())
        for step, tag in enumerate(path):
            score = score + (transitions[path[step - 1], tag] if step else start[tag]).to(dtype) + rows[step, tag]
        scores.append(score + end[path[-1]].to(dtype) if path else score)
    return torch.stack(scores) if scores else emissions.new_zeros(0, dtype=dtype)


def crf_log_likelihood(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    tags: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """One sequence after the other, step by step, in the tensors' dtype."""
    tags = tags if mask is None else tags.where(mask, -100)
    sums = []
    for rows, kept in zip(emissions, tags != -100, strict=True):
        alpha = start
        for step, row in enumerate(rows[kept]):
            alpha = ((alpha[:, None] + transitions).logsumexp(0) if step else alpha) + row
        sums.append((alpha + end).logsumexp(0) if kept.any() else end.new_zeros(()))
    scores = path_scores(emissions, transitions, start, end, tags, emissions.dtype)
    result = scores - torch.stack(sums) if sums else scores
    result = result + sum(x.flatten()[:0].sum() for x in (emissions, transitions, start, end))  # 0, of all of them
    return result if reduction == "none" else getattr(result, reduction)()


def layer_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    normalized_shape: tuple[int, ...] | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return F.layer_norm(input, normalized_shape or input.shape[-1:], weight, bias, eps)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    s = dropout(input, dropout_p) + residual
    return layer_norm(s, weight, bias, eps=eps), s


def embeddings(
    word_embeddings: Tensor,
    position_embeddings: Tensor | None = None,
    token_type_embeddings: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    eps: float = 1e-5,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    s = F.embedding(input_ids, word_embeddings, padding_idx)
    if token_type_embeddings is not None:
        s = s + F.embedding(token_type_ids, token_type_embeddings)
    if position_embeddings is not None:
        s = s + F.embedding(position_ids, position_embeddings)
    return dropout(layer_norm(s, weight, bias, eps=eps), dropout_p)


def visible(queries: int, keys: int, is_causal: bool = False, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
    """(Sq, Sk) bool, one by one: causal from the top left, the window along the diagonal from the bottom right."""
    left, right = window_size

    def sees(query: int, key: int) -> bool:
        offset = key - (query + keys - queries)
        return (not is_causal or key <= query) and (left < 0 or offset >= -left) and (right < 0 or offset <= right)

    rows = [[sees(query, key) for key in range(keys)] for query in range(queries)]
    return torch.tensor(rows, dtype=torch.bool).view(queries, keys)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """(B, H, S, D), as many key heads as query heads or a divisor. Rows that are masked whole give 0."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    if dropout_p == 0:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    masked = (scores == float("-inf")).all(-1, keepdim=True)
    probabilities = scores.masked_fill(masked, 0).softmax(-1).masked_fill(masked, 0)
    seed = reference.draw_seed(query.device)
    kept = reference.attention_dropout_mask(seed, dropout_p, *scores.shape)
    return apply_dropout(probabilities, kept, dropout_p) @ value


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """(T, H, D): one sequence, or the empty one, after the other."""
    outputs = []
    lengths_q, lengths_k = lengths_q or [0], lengths_k or [0]
    for q, k, v in zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True):
        mask = visible(len(q), len(k), window_size=window_size)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        outputs.append(scaled_dot_product_attention(q, k, v, mask, scale=scale)[0].transpose(0, 1))
    return torch.cat(outputs)
