"""Builds the op libraries fastformer/libfastformer_{cpu,cuda}.so; everything else is in pyproject.toml.

They stand on LibTorch's stable C interface: no Python and no C++ symbol of torch is in them, so one build serves
every Python and every torch >= 2.10. On the CPU the host side of the ops is compiled once, the kernels once for each
instruction set; the library picks one at run time.

Environment: CXX (the compiler), MAX_JOBS, and FASTFORMER_CPU:
    auto    build the library, or install without it where there is no compiler (the default)
    1       fail if it can't be built
    0       don't build it
FASTFORMER_CUDA is the same for the CUDA library; auto builds it where there is nvcc and torch has CUDA. CUDA_HOME says
where the toolkit is, FASTFORMER_CUDA_ARCHITECTURES for which GPUs: compute capabilities, "80 86 89 90 100 120".
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from build_backend import (  # noqa: E402
    MIN_TORCH,
    compiler,
    cuda_toolkit,
    reason_not_to_build,
    reason_not_to_build_cuda,
    torch_folder,
)

BUILD = ROOT / "build" / "cpu"
LIBRARY = "libfastformer_cpu"
NOT_BUILT = Path("fastformer", "library_not_built.txt")  # the reason, read by fastformer/library.py
BUILD_CUDA = ROOT / "build" / "cuda"
LIBRARY_CUDA = "libfastformer_cuda"
NOT_BUILT_CUDA = Path("fastformer", "cuda_library_not_built.txt")

COMMON_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", f"-ffile-prefix-map={ROOT}/="]
COMMON_FLAGS += ["-Wall", "-Wextra", "-Wno-missing-field-initializers"]
HOST_FLAGS = ["-O2", f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"]
KERNEL_FLAGS = ["-O3", "-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-trapping-math"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512 += ["-Wno-maybe-uninitialized"]  # gcc 12 warns of its own intrinsics
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() == "x86_64":
    INSTRUCTION_SETS |= {"avx2": AVX2, "avx512": AVX2 + AVX512}

ARCHITECTURES = os.environ.get("FASTFORMER_CUDA_ARCHITECTURES", "80 86 89 90 100 120").split()
# A kernel that has too few registers fails the build.
NVCC_FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "-Xptxas", "-warn-spills,-Werror", "--compress-mode=size"]
NVCC_ARCHITECTURES = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES]
NVCC_ARCHITECTURES += [f"-gencode=arch=compute_{n},code=compute_{n}" for n in ARCHITECTURES[-1:]]  # for GPUs to come
NVCC_HOPPER = ["-gencode=arch=compute_90a,code=sm_90a"]  # of the files *_hopper_*.cu

NINJA_RULES = """\
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  description = $set $in
  depfile = $out.d
  deps = gcc

rule link
  command = $cxx -shared $in -o $out $flags
  description = link $out

"""


def ninja_command() -> list[str]:
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if shutil.which("ninja"):
        return ["ninja"]
    raise SystemExit("fastformer's CPU library is built by ninja: pip install ninja")


def write_ninja_file() -> None:
    """Writes build/cpu/build.ninja for the sources that are there now."""
    torch = torch_folder()
    if torch is None:
        raise SystemExit(
            f"fastformer's CPU library is built against torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]}, which was not found: "
            "install it first, or install fastformer without --no-build-isolation"
        )
    host_flags = COMMON_FLAGS + HOST_FLAGS + ["-isystem", str(torch / "include"), f"-ffile-prefix-map={torch}/=torch/"]
    host = [ROOT / "csrc" / "ops.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    kernels = sorted((ROOT / "csrc" / "cpu" / "kernels").glob("*.cpp"))

    steps = [("host", source, host_flags) for source in host]
    for name, isa_flags in INSTRUCTION_SETS.items():
        flags = COMMON_FLAGS + KERNEL_FLAGS + isa_flags + [f"-DFASTFORMER_ISA={name}"]
        steps += [(name, source, flags) for source in kernels]

    # Nothing is exported: the ops register themselves when the library is loaded.
    exports = BUILD / "exports.map"
    link_flags = [f"-L{torch / 'lib'}", "-Wl,--as-needed", "-ltorch_cpu", "-ltorch"]
    link_flags += ["-Wl,--no-undefined", f"-Wl,--version-script={exports}"]

    lines = [f"cxx = {shlex.join(compiler())}\n\n", NINJA_RULES]
    objects = []
    for name, source, flags in steps:
        objects.append(f"{name}/{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {ninja_path(source)}\n")
        lines.append(f"  flags = {shlex.join(flags)}\n  set = {name}\n")
    lines.append(f"build {LIBRARY}.so: link {' '.join(objects)} | {ninja_path(exports)}\n")
    lines.append(f"  flags = {shlex.join(link_flags)}\n")

    BUILD.mkdir(parents=True, exist_ok=True)
    write_if_changed(exports, "{ local: *; };\n")
    write_if_changed(BUILD / "build.ninja", "".join(lines))


def write_cuda_ninja_file() -> None:
    """Writes build/cuda/build.ninja: nvcc compiles, the C++ compiler links with CUDA's static runtime."""
    torch, toolkit = torch_folder(), cuda_toolkit()
    if torch is None or compiler() is None:
        raise SystemExit("fastformer's CUDA library is built by a C++ compiler and torch >= 2.10: install both first")
    include = ["-isystem", str(torch / "include")]
    cuda_flags = [*NVCC_FLAGS, *HOST_FLAGS[1:], *include, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    exports = BUILD_CUDA / "exports.map"
    # libtorch.so has the CUDA half of torch where there is one; where there is none its functions are weak and absent.
    link_flags = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    link_flags += [f"-L{toolkit / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    link_flags += ["-Wl,--no-undefined", f"-Wl,--version-script={exports}"]

    lines = [f"cxx = {shlex.join(compiler())}\nnvcc = {ninja_path(toolkit / 'bin' / 'nvcc')}\n\n", NINJA_RULES]
    lines.append("rule compile_cuda\n  command = $nvcc $flags -MD -MF $out.d -c $in -o $out\n")
    lines.append("  description = cuda $in\n  depfile = $out.d\n  deps = gcc\n\n")
    objects = ["ops.o"]
    host_flags = COMMON_FLAGS + HOST_FLAGS + include
    lines.append(f"build ops.o: compile {ninja_path(ROOT / 'csrc' / 'cuda' / 'ops.cpp')}\n")
    lines.append(f"  flags = {shlex.join(host_flags)}\n  set = cuda\n")
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        objects.append(f"{source.stem}.o")
        flags = [*cuda_flags, *(NVCC_HOPPER if "_hopper_" in source.name else NVCC_ARCHITECTURES)]
        lines.append(f"build {objects[-1]}: compile_cuda {ninja_path(source)}\n  flags = {shlex.join(flags)}\n")
    lines.append(f"build {LIBRARY_CUDA}.so: link {' '.join(objects)} | {ninja_path(exports)}\n")
    lines.append(f"  flags = {shlex.join(link_flags)}\n")

    BUILD_CUDA.mkdir(parents=True, exist_ok=True)
    write_if_changed(exports, "{ local: *; };\n")
    write_if_changed(BUILD_CUDA / "build.ninja", "".join(lines))


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class BuildLibrary(build_ext):
    """Runs ninja, which compiles what has changed, and puts the libraries where setuptools wants them."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', os.sep)}.so"

    def build_extension(self, ext: Extension) -> None:
        cuda = ext.name.endswith(LIBRARY_CUDA)
        folder = BUILD_CUDA if cuda else BUILD
        write_cuda_ninja_file() if cuda else write_ninja_file()
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        finished = subprocess.run([*ninja_command(), "-C", str(folder), "-j", jobs])
        if finished.returncode:
            which = "CUDA" if cuda else "CPU"
            raise SystemExit(f"building fastformer's {which} library failed: the compiler's message is above")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(folder / target.name), str(target))


class BuildPython(build_py):
    """Leaves a note in the package when a library is not built, so that `fastformer info` can say why."""

    def run(self) -> None:
        super().run()
        for file, why in ((NOT_BUILT, reason), (NOT_BUILT_CUDA, cuda_reason)):
            note = (ROOT if self.editable_mode else Path(self.build_lib)) / file
            note.unlink(missing_ok=True)
            if why:
                note.write_text(why + "\n")


class Wheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: the libraries hold no Python symbol."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


reason = reason_not_to_build()
cuda_reason = reason_not_to_build_cuda()
if reason:
    print(f"WARNING: fastformer is built WITHOUT its CPU kernels: {reason}", file=sys.stderr)

setup(
    ext_modules=[
        Extension(f"fastformer.{name}", sources=[])
        for name, why in ((LIBRARY, reason), (LIBRARY_CUDA, cuda_reason))
        if not why
    ],
    cmdclass={"build_ext": BuildLibrary, "build_py": BuildPython, "bdist_wheel": Wheel},
)
