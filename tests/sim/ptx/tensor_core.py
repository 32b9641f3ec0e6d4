"""ldmatrix, stmatrix and mma.sync. Fragment layouts are those of the PTX ISA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .memory import address_reader, note_wavefronts, scatter, shared_places
from .parse import Instruction
from .table import Decode, Step, vector
from .values import bf16_to_float, reader, writer
from .warp import whole_warps

if TYPE_CHECKING:
    from .machine import Team

TABLE: dict[str, Decode] = {}
LANES = np.arange(32)
GROUP, PLACE = LANES // 4, LANES % 4  # of a lane: its row of d, its two columns


def _ldmatrix(count: int, transpose: bool) -> Decode:
    """`count` matrices of 8 x 8 numbers of 16 bits. Lane 8 m + r gives the address of row r of matrix m; lane l gets
    numbers 2 (l % 4) and the next of row l / 4, or of the transposed matrix."""

    def decode(instruction: Instruction) -> Step:
        destination, source = instruction.operands
        address = address_reader(source, "shared", instruction)
        write = [writer(x, "b32", instruction) for x in vector(destination, count, instruction)]

        def step(team: Team, mask: np.ndarray | None) -> None:
            warps = whole_warps(team, mask, instruction.opcode)
            giving = (warps[:, None] * 32 + np.arange(8 * count)).ravel()
            addresses = address(team)[giving]
            places = shared_places(team, giving, addresses, 16)
            team.batch.shadow.read(team, giving, places, 16, together=True)
            note_wavefronts(team, giving, addresses, 16, instruction)
            tiles = team.batch.shared.view(np.uint16)[places[:, None] // 2 + np.arange(8)]
            tiles = tiles.reshape(len(warps), count, 8, 8)
            if transpose:
                tiles = np.ascontiguousarray(tiles.swapaxes(2, 3))
            pairs = tiles.view(np.uint32)[:, :, GROUP, PLACE]  # (warps, count, lanes)
            for i in range(count):
                values = np.zeros((team.size // 32, 32), np.uint32)
                values[warps] = pairs[:, i]
                write[i](team, values.ravel(), mask)

        return step

    return decode


def _stmatrix(count: int, transpose: bool) -> Decode:
    """As ldmatrix, the other way round."""

    def decode(instruction: Instruction) -> Step:
        destination, source = instruction.operands
        address = address_reader(destination, "shared", instruction)
        read = [reader(x, "b32", instruction) for x in vector(source, count, instruction)]

        def step(team: Team, mask: np.ndarray | None) -> None:
            warps = whole_warps(team, mask, instruction.opcode)
            giving = (warps[:, None] * 32 + np.arange(8 * count)).ravel()
            addresses = address(team)[giving]
            places = shared_places(team, giving, addresses, 16)
            pairs = np.stack([np.broadcast_to(x(team), team.size).reshape(-1, 32)[warps] for x in read], 1)
            tiles = np.ascontiguousarray(pairs).view(np.uint16).reshape(len(warps), count, 8, 8)
            if transpose:
                tiles = tiles.swapaxes(2, 3)
            rows = np.ascontiguousarray(tiles).view(np.uint64).reshape(-1, 2)
            shared, first = team.batch.shared.view(np.uint64), places // 8
            same = (shared[first[:, None] + np.arange(2)] == rows).all(1)
            team.batch.shadow.write(team, giving, places, 16, same, together=True)
            note_wavefronts(team, giving, addresses, 16, instruction)
            scatter(team, giving, [rows[:, 0], rows[:, 1]], shared, first)

        return step

    return decode


def as_f16(registers: np.ndarray) -> np.ndarray:
    """(warps, 32, registers) of pairs -> (warps, 32, registers, 2) in float64."""
    return registers.view(np.float16).reshape(*registers.shape, 2).astype(np.float64)


def as_bf16(registers: np.ndarray) -> np.ndarray:
    return bf16_to_float(registers.view(np.uint16)).reshape(*registers.shape, 2).astype(np.float64)


def as_tf32(registers: np.ndarray) -> np.ndarray:
    """(warps, 32, registers) -> (warps, 32, registers, 1); the lowest 13 bits do not count."""
    return (registers & np.uint32(0xFFFFE000)).view(np.float32)[..., None].astype(np.float64)


def place_a(depth: int, pair: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns), each of shape (32, 4, pair), of a (16 x depth)."""
    register, element = np.arange(4)[:, None], np.arange(pair)
    rows = GROUP[:, None, None] + 8 * (register % 2) + 0 * element
    return rows, PLACE[:, None, None] * pair + depth // 2 * (register // 2) + element


def place_b(depth: int, pair: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns), each of shape (32, 2, pair), of b (depth x 8)."""
    register, element = np.arange(2)[:, None], np.arange(pair)
    rows = PLACE[:, None, None] * pair + depth // 2 * register + element
    return rows, np.broadcast_to(GROUP[:, None, None], rows.shape)


D_ROWS = GROUP[:, None] + 8 * (np.arange(4) // 2)  # (32, 4)
D_COLUMNS = PLACE[:, None] * 2 + np.arange(4) % 2


def _mma(depth: int, pair: int, numbers) -> Decode:
    """d (16 x 8, float32) = a (16 x depth) b (depth x 8) + c: summed in float64, rounded once."""
    rows_a, columns_a = place_a(depth, pair)
    rows_b, columns_b = place_b(depth, pair)

    def decode(instruction: Instruction) -> Step:
        d, a, b, c = instruction.operands
        write = [writer(x, "f32", instruction) for x in vector(d, 4, instruction)]
        read_a = [reader(x, "b32", instruction) for x in vector(a, 4, instruction)]
        read_b = [reader(x, "b32", instruction) for x in vector(b, 2, instruction)]
        read_c = [reader(x, "f32", instruction) for x in vector(c, 4, instruction)]

        def fragment(team: Team, read: list, warps: np.ndarray) -> np.ndarray:
            parts = [np.broadcast_to(x(team), team.size).reshape(-1, 32)[warps] for x in read]
            return np.stack(parts, 2)

        def step(team: Team, mask: np.ndarray | None) -> None:
            warps = whole_warps(team, mask, instruction.opcode)
            left = np.empty((len(warps), 16, depth))
            left[:, rows_a, columns_a] = numbers(fragment(team, read_a, warps))
            right = np.empty((len(warps), depth, 8))
            right[:, rows_b, columns_b] = numbers(fragment(team, read_b, warps))
            product = (left @ right)[:, D_ROWS, D_COLUMNS]  # (warps, 32, 4)
            result = (product + fragment(team, read_c, warps)).astype(np.float32)
            for i in range(4):
                values = np.zeros((team.size // 32, 32), np.float32)
                values[warps] = result[:, :, i]
                write[i](team, values.ravel(), mask)
            team.batch.launch.counts.add_mma(instruction.opcode, len(warps), 2 * 16 * 8 * depth)

        return step

    return decode


for _count in (1, 2, 4):
    TABLE[f"ldmatrix.sync.aligned.m8n8.x{_count}.shared.b16"] = _ldmatrix(_count, False)
    TABLE[f"ldmatrix.sync.aligned.m8n8.x{_count}.trans.shared.b16"] = _ldmatrix(_count, True)
    TABLE[f"stmatrix.sync.aligned.m8n8.x{_count}.shared.b16"] = _stmatrix(_count, False)
    TABLE[f"stmatrix.sync.aligned.m8n8.x{_count}.trans.shared.b16"] = _stmatrix(_count, True)
TABLE["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"] = _mma(16, 2, as_f16)
TABLE["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = _mma(16, 2, as_bf16)
TABLE["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"] = _mma(8, 1, as_tf32)
