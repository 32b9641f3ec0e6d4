"""Batches without their padding, in inference and in training: the real tokens of all sequences, laid end to end on the
way into an encoder, take their places on the way out, where padding is 0."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastformer import backends, ops
from fastformer.integrations.fused import Fused, Path, _is_transformed

_raw = torch.ops.fastformer_cpu


class Tokens:
    """The real tokens of a padded batch, end to end: one sequence after the other, in both layouts of the batch."""

    def __init__(self, kept: Tensor, batch_first: bool = True):
        """kept: (B, S), False at padding."""
        lengths, (sequence, position) = kept.sum(1), kept.nonzero(as_tuple=True)
        batch, length = kept.shape
        # (tokens,), the row of each in (B S, E) or (S B, E)
        self.rows = sequence * length + position if batch_first else position * batch + sequence
        self.cu_seq = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        self.longest = int(lengths.max())

    def gather(self, x: Tensor) -> Tensor:
        """(1, tokens, E) of x, (B, S, E) or (S, B, E)"""
        return x.flatten(0, 1).index_select(0, self.rows)[None]

    def scatter(self, x: Tensor, shape: torch.Size) -> Tensor:
        """x (1, tokens, E) in its places in a batch of this shape, 0 at padding"""
        return x.new_zeros(shape).flatten(0, 1).index_copy_(0, self.rows, x[0]).view(shape)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, path: Path, dropout_p: float, scale: float | None = None
    ) -> Tensor:
        """(1, tokens, E) of query, key and value (1, H, tokens, D): each sequence attends to itself."""
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, H, D)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        bounds = self.cu_seq, self.cu_seq, self.longest, self.longest
        if path is Path.PACKED:
            context = _raw.varlen_attn(query, key, value, *bounds, 0.0, None, scale, -1, -1)[0]
        else:
            context = ops.varlen_attn(query, key, value, *bounds, scale=scale, dropout_p=dropout_p)
        return context.flatten(1)[None]


def leaves_padding_out(encoder: Fused, hidden_states: Tensor) -> bool:
    """Is this a call in which padding is left out, as far as can be told without mask and layers?

    Not on GPUs: the CPU would wait for them to know how many real tokens there are. Nor in a trace, where that number
    would become a constant.
    """
    return bool(
        encoder._fastformer_unpad
        and type(hidden_states) is Tensor
        and hidden_states.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not _is_transformed()
        and backends._requested()[0] != "torch"
    )


def is_only_wrapped(module: nn.Module) -> bool:
    """Does nobody look at what goes into a call of a module and comes out, though there are hooks or another forward?
    Those of FSDP2 gather its weights and free them, partial(torch.utils.checkpoint.checkpoint, module.forward) computes
    it again."""
    forward = module.__dict__.get("forward")
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    others = module._backward_hooks or module._backward_pre_hooks
    return (
        not others
        and (forward is None or getattr(forward, "func", None) is checkpoint)
        and all(str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp") for hook in hooks)
    )
