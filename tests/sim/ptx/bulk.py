"""Bulk copies (TMA) between global and shared memory, of boxes of tensors or of bytes that lie one behind the other.

A copy to shared memory ends when nothing else can go on, and a warp waits for its mbarrier; a copy to global memory,
when its thread waits for its group. Until then what it writes can't be read, and what it reads can't be written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .checks import NOBODY, WARP_BITS, granules, wavefronts_of_units
from .faults import Fault
from .mbarrier import BYTES as MBARRIER_BYTES
from .mbarrier import Mbarrier
from .memory import PARAMETERS, address_reader, global_accesses, note_conflicts, shared_places
from .parse import Address, Box, Immediate, Instruction, PtxError
from .table import Decode, Step
from .tensor_map import BYTES as MAP_BYTES
from .tensor_map import TensorMap, unpack
from .values import immediate, reader

if TYPE_CHECKING:
    from .machine import Batch, Team

TABLE: dict[str, Decode] = {}
UNIT = 16  # bytes


@dataclass
class Parts:
    """What one thread's copy moves: `inside`, the number of `bytes` of each row that are in the tensor, from `skipped`
    of the row on, or none of them. Rows have `places`, one for each byte, in the block's shared memory."""

    places: np.ndarray  # (rows, bytes)
    addresses: np.ndarray  # (rows,), of the first byte that is inside
    inside: np.ndarray  # (rows,)
    skipped: int
    bytes: int

    def accesses(self, team: Team, thread: int, write: bool) -> Iterator[tuple]:
        """(rows, buffer, places of their first bytes in it)"""
        rows = np.flatnonzero(self.inside)
        if len(rows) and self.bytes:
            threads = np.full(len(rows), thread)
            for buffer, which, places in global_accesses(
                team, threads, self.addresses[rows], self.bytes, write=write, align=1
            ):
                yield rows[which], buffer, places

    def note(self, team: Team, copied: bool) -> None:
        """Bytes and sectors."""
        counts, addresses = team.batch.launch.counts, self.addresses[self.inside].astype(np.int64)
        size = self.bytes * len(addresses)
        if copied:
            counts.copied_bytes += size
        else:
            counts.stored_bytes += size
        if size:
            first, last = addresses // 32, (addresses + self.bytes - 1) // 32
            touched = first[:, None] + np.arange((last - first).max() + 1)
            counts.sectors += len(np.unique(np.minimum(touched, last[:, None])))

    @property
    def columns(self) -> slice:
        return slice(self.skipped, self.skipped + self.bytes)


@dataclass
class Load:
    """Under way, to shared memory."""

    team: Team
    thread: int
    barrier: Mbarrier
    parts: Parts
    units: np.ndarray  # places in the batch's shared memory

    def end(self) -> None:
        team, parts, batch = self.team, self.parts, self.team.batch
        data = np.zeros(parts.places.shape, np.uint8)
        for rows, buffer, places in parts.accesses(team, self.thread, write=False):
            granule = granules(places, parts.bytes, buffer.shadow.granule)
            if (buffer.shadow.write_block[granule] != NOBODY).any():
                raise Fault("a bulk copy of what this launch wrote to global memory is not known")
            data[rows, parts.columns] = buffer.bytes[places[:, None] + np.arange(parts.bytes)]
        batch.shared[team.shared_start[self.thread] + parts.places] = data
        batch.shadow.end_bulk(self.units, UNIT, self.barrier.clock << WARP_BITS | self.barrier.writer)
        self.barrier.copies -= 1
        self.barrier.bytes -= parts.places.size
        batch.mbarriers.complete(self.barrier)


@dataclass
class Save:
    """Under way, to global memory."""

    thread: int
    group: int
    parts: Parts
    read: np.ndarray  # granules


class Loads:
    """Of a batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.under_way: list[Load] = []

    def step(self) -> bool:
        """Ends one that a warp waits for; is there one?"""
        wanted = {id(barrier) for barrier in self.batch.mbarriers.waited_for()}
        found = [i for i, load in enumerate(self.under_way) if id(load.barrier) in wanted]
        if not found:
            return False
        order = self.batch.launch.order
        chosen = {"reverse": found[-1], "random": self.batch.generator.choice(found)}.get(order, found[0])
        self.under_way.pop(chosen).end()
        return True


class Saves:
    """Of a team."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.under_way: list[Save] = []
        self.committed = np.zeros(team.size, np.int64)

    def wait(self, threads: np.ndarray, left: int) -> None:
        team = self.team
        limit = np.full(team.size, -1, np.int64)
        limit[threads] = self.committed[threads] - left
        for save in [save for save in self.under_way if save.group < limit[save.thread]]:
            self.under_way.remove(save)
            team.batch.shadow.end_read(team, save.thread >> 5, save.read)
            data = team.batch.shared[team.shared_start[save.thread] + save.parts.places]
            for rows, buffer, places in save.parts.accesses(team, save.thread, write=True):
                buffer.bytes[places[:, None] + np.arange(save.parts.bytes)] = data[rows, save.parts.columns]


def tensor_map(team: Team, thread: int, address: int) -> TensorMap:
    if address % 64:
        raise Fault(f"{team.who(np.array([thread]))}: a tensor map at {address:#x}, which is no multiple of 64")
    if address >= PARAMETERS:
        start = address - PARAMETERS
        data = team.batch.launch.parameters[start : start + MAP_BYTES]
    else:
        one = np.array([thread]), np.array([address], np.uint64), MAP_BYTES
        ((buffer, _, (start,)),) = global_accesses(team, *one, write=False, align=64)
        data = buffer.bytes[start : start + MAP_BYTES]
    try:
        return unpack(data.tobytes())
    except ValueError as error:
        raise Fault(f"{team.who(np.array([thread]))}: {error}") from None


def _box_parts(box: Box, rank: int, instruction: Instruction):
    """What gives a thread's Parts."""
    if not isinstance(box, Box) or len(box.coordinates) != rank or box.map.offset:
        raise PtxError(f"{instruction}: a tensor map and {rank} coordinates were expected")
    read_map = address_reader(box.map, "global", instruction)
    read = [reader(x, "s32", instruction) for x in box.coordinates]

    def parts(team: Team, thread: int, start: int) -> Parts:
        found = tensor_map(team, thread, int(read_map(team)[thread]))
        if len(found.sizes) != rank:
            raise Fault(f"{team.who(np.array([thread]))}: a tensor map of {len(found.sizes)} dimensions")
        if start % 128:
            raise Fault(f"{team.who(np.array([thread]))}: a box at byte {start}, which is no multiple of 128")
        corner = tuple(int(np.broadcast_to(x(team), team.size)[thread]) for x in read)
        addresses, inside, low, high = found.rows(corner)
        number = found.number
        first = (addresses + low * number).astype(np.uint64)
        return Parts(found.places(start), first, inside, low * number, (high - low) * number)

    return parts


def _byte_parts(address: Address, size, instruction: Instruction):
    read, count = address_reader(address, "global", instruction), reader(size, "u32", instruction)

    def parts(team: Team, thread: int, start: int) -> Parts:
        bytes_ = int(np.broadcast_to(count(team), team.size)[thread])
        first = read(team)[thread : thread + 1]
        if bytes_ % UNIT or start % UNIT or first[0] % UNIT or not bytes_:
            text = f"{bytes_} bytes from {first[0]:#x} and byte {start} of shared memory"
            raise Fault(f"{team.who(np.array([thread]))}: {text}: not all are multiples of {UNIT}")
        return Parts(start + np.arange(bytes_)[None], first, np.array([True]), 0, bytes_)

    return parts


def _units(team: Team, thread: int, parts: Parts, instruction: Instruction) -> tuple[np.ndarray, np.ndarray]:
    """(threads, places in the batch's shared memory), of each 16 bytes; after the check of bounds."""
    starts = parts.places[:, ::UNIT].ravel()
    whole = len(starts) // 8 * 8
    for units in (starts[:whole].reshape(-1, 8), starts[None, whole:]):  # 128 bytes at once
        if units.size:
            note_conflicts(team, instruction, *wavefronts_of_units(units))
    threads = np.full(len(starts), thread)
    return threads, shared_places(team, threads, starts, UNIT)


def _load(rank: int) -> Decode:
    """cp.async.bulk.tensor [shared], [map, {coordinates}], [mbarrier]; rank 0: [shared], [global], bytes, [mbarrier]"""

    def decode(instruction: Instruction) -> Step:
        destination, source, *size, barrier = instruction.operands
        to, read_barrier = (address_reader(x, "shared", instruction) for x in (destination, barrier))
        if len(size) != (rank == 0):
            raise PtxError(f"{instruction}: operands that are not known")
        parts_of = _box_parts(source, rank, instruction) if rank else _byte_parts(source, *size, instruction)

        def step(team: Team, mask: np.ndarray | None) -> None:
            batch, starts, barriers = team.batch, to(team), read_barrier(team)
            for thread in team.chosen(mask).tolist():
                row, one = thread >> 5, np.array([thread])
                parts = parts_of(team, thread, int(starts[thread]))
                place = shared_places(team, one, barriers[one], MBARRIER_BYTES)
                found = batch.mbarriers.at(team, row, int(barriers[thread]))
                batch.shadow.use_barrier(team, one, place, MBARRIER_BYTES)
                warp, clock = found.init
                if not found.init_fenced and batch.fenced[team.block[row], team.warp[row], warp] < clock:
                    batch.launch.counts.unfenced_barriers += 1
                threads, units = _units(team, thread, parts, instruction)
                batch.shadow.begin_bulk(team, threads, units, UNIT)
                for _ in parts.accesses(team, thread, write=False):
                    pass  # the checks
                parts.note(team, copied=True)
                batch.shared[team.shared_start[thread] + parts.places] = 0xFF
                found.copies += 1
                batch.loads.under_way.append(Load(team, thread, found, parts, units))

        return step

    return decode


def _save(rank: int) -> Decode:
    """cp.async.bulk.tensor [map, {coordinates}], [shared]; rank 0: [global], [shared], bytes"""

    def decode(instruction: Instruction) -> Step:
        destination, source, *size = instruction.operands
        from_ = address_reader(source, "shared", instruction)
        if len(size) != (rank == 0):
            raise PtxError(f"{instruction}: operands that are not known")
        parts_of = _box_parts(destination, rank, instruction) if rank else _byte_parts(destination, *size, instruction)

        def step(team: Team, mask: np.ndarray | None) -> None:
            starts = from_(team)
            for thread in team.chosen(mask).tolist():
                parts = parts_of(team, thread, int(starts[thread]))
                if parts.bytes % team.batch.launch.program.global_granule:
                    raise PtxError(f"{instruction}: numbers that are smaller than any that st stores are not known")
                read = team.batch.shadow.begin_read(team, *_units(team, thread, parts, instruction), UNIT)
                parts.note(team, copied=False)
                team.saves.under_way.append(Save(thread, int(team.saves.committed[thread]), parts, read))

        return step

    return decode


def _commit(instruction: Instruction) -> Step:
    def step(team: Team, mask: np.ndarray | None) -> None:
        team.saves.committed[team.chosen(mask)] += 1

    return step


def _wait(instruction: Instruction) -> Step:
    """With .read as without: the data are in global memory at once."""
    (left,) = instruction.operands
    if not isinstance(left, Immediate):
        raise PtxError(f"{instruction}: an immediate was expected")
    groups = int(immediate(left, "u32", instruction))
    return lambda team, mask: team.saves.wait(team.chosen(mask), groups)


def _prefetch(instruction: Instruction) -> Step:
    (address,) = instruction.operands
    read = address_reader(address, "global", instruction)

    def step(team: Team, mask: np.ndarray | None) -> None:
        for thread in team.chosen(mask).tolist():
            tensor_map(team, thread, int(read(team)[thread]))

    return step


for _space in ("shared::cta", "shared::cluster"):  # without clusters the same
    TABLE[f"cp.async.bulk.{_space}.global.mbarrier::complete_tx::bytes"] = _load(0)
    for _rank in range(1, 6):
        for _tile in ("", ".tile"):
            TABLE[f"cp.async.bulk.tensor.{_rank}d.{_space}.global{_tile}.mbarrier::complete_tx::bytes"] = _load(_rank)
            TABLE[f"cp.async.bulk.tensor.{_rank}d.global.shared::cta{_tile}.bulk_group"] = _save(_rank)
TABLE["cp.async.bulk.global.shared::cta.bulk_group"] = _save(0)
TABLE["cp.async.bulk.commit_group"] = _commit
TABLE["cp.async.bulk.wait_group"] = _wait
TABLE["cp.async.bulk.wait_group.read"] = _wait
TABLE["prefetch.tensormap"] = _prefetch
