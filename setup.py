"""Builds the op library fastformer/libfastformer_cpu.so; everything else is in pyproject.toml.

The library stands on LibTorch's stable C interface: no Python and no C++ symbol of torch is in it, so one build serves
every Python and every torch >= 2.10. The host side of the ops is compiled once, the kernels once for each instruction
set; the library picks one at run time.

Environment: CXX (the compiler), MAX_JOBS, and FASTFORMER_CPU:
    auto    build the library, or install without it where there is no compiler (the default)
    1       fail if it can't be built
    0       don't build it
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
from build_backend import MIN_TORCH, compiler, reason_not_to_build, torch_folder  # noqa: E402

BUILD = ROOT / "build" / "cpu"
LIBRARY = "libfastformer_cpu"
NOT_BUILT = Path("fastformer", "library_not_built.txt")  # the reason, read by fastformer/library.py

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


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class BuildLibrary(build_ext):
    """Runs ninja, which compiles what has changed, and puts the library where setuptools wants it."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', os.sep)}.so"

    def build_extension(self, ext: Extension) -> None:
        write_ninja_file()
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        finished = subprocess.run([*ninja_command(), "-C", str(BUILD), "-j", jobs])
        if finished.returncode:
            raise SystemExit("building fastformer's CPU library failed: the compiler's message is above")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(BUILD / f"{LIBRARY}.so"), str(target))


class BuildPython(build_py):
    """Leaves a note in the package when the library is not built, so that `fastformer info` can say why."""

    def run(self) -> None:
        super().run()
        note = (ROOT if self.editable_mode else Path(self.build_lib)) / NOT_BUILT
        note.unlink(missing_ok=True)
        if reason:
            note.write_text(reason + "\n")


class Wheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: the library holds no Python symbol."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


reason = reason_not_to_build()
if reason:
    print(f"WARNING: fastformer is built WITHOUT its CPU kernels: {reason}", file=sys.stderr)

setup(
    ext_modules=[] if reason else [Extension(f"fastformer.{LIBRARY}", sources=[])],
    cmdclass={"build_ext": BuildLibrary, "build_py": BuildPython, "bdist_wheel": Wheel},
)
