"""What this machine can do at most, measured: operations a second without memory, bytes a second read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fastformer import library
from fastformer.cli.measure import time_interleaved

MEMORY = 256 * 2**20  # bytes read by each thread: more than the caches hold of it
ROUNDS = {False: 200_000, True: 20_000}  # of multiply_adds, without and with int8: about a millisecond
PRODUCT = 1024  # rows, columns and depth of torch's product


@dataclass(frozen=True)
class Ceilings:
    """Of a number of threads: operations and bytes a second."""

    threads: int
    float32: float  # multiplications and additions in registers
    bfloat16: float  # torch's largest product, where the machine has instructions for it; else float32
    int8: float | None  # as float32; None without instructions for it
    memory: float  # read from memory
    l2: float  # read from L2
    l2_bytes: int  # of all threads' cores

    def operations(self, dtype: str) -> float | None:
        return {"float32": self.float32, "bfloat16": self.bfloat16, "int8": self.int8}[dtype]

    def bandwidth(self, moved: float) -> float:
        """Of what bounds a call that moves so many bytes: L2's where they fit into it."""
        return self.l2 if moved <= self.l2_bytes else self.memory


def measure(threads: int, seconds: float) -> Ceilings:
    """The best of the runs of each loop. Wants the op library."""
    raw = torch.ops.fastformer_cpu
    size = l2_bytes()
    memory = torch.ones(MEMORY * threads, dtype=torch.int8)
    part = memory[: size // 2 * threads]  # half of each L2: the system uses it, too
    loops = {
        "float32": partial(raw.multiply_adds, ROUNDS[False], False),
        "memory": partial(raw.read_memory, memory, 1),
        "l2": partial(raw.read_memory, part, 100),
    }
    if library.multiplies_int8():
        loops["int8"] = partial(raw.multiply_adds, ROUNDS[True], True)
    counts: dict[str, int] = {}
    if raw.multiplies_bfloat16():
        a, b = (torch.ones(PRODUCT, PRODUCT, dtype=torch.bfloat16) for _ in range(2))
        loops["bfloat16"] = partial(torch.mm, a, b)
        counts["bfloat16"] = 2 * PRODUCT**3
    with use_threads(threads):
        counts |= {name: loop() for name, loop in loops.items() if name not in counts}
        timings = time_interleaved(loops, seconds)
    best = {name: counts[name] / min(timing.samples) for name, timing in timings.items()}
    bfloat16 = max(best["float32"], best.get("bfloat16", 0.0))
    return Ceilings(
        threads, best["float32"], bfloat16, best.get("int8"), best["memory"], best["l2"], l2_bytes=size * threads
    )


def l2_bytes() -> int:
    """Of a core; 1 MiB where the system does not say."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 2**20


@contextlib.contextmanager
def use_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
