"""What the wheel and the source distribution hold and promise."""

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fastformer import library
from fastformer.version import __version__

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {f"fastformer/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
INFO = f"fastformer-{__version__}.dist-info"


def build(command: str, folder: Path) -> Path:
    arguments = [sys.executable, "setup.py", "--quiet", command, "--dist-dir", str(folder)]
    finished = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    if not library.available():
        pytest.skip(f"no op library: {library.why_unavailable()}")
    return build("bdist_wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def contents(wheel) -> zipfile.ZipFile:
    with zipfile.ZipFile(wheel) as archive:
        yield archive


def test_wheel_serves_every_python_of_one_platform(wheel, contents):
    assert wheel.name.startswith(f"fastformer-{__version__}-py3-none-linux_")
    tags = message_from_bytes(contents.read(f"{INFO}/WHEEL"))
    assert tags["Root-Is-Purelib"] == "false"


def test_wheel_holds_the_library_and_the_linked_kernels(contents):
    names = set(contents.namelist())
    assert "fastformer/libfastformer_cpu.so" in names
    assert "fastformer/py.typed" in names
    assert KERNELS and names >= KERNELS
    assert {f"fastformer/cli/{path.name}" for path in (ROOT / "fastformer/cli").glob("*.txt")} <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fastformer", INFO}


def test_wheel_holds_every_module(contents):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fastformer").rglob("*.py")} | KERNELS
    assert {name for name in contents.namelist() if name.endswith(".py")} == modules


def test_metadata(contents):
    metadata = message_from_bytes(contents.read(f"{INFO}/METADATA"))
    assert metadata["Name"] == "fastformer"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) == {"hf", "bench", "dev"}
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]

    def names(**environment: str) -> set[str]:
        return {r.name for r in requirements if r.marker is None or r.marker.evaluate(environment)}

    assert {"torch", "triton"} <= names(platform_system="Linux", extra="")
    assert "triton" not in names(platform_system="Darwin", extra="")
    assert "transformers" not in names(extra="")
    assert "transformers" in names(extra="hf")
    assert {"pytest-benchmark", "matplotlib"} <= names(extra="bench")
    assert b"fastformer = fastformer.cli:app" in contents.read(f"{INFO}/entry_points.txt")


def test_source_distribution_can_be_built_from(tmp_path):
    """It holds what the build reads, the linked kernels as files, and nothing that was built."""
    with tarfile.open(build("sdist", tmp_path)) as archive:
        members = {member.name.split("/", 1)[1]: member for member in archive if "/" in member.name}
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(ROOT)) for path in sources}
    wanted |= KERNELS | {
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "build_backend.py",
        "fastformer/library.py",
    }
    assert wanted - set(members) == set()
    assert all(members[name].isfile() for name in KERNELS)
    assert not [name for name in members if name.endswith((".so", ".pyc", ".o"))]
