"""Global memory, and ld and st."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from . import checks
from .faults import Fault
from .parse import Address, Immediate, Instruction, PtxError, Register, Symbol
from .table import Decode, Step, vector
from .values import dtype_of, reader, writer

if TYPE_CHECKING:
    from .machine import Team

TABLE: dict[str, Decode] = {}
SPACES = ("global", "shared", "param")
PARAMETERS = 1 << 56  # where a generic address of a parameter begins


class Buffer:
    """Bytes of this process that a kernel may reach."""

    def __init__(self, start: int, size: int, name: str) -> None:
        self.start, self.end, self.name = start, start + size, name
        self.base = start & ~15  # so that aligned accesses are whole elements of a view
        length = (self.end + 15 & ~15) - self.base
        self.bytes = np.frombuffer((ctypes.c_uint8 * length).from_address(self.base), np.uint8) if size else None
        self.shadow: checks.GlobalShadow | None = None


class Memory:
    """The buffers of a launch. They must not overlap."""

    def __init__(self, buffers: list[tuple[int, int, str]]) -> None:
        """(address, bytes, name) of each."""
        self.buffers = [Buffer(*buffer) for buffer in sorted(buffers) if buffer[1]]
        for a, b in zip(self.buffers, self.buffers[1:], strict=False):
            if a.end > b.start:
                raise ValueError(f"{a.name} and {b.name} overlap")
        self.starts = [buffer.start for buffer in self.buffers]

    def find(self, addresses: np.ndarray, size: int) -> Iterator[tuple[Buffer | None, np.ndarray | slice]]:
        """Each buffer, or None, and which accesses go there."""
        low, high = int(addresses.min()), int(addresses.max()) + size
        place = bisect.bisect_right(self.starts, low) - 1
        if place >= 0 and high <= self.buffers[place].end:
            yield self.buffers[place], slice(None)
            return
        found = np.searchsorted(np.array(self.starts, np.uint64), addresses, "right").astype(np.int64) - 1
        ends = np.array([buffer.end for buffer in self.buffers] or [0], np.uint64)
        found[(found < 0) | (addresses + np.uint64(size) > ends[found])] = -1
        for i in np.unique(found):
            yield (self.buffers[i] if i >= 0 else None), np.flatnonzero(found == i)


def address_reader(address: Address, space: str, instruction: Instruction):
    """What gives the addresses, of all threads, in uint64 (global) or int64."""
    if not isinstance(address, Address):
        raise PtxError(f"{instruction}: an address was expected")
    dtype = np.uint64 if space == "global" else np.int64
    offset = dtype(address.offset % 2**64) if space == "global" else dtype(address.offset)
    base = address.base
    if isinstance(base, Register):
        if base.kind != "b64" and (space == "global" or base.kind != "b32"):
            raise PtxError(f"{instruction}: {base.name} of type {base.kind} can't be an address")
        i = base.index
        return lambda team: team.registers[i].astype(dtype) + offset
    if space == "global":
        raise PtxError(f"{instruction}: variables in global memory are not known")
    name = base.name if isinstance(base, Symbol) else None

    def constant(team: Team) -> np.ndarray:
        start = team.batch.launch.program.address_of(name) if name else 0
        return np.full(team.size, start + address.offset, np.int64)

    return constant


def check_aligned(team: Team, threads: np.ndarray, addresses: np.ndarray, size: int) -> None:
    wrong = addresses & addresses.dtype.type(size - 1) != 0
    if wrong.any():
        raise Fault(f"{team.who(threads, wrong)}: address {addresses[wrong][0]:#x} is not aligned to {size} bytes")


def shared_places(team: Team, threads: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
    """Bytes in the batch's shared memory, after the checks of bounds and alignment."""
    limit = team.batch.launch.shared_bytes
    outside = (addresses < 0) | (addresses + size > limit)
    if outside.any():
        byte = addresses[outside][0]
        raise Fault(f"{team.who(threads, outside)}: bytes {byte} to {byte + size} of {limit} of shared memory")
    check_aligned(team, threads, addresses, size)
    return addresses + team.shared_start[threads]


def note_wavefronts(team: Team, threads: np.ndarray, addresses: np.ndarray, size: int, instruction) -> None:
    note_conflicts(team, instruction, *checks.wavefronts(threads >> 5, threads & 31, addresses, size))


def note_conflicts(team: Team, instruction: Instruction, count: int, least: int) -> None:
    """So many wavefronts of shared memory, and the least that there could be."""
    counts = team.batch.launch.counts
    counts.wavefronts += count
    if count > least:
        counts.conflicts[instruction.line] = counts.conflicts.get(instruction.line, 0) + count - least
        if instruction.line in team.batch.launch.program.main_loop_lines:
            counts.conflicts_in_main_loops += count - least


def global_accesses(
    team: Team, threads: np.ndarray, addresses: np.ndarray, size: int, write: bool, align: int = 0
) -> Iterator[tuple[Buffer, np.ndarray | slice, np.ndarray]]:
    """(buffer, which of the accesses, places in its bytes), after the checks; aligned to their size, or as asked."""
    check_aligned(team, threads, addresses, align or size)
    for buffer, which in team.batch.launch.memory.find(addresses, size):
        if buffer is None:
            where = team.batch.launch.memory_near(int(addresses[which][0]))
            outside = np.zeros(len(addresses), np.bool_)
            outside[which] = True
            raise Fault(f"{team.who(threads, outside)}: {size} bytes outside of every tensor, {where}")
        places = (addresses[which] - np.uint64(buffer.base)).astype(np.int64)
        if buffer.shadow is None:
            granule = team.batch.launch.program.global_granule
            buffer.shadow = checks.GlobalShadow(buffer.name, len(buffer.bytes), granule)
        access = buffer.shadow.write if write else buffer.shadow.read
        access(team, threads[which], places, size)
        yield buffer, which, places


def note_global(team: Team, threads: np.ndarray, addresses: np.ndarray) -> None:
    team.batch.launch.counts.sectors += checks.sectors(threads >> 5, addresses)


def _load(space: str, count: int, type_name: str) -> Decode:
    element = dtype_of(type_name)
    size = count * element.itemsize

    def decode(instruction: Instruction) -> Step:
        destination, source = instruction.operands
        address = address_reader(source, space, instruction)
        write = [writer(x, type_name, instruction, wider=True) for x in vector(destination, count, instruction)]

        def step(team: Team, mask: np.ndarray | None) -> None:
            threads = team.chosen(mask)
            addresses = address(team)[threads]
            values = np.zeros((count, team.size), element)
            if space == "shared":
                places = shared_places(team, threads, addresses, size)
                team.batch.shadow.read(team, threads, places, size)
                note_wavefronts(team, threads, addresses, size, instruction)
                _gather(values, threads, team.batch.shared.view(element), places // element.itemsize)
            elif space == "param":
                parameters = team.batch.launch.parameters
                if (addresses < 0).any() or (addresses + size > len(parameters)).any():
                    raise Fault(f"bytes {addresses[0]} to {addresses[0] + size} of {len(parameters)} of parameters")
                check_aligned(team, threads, addresses, size)
                _gather(
                    values, threads, parameters[: len(parameters) & -8].view(element), addresses // element.itemsize
                )
            else:
                for buffer, which, places in global_accesses(team, threads, addresses, size, False):
                    _gather(values, threads[which], buffer.bytes.view(element), places // element.itemsize)
                note_global(team, threads, addresses)
                team.batch.launch.counts.loaded_bytes += size * len(threads)
            for i in range(count):
                write[i](team, values[i], mask)

        return step

    return decode


def _gather(values: np.ndarray, threads: np.ndarray, memory: np.ndarray, first: np.ndarray) -> None:
    for i in range(len(values)):
        values[i, threads] = memory[first + i]


def _store(space: str, count: int, type_name: str) -> Decode:
    element = dtype_of(type_name)
    size, bits = count * element.itemsize, np.dtype(f"u{element.itemsize}")

    def decode(instruction: Instruction) -> Step:
        destination, source = instruction.operands
        address = address_reader(destination, space, instruction)
        read = [reader(x, type_name, instruction, wider=True) for x in vector(source, count, instruction)]

        def step(team: Team, mask: np.ndarray | None) -> None:
            threads = team.chosen(mask)
            addresses = address(team)[threads]
            values = [np.broadcast_to(x(team), team.size)[threads] for x in read]
            if space == "shared":
                places = shared_places(team, threads, addresses, size)
                shared, first = team.batch.shared.view(bits), places // element.itemsize
                same = np.logical_and.reduce([shared[first + i] == x.view(bits) for i, x in enumerate(values)])
                team.batch.shadow.write(team, threads, places, size, same)
                note_wavefronts(team, threads, addresses, size, instruction)
                scatter(team, threads, values, shared, first)
            else:
                for buffer, which, places in global_accesses(team, threads, addresses, size, True):
                    parts = [x[which] for x in values]
                    scatter(team, threads[which], parts, buffer.bytes.view(bits), places // element.itemsize)
                note_global(team, threads, addresses)
                team.batch.launch.counts.stored_bytes += size * len(threads)

        return step

    return decode


def scatter(team: Team, threads: np.ndarray, values: list[np.ndarray], memory: np.ndarray, first: np.ndarray) -> None:
    """Threads that write to one place must write the same."""
    for i, part in enumerate(values):
        memory[first + i] = part.view(memory.dtype)
    for i, part in enumerate(values):
        lost = memory[first + i] != part.view(memory.dtype)
        if lost.any():
            raise Fault(f"race: {team.who(threads, lost)} writes where another thread writes something else at once")


for _t in [f"{letter}{n}" for n in (8, 16, 32, 64) for letter in "bus"] + ["f32", "f64"]:
    for _count in (1, 2, 4):
        if _count * dtype_of(_t).itemsize > 16:
            continue
        _name = f".v{_count}.{_t}" if _count > 1 else f".{_t}"
        for _space in SPACES:
            TABLE[f"ld.{_space}{_name}"] = _load(_space, _count, _t)
        for _space in ("global", "shared"):
            TABLE[f"st.{_space}{_name}"] = _store(_space, _count, _t)
        TABLE[f"ld.shared::cta{_name}"] = TABLE[f"ld.shared{_name}"]
        TABLE[f"st.shared::cta{_name}"] = TABLE[f"st.shared{_name}"]
        TABLE[f"ld.global.nc{_name}"] = TABLE[f"ld.volatile.global{_name}"] = TABLE[f"ld.global{_name}"]


def written_bytes(instruction: Instruction) -> tuple[str, int] | None:
    """(space, bytes of an access) of an instruction that writes memory."""
    parts = instruction.opcode.split(".")
    if parts[0] == "st":
        count = next((int(part[1:]) for part in parts if part in ("v2", "v4")), 1)
        return parts[1].removesuffix("::cta"), count * dtype_of(parts[-1]).itemsize
    if instruction.opcode.startswith("cp.async.bulk.") and "bulk_group" in parts:
        return "global", 2 if parts[3] == "tensor" else 16
    if parts[0] == "stmatrix":
        return "shared", 16
    if parts[0] == "mbarrier":
        return "shared", 8
    if instruction.opcode.startswith(("cp.async.ca.", "cp.async.cg.")):
        size = instruction.operands[2]
        return "shared", int(size.text.removesuffix("U"), 0) if isinstance(size, Immediate) else 4
    return None
