"""How the class of a module is swapped, and how each call of a swapped module finds its path.

A module's class is set to a subclass of its stock class with the same name: state_dict, hooks, isinstance, gradient
checkpointing, `_no_split_modules` find what they know. The subclass has a fused forward that reads the parameters of
the modules inside in place of calling them. So it looks at every call whether those are still as plain as they have to
be (`survey`), and runs the stock forward where one is not.
"""

from __future__ import annotations

import copy
import copyreg
import enum
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastformer import backends, library, packing
from fastformer.integrations.tensor_parallel import is_parallel, is_sharded

# The classes that a fused forward knows how to do without calling them; integrations add those of their library.
LINEARS: set[type[nn.Module]] = {nn.Linear}
TRANSPOSED: set[type[nn.Module]] = set()  # of the linears, those whose weight is (in_features, out_features)
NORMS: set[type[nn.Module]] = {nn.LayerNorm}
DROPOUTS: set[type[nn.Module]] = {nn.Dropout}
EMBEDDINGS: set[type[nn.Module]] = {nn.Embedding}
ACTIVATIONS: dict[type[nn.Module], Callable[[Any], str]] = {  # to what ops.linear calls it
    nn.GELU: lambda module: "gelu_tanh" if module.approximate == "tanh" else "gelu",
    nn.ReLU: lambda module: "relu",
    nn.SiLU: lambda module: "silu",
}

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _devices(backend: str | None) -> set[str]:
    """The device types that a backend's matrix products run on here; None for any fused backend."""
    return {
        i.device
        for i in backends.implementations()
        if i.op == "linear" and i.backend != "torch" and backend in (None, i.backend)
        if not backends.why_unavailable(i.backend)
    }


_DEVICES = {backend: _devices(backend) for backend in (None, *backends.BACKENDS)}


OPTIONS = ("_fastformer_weights", "_fastformer_unpad")  # of accelerate: what a swapped module has beside its class


class Path(enum.Enum):
    STOCK = "the stock forward"
    OPS = "the differentiable ops"
    PACKED = "the CPU's raw ops, on packed weights"


class Fused:
    """What the swapped classes share. A mixin for a stock class overrides its forward, or what that calls, and declares
    `inner`: the modules inside that it does not call, by their path, and the classes that each may have."""

    stock: ClassVar[type[nn.Module]]
    _fastformer_weights: str | None = None  # how they are packed: see packing.Packed
    _fastformer_unpad: bool = True  # may an encoder leave padding out?
    inner: ClassVar[dict[str, Collection[type[nn.Module]]]] = {}
    takes_shards: ClassVar[bool] = False  # may the linears inside be split among processes (tensor parallelism)?

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls._inner = tuple((tuple(path.split(".")), classes) for path, classes in cls.inner.items())

    @staticmethod
    def own_obstacles(module: nn.Module) -> list[str]:
        """What stops this very module, beside the modules inside."""
        return []

    def groups(self) -> list[list[Tensor]] | None:
        """The matrices to pack, see `packing.Packed`; None where the sizes inside do not fit together."""
        return []

    def choose(self, *inputs: Tensor | None) -> tuple[Path, packing.Packed | None]:
        """The path of this call and, for PACKED, the weights. `inputs`: hidden states, and what meets them."""
        backend, strict = backends._requested()
        if backend == "torch":
            return Path.STOCK, None
        x, packed = inputs[0], None
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled() and self._infers(x, backend):
            packed = packing.kept(self)
        if packed is None or self.own_obstacles(self) or not packed.hold():
            path, packed = self._choose_slowly(inputs, backend, strict)
            if path is not Path.PACKED:
                return path, None
        if packed.dtype is not None and (x.dtype != packed.dtype or x.shape[-1] != packed.in_features):
            return Path.STOCK, None  # which has its own words for what does not fit
        return Path.PACKED, packed

    def _infers(self, x: Tensor, backend: str | None) -> bool:
        """Is this call one for packed weights, as far as can be told without the parameters?"""
        return bool(
            type(x) is Tensor
            and x.is_cpu
            and backend in (None, "cpu")
            # Where the machine multiplies bfloat16, torch is faster.
            and (self._fastformer_weights or x.dtype != torch.bfloat16 or not library.multiplies_bfloat16())
            and not self.training
            and not torch.is_autocast_enabled("cpu")
            and not torch.jit.is_tracing()
            and not _is_transformed()
        )

    def _choose_slowly(self, inputs, backend: str | None, strict: bool) -> tuple[Path, packing.Packed | None]:
        """As `choose`, with nothing known from the call before."""
        x = inputs[0]
        obstacles, children = survey(self)
        if obstacles or x.device.type not in _DEVICES[backend]:
            _refuse(self, backend, strict, obstacles, x.device.type)
            return Path.STOCK, None
        if torch.compiler.is_compiling():
            return Path.OPS, None
        sharded = any(is_sharded(modules[name]._parameters.get("weight")) for modules, name in children)
        unpacked = self.training or sharded or packing.why_not_packed() is not None
        if unpacked:
            packing.drop(self)
        if _is_transformed() or (type(x) is not Tensor and not backends._is_traced(x)):
            return Path.STOCK, None
        owners = [self, *(modules[name] for modules, name in children)]
        parameters = [p for owner in owners for p in owner._parameters.values() if p is not None]
        needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, *parameters))
        if unpacked or needs_grad or not self._infers(x, backend) or any(o.training for o in owners):
            if self._fastformer_weights and not self.training:
                backends._warn_once(_NOT_NARROW.format(self._fastformer_weights))
            return Path.OPS, None
        packed = packing.kept(self)
        if packed is None or not packed.hold():
            packing.drop(self)
            packed = self._pack(children, owners, parameters)
        return (Path.STOCK, None) if packed is None else (Path.PACKED, packed)

    def _pack(self, children, owners, parameters) -> packing.Packed | None:
        """None where the CPU's raw ops can't take the parameters, for they check nothing themselves."""
        if any(not p.is_cpu or p.dtype not in _FLOATS for p in parameters) or not all(map(_sizes_fit, owners[1:])):
            return None
        groups, weights = self.groups(), self._fastformer_weights
        if groups is None or len({matrix.dtype for group in groups for matrix in group}) > 1:
            return None
        if weights and any(_narrow_obstacle(p, weights) for p in parameters):
            return None
        if weights == "int8" and any(matrix.shape[1] > _MAX_QUANTIZED_FEATURES for group in groups for matrix in group):
            return None
        return packing.keep(self, packing.Packed(self, children, groups, weights))

    def train(self, mode: bool = True):
        if mode:
            packing.drop(self)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any):
        packing.drop(self)
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        packing.drop(self)
        super()._load_from_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]):
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(packing.without_packed(self.__dict__), memo))
        return new

    def __reduce_ex__(self, protocol: int):
        """A pickle holds the stock class: it can be read where fastformer is not installed."""
        state = packing.without_packed(self.__dict__)
        for option in OPTIONS:
            state.pop(option, None)
        return copyreg._reconstructor, (self.stock, object, None), state


_NOT_NARROW = (
    "fastformer: weights in {} are for inference on CPUs without gradients (torch.no_grad or torch.inference_mode) and"
    " without autocast: this call computes with the weights as they are"
)
_MAX_QUANTIZED_FEATURES = 65536  # the sums of more products of 8 bits may not fit into 32


def _narrow_obstacle(parameter: Tensor, weights: str) -> str | None:
    if parameter.dtype == torch.float64:
        return f"{weights} takes float32, bfloat16 and float16 weights, got float64"
    return None if parameter.is_cpu else f"{weights} is for CPUs, got a weight on {parameter.device}"


def survey(module: nn.Module, fused: type[Fused] | None = None) -> tuple[list[str], list[tuple[dict, str]]]:
    """What stops a module from being run as `fused` (by default its class), and the modules inside that would not be
    called: where each stands, the `_modules` of a module and a name."""
    fused = fused or type(module)
    obstacles, children = fused.own_obstacles(module), []
    if obstacle := _parameter_obstacle(module):
        obstacles.append(obstacle)
    for path, classes in fused._inner:
        owner = module
        for name in path[:-1]:
            owner = owner._modules.get(name) if owner is not None else None
        child = owner._modules.get(path[-1]) if owner is not None else None
        if child is None:
            obstacle = "is no module"
        elif child.__class__ not in classes:
            obstacle = f"is a {child.__class__.__module__}.{child.__class__.__qualname__}"
        elif fused.takes_shards and classes is LINEARS and is_parallel(child):
            obstacle = None
        elif packing.is_hooked(child):
            obstacle = "has hooks"
        else:
            obstacle = _parameter_obstacle(child)
        if obstacle:
            obstacles.append(f"{'.'.join(path)} {obstacle}")
        else:
            children.append((owner._modules, path[-1]))
    return obstacles, children


def multiplies(cls: type[Fused]) -> bool:
    """Has it matrices of its own, or of the modules inside?"""
    return cls.stock in LINEARS or any(classes is LINEARS for _, classes in cls._inner)


def _parameter_obstacle(module: nn.Module) -> str | None:
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.__class__ is not nn.Parameter and not backends._is_traced(parameter):
            cls = type(parameter).__name__
            unless = " (unless FSDP2 gathers it for the call)" if cls == "DTensor" else ""
            return f"has a {cls} as its {name}{unless}"
    return None


def dtype_obstacles(module: nn.Module, fused: type[Fused], weights: str | None) -> list[str]:
    """Dtypes and devices that no fused backend takes. They can change: the ops look at them at each call."""
    owners = [module, *(modules[name] for modules, name in survey(module, fused)[1])]
    obstacles = []
    for parameter in (p for owner in owners for p in owner._parameters.values() if p is not None):
        if parameter.dtype not in _FLOATS:
            obstacles.append(f"no fused backend takes {parameter.dtype}")
        if parameter.device.type not in _DEVICES[None]:
            obstacles.append(f"no fused backend runs on {parameter.device.type}")
        elif weights and (obstacle := _narrow_obstacle(parameter, weights)):
            obstacles.append(obstacle)
    return list(dict.fromkeys(obstacles))


def _refuse(module: Fused, backend: str | None, strict: bool, obstacles: list[str], device: str) -> None:
    """Says why a call runs the stock forward, unless it is for what the report tells."""
    missing = device not in _DEVICES[backend]
    if missing:
        why = backend and backends.why_unavailable(backend)
        where = f"{backend} does not run on {device}" if backend else f"no fused backend runs on {device}"
        obstacles = [*obstacles, why or where]
    text = f"{type(module).__name__} runs its stock forward: {'; '.join(obstacles)}"
    if strict:
        raise NotImplementedError(f"backend {backend!r} was asked for, but {text}")
    if missing:
        backends._warn_once(f"fastformer: {text}")


def _is_transformed() -> bool:
    """Under torch.func or forward-mode differentiation, where the raw ops would drop the tangents."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _sizes_fit(child: nn.Module) -> bool:
    parameters = child._parameters
    if child.__class__ in LINEARS:
        return parameters["bias"] is None or parameters["bias"].shape == weight_of(child).shape[:1]
    if child.__class__ in NORMS:
        return len(child.normalized_shape) == 1 and all(
            p is None or p.shape == child.normalized_shape for p in parameters.values()
        )
    return True


def weight_of(linear: nn.Module) -> Tensor:
    """(out_features, in_features)"""
    weight = linear._parameters["weight"]
    return weight.t() if linear.__class__ in TRANSPOSED else weight


def activation_of(module: nn.Module) -> str:
    return ACTIVATIONS[module.__class__](module)


def dropout_p(module: nn.Dropout) -> float:
    return module.p if module.training else 0.0


# What integrations know. Classes that are swapped wherever they are, but for the layer-norms that another one takes
# along; classes such as nn.Linear, which are swapped only under a name inside of one class; classes that are not
# swapped, with the reason; subclasses of swapped classes that run on fused ops themselves.
SWAPS: dict[type[nn.Module], type[Fused]] = {}
CHILDREN: dict[tuple[type[nn.Module], str], type[Fused]] = {}
UNSUPPORTED: dict[type[nn.Module], str] = {}
FUSED_ALREADY: set[type[nn.Module]] = set()
# Models that hold all positions of a sequence against each other, padding too: they keep it.
LOOKS_AT_PADDING: set[type[nn.Module]] = set()


def fuse(stock: type[nn.Module], mixin: type[Fused]) -> type[Fused]:
    """The fused class of a stock class, which has its name."""
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (mixin, stock), {**names, "stock": stock})
