"""cp.async: copies from global to shared memory that end as late as the thread's waits allow.

Until a copy has ended its destination holds NaN, and reading or writing it is a fault. Its source is read when it ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .memory import address_reader, global_accesses, note_global, note_wavefronts, shared_places
from .parse import Immediate, Instruction, PtxError
from .table import Decode, Step
from .values import immediate, reader

if TYPE_CHECKING:
    from .machine import Team

TABLE: dict[str, Decode] = {}


@dataclass
class Copy:
    """One instruction's copies that are under way: a thread's place, source, number of bytes, and group."""

    threads: np.ndarray
    places: np.ndarray  # in the batch's shared memory
    sources: np.ndarray
    valid: np.ndarray  # bytes that are copied; zeros follow
    groups: np.ndarray
    size: int

    def part(self, which: np.ndarray) -> Copy:
        numbers = (self.threads, self.places, self.sources, self.valid, self.groups)
        return Copy(*(x[which] for x in numbers), self.size)


class Copies:
    """Of a team."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.under_way: list[Copy] = []
        self.committed = np.zeros(team.size, np.int64)  # groups of each thread

    def wait(self, threads: np.ndarray, left: int) -> None:
        """Until at most `left` groups of each of the threads are under way."""
        limit = np.full(self.team.size, -1, np.int64)
        limit[threads] = self.committed[threads] - left
        still = []
        for copy in self.under_way:
            done = copy.groups < limit[copy.threads]
            if done.any():
                self.end(copy.part(done))
            if not done.all():
                still.append(copy.part(~done))
        self.under_way = still

    def end(self, copy: Copy) -> None:
        team, size = self.team, copy.size
        team.batch.shadow.end_copy(team, copy.threads, copy.places, size)
        data = np.zeros((len(copy.threads), size), np.uint8)
        for buffer, which, places in source_parts(team, copy):
            data[which] = buffer.bytes[np.minimum(places[:, None] + np.arange(size), len(buffer.bytes) - 1)]
        data[np.arange(size) >= copy.valid[:, None]] = 0
        team.batch.shared[copy.places[:, None] + np.arange(size)] = data


def source_parts(team: Team, copy: Copy):
    """As global_accesses, of the bytes that are copied."""
    for valid in np.unique(copy.valid[copy.valid > 0]):
        chosen = np.flatnonzero(copy.valid == valid)
        accesses = team, copy.threads[chosen], copy.sources[chosen], int(valid)
        for buffer, which, places in global_accesses(*accesses, write=False, align=copy.size):
            yield buffer, chosen[which], places


def _copy(instruction: Instruction) -> Step:
    """cp.async [shared], [global], bytes{, source bytes}"""
    destination, source, size, *rest = instruction.operands
    if not isinstance(size, Immediate) or len(rest) > 1:
        raise PtxError(f"{instruction}: operands that are not known")
    count = int(immediate(size, "u32", instruction))
    if count not in ((16,) if ".cg." in instruction.opcode else (4, 8, 16)):
        raise PtxError(f"{instruction}: {count} bytes")
    to, from_ = address_reader(destination, "shared", instruction), address_reader(source, "global", instruction)
    read_valid = reader(rest[0], "u32", instruction) if rest else lambda team: np.uint32(count)

    def step(team: Team, mask: np.ndarray | None) -> None:
        threads = team.chosen(mask)
        addresses = to(team)[threads]
        places = shared_places(team, threads, addresses, count)
        valid = np.minimum(np.broadcast_to(read_valid(team), team.size)[threads], np.uint32(count)).astype(np.int64)
        sources = from_(team)[threads]
        copy = Copy(threads, places, sources, valid, team.copies.committed[threads], count)
        for _ in source_parts(team, copy):
            pass  # the checks
        reading = valid > 0
        if reading.any():
            note_global(team, threads[reading], sources[reading])
        team.batch.shadow.begin_copy(team, threads, places, count)
        note_wavefronts(team, threads, addresses, count, instruction)
        team.batch.shared[places[:, None] + np.arange(count)] = 0xFF
        team.batch.launch.counts.copied_bytes += int(valid.sum())
        team.copies.under_way.append(copy)

    return step


def _commit(instruction: Instruction) -> Step:
    def step(team: Team, mask: np.ndarray | None) -> None:
        team.copies.committed[team.chosen(mask)] += 1

    return step


def _wait(instruction: Instruction) -> Step:
    (left,) = instruction.operands
    if not isinstance(left, Immediate):
        raise PtxError(f"{instruction}: an immediate was expected")
    groups = int(immediate(left, "u32", instruction))
    return lambda team, mask: team.copies.wait(team.chosen(mask), groups)


TABLE["cp.async.cg.shared.global"] = _copy
TABLE["cp.async.ca.shared.global"] = _copy
TABLE["cp.async.commit_group"] = _commit
TABLE["cp.async.wait_group"] = _wait
