"""Races, memory that nobody wrote, bank conflicts and sectors.

What happened before what is known from vector clocks: each warp has a clock, which goes on at every barrier, and of
each other warp of its block the clock up to which it knows that it has run. Each granule of memory, the least that the
kernel writes at once, has the clock of its last writer and those of its readers (of global memory: of the last one).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .faults import Fault

if TYPE_CHECKING:
    from .machine import Batch, Team

WARP_BITS = 6  # a key is a clock, and the number of a warp in its lowest bits
NOBODY, SEVERAL = -1, -2


@dataclass
class Counts:
    """What a launch did."""

    mma: dict[str, int] = field(default_factory=dict)  # of each opcode, by warps
    operations: int = 0  # of mma: a product and a sum are two
    copied_bytes: int = 0  # by cp.async, without the zeros
    loaded_bytes: int = 0  # from global memory, by ld
    stored_bytes: int = 0
    sectors: int = 0  # of 32 bytes of global memory, a warp's access at a time
    wavefronts: int = 0  # of shared memory
    conflicts: dict[int, int] = field(default_factory=dict)  # line -> wavefronts beyond the least, where there are any
    conflicts_in_main_loops: int = 0  # in loops that have an mma
    same_writes: int = 0  # to shared memory, where another warp writes the same with no barrier in between
    steps: int = 0  # instructions that the interpreter ran, each for many threads

    def add_mma(self, opcode: str, warps: int, operations: int) -> None:
        self.mma[opcode] = self.mma.get(opcode, 0) + warps
        self.operations += warps * operations


def granules(first: np.ndarray, size: int, granule: int) -> np.ndarray:
    """(accesses, granules of each)."""
    return (first // granule)[:, None] + np.arange(-(-size // granule))


class SharedShadow:
    """Of the shared memory of a batch's blocks, which lie one behind the other."""

    def __init__(self, batch: Batch, size: int, granule: int) -> None:
        self.batch, self.granule = batch, granule
        count = batch.blocks * size // granule
        self.writer = np.zeros(count, np.int32)  # key; 0: nobody wrote here
        self.readers = np.zeros((count, batch.warps), np.int32)  # clocks
        self.pending = np.zeros(count, np.bool_)  # a copy is under way

    def read(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int) -> None:
        """`size` bytes at each of `first`."""
        places, clocks, own, warps = self._access(team, threads, first, size)
        self._no_copy(team, threads, first, places, "read of")
        writer = self.writer[places]
        if not writer.all():
            bad = (writer == 0).any(1)
            raise Fault(f"{team.who(threads, bad)}: read of {self.place(first, bad)}, which nobody wrote")
        late = (writer >> WARP_BITS) > np.take_along_axis(clocks, writer & (2**WARP_BITS - 1), 1)
        if late.any():
            self.race(team, threads, late.any(1), first, "reads what", writer[late][0], "wrote")
        self.readers[places, warps[:, None]] = own[:, None]

    def write(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int, same: np.ndarray) -> None:
        """`same`: which accesses write what is there: these may race. So may several of one instruction that write to
        one place, if they write the same, which is seen later."""
        self._no_copy(team, threads, first, granules(first, size, self.granule), "write to")
        raced, twice = self._write(team, threads, first, size, same)
        self.batch.launch.counts.same_writes += int((raced | twice.any(1)).sum())

    def begin_copy(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int) -> None:
        """As a write now, which readers see only when it is complete."""
        places = granules(first, size, self.granule)
        self._no_copy(team, threads, first, places, "copy to")
        _, twice = self._write(team, threads, first, size, np.zeros(len(first), np.bool_))
        if twice.any():
            self.race(team, threads, twice.any(1), first, "copies to where", self.writer[places][twice][0], "copies")
        self.pending[places] = True

    def end_copy(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int) -> None:
        self._write(team, threads, first, size, np.zeros(len(first), np.bool_))
        self.pending[granules(first, size, self.granule)] = False

    def _write(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int, same: np.ndarray) -> tuple:
        """(accesses that race but write the same, granules that another warp writes in this instruction)"""
        places, clocks, own, warps = self._access(team, threads, first, size)
        writer = self.writer[places]
        late = (writer >> WARP_BITS) > np.take_along_axis(clocks, writer & (2**WARP_BITS - 1), 1)
        raced = late.any(1)
        if (raced & ~same).any():
            late &= ~same[:, None]
            self.race(team, threads, late.any(1), first, "writes where", writer[late][0], "wrote")
        read_late = (self.readers[places] > clocks[:, None, :]).any(1) & ~same[:, None]
        if read_late.any():
            bad = read_late.any(1)
            self.race(team, threads, bad, first, "writes where", int(np.flatnonzero(read_late[bad][0])[0]), "read")
        key = (own << WARP_BITS | warps)[:, None]
        self.writer[places] = key
        return raced, self.writer[places] != key

    def _no_copy(self, team: Team, threads: np.ndarray, first: np.ndarray, places: np.ndarray, does: str) -> None:
        if (pending := self.pending[places]).any():
            bad = pending.any(1)
            raise Fault(f"{team.who(threads, bad)}: {does} {self.place(first, bad)}, to which a copy is under way")

    def _access(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int) -> tuple:
        places = granules(first, size, self.granule)
        rows = threads >> 5
        blocks, warps = team.block[rows], team.warp[rows]
        clocks = self.batch.clocks[blocks, warps]
        return places, clocks, clocks[np.arange(len(warps)), warps], warps

    def place(self, first: np.ndarray, bad: np.ndarray) -> str:
        return f"byte {int(first[bad][0]) % self.batch.shared_size} of shared memory"

    def race(self, team: Team, threads: np.ndarray, bad: np.ndarray, first, does: str, key: int, did: str) -> None:
        other, who = int(key) & (2**WARP_BITS - 1), team.who(threads, bad)
        raise Fault(f"race: {who} {does} warp {other} {did}, {self.place(first, bad)}, with no barrier in between")


class GlobalShadow:
    """Of one buffer in global memory, for a whole launch."""

    def __init__(self, name: str, size: int, granule: int) -> None:
        self.name, self.granule = name, granule
        count = -(-size // granule)
        self.write_block = np.full(count, NOBODY, np.int32)
        self.write_key = np.zeros(count, np.int32)
        self.read_block = np.full(count, NOBODY, np.int32)
        self.read_key = np.zeros(count, np.int32)

    def read(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int) -> None:
        places, block, key, clocks = self._access(team, threads, first, size)
        self._against(self.write_block, self.write_key, places, block, clocks, team, threads, "reads what", "wrote")
        known = self.read_block[places]
        self.read_block[places] = np.where((known == NOBODY) | (known == block), block, SEVERAL)
        now = self.read_block[places]
        if (others := (now != block) & (now != SEVERAL)).any():  # blocks that read at once
            self.read_block[places[others]] = SEVERAL
        self.read_key[places] = key

    def write(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int) -> None:
        places, block, key, clocks = self._access(team, threads, first, size)
        self._against(self.write_block, self.write_key, places, block, clocks, team, threads, "writes where", "wrote")
        self._against(self.read_block, self.read_key, places, block, clocks, team, threads, "writes where", "read")
        self.write_block[places] = block
        self.write_key[places] = key
        twice = (self.write_block[places] != block) | (self.write_key[places] != key)
        if twice.any():
            who = team.who(threads, twice.any(1))
            raise Fault(f"race: {who} writes where another warp writes at once, in {self.name}")

    def _access(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int) -> tuple:
        rows = threads >> 5
        block, warp = team.block[rows], team.warp[rows]
        clocks = team.batch.clocks[block, warp]
        key = clocks[np.arange(len(warp)), warp] << WARP_BITS | warp
        return granules(first, size, self.granule), team.grid_block[rows][:, None], key[:, None], clocks

    def _against(self, blocks, keys, places, block, clocks, team, threads, does: str, did: str) -> None:
        there = blocks[places]
        foreign = (there != NOBODY) & (there != block)
        if foreign.any():
            other = there[foreign][0]
            whose = f"block {team.batch.launch.name_of_block(other)}" if other != SEVERAL else "other blocks"
            raise Fault(f"race: {team.who(threads, foreign.any(1))} {does} {whose} {did}, in {self.name}")
        key = keys[places]
        seen = np.take_along_axis(clocks, key & (2**WARP_BITS - 1), 1)
        late = (there == block) & ((key >> WARP_BITS) > seen)
        if late.any():
            warp = key[late][0] & (2**WARP_BITS - 1)
            who = team.who(threads, late.any(1))
            raise Fault(f"race: {who} {does} warp {warp} {did}, in {self.name}, with no barrier in between")


def wavefronts(rows: np.ndarray, lanes: np.ndarray, addresses: np.ndarray, size: int) -> tuple[int, int]:
    """(wavefronts, the least that there could be) of accesses to shared memory, `size` bytes each.

    32 banks of 4 bytes; lanes that read the same word share it. Accesses of 8 and 16 bytes go by halves and quarters of
    a warp.
    """
    words = max(size // 4, 1)
    groups = rows * words + lanes // (32 // words)
    word = (addresses >> 2)[:, None] + np.arange(words)
    different = np.unique((groups[:, None] << 32 | word).ravel())
    group, bank = different >> 32, different & 31
    counted = np.bincount((group - group[0]) * 32 + bank).reshape(-1)
    counted = np.pad(counted, (0, -len(counted) % 32)).reshape(-1, 32).max(1)
    return int(counted.sum()), int(np.count_nonzero(counted))


def sectors(rows: np.ndarray, addresses: np.ndarray) -> int:
    """Different ones of 32 bytes, of each warp."""
    return len(np.unique(rows.astype(np.uint64) << np.uint64(56) ^ addresses.astype(np.uint64) >> np.uint64(5)))
