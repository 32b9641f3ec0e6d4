"""Registers, stack, spills, shared memory and tensor-core instructions of every Triton kernel, without a GPU.

python tests/kernels/report.py                       all of it, and docs/kernel_budgets.md
python tests/kernels/report.py --target sm_90 --call "attention 128" --kind bfloat16
python tests/kernels/report.py --pairs --target sm_90          calls of every two features together: only the rules
python tests/kernels/report.py --set-budgets         budgets.json from what is compiled now, for people to review
"""

from __future__ import annotations

import os
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated

import budgets
import calls
import pairs
import typer
from aot import ROOT, TARGETS, Facts
from rich.console import Console
from rich.progress import track
from rich.table import Table

PAGE = ROOT / "docs" / "kernel_budgets.md"
HEADER = (
    "call",
    "dtype",
    "target",
    "kernel",
    "warps",
    "stages",
    "registers",
    "stack",
    "spills",
    "shared",
    "tensor cores",
)
Case = tuple[str, str, str]  # target, call, kind


def compiled(case: Case) -> dict[str, Facts] | str:
    """The facts of its kernels, or why it can't be compiled."""
    try:
        return budgets.compile_call(*case)
    except Exception:
        return traceback.format_exc(limit=-3)


def row(target: str, call: str, kind: str, name: str, facts: Facts) -> list[str]:
    matrix = ", ".join(f"{count} {kind}" for kind, count in facts.tensor_cores.items())
    numbers = facts.warps, facts.stages, facts.registers, facts.stack, facts.spills, facts.shared
    return [call, kind, target, name, *map(str, numbers), matrix]


def main(
    target: Annotated[list[str] | None, typer.Option(help="only this one; may be repeated")] = None,
    call: Annotated[str, typer.Option(help="only calls whose name has this in it")] = "",
    kind: Annotated[str, typer.Option(help="only this one: bfloat16, float16, float32 or tf32x3")] = "",
    jobs: Annotated[int, typer.Option(help="processes")] = min(os.cpu_count() or 1, 8),
    set_budgets: Annotated[bool, typer.Option(help="write budgets.json")] = False,
    paired: Annotated[
        bool, typer.Option("--pairs", help="the calls of pairs.py, which have rules, but no budgets")
    ] = False,
) -> None:
    cases = (pairs if paired else calls).cases(target or TARGETS)
    chosen = [(t, name, k) for t, name, k in cases if call in name and kind in k]
    limits = budgets.load()
    console = Console(width=None if sys.stdout.isatty() else 200)
    table, rows, failures = Table(*HEADER), [], 0

    def fault(*what: str) -> None:
        nonlocal failures
        failures += 1
        console.print(", ".join(what), style="red", markup=False, highlight=False)

    with ProcessPoolExecutor(jobs) as pool:
        results = track(pool.map(compiled, chosen), "compiling", len(chosen), console=console)
        for (t, name, k), kernels in zip(chosen, results, strict=True):
            if isinstance(kernels, str):
                fault(t, k, name, f"not compiled\n{kernels.strip()[-2000:]}")
                continue
            if set_budgets:
                entry = {kernel: budgets.budget_of(facts) for kernel, facts in kernels.items()}
                limits.setdefault(name, {}).setdefault(k, {})[t] = entry
            for kernel, facts in kernels.items():
                limit = limits.get(name, {}).get(k, {}).get(t, {}).get(kernel)
                found = budgets.faults(t, k, facts, limit) + ([] if limit or paired else ["no budget"])
                if found:
                    fault(t, k, name, kernel, "; ".join(found))
                rows.append(row(t, name, k, kernel, facts))
                table.add_row(*rows[-1])
    if not paired or call:
        console.print(table)
    console.print(f"{len(chosen)} calls, {len(rows)} kernels, {failures} faults")
    if set_budgets and not paired:
        budgets.save(limits)
    if not (paired or target or call or kind):
        write_page(rows)
    raise typer.Exit(failures > 0)


def write_page(rows: list[list[str]]) -> None:
    lines = [
        "# What the kernels use",
        "",
        "From the machine code that Triton makes for each GPU, compiled without one: `make kernel-report` writes this "
        "page, [verification](verification.md) tells how. Registers and stack (bytes) are a thread's, shared memory "
        "(bytes) a program's; spills are loads and stores of spilled registers. None of this is a speed.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{' --- |' * len(HEADER)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
