"""The compiled library of CUDA C++ kernels, loaded once, when this module is first imported.

It loads in every torch >= 2.10, also one without CUDA, where it can only tell its schemas. FASTFORMER_CUDA_LIBRARY
names another file in its place: tests run the same kernels on CPU tensors (docs/sim.md).
"""

import os
from pathlib import Path

import torch

from fastformer.library import load

_problem = load(
    Path(os.environ.get("FASTFORMER_CUDA_LIBRARY") or Path(__file__).with_name("libfastformer_cuda.so")),
    Path(__file__).with_name("cuda_library_not_built.txt"),
    "run `make build-cuda`, or install fastformer with FASTFORMER_CUDA=1",
)


def available() -> bool:
    return _problem is None


def why_unavailable() -> str | None:
    """What is wrong with the library and what to do about it, or None when it is loaded."""
    return _problem


def device_type() -> str:
    """Of the tensors that its ops take: "cuda", but for the build that runs the kernels on the CPU for tests."""
    return torch.ops.fastformer_cuda.device_type() if available() else "cuda"
