"""The op library takes only torch's C interface, and no code of one instruction set is shared with another."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastformer import library

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "fastformer" / "libfastformer_cpu.so"
OBJECTS = ROOT / "build" / "cpu"  # where setup.py compiles
KERNELS = sorted((ROOT / "csrc" / "cpu" / "kernels").glob("*.cpp"))

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason=f"no op library: {library.why_unavailable()}")
every_instruction_set = pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, readelf, objdump: install binutils")


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def symbols(file: Path, *options: str) -> set[str]:
    lines = run("nm", *options, file).splitlines()
    return {re.fullmatch(r"[0-9a-f]*\s+\w (.+?)(@.*)?", line)[1] for line in lines}


def kernel_objects(instruction_set: str) -> list[Path]:
    files = [OBJECTS / instruction_set / f"{source.stem}.o" for source in KERNELS]
    missing = [file for file in files if not file.exists()]
    if missing:
        pytest.skip(f"{missing[0]} is not there: run `python setup.py build_ext --inplace`")
    return files


@needs_library
def test_takes_only_c_functions_of_torch():
    taken = symbols(LIBRARY, "--dynamic", "--undefined-only", "--demangle")
    assert any(name.startswith("aoti_torch_") for name in taken), "registers no op with torch"
    cpp = {name for name in taken if "::" in name or name.startswith("operator")}
    runtime = r"((typeinfo|typeinfo name|vtable|VTT) for )?(std|__cxxabiv1)::|operator (new|delete)"
    assert {name for name in cpp if not re.match(runtime, name)} == set()
    assert {name for name in cpp if re.search(r"\b(at|c10|torch|caffe2)::", name)} == set()


@needs_library
def test_takes_nothing_of_python_or_openmp():
    taken = symbols(LIBRARY, "--dynamic", "--undefined-only")
    assert {name for name in taken if re.match(r"_?Py|GOMP_|omp_|__kmp", name)} == set()
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "--dynamic", LIBRARY)))
    torch_and_system = r"lib(torch_cpu|torch)\.so|lib(stdc\+\+|gcc_s|m|c)\.so\.\d+|ld-linux.*"
    assert {name for name in needed if not re.fullmatch(torch_and_system, name)} == set()


@needs_library
def test_exports_nothing():
    assert symbols(LIBRARY, "--dynamic", "--defined-only", "--extern-only") == set()


@every_instruction_set
def test_kernels_define_symbols_in_their_own_namespace_only(instruction_set):
    """Of an inline function that several objects define the linker keeps one copy, maybe one of AVX-512 code."""
    namespace = f"10fastformer{len(instruction_set)}{instruction_set}"
    for file in kernel_objects(instruction_set):
        defined = symbols(file, "--defined-only", "--extern-only")
        assert defined, f"{file} defines no kernel"
        assert {name for name in defined if not re.match(rf"_Z(GV|T[ISTV])?[ZNKVRO]*{namespace}", name)} == set()


@every_instruction_set
def test_kernels_call_only_c_and_their_own_namespace(instruction_set):
    namespace = f"10fastformer{len(instruction_set)}{instruction_set}"
    for file in kernel_objects(instruction_set):
        called = symbols(file, "--undefined-only")
        assert {name for name in called if name.startswith("_Z") and namespace not in name} == set()


def test_what_runs_on_every_machine_holds_no_avx_code():
    host = sorted((OBJECTS / "host").glob("*.o"))
    for file in [*kernel_objects("baseline"), *host]:
        code = run("objdump", "--disassemble", "--no-show-raw-insn", file)
        assert re.findall(r"\tv\w+ .*%[xyz]mm\d+.*", code) == [], file
