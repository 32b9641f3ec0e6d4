"""Everything about a GPU in one run: is it right, how fast is it, and how far from what the device can do?

    python bench/gpu.py [--quick] [--json FILE] [--chart FILE] [--no-tests]

First what the device can do at most (bench/ceilings.py), then whether the kernels are right (`fastformer verify`, the
tests of the ops), then the cases of bench/gpu_cases.py. Contenders take turns in one run; times are the GPU's own, with
an empty cache; results are checked by the error rule of `fastformer verify` before they are timed; rows that lose stay.
Exits with 1 if a result is wrong, with 2 if there is no GPU. --dry-run runs all of this on tiny CPU tensors, with what
this machine has in place of the Triton kernels, and writes no speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ceilings
import gpu_cases
import gpu_chart
import torch
from gpu_cases import Case
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from fastformer import library
from fastformer.cli import machine, verify
from fastformer.cli.compare import duration, finite, progress
from fastformer.cli.measure import Timing, accuracy, time_on

ROOT = Path(__file__).parents[1]
METHOD = (
    "contenders in turns; CUDA events; a write of 256 MiB before each run empties the L2 cache and lets the launch run "
    "ahead; median and interquartile range; operations and bytes are the least that the case needs"
)
PRODUCT = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}  # the ceiling of a dtype


@dataclasses.dataclass
class Result:
    """Of one contender."""

    timing: Timing | None = None
    error: float | None = None
    allowed: float | None = None
    problem: str | None = None  # why it was not run or is wrong

    @property
    def wrong(self) -> bool:
        return self.error is not None and not self.error <= self.allowed


def main() -> int:
    options = parse()
    if not options.dry_run and (reason := machine.why_no_gpu()):
        print(f"make gpu needs an NVIDIA or AMD GPU and a torch that is built for it: {reason}", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    scale = gpu_cases.TINY if options.dry_run else gpu_cases.QUICK if options.quick else gpu_cases.Scale()
    backends = [name for name in ("triton", "cuda") if not machine.why_not_here(name)]
    if options.dry_run:
        backends = ["cpu" if library.available() else "torch"]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    content: dict[str, Any] = {
        "dry_run": options.dry_run,
        "method": METHOD,
        "environment": machine.environment(),
        "device": device_facts(device),
        "backends": backends,
    }

    with progress() as announce:
        announce("what the device can do at most")
        content["ceilings"] = ceilings.measure(device, tiny=options.dry_run)
        if options.dry_run:
            content["ceilings"] = dict.fromkeys(content["ceilings"])
        content["verify"] = []
        for name in backends:
            verdicts = verify.verdicts(name, options.quick or options.dry_run, announce)
            content["verify"] += verify.as_json(list(verdicts))
        if options.tests:
            announce("the tests of the ops")
            content["tests"] = run_tests(backends, options.dry_run)
        content["rows"] = []
        for case in gpu_cases.cases(device, scale, backends):
            announce(f"{case.name}, {short(case.dtype)}{', backward' * case.backward}")
            results = measure(case, device, options)
            content["rows"].append(as_json(case, results, content["ceilings"], options.dry_run))
            write(options.json, content)  # what there is, should a later case end the process
    gpu_chart.draw(content, options.chart)
    show(content, console)
    console.print(f"written to {options.json} and {options.chart}", markup=False, soft_wrap=True)
    return 0 if is_right(content) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="FILE")
    parser.add_argument("--chart", type=Path, default=Path("gpu.png"), metavar="FILE")
    parser.add_argument("--seconds", type=float, default=1.0, help="for the timing of each case")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="leave out the tests of the ops")
    parser.add_argument("--dry-run", action="store_true", help="run all code on tiny CPU tensors; no speeds")
    return parser.parse_args()


def device_facts(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {}
    properties = torch.cuda.get_device_properties(device)
    names = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size", "gcnArchName")
    facts = {name: getattr(properties, name) for name in names if hasattr(properties, name)}
    return facts | {"cuda": torch.version.cuda, "hip": torch.version.hip, "cudnn": torch.backends.cudnn.version()}


def run_tests(backends: list[str], dry_run: bool) -> dict[str, Any]:
    """The tests of the ops on each backend, in processes of their own; a dry run only collects them."""
    found = {}
    for name in backends:
        command = [sys.executable, "-m", "pytest", "tests/ops", "-q", "-p", "no:cacheprovider"]
        command += ["--collect-only"] if dry_run else ["-m", "not slow"]
        environment = os.environ | {"FASTFORMER_BACKEND": name}
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        found[name] = {"exit_status": finished.returncode, "output": (finished.stdout + finished.stderr)[-4000:]}
    return found


def measure(case: Case, device: torch.device, options: argparse.Namespace) -> dict[str, Result]:
    """Checks, then times all contenders that run."""
    torch._dynamo.reset()  # or torch.compile gives up on a function that comes with many sizes
    runs = {name: runner(case, name) for name in case.contenders}
    results, expected = {}, None
    for name, run in runs.items():
        results[name] = Result()
        try:
            outputs = run(seed=1)
            if name not in case.own_masks:
                expected = expected or references(case, outputs)
                results[name].error, results[name].allowed = judge(case, outputs, *expected)
        except Exception as error:  # out of memory, or a call that this contender does not take
            results[name].problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if device.type == "cuda":
                torch.cuda.empty_cache()
        outputs = None
        if results[name].wrong:
            results[name].problem = "wrong"
    able = {name: run for name, run in runs.items() if results[name].problem is None}
    timings = time_on(device, able, *((0.0, 2) if options.dry_run else (options.seconds, 20)))
    for name, timing in timings.items():
        results[name].timing = timing
    return results


def runner(case: Case, name: str) -> Callable[..., tuple[Tensor, ...]]:
    """Runs a contender: its outputs and, with a backward, the gradients of the case's tensors."""
    function = case.contenders[name]
    if not case.backward:

        def forward(seed: int | None = None) -> tuple[Tensor, ...]:
            if seed is not None:
                torch.manual_seed(seed)
            with torch.no_grad():
                return as_tuple(function(**case.tensors))

        return forward
    leaves = {name: x.detach().requires_grad_() for name, x in case.tensors.items()}
    wanted = list(leaves.values())
    if name in case.modules:
        wanted += case.modules[name].parameters()
    weights: list[Tensor] = []

    def both(seed: int | None = None) -> tuple[Tensor, ...]:
        if seed is not None:
            torch.manual_seed(seed)
        outputs = as_tuple(function(**leaves))
        if not weights:
            weights.extend(map(output_weight, outputs))
        gradients = torch.autograd.grad(outputs, wanted, weights, allow_unused=name in case.modules)
        return outputs + gradients[: len(leaves)]

    return both


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def output_weight(output: Tensor) -> Tensor:
    """Of this output in the sum whose gradient is taken."""
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)


def references(case: Case, results: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Eager's results in the case's dtype and in float64, for the part that is checked of a contender's results."""
    part = {name: case.part(x) for name, x in case.tensors.items()}
    outputs = results[: len(results) - len(part)] if case.backward else ()
    weights = [case.part(output_weight(out)) for out in outputs]
    both = []
    for dtype in (case.dtype, torch.float64):
        torch.manual_seed(1)
        leaves = {name: x.detach().to(dtype).requires_grad_(case.backward) for name, x in part.items()}
        with torch.set_grad_enabled(case.backward):
            outputs = as_tuple(case.reference(**leaves))
            if case.backward:
                given = [weight.to(out.dtype) for weight, out in zip(weights, outputs, strict=True)]
                outputs += torch.autograd.grad(outputs, leaves.values(), given)
        both.append([x.detach() for x in outputs])
    return both[0], both[1]


def judge(case: Case, results: tuple[Tensor, ...], expected: list[Tensor], ref64: list[Tensor]) -> tuple[float, float]:
    """The error and what is allowed, of the result that comes closest to it."""
    judged = [
        accuracy(case.part(x.detach()), other, reference)
        for x, other, reference in zip(results, expected, ref64, strict=True)
    ]
    worst = max(judged, key=lambda one: verify.closeness(one.fused, one.allowed))
    return worst.fused, worst.allowed


def as_json(case: Case, results: dict[str, Result], ceiling: dict[str, float], dry_run: bool) -> dict[str, Any]:
    times = {name: r.timing.median for name, r in results.items() if r.timing and not dry_run}
    operations = case.operations * (3 if case.backward else 1)
    moved = case.bytes * (3 if case.backward else 1)

    def speeds(name: str, result: Result) -> dict[str, Any]:
        median = times.get(name)
        found = {
            "median_s": median,
            "spread": result.timing.spread if median else None,
            "ratio": times["eager"] / median if median and "eager" in times else None,
            "tflops": operations / median / 1e12 if median else None,
            "gbytes_per_s": moved / median / 1e9 if median else None,
        }
        found["of_peak"] = operations / median / ceiling[PRODUCT[short(case.dtype)]] if median else None
        found["of_bandwidth"] = moved / median / ceiling["bytes_per_s"] if median else None
        return found

    return {
        "group": case.group,
        "name": case.name,
        "dtype": short(case.dtype),
        "backward": case.backward,
        "contenders": {
            name: speeds(name, r)
            | {
                "error": None if r.error is None else finite(r.error),
                "allowed": None if r.allowed is None else finite(r.allowed),
                "checked": r.error is not None,
                "wrong": r.wrong,
                "problem": r.problem,
            }
            for name, r in results.items()
        },
    }


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def is_right(content: dict[str, Any]) -> bool:
    """Of fastformer's kernels; what else is wrong is shown, but is not ours."""
    ours = [one for row in content["rows"] for name, one in row["contenders"].items() if name.startswith("fastformer")]
    tests = content.get("tests", {}).values()
    return (
        not any(one["problem"] for one in ours)
        and all(row["ok"] for row in content["verify"])
        and all(one["exit_status"] == 0 for one in tests)
    )


def show(content: dict[str, Any], console: Console) -> None:
    console.print("dry run: nothing was measured" if content["dry_run"] else str(content["device"]), markup=False)
    for name, value in content["ceilings"].items():
        if value is not None:
            unit = "GB/s copied" if name == "bytes_per_s" else f"TFLOP/s in {name} products"
            console.print(f"{value / (1e9 if name == 'bytes_per_s' else 1e12):,.0f} {unit}")
    right = sum(row["ok"] for row in content["verify"])
    console.print(f"verify: {right} of {len(content['verify'])} calls are right")
    for name, one in content.get("tests", {}).items():
        lines = one["output"].strip().splitlines() or ["no output"]
        console.print(f"tests/ops on {name}: {lines[-1]}", markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("case", "dtype", "contender"):
        table.add_column(name, no_wrap=name != "case")
    for name in ("median", "spread", "against eager", "TFLOP/s", "of peak", "GB/s", "of bandwidth", "error / allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in content["rows"]:
        title = [escape(row["name"] + ", backward" * row["backward"]), row["dtype"]]
        for number, (name, one) in enumerate(row["contenders"].items()):
            first = title if number == 0 else ["", ""]
            table.add_row(*first, name, *cells(one), end_section=number == len(row["contenders"]) - 1)
    console.print(table)


def cells(one: dict[str, Any]) -> list[str]:
    def cell(key: str, template: str) -> str:
        return "" if one[key] is None else template.format(one[key])

    error = f"{one['error'] or 0:.1e} / {one['allowed'] or 0:.1e}" if one["checked"] else "not checked"
    if one["problem"]:
        error = f"[red]{escape(one['problem'][:60])}[/]" + f" {error}" * one["wrong"]
    return [
        "" if one["median_s"] is None else duration(one["median_s"]), cell("spread", "{:.0%}"),
        cell("ratio", "{:.2f}x"), cell("tflops", "{:.1f}"), cell("of_peak", "{:.0%}"),
        cell("gbytes_per_s", "{:,.0f}"), cell("of_bandwidth", "{:.0%}"), error,
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
