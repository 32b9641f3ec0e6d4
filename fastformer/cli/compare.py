"""`fastformer compare`: eager and fused side by side, their errors, times and memory."""

import contextlib
import copy
import gc
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import fastformer
from fastformer import backends
from fastformer.accelerate import Report
from fastformer.cli import generation, machine
from fastformer.cli.errors import UserError
from fastformer.cli.generation import Generation, measure_generation
from fastformer.cli.measure import (
    LEAST_COSINE,
    Accuracy,
    FirstCall,
    Forward,
    Timing,
    accuracy,
    first_call,
    peak_memory,
    time_interleaved,
)
from fastformer.cli.workloads import Workload, default_workloads, text_workload

LEGEND = """\
error    largest |output - float64|; float64 is eager PyTorch on the same weights and inputs in that type
ok       the fused error is at most twice the eager one, plus one unit in the last place of the largest output
latency  median time of one forward; eager and fused take turns
spread   interquartile range of the latencies, in percent of the median
tokens/s real tokens, without padding
memory   most that one forward adds to the process while it runs, once warm
kept     what the first forward leaves in the process, such as packed weights
first    time of that first forward, packing included"""
NARROW_LEGEND = f"""
cosine   least of the fused outputs with float64, row by row; what is judged: ok from {LEAST_COSINE} on"""

NOISY = 0.25  # spread from which the medians mean little

Announce = Callable[[str], None]


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class Contender:
    error: float
    timing: Timing
    memory: int | None  # bytes, peak of one warm forward
    first: FirstCall


@dataclass(frozen=True)
class Row:
    workload: str
    inputs: str
    tokens: int
    accuracy: Accuracy
    contenders: dict[str, Contender]  # "eager" and "fused"
    report: Report  # what was swapped and what was left, after the runs

    @property
    def agree(self) -> bool:
        return self.accuracy.agree

    @property
    def ratio(self) -> float:
        return self.contenders["eager"].timing.median / self.contenders["fused"].timing.median

    def tokens_per_s(self, name: str) -> float:
        return self.tokens / self.contenders[name].timing.median


def compare(
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Checkpoint folder of transformers (default: MiniLM-L6 and others)."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text file, one input a line (default: sentences of our own).")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every figure and every sample to this file.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: as many as torch takes).")] = None,
    dtype: Annotated[DType, typer.Option(help="Type of weights and activations.")] = DType.float32,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", envvar="FASTFORMER_BACKEND", help="Backend of the fused model (default: the best)."
        ),
    ] = None,
    quantize: Annotated[str | None, typer.Option(metavar="int8", help="Fused inference in 8 bits (CPUs).")] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="bfloat16", help="Fused inference on weights in 16 bits (CPUs).")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time for the timing of each row.")] = 8.0,
) -> None:
    """Run models in eager PyTorch and on fused kernels, side by side; exit with 1 if their outputs do not agree."""
    check_backend(backend)
    if quantize not in (None, "int8"):
        raise UserError(f"--quantize: got {quantize!r}, expected int8")
    if weights not in (None, "bfloat16"):
        raise UserError(f"--weights: got {weights!r}, expected bfloat16")
    if quantize and weights:
        raise UserError(f"--weights: got {weights}, expected none beside --quantize {quantize}")
    check_writable(json_file)
    if threads is not None:
        torch.set_num_threads(threads)
    workloads = [text_workload(model, text)] if model or text else default_workloads()
    narrow = {"quantize": quantize, "weights": weights}
    settings = {"threads": torch.get_num_threads(), "dtype": dtype.value, "backend": backend, **narrow}
    settings["seconds"] = seconds

    rows: list[Row] = []
    generations: list[Generation] = []
    with progress() as announce, fastformer.backend(backend) if backend else contextlib.nullcontext():
        for workload in workloads:
            announce(f"{workload.name}: loading")
            model = workload.load().to(getattr(torch, dtype.value))
            rows += measure(workload, model, narrow, seconds, announce)
            if workload.prompt is not None:
                announce(f"{workload.name}: generation")
                models = {"eager": model, "fused": accelerated(model, narrow, workload.name)}
                exact = dtype == DType.float32 and not any(narrow.values())
                generations.append(measure_generation(workload.name, models, workload.prompt(model), exact))

    if json_file is not None:
        json_file.write_text(json.dumps(as_json(rows, generations, settings), indent=1) + "\n", encoding="utf-8")
    show(rows, generations, settings)
    if not agree(rows) or not agree(generations):
        raise typer.Exit(1)


def check_backend(name: str | None) -> None:
    if name is None:
        return
    if name not in backends.BACKENDS:
        raise UserError(f"--backend: got {name!r}, expected one of {', '.join(backends.BACKENDS)}")
    if reason := machine.why_not_here(name):
        raise UserError(f"--backend {name}: {reason}")
    if all(one.device == "cuda" for one in backends.implementations() if one.backend == name):
        raise UserError(f"--backend {name}: it takes tensors on GPUs, and compare runs on the CPU")


def check_writable(path: Path | None, option: str = "--json") -> None:
    """Before the work rather than after it."""
    if path is None:
        return
    target = path if path.exists() else path.parent
    if path.is_dir() or not target.exists() or not os.access(target, os.W_OK):
        raise UserError(f"{option} {path}: cannot write there")


def measure(
    workload: Workload, model: nn.Module, narrow: dict[str, str | None], seconds: float, announce: Announce
) -> Iterator[Row]:
    """One row for each of the workload's inputs; narrow: options of accelerate that change the numbers."""
    accelerated(model, narrow, workload.name)  # an architecture that is not supported is told before anything runs
    all_inputs = workload.inputs(model)

    announce(f"{workload.name}: reference in float64")
    model64 = copy.deepcopy(model).double()
    with torch.inference_mode():
        references = [inputs.forward(model64) for inputs in all_inputs]
    del model64

    for inputs, ref64 in zip(all_inputs, references, strict=True):
        announce(f"{workload.name}: {inputs.name}")
        fused = accelerated(model, narrow, workload.name)  # a new copy, so that its first call is a cold one
        forwards = {"eager": partial(inputs.forward, model), "fused": partial(inputs.forward, fused)}
        with torch.inference_mode():
            judged, contenders = measure_forwards(forwards, ref64, any(narrow.values()), seconds)
        yield Row(workload.name, inputs.name, inputs.tokens, judged, contenders, fastformer.report(fused))


def accelerated(model: nn.Module, narrow: dict[str, str | None], name: str) -> nn.Module:
    """An accelerated copy of the model."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing was swapped: said below
            fused = fastformer.accelerate(copy.deepcopy(model), **narrow)
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"{name}: {error}") from None
    report = fastformer.report(fused)
    if not report.fused:
        reasons = dict.fromkeys(reason for row in report.left for reason in row.reasons)
        raise UserError(f"{name}: nothing in it can be fused: {'; '.join(reasons)}")
    return fused


def measure_forwards(
    forwards: dict[str, Forward], ref64: torch.Tensor, narrow: bool, seconds: float
) -> tuple[Accuracy, dict[str, Contender]]:
    gc.collect()  # no measurement pays for what an earlier row left
    first = {name: first_call(forward) for name, forward in forwards.items()}
    outputs = {name: forward() for name, forward in forwards.items()}
    judged = accuracy(outputs["fused"], outputs["eager"], ref64, narrow)
    memory = {name: peak_memory(forward) for name, forward in forwards.items()}
    timings = time_interleaved(forwards, seconds)
    errors = {"eager": judged.eager, "fused": judged.fused}
    return judged, {name: Contender(errors[name], timings[name], memory[name], first[name]) for name in forwards}


def agree(rows: list[Row] | list[Generation]) -> bool:
    return all(row.agree for row in rows)


def show(rows: list[Row], generations: list[Generation], settings: dict[str, Any]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(heading(settings), markup=False, soft_wrap=True)
    console.print(table(rows))
    if generations:
        console.print(generation.generation_table(generations, duration))
    narrow = settings["quantize"] or settings["weights"]
    legends = (LEGEND + (NARROW_LEGEND if narrow else ""), *([generation.LEGEND] if generations else []))
    console.print("\n".join(legends), style="dim")
    console.print()
    for workload, report in {row.workload: row.report for row in rows if row.report.left}.items():
        console.print(f"not all of {workload} is fused:\n{report}\n", style="yellow", markup=False, soft_wrap=True)
    timings = [contender.timing for row in rows for contender in row.contenders.values()]
    timings += [timing for one in generations for timing in one.timings.values()]
    if any(timing.spread > NOISY for timing in timings):
        console.print("latencies vary a lot: is something else running on this machine?", style="yellow")
    if agree(rows) and agree(generations):
        console.print("outputs agree", style="bold green")
    else:
        wrong = "; ".join(f"{row.workload}, {row.inputs}" for row in (*rows, *generations) if not row.agree)
        console.print(f"outputs do not agree: {wrong}", style="bold red", markup=False, soft_wrap=True)


def heading(settings: dict[str, Any]) -> str:
    versions, cpu = machine.versions(), machine.cpu()
    kernels = f"{cpu['kernels_isa']} kernels" if cpu["kernels_isa"] else f"no CPU kernels: {cpu['kernels_unavailable']}"
    return (
        f"fastformer {versions['fastformer']}, torch {versions['torch']}, transformers {versions['transformers']}\n"
        f"{cpu['name']}, {settings['threads']} thread{'s' * (settings['threads'] > 1)}, {settings['dtype']}, "
        f"backend {settings['backend'] or 'as chosen for each call'}, {kernels}"
        + (f", fused in {settings['quantize']}" if settings["quantize"] else "")
        + (f", fused weights in {settings['weights']}" if settings["weights"] else "")
    )


def table(rows: list[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("workload")
    table.add_column("")
    for name in ("error", "ok", "latency", "spread", "tokens/s", "ratio", "memory", "kept", "first"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        for label, (name, contender) in zip((row.workload, row.inputs), row.contenders.items(), strict=True):
            fused = name == "fused"
            table.add_row(
                escape(label),
                name,
                f"{contender.error:.1e}",
                judgement(row.accuracy) if fused else "",
                duration(contender.timing.median),
                f"{contender.timing.spread:.1%}",
                f"{row.tokens_per_s(name):,.0f}",
                f"[bold {'green' if row.ratio >= 1 else 'red'}]{row.ratio:.2f}x[/]" if fused else "",
                megabytes(contender.memory),
                megabytes(contender.first.kept),
                duration(contender.first.seconds),
                end_section=fused,
            )
    return table


def judgement(accuracy: Accuracy) -> str:
    if accuracy.cosine is None:
        return "yes" if accuracy.agree else "[bold red]NO[/]"
    return f"cosine {accuracy.cosine:.4f}" if accuracy.agree else f"[bold red]NO: cosine {accuracy.cosine:.4f}[/]"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def megabytes(count: int | None) -> str:
    return "n/a" if count is None else f"{count / 1e6:.0f} MB"


def as_json(rows: list[Row], generations: list[Generation], settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "environment": machine.environment(),
        "settings": settings,
        "agree": agree(rows) and agree(generations),
        "generation": generation.as_json(generations),
        "rows": [
            {
                "workload": row.workload,
                "inputs": row.inputs,
                "tokens": row.tokens,
                "agree": row.accuracy.agree,
                "allowed_error": finite(row.accuracy.allowed),
                "cosine": row.accuracy.cosine,
                "ratio": row.ratio,
                "report": str(row.report),
                "contenders": {
                    name: {
                        "error": finite(contender.error),
                        "median_s": contender.timing.median,
                        "spread": contender.timing.spread,
                        "tokens_per_s": row.tokens_per_s(name),
                        "peak_memory_bytes": contender.memory,
                        "first_call_s": contender.first.seconds,
                        "kept_bytes": contender.first.kept,
                        "samples_s": contender.timing.samples,
                    }
                    for name, contender in row.contenders.items()
                },
            }
            for row in rows
        ],
    }


def finite(error: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return error if math.isfinite(error) else None


@contextlib.contextmanager
def progress() -> Iterator[Announce]:
    """Shows what is being done, on stderr: in one changing line on a terminal, in a line each elsewhere.

    The display is refreshed between measurements only, so that it takes no time from them.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda step: console.print(step, markup=False, soft_wrap=True)
        return
    columns = (TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=None)
        yield lambda step: bar.update(task, description=step, refresh=True)
