"""Planted mistakes and the tables of who found them, for kernels/mutations.py, sim/cuda_mutations.py and
sim/ptx_mutations.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- mutations -->\n", "<!-- end of mutations -->"  # of the table in a page
NOT_RUN = ["not run yet"]
NEXT = r"\n(?=[@}]|def |class |\w+ = )"  # where a function ends, in Python and C++


@dataclass(frozen=True)
class Mutation:
    what: str
    file: str  # in the folder of the kernels
    function: str  # text in its first line; `old` stands once in it
    old: str
    new: str
    tests: tuple[str, ...]  # that are to find it
    kernels: str = ""  # of CUDA: the .cu file that is compiled with the mistake

    @property
    def place(self) -> tuple[str, str]:
        return self.file, self.what

    def apply(self, folder: Path) -> None:
        path = folder / self.file
        text = path.read_text()
        begin = text.index(self.function)
        following = re.search(NEXT, text[begin:])
        end = begin + following.start() if following else len(text)
        function = text[begin:end]
        if (times := function.count(self.old)) != 1:
            raise ValueError(f"{self.what}: {self.function} in {self.file} has {times} times {self.old!r}")
        path.write_text(text[:begin] + function.replace(self.old, self.new) + text[end:])


def _parts(page: Path) -> tuple[str, list[str], str]:
    """The text in front of the table, its lines, the text behind it."""
    head, rest = page.read_text().split(BEGIN)
    table, tail = rest.split(END)
    return head, table.splitlines(), tail


def known(page: Path) -> dict[tuple[str, str], list[str]]:
    """Of the table: file and mistake -> the other cells."""
    rows = (line.strip("| ").split(" | ") for line in _parts(page)[1][2:])
    return {(file, what): cells for file, what, *cells in rows}


def not_run(mutations: Iterable[Mutation], page: Path) -> list[Mutation]:
    """Those that the table has no result of."""
    table = known(page)
    return [m for m in mutations if table.get(m.place, NOT_RUN) == NOT_RUN]


def write(page: Path, mutations: Iterable[Mutation], found: dict[tuple[str, str], Sequence[str]]) -> None:
    """The table, a row for each of `mutations`, with what was found just now; the other rows stay as they are."""
    head, table, tail = _parts(page)
    cells = known(page) | found
    rows = [f"| {' | '.join([*m.place, *cells.get(m.place, NOT_RUN)])} |" for m in mutations]
    page.write_text(head + BEGIN + "\n".join([*table[:2], *rows]) + "\n" + END + tail)
