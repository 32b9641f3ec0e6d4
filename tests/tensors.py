"""Random tensors in every memory layout that a view can have."""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BACKEND = os.environ.get("FASTFORMER_BACKEND", "cpu")  # whose kernels are tested: see docs/verification.md
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (*FLOATS, torch.float64) if BACKEND == "cpu" else FLOATS
LAYOUTS = ("transposed", "columns", "rows", "wider rows", "broadcast rows", "broadcast columns", "unaligned", "flipped")


def at_scale(size: int) -> int:
    """The size, or the tenth part where kernels run in an interpreter, whose tiles are a few rows."""
    return size // 10 if INTERPRETED else size


def randn(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    """Normal numbers (or bools); a layout other than contiguous wants two dimensions or more."""

    def base(*sizes: int) -> Tensor:
        return torch.randn(sizes) < 0.5 if dtype == torch.bool else torch.randn(sizes).to(dtype)

    if layout == "contiguous":
        return base(*shape)
    *leading, rows, columns = shape
    match layout:
        case "transposed":
            return base(*leading, columns, rows).mT
        case "columns":  # every second
            return base(*leading, rows, 2 * columns)[..., ::2]
        case "rows":  # every second
            return base(*leading, 2 * rows, columns)[..., ::2, :]
        case "wider rows":
            return base(*leading, rows, columns + 3)[..., 1 : columns + 1]
        case "broadcast rows":
            return base(*leading, 1, columns).expand(shape)
        case "broadcast columns":
            return base(*leading, rows, 1).expand(shape)
        case "unaligned":
            return base(torch.Size(shape).numel() + 1)[1:].view(shape)
        case "flipped":  # dimensions in memory from the last to the first
            return base(*reversed(shape)).permute(*reversed(range(len(shape))))
    raise ValueError(layout)


FAR = 2**31 + 64  # elements, of a row from the next


def far_apart(x: Tensor, dim: int, folder: Path) -> Tensor:
    """A copy whose `dim` has a stride of at least FAR, in a sparse file."""
    strides = [FAR if d == dim else math.prod(x.shape[d + 1 :]) for d in range(x.dim())]
    size = 1 + sum((length - 1) * stride for length, stride in zip(x.shape, strides, strict=True))
    file = torch.from_file(str(folder / "sparse"), shared=True, size=size, dtype=x.dtype)
    return file.as_strided(x.shape, strides).copy_(x)
