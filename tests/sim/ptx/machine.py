"""Runs a kernel: blocks in batches, their warps in teams that go in lock step, barriers, orders.

A team is a set of warps whose threads are the elements of numpy arrays: all warps of a batch ("together"), or the warps
of one number of all its blocks ("forward", "reverse", "random"), of which one runs until it must wait, then another.
Threads of a team may be at different places of the kernel: see flow.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from . import checks
from .asynchronous import Copies
from .bulk import Loads, Saves
from .faults import Fault
from .flow import BARRIERS
from .mbarrier import Mbarriers
from .memory import Memory
from .parse import Immediate, Instruction, PtxError
from .program import Code, Program
from .values import STORAGE, immediate, reader
from .warpgroup import Wgmma

ORDERS = ("together", "forward", "reverse", "random")
POISON = {"pred": False, "b16": 0x7FFF, "b32": 0x7FFF7FFF, "b64": 0x7FFF7FFF7FFF7FFF}  # of registers: NaN
DONE = np.iinfo(np.int32).max  # the place of a thread that has returned
MOST_THREADS = 2048  # of a batch


@dataclass
class Launch:
    """A kernel with its grid and arguments."""

    program: Program
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    dynamic_shared: int
    parameters: np.ndarray  # bytes
    memory: Memory
    order: str = "together"
    seed: int = 0
    counts: checks.Counts = field(default_factory=checks.Counts)

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order is one of {', '.join(ORDERS)}, got {self.order}")
        self.block_threads = int(np.prod(self.threads))
        if self.block_threads % 32 or not 32 <= self.block_threads <= 1024:
            raise ValueError(f"blocks of {self.block_threads} threads, which are no whole warps, or too many")
        if len(self.parameters) != self.program.parameter_bytes:
            raise ValueError(f"{len(self.parameters)} bytes of parameters, {self.program.parameter_bytes} wanted")
        self.parameters = np.concatenate([self.parameters, np.zeros(-len(self.parameters) % 16, np.uint8)])
        self.shared_bytes = self.program.static_shared + self.dynamic_shared

    def run(self) -> checks.Counts:
        blocks = list(range(int(np.prod(self.grid))))
        generator = random.Random(self.seed)
        if self.order == "reverse":
            blocks.reverse()
        elif self.order == "random":
            generator.shuffle(blocks)
        at_once = max(MOST_THREADS // self.block_threads, 1)
        with np.errstate(all="ignore"):
            for start in range(0, len(blocks), at_once):
                Batch(self, blocks[start : start + at_once], generator).run()
        return self.counts

    def name_of_block(self, block: int) -> str:
        x, y, _ = self.grid
        return f"({block % x}, {block // x % y}, {block // (x * y)})"

    def memory_near(self, address: int) -> str:
        """Where an address is, for messages."""
        buffers = self.memory.buffers
        if not buffers:
            return "of which there is none"
        near = min(buffers, key=lambda b: max(b.start - address, address - b.end, 0))
        return f"at byte {address - near.start} of the {near.end - near.start} of {near.name}, the nearest"


class Barrier:
    def __init__(self, expected: int) -> None:
        self.expected = expected  # threads
        self.arrived: list[int] = []  # warps
        self.waiting: list[int] = []


class Batch:
    """Blocks that run at the same time."""

    def __init__(self, launch: Launch, blocks: list[int], generator: random.Random) -> None:
        self.launch, self.generator = launch, generator
        self.grid_blocks = np.array(blocks)
        self.blocks, self.warps = len(blocks), launch.block_threads // 32
        self.shared_size = -(-launch.shared_bytes // 16) * 16
        self.shared = np.full(self.blocks * self.shared_size, 0xFF, np.uint8)
        self.shadow = checks.SharedShadow(self, self.shared_size, launch.program.shared_granule)
        # clocks[b, w, v]: up to which clock of warp v of block b warp w knows that it has run; [b, w, w] is its own.
        # Behind the warps stand mbarriers, for what bulk copies write. fenced: the same, of what the async proxy sees.
        writers = 2**checks.WARP_BITS if launch.program.has_mbarriers else self.warps
        self.clocks = np.zeros((self.blocks, self.warps, writers), np.int32)
        self.fenced = np.zeros((self.blocks, self.warps, self.warps), np.int32)
        self.clocks[:, range(self.warps), range(self.warps)] = 1
        self.waiting = np.zeros((self.blocks, self.warps), np.bool_)
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.mbarriers, self.loads = Mbarriers(self), Loads(self)
        self.wgmma_logs: dict[tuple[int, int], list] = {}  # of each warpgroup
        self.register_counts = np.zeros((self.blocks, self.warps), np.int64)  # that setmaxnreg asked for
        numbers = np.arange(self.blocks)
        if launch.order == "together":
            places = [(np.repeat(numbers, self.warps), np.tile(np.arange(self.warps), self.blocks))]
        else:
            places = [(numbers, np.full(self.blocks, warp)) for warp in range(self.warps)]
        self.teams = [Team(self, *place) for place in places]

    def run(self) -> None:
        order = self.launch.order
        while remaining := [team for team in self.teams if not team.done]:
            if order == "random":
                self.generator.shuffle(remaining)
            progress = False
            for team in reversed(remaining) if order == "reverse" else remaining:
                progress |= team.run(self.generator.randrange(1, 40) if order == "random" else None)
                if progress and order == "random":
                    break
            if not progress and not self.loads.step():
                self.deadlock()
        self.check_end()

    def check_end(self) -> None:
        for (block, name), barrier in self.barriers.items():
            if barrier.arrived:
                raise Fault(
                    f"block {self.launch.name_of_block(self.grid_blocks[block])} ends while warps "
                    f"{barrier.arrived} have arrived at barrier {name}, of {barrier.expected} threads"
                )
        if self.loads.under_way:
            raise Fault(f"{self.loads.under_way[0].barrier}: the kernel ends while copies to it are under way")
        for team in self.teams:
            if team.saves.under_way:
                who = team.who(np.array([team.saves.under_way[0].thread]))
                raise Fault(f"{who} ends without a wait for its bulk copies to global memory")
            if team.wgmma.under_way:
                who = team.who_of_row(int(team.wgmma.under_way[0].rows[0]))
                raise Fault(f"{who} ends without a wait for its wgmma")
            for row, count in enumerate(team.wgmma.runs.tolist()):
                group = int(team.block[row]), int(team.warp[row]) // 4
                if count != len(self.wgmma_logs.get(group, ())):
                    raise Fault(f"{team.who_of_row(row)} runs fewer wgmma than others of its warpgroup")

    def deadlock(self) -> None:
        texts = []
        for (block, name), barrier in self.barriers.items():
            if barrier.arrived:
                where = self.launch.name_of_block(self.grid_blocks[block])
                texts.append(f"block {where}: barrier {name} of {barrier.expected} threads has warps {barrier.arrived}")
        for mbarrier in self.mbarriers.waited_for():
            where = self.launch.name_of_block(self.grid_blocks[mbarrier.block])
            texts.append(f"block {where}: warps {sorted(mbarrier.waiting)} wait for {mbarrier}")
        raise Fault("deadlock: " + "; ".join(texts[:8]))

    def arrive(self, team: Team, rows: np.ndarray, names: np.ndarray, expected: np.ndarray, wait: bool) -> None:
        """Warps of a team come to a barrier; where it is complete, those that wait there go on."""
        for row, name, count in zip(rows.tolist(), names.tolist(), expected.tolist(), strict=True):
            block, warp = int(team.block[row]), int(team.warp[row])
            barrier = self.barriers.setdefault((block, name), Barrier(count))
            if not barrier.arrived:
                barrier.expected = count
            if count % 32 or count != barrier.expected or not 0 <= name < 16:
                raise Fault(
                    f"{team.who(np.array([row * 32]))}: barrier {name} of {count} threads, where others wait "
                    f"for {barrier.expected}"
                )
            if warp in barrier.arrived:
                raise Fault(f"{team.who(np.array([row * 32]))} comes to barrier {name} a second time")
            barrier.arrived.append(warp)
            if wait:
                barrier.waiting.append(warp)
                self.waiting[block, warp] = True
            if 32 * len(barrier.arrived) >= count:
                self._complete(block, barrier)

    def _complete(self, block: int, barrier: Barrier) -> None:
        clocks = self.clocks[block]
        known = clocks[barrier.arrived].max(0)
        clocks[barrier.waiting] = known
        self.fenced[block, barrier.waiting] = self.fenced[block, barrier.arrived].max(0)
        clocks[barrier.arrived, barrier.arrived] += 1
        self.waiting[block, barrier.waiting] = False
        barrier.arrived, barrier.waiting = [], []


class Team:
    """Warps in lock step; the elements of its arrays are their threads."""

    def __init__(self, batch: Batch, block: np.ndarray, warp: np.ndarray) -> None:
        """block, warp: (rows,), of each warp its block in the batch and its number in the block."""
        launch = batch.launch
        self.batch, self.block, self.warp = batch, block, warp
        self.grid_block = batch.grid_blocks[block].astype(np.int32)
        self.size = 32 * len(block)
        self.shared_start = np.repeat(block.astype(np.int64) * batch.shared_size, 32)
        self.registers = [
            np.full(self.size, POISON[register.kind], STORAGE[register.kind])
            for register in launch.program.kernel.registers
        ]
        self.where = np.zeros(self.size, np.int32)  # a thread's block in the program
        self.together: int | None = 0  # the same, where it is one of all threads
        self.done = False
        self.copies, self.saves = Copies(self), Saves(self)
        self.wgmma = Wgmma(self, [register.name for register in launch.program.wgmma_registers])
        self.all_threads = np.arange(self.size)
        self._special: dict[str, np.ndarray] = {}
        number = np.tile(np.arange(32), len(block)) + np.repeat(warp, 32) * 32
        x, y, _ = launch.threads
        grid = np.repeat(self.grid_block, 32)
        gx, gy, _ = launch.grid
        values = {"tid": (number % x, number // x % y, number // (x * y)), "ntid": launch.threads}
        values |= {"ctaid": (grid % gx, grid // gx % gy, grid // (gx * gy)), "nctaid": launch.grid}
        for name, parts in values.items():
            for axis, part in zip("xyz", parts, strict=True):
                self._special[f"%{name}.{axis}"] = np.broadcast_to(np.asarray(part), self.size).astype(np.uint32)
        self._special["%laneid"] = (number % 32).astype(np.uint32)

    def special(self, name: str) -> np.ndarray:
        if name not in self._special:
            raise PtxError(f"{name} is not known")
        return self._special[name]

    def chosen(self, mask: np.ndarray | None) -> np.ndarray:
        """The numbers of the threads in a mask."""
        return self.all_threads if mask is None else np.flatnonzero(mask)

    def who(self, threads: np.ndarray, which: np.ndarray | None = None) -> str:
        """The first of these threads, for messages."""
        thread = int(threads[which][0]) if which is not None else int(threads[0])
        row = thread >> 5
        block = self.batch.launch.name_of_block(int(self.grid_block[row]))
        return f"block {block}, warp {self.warp[row]}, lane {thread & 31}"

    def who_of_row(self, row: int) -> str:
        return f"block {self.batch.launch.name_of_block(int(self.grid_block[row]))}, warp {self.warp[row]}"

    def run(self, most_blocks: int | None = None) -> bool:
        """Until nothing of it can go on, or so many blocks of code; did anything run?"""
        code = self.batch.launch.program.blocks
        ran = 0
        while most_blocks is None or ran < most_blocks:
            mask: np.ndarray | None = None
            waiting = self.batch.waiting[self.block, self.warp]
            if self.together is not None and not waiting.any():
                place = self.together
                if place == DONE:
                    self.done = True
                    break
            else:
                if self.together is not None:
                    self.where[:] = self.together
                    self.together = None
                where = np.where(np.repeat(waiting, 32), DONE, self.where) if waiting.any() else self.where
                place = int(where.min())
                if place == DONE:
                    self.done = not waiting.any()
                    break
                mask = where == place
                if mask.all():
                    self.together, mask = place, None
            self._run_block(code[place], mask)
            ran += 1
        return ran > 0 or self.done

    def _run_block(self, code: Code, mask: np.ndarray | None) -> None:
        current = None
        try:
            for instruction, step, guard, wanted in code.steps:
                current = instruction
                if guard is None:
                    step(self, mask)
                    continue
                chosen = self.registers[guard] if wanted else ~self.registers[guard]
                if mask is not None:
                    chosen = chosen & mask
                if chosen.any():
                    step(self, None if chosen.all() else chosen)
            self.batch.launch.counts.steps += len(code.steps)
            current = code.block.end
            self._end_block(code, mask)
        except Fault as fault:
            raise Fault(f"{self.batch.launch.program.kernel.name}: {fault}; {current}") from None

    def _end_block(self, code: Code, mask: np.ndarray | None) -> None:
        block, end = code.block, code.block.end
        if end is None:
            self._go(block.following, mask)
        elif end.opcode in BARRIERS:
            self._go(block.following, mask)
            self._barrier(end, mask)
        else:
            target = block.target if end.opcode.startswith("bra") else DONE
            if code.guard is None:
                self._go(target, mask)
                return
            taken = self.registers[code.guard] if code.wanted else ~self.registers[code.guard]
            if mask is None and taken.all():
                self._go(target, None)
            elif mask is None and not taken.any():
                self._go(block.following, None)
            else:
                if self.together is not None:
                    self.where[:] = self.together
                    self.together = None
                next_place = np.where(taken, np.int32(target), np.int32(block.following))
                self.where = next_place if mask is None else np.where(mask, next_place, self.where)

    def _go(self, place: int, mask: np.ndarray | None) -> None:
        if mask is None:
            self.together = place
        else:
            self.where[mask] = place

    def _barrier(self, instruction: Instruction, mask: np.ndarray | None) -> None:
        from .warp import whole_warps

        rows = whole_warps(self, mask, instruction.opcode)
        numbers = []
        for operand in instruction.operands:
            if isinstance(operand, Immediate):
                values = np.full(len(rows), immediate(operand, "u32", instruction))
            else:
                values = reader(operand, "u32", instruction)(self).reshape(-1, 32)[rows]
                if (values != values[:, :1]).any():
                    raise Fault("the lanes of a warp name different barriers, or numbers of threads")
                values = values[:, 0]
            numbers.append(values.astype(np.int64))
        names, *counts = numbers
        expected = counts[0] if counts else np.full(len(rows), self.batch.launch.block_threads)
        self.batch.arrive(self, rows, names, expected, wait=instruction.opcode.endswith("sync"))
