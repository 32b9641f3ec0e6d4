"""The library of CUDA kernels: choosing to build it, and loading it, where there is no GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import CASES
from torch._subclasses import FakeTensorMode

import fastformer
from fastformer import backends, cuda_library, ops

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(cuda_library.__file__)
LIBRARY = SOURCE.with_name("libfastformer_cuda.so")
DEVICE_TYPE = "fastformer_cuda::device_type"


def setup_version(**environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def load_copy(folder: Path) -> ModuleType:
    """cuda_library.py as it would load from an installation in `folder`."""
    spec = importlib.util.spec_from_file_location("cuda_library_copy", shutil.copy(SOURCE, folder))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_unknown_choice():
    finished = setup_version(FASTFORMER_CUDA="yes")
    assert finished.returncode != 0
    assert "FASTFORMER_CUDA: got 'yes', expected auto, 0 or 1" in finished.stderr


def test_asked_for_without_a_toolkit():
    finished = setup_version(FASTFORMER_CUDA="1", CUDA_HOME="/nonexistent")
    assert finished.returncode != 0
    assert "FASTFORMER_CUDA=1, but the CUDA toolkit" in finished.stderr and "set CUDA_HOME" in finished.stderr


class TestWhyUnavailable:
    @pytest.fixture(autouse=True)
    def no_other_library(self, monkeypatch):
        monkeypatch.delenv("FASTFORMER_CUDA_LIBRARY", raising=False)

    def test_not_built(self, tmp_path):
        copy = load_copy(tmp_path)
        assert not copy.available() and copy.device_type() == "cuda"
        assert "make build-cuda" in copy.why_unavailable()

    def test_reason_left_by_the_installation(self, tmp_path):
        (tmp_path / "cuda_library_not_built.txt").write_text("no CUDA toolkit: install it\n")
        assert load_copy(tmp_path).why_unavailable() == "no CUDA toolkit: install it"

    def test_can_not_be_loaded(self, tmp_path):
        (tmp_path / "libfastformer_cuda.so").write_bytes(b"not a library")
        assert "libfastformer_cuda.so" in load_copy(tmp_path).why_unavailable()


@pytest.mark.skipif(not LIBRARY.exists() or cuda_library.device_type() != "cuda", reason="make build-cuda")
class TestBuiltLibrary:
    def test_loads_in_any_torch(self):
        assert cuda_library.why_unavailable() is None

    def test_every_op_is_registered(self):
        names = {
            schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("fastformer_cuda::")
        }
        ops = {op for op in backends.OPS if "cuda" in backends.declared(op)}
        assert names == {f"fastformer_cuda::{op}{suffix}" for op in ops for suffix in ("", "_backward")} | {DEVICE_TYPE}
        for name in names - {DEVICE_TYPE}:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"), name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", [name for name, case in CASES.items() if "cuda" in backends.declared(case.op)])
    def test_traced(self, name, dtype, recorder):
        """Shapes, dtypes and devices of what the ops return, without a GPU."""
        case = CASES[name]
        with fastformer.backend("torch"):
            expected = [(x.shape, x.dtype) for x in case(**case.tensors(dtype))]
        with FakeTensorMode(), fastformer.backend("cuda", strict=True), recorder:
            tensors = {key: torch.empty(shape, device="cuda", dtype=dtype) for key, shape in case.shapes.items()}
            options = {key: x.to("cuda") if isinstance(x, torch.Tensor) else x for key, x in case.options().items()}
            outputs = getattr(ops, case.op)(**tensors, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert f"fastformer_cuda::{case.op}" in recorder.names()
        assert [(x.shape, x.dtype) for x in outputs] == expected
        assert {x.device.type for x in outputs} == {"cuda"}

    @pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
    def test_tensors_of_another_device(self):
        with pytest.raises(NotImplementedError, match="fastformer_cuda::layer_norm"):
            torch.ops.fastformer_cuda.layer_norm(torch.ones(2, 8), None, None, 1e-5)

    @pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm: install binutils")
    def test_takes_only_c_functions_of_torch(self):
        command = ["nm", "--dynamic", "--undefined-only", "--demangle", LIBRARY]
        taken = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert "aoti_torch_" in taken
        assert re.findall(r"\b(?:at|c10|torch|caffe2)::.*", taken) == []
