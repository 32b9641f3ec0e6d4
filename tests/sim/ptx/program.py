"""A kernel, decoded: each instruction a Python function, each block a list of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import asynchronous, bulk, floating, integer, mbarrier, memory, moves, tensor_core, warp, warpgroup
from .flow import BARRIERS, Block, blocks_of
from .parse import Address, Instruction, Kernel, Negated, PtxError, Register, Symbol
from .table import Decode, Step

TABLE: dict[str, Decode] = {}
for _module in (integer, floating, moves, memory, warp, tensor_core, asynchronous, mbarrier, bulk, warpgroup):
    if twice := TABLE.keys() & _module.TABLE.keys():
        raise RuntimeError(f"defined twice: {twice}")
    TABLE |= _module.TABLE


@dataclass
class Code:
    """A block: (instruction, function, register of the guard or None, the value that it must have); the same of its
    end."""

    steps: list[tuple[Instruction, Step, int | None, bool]]
    block: Block
    guard: int | None = None
    wanted: bool = True


class Program:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.wgmma_registers = warpgroup.wgmma_registers(kernel.instructions)
        self.wgmma_places = {register.index: i for i, register in enumerate(self.wgmma_registers)}
        self.has_mbarriers = any(i.opcode.startswith("mbarrier.init") for i in kernel.instructions)
        self.blocks = [self._code(block) for block in blocks_of(kernel)]
        self.main_loop_lines = self._main_loop_lines()
        self._symbols: dict[str, int] = {}
        self.parameter_bytes = self._place(kernel.parameters)
        used = {x.name for i in kernel.instructions for x in map(_symbol, i.operands) if x}
        shared = [variable for variable in kernel.shared if variable.name in used]
        self.static_shared = self._place(sorted(shared, key=lambda variable: variable.size == 0))
        self.has_dynamic_shared = any(variable.size == 0 for variable in shared)
        writes = [found for i in kernel.instructions if (found := memory.written_bytes(i))]
        self.shared_granule = min([n for space, n in writes if space == "shared"], default=4)
        self.global_granule = min([n for space, n in writes if space == "global"], default=4)

    def _place(self, variables: list) -> int:
        """Gives each its address, one behind the other; returns their bytes."""
        end = 0
        for variable in variables:
            start = -(-end // variable.align) * variable.align
            self._symbols[variable.name] = start
            end = start + variable.size
        return end

    def address_of(self, symbol: str) -> int:
        if symbol not in self._symbols:
            raise PtxError(f"{self.kernel.name}: {symbol} is not known")
        return self._symbols[symbol]

    def _code(self, block: Block) -> Code:
        end = block.end
        if end is not None and end.opcode in BARRIERS and end.guard is not None:
            raise PtxError(f"{end}: a barrier under a predicate is not known")
        guard = guard_of(end) if end else ()
        return Code([(i, self._step(i), *guard_of(i)) for i in block.body], block, *guard)

    def _step(self, instruction: Instruction) -> Step:
        """Watched, if it names registers that wgmma names, and is none itself."""
        step = decode(instruction)
        if instruction.opcode.startswith("wgmma.") or not self.wgmma_places:
            return step
        named = {self.wgmma_places.get(register.index) for register in warpgroup.registers_of(instruction)} - {None}
        return warpgroup.watched(step, np.array(sorted(named))) if named else step

    def _main_loop_lines(self) -> set[int]:
        blocks = [code.block for code in self.blocks]
        loops = {b.loops[-1] for b in blocks if b.loops and any("mma" in i.opcode for i in b.body)}
        return {i.line for b in blocks if loops & set(b.loops) for i in b.body}


def _symbol(operand) -> Symbol | None:
    if isinstance(operand, Address):
        operand = operand.base
    return operand if isinstance(operand, Symbol) else None


def guard_of(instruction: Instruction) -> tuple[int | None, bool]:
    if isinstance(instruction.guard, Register):
        return instruction.guard.index, True
    if isinstance(instruction.guard, Negated):
        return instruction.guard.register.index, False
    return None, True


def decode(instruction: Instruction) -> Step:
    found = TABLE.get(instruction.opcode)
    if found is None:
        raise PtxError(f"{instruction}: {instruction.opcode} is not known")
    try:
        return found(instruction)
    except ValueError as error:  # operands that can't be unpacked
        raise PtxError(f"{instruction}: {error}") from None
