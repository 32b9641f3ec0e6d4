"""What the machine code of a kernel may use: rules that hold for all, and the limits in budgets.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pairs
import torch
from aot import Facts, Kernel, compiling_for
from calls import CALLS, KINDS

from fastformer.kernels import configs

FILE = Path(__file__).with_name("budgets.json")

# registers, shared, and the instruction of its dots; stack and spills are 0 for all.
Budget = dict[str, int | str]


def compile_call(target: str, call: str, kind: str) -> dict[str, Facts]:
    """The kernels of a call by name, in the order of their first launch; "name 2" is compiled from the same source."""
    return {name: kernel.facts() for name, kernel in _named(_compile(target, call, kind)).items()}


def compile_candidates(target: str, call: str, kind: str) -> dict[str, Facts]:
    """The same, of the kernels with every configuration that `fastformer tune` could choose instead, by its name."""
    found: dict[str, Facts] = {}
    with configs.trial() as trial:
        first = {kernel.hash for kernel in _compile(target, call, kind)}
        for key, candidates in list(trial.candidates.items()):
            for config in candidates[1:]:
                trial.chosen = {key: config}
                kernels = _named(kernel for kernel in _compile(target, call, kind) if kernel.hash not in first)
                found |= {f"{name}, {config}": kernel.facts() for name, kernel in kernels.items()}
    return found


def _compile(target: str, call: str, kind: str) -> list[Kernel]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32x3" else "highest")
    try:
        with compiling_for(target) as kernels:
            (CALLS | pairs.CALLS)[call](KINDS[kind])
    finally:
        torch.set_float32_matmul_precision(before)
    return kernels


def _named(kernels: Iterable[Kernel]) -> dict[str, Kernel]:
    named: dict[str, Kernel] = {}
    for kernel in {kernel.hash: kernel for kernel in kernels}.values():
        same = sum(other.name == kernel.name for other in named.values())
        named[f"{kernel.name} {same + 1}" if same else kernel.name] = kernel
    return named


def faults(target: str, kind: str, facts: Facts, budget: Budget | None) -> list[str]:
    """What is wrong with a kernel, in words; without a budget, only what holds for every kernel."""
    most = configs.shared_memory(target)
    limits = {"shared": most} | (budget or {}) | {"stack": 0, "spills": 0}
    limits["shared"] = min(limits["shared"], most)
    found = [
        f"{name}: {getattr(facts, name)}, at most {limit} allowed"
        for name, limit in limits.items()
        if name != "tensor_cores" and getattr(facts, name) > limit
    ]
    if facts.precisions:
        found += _faults_of_dots(target, kind, facts, (budget or {}).get("tensor_cores"))
    return found


def _faults_of_dots(target: str, kind: str, facts: Facts, instruction: str | None) -> list[str]:
    found = []
    if kind == "tf32x3" and instruction is None and facts.precisions == ["ieee"]:
        kind = "float32"  # of a crowded call, for which tf32x3 has no registers
    if kind in ("float32", "tf32x3"):
        wanted = "ieee" if kind == "float32" else kind
        if facts.precisions != [wanted] or facts.tf32 != (kind == "tf32x3"):
            found.append(f"dots want {wanted}, got {', '.join(facts.precisions)}; tf32 in the code: {facts.tf32}")
    if kind == "float32":
        if target != "gfx942" and facts.tensor_cores:  # whose v_mfma takes true float32
            found.append(f"float32 is on tensor cores: {', '.join(facts.tensor_cores)}")
    elif not facts.tensor_cores:
        found.append("its dots are not on tensor cores")
    elif instruction and instruction not in facts.tensor_cores:
        found.append(f"its dots are {', '.join(facts.tensor_cores)}, no longer {instruction}")
    return found


def load() -> dict[str, dict[str, dict[str, dict[str, Budget]]]]:
    """Call -> kind -> target -> kernel -> limits."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def budget_of(facts: Facts) -> Budget:
    """A tenth more registers than now, in the steps in which they are given out, and the shared memory as it is."""
    budget = {"registers": min(-(-facts.registers * 11 // 80) * 8, 512), "shared": facts.shared}
    if facts.tensor_cores:
        budget["tensor_cores"] = max(facts.tensor_cores, key=facts.tensor_cores.get)
    return budget


def save(budgets: dict) -> None:
    """A line for each call, kind and target."""
    calls = []
    for call, by_kind in sorted(budgets.items()):
        kinds = []
        for kind, by_target in sorted(by_kind.items()):
            lines = [f'   "{target}": {json.dumps(kernels)}' for target, kernels in by_target.items()]
            kinds.append(f'  "{kind}": {{\n' + ",\n".join(lines) + "\n  }")
        calls.append(f' "{call}": {{\n' + ",\n".join(kinds) + "\n }")
    FILE.write_text("{\n" + ",\n".join(calls) + "\n}\n")
