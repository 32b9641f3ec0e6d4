"""The memory of a launch under Triton's interpreter, and the checks of every access.

Each tensor argument gets addresses of its own, far from all others, so that a pointer tells which argument it was made
from. Faults, each a MemoryFault that names kernel, program, argument and offset:

- an access outside the elements of its argument, even if inside the memory that a view looks at;
- a misaligned access, and an address that was made from no argument;
- two lanes of one store that write one element;
- a race: one program writes what another one reads or writes. Atomics race with plain accesses only.

What `torch.empty` gave and no kernel wrote is found by other means: `filled_with_nan`.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_ROOM = 44  # log2 of the bytes between the addresses of two arguments
_FIRST = 16  # the room of the first argument: in those below are the process's own addresses, and null
_NOBODY, _SEVERAL, _ATOMIC = -1, -2, -3  # instead of a program's number


class MemoryFault(Exception):
    """A kernel reads or writes what it must not."""


@dataclass
class _Storage:
    """Memory that one or several arguments look at, and which program did what to each of its cells."""

    bytes: np.ndarray  # uint8
    cell: int  # bytes
    written: np.ndarray = field(init=False)  # the number of the program, int32
    read: np.ndarray = field(init=False)

    def __post_init__(self):
        cells = -(-len(self.bytes) // self.cell)
        self.written, self.read = (np.full(cells, _NOBODY, np.int32) for _ in range(2))

    def cells(self, offsets: np.ndarray, size: int) -> np.ndarray:
        first = offsets // self.cell
        return first if size <= self.cell else (first[:, None] + np.arange(size // self.cell)).ravel()


@dataclass
class _Argument:
    name: str
    tensor: Tensor
    storage: _Storage
    base: int  # the address given to byte 0 of the storage

    def __post_init__(self):
        tensor, size = self.tensor, self.tensor.element_size()
        self.start = tensor.storage_offset() * size
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.stop = self.start + (last + 1) * size if tensor.numel() else self.start
        self.elements = None  # which of [start, stop) are the tensor's; None: all
        if tensor.numel() and not tensor.is_contiguous():
            self.elements = np.zeros(last + 1, bool)
            np.lib.stride_tricks.as_strided(self.elements, tensor.shape, tensor.stride())[...] = True

    def inside(self, offsets: np.ndarray, size: int) -> np.ndarray:
        inside = (offsets >= self.start) & (offsets + size <= self.stop)
        if self.elements is None or not inside.all():
            return inside
        item = self.tensor.element_size()
        first, last = offsets - self.start, offsets - self.start + size - 1
        return self.elements[first // item] & self.elements[last // item]

    def __str__(self) -> str:
        tensor = self.tensor
        return f"{self.name} (shape {tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype})"


class _Launch:
    def __init__(self, kernel: str, arguments: dict) -> None:
        self.kernel = kernel
        self.program: tuple[int, ...] = ()
        self.number = -1  # of the program
        self.arguments: list[_Argument] = []
        names: dict[int, list[str]] = {}  # one tensor may be two arguments
        by_storage: dict[int, list[Tensor]] = {}
        for name, tensor in _tensors(arguments):
            names.setdefault(id(tensor), []).append(name)
            if len(names[id(tensor)]) == 1:
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        for pointer, tensors in by_storage.items():
            storage = _storage(pointer, tensors)
            for tensor in tensors:
                room = _FIRST + len(self.arguments)
                base = (2 * room + 1 << _ROOM - 1) + pointer % 256  # in the middle, aligned as in truth
                self.arguments.append(_Argument(" and ".join(names[id(tensor)]), tensor, storage, base))

    def fault(self, what: str) -> MemoryFault:
        return MemoryFault(f"{self.kernel}, program {self.program}: {what}")

    def resolve(self, verb: str, addresses: np.ndarray, size: int) -> list[tuple[_Argument, np.ndarray, object]]:
        """The arguments that are accessed, the offsets in their storages in bytes, and which lanes these are."""
        numbers = addresses >> np.uint64(_ROOM)
        if numbers[0] == numbers.max() == numbers.min():
            groups = [(int(numbers[0]), slice(None))]
        else:
            groups = [(int(number), numbers == number) for number in np.unique(numbers)]
        return [self._resolve(verb, number, addresses, size, lanes) for number, lanes in groups]

    def _resolve(self, verb, number, addresses, size, lanes):
        if not 0 <= number - _FIRST < len(self.arguments):
            raise self.fault(f"{verb} at {int(addresses[lanes][0]):#x}, which was made from no tensor argument")
        argument = self.arguments[number - _FIRST]
        offsets = addresses[lanes].astype(np.int64) - argument.base
        outside = ~argument.inside(offsets, size)
        if outside.any():
            self._raise(verb, argument, offsets, outside, "outside the tensor")
        misaligned = offsets % size != 0
        if misaligned.any():
            self._raise(verb, argument, offsets, misaligned, f"not aligned to {size} bytes")
        return argument, offsets, lanes

    def _raise(self, verb: str, argument: _Argument, offsets: np.ndarray, wrong: np.ndarray, what: str) -> None:
        first = (int(offsets[wrong][0]) - argument.start) / argument.tensor.element_size()
        raise self.fault(
            f"{verb} of {argument}: {wrong.sum()} of {len(wrong)} lanes are {what}, the first at offset {first:g} "
            f"from the first element"
        )

    def check_race(self, verb: str, argument: _Argument, offsets: np.ndarray, size: int, marks: np.ndarray) -> None:
        """`marks`: who did what to the cells before."""
        other = (marks != _NOBODY) & (marks != (_ATOMIC if verb == "atomic" else self.number))
        if other.any():
            per_lane = other.reshape(len(offsets), -1)
            mark = int(marks[other][0])
            who = {_SEVERAL: "several programs", _ATOMIC: "an atomic"}.get(mark, f"program number {mark}")
            self._raise(verb, argument, offsets, per_lane.any(1), f"in a race with {who}")


_launch: _Launch | None = None


@contextlib.contextmanager
def launch(kernel: str, arguments: dict) -> Iterator[None]:
    global _launch
    _launch = _Launch(kernel, arguments)
    try:
        yield
    finally:
        _launch = None


def enter_program(program: tuple[int, ...]) -> None:
    _launch.program = program
    _launch.number += 1


def address_of(tensor: Tensor) -> int:
    for argument in _launch.arguments:
        if argument.tensor is tensor:
            return argument.base + argument.start
    raise KeyError("a tensor that is no argument of the launch")


def load(addresses: np.ndarray, mask: np.ndarray, dtype: np.dtype) -> np.ndarray:
    values = np.zeros(addresses.shape, dtype)
    lanes_on = addresses[mask]
    if not lanes_on.size:
        return values
    loaded = np.empty(lanes_on.shape, dtype)
    for argument, offsets, lanes in _launch.resolve("load", lanes_on, dtype.itemsize):
        storage = argument.storage
        cells = storage.cells(offsets, dtype.itemsize)
        _launch.check_race("load", argument, offsets, dtype.itemsize, storage.written[cells])
        readers = storage.read[cells]
        new = (readers == _NOBODY) | (readers == _launch.number)
        storage.read[cells] = np.where(new, _launch.number, _SEVERAL)
        loaded[lanes] = _numbers(storage, dtype)[offsets // dtype.itemsize]
    values[mask] = loaded
    return values


def store(addresses: np.ndarray, values: np.ndarray, mask: np.ndarray, dtype: np.dtype) -> None:
    lanes_on = addresses[mask]
    if not lanes_on.size:
        return
    values = np.broadcast_to(values, addresses.shape)[mask].astype(dtype)
    for argument, offsets, lanes in _launch.resolve("store", lanes_on, dtype.itemsize):
        storage = argument.storage
        cells = storage.cells(offsets, dtype.itemsize)
        _launch.check_race("store", argument, offsets, dtype.itemsize, storage.written[cells])
        _launch.check_race("store", argument, offsets, dtype.itemsize, storage.read[cells])
        order = np.arange(len(cells), dtype=np.int32)
        storage.written[cells] = order
        twice = (storage.written[cells] != order).reshape(len(offsets), -1).any(1)
        storage.written[cells] = _launch.number
        numbers = _numbers(storage, dtype)
        numbers[offsets // dtype.itemsize] = values[lanes]
        if twice.any():
            same = numbers[offsets // dtype.itemsize].tobytes() == values[lanes].tobytes()
            values_are = "the same value" if same else "different values"
            _launch._raise("store", argument, offsets, twice, f"written twice by one store, with {values_are}")


def atomic(addresses: np.ndarray, mask: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The true addresses."""
    true = np.zeros(addresses.shape, np.uint64)
    lanes_on = addresses[mask]
    if not lanes_on.size:
        return true
    found = np.empty(lanes_on.shape, np.uint64)
    for argument, offsets, lanes in _launch.resolve("atomic", lanes_on, dtype.itemsize):
        storage = argument.storage
        cells = storage.cells(offsets, dtype.itemsize)
        _launch.check_race("atomic", argument, offsets, dtype.itemsize, storage.written[cells])
        _launch.check_race("atomic", argument, offsets, dtype.itemsize, storage.read[cells])
        storage.written[cells] = storage.read[cells] = _ATOMIC
        found[lanes] = storage.bytes.ctypes.data + offsets
    true[mask] = found
    return true


@contextlib.contextmanager
def filled_with_nan() -> Iterator[None]:
    """New tensors of torch.empty and its like hold NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _tensors(arguments: dict) -> Iterator[tuple[str, Tensor]]:
    for name, argument in arguments.items():
        if isinstance(argument, Tensor):
            yield name, argument
        elif isinstance(argument, TensorDescriptor):
            yield name, argument.base
        elif isinstance(argument, tuple):
            yield from _tensors({f"{name}[{i}]": element for i, element in enumerate(argument)})


def _storage(pointer: int, tensors: list[Tensor]) -> _Storage:
    size = tensors[0].untyped_storage().nbytes()
    memory = (ctypes.c_uint8 * size).from_address(pointer) if size else b""
    return _Storage(np.frombuffer(memory, np.uint8), min(t.element_size() for t in tensors))


def _numbers(storage: _Storage, dtype: np.dtype) -> np.ndarray:
    return storage.bytes[: len(storage.bytes) // dtype.itemsize * dtype.itemsize].view(dtype)
