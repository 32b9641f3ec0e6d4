"""Instructions of a whole warp: shuffles, votes, reductions, bar.warp.sync."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .faults import Fault
from .floating import greatest, least, or_nan
from .parse import Instruction, Pair, PtxError
from .table import Decode, Step
from .values import reader, writer

if TYPE_CHECKING:
    from .machine import Team

TABLE: dict[str, Decode] = {}
LANES = np.arange(32, dtype=np.uint32)
FULL = np.uint32(0xFFFFFFFF)


def members(team: Team, mask: np.ndarray | None, given: np.ndarray, opcode: str) -> None:
    """The lanes that run it must be those of its member mask."""
    given = np.broadcast_to(given, team.size).reshape(-1, 32)
    if mask is None:
        if (given == FULL).all():
            return
        active = np.ones(given.shape, np.bool_)
    else:
        active = mask.reshape(-1, 32)
    running = (active * (np.uint32(1) << LANES)).sum(1, dtype=np.uint32)
    wrong = active & (given != running[:, None])
    if wrong.any():
        threads = np.flatnonzero(wrong.ravel())
        first = threads[0]
        raise Fault(
            f"{team.who(threads)}: {opcode} with member mask {given.ravel()[first]:#x} is run by the lanes "
            f"{running[first >> 5]:#x} of the warp (divergence)"
        )


def whole_warps(team: Team, mask: np.ndarray | None, opcode: str) -> np.ndarray:
    """The rows (warps) that run it, all 32 lanes of each."""
    if mask is None:
        return np.arange(team.size // 32)
    active = mask.reshape(-1, 32)
    some, every = active.any(1), active.all(1)
    if (some & ~every).any():
        row = int(np.flatnonzero(some & ~every)[0])
        lanes = int((active[row] * (np.uint32(1) << LANES)).sum())
        raise Fault(f"{team.who(np.array([row * 32]))}: {opcode} is run by the lanes {lanes:#x} only (divergence)")
    return np.flatnonzero(every)


def source_lanes(mode: str, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """shfl: (lane to read, is it in the segment?) of each lane; the pseudocode of the PTX ISA, with signed numbers."""
    lane = LANES.astype(np.int64)
    b, clamp, segment = (b & 31).astype(np.int64), (c & 31).astype(np.int64), (c >> 8 & 31).astype(np.int64)
    most = lane & segment | clamp & ~segment
    least = lane & segment
    if mode == "up":
        source = lane - b
        inside = source >= most
    elif mode == "down":
        source = lane + b
        inside = source <= most
    elif mode == "bfly":
        source = lane ^ b
        inside = source <= most
    else:
        source = least | b & ~segment
        inside = source <= most
    return np.where(inside, source, lane), inside


def _shuffle(mode: str) -> Decode:
    def decode(instruction: Instruction) -> Step:
        result, *sources = instruction.operands
        inside_too = isinstance(result, Pair)
        write = writer(result.first if inside_too else result, "b32", instruction)
        write_inside = writer(result.second, "pred", instruction) if inside_too else None
        a, b, c, member = (reader(x, "b32", instruction) for x in sources)

        def step(team: Team, mask: np.ndarray | None) -> None:
            members(team, mask, member(team), instruction.opcode)
            values = np.broadcast_to(a(team), team.size).reshape(-1, 32)
            lanes, clamps = (np.broadcast_to(x(team), team.size).reshape(-1, 32) for x in (b, c))
            source, inside = source_lanes(mode, lanes, clamps)
            if mask is not None:
                active = mask.reshape(-1, 32)
                from_none = active & ~np.take_along_axis(active, source, 1)
                if from_none.any():
                    who = team.who(np.flatnonzero(from_none.ravel()))
                    raise Fault(f"{who}: {instruction.opcode} from a lane that does not take part")
            write(team, np.take_along_axis(values, source, 1).ravel(), mask)
            if write_inside:
                write_inside(team, inside.ravel(), mask)

        return step

    return decode


def _reduce(type_name: str, identity: np.generic, function: Callable) -> Decode:
    """Of the lanes that take part; d, a, member mask."""

    def decode(instruction: Instruction) -> Step:
        result, a, member = instruction.operands
        write = writer(result, type_name, instruction)
        read, read_member = reader(a, type_name, instruction), reader(member, "b32", instruction)

        def step(team: Team, mask: np.ndarray | None) -> None:
            members(team, mask, read_member(team), instruction.opcode)
            values = np.broadcast_to(read(team), team.size)
            if mask is not None:
                values = np.where(mask, values, identity)
            write(team, np.repeat(function(values.reshape(-1, 32)), 32), mask)

        return step

    return decode


def _vote(type_name: str, function: Callable) -> Decode:
    """function: (active and true, active) of shape (warps, 32) -> (warps,)"""

    def decode(instruction: Instruction) -> Step:
        result, a, member = instruction.operands
        write = writer(result, type_name, instruction)
        read, read_member = reader(a, "pred", instruction), reader(member, "b32", instruction)

        def step(team: Team, mask: np.ndarray | None) -> None:
            members(team, mask, read_member(team), instruction.opcode)
            active = np.ones(team.size, np.bool_) if mask is None else mask
            values = np.broadcast_to(read(team), team.size) & active
            write(team, np.repeat(function(values.reshape(-1, 32), active.reshape(-1, 32)), 32), mask)

        return step

    return decode


def _elect(instruction: Instruction) -> Step:
    """Which lane leads is left to the GPU: here the first, or by the order of warps the last or any."""
    result, member = instruction.operands
    if not isinstance(result, Pair):
        raise PtxError(f"{instruction}: a lane and a predicate were expected")
    write, write_leads = writer(result.first, "b32", instruction), writer(result.second, "pred", instruction)
    read = reader(member, "b32", instruction)

    def step(team: Team, mask: np.ndarray | None) -> None:
        given = np.broadcast_to(read(team), team.size)
        members(team, mask, given, instruction.opcode)
        launch = team.batch.launch
        order = np.arange(32)[:: -1 if launch.order == "reverse" else 1]
        if launch.order == "random":
            order = np.random.default_rng(launch.seed).permutation(32)
        taking_part = given[:, None] >> order.astype(np.uint32) & np.uint32(1)
        leader = order[taking_part.argmax(1)].astype(np.uint32)
        write(team, leader, mask)
        write_leads(team, leader == np.tile(LANES, team.size // 32), mask)

    return step


def _bar_warp_sync(instruction: Instruction) -> Step:
    (member,) = instruction.operands
    read = reader(member, "b32", instruction)

    def step(team: Team, mask: np.ndarray | None) -> None:
        members(team, mask, read(team), instruction.opcode)
        rows = np.unique(team.chosen(mask) >> 5)
        team.batch.clocks[team.block[rows], team.warp[rows], team.warp[rows]] += 1

    return step


def _of_lanes(function: Callable) -> Callable:
    return lambda x: function(*x.T)


for _mode in ("up", "down", "bfly", "idx"):
    TABLE[f"shfl.sync.{_mode}.b32"] = _shuffle(_mode)
_INT = np.iinfo(np.int32)
TABLE["redux.sync.add.s32"] = _reduce("s32", np.int32(0), lambda x: x.sum(1, dtype=np.int32))
TABLE["redux.sync.min.s32"] = _reduce("s32", np.int32(_INT.max), lambda x: x.min(1))
TABLE["redux.sync.max.s32"] = _reduce("s32", np.int32(_INT.min), lambda x: x.max(1))
TABLE["redux.sync.add.u32"] = _reduce("u32", np.uint32(0), lambda x: x.sum(1, dtype=np.uint32))
TABLE["redux.sync.min.u32"] = _reduce("u32", FULL, lambda x: x.min(1))
TABLE["redux.sync.max.u32"] = _reduce("u32", np.uint32(0), lambda x: x.max(1))
for _name, _function, _last in (("min", least, np.inf), ("max", greatest, -np.inf)):  # sm_100
    TABLE[f"redux.sync.{_name}.f32"] = _reduce("f32", np.float32(np.nan), _of_lanes(_function))
    TABLE[f"redux.sync.{_name}.NaN.f32"] = _reduce("f32", np.float32(_last), _of_lanes(or_nan(_function)))
TABLE["vote.sync.any.pred"] = _vote("pred", lambda x, active: x.any(1))
TABLE["vote.sync.all.pred"] = _vote("pred", lambda x, active: (x | ~active).all(1))
TABLE["vote.sync.ballot.b32"] = _vote("b32", lambda x, active: (x * (np.uint32(1) << LANES)).sum(1, dtype=np.uint32))
TABLE["bar.warp.sync"] = _bar_warp_sync
TABLE["elect.sync"] = _elect
