"""Planted mistakes that the tests on the simulator must find (docs/sim.md): do the tests test?

    python tests/sim/cuda_mutations.py [--only WORD] [--missing] [--write]

Each mistake goes into a copy of csrc/cuda. The tests run on it in one layer after the other until one fails: as the
threads come, in reverse with lazy copies, under AddressSanitizer, under ThreadSanitizer; in each of them they pass
without a mistake first. --write puts what was found into the table of docs/sim.md, a line after the other.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import build_sim
import typer
from cuda_mistakes import MISTAKES

ROOT = build_sim.ROOT
CUDA = ROOT / "csrc" / "cuda"
PAGE = ROOT / "docs" / "sim.md"
LAYERS = [("plain", "forward"), ("plain", "reverse,lazy"), ("asan", "random=2,lazy"), ("tsan", "forward")]
SECONDS = 1800  # for the tests of one mistake in one layer


@dataclass(frozen=True)
class Mutation:
    what: str
    kernels: str  # the .cu file that is compiled with the mistake
    file: str  # in csrc/cuda/
    function: str  # text in its first line; `old` stands once between it and the next line that begins with }
    old: str
    new: str
    tests: tuple[str, ...]  # arguments of pytest

    def apply(self, folder: Path) -> None:
        path = folder / self.file
        text = path.read_text()
        begin = text.index(self.function)
        end = text.index("\n}", begin)
        function = text[begin:end]
        if function.count(self.old) != 1:
            times = function.count(self.old)
            raise ValueError(f"{self.what}: {self.function} in {self.file} has {times} times {self.old!r}")
        path.write_text(text[:begin] + function.replace(self.old, self.new) + text[end:])


MUTATIONS = [
    Mutation(what, kernels, file, function, old, new, tests)
    for (tests, kernels, file, function), mistakes in MISTAKES.items()
    for what, (old, new) in mistakes.items()
]


def run_tests(variant: str, options: str, tests: tuple[str, ...], folder: Path | None = None) -> str | None:
    """The first test that fails on the library in that folder, or None."""
    environment = os.environ | build_sim.environment(variant, folder)
    environment |= {"FASTFORMER_BACKEND": "cuda", "FASTFORMER_SIM": options, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    # -s: what a sanitizer says when it ends the program is heard.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "--tb=no", "-p", "no:cacheprovider", *tests]
    try:
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no end within {SECONDS} s"
    if run.returncode == 0:
        return None
    failed = re.search(r"^FAILED (.*?)(?: - |$)", run.stdout, re.MULTILINE)
    if failed:
        return failed[1]
    crash = r"(?:WARNING: ThreadSanitizer|ERROR: AddressSanitizer|Fatal Python error): [\w -]*\w"
    if report := re.search(crash, run.stderr):
        return report[0].split(": ", 1)[1]
    raise RuntimeError(f"{' '.join(tests)}: the tests did not run\n{run.stdout}\n{run.stderr}")


@functools.cache
def check_clean(variant: str, options: str, tests: tuple[str, ...]) -> None:
    build_sim.build(variant)
    if failed := run_tests(variant, options, tests):
        raise SystemExit(f"{failed} fails without a mistake, too ({variant}, {options})")


def caught_by(mutation: Mutation) -> tuple[str, str] | None:
    """The first layer that finds the mistake, and its first test that fails; None: all pass."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        shutil.copytree(ROOT / "csrc", copy / "csrc", ignore=shutil.ignore_patterns("cpu"))
        mutation.apply(copy / "csrc" / "cuda")
        built = None
        for variant, options in LAYERS:
            check_clean(variant, options, mutation.tests)
            folder = copy / variant
            if variant != built:
                shutil.copytree(build_sim.folder_of(variant), folder)
                build_sim.build(variant, folder, [copy / "csrc" / "cuda" / mutation.kernels])
                built = variant
            failed = run_tests(variant, options, mutation.tests, folder)
            if failed:
                return f"{variant}, {options}" if variant == "plain" else variant, failed
    return None


BEGIN, END = "<!-- mutations -->\n", "<!-- end of mutations -->"
NOT_RUN = "not run yet"


def table() -> dict[tuple[str, str], tuple[str, str]]:
    """Of docs/sim.md: (file, mistake) -> (layer, test or report)."""
    text = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    return {(file, what): (layer, "".join(test)) for file, what, layer, *test in cells}


def write(found: dict[tuple[str, str], tuple[str, str]]) -> None:
    """The table with what was found just now; the other lines stay."""
    lines = ["| file | mistake | layer | test or report |", "| --- | --- | --- | --- |"]
    known = table() | found
    for m in MUTATIONS:
        lines.append(f"| {m.file} | {m.what} | {' | '.join(known.get((m.file, m.what), (NOT_RUN, '')))} |")
    head, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END)[1])


def main(
    only: Annotated[str, typer.Option(help="only those whose file or description has this in it")] = "",
    missing: Annotated[bool, typer.Option(help="only those that docs/sim.md has no result of")] = False,
    write_page: Annotated[bool, typer.Option("--write", help="put the results into docs/sim.md")] = False,
) -> None:
    chosen = [m for m in MUTATIONS if only in f"{m.file} {m.what}"]
    if missing:
        known = table()
        chosen = [m for m in chosen if known.get((m.file, m.what), (NOT_RUN,))[0] == NOT_RUN]
    missed = 0
    for mutation in chosen:
        found = caught_by(mutation)
        missed += found is None
        layer, test = found or ("nothing", "")
        print(f"{mutation.file}: {mutation.what}: {layer} {test}", flush=True)
        if write_page:
            test = test.removeprefix("tests/")
            write({(mutation.file, mutation.what): (layer, test and f"`{test}`")})
    raise typer.Exit(missed > 0)


if __name__ == "__main__":
    typer.run(main)
