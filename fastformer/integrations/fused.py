"""How a module's class is swapped, and how each call of a swapped module chooses its path.

`swap` sets a module's class to a subclass of its stock class with the same name, so that state_dict, hooks, isinstance,
gradient checkpointing and `_no_split_modules` find what they know. The subclass has a fused forward, which reads the
parameters of the modules inside in place of calling them. So it asks at every call whether these are still what they were
(`Fused.survey`), and runs the stock forward where one of them is not.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastformer import backends, packing

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FUSED = [i for i in backends.implementations() if i.op == "linear" and i.backend != "torch"]


class Path(enum.Enum):
    STOCK = enum.auto()  # the stock forward
    OPS = enum.auto()  # the differentiable ops
    PACKED = enum.auto()  # the raw ops on packed weights


# What may stand inside a fused module: exactly these classes. Integrations add those of their library.
LINEARS: set[type[nn.Module]] = {nn.Linear}
TRANSPOSED: set[type[nn.Module]] = set()  # of the linears, those whose weight is (in_features, out_features)
NORMS = {nn.LayerNorm}
DROPOUTS = {nn.Dropout}
ACTIVATIONS: dict[type[nn.Module], Callable[[Any], str | None]] = {
    nn.GELU: lambda module: {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate],
    nn.ReLU: lambda module: "relu",
    nn.SiLU: lambda module: "silu",
}


def activation_name(module: nn.Module) -> str:
    """What ops.linear calls this activation."""
    return ACTIVATIONS[type(module)](module)


def dropout_p(module: nn.Dropout) -> float:
    return module.p if module.training else 0.0


def weight_of(linear: nn.Module) -> Tensor:
    """(out_features, in_features)"""
    weight = linear._parameters["weight"]
    return weight.t() if linear.__class__ in TRANSPOSED else weight


class Fused:
    """Mixed into the classes that modules are swapped to. A mixin overrides the stock forward, or what it calls, and says:

    inner: the modules inside that the fused forward does not call, by their paths, and the classes that they may have.
    groups: the matrices to pack, see `packing.Packed`.
    """

    stock: ClassVar[type[nn.Module]]
    inner: ClassVar[dict[str, Any]] = {}
    _paths: ClassVar[tuple[tuple[tuple[str, ...], Any], ...]] = ()

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls._paths = tuple((tuple(path.split(".")), kinds) for path, kinds in cls.inner.items())

    @classmethod
    def own_obstacles(cls, module: nn.Module) -> list[str]:
        """What else stops this very module from being fused."""
        return []

    def groups(self) -> list[list[Tensor]]:
        return []

    def choose(self, *inputs: Tensor | None) -> tuple[Path, Sequence[Tensor]]:
        """The path of this call and, for PACKED, the packed weights. `inputs`: the hidden states, then other tensors."""
        backend, strict = backends._requested()
        if backend == "torch":
            return Path.STOCK, ()
        x = inputs[0]
        obstacles, parameters = survey(self)
        if obstacles or not _available(backend, x):
            _refuse(self, backend, strict, obstacles, x)
            return Path.STOCK, ()
        if torch.compiler.is_compiling() or (type(x) is not Tensor and backends._is_traced(x)):
            return Path.OPS, ()
        if type(x) is not Tensor or _is_transformed():
            return Path.STOCK, ()
        if self.training:
            packing.drop(self)
            return Path.OPS, ()
        if (
            (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, *parameters)))
            or torch.is_autocast_enabled(x.device.type)
            or x.device.type != "cpu"
            or torch.jit.is_tracing()
            or self._drops()
        ):
            return Path.OPS, ()
        packed = packing.kept(self)
        if packed is None or not packed.holds_for(parameters):
            packing.drop(self)
            if packing.why_not_packed() is not None:
                return Path.OPS, ()
            if not all(p is None or (p.device == x.device and p.dtype in _FLOATS) for p in parameters):
                return Path.STOCK, ()
            packed = packing.keep(self, packing.Packed(parameters, self.groups()))
        return Path.PACKED, packed.panels
