"""Error against float64, time and memory of contenders that compute the same thing."""

import ctypes
import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

Forward = Callable[[], torch.Tensor]


LEAST_COSINE = 0.995  # of a quantized model's outputs with those of the exact one


@dataclass(frozen=True)
class Accuracy:
    """Largest absolute errors against a float64 reference, and the largest that the fused one may have."""

    eager: float
    fused: float
    allowed: float  # twice the eager error, plus one unit in the last place of the largest reference value
    cosine: float | None = None  # where fused is quantized, which no such bound holds for: the least with the reference

    @property
    def agree(self) -> bool:
        if self.cosine is not None:
            return self.cosine >= LEAST_COSINE
        return self.fused <= self.allowed  # False for NaN


def accuracy(fused: torch.Tensor, eager: torch.Tensor, ref64: torch.Tensor, quantized: bool = False) -> Accuracy:
    """Judge `fused` by the error that `eager`, of the same dtype, has against `ref64`; `quantized`, by their cosine."""
    eager_error = max_error(eager, ref64)
    cosine = least_cosine(fused, ref64) if quantized else None
    return Accuracy(eager_error, max_error(fused, ref64), 2 * eager_error + ulp(ref64, eager.dtype), cosine)


def least_cosine(out: torch.Tensor, ref64: torch.Tensor) -> float:
    """Of the vectors in the last dimension; NaN where either is NaN."""
    if out.shape != ref64.shape:
        return -math.inf
    return torch.nn.functional.cosine_similarity(out.double(), ref64, dim=-1).min().item() if out.numel() else 1.0


def max_error(out: torch.Tensor, ref64: torch.Tensor) -> float:
    """max |out - ref64|; infinite where the shapes differ, NaN where either is NaN."""
    if out.shape != ref64.shape:
        return math.inf
    return (out.double() - ref64).abs().max().item() if out.numel() else 0.0


def ulp(ref64: torch.Tensor, dtype: torch.dtype) -> float:
    """One unit in the last place, in `dtype`, of the largest magnitude in `ref64`."""
    largest = ref64.abs().max().item() if ref64.numel() else 0.0
    return torch.finfo(dtype).eps * 2.0 ** (math.frexp(largest)[1] - 1) if largest else 0.0


@dataclass(frozen=True)
class Timing:
    samples: list[float]  # seconds, in the order in which they were taken

    @cached_property
    def median(self) -> float:
        return statistics.median(self.samples)

    @cached_property
    def spread(self) -> float:
        """Interquartile range as a fraction of the median."""
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / self.median


def time_interleaved(
    contenders: Mapping[str, Callable[[], Any]], seconds: float, repeats: int = 5
) -> dict[str, Timing]:
    """Run the contenders in turn (A B A B ...) for `seconds`, and at least `repeats` times each.

    What disturbs the machine meanwhile (clock, neighbours, heat) then meets all of them alike.
    One round before that warms them up.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    rounds = 0
    for forward in contenders.values():
        forward()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while rounds < repeats or time.perf_counter() < end:
            for name, forward in contenders.items():
                start = time.perf_counter()
                forward()
                samples[name].append(time.perf_counter() - start)
            rounds += 1
    finally:
        gc.enable()
    return {name: Timing(taken) for name, taken in samples.items()}


def time_on(
    device: torch.device, contenders: Mapping[str, Callable[[], Any]], seconds: float, repeats: int = 5
) -> dict[str, Timing]:
    """`time_interleaved` on any device. On a GPU by its own clock, and with nothing in its cache: what empties that
    before each run also keeps the GPU busy while the CPU launches the run."""
    if device.type == "cpu":
        return time_interleaved(contenders, seconds, repeats)
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device=device)  # larger than any L2
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        for _ in range(3):  # compiles, and lets memory be allocated
            run()
    torch.cuda.synchronize(device)
    rounds, end = 0, time.perf_counter() + seconds
    while rounds < repeats or time.perf_counter() < end:
        events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in contenders}
        for name, run in contenders.items():
            cache.zero_()
            events[name][0].record()
            run()
            events[name][1].record()
        torch.cuda.synchronize(device)
        for name, (start, stop) in events.items():
            samples[name].append(start.elapsed_time(stop) / 1e3)
        rounds += 1
    return {name: Timing(taken) for name, taken in samples.items()}


@dataclass(frozen=True)
class FirstCall:
    """The cold call: it packs weights and allocates what the later calls reuse."""

    seconds: float
    kept: int | None  # bytes that stay resident after it (packed weights, buffers); None where not measurable


def first_call(forward: Forward) -> FirstCall:
    before = _resident("RssAnon")
    start = time.perf_counter()
    forward()
    seconds = time.perf_counter() - start
    after = _resident("RssAnon")
    return FirstCall(seconds, None if before is None or after is None else max(0, after - before))


def peak_memory(forward: Forward) -> int | None:
    """Bytes by which the resident memory of this process rises at most during `forward()`.

    Memory that is held before the call, so the weights, is not counted. Measured by the kernel
    (Linux: the high-water mark, reset through /proc/self/clear_refs); None elsewhere.
    """
    before = _resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    forward()
    peak = _status("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def _resident(field: str) -> int | None:
    """Resident bytes, after what malloc holds for later has gone back to the system."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc
    except (AttributeError, OSError, TypeError):
        pass
    return _status(field)


def _status(field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
