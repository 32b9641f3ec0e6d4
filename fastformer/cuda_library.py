"""The compiled library of CUDA C++ kernels, loaded once, when this module is first imported.

It loads in every torch >= 2.10, also one without CUDA, where it can only tell its schemas. FASTFORMER_CUDA_LIBRARY
names another file in its place: tests run the same kernels on CPU tensors (docs/sim.md).
"""

import os
from pathlib import Path

import torch

_LIBRARY = Path(os.environ.get("FASTFORMER_CUDA_LIBRARY") or Path(__file__).with_name("libfastformer_cuda.so"))
_NOT_BUILT = Path(__file__).with_name("cuda_library_not_built.txt")  # written by setup.py


def _load() -> str | None:
    """Registers the ops with torch; returns None, or why that can't be done."""
    if not _LIBRARY.exists():
        if _NOT_BUILT.exists():
            return _NOT_BUILT.read_text().strip()
        return f"{_LIBRARY.name} is not built: run `make build-cuda`, or install fastformer with FASTFORMER_CUDA=1"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"torch {torch.__version__} (fastformer takes >= 2.10) can't load {_LIBRARY}; build it again: {error}"
    return None


_problem = _load()


def available() -> bool:
    return _problem is None


def why_unavailable() -> str | None:
    """What is wrong with the library and what to do about it, or None when it is loaded."""
    return _problem


def device_type() -> str:
    """Of the tensors that its ops take: "cuda", but for the build that runs the kernels on the CPU for tests."""
    return torch.ops.fastformer_cuda.device_type() if available() else "cuda"
