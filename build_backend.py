"""setuptools' build backend, with one addition: what building the op library takes, and only where it is built.

The headers of torch are needed, whichever torch >= 2.10 they are from. An environment that has torch is not made to
download another one for the build.
"""

import importlib.machinery
import importlib.util
import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

MIN_TORCH = (2, 10)

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"fastformer is built by setuptools >= 77, found {setuptools.__version__}: pip install -U setuptools"
    )


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + library_requirements()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + library_requirements()


def library_requirements() -> list[str]:
    if reason_not_to_build() and reason_not_to_build_cuda():
        return []
    return ["ninja"] if torch_folder() else ["ninja", f"torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"]


def torch_folder() -> Path | None:
    """Where torch's headers and libraries are, or None. torch is not imported, which takes seconds."""
    # pip's isolated builds take the environment's packages off sys.path; they are still there to be read.
    site = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    spec = importlib.util.find_spec("torch") or importlib.machinery.PathFinder.find_spec("torch", site)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    major, minor = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text()).groups()
    return folder if (int(major), int(minor)) >= MIN_TORCH else None


def compiler() -> list[str] | None:
    """The C++ compiler's command line (CXX, if it is set), or None where there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["g++"], ["c++"], ["clang++"]]
    return next((command for command in candidates if shutil.which(command[0])), None)


def cuda_toolkit() -> Path | None:
    """The folder of nvcc and of CUDA's static runtime: CUDA_HOME if that is set, else by PATH, else /usr/local/cuda."""
    named, on_path = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    folders = [Path(on_path).resolve().parents[1]] if on_path else []
    folders = [Path(named)] if named else [*folders, Path("/usr/local/cuda")]
    needed = ("bin/nvcc", "lib64/libcudart_static.a")
    return next((folder for folder in folders if all((folder / file).exists() for file in needed)), None)


def reason_not_to_build_cuda() -> str | None:
    """Why the library of CUDA kernels will not be built and what to do about it, or None when it will be."""
    choice = os.environ.get("FASTFORMER_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"FASTFORMER_CUDA: got {choice!r}, expected auto, 0 or 1")
    if choice == "0":
        how = "run `make build-cuda`, or unset it and install fastformer again"
        return f"fastformer was installed with FASTFORMER_CUDA=0: {how}"
    torch = torch_folder()
    if sys.platform != "linux":
        reason = f"the CUDA kernels are built on Linux only, and this is {platform.system()}"
    elif cuda_toolkit() is None:
        what = "the CUDA toolkit (bin/nvcc, lib64/libcudart_static.a) was not found"
        reason = f"{what} when fastformer was installed: install it, or set CUDA_HOME"
    elif choice == "auto" and not (torch and re.search(r"^cuda.* = '", (torch / "version.py").read_text(), re.M)):
        return "fastformer was installed for a torch without CUDA: FASTFORMER_CUDA=1 builds the kernels all the same"
    else:
        return None
    if choice == "1":
        raise SystemExit(f"FASTFORMER_CUDA=1, but {reason}")
    return reason


def reason_not_to_build() -> str | None:
    """Why the library will not be built and what to do about it, or None when it will be."""
    choice = os.environ.get("FASTFORMER_CPU", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"FASTFORMER_CPU: got {choice!r}, expected auto, 0 or 1")
    if choice == "0":
        return "fastformer was installed with FASTFORMER_CPU=0: unset it and install fastformer again"
    if sys.platform != "linux":
        reason = f"the CPU kernels are built on Linux only, and this is {platform.system()}"
    elif compiler() is None:
        named = os.environ.get("CXX")
        what = f"CXX={named} was not found" if named else "no C++ compiler (g++ or clang++) was found"
        how = "install g++ (Debian, Ubuntu: apt install g++) and install fastformer again"
        reason = f"{what} when fastformer was installed: {how}"
    else:
        return None
    if choice == "1":
        raise SystemExit(f"FASTFORMER_CPU=1, but {reason}")
    return reason
