import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # build_sim
LIBRARY = Path(os.environ.get("FASTFORMER_CUDA_LIBRARY", ""))
if LIBRARY.name != "fastformer_sim.so":  # these tests want the simulator in their process: make verify-gpu-kernels
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def loaded() -> ModuleType:
    """The Python module in the simulator's library, whose ops fastformer has loaded."""
    spec = importlib.util.spec_from_file_location("fastformer_sim", LIBRARY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sim(loaded) -> Iterator[ModuleType]:
    """The simulator, with the options that it has without an environment variable."""
    loaded.set_options(loaded.Options())
    loaded.clear_launches()
    yield loaded
    loaded.set_options(loaded.Options())


@pytest.fixture(params=["forward", "reverse", "random"])
def order(sim, request) -> str:
    """Runs the test in three orders of the threads and blocks."""
    options = sim.options()
    options.threads = options.blocks = getattr(sim.Order, request.param)
    options.seed = 5
    return request.param


@pytest.fixture(params=["eager", "lazy"])
def copies(sim, request) -> str:
    sim.options().lazy_copies = request.param == "lazy"
    return request.param
