"""Compiles, for a GPU that is not there, exactly what the host functions would launch on it.

A driver that only answers questions stands in for Triton's, CPU tensors stand in for those on the GPU, and every launch
compiles and stops there: signature, divisibility, strides and tile sizes are those of real calls.

    with compiling_for("sm_90") as kernels:
        ops.layer_norm(torch.empty(64, 768), 768)
    print(kernels[0].facts())

It wants a process without TRITON_INTERPRET. Machine code is kept in build/triton, or
$TRITON_CACHE_DIR.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import fastformer
from fastformer import backends, ops, tuning  # noqa: F401  ops: registers them
from fastformer.kernels.configs import shared_memory
from fastformer.ops import common

ROOT = Path(__file__).parents[2]
if "TRITON_CACHE_DIR" not in os.environ:
    triton.knobs.cache.dir = str(ROOT / "build" / "triton")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
MULTIPROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304, "gfx1100": 96}

_TENSOR_CORES = r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma|v_wmma)"  # in the machine code


@dataclass(frozen=True)
class Facts:
    """What the machine code of a kernel says."""

    registers: int  # a thread
    stack: int  # bytes a thread
    spills: int  # loads and stores of spilled registers
    shared: int  # bytes a program
    tensor_cores: dict[str, int]  # how often each instruction that uses them stands in the code
    precisions: list[str]  # the `input_precision` of its dots; none without a dot
    tf32: bool
    warps: int
    stages: int


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    name: str
    target: str
    compiled: triton.compiler.CompiledKernel

    @property
    def hash(self) -> str:
        return self.compiled.hash

    def facts(self) -> Facts:
        kept = Path(triton.knobs.cache.dir) / "facts" / f"{self.hash}-{_VERSION}.json"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            read = _read_nvidia if self.target.startswith("sm_") else _read_amd
            new = kept.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(dataclasses.asdict(read(self))))
            new.replace(kept)
        return Facts(**json.loads(kept.read_text()))


_VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]  # of what reads the machine code


def _read_nvidia(kernel: Kernel) -> Facts:
    compiled = kernel.compiled
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        resources = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _tool("nvdisasm", "--print-code", cubin.name)
    return Facts(
        registers=int(re.search(r"REG:(\d+)", resources)[1]),
        stack=int(re.search(r"STACK:(\d+)", resources)[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        tf32=re.search(r"(?:mma|cvt)\S*\.tf32", compiled.asm["ptx"]) is not None,
        **_of_both(compiled, code),
    )


def _read_amd(kernel: Kernel) -> Facts:
    code = kernel.compiled.asm["amdgcn"]

    def entry(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    return Facts(
        registers=entry("vgpr_count"),
        stack=entry("private_segment_fixed_size"),
        spills=entry("vgpr_spill_count"),  # those of scalar registers go to vector registers, or else show in the stack
        tf32="xf32" in code,
        **_of_both(kernel.compiled, code),
    )


def _of_both(compiled: triton.compiler.CompiledKernel, code: str) -> dict:
    dots = re.findall(r"tt\.dot [^\n]*", compiled.asm["ttir"])
    precisions = {found[1] if (found := re.search(r"inputPrecision = (\w+)", dot)) else "ieee" for dot in dots}
    return {
        "tensor_cores": dict(Counter(re.findall(_TENSOR_CORES, code))),
        "precisions": sorted(precisions),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
    }


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


class _Driver:
    """Answers for a GPU of the target; runs nothing. Each target is a device of its own, as caches go by device."""

    def __init__(self, target: str) -> None:
        self.target = target
        properties = {"max_shared_mem": shared_memory(target), "multiprocessor_count": MULTIPROCESSORS[target]}
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


_compile = JITFunction.run


def _translate(self: JITFunction, key, signature, device, constexprs, options, attrs, warmup) -> None:
    """In the place of `JITFunction._do_compile`: from Python to Triton's IR, which takes a tenth of the time."""
    _, _, target, backend, _ = self.device_caches[device]
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = self.ASTSource(self, signature, constexprs, attrs)
    source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


@contextlib.contextmanager
def compiling_for(target: str, only_translate: bool = False) -> Iterator[list[Kernel]]:
    """Inside, calls on CPU tensors go to the Triton kernels, which are compiled for `target` and not run. The list has
    every launch's kernel, in order; where they are only translated, without machine code."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("with TRITON_INTERPRET=1 nothing is compiled")
    kernels: list[Kernel] = []

    def run(self: JITFunction, *args, grid, warmup, **options):
        if callable(grid):
            grid(dict(zip(self.arg_names, args, strict=False)) | options)  # it must be computable
        compiled = _compile(self, *args, grid=grid, warmup=True, **options)
        kernels.append(Kernel(self.fn.__name__, target, compiled))
        return compiled

    stand_in = _Driver(target)
    properties = SimpleNamespace(
        multi_processor_count=MULTIPROCESSORS[target], shared_memory_per_block_optin=shared_memory(target)
    )
    replaced = [
        (JITFunction, "run", run),
        (driver, "_active", stand_in),
        (torch.cuda, "current_device", stand_in.get_current_device),
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        (torch.cuda, "get_device_capability", lambda device=None: divmod(int(re.sub(r"\D", "", target)), 10)),
        (tuning, "table", None),  # of this machine's GPU, if it has one
        (torch.version, "hip", None if target.startswith("sm_") else "stand-in"),
    ]
    if only_translate:
        replaced.append((JITFunction, "_do_compile", _translate))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        with _cpu_tensors_go_to_triton(), fastformer.backend("triton", strict=True):
            yield kernels
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextlib.contextmanager
def _cpu_tensors_go_to_triton() -> Iterator[None]:
    library = torch.library.Library("fastformer_triton", "IMPL")
    declared = {op: by_backend["triton"] for op, by_backend in backends._BY_OP.items() if "triton" in by_backend}
    for op, implementation in declared.items():
        backends._BY_OP[op]["triton"] = dataclasses.replace(implementation, device="cpu")
        for raw_name in (op, f"{op}_backward"):
            library.impl(raw_name, common._launcher(op, raw_name), "CPU")
    try:
        yield
    finally:
        library._destroy()
        for op, implementation in declared.items():
            backends._BY_OP[op]["triton"] = implementation
