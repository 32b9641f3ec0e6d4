"""Faults planted in small kernels (faults.cpp): each is caught by the check that should catch it, and the same kernel
without the fault passes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import build_sim
import pytest

from build_backend import torch_folder

HERE = Path(__file__).resolve().parent

CAUGHT = {
    "shared_index": r"thread \(31,0,0\), index 32 of the shared array box\[32\]",
    "shared_vector": r"thread \(31,0,0\), .*store_shared: out of bounds, bytes 512 to 528 of .* of 512",
    "misaligned_copy": r"cp.async: the source is not aligned to 16 bytes",
    "divergent_shuffle": r"divergence: it comes to __shfl_xor_sync, thread \d+ waits for it in __shfl_xor_sync",
    "shuffle_from_outside_the_mask": r"lane 0 reads from lane 16, which does not take part",
    "lane_not_in_its_mask": r"thread \(16,0,0\), .*__syncwarp: its lane is not in the mask",
    "divergent_barrier": r"divergence: it comes to __syncthreads, thread \d+ waits for it in __syncthreads",
    "return_before_barrier": r"divergence: (it returns while thread|.*other threads of the block have returned)",
    "deadlock": r"deadlock: no thread can go on\n  threads 0-31: bar.sync at .*\n  threads 32-63: bar.sync at",
    "endless_spin": r"deadlock: every thread that could run spins",
    "mma_of_half_a_warp": r"mma wants all 32 lanes of the warp",
    "too_many_threads": r"a block of \(1025,1,1\) threads: it has 1 to 1024",
    "too_much_shared": r"233472 bytes of shared memory, a block has at most 232448",
}


@pytest.mark.parametrize("name", CAUGHT)
def test_caught(sim, order, name):
    """The message names kernel, block, thread, line and what is wrong; the simulator goes on after it."""
    kernel = getattr(sim.faults, name)
    for _ in range(2):
        kernel(False)
        with pytest.raises(RuntimeError, match=CAUGHT[name]) as error:
            kernel(True)
        assert str(error.value).startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["missing_sync", "missing_warp_sync", "shared_never_written"])
def test_poisoned(sim, order, name):
    """Shared memory is NaN until it is written."""
    kernel = getattr(sim.faults, name)
    assert not has_nan(kernel(False))
    assert has_nan(kernel(True))


@pytest.mark.parametrize("name", ["missing_wait", "wait_for_one_group_too_few"])
def test_copies_not_waited_for(sim, copies, name):
    kernel = getattr(sim.faults, name)
    assert not has_nan(kernel(False))
    assert has_nan(kernel(True)) == (copies == "lazy")


def has_nan(values: list[float]) -> bool:
    return any(x != x for x in values)


class TestBankConflicts:
    def test_ldmatrix(self, sim):
        """64 rows of 128 bytes: 16 ldmatrix.x4, each of 4 accesses by 8 rows that are all in the same 4 banks."""
        sim.read_tile(False)
        plain = sim.launches()[-1]
        sim.read_tile(True)
        swizzled = sim.launches()[-1]
        assert plain.ldmatrix == swizzled.ldmatrix == 16
        assert (plain.bank_conflicts, plain.shared_wavefronts) == (16 * 4 * 7, 16 * 4 * 8)
        assert (swizzled.bank_conflicts, swizzled.shared_wavefronts) == (0, 16 * 4)

    @pytest.mark.parametrize(
        ("size", "stride", "conflicts"),
        [
            (4, 0, 0),  # one word for all
            (4, 1, 0),
            (4, 2, 1),
            (4, 3, 0),
            (4, 16, 15),
            (4, 32, 31),
            (4, 33, 0),
            (8, 1, 0),
            (8, 2, 2),  # in each half of the warp
            (8, 16, 30),
            (16, 1, 0),
            (16, 2, 4),  # in each quarter
            (16, 8, 28),
            (16, 9, 0),
        ],
    )
    def test_vectors(self, sim, size, stride, conflicts):
        sim.options().count_conflicts = True
        sim.read_strided(size, stride)
        launch = sim.launches()[-1]
        assert launch.bank_conflicts == conflicts
        assert launch.shared_wavefronts == conflicts + size // 4

    def test_not_counted_unless_asked_for(self, sim):
        sim.read_strided(4, 32)
        assert sim.launches()[-1].shared_wavefronts == 0


SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fastformer_sim", sys.argv[1])
sim = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sim)
sim.options().lazy_copies = True
for call in sys.argv[2:]:
    name, fault = call.split("=")
    getattr(sim.faults, name)(fault == "True")
print("finished")
"""

SANITIZED = {
    "asan": {
        "shared_pointer": "AddressSanitizer: use-after-poison",
        "global_pointer": "AddressSanitizer: heap-buffer-overflow",
        "misaligned_vector": "runtime error: .*misaligned address",
    },
    "tsan": {
        "missing_sync": "ThreadSanitizer: data race",
        "missing_trailing_sync": "ThreadSanitizer: data race",
        "missing_warp_sync": "ThreadSanitizer: data race",
        "blocks_write_one_address": "ThreadSanitizer: data race",
        "atomics": "ThreadSanitizer: data race",
    },
}
# What a sanitizer must not mistake for a fault.
CLEAN = {
    "asan": [*SANITIZED["asan"], "missing_wait", "shared_index", "deadlock", "endless_spin"],
    "tsan": [*SANITIZED["tsan"], "missing_wait", "divergent_shuffle", "deadlock", "divergent_barrier"],
}


def run(variant: str, *calls: str) -> subprocess.CompletedProcess:
    library = HERE.parents[1] / "build" / "sim" / variant / "fastformer_sim.so"
    if not library.exists():
        pytest.skip(f"needs the simulator with sanitizers: python tests/sim/build_sim.py {variant}")
    environment = os.environ | build_sim.environment(variant)
    environment["LD_LIBRARY_PATH"] = str(torch_folder() / "lib")  # importing torch under a sanitizer takes seconds
    command = [sys.executable, "-c", SCRIPT, str(library), *calls]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("variant", SANITIZED)
def test_sanitizers_pass_what_is_right(variant):
    finished = run(variant, *(f"{name}=False" for name in CLEAN[variant]))
    assert finished.stdout.endswith("finished\n") and finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(("variant", "name"), [(variant, name) for variant in SANITIZED for name in SANITIZED[variant]])
def test_sanitizers_catch(variant, name):
    finished = run(variant, f"{name}=True")
    assert finished.returncode != 0 and "finished" not in finished.stdout
    assert re.search(SANITIZED[variant][name], finished.stderr), finished.stderr
    assert "faults.cpp" in finished.stderr or "device.h" in finished.stderr
