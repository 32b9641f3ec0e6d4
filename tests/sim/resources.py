"""What nvcc made of every CUDA kernel, read from the built library without a GPU (docs/cuda_budgets.md): registers,
stack, shared memory, occupancy, and which instructions stand in the machine code.

    python tests/sim/resources.py                  all of it, against budgets.json; writes docs/cuda_budgets.md
    python tests/sim/resources.py --set-budgets    budgets.json from what is built now, for people to review

Needs the library (make build-cuda), triton (for NVIDIA's cuobjdump), the toolkit's cuda_occupancy.h and a C++ compiler.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from build_backend import compiler, cuda_toolkit  # noqa: E402

LIBRARY = ROOT / "fastformer" / "libfastformer_cuda.so"
BUDGETS = Path(__file__).with_name("budgets.json")
PAGE = ROOT / "docs" / "cuda_budgets.md"

# What the host side launches a kernel with: (threads of a block, bytes of dynamic shared memory).
LAUNCHES = {
    r"attention::forward_kernel<float, 64>": (128, 60416),
    r"attention::forward_kernel<float, 128>": (128, 72704),
    r"attention::forward_kernel<float, 256>": (128, 93184),
    r"attention::forward_kernel<b?f16, 64>": (128, 41984),
    r"attention::forward_kernel<b?f16, 128>": (128, 50176),
    r"attention::forward_kernel<b?f16, 256>": (128, 58368),
    r"attention::forward_hopper_kernel<b?f16, 64>": (384, 81992),
    r"attention::forward_hopper_kernel<b?f16, 128>": (384, 163912),
    r"attention::grad_key_value_kernel<float, 64>": (128, 76800),
    r"attention::grad_key_value_kernel<float, 128>": (128, 84224),
    r"attention::grad_key_value_kernel<float, 256>": (64, 99584),
    r"attention::grad_key_value_kernel<b?f16, 64>": (128, 33792),
    r"attention::grad_key_value_kernel<b?f16, 128>": (128, 49664),
    r"attention::grad_key_value_kernel<b?f16, 256>": (128, 98816),
    r"attention::grad_query_kernel<float, 64>": (128, 76800),
    r"attention::grad_query_kernel<float, 128>": (128, 84992),
    r"attention::grad_query_kernel<float, 256>": (64, 99840),
    r"attention::grad_query_kernel<b?f16, 64>": (128, 33792),
    r"attention::grad_query_kernel<b?f16, 128>": (128, 50176),
    r"attention::grad_query_kernel<b?f16, 256>": (128, 99328),
    r"attention::(combine|delta)_kernel": (128, 0),
    r"matmul_kernel<.*Tile<128, 128": (256, 69632),
    r"matmul_kernel<.*Tile<64, 64": (128, 32768),
    r"matmul_hopper_kernel<.*HopperTile<128>": (384, 131136),
    r"matmul_hopper_kernel<.*HopperTile<256>": (384, 196672),
    r"finish_kernel": (128, 0),
    r"column_sums_kernel": (256, 0),
    r"sum_groups_kernel": (512, 0),
    r"weights_kernel": (256, 0),
    r"(forward|backward)_kernel<[^,]*, [^,]*, (true|false)(, true)?>": (128, 0),  # layer_norm, rows of up to 1024
}
# Instructions, by the part before a dot.
COUNTED = ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG", "FFMA", "LDG", "STG", "LDL", "STL")
# Tensor cores, ldmatrix, cp.async, TMA: a kernel that has them keeps them.
MUST_STAY = ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG")
WAITS = (
    "WARPGROUP"  # of wgmma: the compiler adds some, and says so in passing, where products would be in each other's way
)

# Of each architecture: (shared memory of a multiprocessor, of a block at most) in KiB, threads of a multiprocessor.
LIMITS = {
    "sm_80": (164, 163, 2048),
    "sm_86": (100, 99, 1536),
    "sm_89": (100, 99, 1536),
    "sm_90": (228, 227, 2048),
    "sm_90a": (228, 227, 2048),
    "sm_100": (228, 227, 2048),
    "sm_120": (100, 99, 1536),
}

RESERVED = 1024  # bytes of shared memory of each block, for CUDA itself; cuobjdump counts them from sm_90 on

OCCUPANCY = """
#include <cuda_occupancy.h>
extern "C" int blocks_of(int major, int minor, int shared, int block_shared, int most_threads, int registers, int stat,
                         int dynamic, int threads) {
  cudaOccDeviceProp device;
  device.computeMajor = major, device.computeMinor = minor;
  device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = most_threads;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536, device.warpSize = 32;
  device.sharedMemPerBlock = 48 * 1024, device.sharedMemPerBlockOptin = block_shared * 1024;
  device.sharedMemPerMultiprocessor = shared * 1024, device.reservedSharedMemPerBlock = 1024, device.numSms = 1;
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = threads, kernel.numRegs = registers, kernel.sharedSizeBytes = stat;
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF, kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = dynamic, kernel.numBlockBarriers = 1;
  cudaOccDeviceState state;
  cudaOccResult result;
  const cudaOccError error =
      cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, dynamic);
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -int(error);
}
"""


@dataclass
class Facts:
    registers: int  # of a thread
    stack: int  # bytes of a thread
    shared: int  # bytes of a block, static and dynamic
    threads: int  # of a block; 0: not in LAUNCHES
    instructions: Counter[str]
    warps: int = 0  # of a multiprocessor at once, of the most it can have
    most_warps: int = 0


def run(*command: str | Path, text: str | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, input=text).stdout


def cuobjdump() -> Path:
    folder = Path(importlib.util.find_spec("triton").origin).parent
    return folder / "backends" / "nvidia" / "bin" / "cuobjdump"


def capability(arch: str) -> int:
    return int(arch.removeprefix("sm_").removesuffix("a"))


def launch_of(kernel: str) -> tuple[int, int]:
    return next((size for pattern, size in LAUNCHES.items() if re.match(pattern, kernel)), (0, 0))


def read(resources: str, code: str) -> dict[tuple[str, str], Facts]:
    """(mangled kernel, architecture) -> facts, from what cuobjdump prints."""
    found = {}
    arch = ""
    for line in resources.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif match := re.match(r" Function (\w+):", line):
            name = match[1]
        elif match := re.match(r"\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, match.groups())
            found[name, arch] = Facts(registers, stack, shared, 0, Counter())
    for line in code.splitlines():
        if "arch = " in line:
            arch = line.split("arch = ")[1]
        elif match := re.match(r"\s+Function : (\w+)", line):
            instructions = found[match[1], arch].instructions
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z0-9]+)", line):
            instructions[match[1]] += 1
    return found


def occupancy() -> Callable[[str, Facts, int], int]:
    """(architecture, facts, dynamic shared memory) -> blocks of a multiprocessor, by NVIDIA's calculator."""
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "occupancy.so"
        include = f"-I{cuda_toolkit() / 'include'}"
        run(*compiler(), "-shared", "-fPIC", "-x", "c++", "-", include, "-o", library, text=OCCUPANCY)
        blocks_of = ctypes.CDLL(str(library)).blocks_of

    def blocks(arch: str, facts: Facts, dynamic: int) -> int:
        number = capability(arch)
        result = blocks_of(
            number // 10, number % 10, *LIMITS[arch], facts.registers, facts.shared - dynamic, dynamic, facts.threads
        )
        if result < 0:
            raise RuntimeError(f"cuda_occupancy.h: error {-result} for {arch}")
        return result

    return blocks


def report() -> dict[tuple[str, str], Facts]:
    """(kernel, architecture) -> facts, of the built library."""
    tool = cuobjdump()
    found = read(run(tool, "--dump-resource-usage", LIBRARY), run(tool, "-sass", LIBRARY))
    mangled = list(dict.fromkeys(name for name, _ in found))
    plain = run("c++filt", text="\n".join(mangled)).splitlines()
    names = {name: short(text) for name, text in zip(mangled, plain, strict=True)}
    blocks = occupancy()
    facts = {(names[name], arch): one for (name, arch), one in found.items()}
    for (kernel, arch), one in facts.items():
        one.shared -= RESERVED if one.shared and capability(arch) >= 90 else 0
        one.threads, dynamic = launch_of(kernel)
        if one.threads:
            one.shared += dynamic
            one.warps = blocks(arch, one, dynamic) * one.threads // 32
            one.most_warps = LIMITS[arch][2] // 32
    return dict(sorted(facts.items(), key=lambda item: (item[0][0], capability(item[0][1]))))


def short(demangled: str) -> str:
    text = re.sub(r"fastformer::|\(anonymous namespace\)::|^void ", "", demangled)
    text = re.sub(r"\((?:[\w:]+Args|float const\*).*\)$", "", text)
    return text.replace("__nv_bfloat16", "bf16").replace("__half", "f16")


def budget_of(facts: Facts) -> dict[str, int | list[str]]:
    """A tenth more registers than now, in the steps in which they are given out."""
    budget = {"registers": min(-(-facts.registers * 11 // 80) * 8, 255), "shared": facts.shared, "warps": facts.warps}
    if facts.instructions["HGMMA"]:
        budget["waits"] = facts.instructions[WAITS]
    return budget | {"instructions": [name for name in MUST_STAY if facts.instructions[name]]}


def faults(facts: Facts, budget: dict | None) -> list[str]:
    found = [f"{facts.stack} bytes of stack"] if facts.stack else []
    spills = facts.instructions["LDL"] + facts.instructions["STL"]
    found += [f"{spills} loads and stores of local memory"] if spills else []
    if budget is None:
        return [*found, "no budget"]
    for name in ("registers", "shared"):
        if getattr(facts, name) > budget[name]:
            found.append(f"{name}: {getattr(facts, name)}, at most {budget[name]} allowed")
    if facts.instructions[WAITS] > budget.get("waits", 0):
        found.append(f"{facts.instructions[WAITS]} waits of wgmma, at most {budget.get('waits', 0)} allowed")
    if facts.warps < budget["warps"]:
        found.append(f"warps: {facts.warps}, at least {budget['warps']} wanted")
    return found + [f"no {name} any more" for name in budget["instructions"] if not facts.instructions[name]]


def write_page(facts: dict[tuple[str, str], Facts]) -> None:
    header = ("kernel", "GPU", "registers", "stack", "shared", "threads", "warps", *COUNTED)
    lines = [
        "# What the CUDA kernels use",
        "",
        "From the library that nvcc builds (`make build-cuda`), read without a GPU: `make kernel-report` writes this "
        "page and fails where a kernel is over its budget (tests/sim/budgets.json). Registers and stack (bytes) are a "
        "thread's, shared memory (bytes) and threads a block's; warps are those that a multiprocessor holds at once, "
        "of the most that it can, by NVIDIA's cuda_occupancy.h. The other columns count instructions in the machine "
        "code, not how often they run: HMMA is mma, HGMMA wgmma, LDSM ldmatrix, LDGSTS cp.async, UTMALDG TMA; LDL and "
        "STL are spills. None of this is a speed.",
        "",
        f"| {' | '.join(header)} |",
        f"|{' --- |' * len(header)}",
    ]
    for (kernel, arch), one in facts.items():
        warps = f"{one.warps} of {one.most_warps}" if one.threads else ""
        numbers = one.registers, one.stack, one.shared, one.threads or "", warps
        row = [f"`{kernel}`", arch, *map(str, numbers), *(str(one.instructions[name]) for name in COUNTED)]
        lines.append(f"| {' | '.join(row)} |")
    PAGE.write_text("\n".join(lines) + "\n")


def main(set_budgets: Annotated[bool, typer.Option(help="write budgets.json")] = False) -> None:
    if not LIBRARY.exists():
        print(f"{LIBRARY.name} is not built, so there is no report of the CUDA kernels: make build-cuda")
        return
    facts = report()
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    if set_budgets:
        budgets = {}
        for (kernel, arch), one in facts.items():
            budgets.setdefault(kernel, {})[arch] = budget_of(one)
        entries = []
        for kernel, by_arch in budgets.items():
            lines = [f'  "{arch}": {json.dumps(budget)}' for arch, budget in by_arch.items()]
            entries.append(f" {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n }")
        BUDGETS.write_text("{\n" + ",\n".join(entries) + "\n}\n")
    failures = 0
    for (kernel, arch), one in facts.items():
        for fault in faults(one, budgets.get(kernel, {}).get(arch)):
            failures += 1
            print(f"{kernel}, {arch}: {fault}")
    write_page(facts)
    print(f"{len(facts)} kernels, {failures} faults: {PAGE.relative_to(ROOT)}")
    raise typer.Exit(failures > 0)


if __name__ == "__main__":
    typer.run(main)
