"""Small kernels for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .checks import Counts
from .machine import Launch
from .memory import Memory
from .parse import parse
from .program import Program
from .tensor_map import TensorMap

HEADER = ".version 8.7\n.target sm_90a\n.address_size 64\n"
REGISTERS = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<20>; .reg .b64 %d<20>;"


def kernel(body: str, parameters: int = 0, shared: str = "", maps: int = 0) -> str:
    """A kernel named k with pointers as parameters, in %d0, %d1, ...; %r0 is the thread's number in the block,
    %r1 the block's, %r2 the thread's in the grid. `shared`: declarations. `maps`: tensor maps, their addresses in
    %d18, %d19."""
    lines = [f"ld.param.u64 %d{i}, [k_param_{i}];" for i in range(parameters)]
    lines += [
        "mov.u32 %r0, %tid.x;",
        "mov.u32 %r1, %ctaid.x;",
        "mov.u32 %r3, %ntid.x;",
        "mad.lo.s32 %r2, %r1, %r3, %r0;",
    ]
    for i in range(maps):
        lines.append(f"mov.b64 %d{18 + i}, k_map_{i}; cvta.param.u64 %d{18 + i}, %d{18 + i};")
    names = [f".param .u64 k_param_{i}" for i in range(parameters)]
    names = ", ".join(names + [f".param .align 64 .b8 k_map_{i}[128]" for i in range(maps)])
    return "\n".join([HEADER, shared, f".visible .entry k({names})", "{", REGISTERS, *lines, body, "ret;", "}"])


def aligned(x: np.ndarray) -> np.ndarray:
    """A copy that begins with a sector, as tensors on a GPU do."""
    room = np.zeros(x.nbytes + 256, np.uint8)
    start = -room.ctypes.data % 256
    copy = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def launch(
    text: str,
    *arrays: np.ndarray,
    blocks: int = 1,
    threads: int = 32,
    dynamic_shared: int = 0,
    order: str = "together",
    seed: int = 0,
    maps: Sequence[TensorMap] = (),
) -> Counts:
    """Runs k, which gets the addresses of the arrays, and the maps."""
    memory = Memory([(x.ctypes.data, x.nbytes, f"array {i}") for i, x in enumerate(arrays)])
    parameters = np.array([x.ctypes.data for x in arrays], np.uint64).tobytes()
    for each in maps:
        parameters += bytes(-len(parameters) % 64) + each.tobytes()
    program, parameters = Program(parse(text, "k")), np.frombuffer(parameters, np.uint8)
    run = Launch(program, (blocks, 1, 1), (threads, 1, 1), dynamic_shared, parameters, memory, order, seed)
    return run.run()


_BITS = {"pred": 8, "b16": 16, "b32": 32, "b64": 64}
_LETTER = {"pred": "p", "b16": "h", "b32": "r", "b64": "d"}


def compute(
    instruction: str, results: Sequence[str], kinds: Sequence[str], *operands: np.ndarray, blocks_of: int = 256
) -> list[np.ndarray]:
    """Runs an instruction in which D0, D1, ... stand for results and A, B, C, ... for operands, of these classes of
    registers (pred, b16, b32, b64); an operand for each thread. Returns the bits of each result."""
    count = -(-max(len(x) for x in operands) // blocks_of) * blocks_of
    given = []
    for kind, x in zip(kinds, operands, strict=True):
        bits = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").astype(f"u{_BITS[kind] // 8}")
        given.append(np.concatenate([bits, np.repeat(bits[-1:], count - len(bits))]))
    found = [np.zeros(count, f"u{_BITS[kind] // 8}") for kind in results]
    lines, names = [], {}
    next_register = {"pred": 0, "b16": 0, "b32": 4, "b64": 10}

    def register(kind: str) -> str:
        next_register[kind] += 1
        return f"%{_LETTER[kind]}{next_register[kind] - 1}"

    def place(i: int, kind: str) -> None:
        lines.append(f"mul.wide.u32 %d8, %r2, {_BITS[kind] // 8};")
        lines.append(f"add.s64 %d8, %d8, %d{i};")

    for i, kind in enumerate(kinds):
        name = names["ABCDEFGHIJKLMNOP"[i]] = register(kind)
        place(i, kind)
        if kind == "pred":
            lines += ["ld.global.u8 %h8, [%d8];", f"setp.ne.s16 {name}, %h8, 0;"]
        else:
            lines.append(f"ld.global.{kind} {name}, [%d8];")
    text = instruction
    for i, kind in enumerate(results):
        names[f"D{i}"] = register(kind)
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, names[name])
    lines.append(text + ";")
    for i, kind in enumerate(results):
        place(len(kinds) + i, kind)
        if kind == "pred":
            lines += [f"selp.u16 %h8, 1, 0, {names[f'D{i}']};", "st.global.u8 [%d8], %h8;"]
        else:
            lines.append(f"st.global.{kind} [%d8], {names[f'D{i}']};")
    arrays = [*given, *found]
    if len(arrays) > 8:
        raise ValueError("too many operands")
    launch(kernel("\n".join(lines), len(arrays)), *arrays, blocks=count // blocks_of, threads=blocks_of)
    length = max(len(x) for x in operands)
    return [x[:length] for x in found]
