"""Loading the op library: what is wrong is told, and never breaks the import."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastformer import library

SOURCE = Path(library.__file__)


def load_copy(folder: Path) -> ModuleType:
    """library.py as it would load from an installation in `folder`."""
    spec = importlib.util.spec_from_file_location("library_copy", shutil.copy(SOURCE, folder))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_library_of_a_source_tree_not_built(tmp_path):
    copy = load_copy(tmp_path)
    assert not copy.available()
    assert copy.isas() == []
    assert "python setup.py build_ext --inplace" in copy.why_unavailable()


def test_reason_left_by_the_installation(tmp_path):
    (tmp_path / "library_not_built.txt").write_text("no C++ compiler: install g++\n")
    assert load_copy(tmp_path).why_unavailable() == "no C++ compiler: install g++"


def test_library_that_can_not_be_loaded(tmp_path):
    (tmp_path / "libfastformer_cpu.so").write_bytes(b"not a library")
    copy = load_copy(tmp_path)
    assert not copy.available()
    assert "libfastformer_cpu.so" in copy.why_unavailable() and "build it again" in copy.why_unavailable()


@pytest.mark.parametrize("choice", ["sse", "AVX2", "avx2,avx512"])
def test_unknown_instruction_set(tmp_path, monkeypatch, choice):
    monkeypatch.setenv("FASTFORMER_ISA", choice)
    with pytest.raises(ValueError, match=f"FASTFORMER_ISA: got '{choice}', expected one of baseline, avx2, avx512"):
        load_copy(tmp_path)


@pytest.mark.skipif(not library.available(), reason=f"no op library: {library.why_unavailable()}")
class TestInstructionSets:
    def test_the_best_is_used(self):
        assert library.why_unavailable() is None
        assert library.isas()[0] == "baseline"
        assert library.isa() == (os.environ.get("FASTFORMER_ISA") or library.isas()[-1])

    def test_one_that_this_machine_can_not_run(self, monkeypatch):
        monkeypatch.setattr(library, "isas", lambda: ["baseline"])
        monkeypatch.setenv("FASTFORMER_ISA", "avx2")
        with pytest.raises(ValueError, match="FASTFORMER_ISA: got 'avx2', but this machine runs only baseline"):
            library._check_isa_choice()

    @pytest.mark.parametrize("choice", library.isas())
    def test_choice_by_environment(self, choice):
        script = "from fastformer import library; print(library.isa())"
        environment = os.environ | {"FASTFORMER_ISA": choice}
        command = [sys.executable, "-c", script]
        finished = subprocess.run(command, env=environment, cwd=SOURCE.parents[1], capture_output=True, text=True)
        assert finished.stdout.strip() == choice, finished.stderr
