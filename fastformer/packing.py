"""Weights in the layout that the CPU kernels read, made at the first inference and kept beside the module that uses them.

They are no part of the module's state: state_dict, pickle and deepcopy do not see them; `.to()`, `load_state_dict` and
`train()` drop them. They hold for the very parameters that they were made from, as long as nothing says that a value changed:

- each parameter's address and version counter, which every edit but those through `.data` moves on;
- the number of optimizer steps in this process, because fused optimizers move no version counter;
- the instruction set in use, which sets the layout;
- samples of each matrix, compared bit for bit at every call: they catch edits of whole matrices through `.data`, such as a
  merged LoRA.

What none of these sees is an edit of a few elements through `.data`: `fastformer.repack(model)` is for that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_raw = torch.ops.fastformer_cpu
_steps = 0


def _count_step(optimizer, args, kwargs) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class Packed:
    """The packed weights of one module.

    Args:
        parameters: all that the module's fused forward reads: they are watched.
        groups: matrices (out_features, in_features) of one dtype; those of a group have the same input and are laid out one
            after the other, as one matrix.
    """

    __slots__ = ("panels", "dtype", "in_features", "_matrices", "_stamps", "_steps", "_isa")

    def __init__(self, parameters: Sequence[nn.Parameter | None], groups: Sequence[Sequence[Tensor]]):
        self._stamps = [None if p is None else (p, p.data_ptr(), _version(p)) for p in parameters]
        self._steps = _steps
        self._isa = _raw.isa()
        self._matrices = [[matrix.detach() for matrix in group] for group in groups]
        self.panels = [_raw.pack_weight(g[0] if len(g) == 1 else torch.cat(g)) for g in self._matrices]
        self.dtype, self.in_features = (groups[0][0].dtype, groups[0][0].shape[1]) if groups else (None, None)

    def holds_for(self, parameters: Sequence[nn.Parameter | None]) -> bool:
        if self._steps != _steps or self._isa != _raw.isa() or len(parameters) != len(self._stamps):
            return False
        for parameter, stamp in zip(parameters, self._stamps, strict=True):
            if stamp is None:
                if parameter is not None:
                    return False
            elif parameter is not stamp[0] or parameter.data_ptr() != stamp[1] or _version(parameter) != stamp[2]:
                return False
        return all(map(_raw.is_packed, self._matrices, self.panels))


def _version(parameter: nn.Parameter) -> int:
    return -1 if parameter.is_inference() else parameter._version  # inference tensors count no versions


def why_not_packed() -> str | None:
    """Why weights are not packed in this process, or None."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and hasattr(fsdp, "FSDPModule") and fsdp.FSDPModule.__subclasses__():
        return "FSDP2 frees a weight after each use: packing would keep it"
    return None


_PLACE = "_fastformer_packed"  # in the module's __dict__


def kept(module: nn.Module) -> Packed | None:
    return module.__dict__.get(_PLACE)


def keep(module: nn.Module, packed: Packed) -> Packed:
    module.__dict__[_PLACE] = packed
    return packed


def drop(module: nn.Module) -> None:
    module.__dict__.pop(_PLACE, None)


def without_packed(state: dict) -> dict:
    """A module's __dict__ as pickle and deepcopy may see it."""
    return {name: value for name, value in state.items() if name != _PLACE}
