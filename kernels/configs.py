"""How a kernel is launched: tile sizes, warps and stages, by what it runs on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.runtime.driver import driver

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
    if TRITON_DEVICE == "cpu":
        return "interpreter"
    current = driver.active.get_current_target()
    return f"sm_{current.arch}" if current.backend == "cuda" else current.arch


def float32_precision() -> str:
    """How ``tl.dot`` multiplies float32, as asked for by ``torch.set_float32_matmul_precision``.

    "highest" (torch's default) is "ieee": fused multiply-adds of float32. Otherwise "tf32x3", three products on tensor
    cores with 22 of 24 bits, where the target has them.
    """
    exact = torch.get_float32_matmul_precision() == "highest" or not target().startswith("sm_")
    return "ieee" if exact else "tf32x3"
