"""All layers of an encoder or a decoder in one op, where each of them would run on packed weights anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastformer import backends, packing
from fastformer.integrations.fused import Fused, Path

_raw = torch.ops.fastformer_cpu


class Settings(NamedTuple):
    """What all layers of a stack share, beside their shapes."""

    heads: int
    activation: str
    scale: float
    eps: float


class StackedLayer(Fused):
    """A layer of which a stack can be made."""

    def members(self) -> tuple[nn.Module, ...]:
        """The swapped modules inside, and the layer. Their packed weights, one after the other, are those of query, key
        and value, of the projection, and the two of the feed-forward network."""
        raise NotImplementedError

    def containers(self) -> tuple[nn.Module, ...]:
        """The other modules that the stack does not call."""
        return ()

    def vectors(self) -> tuple[Tensor | None, ...]:
        """The ten vectors of raw op packed_layers."""
        raise NotImplementedError

    def settings(self) -> Settings | None:
        """None where the op has no place for what the layer does."""
        raise NotImplementedError


class Stack:
    """The packed weights of all layers, and all that they depend on. It holds as long as those of each layer do."""

    bytes = float_bytes = 0  # the layers have them

    def __init__(self, layers: Sequence[StackedLayer], members: list[Fused], packs: list[packing.Packed]):
        self.layers, self.members, self.packs = layers, members, packs
        self.watched = [*layers, *members, *(c for layer in layers for c in layer.containers())]
        # Of those with one class and one config, one answers for all whether something stops it.
        self.asked = list({(type(m), id(getattr(m, "config", None))): m for m in members}.values())
        self.settings = layers[0].settings()
        matrices = [group[0] for packed in packs[: len(layers[0].members())] for group in packed.matrices]
        self.hidden_features = matrices[2].shape[0]  # after query, key and value, and the projection
        self.panels = [panels for packed in packs for panels in packed.panels]
        self.is_together = False
        none = packs[0].panels[0].new_empty(0)
        self.vectors = [none if v is None else v.detach() for layer in layers for v in layer.vectors()]

    def holds(self, is_watched) -> bool:
        if any(map(is_watched, self.watched)):
            return False
        for member, packed in zip(self.members, self.packs, strict=True):
            if packing.kept(member) is not packed or member.training:
                return False
        if any(member.own_obstacles(member) for member in self.asked):
            return False
        return packing.hold(self.packs) and all(layer.settings() == self.settings for layer in self.layers)

    def run(
        self,
        x: Tensor,
        *,
        final_norm: nn.LayerNorm | None = None,
        is_causal: bool = False,
        mask: Tensor | None = None,
        cu_seq: Tensor | None = None,
        longest: int = 0,
        caches: Sequence[tuple[Tensor, Tensor]] = (),
        past: int = 0,
    ) -> Tensor:
        """The last hidden states, (B, S, E), of x (B, S, E): see csrc/ops.cpp. A final_norm means that each layer
        normalizes its input, not its output."""
        if past and not self.is_together:  # tokens will come one by one, and wait for the weights
            packing.lay_together(self.packs)
            self.panels, self.is_together = [panels for packed in self.packs for panels in packed.panels], True
        s = self.settings
        weight, bias = (final_norm.weight, final_norm.bias) if final_norm is not None else (None, None)
        keys, values = [key for key, _ in caches], [value for _, value in caches]
        return _raw.packed_layers(
            x, self.panels, self.vectors, weight, bias, final_norm is not None, is_causal, s.heads,
            self.hidden_features, s.activation, s.scale, s.eps, mask, cu_seq, longest, keys, values, past,
        )  # fmt: skip


def infers_eagerly() -> bool:
    """Is this a call that could run on packed weights?"""
    wanted = backends._requested()[0] != "torch"
    return wanted and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def stack_of(model: Fused, layers: nn.ModuleList, x: Tensor, is_watched=packing.is_hooked) -> Stack | None:
    """The stack for a call with hidden states x (B, S, E); None where the layers have to be called one by one."""
    if model.training:
        packing.drop(model)
        return None
    if not infers_eagerly() or len(layers) == 0 or not model._infers(x, backends._requested()[0]):
        return None
    stack = packing.kept(model)
    if stack is None or not _same(stack.layers, layers) or not stack.holds(is_watched):
        packing.drop(model)
        stack = _make(layers, x, is_watched)
        if stack is not None:
            packing.keep(model, stack)
    if stack is None or x.dtype != stack.packs[0].dtype or x.shape[-1] != stack.packs[0].in_features:
        return None
    return stack


def _same(kept: Sequence[nn.Module], now: nn.ModuleList) -> bool:
    return len(kept) == len(now) and all(map(lambda a, b: a is b, kept, now))


def _make(layers: nn.ModuleList, x: Tensor, is_watched) -> Stack | None:
    if not all(isinstance(layer, StackedLayer) for layer in layers):
        return None
    members = [member for layer in layers for member in layer.members()]
    if not all(isinstance(member, Fused) for member in members):
        return None
    packs = []
    for member in members:
        path, packed = (Path.STOCK, None) if is_watched(member) else member.choose(x)
        if path is not Path.PACKED:
            return None
        packs.append(packed)
    settings = {layer.settings() for layer in layers}
    if len(settings) > 1 or None in settings:
        return None
    shapes = [[matrix.shape for group in packed.matrices for matrix in group] for packed in packs]
    each = len(packs) // len(layers)
    if shapes != shapes[:each] * len(layers):
        return None
    stack = Stack(list(layers), members, packs)
    return stack if stack.holds(is_watched) else None
