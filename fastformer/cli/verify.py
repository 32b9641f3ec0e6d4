"""`fastformer verify`: is every op right on this machine, by the error rule, forward and backward?"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fastformer
from fastformer import backends, library
from fastformer.cli import calls, machine
from fastformer.cli.calls import Call
from fastformer.cli.compare import Announce, check_writable, finite, progress
from fastformer.cli.errors import UserError
from fastformer.cli.measure import accuracy, ulp

LEGEND = """\
error    largest |result - float64| of the outputs and gradients, where it comes closest to its bound
bound    twice the error of eager PyTorch in the same dtype, plus one unit in the last place of the largest result
         (32 units in float64, where eager may be the reference itself)"""


DRAWS = 4  # of random tensors, where they are small


@dataclass(frozen=True)
class Verdict:
    """Of one call on one backend in one dtype."""

    backend: str
    device: str
    op: str
    call: str
    dtype: str
    result: str  # the output or gradient that comes closest to its bound
    error: float
    bound: float
    problem: str | None = None  # what it raised
    declined: str | None = None  # why the backend does not take the call

    @property
    def ok(self) -> bool:
        return bool(self.declined) or (self.problem is None and self.error <= self.bound)  # False for NaN


def verify(
    backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this backend (default: all that can run here).")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes only.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every figure to this file.")
    ] = None,
) -> None:
    """Check every op against float64 on every backend that can run here; exit with 1 if one is wrong."""
    check_writable(json_file)
    found: list[Verdict] = []
    with progress() as announce:
        for name in chosen_backends(backend):
            found += verdicts(name, quick, announce)
    if json_file is not None:
        content = {"environment": machine.environment(), "quick": quick, "rows": as_json(found)}
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    show(found)
    if not all(verdict.ok for verdict in found):
        raise typer.Exit(1)


def chosen_backends(name: str | None) -> list[str]:
    if name is None:
        return [name for name in backends.BACKENDS if not machine.why_not_here(name)]
    if name not in backends.BACKENDS:
        raise UserError(f"--backend: got {name!r}, expected one of {', '.join(backends.BACKENDS)}")
    if reason := machine.why_not_here(name):
        raise UserError(f"--backend {name}: {reason}")
    return [name]


def verdicts(backend: str, quick: bool, announce: Announce) -> Iterator[Verdict]:
    """On the GPU, where there is one and the backend takes it; the CPU's kernels for each instruction set."""
    declared = {one.op: one for one in backends.implementations() if one.backend == backend}
    device = next(one.device for one in declared.values())
    if device == "any":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    for label, setting in variants(backend, quick):
        with setting():
            for call in calls.main_options(quick):
                if call.op not in declared:
                    continue
                announce(f"{label}: {call.op} {call.what}")
                for dtype in declared[call.op].dtypes:
                    yield judge(call, backend, label, torch.device(device), dtype)


def variants(backend: str, quick: bool) -> list[tuple[str, Callable[[], contextlib.AbstractContextManager]]]:
    if backend != "cpu" or quick:
        return [(backend, contextlib.nullcontext)]
    return [(f"cpu, {isa}", lambda isa=isa: instruction_set(isa)) for isa in library.isas()]


@contextlib.contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    before = library.isa()
    torch.ops.fastformer_cpu.set_isa(isa)
    try:
        yield
    finally:
        torch.ops.fastformer_cpu.set_isa(before)


def judge(call: Call, backend: str, label: str, device: torch.device, dtype: torch.dtype) -> Verdict:
    """Outputs and gradients by the error rule. Several draws are judged as one where tensors are small: one draw says
    little about a largest error."""
    fused, eager = call.bind(call.fused, device), call.bind(call.eager, device)
    where = label, str(device), call.op, call.what, str(dtype).removeprefix("torch.")
    runs = []
    for draw in range(DRAWS if call.elements < 100_000 else 1):
        tensors = call.tensors(device, dtype, draw)
        ref64, expected = calls.results(eager, tensors, torch.float64), calls.results(eager, tensors)
        try:
            with fastformer.backend(backend, strict=True):
                results = calls.results(fused, tensors)
        except NotImplementedError as error:
            return Verdict(*where, "", math.nan, math.nan, declined=str(error))
        except Exception as error:  # whatever a kernel runs into: the other calls are still to be judged
            return Verdict(*where, "", math.nan, math.nan, f"{type(error).__name__}: {error}")
        runs.append((results, expected, ref64))
    errors = {}
    for name in runs[0][0]:
        result, expected, ref64 = (
            torch.stack(tensors) for tensors in zip(*([r[name] for r in run] for run in runs), strict=True)
        )
        judged = accuracy(result, expected, ref64)
        # In float64 eager may be the reference itself: then only rounding separates the two.
        units = 31 * ulp(ref64, dtype) if dtype == torch.float64 else 0.0
        errors[name] = judged.fused, judged.allowed + units
    worst = max(errors, key=lambda name: closeness(*errors[name]))
    return Verdict(*where, worst, *errors[worst])


def closeness(error: float, bound: float) -> float:
    """The error in parts of its bound; NaN counts as the worst."""
    if error <= bound:
        return error / bound if bound else 0.0
    return error / bound if bound and not math.isnan(error) else math.inf


def show(found: list[Verdict]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    console.print(table(found))
    console.print(LEGEND, style="dim")
    wrong = [verdict for verdict in found if not verdict.ok]
    for verdict in wrong:
        what = verdict.problem or f"error {verdict.error:.2e} of {verdict.result}, at most {verdict.bound:.2e} allowed"
        line = f"{verdict.backend}: {verdict.op} {verdict.call}, {verdict.dtype}: {what}"
        console.print(line, style="red", markup=False, soft_wrap=True)
    style = "bold red" if wrong else "bold green"
    taken = sum(not verdict.declined for verdict in found)
    console.print(f"{taken - len(wrong)} of {taken} calls are right", style=style)


def table(found: list[Verdict]) -> Table:
    """One row for each call, with its dtypes side by side."""
    dtypes = list(dict.fromkeys(verdict.dtype for verdict in found))
    rows: dict[tuple[str, str, str], dict[str, Verdict]] = {}
    for verdict in found:
        rows.setdefault((verdict.backend, verdict.op, verdict.call), {})[verdict.dtype] = verdict
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("backend", "op", "call"):
        table.add_column(name)
    for dtype in dtypes:
        table.add_column(f"{dtype}\nerror / bound", justify="right", no_wrap=True)
    table.add_column("ok", justify="right")
    for (backend, op, call), by_dtype in rows.items():
        ok = all(verdict.ok for verdict in by_dtype.values())
        cells = [cell(by_dtype.get(dtype)) for dtype in dtypes]
        table.add_row(backend, op, escape(call), *cells, "yes" if ok else "[bold red]NO[/]")
    return table


def cell(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    if verdict.declined:
        return "[dim]not taken[/]"
    text = "raises" if verdict.problem else f"{verdict.error:.1e} / {verdict.bound:.1e}"
    return text if verdict.ok else f"[bold red]{text}[/]"


def as_json(found: list[Verdict]) -> list[dict[str, Any]]:
    return [asdict(v) | {"error": finite(v.error), "bound": finite(v.bound), "ok": v.ok} for v in found]
