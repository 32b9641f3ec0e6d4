"""`fastformer bench`: each op and layer against eager PyTorch, torch.compile and what this CPU can do at most."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from fastformer import backends, library
from fastformer.cli import bench_cases, bench_ceilings, machine
from fastformer.cli.bench_cases import LAYERS, Case
from fastformer.cli.bench_ceilings import Ceilings
from fastformer.cli.compare import Announce, check_writable, duration, finite, progress
from fastformer.cli.errors import UserError
from fastformer.cli.measure import Accuracy, Timing, accuracy, time_interleaved
from fastformer.cli.tune import BERT_BASE, GPT2, WRONG, as_tuple, sizes_of

LEGEND = """\
contenders     take turns in one run; median time, spread: interquartile range in percent of it; ratio: against eager
fastformer     the op as ops.* runs it; packed: on weights packed before, as accelerated models run it without gradients
GFLOP/s        of the matrix products, masked keys left out; three times the forward's for forward and backward
of peak        of multiplications and additions in registers; bfloat16: of the largest of torch's products, where the
               machine has instructions for it
GB/s           each tensor once, although a cache may hold it or a kernel read it twice
of bandwidth   of reading L2 where the tensors fit into it, else of reading memory
compile        first call of what torch.compile made, its compilation included
error          against float64, and what is allowed: see fastformer verify; of int8 the least cosine"""

DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Result:
    """Of one contender."""

    timing: Timing | None  # None where it did not run
    first: float | None = None  # seconds of its first call
    accuracy: Accuracy | None = None  # where it is furthest from what is allowed
    problem: str | None = None


@dataclass(frozen=True)
class Row:
    case: str
    op: str
    dtype: str
    backward: bool
    operations: float
    bytes: float
    results: dict[str, Result]

    def ratio(self, name: str) -> float | None:
        eager, one = self.results["eager"].timing, self.results[name].timing
        return eager.median / one.median if eager and one else None


def bench(
    ops: Annotated[list[str] | None, typer.Argument(metavar="[OP]...", help="Ops and layers (default: all).")] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Checkpoint folder whose shapes are taken (default: BERT-base and GPT-2)."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="|".join(DTYPES), help="Only this one; may be repeated.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: as many as torch takes).")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time for the timing of each row.")] = 0.5,
    compile: Annotated[bool, typer.Option(help="Measure torch.compile, too, which takes its time.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every figure and every sample to this file.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw the roofline chart.")] = None,
) -> None:
    """Measure ops and layers on this CPU: times, ratios to eager PyTorch, percentages of what the machine can do."""
    wanted = chosen(ops, [*backends.OPS, *LAYERS], "OP")
    dtypes = chosen(dtype, DTYPES, "--dtype")
    check_writable(json_file)
    check_writable(png, "--png")
    if png is not None:
        check_matplotlib()
    if not library.available():
        raise UserError(f"bench measures the CPU kernels, which are not there: {library.why_unavailable()}")
    models = [sizes_of(model)] if model else [BERT_BASE, GPT2]
    count = threads or torch.get_num_threads()
    no_compiler = why_no_compiler() if compile else "--no-compile"

    rows: list[Row] = []
    with progress() as announce, bench_ceilings.use_threads(count):
        announce("what the machine can do at most")
        ceilings = [bench_ceilings.measure(n, max(seconds, 0.2)) for n in sorted({1, count})]
        for case in bench_cases.cases(models, wanted, dtypes):
            rows.append(measure(case, no_compiler is None, seconds, announce))
    content = as_json(rows, ceilings, no_compiler, seconds)
    if json_file is not None:
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if png is not None:
        draw(content, png)
    show(content)
    if not content["agree"]:
        raise typer.Exit(1)


def chosen(names: list[str] | None, known: list[str] | tuple[str, ...], argument: str) -> list[str]:
    for name in names or []:
        if name not in known:
            raise UserError(f"{argument}: got {name!r}, expected one of {', '.join(known)}")
    return list(names or known)


def check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--png needs matplotlib: pip install 'fastformer[bench]'") from None


def why_no_compiler() -> str | None:
    """Why torch.compile can't work here, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # of torch's own type, which it keeps to itself
        return f"it has no C++ compiler: {error}".splitlines()[0]
    return None


def measure(case: Case, compiles: bool, seconds: float, announce: Announce) -> Row:
    """Checks all contenders, then times those that are right."""
    label = f"{case.name}, {case.dtype}{', forward and backward' * case.backward}"
    announce(label)
    contenders = dict(case.contenders)
    if compiles and case.dtype != "int8" and not case.op.startswith("crf"):  # the loop over positions takes it minutes
        torch._dynamo.reset()  # or it gives up on a function that comes with many sizes
        contenders["torch.compile"] = torch.compile(contenders["eager"], dynamic=False)
    runs = {name: runner(case, function, case.modules.get(name)) for name, function in contenders.items()}
    if "torch.compile" in runs:
        runs["torch.compile"] = runner(case, contenders["torch.compile"], case.modules.get("eager"))
    tensors64 = {name: x.double() for name, x in case.tensors.items()}
    ref64 = runner(case, case.reference, case.modules.get("reference"), tensors64)()

    checked: dict[str, Result] = {}
    expected: tuple[Tensor, ...] | None = None
    for name, run in runs.items():
        start = time.perf_counter()
        try:
            outputs = run()
        except Exception as error:  # what a compiler runs into, say; the others may run
            checked[name] = Result(None, problem=f"{type(error).__name__}: {error}".splitlines()[0][:200])
            continue
        first = time.perf_counter() - start
        expected = expected or outputs
        judged = judge(outputs, expected, ref64, case.dtype == "int8" and name != "eager")
        checked[name] = Result(None, first, judged, None if agrees(judged) else "wrong")
    timings = time_interleaved({name: runs[name] for name, one in checked.items() if one.problem is None}, seconds)
    results = {name: Result(timings.get(name), one.first, one.accuracy, one.problem) for name, one in checked.items()}
    return Row(case.name, case.op, case.dtype, case.backward, case.operations, case.bytes, results)


def runner(
    case: Case, function: Callable, module: torch.nn.Module | None, tensors: dict[str, Tensor] | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """Calls the function on the case's tensors: its outputs and, with a backward, the gradients of the tensors and of
    the module's parameters."""
    tensors = tensors or case.tensors
    if not case.backward:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return as_tuple(function(**tensors))

        return forward
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    wanted = [*leaves.values(), *(module.parameters() if module else ())]
    weights: list[Tensor] = []  # of the outputs in the sum whose gradients are taken

    def both() -> tuple[Tensor, ...]:
        outputs = as_tuple(function(**leaves))
        if not weights:
            generator = torch.Generator().manual_seed(2)
            weights.extend(torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs)
        return tuple(out.detach() for out in outputs) + torch.autograd.grad(outputs, wanted, weights)

    return both


def judge(
    results: tuple[Tensor, ...], expected: tuple[Tensor, ...], ref64: tuple[Tensor, ...], quantized: bool
) -> Accuracy:
    """Of the result that is furthest from what is allowed."""
    judged = [accuracy(*map(floating, three), quantized) for three in zip(results, expected, ref64, strict=True)]
    return max(judged, key=excess)


def floating(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.double()


def excess(judged: Accuracy) -> float:
    if judged.cosine is not None:
        return math.inf if math.isnan(judged.cosine) else -judged.cosine
    if math.isnan(judged.fused):
        return math.inf
    return judged.fused / judged.allowed if judged.allowed else (math.inf if judged.fused else 0.0)


def agrees(judged: Accuracy) -> bool:
    """One draw says little about a largest error: `fastformer verify` judges by the rule."""
    return judged.agree or (judged.cosine is None and judged.fused <= WRONG * judged.allowed)


def as_json(rows: list[Row], ceilings: list[Ceilings], no_compiler: str | None, seconds: float) -> dict[str, Any]:
    ours = [one for row in rows for name, one in row.results.items() if name.startswith("fastformer")]
    return {
        "environment": machine.environment(),
        "settings": {"threads": ceilings[-1].threads, "seconds": seconds},
        "ceilings": [asdict(one) for one in ceilings],
        "torch.compile": no_compiler and f"left out: {no_compiler}",
        "agree": not any(one.problem for one in ours),
        "rows": [
            {name: value for name, value in vars(row).items() if name != "results"}
            | {"contenders": {name: speeds(row, name, ceilings[-1]) for name in row.results}}
            for row in rows
        ],
    }


def speeds(row: Row, name: str, ceilings: Ceilings) -> dict[str, Any]:
    """Of a contender, in the units of the ceilings: per second, and as a part of them."""
    result, timing = row.results[name], row.results[name].timing
    dtype = "float32" if row.dtype == "int8" and name == "eager" else row.dtype
    peak = ceilings.operations(dtype)
    found: dict[str, Any] = dict.fromkeys(
        ("median_s", "spread", "ratio", "flops", "of_peak", "bytes_per_s", "of_bandwidth", "samples_s")
    )
    if timing:
        flops, rate = row.operations / timing.median, row.bytes / timing.median
        found |= {"median_s": timing.median, "spread": timing.spread, "ratio": row.ratio(name)}
        found |= {"flops": flops or None, "of_peak": flops / peak if flops and peak else None}
        found |= {"bytes_per_s": rate, "of_bandwidth": rate / ceilings.bandwidth(row.bytes)}
        found["samples_s"] = timing.samples
    judged = result.accuracy
    return found | {
        "first_call_s": result.first,
        "error": finite(judged.fused) if judged else None,
        "allowed_error": finite(judged.allowed) if judged else None,
        "cosine": judged.cosine if judged else None,
        "problem": result.problem,
    }


def show(content: dict[str, Any]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 180)
    cpu, threads = content["environment"]["cpu"], content["settings"]["threads"]
    console.print(f"{cpu['name']}, {cpu['kernels_isa']} kernels, {threads} thread{'s' * (threads > 1)}", markup=False)
    for one in content["ceilings"]:
        console.print(ceilings_text(one), markup=False, soft_wrap=True)
    console.print(table(content))
    console.print(LEGEND, style="dim")
    if reason := content["torch.compile"]:
        console.print(f"torch.compile was {reason}", style="yellow", markup=False, soft_wrap=True)
    for row in content["rows"]:
        for name, one in row["contenders"].items():
            if one["problem"]:
                line = f"{title(row)}, {row['dtype']}: {name}: {one['problem']}"
                console.print(line, style="red", markup=False, soft_wrap=True)
    style = "bold green" if content["agree"] else "bold red"
    console.print("outputs agree" if content["agree"] else "outputs do not agree", style=style)


def ceilings_text(one: dict[str, Any]) -> str:
    def giga(value: float | None) -> str:
        return "-" if value is None else f"{value / 1e9:,.0f}"

    threads = one["threads"]
    return (
        f"at most with {threads} thread{'s' * (threads > 1)}: {giga(one['float32'])} GFLOP/s in float32, "
        f"{giga(one['bfloat16'])} in bfloat16, {giga(one['int8'])} GOP/s in int8; "
        f"{giga(one['memory'])} GB/s from memory, {giga(one['l2'])} from L2"
    )


def title(row: dict[str, Any]) -> str:
    return row["case"] + ", forward and backward" * row["backward"]


def table(content: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("call", "dtype", "contender"):
        table.add_column(name, no_wrap=name != "call")
    for name in ("median", "spread", "ratio", "GFLOP/s", "of peak", "GB/s", "of bandwidth", "compile", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in content["rows"]:
        labels = [escape(title(row)), row["dtype"]]
        for number, (name, one) in enumerate(row["contenders"].items()):
            last = number == len(row["contenders"]) - 1
            table.add_row(*(["", ""] if number else labels), name, *cells(name, one), end_section=last)
    return table


def cells(name: str, one: dict[str, Any]) -> list[str]:
    def cell(key: str, template: str, unit: float = 1.0) -> str:
        return "" if one[key] is None else template.format(one[key] / unit)

    ratio = one["ratio"] if name != "eager" else None
    style = "green" if (ratio or 0) >= 1 else "red"
    error = cell("error", "{:.1e}") + cell("allowed_error", " / {:.1e}")
    if one["cosine"] is not None:
        error = f"cosine {one['cosine']:.5f}"
    return [
        "" if one["median_s"] is None else duration(one["median_s"]),
        cell("spread", "{:.0%}"),
        "" if ratio is None else f"[bold {style}]{ratio:.2f}x[/]",
        cell("flops", "{:,.1f}", 1e9),
        cell("of_peak", "{:.0%}"),
        cell("bytes_per_s", "{:,.1f}", 1e9),
        cell("of_bandwidth", "{:.0%}"),
        duration(one["first_call_s"]) if name == "torch.compile" and one["first_call_s"] else "",
        error,
    ]


def draw(content: dict[str, Any], path: Path) -> None:
    """The roofline (Williams et al., 2009): operations a second over operations a byte, of all with products."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ceilings = content["ceilings"][-1]
    figure, axes = plt.subplots(figsize=(10, 7), layout="constrained")
    for dtype in DTYPES:
        peak = ceilings[dtype]
        if peak is None:
            continue
        for source, style in (("memory", "-"), ("l2", "--")):
            intensities = sorted((0.25, peak / ceilings[source], 4096))
            roof = [min(peak, ceilings[source] * x) / 1e9 for x in intensities]
            axes.plot(intensities, roof, style, color="gray", linewidth=0.8)
        axes.annotate(dtype, (4096, peak / 1e9), ha="right", va="bottom", fontsize=8)
    colors = {
        "eager": "tab:gray",
        "torch.compile": "tab:orange",
        "fastformer": "tab:blue",
        "fastformer packed": "tab:cyan",
    }
    markers = {"float32": "o", "bfloat16": "s", "int8": "^"}
    points: dict[str, list[tuple[float, float]]] = {}
    for row in content["rows"]:
        for name, one in row["contenders"].items():
            if one["flops"]:
                points.setdefault(f"{name}, {row['dtype']}", []).append(
                    (row["operations"] / row["bytes"], one["flops"] / 1e9)
                )
    for label, found in points.items():
        name, _, dtype = label.partition(", ")
        axes.plot(*zip(*found, strict=True), markers[dtype], color=colors[name], label=label, alpha=0.8, markersize=5)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s (GOP/s in int8)")
    threads = ceilings["threads"]
    axes.set_title(f"{content['environment']['cpu']['name']}, {threads} thread{'s' * (threads > 1)}; dashed: from L2")
    if points:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
