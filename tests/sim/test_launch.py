"""What the host side of every CUDA op promises: launches tell kernel and shape when they fail, on torch's stream, and
nothing waits for the GPU."""

import ctypes
import re
import subprocess
from pathlib import Path

import build_sim
import pytest

from build_backend import MIN_TORCH, cuda_toolkit, torch_folder

CUDA = build_sim.ROOT / "csrc" / "cuda"
FAILS = r"""
#include "launch.h"
__global__ void kernel() {}
static std::string message;
extern "C" const char* failed_launch(unsigned threads, unsigned shared_bytes) {
  alignas(fastformer::OnDeviceOf) unsigned char memory[sizeof(fastformer::OnDeviceOf)] = {};  // the default stream
  const auto& device = reinterpret_cast<const fastformer::OnDeviceOf&>(memory);
  try {
    fastformer::launch(device, {"some_kernel", {{"rows", 3}, {"columns", 5}}, dim3(1), dim3(threads), shared_bytes},
                       kernel);
    message = "";
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
"""


def test_failed_launch(tmp_path: Path):
    """Compiled by nvcc. Where there is no GPU every launch fails; where there is one, these still do."""
    toolkit = cuda_toolkit()
    if toolkit is None:
        pytest.skip("needs the CUDA toolkit")
    torch = torch_folder()
    source, library = tmp_path / "fails.cu", tmp_path / "fails.so"
    source.write_text(FAILS)
    flags = ["-std=c++20", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"]
    flags += [f"-I{CUDA}", "-isystem", torch / "include", f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch"]
    flags += ["-Xcompiler", "-fPIC", "-shared", "-o", library, source]
    subprocess.run([toolkit / "bin" / "nvcc", *flags], check=True)
    failed_launch = ctypes.CDLL(str(library)).failed_launch
    failed_launch.restype = ctypes.c_char_p
    for threads, shared_bytes in ((4096, 0), (32, 1 << 30)):  # the launch itself; what is set in front of it
        message = failed_launch(threads, shared_bytes).decode()
        assert re.search(r"fastformer_cuda some_kernel \(rows 3, columns 5\): [\w ]+", message), message


def test_launches_and_what_waits():
    """Kernels start through launch() alone, on the stream of OnDeviceOf; no copy, allocation or wait of CUDA's own."""
    waits = re.compile(r"\bcuda\w*(Synchronize|Memcpy|Memset|Malloc|Free)\w*\s*\(|\.item\(|\bcpu\(\)")
    for file in sorted(CUDA.iterdir()):
        text = file.read_text()
        assert ("<<<" in text) == (file.name == "launch.h"), file.name
        assert not waits.search(text), file.name
