"""embeddings: the sum of BERT's three embeddings, its layer-norm and dropout in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastformer import backends, reference
from fastformer.ops.common import (
    check_floating,
    check_probability,
    check_shape,
    compute_dtype,
    dtype_of,
    needs_grad,
    raw,
    register,
    seed_for,
)

_SCHEMA = (
    "(Tensor input_ids, Tensor word_embeddings, Tensor? position_ids, Tensor? position_embeddings, Tensor?"
    " token_type_ids, Tensor? token_type_embeddings, Tensor? weight, Tensor? bias, float eps, int padding_idx, float"
    " dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor input_ids, Tensor word_embeddings, Tensor? position_ids, Tensor? position_embeddings,"
    " Tensor? token_type_ids, Tensor? token_type_embeddings, Tensor? weight, Tensor mean, Tensor rstd, int padding_idx,"
    " float dropout_p, Tensor? seed, bool need_word, bool need_position, bool need_token_type)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_OUT_OF_RANGE = "index out of range"


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
    """``dropout(layer_norm(word + token type + position))``, each row looked up in its table (Devlin et al. 2019).

    The gradient of a table is dense, as that of ``torch.nn.functional.embedding``: the rows that were looked up get the
    sum of their gradients in the order of input_ids, whatever the number of threads, all others 0. Of the forward only
    the statistics of the rows are kept: the backward looks the rows up again.

    Args:
        input_ids: (...) int64 or int32, rows of word_embeddings.
        word_embeddings: (V, E); float32, bfloat16, float16 or float64; any strides.
        position_ids, token_type_ids: integers of a shape that broadcasts to input_ids', such as (S,) beside (B, S);
            rows of position_embeddings and token_type_embeddings, (P, E) and (T, E) in word_embeddings' dtype. Either
            pair may be left out.
        weight, bias, eps: of the layer-norm, (E,), as in :func:`layer_norm`.
        padding_idx: the row of word_embeddings that gets no gradient.
        dropout_p: probability that an element is dropped; always on where > 0. The mask is that of
            :mod:`fastformer.reference` for the rows of the output.

    Returns:
        (..., E) in word_embeddings' dtype.

    Raises:
        IndexError: an index that its table has no row for (in a compiled graph it is a RuntimeError).
        TypeError: ids that are no integers, tables that are not floating or of different dtypes.
        ValueError: a shape, padding_idx or probability that does not fit, ids without a table or a table without ids.
    """
    tables = {
        "word_embeddings": (input_ids, word_embeddings),
        "position_embeddings": (position_ids, position_embeddings),
        "token_type_embeddings": (token_type_ids, token_type_embeddings),
    }
    check_floating(**{name: table for name, (_, table) in tables.items()})
    check_floating(one_dtype=False, word_embeddings=word_embeddings, weight=weight, bias=bias)
    for name, (ids, table) in tables.items():
        _check_table(name, table, ids, word_embeddings)
    columns = word_embeddings.shape[1:]
    check_shape("weight", weight, columns, "the embeddings' width")
    check_shape("bias", bias, columns, "the embeddings' width")
    check_probability(dropout_p=dropout_p)
    position_ids = _broadcast("position_ids", position_ids, input_ids.shape)
    token_type_ids = _broadcast("token_type_ids", token_type_ids, input_ids.shape)
    words = word_embeddings.shape[0]
    if padding_idx is not None and not -words <= padding_idx < words:
        raise ValueError(f"padding_idx: expected a row of word_embeddings' {words}, got {padding_idx}")

    operands = word_embeddings, position_embeddings, token_type_embeddings, weight, bias
    backend = backends.choose("embeddings", *operands, options=(dropout_p > 0,))
    lookups = input_ids, word_embeddings, position_ids, position_embeddings, token_type_ids, token_type_embeddings
    if backend == "torch":
        return reference.embeddings(*lookups, weight, bias, eps, padding_idx=padding_idx, dropout_p=dropout_p)
    lookups = [x.long() if x is not None and x.dtype == torch.int32 else x for x in lookups]
    without = -1 if padding_idx is None else padding_idx % words
    arguments = (*lookups, weight, bias, eps, without, dropout_p, seed_for(dropout_p, word_embeddings))
    if needs_grad(*operands):
        return looked_up(torch.ops.fastformer.embeddings, *arguments, backend)
    return looked_up(raw(backend).embeddings, *arguments)


def looked_up(op: Callable, *arguments) -> Tensor:
    """The op's output; its error as torch has it."""
    try:
        return op(*arguments)[0]
    except RuntimeError as error:  # the only one that the library can raise
        if _OUT_OF_RANGE not in str(error):
            raise
        raise IndexError(str(error)) from None


def _check_table(name: str, table: Tensor | None, ids: Tensor | None, word_embeddings: Tensor) -> None:
    ids_name = "input_ids" if name == "word_embeddings" else name.replace("embeddings", "ids")
    if (table is None) != (ids is None):
        raise ValueError(f"{ids_name}, {name}: expected both or neither, got {name if ids is None else ids_name} alone")
    if table is None:
        return
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{ids_name}: expected an int64 or int32 Tensor, got {kind}")
    if ids.device != table.device:
        raise ValueError(f"{ids_name}: expected on {table.device} as {name} is, got {ids.device}")
    if table.dim() != 2 or table.shape[1] != word_embeddings.shape[-1]:
        wanted = "(rows, width)" if table is word_embeddings else f"(rows, {word_embeddings.shape[-1]})"
        raise ValueError(f"{name}: expected {wanted}, got {tuple(table.shape)}")


def _broadcast(name: str, ids: Tensor | None, shape: torch.Size) -> Tensor | None:
    if ids is None or ids.shape == shape:
        return ids
    try:
        return ids.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to input_ids' {tuple(shape)}, got {tuple(ids.shape)}"
        ) from None


def _fake(
    input_ids, word_embeddings, position_ids, position_embeddings, token_type_ids, token_type_embeddings, weight, bias,
    eps, padding_idx, dropout_p, seed,
):  # fmt: skip
    output = word_embeddings.new_empty(*input_ids.shape, word_embeddings.shape[1])
    mean = output.new_empty(input_ids.numel(), dtype=compute_dtype(output.dtype))
    return output, mean, torch.empty_like(mean)


def _fake_backward(
    grad_output, input_ids, word_embeddings, position_ids, position_embeddings, token_type_ids, token_type_embeddings,
    weight, mean, rstd, padding_idx, dropout_p, seed, need_word, need_position, need_token_type,
):  # fmt: skip
    tables = word_embeddings, position_embeddings, token_type_embeddings
    needs = need_word, need_position, need_token_type
    grads = [
        word_embeddings.new_empty(table.shape if need and table is not None else (0,))
        for table, need in zip(tables, needs, strict=True)
    ]
    grad_weight = mean.new_empty(word_embeddings.shape[1])
    return *grads, grad_weight, torch.empty_like(grad_weight)


def _setup_context(ctx, inputs, output):
    *lookups, weight, bias, _, ctx.padding_idx, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.dtypes = dtype_of(weight), dtype_of(bias)
    ctx.save_for_backward(*lookups, weight, *output[1:], seed)


def _backward(ctx, grad_output, *grads_of_what_is_saved):
    *tensors, seed = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (1, 3, 5)]
    *grads, grad_weight, grad_bias = raw(ctx.backend).embeddings_backward(
        grad_output, *tensors, ctx.padding_idx, ctx.dropout_p, seed, *needs
    )
    word, position, token_type = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    vectors = (
        None if dtype is None else g.to(dtype) for g, dtype in zip((grad_weight, grad_bias), ctx.dtypes, strict=True)
    )
    return None, word, None, position, None, token_type, *vectors, *(None,) * 4


register("embeddings", _SCHEMA, _BACKWARD_SCHEMA, _fake, _setup_context, _backward, _fake_backward)
