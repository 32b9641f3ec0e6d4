"""What the tables of instructions hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .parse import Instruction, Pair, PtxError, Vector
from .values import reader, writer

if TYPE_CHECKING:
    from .machine import Team

Step = Callable[["Team", "np.ndarray | None"], None]  # runs an instruction for the threads in a mask; None: for all
Decode = Callable[[Instruction], Step]


@dataclass(frozen=True)
class Alu:
    """An instruction of which each lane computes its own result from its own registers."""

    results: tuple[str, ...]
    sources: tuple[str, ...]
    function: Callable
    wider: bool = False  # may the registers be wider than the types?
    optional: int = 0  # of the last sources

    def __call__(self, instruction: Instruction) -> Step:
        if not -self.optional <= len(instruction.operands) - 1 - len(self.sources) <= 0:
            raise PtxError(f"{instruction}: {len(instruction.operands)} operands")
        result, *sources = instruction.operands
        if len(self.results) == 2:
            return self._of_two(result, sources, instruction)
        write = writer(result, self.results[0], instruction, self.wider)
        read = [reader(x, t, instruction, self.wider) for x, t in zip(sources, self.sources, strict=not self.optional)]
        function = self.function
        if len(read) == 1:
            (a,) = read
            return lambda team, mask: write(team, function(a(team)), mask)
        if len(read) == 2:
            a, b = read
            return lambda team, mask: write(team, function(a(team), b(team)), mask)
        return lambda team, mask: write(team, function(*(x(team) for x in read)), mask)

    def _of_two(self, result: Pair, sources: list, instruction: Instruction) -> Step:
        """Of low and of high halves: a|b."""
        if not isinstance(result, Pair):
            raise PtxError(f"{instruction}: two results were expected")
        parts = zip((result.first, result.second), self.results, strict=True)
        writes = [writer(x, t, instruction) for x, t in parts]
        read = [reader(x, t, instruction) for x, t in zip(sources, self.sources, strict=True)]

        def step(team: Team, mask: np.ndarray | None) -> None:
            for write, values in zip(writes, self.function(*(x(team) for x in read)), strict=True):
                write(team, values, mask)

        return step


def vector(operand, count: int, instruction: Instruction) -> tuple:
    """The `count` parts of {a, b, ...}; one may stand without braces."""
    parts = operand.parts if isinstance(operand, Vector) else (operand,)
    if len(parts) != count:
        raise PtxError(f"{instruction}: {len(parts)} registers in the place of {count}")
    return parts
