"""wgmma: products of a warpgroup, four warps, which end when they are waited for; and setmaxnreg.

Each warp runs for itself its 16 of the 64 rows. Until a product is waited for, its registers can't be touched, and the
shared memory that it reads can't be written. Registers that something else has touched want a wgmma.fence before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .checks import wavefronts_of_units
from .faults import Fault
from .memory import note_conflicts, shared_places
from .parse import Immediate, Instruction, Pair, PtxError, Register, Vector
from .table import Decode, Step, vector
from .tensor_core import LANES, as_bf16, as_f16, as_tf32, place_a
from .tensor_map import swizzled
from .values import immediate, reader
from .warp import whole_warps

if TYPE_CHECKING:
    from .machine import Team

TABLE: dict[str, Decode] = {}
UNIT = 16  # bytes
SWIZZLES = {0: 0, 1: 3, 2: 2, 3: 1}  # the mode of a descriptor -> that of a tensor map
WIDTHS = {0: 1, 1: 8, 2: 4, 3: 2}  # the mode -> units that are permuted


@dataclass(frozen=True)
class Descriptor:
    """Of a matrix in shared memory; offsets in bytes."""

    start: int
    leading: int
    stride: int
    mode: int

    @staticmethod
    def of(bits: int) -> Descriptor:
        parts = Descriptor(*((bits >> shift & 0x3FFF) << 4 for shift in (0, 16, 32)), bits >> 62)
        known = parts.start >> 4 | parts.leading >> 4 << 16 | parts.stride >> 4 << 32 | parts.mode << 62
        if known != bits:
            raise Fault(f"a matrix descriptor {bits:#x} with a base offset, or bits that are not known")
        return parts

    def places(self, rows: np.ndarray, depth_bytes: int) -> np.ndarray:
        """K-major: of 16-byte units, (rows, units of the depth)."""
        pitch, units = WIDTHS[self.mode] * UNIT, np.arange(depth_bytes // UNIT)
        across = units * (UNIT if self.mode else self.leading)
        return self._at((rows % 8 * pitch + rows // 8 * self.stride)[:, None] + across)

    def places_transposed(self, rows: np.ndarray, depth: int) -> np.ndarray:
        """MN-major: of units of 8 rows, (units of `rows`, depth)."""
        width, units, k = WIDTHS[self.mode], rows[::8] // 8, np.arange(depth)
        if self.mode:
            along, across = units % width * UNIT + units // width * self.leading, k // 8 * self.stride
        else:
            along, across = units * self.stride, k // 8 * self.leading
        return self._at(along[:, None] + (k % 8 * width * UNIT + across))

    def _at(self, offsets: np.ndarray) -> np.ndarray:
        return swizzled(self.start + offsets, SWIZZLES[self.mode])


@dataclass(frozen=True)
class Kind:
    """An instruction's: its columns and depth, how its numbers are read, which operands are transposed."""

    opcode: str
    columns: int
    depth: int
    pair: int  # numbers in 4 bytes
    numbers: Callable
    sign: int  # of the products
    transposed_a: bool = False
    transposed_b: bool = False

    def places(self, bits: int, rows: np.ndarray, transposed: bool) -> np.ndarray:
        descriptor = Descriptor.of(bits)
        if transposed:
            return descriptor.places_transposed(rows, self.depth)
        return descriptor.places(rows, 4 * self.depth // self.pair)

    def cores(self, places: np.ndarray, transposed: bool) -> np.ndarray:
        """(core matrices, 8): which units are read together."""
        if transposed:
            return places.reshape(-1, 8)
        return places.reshape(-1, 8, places.shape[1]).swapaxes(1, 2).reshape(-1, 8)

    def matrix(self, units: np.ndarray, transposed: bool) -> np.ndarray:
        """(..., units of 16 bytes as `places` says, 16) -> (rows, depth)"""
        numbers = self.numbers(np.ascontiguousarray(units).view(np.uint32)).reshape(*units.shape[:2], -1)
        if transposed:
            return numbers.swapaxes(1, 2).reshape(-1, self.depth)
        return numbers.reshape(-1, self.depth)


@dataclass
class Product:
    """One instruction's, under way; arrays by warps."""

    kind: Kind
    rows: np.ndarray  # in the team
    groups: np.ndarray
    a: list  # of each, descriptor or (16, depth)
    b: list[int]
    adds: np.ndarray  # to what is in d, or not
    read: list[np.ndarray]  # granules
    d: list[int]  # registers
    used: np.ndarray  # places of registers among Wgmma.names

    def part(self, which: np.ndarray) -> Product:
        chosen = np.flatnonzero(which)
        lists = ([x[i] for i in chosen] for x in (self.a, self.b, self.read))
        a, b, read = lists
        return Product(self.kind, self.rows[which], self.groups[which], a, b, self.adds[which], read, self.d, self.used)


class Wgmma:
    """Of a team: which of the registers that its products name are under way, and touched since a wgmma.fence."""

    def __init__(self, team: Team, names: list[str]) -> None:
        self.team, self.names = team, names
        warps = team.size // 32
        self.under_way: list[Product] = []
        self.committed = np.zeros(warps, np.int64)
        self.shape = np.zeros((len(names), warps), np.int64)  # of the product that has the register; 0: none
        self.touched = np.ones((len(names), warps), np.bool_)
        self.runs = np.zeros(warps, np.int64)

    def touch(self, registers: np.ndarray, mask: np.ndarray | None) -> None:
        rows = slice(None) if mask is None else np.flatnonzero(mask.reshape(-1, 32).any(1))
        if self.under_way:
            busy = self.shape[registers][:, rows] != 0
            if busy.any():
                name = self.names[registers[np.flatnonzero(busy.any(1))[0]]]
                row = np.arange(len(self.runs))[rows][np.flatnonzero(busy.any(0))[0]]
                who = self.team.who_of_row(int(row))
                raise Fault(f"{who}: {name} is used by a wgmma that is under way: a wgmma.wait_group lacks")
        if mask is None:
            self.touched[registers] = True
        else:
            self.touched[np.ix_(registers, rows)] = True

    def begin(self, product: Product, accumulators: np.ndarray) -> None:
        rows, shape = product.rows, product.kind.columns
        places = np.ix_(product.used, rows)
        if self.touched[places].any():
            bad = self.touched[places]
            name = self.names[product.used[np.flatnonzero(bad.any(1))[0]]]
            who = self.team.who_of_row(int(rows[np.flatnonzero(bad.any(0))[0]]))
            raise Fault(f"{who}: {name} was used by another instruction: a wgmma.fence lacks")
        before = self.shape[np.ix_(accumulators, rows)]
        if ((before != 0) & (before != shape)).any():
            raise Fault("an accumulator of a wgmma of another shape, which is under way")
        self.shape[places] = shape
        self.under_way.append(product)

    def same_everywhere(self, row: int, what: tuple) -> None:
        """The warps of a warpgroup run the same."""
        team = self.team
        logs = team.batch.wgmma_logs.setdefault((int(team.block[row]), int(team.warp[row]) // 4), [])
        number = int(self.runs[row])
        self.runs[row] += 1
        if number == len(logs):
            logs.append((what, team.warp[row]))
        elif logs[number][0] != what:
            text = f"runs another wgmma than warp {logs[number][1]} of its warpgroup, or of another matrix"
            raise Fault(f"{team.who_of_row(row)} {text}")

    def wait(self, rows: np.ndarray, left: int) -> None:
        limit = np.full(len(self.committed), -1, np.int64)
        limit[rows] = self.committed[rows] - left
        still, changed = [], False
        for product in self.under_way:
            done = product.groups < limit[product.rows]
            if done.any():
                changed = True
                self.end(product if done.all() else product.part(done))
            if not done.all():
                still.append(product.part(~done) if done.any() else product)
        self.under_way = still
        if changed:
            self.shape[:] = 0
            for product in still:
                self.shape[np.ix_(product.used, product.rows)] = product.kind.columns

    def end(self, product: Product) -> None:
        team, kind, rows = self.team, product.kind, product.rows
        for row, read in zip(rows.tolist(), product.read, strict=True):
            team.batch.shadow.end_read(team, row, read)
        known: dict[tuple, np.ndarray] = {}

        def from_shared(row: int, bits: int, which: np.ndarray, transposed: bool) -> np.ndarray:
            key = int(team.block[row]), bits, int(which[0]), len(which), transposed
            if key not in known:
                places = kind.places(bits, which, transposed) + team.shared_start[row * 32]
                known[key] = kind.matrix(team.batch.shared[places[..., None] + np.arange(UNIT)], transposed)
            return known[key]

        results = np.empty((len(rows), 16, kind.columns))
        for i, row in enumerate(rows.tolist()):
            a = product.a[i]
            if not isinstance(a, np.ndarray):
                a = from_shared(row, a, own_rows(team, row), kind.transposed_a)
            results[i] = kind.sign * a @ from_shared(row, product.b[i], np.arange(kind.columns), kind.transposed_b).T
        registers = [team.registers[r].reshape(-1, 32) for r in product.d]
        old = np.stack([r[rows] for r in registers], 2).view(np.float32)  # (warps, lanes, registers)
        sums = results[:, D_ROWS[:, : len(registers)], D_COLUMNS[:, : len(registers)]]
        sums = (sums + np.where(product.adds[:, None, None], old, np.float32(0))).astype(np.float32).view(np.uint32)
        for i, r in enumerate(product.d):
            new = registers[i].copy()
            new[rows] = sums[:, :, i]
            team.registers[r] = new.ravel()


_NUMBER = np.arange(128)  # of a register of d
D_ROWS = (LANES // 4)[:, None] + 8 * (_NUMBER // 2 % 2)
D_COLUMNS = (LANES % 4 * 2)[:, None] + 8 * (_NUMBER // 4) + _NUMBER % 2


def own_rows(team: Team, row: int) -> np.ndarray:
    return int(team.warp[row]) % 4 * 16 + np.arange(16)


def registers_of(instruction: Instruction) -> list[Register]:
    """Those that it names, the guard and addresses not among them."""
    found = []
    for operand in instruction.operands:
        parts = operand.parts if isinstance(operand, Vector) else (operand,)
        parts = (operand.first, operand.second) if isinstance(operand, Pair) else parts
        found += [part for part in parts if isinstance(part, Register)]
    return found


def wgmma_registers(instructions: list[Instruction]) -> list[Register]:
    """Accumulators and fragments of the products among them."""
    used = {}
    for instruction in instructions:
        if instruction.opcode.startswith("wgmma.mma_async."):
            for operand in instruction.operands[:2]:
                used |= {part.index: part for part in operand.parts} if isinstance(operand, Vector) else {}
    return list(used.values())


def watched(step: Step, registers: np.ndarray) -> Step:
    """A step that names registers of products."""

    def both(team: Team, mask: np.ndarray | None) -> None:
        team.wgmma.touch(registers, mask)
        step(team, mask)

    return both


def _flag(operand, allowed: tuple[int, ...], instruction: Instruction) -> int:
    if not isinstance(operand, Immediate) or (value := int(immediate(operand, "s32", instruction))) not in allowed:
        raise PtxError(f"{instruction}: {operand} is not one of {allowed}")
    return value


def _uniform(team: Team, values: np.ndarray, rows: np.ndarray, what: str) -> np.ndarray:
    """(warps,) of what is the same in all lanes."""
    values = np.broadcast_to(values, team.size).reshape(-1, 32)[rows]
    if (values != values[:, :1]).any():
        raise Fault(f"the lanes of a warp have different {what}")
    return values[:, 0]


def _mma_async(columns: int, depth: int, pair: int, numbers) -> Decode:
    """d (64 x columns, float32) = a (64 x depth) b (depth x columns) {+ d}: summed in float64, rounded once."""
    rows_a, columns_a = place_a(depth, pair)

    def decode(instruction: Instruction) -> Step:
        d, a, b, scale_d, *flags = instruction.operands
        from_registers = isinstance(a, Vector)
        if len(flags) != 2 + (pair == 2) * (1 if from_registers else 2):
            raise PtxError(f"{instruction}: {len(flags) + 4} operands")
        signs = [_flag(x, (1, -1), instruction) for x in flags[:2]]
        transposed = [bool(_flag(x, (0, 1), instruction)) for x in flags[2:]]
        if from_registers:
            transposed.insert(0, False)
        kind = Kind(instruction.opcode, columns, depth, pair, numbers, signs[0] * signs[1], *transposed)
        registers = vector(d, columns // 2, instruction)
        if any(not isinstance(x, Register) or x.kind != "b32" for x in registers) or len(set(registers)) != len(
            registers
        ):
            raise PtxError(f"{instruction}: accumulators of 32 bits were expected, each once")
        read_b, adds = reader(b, "b64", instruction), reader(scale_d, "pred", instruction)
        read_a = [reader(x, "b32", instruction) for x in vector(a, 4, instruction)] if from_registers else None
        read_descriptor = None if from_registers else reader(a, "b64", instruction)
        used = [*registers, *(a.parts if from_registers else ())]

        def step(team: Team, mask: np.ndarray | None) -> None:
            warps = whole_warps(team, mask, instruction.opcode)
            if team.batch.warps % 4:
                raise Fault(f"{instruction.opcode} in a block of {team.batch.warps} warps")
            bs = _uniform(team, read_b(team), warps, "matrix descriptors").tolist()
            add = _uniform(team, adds(team), warps, "predicates")
            if from_registers:
                fragments = [np.broadcast_to(x(team), team.size).reshape(-1, 32)[warps] for x in read_a]
                matrices = np.empty((len(warps), 16, depth))
                matrices[:, rows_a, columns_a] = numbers(np.stack(fragments, 2))
                as_ = list(matrices)
            else:
                as_ = _uniform(team, read_descriptor(team), warps, "matrix descriptors").tolist()
            read = []
            for row, a_bits, b_bits, adding in zip(warps.tolist(), as_, bs, add.tolist(), strict=True):
                b_places = kind.places(b_bits, np.arange(columns), kind.transposed_b)
                cores = [kind.cores(b_places, kind.transposed_b)] if team.warp[row] % 4 == 0 else []  # once for all
                addresses = b_places.ravel()
                if not from_registers:
                    a_places = kind.places(a_bits, own_rows(team, row), kind.transposed_a)
                    cores.append(kind.cores(a_places, kind.transposed_a))
                    addresses = np.concatenate([addresses, a_places.ravel()])
                for units in cores:
                    note_conflicts(team, instruction, *wavefronts_of_units(units))
                threads = np.full(len(addresses), row * 32)
                places = shared_places(team, threads, addresses, UNIT)
                read.append(team.batch.shadow.begin_read(team, threads, places, UNIT))
                log = instruction.line, b_bits, None if from_registers else a_bits, adding
                team.wgmma.same_everywhere(row, log)
            places = np.array([team.batch.launch.program.wgmma_places[x.index] for x in used])
            groups = team.wgmma.committed[warps]
            indices = [x.index for x in registers]
            product = Product(kind, warps, groups, as_, bs, add, read, indices, places)
            team.wgmma.begin(product, places[: len(registers)])
            team.batch.launch.counts.add_mma(instruction.opcode, len(warps), 2 * 16 * columns * depth)

        return step

    return decode


def _fence(instruction: Instruction) -> Step:
    def step(team: Team, mask: np.ndarray | None) -> None:
        rows = whole_warps(team, mask, instruction.opcode)
        if team.wgmma:
            team.wgmma.touched[:, rows] = False

    return step


def _commit(instruction: Instruction) -> Step:
    def step(team: Team, mask: np.ndarray | None) -> None:
        team.wgmma.committed[whole_warps(team, mask, instruction.opcode)] += 1

    return step


def _wait(instruction: Instruction) -> Step:
    (left,) = instruction.operands
    groups = _flag(left, tuple(range(8)), instruction)
    return lambda team, mask: team.wgmma.wait(whole_warps(team, mask, instruction.opcode), groups)


def _set_registers(instruction: Instruction) -> Step:
    """The block's registers must suffice, once all of its warps have said how many they want."""
    (count,) = instruction.operands
    registers = _flag(count, tuple(range(24, 257, 8)), instruction)

    def step(team: Team, mask: np.ndarray | None) -> None:
        rows = whole_warps(team, mask, instruction.opcode)
        wanted = team.batch.register_counts
        wanted[team.block[rows], team.warp[rows]] = registers
        total = 32 * wanted.sum(1)
        if ((wanted > 0).all(1) & (total > 65536)).any():
            raise Fault(f"the warps of a block want {total.max()} registers, of 65536")

    return step


for _columns in range(8, 257, 8):
    _name = f"wgmma.mma_async.sync.aligned.m64n{_columns}"
    TABLE[f"{_name}k16.f32.f16.f16"] = _mma_async(_columns, 16, 2, as_f16)
    TABLE[f"{_name}k16.f32.bf16.bf16"] = _mma_async(_columns, 16, 2, as_bf16)
    TABLE[f"{_name}k8.f32.tf32.tf32"] = _mma_async(_columns, 8, 1, as_tf32)
TABLE["wgmma.fence.sync.aligned"] = _fence
TABLE["wgmma.commit_group.sync.aligned"] = _commit
TABLE["wgmma.wait_group.sync.aligned"] = _wait
TABLE["setmaxnreg.inc.sync.aligned.u32"] = _set_registers
TABLE["setmaxnreg.dec.sync.aligned.u32"] = _set_registers
