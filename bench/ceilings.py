"""What the device can do at most, measured: bytes a second in a copy, operations a second in large matrix products."""

import contextlib
from collections.abc import Iterator

import torch

from fastformer.cli.measure import time_on

PRODUCTS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}


def measure(device: torch.device, tiny: bool) -> dict[str, float]:
    """ "bytes_per_s", and operations a second by what is multiplied: the best of the runs."""
    seconds, size = (0.0, 64) if tiny else (1.0, 8192)
    found = {"bytes_per_s": copied(device, 2**10 if tiny else 2**30, seconds)}
    for name, dtype in PRODUCTS.items():
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        with tf32(name == "tf32"):
            timing = time_on(device, {name: lambda a=a, b=b: a @ b}, seconds)[name]
        found[name] = 2 * size**3 / min(timing.samples)
    return found


def copied(device: torch.device, size: int, seconds: float) -> float:
    """Bytes a second, read and written."""
    source = torch.empty(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timing = time_on(device, {"copy": lambda: target.copy_(source)}, seconds)["copy"]
    return 2 * size / min(timing.samples)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
