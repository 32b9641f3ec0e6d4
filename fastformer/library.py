"""The compiled op library, loaded once, when this module is first imported.

Without it fastformer still works on the other backends; `why_unavailable` says what is missing and what to do.
"""

import os
from pathlib import Path

import torch

_ISAS = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_amx")


def load(file: Path, not_built: Path, how: str) -> str | None:
    """Registers the ops of a library with torch; returns None, or why that can't be done.

    not_built: setup.py's note in place of the library; how: what builds it.
    """
    if not file.exists():
        return not_built.read_text().strip() if not_built.exists() else f"{file} is not built: {how}"
    try:
        torch.ops.load_library(file)
    except OSError as error:
        return f"torch {torch.__version__} (fastformer takes >= 2.10) can't load {file.name}; build it again: {error}"
    return None


_problem = load(
    Path(__file__).with_name("libfastformer_cpu.so"),
    Path(__file__).with_name("library_not_built.txt"),
    "run `python setup.py build_ext --inplace`, or `pip install .`",
)


def available() -> bool:
    return _problem is None


def why_unavailable() -> str | None:
    """What is wrong with the library and what to install, or None when it is loaded."""
    return _problem


def isas() -> list[str]:
    """The instruction sets of the library that this machine can run, the plainest first.

    Those above avx512 differ from it in their 8-bit products only.
    """
    return torch.ops.fastformer_cpu.isas().split(",") if available() else []


def isa() -> str:
    """The instruction set that the kernels use; FASTFORMER_ISA in the environment asks for a lower one."""
    return torch.ops.fastformer_cpu.isa()


def multiplies_int8() -> bool:
    """Are there instructions for 8-bit products (AVX-512 VNNI, AMX) in the set that the kernels use?"""
    return available() and isa() in ("avx512_vnni", "avx512_amx")


def multiplies_bfloat16() -> bool:
    """Has this machine instructions for bfloat16 products (AVX512-BF16, AMX)? The kernels compute in float32."""
    return available() and torch.ops.fastformer_cpu.multiplies_bfloat16()


def _check_isa_choice() -> None:
    choice = os.environ.get("FASTFORMER_ISA")
    if not choice:
        return
    if choice not in _ISAS:
        raise ValueError(f"FASTFORMER_ISA: got {choice!r}, expected one of {', '.join(_ISAS)}")
    if available() and choice not in isas():
        raise ValueError(f"FASTFORMER_ISA: got {choice!r}, but this machine runs only {', '.join(isas())}")


_check_isa_choice()
