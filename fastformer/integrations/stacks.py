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

    def read(self) -> tuple[tuple[nn.Module, str], ...]:
        """The attributes of modules that settings() looks at, beside the modules themselves."""
        raise NotImplementedError


class Stack:
    """The packed weights of all layers and of a tail, and all that they depend on. It holds as long as each of theirs.

    The tail: nothing; a layer-norm, if layers normalize their input and not their output; or such a layer-norm and
    a linear, which a call may leave out.
    """

    bytes = float_bytes = 0  # the layers have them

    def __init__(
        self, layers: Sequence[StackedLayer], tail: Sequence[Fused], members: list[Fused], packs: list[packing.Packed]
    ):
        self.layers, self.tail, self.members, self.packs = layers, tail, members, packs
        self.watched = [*layers, *members, *(c for layer in layers for c in layer.containers())]
        self.facts = packing.Facts()
        for module in self.watched:
            self.facts.plain(module)
        for member, packed in zip(members, packs, strict=True):
            self.facts.same(member.__dict__, packing.PLACE)
            self.facts.add(packed.facts)
        for module, name in (read for layer in layers for read in layer.read()):
            self.facts.setting(module, name)
        for norm in tail[:1]:
            self.facts.setting(norm, "eps")
        # Of those with one class and one config, one answers for all whether something stops it.
        self.asked = list({(type(m), id(getattr(m, "config", None))): m for m in members}.values())
        self.settings = layers[0].settings()
        matrices = [group[0] for packed in packs[: len(layers[0].members())] for group in packed.matrices]
        self.hidden_features = matrices[2].shape[0]  # after query, key and value, and the projection
        self._take_panels()
        self.is_together = False
        none = packs[0].panels[0].new_empty(0)
        self.vectors = [none if v is None else v.detach() for layer in layers for v in layer.vectors()]

    def _take_panels(self) -> None:
        count = len(self.packs) - len(self.tail)
        self.panels = [panels for packed in self.packs[:count] for panels in packed.panels]
        self.head_panels = self.packs[-1].panels[0] if len(self.tail) == 2 else None

    def holds(self, is_watched) -> bool:
        if not self.facts.hold() and not self.fits(is_watched):
            return False
        return not any(member.own_obstacles(member) for member in self.asked) and packing.agree(self.packs)

    def fits(self, is_watched) -> bool:
        """Can the op do what the modules do? For a new stack; or if the facts are others: a hook may sleep."""
        if any(map(is_watched, self.watched)):
            return False
        for member, packed in zip(self.members, self.packs, strict=True):
            if packing.kept(member) is not packed or member.training or not packed.facts.hold():
                return False
        if self.tail and self.tail[0].eps != self.settings.eps:
            return False
        return all(layer.settings() == self.settings for layer in self.layers)

    def run(
        self,
        x: Tensor,
        *,
        keep: int = 0,
        is_causal: bool = False,
        mask: Tensor | None = None,
        cu_seq: Tensor | None = None,
        longest: int = 0,
        caches: Sequence[tuple[Tensor, Tensor]] = (),
        past: int = 0,
    ) -> Tensor:
        """The last hidden states, (B, S, E), of x (B, S, E), or what the tail's linear makes of the last `keep` of each
        sequence: see csrc/ops.cpp."""
        if past and not self.is_together:  # tokens will come one by one, and wait for the weights
            packing.lay_together(self.packs)
            self._take_panels()
            self.is_together = True
        s = self.settings
        norm = self.tail[0]._parameters if self.tail else {"weight": None, "bias": None}
        head, head_bias, vocabulary = None, None, 0
        if keep:
            head, head_bias = self.head_panels, self.tail[1]._parameters["bias"]
            vocabulary = self.tail[1]._parameters["weight"].shape[0]
        keys, values = [key for key, _ in caches], [value for _, value in caches]
        return _raw.packed_layers(
            x, self.panels, self.vectors, norm["weight"], norm["bias"], head, head_bias, vocabulary, keep,
            bool(self.tail), is_causal, s.heads, self.hidden_features, s.activation, s.scale, s.eps, mask, cu_seq,
            longest, keys, values, past,
        )  # fmt: skip


def infers_eagerly() -> bool:
    """Is this a call that could run on packed weights?"""
    wanted = backends._requested()[0] != "torch"
    return wanted and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def stack_of(
    model: Fused, layers: nn.ModuleList, x: Tensor, is_watched=packing.is_hooked, tail: Sequence[nn.Module] = ()
) -> Stack | None:
    """The stack for a call with hidden states x (B, S, E) and such a tail; None where the modules have to be called one
    by one."""
    if model.training:
        packing.drop(model)
        return None
    if not infers_eagerly() or len(layers) == 0 or not model._infers(x, backends._requested()[0]):
        return None
    stack = packing.kept(model)
    is_known = stack is not None and _same(stack.layers, layers) and _same(stack.tail[: len(tail)], tail)
    if not is_known or not stack.holds(is_watched):
        made = _make(layers, tail, x, is_watched)
        if made is not None:
            packing.keep(model, made)
        elif is_known:  # else it serves other calls
            packing.drop(model)
        stack = made
    if stack is None or x.dtype != stack.packs[0].dtype or x.shape[-1] != stack.packs[0].in_features:
        return None
    return stack


def _same(kept: Sequence[nn.Module], now: Sequence[nn.Module]) -> bool:
    return len(kept) == len(now) and all(map(lambda a, b: a is b, kept, now))


def _make(layers: nn.ModuleList, tail: Sequence[nn.Module], x: Tensor, is_watched) -> Stack | None:
    if not all(isinstance(layer, StackedLayer) for layer in layers):
        return None
    members = [*(member for layer in layers for member in layer.members()), *tail]
    if not all(isinstance(member, Fused) for member in members):
        return None
    packs = []
    for member in reversed(members):
        path, packed = (Path.STOCK, None) if is_watched(member) else member.choose(x)
        if path is not Path.PACKED:
            return None
        packs.insert(0, packed)
    settings = {layer.settings() for layer in layers}
    if len(settings) > 1 or None in settings:
        return None
    shapes = [[matrix.shape for group in packed.matrices for matrix in group] for packed in packs[: -len(tail) or None]]
    each = len(shapes) // len(layers)
    if shapes != shapes[:each] * len(layers):
        return None
    stack = Stack(list(layers), tail, members, packs)
    return stack if stack.fits(is_watched) and stack.holds(is_watched) else None
