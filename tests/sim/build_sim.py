"""Builds the simulator's library: the kernels of csrc/cuda, compiled by g++, as raw ops for CPU tensors (docs/sim.md).

    python tests/sim/build_sim.py [plain|asan|tsan]     prints the library's path

`asan` is with AddressSanitizer and UndefinedBehaviorSanitizer, `tsan` with ThreadSanitizer; a program that loads such a
library needs the sanitizer's own library first: `environment`.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from build_backend import MIN_TORCH, compiler, torch_folder  # noqa: E402

HERE = Path(__file__).resolve().parent
VARIANTS = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-DSIM_ASAN", "-O1", "-g1"],
    "tsan": ["-fsanitize=thread", "-DSIM_TSAN", "-O1", "-g1"],
}
# libstdc++: AddressSanitizer looks for the real __cxa_throw when it starts, long before a library brings one.
RUNTIMES = {"asan": ("libasan.so", "libstdc++.so"), "tsan": ("libtsan.so",)}
OPTIONS = {"asan": ("ASAN_OPTIONS", "detect_leaks=0"), "tsan": ("TSAN_OPTIONS", "report_bugs=1:halt_on_error=1")}

NINJA = """\
cxx = {cxx}
flags = {flags}

rule compile
  command = $cxx $flags $own -MMD -MF $out.d -x c++ -c $in -o $out
  description = sim $in
  depfile = $out.d
  deps = gcc

rule link
  command = $cxx -shared $in -o $out $flags {link}
  description = link $out

"""


def folder_of(variant: str) -> Path:
    return ROOT / "build" / "sim" / variant


def build(variant: str = "plain", folder: Path | None = None, stand_ins: Sequence[Path] = ()) -> Path:
    """The library of that variant, brought up to date; its path. Needs g++, ninja and pybind11.

    stand_ins are compiled in place of the kernels' files of the same names, into a `folder` of their own.
    """
    import pybind11

    folder = folder or folder_of(variant)
    torch = torch_folder()
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DFASTFORMER_SIM"]
    flags += ["-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Wno-unknown-pragmas", *VARIANTS[variant]]
    flags += [f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000", f"-I{HERE / 'shim'}"]
    flags += ["-isystem", str(torch / "include"), "-isystem", pybind11.get_include(), f"-I{ROOT / 'csrc' / 'cuda'}"]
    flags += ["-isystem", sysconfig.get_path("include")]
    link = [f"-L{torch / 'lib'}", "-Wl,--as-needed", "-ltorch_cpu", "-ltorch"]
    kernels = [*(ROOT / "csrc" / "cuda").glob("*.cu"), ROOT / "csrc" / "cuda" / "ops.cpp"]
    replaced = {path.name: path for path in stand_ins}
    kernels = [replaced.get(kernel.name, kernel) for kernel in kernels]
    checked = sorted([*kernels, HERE / "faults.cpp", *(HERE / "shim").glob("*.cpp")], key=lambda path: path.stem)
    # What tests call the simulator by: without sanitizers it is compiled in a third of the time. Last, so that inline
    # functions are linked as the kernels have them.
    sources = [*checked, *(HERE / f"{name}.cpp" for name in ("instructions", "hopper_kernels", "module"))]

    lines = [NINJA.format(cxx=shlex.join(compiler()), flags=shlex.join(flags), link=shlex.join(link))]
    objects = [f"{source.stem}.o" for source in sources]
    for source, out in zip(sources, objects, strict=True):
        # The engine changes stacks: ThreadSanitizer watches the kernels, not it.
        watched = variant == "plain" or (source in checked and not (variant == "tsan" and source.parent.name == "shim"))
        own = "" if watched else "-fno-sanitize=all"
        lines.append(f"build {out}: compile {source}\n  own = {own}\n")
    lines.append(f"build fastformer_sim.so: link {' '.join(objects)}\n")

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "build.ninja"
    text = "".join(lines)
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    finished = subprocess.run([sys.executable, "-m", "ninja", "-C", folder, "-j", jobs], stdout=sys.stderr)
    if finished.returncode:
        raise RuntimeError("building the simulator failed: the compiler's message is above")
    return folder / "fastformer_sim.so"


def environment(variant: str, folder: Path | None = None) -> dict[str, str]:
    """What a program needs in its environment to run that variant, built in `folder`; the op tests run with these."""
    variables = {"FASTFORMER_CUDA_LIBRARY": str((folder or folder_of(variant)) / "fastformer_sim.so")}
    if variant in RUNTIMES:
        name, value = OPTIONS[variant]
        variables |= {"LD_PRELOAD": ":".join(map(_file_of_compiler, RUNTIMES[variant])), name: value}
    return variables


def _file_of_compiler(name: str) -> str:
    command = [*compiler(), f"-print-file-name={name}"]
    return os.path.realpath(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
