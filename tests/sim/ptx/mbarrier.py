"""mbarrier objects in shared memory: phases, arrivals, transaction counts; and the fences of the async proxy.

A warp that waits in vain gets False once, and then does not run until the phase is complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .checks import WARP_BITS
from .faults import Fault
from .memory import address_reader, shared_places
from .parse import Instruction, PtxError, Sink
from .table import Decode, Step
from .values import reader, writer

if TYPE_CHECKING:
    from .machine import Batch, Team

TABLE: dict[str, Decode] = {}
BYTES = 8
MOST = 2**20 - 1  # arrivals and bytes of a phase


@dataclass
class Mbarrier:
    block: int
    byte: int  # of the block's shared memory
    writer: int  # its number among those that write the block's shared memory, behind the warps
    count: int  # arrivals of a phase
    clock: int  # of what its bulk copies write in this phase
    init: tuple[int, int]  # warp and clock of its initialization
    known: np.ndarray  # by those who arrived: clocks, and fenced clocks
    fenced: np.ndarray
    phase: int = 0
    missing: int = 0  # arrivals
    bytes: int = 0  # that are expected and have not come
    copies: int = 0  # under way
    init_fenced: bool = False
    before: tuple[np.ndarray, np.ndarray] | None = None  # `known` and `fenced` of the phase before
    waiting: set[int] = field(default_factory=set)  # warps

    def __str__(self) -> str:
        text = f"the mbarrier at byte {self.byte}, in phase {self.phase}, lacks {self.missing} of {self.count} arrivals"
        return f"{text} and {self.bytes} bytes"


class Mbarriers:
    """Of a batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.valid: dict[tuple[int, int], Mbarrier] = {}  # by block and byte
        self.writers: dict[tuple[int, int], tuple[int, int]] = {}  # number and clock, of all that were ever there

    def init(self, team: Team, row: int, byte: int, count: int) -> None:
        batch, block, warp = self.batch, int(team.block[row]), int(team.warp[row])
        place = block, byte
        if not 1 <= count <= MOST:
            raise Fault(f"{team.who_of_row(row)}: an mbarrier of {count} arrivals")
        new = batch.warps + sum(block == other for other, _ in self.writers)
        if place not in self.writers and new >= 2**WARP_BITS:
            raise PtxError(f"more than {2**WARP_BITS - batch.warps} mbarriers in a block are not known")
        number, clock = self.writers.setdefault(place, (new, 1))
        clocks, fenced = batch.clocks[block, warp], batch.fenced[block, warp]
        nothing = np.zeros_like(clocks), np.zeros_like(fenced)
        self.valid[place] = Mbarrier(*place, number, count, clock, (warp, int(clocks[warp])), *nothing, missing=count)

    def inval(self, team: Team, row: int, byte: int) -> None:
        barrier = self.at(team, row, byte)
        if barrier.copies or barrier.waiting:
            raise Fault(f"{team.who_of_row(row)}: {barrier}, and is in use")
        self.writers[barrier.block, byte] = barrier.writer, barrier.clock
        del self.valid[barrier.block, byte]

    def at(self, team: Team, row: int, byte: int) -> Mbarrier:
        barrier = self.valid.get((int(team.block[row]), byte))
        if barrier is None:
            raise Fault(f"{team.who_of_row(row)}: at byte {byte} is no mbarrier that is initialized")
        return barrier

    def expect(self, team: Team, row: int, barrier: Mbarrier, count: int) -> None:
        barrier.bytes += count
        if not -MOST <= barrier.bytes <= MOST:
            raise Fault(f"{team.who_of_row(row)}: {barrier}: more than {MOST} can't be counted")

    def arrive(self, team: Team, row: int, barrier: Mbarrier, count: int) -> None:
        if not 1 <= count <= barrier.missing:
            raise Fault(f"{team.who_of_row(row)}: {count} arrivals; {barrier}")
        batch, block, warp = self.batch, barrier.block, int(team.warp[row])
        np.maximum(barrier.known, batch.clocks[block, warp], out=barrier.known)
        np.maximum(barrier.fenced, batch.fenced[block, warp], out=barrier.fenced)
        batch.clocks[block, warp, warp] += 1
        barrier.missing -= count
        self.complete(barrier)

    def complete(self, barrier: Mbarrier) -> None:
        """The phase, if nothing is missing."""
        if barrier.missing or barrier.bytes:
            return
        if barrier.copies:
            raise Fault(f"{barrier}: it is complete, but copies to it are under way: it expected too few bytes")
        barrier.known[barrier.writer] = barrier.clock
        barrier.before = barrier.known.copy(), barrier.fenced.copy()
        barrier.phase += 1
        barrier.clock += 1
        barrier.missing = barrier.count
        self.wake(barrier)

    def wake(self, barrier: Mbarrier) -> None:
        for warp in barrier.waiting:
            self.batch.waiting[barrier.block, warp] = False
        barrier.waiting.clear()

    def wait(self, team: Team, row: int, barrier: Mbarrier, is_over: bool) -> None:
        """A warp goes on, with what is known, or does not run until the phase is complete."""
        block, warp = barrier.block, int(team.warp[row])
        if not is_over:
            barrier.waiting.add(warp)
            self.batch.waiting[block, warp] = True
        elif barrier.before:
            for mine, known in zip((self.batch.clocks, self.batch.fenced), barrier.before, strict=True):
                np.maximum(mine[block, warp], known, out=mine[block, warp])

    def waited_for(self) -> list[Mbarrier]:
        return [barrier for barrier in self.valid.values() if barrier.waiting]


def groups(team: Team, threads: np.ndarray, addresses: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """(row, byte, which of the threads), of each mbarrier that a warp names."""
    keys = (threads >> 5) << 32 | addresses
    for key in np.unique(keys):
        yield int(key) >> 32, int(key) & 0xFFFFFFFF, np.flatnonzero(keys == key)


def use(team: Team, threads: np.ndarray, addresses: np.ndarray) -> Iterator[tuple[int, Mbarrier, np.ndarray]]:
    """As groups, of those that are initialized; after the checks."""
    places = shared_places(team, threads, addresses, BYTES)
    for row, byte, which in groups(team, threads, addresses):
        barrier = team.batch.mbarriers.at(team, row, byte)
        team.batch.shadow.use_barrier(team, threads[which[:1]], places[which[:1]], BYTES)
        yield row, barrier, which


def _make(instruction: Instruction, change) -> Step:
    """init and inval; change: (team, row, byte, count)"""
    address, *rest = instruction.operands
    read = address_reader(address, "shared", instruction)
    (count,) = [reader(x, "u32", instruction) for x in rest] or [lambda team: np.uint32(0)]

    def step(team: Team, mask: np.ndarray | None) -> None:
        threads = team.chosen(mask)
        addresses, counts = read(team)[threads], np.broadcast_to(count(team), team.size)[threads]
        places = shared_places(team, threads, addresses, BYTES)
        for row, byte, which in groups(team, threads, addresses):
            if len(which) > 1:
                raise Fault(f"{team.who_of_row(row)}: {instruction.opcode} of one place by {len(which)} lanes")
            change(team, threads[which], places[which], row, byte, int(counts[which[0]]))

    return step


def _init(instruction: Instruction) -> Step:
    def change(team: Team, thread: np.ndarray, place: np.ndarray, row: int, byte: int, count: int) -> None:
        team.batch.shadow.begin_barrier(team, thread, place, BYTES)
        team.batch.mbarriers.init(team, row, byte, count)

    return _make(instruction, change)


def _inval(instruction: Instruction) -> Step:
    def change(team: Team, thread: np.ndarray, place: np.ndarray, row: int, byte: int, count: int) -> None:
        team.batch.mbarriers.inval(team, row, byte)
        team.batch.shadow.end_barrier(team, thread, place, BYTES)

    return _make(instruction, change)


def _arrive(expects: bool) -> Decode:
    """mbarrier.arrive state, [barrier]{, count}; mbarrier.arrive.expect_tx state, [barrier], bytes"""

    def decode(instruction: Instruction) -> Step:
        state, address, *rest = instruction.operands
        if len(rest) != 1 and (expects or rest):
            raise PtxError(f"{instruction}: operands that are not known")
        write = None if isinstance(state, Sink) else writer(state, "b64", instruction)
        read = address_reader(address, "shared", instruction)
        number = reader(rest[0], "u32", instruction) if rest else lambda team: np.uint32(1)

        def step(team: Team, mask: np.ndarray | None) -> None:
            threads, barriers = team.chosen(mask), team.batch.mbarriers
            numbers = np.broadcast_to(number(team), team.size)[threads].astype(np.int64)
            states = np.zeros(team.size, np.uint64)
            for row, barrier, which in use(team, threads, read(team)[threads]):
                states[threads[which]] = barrier.phase
                if expects:
                    barriers.expect(team, row, barrier, int(numbers[which].sum()))
                barriers.arrive(team, row, barrier, len(which) if expects else int(numbers[which].sum()))
            if write:
                write(team, states, mask)

        return step

    return decode


def _expect(instruction: Instruction) -> Step:
    address, count = instruction.operands
    read, number = address_reader(address, "shared", instruction), reader(count, "u32", instruction)

    def step(team: Team, mask: np.ndarray | None) -> None:
        threads = team.chosen(mask)
        numbers = np.broadcast_to(number(team), team.size)[threads].astype(np.int64)
        for row, barrier, which in use(team, threads, read(team)[threads]):
            team.batch.mbarriers.expect(team, row, barrier, int(numbers[which].sum()))

    return step


def _wait(parity: bool) -> Decode:
    """[test|try]_wait{.parity} done, [barrier], state or parity{, how long: not used}"""

    def decode(instruction: Instruction) -> Step:
        done, address, state, *hint = instruction.operands
        if len(hint) > (".try_wait" in instruction.opcode):
            raise PtxError(f"{instruction}: operands that are not known")
        write, read = writer(done, "pred", instruction), address_reader(address, "shared", instruction)
        phase = reader(state, "u32" if parity else "u64", instruction)

        def step(team: Team, mask: np.ndarray | None) -> None:
            threads = team.chosen(mask)
            phases = np.broadcast_to(phase(team), team.size)[threads].astype(np.int64)
            if parity and (phases > 1).any():
                raise Fault(f"{team.who(threads, phases > 1)}: a parity of {phases.max()}")
            result = np.zeros(team.size, np.bool_)
            for row, barrier, which in use(team, threads, read(team)[threads]):
                now = barrier.phase % 2 if parity else barrier.phase
                if not parity and (wrong := (phases[which] > now) | (phases[which] < now - 1)).any():
                    raise Fault(f"{team.who(threads[which], wrong)}: {barrier}, and the state is not of it or the last")
                over = phases[which] != now
                result[threads[which]] = over
                team.batch.mbarriers.wait(team, row, barrier, bool(over.all()))
            write(team, result, mask)

        return step

    return decode


def _fence_proxy(instruction: Instruction) -> Step:
    """What the warp knows of, the async proxy may now see."""

    def step(team: Team, mask: np.ndarray | None) -> None:
        rows = np.unique(team.chosen(mask) >> 5)
        batch, blocks, warps = team.batch, team.block[rows], team.warp[rows]
        known = batch.clocks[blocks, warps, : batch.warps]
        batch.fenced[blocks, warps] = np.maximum(batch.fenced[blocks, warps], known)
        batch.clocks[blocks, warps, warps] += 1

    return step


def _fence_init(instruction: Instruction) -> Step:
    def step(team: Team, mask: np.ndarray | None) -> None:
        rows = np.unique(team.chosen(mask) >> 5)
        warps = {(int(team.block[row]), int(team.warp[row])) for row in rows}
        for barrier in team.batch.mbarriers.valid.values():
            barrier.init_fenced |= (barrier.block, barrier.init[0]) in warps

    return step


for _space in ("shared", "shared::cta"):
    TABLE[f"mbarrier.init.{_space}.b64"] = _init
    TABLE[f"mbarrier.inval.{_space}.b64"] = _inval
    TABLE[f"mbarrier.expect_tx.relaxed.cta.{_space}.b64"] = _expect
    for _order in ("", ".release.cta"):
        TABLE[f"mbarrier.arrive{_order}.{_space}.b64"] = _arrive(False)
        TABLE[f"mbarrier.arrive.expect_tx{_order}.{_space}.b64"] = _arrive(True)
    for _kind in ("test_wait", "try_wait"):
        for _order in ("", ".acquire.cta"):
            TABLE[f"mbarrier.{_kind}{_order}.{_space}.b64"] = _wait(False)
            TABLE[f"mbarrier.{_kind}.parity{_order}.{_space}.b64"] = _wait(True)
for _space in ("", ".shared::cta", ".shared::cluster"):
    TABLE[f"fence.proxy.async{_space}"] = _fence_proxy
TABLE["fence.mbarrier_init.release.cluster"] = _fence_init
