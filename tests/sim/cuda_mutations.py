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
from pathlib import Path
from typing import Annotated

import build_sim
import typer
from cuda_mistakes import MISTAKES

ROOT = build_sim.ROOT
sys.path.insert(0, str(ROOT / "tests"))
import planted  # noqa: E402
from planted import Mutation  # noqa: E402

CUDA = ROOT / "csrc" / "cuda"
PAGE = ROOT / "docs" / "sim.md"
LAYERS = [("plain", "forward"), ("plain", "reverse,lazy"), ("asan", "random=2,lazy"), ("tsan", "forward")]
SECONDS = 1800  # for the tests of one mistake in one layer

MUTATIONS = [
    Mutation(what, file, function, old, new, tests, kernels)
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


def main(
    only: Annotated[str, typer.Option(help="only those whose file or description has this in it")] = "",
    missing: Annotated[bool, typer.Option(help="only those that docs/sim.md has no result of")] = False,
    write_page: Annotated[bool, typer.Option("--write", help="put the results into docs/sim.md")] = False,
) -> None:
    chosen = [m for m in MUTATIONS if only in f"{m.file} {m.what}"]
    if missing:
        chosen = planted.not_run(chosen, PAGE)
    missed = 0
    for mutation in chosen:
        found = caught_by(mutation)
        missed += found is None
        layer, test = found or ("nothing", "")
        print(f"{mutation.file}: {mutation.what}: {layer} {test}", flush=True)
        if write_page:
            cells = [layer, f"`{test.removeprefix('tests/')}`"] if found else [layer]
            planted.write(PAGE, MUTATIONS, {mutation.place: cells})
    raise typer.Exit(missed > 0)


if __name__ == "__main__":
    typer.run(main)
