"""Tensor maps, as cuTensorMapEncodeTiled makes them; and where the numbers of a box are.

The real 128 bytes are not documented: here they are what `FORMAT` says, and begin with `MAGIC`. runtime.cpp writes the
same. The limits are those that CUDA's driver API documents.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

MAGIC = b"tensor map"
# magic, rank, type, swizzle, interleave, fill; address, sizes, strides in bytes but for the innermost; box, steps
FORMAT = "<10sx5BQ5Q4Q5H5B"
BYTES = 128
SIZES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2}  # of CUtensorMapDataType
SPANS = {0: 16, 1: 32, 2: 64, 3: 128}  # bytes of a row that CUtensorMapSwizzle permutes; 0: none


@dataclass(frozen=True)
class TensorMap:
    """The innermost dimension first."""

    type: int
    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes, but for the innermost
    box: tuple[int, ...]
    swizzle: int = 0
    fill: int = 0  # of what lies outside: zeros
    steps: tuple[int, ...] = ()  # in numbers; empty: all 1
    interleave: int = 0

    def __post_init__(self) -> None:
        rank, size = len(self.sizes), SIZES.get(self.type)
        row = self.box[0] * (size or 0) if self.box else 0
        problems = {
            "type": size is None,
            "rank": not 1 <= rank <= 5 or len(self.strides) != rank - 1 or len(self.box) != rank,
            "address": self.address % 16 != 0,
            "sizes": not all(0 < n <= 2**32 for n in self.sizes),
            "strides": not all(n % 16 == 0 and n < 2**40 for n in self.strides),
            "box": not all(0 < n <= 256 for n in self.box) or row % 16 != 0,
            "swizzle": self.swizzle not in SPANS or self.swizzle > 0 and row != SPANS[self.swizzle],
            "steps": any(n != 1 for n in self.steps),
            "interleave": self.interleave != 0,
            "fill": self.fill != 0,
        }
        if wrong := [name for name, is_wrong in problems.items() if is_wrong]:
            raise ValueError(f"a tensor map whose {', '.join(wrong)} can't be or is not known: {self}")

    @property
    def number(self) -> int:
        """Bytes of one."""
        return SIZES[self.type]

    @property
    def bytes(self) -> int:
        """Of a box."""
        return int(np.prod(self.box)) * self.number

    def tobytes(self) -> bytes:
        rank = len(self.sizes)
        head = MAGIC, rank, self.type, self.swizzle, self.interleave, self.fill, self.address
        sizes, strides = (*self.sizes, *[1] * (5 - rank)), (*self.strides, *[0] * (5 - rank))[:4]
        numbers = *sizes, *strides, *self.box, *[1] * (5 - rank), *(self.steps or [1] * rank), *[1] * (5 - rank)
        return struct.pack(FORMAT, *head, *numbers).ljust(BYTES, b"\0")

    def rows(self, corner: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Of a box that begins at `corner`: (address of each row's first number, whether the row is inside of the
        tensor, and of each row the first number that is and the one behind the last)."""
        inner = corner[0]
        low, high = max(-inner, 0), min(self.sizes[0] - inner, self.box[0])
        addresses, inside = np.array([self.address + inner * self.number]), np.array([True])
        for place, size, stride, count in zip(corner[1:], self.sizes[1:], self.strides, self.box[1:], strict=True):
            numbers = place + np.arange(count)
            addresses = (numbers * stride)[:, None] + addresses
            inside = ((numbers >= 0) & (numbers < size))[:, None] & inside
            addresses, inside = addresses.ravel(), inside.ravel()
        return addresses, inside & (low < high), low, max(low, high)

    def places(self, start: int) -> np.ndarray:
        """Where each byte of a box is in shared memory, from byte `start` of it on: (rows, bytes)."""
        row = self.box[0] * self.number
        return swizzled(start + np.arange(self.bytes).reshape(-1, row), self.swizzle)


def swizzled(places: np.ndarray, swizzle: int) -> np.ndarray:
    """CUtensorMapSwizzle: of 16-byte units, numbers within a span and those of 128 bytes are combined by xor."""
    return places ^ (places >> 7 & SPANS[swizzle] // 16 - 1) << 4


def unpack(data: bytes) -> TensorMap:
    if len(data) < BYTES or not data.startswith(MAGIC):
        raise ValueError("not a tensor map")
    _, rank, type_, swizzle, interleave, fill, address, *rest = struct.unpack_from(FORMAT, data)
    sizes, strides, box, steps = rest[:5], rest[5:9], rest[9:14], rest[14:]
    parts = sizes[:rank], strides[: rank - 1], box[:rank]
    return TensorMap(type_, address, *map(tuple, parts), swizzle, fill, tuple(steps[:rank]), interleave)
