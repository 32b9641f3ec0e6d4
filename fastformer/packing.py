"""Weights in the layout that the CPU kernels read, made at the first inference and kept beside the module of theirs.

They are no part of the module's state: state_dict, pickle and deepcopy do not see them; `.to()`, `load_state_dict` and
`train()` drop them. They hold as long as nothing says that something changed:

- the modules inside are the same, and without hooks;
- each parameter's address and version counter, which every edit but those through `.data` moves on;
- the number of optimizer steps in this process, because fused optimizers move no version counter;
- the instruction set in use, which sets the layout;
- samples of each matrix, compared bit for bit at every call: they catch edits of whole matrices through `.data`, such
  as a merged LoRA.

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
    """The packed weights of one module, and all that they depend on.

    Args:
        module: whose fused forward they are for.
        children: the modules inside that this forward does not call: where each stands (a module's `_modules`, a name).
        groups: matrices (out_features, in_features) of one dtype, parameters of the module or of these children; those
            of a group have the same input and are laid out one after the other, as one matrix.
        weights: "int8", "bfloat16", or None for the values as they are: those of 16 bits in their dtype, others in the
            dtype that they are computed in.
    """

    __slots__ = ("panels", "children", "dtype", "in_features", "_places", "_stamps", "matrices", "_steps", "_isa")

    def __init__(
        self,
        module: nn.Module,
        children: Sequence[tuple[dict, str]],
        groups: Sequence[Sequence[Tensor]],
        weights: str | None,
    ):
        self._steps = _steps
        self._isa = _raw.isa()
        self._places = [(modules, name, modules[name], modules[name].__class__) for modules, name in children]
        self.children = [child for _, _, child, _ in self._places]
        self._stamps = [
            (owner._parameters, name, parameter, *_state(parameter))
            for owner in (module, *self.children)
            for name, parameter in owner._parameters.items()
        ]
        self.matrices = [[matrix.detach() for matrix in group] for group in groups]
        self.panels = [_pack(g[0] if len(g) == 1 else torch.cat(g), weights) for g in self.matrices]
        self.dtype, self.in_features = (groups[0][0].dtype, groups[0][0].shape[1]) if groups else (None, None)

    @property
    def bytes(self) -> int:
        return sum(panels.nbytes for panels in self.panels)

    @property
    def float_bytes(self) -> int:
        """What the same matrices take where they are packed as they are: in float32."""
        return sum(4 * matrix.numel() for group in self.matrices for matrix in group)

    def hold(self) -> bool:
        """Are all modules, parameters and values what they were? Asked at every call: in some microseconds."""
        return hold((self,))


def hold(packs: Sequence[Packed]) -> bool:
    """Does each of them hold?"""
    isa = _raw.isa()
    for packed in packs:
        if packed._steps != _steps or packed._isa != isa:
            return False
        for modules, name, child, cls in packed._places:
            if modules.get(name) is not child or child.__class__ is not cls or child.training:
                return False
            if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
                return False
            if "forward" in child.__dict__:
                return False
        for parameters, name, parameter, address, version in packed._stamps:
            if parameters.get(name) is not parameter:
                return False
            if address is not None and parameter.data_ptr() != address:
                return False
            if version is not None and parameter._version != version:
                return False
    groups = [group for packed in packs for group in packed.matrices]
    panels = [panels for packed in packs for panels in packed.panels]
    weights = [matrix for group in groups for matrix in group]
    return not panels or _raw.is_packed(weights, list(map(len, groups)), panels)


def lay_together(packs: Sequence[Packed]) -> None:
    """Moves their panels into one block of memory, in order: it is read from end to end, in huge pages where the system
    has them. Each panel's old memory is free as soon as it is copied."""
    size = sum(-panels.nbytes // 64 * -64 for packed in packs for panels in packed.panels)
    block, offset = torch.empty(size, dtype=torch.uint8), 0
    _raw.use_huge_pages(block)
    for packed in packs:
        for i, panels in enumerate(packed.panels):
            place = block[offset : offset + panels.nbytes].view(panels.dtype).view(panels.shape)
            packed.panels[i] = place.copy_(panels)
            offset += -panels.nbytes // 64 * -64


def _pack(matrix: Tensor, weights: str | None) -> Tensor:
    if weights == "int8":
        return _raw.quantize_weight(matrix)
    dtype = torch.bfloat16 if weights == "bfloat16" else matrix.dtype
    return _raw.pack_weight(matrix, dtype if dtype.itemsize == 2 else None)


def _state(parameter: nn.Parameter | None) -> tuple[int | None, int | None]:
    """Address and version counter; inference tensors have no counter."""
    if parameter is None:
        return None, None
    return parameter.data_ptr(), None if parameter.is_inference() else parameter._version


def is_hooked(module: nn.Module) -> bool:
    """Would a call of the module do more, or other, than its class's forward?"""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def why_not_packed() -> str | None:
    """Why weights are not packed in this process, or None."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and hasattr(fsdp, "FSDPModule") and fsdp.FSDPModule.__subclasses__():
        return "FSDP2 frees a weight after each use: packing would keep it"
    return None


_PLACE = "_fastformer_packed"  # in the module's __dict__


def kept(module: nn.Module):
    """What was kept beside the module: its Packed, of a model of layers their Stack; or None."""
    return module.__dict__.get(_PLACE)


def keep(module: nn.Module, packed):
    module.__dict__[_PLACE] = packed
    return packed


def drop(module: nn.Module) -> None:
    module.__dict__.pop(_PLACE, None)


def without_packed(state: dict) -> dict:
    """A module's __dict__ as pickle and deepcopy may see it."""
    return {name: value for name, value in state.items() if name != _PLACE}
