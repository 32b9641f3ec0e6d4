"""Installing from the source distribution, with and without a compiler."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import build_backend

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import torch, fastformer
from fastformer import library, ops
print(library.why_unavailable())
ops.layer_norm(torch.randn(2, 8), (8,))
"""


def setup_version(**environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_unknown_choice():
    finished = setup_version(FASTFORMER_CPU="yes")
    assert finished.returncode != 0
    assert "FASTFORMER_CPU: got 'yes', expected auto, 0 or 1" in finished.stderr


def test_demanded_without_compiler():
    finished = setup_version(FASTFORMER_CPU="1", CXX="/nonexistent/g++")
    assert finished.returncode != 0
    assert "CXX=/nonexistent/g++ was not found" in finished.stderr and "install g++" in finished.stderr


def test_warns_without_compiler():
    finished = setup_version(CXX="/nonexistent/g++")
    assert finished.returncode == 0
    assert "WARNING" in finished.stderr and "WITHOUT its CPU kernels" in finished.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the CUDA kernels are built on Linux only")
@pytest.mark.parametrize(
    ("choice", "cuda", "toolkit", "reason"),
    [
        ("auto", "'13.0'", True, None),
        ("auto", "None", True, "for a torch without CUDA"),
        ("auto", "'13.0'", False, "the CUDA toolkit .* was not found"),
        ("1", "None", True, None),
        ("0", "'13.0'", True, "FASTFORMER_CUDA=0"),
    ],
)
def test_when_the_cuda_library_is_built(choice, cuda, toolkit, reason, tmp_path, monkeypatch):
    """auto: where there is a toolkit, and torch has CUDA."""
    (tmp_path / "version.py").write_text(f"cuda: Optional[str] = {cuda}\n")
    monkeypatch.setenv("FASTFORMER_CUDA", choice)
    monkeypatch.setattr(build_backend, "torch_folder", lambda: tmp_path)
    monkeypatch.setattr(build_backend, "cuda_toolkit", lambda: tmp_path if toolkit else None)
    found = build_backend.reason_not_to_build_cuda()
    assert found is None if reason is None else re.search(reason, found)


@pytest.fixture
def source(tmp_path) -> Path:
    """An unpacked source distribution, so that the builds here leave the source tree's own alone."""
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / file.name.removesuffix(".tar.gz")


def install(source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", str(target)]
    return subprocess.run([*command, str(source)], env=os.environ | environment, capture_output=True, text=True)


def run_installed(target: Path) -> str:
    """Runs an op of the installed copy, away from the source tree; returns why it has no library, as printed."""
    environment = os.environ | {"PYTHONPATH": str(target)}
    command = [sys.executable, "-c", SCRIPT]
    finished = subprocess.run(command, cwd=target, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.mark.slow
def test_install_with_compiler(source, tmp_path):
    finished = install(source, tmp_path / "site", FASTFORMER_CPU="1")
    assert finished.returncode == 0, finished.stdout
    assert run_installed(tmp_path / "site") == "None"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"CXX": "/nonexistent/g++"}, "CXX=/nonexistent/g++ was not found when fastformer was installed: install g++"),
        ({"PATH": "/nonexistent", "CXX": ""}, "no C++ compiler (g++ or clang++) was found"),
        ({"FASTFORMER_CPU": "0"}, "fastformer was installed with FASTFORMER_CPU=0"),
    ],
)
def test_install_without_library(source, tmp_path, environment, told):
    finished = install(source, tmp_path / "site", **environment)
    assert finished.returncode == 0, finished.stdout
    assert "py3-none-any" in finished.stdout or not list((tmp_path / "site").rglob("*.so"))
    assert told in run_installed(tmp_path / "site")


@pytest.mark.slow
def test_compile_error_stops_the_installation(source, tmp_path):
    finished = install(source, tmp_path / "site", CXX="false")
    assert finished.returncode != 0
    assert "building fastformer's CPU library failed" in finished.stdout + finished.stderr
