"""Planted mistakes that the tests of the ops must find, under the interpreter: do the tests test?

    python tests/kernels/mutations.py [--only WORD] [--jobs 2] [--write]

Each mistake goes into a copy of kernels/; the tests that `make test` runs for that op must fail on it. --write renews
the rows of the mistakes that were planted in the table of docs/verification.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import planted  # noqa: E402
from mistakes import MISTAKES  # noqa: E402
from planted import Mutation  # noqa: E402

PAGE = ROOT / "docs" / "verification.md"
SECONDS = 1200  # for the tests of one mistake

MUTATIONS = [
    Mutation(what, file, f"def {function}(", old, new, tests)
    for (tests, file, function), mistakes in MISTAKES.items()
    for what, (old, new) in mistakes.items()
]


def run_tests(mutation: Mutation | None, tests: list[str], compiled: bool = False) -> subprocess.CompletedProcess:
    """On a copy of the kernels, with the mistake in it: those that `make test` runs in Triton's interpreter, or, of
    tests that compile, all."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for folder in ("kernels", "tests"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / "fastformer").mkdir()
        for path in (ROOT / "fastformer").iterdir():
            (copy / "fastformer" / path.name).symlink_to(copy / "kernels" if path.name == "kernels" else path)
        if mutation is not None:
            mutation.apply(copy / "kernels")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"PYTHONPATH": directory, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        if compiled:
            environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
        else:
            command += ["-m", "not slow"]
            environment |= {"TRITON_INTERPRET": "1", "FASTFORMER_BACKEND": "triton"}
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS)


def caught_by(mutation: Mutation) -> str | None:
    """The first test that fails on it; None: all pass."""
    try:
        run = run_tests(mutation, [f"tests/{name}" for name in mutation.tests])
    except subprocess.TimeoutExpired:
        return f"no end within {SECONDS} s"
    failed = re.search(r"^FAILED (.*?)(?: - |$)", run.stdout, re.MULTILINE)
    if failed is None and run.returncode != 0:
        raise RuntimeError(f"{mutation.what}: the tests did not run\n{run.stdout}\n{run.stderr}")
    return failed[1] if failed else None


def main(
    only: Annotated[str, typer.Option(help="only those whose file or description has this in it")] = "",
    jobs: Annotated[int, typer.Option(help="at the same time")] = min(os.cpu_count() or 1, 8),
    write: Annotated[bool, typer.Option(help="put the table into docs/verification.md")] = False,
) -> None:
    chosen = [m for m in MUTATIONS if only in f"{m.file} {m.what}"]
    found = {}
    with ThreadPoolExecutor(jobs) as pool:
        for mutation, test in zip(chosen, pool.map(caught_by, chosen), strict=True):
            found[mutation.place] = test
            print(f"{mutation.file}: {mutation.what}: {test or 'FOUND BY NO TEST'}", flush=True)
    named = sorted({test for test in found.values() if test and "::" in test})
    if named and (clean := run_tests(None, named)).returncode != 0:
        raise RuntimeError(f"these tests fail without a mistake, too\n{clean.stdout}")
    if write:
        cells = {place: [f"`{test.removeprefix('tests/')}`" if test else "nothing"] for place, test in found.items()}
        planted.write(PAGE, MUTATIONS, cells)
    raise typer.Exit(None in found.values())


if __name__ == "__main__":
    typer.run(main)
