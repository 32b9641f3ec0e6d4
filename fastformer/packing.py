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

import itertools
import operator
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


class Facts:
    """What has to stay as it is of many modules, asked before every token of a GPT: by loops in C, not in Python."""

    def __init__(self):
        self._steps, self._isa = _steps, _raw.isa()
        self._hooks: list[dict] = []
        self._states: list[dict] = []  # of modules: their __dict__
        self._owners, self._names, self._values, self._types = [], [], [], []
        self._addressed, self._addresses = [], []
        self._counted, self._versions = [], []  # inference tensors have no counter
        self._settings: tuple[list[dict], list[str], list] = [], [], []

    def plain(self, module: nn.Module) -> None:
        """In eval mode, without hooks."""
        self._hooks += _hooks(module)
        self._states.append(module.__dict__)

    def same(self, owner: dict, name: str) -> None:
        """The object of this name, and its class."""
        for kept, new in zip(
            (self._owners, self._names, self._values, self._types),
            (owner, name, owner[name], type(owner[name])),
            strict=True,
        ):
            kept.append(new)

    def parameter(self, owner: dict, name: str) -> None:
        """The same one, not edited."""
        self.same(owner, name)
        parameter = owner[name]
        if parameter is not None:
            self._addressed.append(parameter)
            self._addresses.append(parameter.data_ptr())
            if not parameter.is_inference():
                self._counted.append(parameter)
                self._versions.append(parameter._version)

    def setting(self, module: nn.Module, name: str) -> None:
        """An equal attribute, or none."""
        for kept, new in zip(self._settings, (module.__dict__, name, module.__dict__.get(name)), strict=True):
            kept.append(new)

    def add(self, others: Facts) -> None:
        for name, kept in vars(others).items():
            if isinstance(kept, list):
                getattr(self, name).extend(kept)

    def hold(self) -> bool:
        where, names, values = self._settings
        return (
            self._steps == _steps
            and self._isa == _raw.isa()
            and not any(self._hooks)
            and not any(map(operator.contains, self._states, itertools.repeat("forward")))
            and not any(map(dict.get, self._states, itertools.repeat("training")))
            and all(map(operator.is_, map(dict.get, self._owners, self._names), self._values))
            and list(map(type, self._values)) == self._types
            and list(map(Tensor.data_ptr, self._addressed)) == self._addresses
            and [parameter._version for parameter in self._counted] == self._versions
            and list(map(dict.get, where, names)) == values
        )


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

    __slots__ = ("panels", "children", "dtype", "in_features", "matrices", "facts")

    def __init__(
        self,
        module: nn.Module,
        children: Sequence[tuple[dict, str]],
        groups: Sequence[Sequence[Tensor]],
        weights: str | None,
    ):
        self.children = [modules[name] for modules, name in children]
        self.facts = Facts()
        for modules, name in children:
            self.facts.same(modules, name)
            self.facts.plain(modules[name])
        for owner in (module, *self.children):
            for name in owner._parameters:
                self.facts.parameter(owner._parameters, name)
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
        return self.facts.hold() and agree((self,))


def agree(packs: Sequence[Packed]) -> bool:
    """Are samples of the matrices still what was packed?"""
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


def _hooks(module: nn.Module) -> tuple[dict, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def is_hooked(module: nn.Module) -> bool:
    """Would a call of the module do more, or other, than its class's forward?"""
    return any(_hooks(module)) or "forward" in module.__dict__


def why_not_packed() -> str | None:
    """Why weights are not packed in this process, or None."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and hasattr(fsdp, "FSDPModule") and fsdp.FSDPModule.__subclasses__():
        return "FSDP2 frees a weight after each use: packing would keep it"
    return None


PLACE = "_fastformer_packed"  # in the module's __dict__


def kept(module: nn.Module):
    """What was kept beside the module: its Packed, of a model of layers their Stack; or None."""
    return module.__dict__.get(PLACE)


def keep(module: nn.Module, packed):
    module.__dict__[PLACE] = packed
    return packed


def drop(module: nn.Module) -> None:
    module.__dict__.pop(PLACE, None)


def without_packed(state: dict) -> dict:
    """A module's __dict__ as pickle and deepcopy may see it."""
    return {name: value for name, value in state.items() if name != PLACE}
