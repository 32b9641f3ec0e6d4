"""crf_log_likelihood and crf_decode: a linear-chain conditional random field over the tags of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer import backends, reference
from fastformer.ops.common import check_floating, check_shape, compute_dtype, needs_grad, raw, register, register_raw

_SCHEMA = (
    "(Tensor emissions, Tensor tags, Tensor transitions, Tensor start, Tensor end, Tensor? mask, bool save_arrived)"
    " -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor emissions, Tensor tags, Tensor transitions, Tensor start, Tensor end, Tensor? mask,"
    " Tensor arrived) -> (Tensor, Tensor, Tensor, Tensor)"
)
_DECODE_SCHEMA = "(Tensor emissions, Tensor transitions, Tensor start, Tensor end, Tensor? mask) -> Tensor"
_REDUCTIONS = ("mean", "sum", "none")


def crf_log_likelihood(
    emissions: Tensor,
    tags: Tensor,
    transitions: Tensor,
    start: Tensor,
    end: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The log-probability of the tags of each sequence, given its emissions (Lafferty, McCallum, Pereira 2001).

    The score of tags y_1 ... y_n is start[y_1] + emissions[1, y_1] + transitions[y_1, y_2] + ... + emissions[n, y_n]
    + end[y_n]; their log-likelihood is it less the log of the sum of exp over all tags. Minus the mean is the loss.

    Args:
        emissions: (B, S, T), B sequences, S positions, T tags; float32, bfloat16, float16 or float64; any strides.
        tags: (B, S) int64, 0 to T - 1, or -100 at a position without a tag.
        transitions: (T, T) from tag to tag; start, end: (T,). Of emissions' dtype, or float32 beside 16-bit
            emissions, as autocast has it. -inf rules a tag or a transition out.
        mask: (B, S) bool, True = keep; any, also with holes. What is masked or has the tag -100 is left out: the
            positions before and after it are neighbours, and its emissions are not read.
        reduction: "mean" over the B sequences (NaN for none), "sum" or "none". A sequence without positions has the
            log-likelihood 0.

    Returns:
        One number, or for "none" (B,); in transitions' dtype. Computed in float32 (float64 for float64).

    Raises:
        TypeError: an operand is not floating or of a dtype that does not fit, tags are not int64, mask is not bool.
        ValueError: a shape or reduction that does not fit.
        RuntimeError: a tag that is not there, on the CPU.
    """
    _check(emissions, transitions, start, end, mask)
    if not isinstance(tags, Tensor) or tags.dtype != torch.int64:
        raise TypeError(f"tags: expected an int64 Tensor, got {_kind(tags)}")
    check_shape("tags", tags, emissions.shape[:2], "emissions' batch and positions")
    _check_device("tags", tags, emissions)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(map(repr, _REDUCTIONS))}, got {reduction!r}")
    operands = emissions, transitions, start, end
    backend = backends.choose("crf_log_likelihood", *operands)
    if backend == "torch":
        return reference.crf_log_likelihood(emissions, tags, transitions, start, end, mask, reduction)
    arguments = emissions, tags, transitions, start, end, mask
    if needs_grad(*operands):
        result = torch.ops.fastformer.crf_log_likelihood(*arguments, True, backend)[0]
    else:
        result = raw(backend).crf_log_likelihood(*arguments, False)[0]
    if reduction != "none":
        result = result.mean() if reduction == "mean" else result.sum()
    return result.to(transitions.dtype)


def crf_decode(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The tags with the largest score of each sequence (Viterbi), and -100 at positions that are masked.

    Arguments and errors as for :func:`crf_log_likelihood`; of equal scores the first tag counts. No gradient.

    Returns:
        (B, S) int64.
    """
    _check(emissions, transitions, start, end, mask)
    operands = tuple(x.detach() for x in (emissions, transitions, start, end))
    backend = backends.choose("crf_decode", *operands)
    if backend == "torch":
        return reference.crf_decode(*operands, mask)
    return raw(backend).crf_decode(*operands, mask)


def _check(emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor | None) -> None:
    check_floating(one_dtype=False, emissions=emissions, transitions=transitions, start=start, end=end)
    check_floating(transitions=transitions, start=start, end=end)
    wide = emissions.dtype in (torch.bfloat16, torch.float16) and transitions.dtype == torch.float32
    if transitions.dtype != emissions.dtype and not wide:
        raise TypeError(f"transitions: expected {emissions.dtype} as emissions have, got {transitions.dtype}")
    if emissions.dim() != 3 or emissions.shape[-1] == 0:
        raise ValueError(f"emissions: expected (batch, positions, tags), got {tuple(emissions.shape)}")
    tags = emissions.shape[-1]
    check_shape("transitions", transitions, (tags, tags), "emissions' tags")
    for name, vector in (("start", start), ("end", end)):
        check_shape(name, vector, (tags,), "emissions' tags")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool Tensor, got {_kind(mask)}")
    check_shape("mask", mask, emissions.shape[:2], "emissions' batch and positions")
    _check_device("mask", mask, emissions)


def _kind(x: object) -> str:
    return f"{x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def _check_device(name: str, tensor: Tensor, emissions: Tensor) -> None:
    if tensor.device != emissions.device:
        raise ValueError(f"{name}: expected on {emissions.device} as emissions are, got {tensor.device}")


def _fake(emissions, tags, transitions, start, end, mask, save_arrived):
    dtype = compute_dtype(emissions.dtype)
    arrived = emissions.new_empty(emissions.shape if save_arrived else (0,), dtype=dtype)
    return emissions.new_empty(emissions.shape[:1], dtype=dtype), arrived


def _setup_context(ctx, inputs, output):
    emissions, tags, transitions, start, end, mask, _, ctx.backend = inputs
    ctx.dtypes = [x.dtype for x in (emissions, transitions, start, end)]
    ctx.save_for_backward(emissions, tags, transitions, start, end, mask, output[1])


def _backward(ctx, grad_output, *grad_of_what_is_saved):
    grads = raw(ctx.backend).crf_log_likelihood_backward(grad_output, *ctx.saved_tensors)
    emissions, transitions, start, end = (grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
    return emissions, None, transitions, start, end, None, None


def _fake_backward(grad_output, emissions, tags, transitions, start, end, mask, arrived):
    dtype = compute_dtype(emissions.dtype)
    return tuple(x.new_empty(x.shape, dtype=dtype) for x in (emissions, transitions, start, end))


def _fake_decode(emissions, transitions, start, end, mask):
    return emissions.new_empty(emissions.shape[:2], dtype=torch.int64)


register("crf_log_likelihood", _SCHEMA, _BACKWARD_SCHEMA, _fake, _setup_context, _backward, _fake_backward)
register_raw("crf_decode", "crf_decode", _DECODE_SCHEMA, _fake_decode)
