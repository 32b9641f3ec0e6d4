"""Launches, one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from .checks import Counts
from .machine import Launch
from .memory import Memory
from .parse import body_end, parse
from .program import Program

_programs: dict[tuple[int, str], Program] = {}


@dataclass
class Finished:
    """A launch that has run."""

    kernel: str
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared_bytes: int
    counts: Counts


@dataclass
class Runner:
    order: str = "together"
    seed: int = 0
    edit: Callable[[str], str] | None = None
    finished: list[Finished] = field(default_factory=list)
    error: BaseException | None = None

    def program(self, text: str, kernel: str) -> Program:
        """Decoded once; with an `edit`, after it changed the kernel's text from .entry to its last brace."""
        if self.edit:
            start = re.search(rf"\.entry\s+{re.escape(kernel)}\b", text).start()
            end = body_end(text, start)
            text = text[:start] + self.edit(text[start:end]) + text[end:]
        key = hash(text), kernel
        if key not in _programs:
            _programs[key] = Program(parse(text, kernel))
        return _programs[key]

    def run(self, program: Program, grid, threads, dynamic_shared: int, parameters: np.ndarray, buffers: list) -> None:
        memory = Memory(buffers)
        launch = Launch(program, grid, threads, dynamic_shared, parameters, memory, self.order, self.seed)
        launch.run()
        self.finished.append(Finished(program.kernel.name, grid, threads, launch.shared_bytes, launch.counts))


Span = tuple[int, int, str]  # its first byte, the one behind its last, a name
FAR = 2**30  # bytes: what lies between rows so far apart is left out


def buffers_of(tensors: list[torch.Tensor], others: list[Span] = ()) -> list[tuple[int, int, str]]:
    """(address, bytes, name) of the memory that tensors reach; those that share memory are one buffer."""
    spans = list(others)
    for tensor in tensors:
        if tensor.numel() == 0 or tensor.device.type != "cpu":
            continue
        size, starts, last = tensor.element_size(), [tensor.data_ptr()], 0
        for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if stride * size < FAR:
                last += (n - 1) * stride
            else:
                starts = [start + i * stride * size for start in starts for i in range(n)]
        what = f"a tensor ({', '.join(map(str, tensor.shape))}) of {str(tensor.dtype).removeprefix('torch.')}"
        spans += [(start, start + (last + 1) * size, what) for start in starts]
    merged: list[tuple[int, int, str]] = []
    for start, end, what in sorted(set(spans)):
        if merged and start < merged[-1][1]:
            first, before, name = merged[-1]
            merged[-1] = (first, max(before, end), name)
        else:
            merged.append((start, end, what))
    return [(start, end - start, name) for start, end, name in merged]
