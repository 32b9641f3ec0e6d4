"""Hugging Face checkpoint folders, read and written: config.json and safetensors, never a pickle."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Constants that some versions of transformers saved among the weights.
BUFFERS = re.compile(r"\.(position_ids|token_type_ids|attn\.bias|attn\.masked_bias)$")

Config = TypeVar("Config", bound="PretrainedConfig")
Model = TypeVar("Model", bound="PretrainedModel")


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
    """The fields of a config.json that a model reads, under the names that transformers gives them."""

    model_type: ClassVar[str]
    only_supported: ClassVar[dict[str, Any]] = {}  # fields of config.json that may have no other value

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """Reads a parsed config.json; fields that say nothing about the arithmetic are passed over.

        Raises:
            ValueError: it describes another model_type.
            NotImplementedError: it asks for something that the model here does not do.
        """
        if values.get("model_type") != cls.model_type:
            raise ValueError(f"{CONFIG}: model_type must be {cls.model_type!r}, got {values.get('model_type')!r}")
        for name, supported in cls.only_supported.items():
            if values.get(name) not in (None, supported):
                raise NotImplementedError(f"{CONFIG}: {name}={values[name]!r} is not supported, only {supported!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": self.model_type, **dataclasses.asdict(self)}


class PretrainedModel(nn.Module):
    """A model that `from_pretrained` reads from a checkpoint folder and `save_pretrained` writes to one.

    A base model (BertModel) is saved under its own names, a model with a head (BertForMaskedLM) holds the base
    model in the attribute `base_model_prefix` ("bert.encoder..."). Either is read into either.
    """

    config_class: ClassVar[type[PretrainedConfig]]
    architecture: ClassVar[str]  # the class in transformers, as config.json names it
    base_model_prefix: ClassVar[str]
    optional: ClassVar[tuple[str, ...]] = ()  # parts of the base model that count as a head: may be absent
    transposed: ClassVar[tuple[str, ...]] = ()  # endings of the weights that a checkpoint stores as (in, out)
    tied: ClassVar[dict[str, str]] = {}  # second name of a parameter -> the name that a checkpoint stores

    def __init__(self, config: PretrainedConfig):
        if not isinstance(config, self.config_class):
            raise TypeError(f"config must be a {self.config_class.__name__}, got {type(config).__name__}")
        super().__init__()
        self.config = config

    def tie_weights(self) -> None:
        for alias, source in self.tied.items():
            owner, _, name = alias.rpartition(".")
            setattr(self.get_submodule(owner), name, self.get_parameter(source))

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | Path, **overrides: Any) -> Model:
        """The model of a checkpoint folder, in evaluation mode, in torch's default dtype and on its default device.

        Args:
            folder: holds config.json and model.safetensors, or model.safetensors.index.json and its shards.
            overrides: fields of the config to use in place of the folder's, such as `num_labels`.

        A head that the checkpoint does not have is initialised anew, with a warning that names its weights;
        a head that only the checkpoint has is passed over.

        Raises:
            FileNotFoundError: no such folder, or no config.json or safetensors file in it.
            ValueError: a file that cannot be read, weights that are pickled, of another shape, missing or unknown.
            NotImplementedError: config.json asks for something that the model here does not do.
        """
        folder = Path(folder)
        config = cls.config_class.from_dict(read_config(folder))
        if "num_labels" in overrides:
            overrides.setdefault("id2label", None)
        config = dataclasses.replace(config, **overrides)
        with torch.device("meta"):  # names and shapes alone: no time goes into random weights
            model = cls(config)
        state, missing = model._match(read_tensors(folder), folder)
        if missing:
            warnings.warn(f"{folder}: newly initialised, as not in the checkpoint: {_listed(missing)}", stacklevel=2)
            model = cls(config)
        else:
            model.to_empty(device=torch.get_default_device())
            model.tie_weights()
        model.load_state_dict(state, strict=False)
        return model.eval()

    def _match(self, tensors: dict[str, Tensor], folder: Path) -> tuple[dict[str, Tensor], list[str]]:
        """The checkpoint's tensors under this model's names, and the weights of a head that it does not have."""
        base = f"{self.base_model_prefix}."
        base_model = getattr(self, self.base_model_prefix, self)
        own = base if base_model is self else ""  # completes this model's names to those of a model with a head
        parts = {name for name, _ in base_model.named_children()}
        wanted = {own + name: weight for name, weight in self.state_dict().items() if name not in self.tied}

        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            if BUFFERS.search(name):
                continue
            if name.partition(".")[0] in parts:
                name = base + name
            found[name] = tensor.t() if name.endswith(self.transposed) else tensor
        for alias, source in self.tied.items():
            if alias in found:
                tensor = found.pop(alias)
                if not torch.equal(found.setdefault(source, tensor), tensor):
                    raise ValueError(f"{folder}: {alias} must equal {source}, to which it is tied, but differs")

        def in_head(name: str) -> bool:
            return not name.startswith(base) or name.startswith(self.optional)

        missing = sorted(wanted.keys() - found.keys())
        if absent := [name for name in missing if not in_head(name)]:
            raise ValueError(f"{folder}: the checkpoint lacks weights of {self.architecture}: {_listed(absent)}")
        if unknown := sorted(name for name in found.keys() - wanted.keys() if not in_head(name)):
            raise ValueError(f"{folder}: {self.architecture} with this {CONFIG} has no {_listed(unknown)}")
        for name in wanted.keys() & found.keys():
            if found[name].shape != wanted[name].shape:
                got, want = tuple(found[name].shape), tuple(wanted[name].shape)
                raise ValueError(f"{folder}: {name} must have shape {want} with this config, got {got}")
            if not found[name].is_floating_point():
                raise ValueError(f"{folder}: {name} must be floating point, got {found[name].dtype}")
        return {name.removeprefix(own): found[name] for name in wanted.keys() & found.keys()}, missing

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors as the transformers class `architecture` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: (weight.t() if name.endswith(self.transposed) else weight).contiguous()
            for name, weight in self.state_dict().items()
            if name not in self.tied
        }
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = {"architectures": [self.architecture], **self.config.to_dict()}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}: checkpoints are read from disk, nothing is downloaded")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no {CONFIG}")
    return _read_json(folder / CONFIG)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder, on the CPU, under the names in the file."""
    if (folder / WEIGHTS).is_file():
        files = {WEIGHTS}
    elif (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / INDEX} must have a weight_map from tensor names to files")
        files = set(weight_map.values())
    elif any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} has its weights only in pickled .bin files, which can run code when they are read and so are "
            f"never loaded. If you trust them, convert them once: in transformers, "
            f"AutoModel.from_pretrained(folder).save_pretrained(folder) writes {WEIGHTS}"
        )
    else:
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    tensors: dict[str, Tensor] = {}
    for name in sorted(files):
        if Path(name).name != name:
            raise ValueError(f"{folder / INDEX} must name files of its own folder, got {name!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, which its {INDEX} names")
        try:
            tensors.update(load_file(folder / name))
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is not a whole safetensors file: {error}") from error
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
