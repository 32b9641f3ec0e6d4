"""The compiled op library, loaded once, when this module is first imported.

Without it fastformer still works on the other backends; `why_unavailable` says what is missing and what to do.
"""

import os
from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("libfastformer_cpu.so")
_NOT_BUILT = Path(__file__).with_name("library_not_built.txt")  # written by setup.py
_ISAS = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_amx")


def _load() -> str | None:
    """Registers the ops with torch; returns None, or why that can't be done."""
    if not _LIBRARY.exists():
        if _NOT_BUILT.exists():
            return _NOT_BUILT.read_text().strip()
        return f"{_LIBRARY} is not built: run `python setup.py build_ext --inplace`, or `pip install .`"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"torch {torch.__version__} (fastformer takes >= 2.10) can't load the library; build it again: {error}"
    return None


_problem = _load()


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
