"""mov, which also packs and unpacks registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import integer
from .parse import Instruction, PtxError, Vector
from .table import Alu, Decode, Step
from .values import STORAGE, reader, writer

if TYPE_CHECKING:
    from .machine import Team

_ALU = {opcode: integer.TABLE.pop(opcode) for opcode in [x for x in integer.TABLE if x.startswith("mov.")]}


def _mov(alu: Alu, bits: int) -> Decode:
    """mov.bN of {a, b}: the first part is the lowest."""

    def decode(instruction: Instruction) -> Step:
        destination, source = instruction.operands
        whole = f"b{bits}"
        if isinstance(source, Vector):
            part = f"b{bits // len(source.parts)}"
            if part not in STORAGE:
                raise PtxError(f"{instruction}: {len(source.parts)} parts")
            read = [reader(x, part, instruction) for x in source.parts]
            write, dtype, shift = writer(destination, whole, instruction), STORAGE[whole], bits // len(source.parts)

            def pack(team: Team, mask: np.ndarray | None) -> None:
                total = dtype(0)
                for i, x in enumerate(read):
                    total = total | x(team).astype(dtype) << dtype(shift * i)
                write(team, total, mask)

            return pack
        if isinstance(destination, Vector):
            part = f"b{bits // len(destination.parts)}"
            if part not in STORAGE:
                raise PtxError(f"{instruction}: {len(destination.parts)} parts")
            writes = [writer(x, part, instruction) for x in destination.parts]
            read_whole, dtype, shift = reader(source, whole, instruction), STORAGE[part], bits // len(writes)

            def unpack(team: Team, mask: np.ndarray | None) -> None:
                value = read_whole(team)
                for i, write in enumerate(writes):
                    write(team, (value >> value.dtype.type(shift * i)).astype(dtype), mask)

            return unpack
        return alu(instruction)

    return decode


TABLE: dict[str, Decode] = dict(_ALU)
for _bits in (32, 64):
    TABLE[f"mov.b{_bits}"] = _mov(_ALU[f"mov.b{_bits}"], _bits)
