"""How a kernel is launched: tile sizes, warps and stages, by what it runs on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from fastformer import tuning
from fastformer.backends import TRITON_DEVICE


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel."""

    tiles: dict[str, int]  # constexpr arguments by name: BLOCK_M, ...
    num_warps: int = 4
    num_stages: int = 2

    def arguments(self) -> dict[str, int | bool]:
        launch = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return {**self.tiles, **launch}


def target() -> str:
    """What the kernels are compiled for: "sm_90", "gfx942", or "interpreter"."""
    return "interpreter" if TRITON_DEVICE == "cpu" else _target(driver.active, torch.cuda.current_device())


@functools.cache
def _target(driver: DriverBase, device: int) -> str:
    """Of the current device: each is asked once, as AMD's answer takes its time."""
    current = driver.get_current_target()
    return f"sm_{current.arch}" if current.backend == "cuda" else current.arch


def float32_precision() -> str:
    """How ``tl.dot`` multiplies float32, as asked for by ``torch.set_float32_matmul_precision``.

    "highest" (torch's default) is "ieee": fused multiply-adds of float32. Otherwise "tf32x3", three products on tensor
    cores with 22 of 24 bits, where the target has them.
    """
    exact = torch.get_float32_matmul_precision() == "highest" or not target().startswith("sm_")
    return "ieee" if exact else "tf32x3"


# Bytes of shared memory that one program may have (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability": 1 KiB of each multiprocessor's is the system's; AMD: the LDS of a work-group).
_SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_87": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_103": 227 * 1024,
    "gfx950": 160 * 1024,
}


def shared_memory(target: str) -> int:
    """Bytes that one program may have; of a target that is not known, what the smallest of its kind has."""
    return _SHARED_MEMORY.get(target, 64 * 1024 if target.startswith("gfx") else 99 * 1024)


def pick(kernel: str, candidates: Sequence[Config], **key: Hashable) -> Config:
    """The candidate that `fastformer tune` found to be the fastest on this device, else the first one.

    Nothing is measured here, and nothing left out: that is for `fastformer tune`, where Triton refuses a candidate that
    needs more shared memory than the GPU has.

    Args:
        kernel: its name.
        candidates: the best guess first; they may depend on the target and on `key`, and on nothing else.
        key: what of the call matters to the choice, all small sets: dtype, padded head size, width bucket, flags; no
            sequence length.
    """
    call = (None if TRITON_DEVICE == "cpu" else torch.cuda.current_device(), kernel, *key.items())
    if _trial is not None:
        return _trial.pick(kernel, candidates, key)
    config = _picked.get(call)
    if config is None:
        config = _picked[call] = _recorded(kernel, candidates, key)
    return config


_picked: dict[tuple, Config] = {}  # by device, kernel and key, for as long as the process runs


def _recorded(kernel: str, candidates: Sequence[Config], key: dict[str, Hashable]) -> Config:
    if tuning.table is None or TRITON_DEVICE == "cpu":
        return candidates[0]
    fields = tuning.table.config(torch.device("cuda", torch.cuda.current_device()), kernel, key)
    return next((config for config in candidates if dataclasses.asdict(config) == fields), candidates[0])


class Trial:
    """Which configs the calls inside a `trial` pick, and which they shall pick instead of the first."""

    def __init__(self) -> None:
        self.candidates: dict[str, Sequence[Config]] = {}  # by `tuning.config_key`, of every pick
        self.chosen: dict[str, Config] = {}

    def pick(self, kernel: str, candidates: Sequence[Config], key: dict[str, Hashable]) -> Config:
        name = tuning.config_key(kernel, key)
        self.candidates[name] = candidates
        return self.chosen.get(name, candidates[0])


_trial: Trial | None = None  # of all threads: a backward runs in one of autograd's


@contextlib.contextmanager
def trial() -> Iterator[Trial]:
    """For `fastformer tune`: inside, picks are noted, and decided by `Trial.chosen` and not by the tuned table."""
    global _trial
    previous, _trial = _trial, Trial()
    try:
        yield _trial
    finally:
        _trial = previous
