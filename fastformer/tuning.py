"""The tuned table: what `fastformer tune` measured to be fastest on this machine, kept in one file per user.

JSON, at FASTFORMER_TUNED or else $XDG_CACHE_HOME/fastformer/tuned.json (~/.cache where that is unset). By the name of a
device it has two maps: "backends", from a class of op calls to the backend that won, and "configs", from a Triton
kernel and its key to the `kernels.configs.Config` that won. What is not in it runs as by default. A table of other
versions of fastformer, torch or triton is not used, which is said once. It is read when fastformer is imported.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastformer import library
from fastformer.version import __version__


def path() -> Path:
    if chosen := os.environ.get("FASTFORMER_TUNED"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastformer" / "tuned.json"


def versions() -> dict[str, str]:
    """What a table must have been measured with."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {"fastformer": __version__, "torch": torch.__version__, "triton": triton}


def device_name(device: torch.device) -> str:
    """As the table has it: the GPU's name, or the CPU's with the instruction set that the kernels use."""
    if device.type == "cuda":
        return _gpu_name(torch.cuda.current_device() if device.index is None else device.index)
    return f"{cpu_name()}, {library.isa() if library.available() else 'no kernels'}"


@functools.cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


@dataclass
class Table:
    """What is known of every device: name -> {"backends": {...}, "configs": {...}}."""

    devices: dict[str, dict[str, dict[str, Any]]]
    _backends: dict[tuple, str | None] = field(default_factory=dict)  # of calls that were looked up before

    def backend(self, op: str, tensors: tuple[Tensor | None, ...], options: tuple[Hashable, ...]) -> str | None:
        """The backend that won for calls of this class, or None if none was measured."""
        key = call_class(op, tensors, options)
        where = (tensors[0].device, *key)
        if where not in self._backends:
            found = self.devices.get(device_name(tensors[0].device), {}).get("backends", {})
            self._backends[where] = found.get(key_text(*key))
        return self._backends[where]

    def config(self, device: torch.device, kernel: str, key: dict[str, Hashable]) -> dict[str, Any] | None:
        """The `Config` that won, as fields; or None."""
        return self.devices.get(device_name(device), {}).get("configs", {}).get(config_key(kernel, key))


def call_class(op: str, tensors: tuple[Tensor | None, ...], options: tuple[Hashable, ...] = ()) -> tuple[Hashable, ...]:
    """Calls of one class are taken to have the same fastest backend.

    Numbers of rows and of keys count by the power of two at or below them; widths, head sizes and weights as they are.
    `tensors` and `options` as in `backends.choose`.
    """
    x, y = tensors[0], tensors[1]
    width = x.shape[-1]
    rows = _bucket(x.numel() // max(width, 1))
    if op == "scaled_dot_product_attention":
        other = _bucket(y.shape[-2])
    elif op in ("linear", "feed_forward", "linear_cross_entropy"):
        other = y.shape[0]
    else:
        other = 0
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    threads = torch.get_num_threads() if x.device.type == "cpu" else 0
    return op, x.dtype, rows, width, other, training, threads, *options


def _bucket(size: int) -> int:
    return 1 << size.bit_length() - 1 if size > 0 else 0


def key_text(*parts: Hashable) -> str:
    return " ".join(str(part).removeprefix("torch.") for part in parts)


def config_key(kernel: str, key: dict[str, Hashable]) -> str:
    return key_text(kernel, *(f"{name}={str(value).removeprefix('torch.')}" for name, value in key.items()))


def _read() -> tuple[Table | None, str | None]:
    """The table in use, or why the file is not used; neither where there is none."""
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
        devices, measured_with = content["devices"], content["versions"]
        if not all(isinstance(maps[name], dict) for maps in devices.values() for name in ("backends", "configs")):
            raise ValueError("a device lacks its maps")
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return None, f"it can't be read: {type(error).__name__}: {error}"
    if measured_with != versions():
        changed = (
            f"{name} {measured_with.get(name)}" for name, now in versions().items() if measured_with.get(name) != now
        )
        return None, f"it was measured with {', '.join(changed)}"
    return Table(devices), None


def reload() -> None:
    """Reads the file again."""
    global table, problem
    table, problem = _read()
    if problem:
        warnings.warn(f"{path()} is not used: {problem}. Run `fastformer tune` to measure anew", stacklevel=2)


def record(device: torch.device, backends: dict[str, str], configs: dict[str, dict[str, Any]]) -> None:
    """Adds what was measured on a device, and puts it to use. The file is replaced at once, never seen half written.

    Raises OSError where it can't be written.
    """
    devices = _read()[0]
    devices = devices.devices if devices else {}
    maps = devices.setdefault(device_name(device), {"backends": {}, "configs": {}})
    maps["backends"].update(backends)
    maps["configs"].update(configs)
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".json", encoding="utf-8", delete=False) as file:
        json.dump({"versions": versions(), "devices": devices}, file, indent=1)
    os.replace(file.name, target)
    reload()


table: Table | None = None
problem: str | None = None  # why the file is not used
reload()
