"""accelerate, restore, report, repack: the fused layers into a model, and out again."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from fastformer import integrations, library, packing
from fastformer.integrations import fused
from fastformer.integrations.fused import LOOKS_AT_PADDING, Fused

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Row:
    """A module that can be fused, or a kind of module that can't."""

    name: str  # its path in the model, "" for the model itself
    module: str  # its class
    swapped: bool
    reasons: tuple[str, ...]  # why it runs its stock forward: it was left, or something inside has changed since
    weights: str | None = None  # "int8" or "bfloat16" where its inference computes with such weights
    packed_bytes: int = 0  # of packed weights, made by its first inference
    float_bytes: int = 0  # what they would take in float32

    @property
    def fused(self) -> bool:
        return self.swapped and not self.reasons


@dataclass(frozen=True)
class Report:
    """What was swapped and what was left, module by module; `str()` is a table, equal layers in one line."""

    rows: tuple[Row, ...]

    @property
    def fused(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.fused)

    @property
    def left(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.fused)

    def __str__(self) -> str:
        lines = [(name, row.module, _state(row)) for name, row in _grouped(self.rows)]
        if not lines:
            return "nothing in this model can be fused"
        widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
        table = [f"{name:{widths[0]}}  {module:{widths[1]}}  {state}" for name, module, state in lines]
        total = f"{len(self.fused)} of {len(self.rows)} modules fused"
        packed, floats = (sum(getattr(row, name) for row in self.rows) for name in ("packed_bytes", "float_bytes"))
        if packed:
            total += f", {packed / 1e6:,.0f} MB of packed weights"
        if any(row.weights and row.packed_bytes for row in self.rows):
            total += f", {(floats - packed) / 1e6:,.0f} MB less than in float32"
        return "\n".join([*table, total])


def _state(row: Row) -> str:
    if row.fused:
        return f"fused, {row.weights}" if row.weights else "fused"
    return "stock: " + "; ".join(row.reasons or ("not accelerated",))


def accelerate(
    model: Model, *, quantize: str | None = None, weights: str | None = None, unpad: bool = True, strict: bool = False
) -> Model:
    """Runs the attention, feed-forward and layer-norm layers of a transformer on fused kernels, in place.

    The classes of the layers are swapped for subclasses with the same names; parameters, config and state_dict stay as
    they are, and checkpoints, hooks, generate and Trainer work as before. At each call a layer runs

    - the differentiable ops of :mod:`fastformer.ops` where gradients are needed, in training, and under autocast;
    - else, on CPUs, the same on weights that are packed at the first such call (:mod:`fastformer.packing`). They are
      kept beside the layers and take as much memory again as the weights of the layers and of a language-model head;
    - its stock forward under ``fastformer.backend("torch")``, and where a module inside is no longer what it was: of
      another class (LoRA), with a hook.

    A deepcopy of the model is accelerated too; a pickle of it holds the stock classes. To accelerate twice is to do it
    once. Wrap with FSDP2 afterwards, which gives the layers classes of its own.

    Args:
        model: of transformers (BERT, GPT-2) or of fastformer.models, or any module that has inside such models, or
            torch.nn's TransformerEncoder, TransformerEncoderLayer, TransformerDecoderLayer, MultiheadAttention (called
            with need_weights=False) or LayerNorm.
        quantize: "int8" computes the matrix products of inference on CPUs in 8 bits: each output feature of a weight
            and each row of an activation, or 768 features of it, with a scale of its own, exact sums of 32 bits, all
            else in float. The results are close to those of the float model, not the same: look at your metric. The
            weights stay as they are, beside an 8-bit copy, and serve where gradients are needed, in training, and under
            autocast. None: nothing is quantized.
        weights: "bfloat16" keeps the packed weights of inference on CPUs in 16 bits, rounded to bfloat16, and computes
            in the dtype of the model: for a float32 model half the memory, and more speed where few tokens wait for the
            weights, as in generation. The weights stay as they are beside them. None: they are packed in
            the model's dtype.
        unpad: on CPUs an encoder computes the real tokens of a padded batch only, in inference and in training; its
            last hidden states are 0 at padding, where the stock model has numbers without a meaning: a loss or a mean
            that looks at them changes (models for question answering, a softmax over all positions, keep them). Of
            dropout, the mask of the attention stays that of the padded batch (where padding is behind the tokens), that
            of rows is drawn for the real tokens. The batch is computed as it is where hooks on layers
            (those of FSDP2 in BERT are none of them), output_hidden_states or output_attentions look inside, with
            torch.compile, and on GPUs, where finding the tokens would make the CPU wait.
        strict: raise if any layer would be left on its stock forward.

    Returns:
        The model.

    Raises:
        ValueError: nothing in the model is known, an unknown `quantize` or `weights`, or both of them.
        NotImplementedError: strict, and a layer would be left (it gives every reason, and nothing is swapped); or a
            version of transformers that is too old.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize: expected None or 'int8', got {quantize!r}")
    if weights not in (None, "bfloat16"):
        raise ValueError(f"weights: expected None or 'bfloat16', got {weights!r}")
    if quantize and weights:
        raise ValueError(f"weights: expected None beside quantize={quantize!r}, got {weights!r}")
    candidates = _candidates(model)
    if not candidates:
        raise ValueError(
            f"model: {type(model).__name__} has no layer that fastformer knows; it takes {integrations.SUPPORTED}"
        )
    if quantize and library.available() and not library.multiplies_int8():
        warnings.warn(
            f"fastformer.accelerate(quantize={quantize!r}): the {library.isa()} kernels have no instructions for 8-bit"
            " products (AVX-512 VNNI): inference takes less memory than in float32, but more time",
            stacklevel=2,
        )
    weights = quantize or weights
    rows = [_row(candidate, weights) for candidate in candidates]
    left = [row for row in rows if row.reasons]
    if strict and left:
        raise NotImplementedError(f"strict: some layers would be left on their stock forward\n{Report(tuple(left))}")
    if len(left) == len(rows):
        reasons = dict.fromkeys(reason for row in left for reason in row.reasons)
        warnings.warn(f"fastformer.accelerate swapped nothing: {'; '.join(reasons)}", stacklevel=2)
    keeps_padding = {inside for m in model.modules() if type(m) in LOOKS_AT_PADDING for inside in m.modules()}
    for candidate, row in zip(candidates, rows, strict=True):
        if not row.swapped and not row.reasons:
            candidate.module.__class__ = candidate.cls
        if isinstance(candidate.module, Fused):
            if candidate.module._fastformer_weights != weights:
                packing.drop(candidate.module)
                candidate.module._fastformer_weights = weights
            candidate.module._fastformer_unpad = unpad and candidate.module not in keeps_padding
    return model


def restore(model: Model) -> Model:
    """Gives every layer its stock class back, and drops the packed weights; parameters stay as they are.

    Returns:
        The model.

    Raises:
        RuntimeError: another library, such as FSDP2, has given a layer a class of its own since; nothing is restored.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Fused)]
    for name, module in layers:
        if "stock" not in type(module).__dict__:
            cls = type(module).__name__
            raise RuntimeError(f"model: {name} has become a {cls} since: restore a model before fully_shard")
    for _, module in layers:
        packing.drop(module)
        for option in fused.OPTIONS:
            module.__dict__.pop(option, None)
        module.__class__ = module.stock
    return model


def report(model: nn.Module) -> Report:
    """What of a model is fused, what is not, and why."""
    return Report(tuple(_row(c, getattr(c.module, "_fastformer_weights", None)) for c in _candidates(model)))


def repack(model: nn.Module) -> None:
    """Drops the packed weights of a model; its next inference packs them anew.

    To be called after single elements of a weight were edited through `.data`, or in place under inference_mode:
    nothing else goes unnoticed.
    """
    for module in model.modules():
        packing.drop(module)


@dataclass(frozen=True)
class _Candidate:
    name: str
    module: nn.Module
    cls: type[Fused] | None  # what it is swapped for
    reason: str | None = None  # why there is no cls


def _candidates(model: nn.Module) -> list[_Candidate]:
    integrations.load()
    found, done = [], set()  # modules that come with another one
    for name, module in model.named_modules():
        if module in done:
            continue
        if candidate := _candidate(name, module):
            found.append(candidate)
            done.update(_norms_inside(candidate))
        for (owner, child_name), cls in fused.CHILDREN.items():
            child = module._modules.get(child_name)
            if isinstance(module, owner) and child is not None and not isinstance(child, Fused):
                done.add(child)
                name_of_child = f"{name}.{child_name}".lstrip(".")
                if type(child) is cls.stock:
                    found.append(_Candidate(name_of_child, child, cls))
                else:
                    found.append(_Candidate(name_of_child, child, None, _foreign(child, cls.stock)))
    return found


def _norms_inside(candidate: _Candidate) -> Iterator[nn.Module]:
    """The layer-norms that its fused forward takes along, and that are not swapped themselves."""
    for path, classes in candidate.cls.inner.items() if candidate.cls else ():
        if classes is fused.NORMS:
            with contextlib.suppress(AttributeError):
                norm = candidate.module.get_submodule(path)
                if not isinstance(norm, Fused):
                    yield norm


def _candidate(name: str, module: nn.Module) -> _Candidate | None:
    if isinstance(module, Fused):
        return _Candidate(name, module, type(module))
    if type(module) in fused.SWAPS:
        return _Candidate(name, module, fused.SWAPS[type(module)])
    for stock, reason in fused.UNSUPPORTED.items():
        if isinstance(module, stock):
            return _Candidate(name, module, None, reason)
    for stock in fused.SWAPS:
        if isinstance(module, stock) and type(module) not in fused.FUSED_ALREADY:
            return _Candidate(name, module, None, _foreign(module, stock))
    return None


def _foreign(module: nn.Module, stock: type[nn.Module]) -> str:
    cls = type(module)
    advice = " (accelerate before fully_shard)" if cls.__name__.startswith("FSDP") else ""
    return f"is a {cls.__module__}.{cls.__qualname__}, not a {stock.__name__}{advice}"


def _row(candidate: _Candidate, weights: str | None) -> Row:
    module, cls = candidate.module, candidate.cls
    if cls is None:
        reasons = [candidate.reason]
    elif not library.available():
        reasons = [library.why_unavailable()]
    else:
        reasons = fused.survey(module, cls)[0] + fused.dtype_obstacles(module, cls, weights)
    packed = packing.kept(module)
    sizes = (packed.bytes, packed.float_bytes) if packed else (0, 0)
    weights = weights if cls and fused.multiplies(cls) else None
    return Row(candidate.name, type(module).__name__, isinstance(module, Fused), tuple(reasons), weights, *sizes)


def _grouped(rows: tuple[Row, ...]) -> Iterator[tuple[str, Row]]:
    """One row of each kind, under a name with the range of the layers that it stands for: encoder.layer.0-11.output"""
    groups: dict[tuple, list[tuple[int, Row]]] = {}
    for row in rows:
        number = re.search(r"(?<=\.)\d+(?=\.|$)", row.name)
        pattern = row.name if number is None else row.name[: number.start()] + "*" + row.name[number.end() :]
        key = pattern, row.module, row.fused, row.reasons, row.weights
        groups.setdefault(key, []).append((int(number.group()) if number else 0, row))
    for (pattern, *_), members in groups.items():
        yield pattern.replace("*", _ranges([number for number, _ in members])) or "(the model)", members[0][1]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5" """
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
