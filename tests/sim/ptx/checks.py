"""Races, memory that nobody wrote, bank conflicts and sectors.

What happened before what is known from vector clocks: each warp has a clock, which goes on at every barrier, and of
each other warp of its block the clock up to which it knows that it has run. Each granule of memory, the least that the
kernel writes at once, has the clock of its last writer and those of its readers (of global memory: of the last one).
Of shared memory it is known, too, which lane: a warp's clock goes on at its own barriers, and before that no lane may
touch what another one wrote.

Bulk copies into shared memory and wgmma go through another proxy. Such a copy is written by its mbarrier, whose clock
is the number of its phases: only who has waited for the phase knows of it. What a warp wrote by other instructions, the
async proxy sees after a fence.proxy.async on the way from one to the other: of each warp, up to which clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .faults import Fault

if TYPE_CHECKING:
    from .machine import Batch, Team

WARP_BITS = 6  # a key is a clock, and in its lowest bits the number of a warp, or behind those that of an mbarrier
ACTOR = 2**WARP_BITS - 1
NOBODY, SEVERAL = -1, -2
COPY, BARRIER, READER = 1, 2, 4  # under way to a granule; lies there; reads it by the async proxy, each of them


@dataclass
class Counts:
    """What a launch did."""

    mma: dict[str, int] = field(default_factory=dict)  # of each opcode, by warps
    operations: int = 0  # of mma: a product and a sum are two
    copied_bytes: int = 0  # by cp.async, bulk copies among them, without the zeros
    loaded_bytes: int = 0  # from global memory, by ld
    stored_bytes: int = 0
    sectors: int = 0  # of 32 bytes of global memory, a warp's access at a time
    wavefronts: int = 0  # of shared memory
    conflicts: dict[int, int] = field(default_factory=dict)  # line -> wavefronts beyond the least, where there are any
    conflicts_in_main_loops: int = 0  # in loops that have an mma
    same_writes: int = 0  # to shared memory, where another warp writes the same with no barrier in between
    unfenced_barriers: int = 0  # bulk copies to an mbarrier with no fence between its initialization and the copy
    steps: int = 0  # instructions that the interpreter ran, each for many threads

    def add_mma(self, opcode: str, warps: int, operations: int) -> None:
        self.mma[opcode] = self.mma.get(opcode, 0) + warps
        self.operations += warps * operations


def lanes_of(threads: np.ndarray, together: bool) -> np.ndarray:
    """(accesses, 1) of who makes them."""
    return np.full((len(threads), 1), SEVERAL, np.int8) if together else (threads & 31).astype(np.int8)[:, None]


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
        self.writer_lane = np.zeros(count, np.int8)  # or SEVERAL
        self.reader_lane = np.zeros((count, batch.warps), np.int8)  # or SEVERAL; NOBODY: all lanes know of it
        self.busy = np.zeros(count, np.int32)  # sum of COPY, BARRIER, and READER for each that has not ended

    def read(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int, together: bool = False) -> None:
        """`size` bytes at each of `first`. `together`: for all lanes of the warp."""
        places, own, warps, writer = self._known_writer(team, threads, first, size)
        own, warps, lanes = own[:, None], warps[:, None], lanes_of(threads, together)
        if (other := (writer == (own << WARP_BITS | warps)) & (self.writer_lane[places] != lanes)).any():
            self.race_of_lanes(team, threads, other.any(1), first, "reads what", "wrote")
        if together:
            self.reader_lane[places, warps] = NOBODY  # all have run it before one of them goes on
        else:
            before, known = self.reader_lane[places, warps], self.readers[places, warps] == own
            self.reader_lane[places, warps] = np.where(known & (before != lanes), SEVERAL, lanes)
            now = self.reader_lane[places, warps]
            if (others := (now != lanes) & (now != SEVERAL)).any():  # lanes that read at once
                self.reader_lane[places[others], np.broadcast_to(warps, places.shape)[others]] = SEVERAL
        self.readers[places, warps] = own

    def begin_read(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int) -> np.ndarray:
        """By the async proxy, which reads until end_read. Returns the granules, for that; each once a warp."""
        places, _, warps, writer = self._known_writer(team, threads, first, size)
        self._fenced(team, threads, first, places, writer, "reads")
        read = np.unique(places.astype(np.int64) * 64 + warps[:, None])
        np.add.at(self.busy, read // 64, READER)
        return read

    def end_read(self, team: Team, row: int, read: np.ndarray) -> None:
        block, warp = team.block[row], team.warp[row]
        np.subtract.at(self.busy, read // 64, READER)
        self.readers[read // 64, read % 64] = self.batch.clocks[block, warp, warp]
        self.reader_lane[read // 64, read % 64] = NOBODY

    def begin_barrier(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int) -> None:
        self.write(team, threads, first, size, np.zeros(len(first), np.bool_))
        self.busy[granules(first, size, self.granule)] |= BARRIER

    def use_barrier(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int) -> None:
        """As a read of what its initialization wrote."""
        places, own, warps, _ = self._known_writer(team, threads, first, size, barrier=True)
        self.readers[places, warps[:, None]] = own[:, None]
        self.reader_lane[places, warps[:, None]] = NOBODY

    def end_barrier(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int) -> None:
        self.busy[granules(first, size, self.granule)] &= ~BARRIER
        self.write(team, threads, first, size, np.zeros(len(first), np.bool_))

    def _known_writer(self, team: Team, threads, first: np.ndarray, size: int, barrier: bool = False) -> tuple:
        places, blocks, warps, own = self._access(team, threads, first, size)
        if not barrier:
            self._not_busy(team, threads, first, places, "read of")
        writer = self.writer[places]
        if not writer.all():
            bad = (writer == 0).any(1)
            raise Fault(f"{team.who(threads, bad)}: read of {self.place(first, bad)}, which nobody wrote")
        late = (writer >> WARP_BITS) > self.batch.clocks[blocks[:, None], warps[:, None], writer & ACTOR]
        if late.any():
            self.race(team, threads, late.any(1), first, "reads what", writer[late][0], "wrote")
        return places, own, warps, writer

    def _fenced(self, team: Team, threads: np.ndarray, first, places, writer: np.ndarray, does: str) -> None:
        """Of writes by instructions that are not of the async proxy."""
        rows, actor = threads >> 5, writer & ACTOR
        by_warp = (actor < self.batch.warps) & (writer != 0)
        fenced = self.batch.fenced[team.block[rows][:, None], team.warp[rows][:, None], np.where(by_warp, actor, 0)]
        late = by_warp & ((writer >> WARP_BITS) > fenced)
        if late.any():
            bad = late.any(1)
            raise Fault(
                f"{team.who(threads, bad)}: the async proxy {does} {self.place(first, bad)}, which warp "
                f"{actor[late][0]} wrote, with no fence.proxy.async in between"
            )

    def write(self, team: Team, threads, first: np.ndarray, size: int, same: np.ndarray, together=False) -> None:
        """`same`: which accesses write what is there: these may race. So may several of one instruction that write to
        one place, if they write the same, which is seen later. `together`: of what all lanes of the warp have."""
        self._not_busy(team, threads, first, granules(first, size, self.granule), "write to", True)
        raced, twice = self._write(team, threads, first, size, same, together)
        self.batch.launch.counts.same_writes += int((raced | twice.any(1)).sum())

    def begin_copy(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int) -> None:
        """As a write now, which readers see only when it is complete."""
        places = granules(first, size, self.granule)
        self._not_busy(team, threads, first, places, "copy to", True)
        _, twice = self._write(team, threads, first, size, np.zeros(len(first), np.bool_))
        if twice.any():
            self.race(team, threads, twice.any(1), first, "copies to where", self.writer[places][twice][0], "copies")
        self.busy[places] |= COPY

    def end_copy(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int) -> None:
        self._write(team, threads, first, size, np.zeros(len(first), np.bool_))
        self.busy[granules(first, size, self.granule)] &= ~COPY

    def begin_bulk(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int) -> None:
        """As begin_copy, by the async proxy."""
        places = granules(first, size, self.granule)
        self._not_busy(team, threads, first, places, "copy to", True)
        self._fenced(team, threads, first, places, self.writer[places], "writes")
        self.begin_copy(team, threads, first, size)

    def end_bulk(self, first: np.ndarray, size: int, key: int) -> None:
        """`key`: of the mbarrier, in the phase that this is a part of."""
        places = granules(first, size, self.granule)
        self.writer[places] = key
        self.busy[places] &= ~COPY

    def _write(self, team: Team, threads, first: np.ndarray, size: int, same: np.ndarray, together=False) -> tuple:
        """(accesses that race but write the same, granules that another warp writes in this instruction)"""
        places, blocks, warps, own = self._access(team, threads, first, size)
        writer, known = self.writer[places], self.batch.clocks
        late = (writer >> WARP_BITS) > known[blocks[:, None], warps[:, None], writer & ACTOR]
        raced = late.any(1)
        if (raced & ~same).any():
            late &= ~same[:, None]
            self.race(team, threads, late.any(1), first, "writes where", writer[late][0], "wrote")
        known = known[blocks, warps, : self.batch.warps]
        read_late = (self.readers[places] > known[:, None, :]).any(1) & ~same[:, None]
        if read_late.any():
            bad = read_late.any(1)
            self.race(team, threads, bad, first, "writes where", int(np.flatnonzero(read_late[bad][0])[0]), "read")
        key, lanes = (own << WARP_BITS | warps)[:, None], lanes_of(threads, together)
        if (other := (writer == key) & (self.writer_lane[places] != lanes) & ~same[:, None]).any():
            self.race_of_lanes(team, threads, other.any(1), first, "writes where", "wrote")
        reader = self.reader_lane[places, warps[:, None]]
        other = (self.readers[places, warps[:, None]] == own[:, None]) & (reader != lanes) & (reader != NOBODY)
        if (other & ~same[:, None]).any():
            self.race_of_lanes(team, threads, (other & ~same[:, None]).any(1), first, "writes where", "read")
        self.writer[places], self.writer_lane[places] = key, lanes
        return raced, self.writer[places] != key

    def _not_busy(self, team: Team, threads, first, places: np.ndarray, does: str, writes: bool = False) -> None:
        busy = self.busy[places] if writes else self.busy[places] & (COPY | BARRIER)
        if busy.any():
            bad = busy.any(1)
            found = busy[busy != 0][0]
            why = "to which a copy is under way" if found & COPY else "where an mbarrier is"
            if not found & (COPY | BARRIER):
                why = "which a wgmma or a bulk copy that is under way reads"
            raise Fault(f"{team.who(threads, bad)}: {does} {self.place(first, bad)}, {why}")

    def _access(self, team: Team, threads: np.ndarray, first: np.ndarray, size: int) -> tuple:
        """(granules, and of each access its block, warp, and the warp's clock)"""
        rows = threads >> 5
        blocks, warps = team.block[rows], team.warp[rows]
        return granules(first, size, self.granule), blocks, warps, self.batch.clocks[blocks, warps, warps]

    def place(self, first: np.ndarray, bad: np.ndarray) -> str:
        return f"byte {int(first[bad][0]) % self.batch.shared_size} of shared memory"

    def race(self, team: Team, threads: np.ndarray, bad: np.ndarray, first, does: str, key: int, did: str) -> None:
        other, who = int(key) & ACTOR, team.who(threads, bad)
        if other >= self.batch.warps:
            other, why = "a bulk copy", "without a wait for its mbarrier"
        else:
            other, why = f"warp {other}", "with no barrier in between"
        raise Fault(f"race: {who} {does} {other} {did}, {self.place(first, bad)}, {why}")

    def race_of_lanes(self, team: Team, threads: np.ndarray, bad: np.ndarray, first, does: str, did: str) -> None:
        text = f"{team.who(threads, bad)} {does} another lane of its warp {did}, {self.place(first, bad)}"
        raise Fault(f"race: {text}, with no barrier in between")


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
        seen = np.take_along_axis(clocks, key & ACTOR, 1)
        late = (there == block) & ((key >> WARP_BITS) > seen)
        if late.any():
            warp = key[late][0] & ACTOR
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


def wavefronts_of_units(units: np.ndarray) -> tuple[int, int]:
    """The same, of what the async proxy moves at once: (n, 8) addresses of 16 bytes, the rows of a core matrix of wgmma
    or 128 bytes of a bulk copy."""
    banks = units >> 4 & 7
    return int((banks[:, :, None] == np.arange(8)).sum(1).max(1).sum()), len(units)


def sectors(rows: np.ndarray, addresses: np.ndarray) -> int:
    """Different ones of 32 bytes, of each warp."""
    return len(np.unique(rows.astype(np.uint64) << np.uint64(56) ^ addresses.astype(np.uint64) >> np.uint64(5)))
