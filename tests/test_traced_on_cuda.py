"""The ops on CUDA tensors, where there is neither a GPU nor a torch that is built for one: traced_on_cuda.py.

A process of its own, because a CUDA device has to be there before torch is imported.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
TORCH = Path(torch.__file__).parent

# The libraries of torch in the order in which they need each other, the device, and only then torch.
RUN = """
import ctypes, sys
for name in sys.argv[1].split(":"):
    ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def device_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch is built for GPUs")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{TORCH / 'include'}", str(TESTS / "fake_cuda.cpp")]
    subprocess.run([*command, f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", "-o", library], check=True)
    return library


@pytest.mark.parametrize(
    "which",
    ["not TestCompile and not test_export", pytest.param("TestCompile or test_export", marks=pytest.mark.slow)],
)
def test_traced_on_cuda(device_library: Path, which: str) -> None:
    libraries = [TORCH / "lib" / "libc10.so", TORCH / "lib" / "libtorch_cpu.so", device_library]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = [":".join(map(str, libraries)), str(TESTS / "traced_on_cuda.py"), "-k", which]
    command = [sys.executable, "-c", RUN, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " passed" in finished.stdout
