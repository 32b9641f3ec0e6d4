"""The CUDA kernels: compiled by nvcc to PTX, with the host code as it is, which launches them on CPU tensors.

with running_cuda() as launches:
    ops.layer_norm(torch.randn(64, 768), 768)
print(launches[0].kernel, launches[0].counts)
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastformer
from fastformer import backends, cuda_library
from fastformer.ops import common

from .launch import Finished, Runner, Span, buffers_of

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
from build_backend import MIN_TORCH, compiler, cuda_toolkit, torch_folder  # noqa: E402

HERE = Path(__file__).resolve().parent
NAMESPACE = "fastformer_ptx"  # of the raw ops: a library for GPUs may be loaded as well

NINJA = """\
nvcc = {nvcc}
flags = {flags}

rule compile
  command = mkdir -p $stem && $nvcc $flags -gencode=arch=$arch,code=$arch -c $in -o $out $
    --keep --keep-dir $stem -MD -MF $out.d && $
    mv $stem/$stem.ptx . && rm -r $stem
  description = nvcc $in
  depfile = $out.d
  deps = gcc

rule link
  command = {cxx} -std=c++20 -O1 -shared -fPIC -fvisibility=hidden $in -o $out {link}
  description = link $out

"""


def why_not() -> str | None:
    """What is missing to compile the kernels, or None."""
    if cuda_toolkit() is None:
        return "the CUDA toolkit (nvcc) is not installed: the PTX of the CUDA kernels can't be made"
    return None if compiler() else "no C++ compiler is installed"


def _flags() -> list[str]:
    flags = ["-std=c++20", "-O3", "-DUSE_CUDA", f"-Dfastformer_cuda={NAMESPACE}", "-Xcompiler", "-O1,-fPIC"]
    flags += [f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"]
    return [*flags, "-isystem", str(torch_folder() / "include")]


def _arch(file: str) -> str:
    return "compute_90a" if "_hopper_" in file else "compute_80"


@functools.cache
def build() -> Path:
    """The folder with a library of the host code, and beside it the PTX, for sm_80 and, of what is for Hopper, for
    sm_90a; both brought up to date."""
    folder, torch_at, toolkit = ROOT / "build" / "ptx" / "cuda", torch_folder(), cuda_toolkit()
    link = [f"-I{toolkit / 'include'}", f"-L{torch_at / 'lib'}", "-ltorch_cpu", "-ltorch"]
    link += ["-Wl,-Bsymbolic", "-Wl,--no-undefined", "-Wl,--wrap=aoti_torch_empty_strided"]
    text = NINJA.format(
        nvcc=toolkit / "bin" / "nvcc", flags=shlex.join(_flags()), cxx=shlex.join(compiler()), link=shlex.join(link)
    )
    objects = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        objects.append(f"{source.stem}.o")
        text += f"build {objects[-1]}: compile {source}\n  stem = {source.stem}\n  arch = {_arch(source.name)}\n"
    text += f"build host.so: link {HERE / 'runtime.cpp'} {' '.join(objects)}\n"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "build.ninja"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    finished = subprocess.run([sys.executable, "-m", "ninja", "-C", folder, "-j", jobs], stdout=sys.stderr)
    if finished.returncode:
        raise RuntimeError("compiling the CUDA kernels failed: the compiler's message is above")
    return folder


@functools.cache
def file_of(kernel: str) -> Path:
    """The PTX that has it; its stem is that of the file in csrc/cuda."""
    for file in build().glob("*.ptx"):
        if f".entry {kernel}(" in file.read_text():
            return file
    raise LookupError(f"no PTX of {kernel}")


@functools.cache
def ptx_of(kernel: str) -> str:
    return file_of(kernel).read_text()


def compile_kernels(folder: Path, file: str, kernels: Collection[str]) -> dict[str, str]:
    """PTX of some of the kernels of a file in another copy of csrc/cuda, by their names in the build: nothing else is
    compiled, which takes seconds."""
    signatures = _signatures(kernels)
    lines = re.findall(r'^#include ".*"$', (folder / file).read_text(), re.MULTILINE)
    wanted = [x.replace(" CUtensorMap_st", " const __grid_constant__ CUtensorMap_st") for x in signatures.values()]
    lines += [f"template __global__ {x};" for x in wanted if "<" in x]  # others are compiled anyway
    (folder / "some.cu").write_text("\n".join(lines) + "\n")
    command = [cuda_toolkit() / "bin" / "nvcc", *_flags(), f"-arch={_arch(file)}", "-ptx", "some.cu", "-o", "some.ptx"]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{file} does not compile:\n{finished.stderr}")
    text = (folder / "some.ptx").read_text()
    found = {x: name for name, x in _signatures(re.findall(r"\.entry (\w+)\(", text)).items()}
    return {kernel: text.replace(found[x], kernel) for kernel, x in signatures.items()}


def _signatures(kernels: Collection[str]) -> dict[str, str]:
    """Without the anonymous namespaces, whose names differ between files."""
    found = subprocess.run(["c++filt", *kernels], check=True, capture_output=True, text=True).stdout
    return dict(zip(kernels, found.replace("(anonymous namespace)::", "").splitlines(), strict=True))


_ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)
_ON_ALLOCATION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)
_loaded: list = []  # the library of ops' schemas, and the functions for the CPU


def load() -> ctypes.CDLL:
    """The library of host code; its ops take CPU tensors from now on."""
    path = build() / "host.so"
    if not _loaded:
        library = torch.library.Library(NAMESPACE, "DEF")
        names = [name for op in backends.OPS if "cuda" in backends.declared(op) for name in (op, f"{op}_backward")]
        for name in names:
            schema = getattr(torch.ops.fastformer_cpu, name).default._schema
            library.define(str(schema).replace("fastformer_cpu::", ""))
        torch.ops.load_library(str(path))
        for name in names:
            library.impl(name, _on_cpu(getattr(getattr(torch.ops, NAMESPACE), name).default), "CPU")
        _loaded.extend([library, ctypes.CDLL(str(path))])
    return _loaded[1]


class _Tensors(TorchDispatchMode):
    """What an op of the library can reach: its arguments, and what it allocates or gets from torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[torch.Tensor] = []
        self.allocated: list[Span] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.hold(func(*self.hold(args), **kwargs or {}))

    def hold(self, values):
        self.held += [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]
        return values

    def on_allocation(self, data: int | None, size: int) -> None:
        """Fills it with NaN."""
        if data and size:
            ctypes.memset(data, 0xFF, size)
            self.allocated.append((data, data + size, "a new tensor"))


_tensors: list[_Tensors] = []  # of the op that runs


def _on_cpu(op) -> Callable:
    """Runs the op's host code for the CUDA device, whatever its tensors are on."""
    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def call(*args):
        _tensors.append(_Tensors())
        try:
            with _tensors[-1] as tensors:
                return op.redispatch(on_cuda, *tensors.hold(args))
        finally:
            _tensors.pop()

    return call


@contextlib.contextmanager
def running_cuda(
    target: str = "sm_80",
    order: str = "together",
    seed: int = 0,
    edit: Callable[[str], str] | None = None,
    texts: dict[str, str] | None = None,
) -> Iterator[list[Finished]]:
    """Inside, calls on CPU tensors go to the CUDA kernels, in the interpreter, on a device that says that it is of
    `target`: sm_80 or sm_90. The list has what each launch did.

    `edit` changes the PTX of each kernel, from .entry to its last brace; `texts` are in the place of what was built, by
    kernel.
    """
    library = load()
    runner = Runner(order, seed, edit)

    def on_launch(name, grid, block, shared, args) -> int:
        try:
            kernel = name.decode()
            text = (texts or {}).get(kernel) or ptx_of(kernel)
            program = runner.program(text, kernel)
            places = [(args[i], parameter.size) for i, parameter in enumerate(program.kernel.parameters)]
            parameters = np.zeros(program.parameter_bytes, np.uint8)
            for (place, size), parameter in zip(places, program.kernel.parameters, strict=True):
                start = program.address_of(parameter.name)
                parameters[start : start + size] = np.frombuffer(ctypes.string_at(place, size), np.uint8)
            buffers = buffers_of(_tensors[-1].held, _tensors[-1].allocated)
            runner.run(program, tuple(grid.contents), tuple(block.contents), shared, parameters, buffers)
            return 0
        except BaseException as error:  # it can't pass through the host code
            runner.error = error
            return 1

    declared = {op: backends._BY_OP[op]["cuda"] for op in backends.OPS if "cuda" in backends.declared(op)}
    before, problem = common._RAW["cuda"], cuda_library._problem
    callbacks = _ON_LAUNCH(on_launch), _ON_ALLOCATION(lambda data, size: _tensors[-1].on_allocation(data, size))
    library.set_callbacks(*callbacks)
    library.set_capability(int(target.removeprefix("sm_")))
    try:
        cuda_library._problem = None
        common._RAW["cuda"] = getattr(torch.ops, NAMESPACE)
        for op, implementation in declared.items():
            backends._BY_OP[op]["cuda"] = dataclasses.replace(implementation, device="cpu")
        with fastformer.backend("cuda", strict=True):
            yield runner.finished
    except RuntimeError as error:
        if runner.error is not None:
            raise runner.error from error
        raise
    finally:
        library.set_callbacks(_ON_LAUNCH(), _ON_ALLOCATION())
        cuda_library._problem, common._RAW["cuda"] = problem, before
        for op, implementation in declared.items():
            backends._BY_OP[op]["cuda"] = implementation
