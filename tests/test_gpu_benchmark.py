"""bench/gpu.py, but for the GPU: all of its code on tiny CPU tensors."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastformer import backends, library

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"


def run(*args: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("FASTFORMER_BACKEND", None)
    command = [sys.executable, str(BENCH / "gpu.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_without_a_gpu() -> None:
    finished = run()
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith("make gpu needs an NVIDIA or AMD GPU") and finished.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, dict]:
    folder = tmp_path_factory.mktemp("gpu")
    finished = run("--dry-run", "--json", folder / "gpu.json", "--chart", folder / "gpu.png")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (folder / "gpu.png").read_bytes().startswith(b"\x89PNG")
    return finished, json.loads((folder / "gpu.json").read_text())


def test_dry_run(dry_run: tuple) -> None:
    finished, content = dry_run
    assert finished.stdout.startswith("dry run: nothing was measured")
    assert content["dry_run"] is True
    assert content["verify"] and all(row["ok"] for row in content["verify"])
    assert all(one["exit_status"] == 0 for one in content["tests"].values())
    groups = {row["group"] for row in content["rows"]}
    on_gpus = {op for op in backends.OPS if "triton" in backends.declared(op)}
    assert groups == {"attention", "varlen", "models", *on_gpus} - {"scaled_dot_product_attention", "varlen_attn"}
    for group in groups:
        assert {row["backward"] for row in content["rows"] if row["group"] == group} == {False, True}


def test_a_dry_run_writes_no_speed(dry_run: tuple) -> None:
    content = dry_run[1]
    assert set(content["ceilings"].values()) == {None}
    speeds = ("median_s", "spread", "ratio", "tflops", "gbytes_per_s", "of_peak", "of_bandwidth")
    for row in content["rows"]:
        for one in row["contenders"].values():
            assert [one[name] for name in speeds] == [None] * len(speeds)


def test_results_are_checked(dry_run: tuple) -> None:
    """Those of fastformer always, those of PyTorch unless it draws dropout masks of its own."""
    for row in dry_run[1]["rows"]:
        for name, one in row["contenders"].items():
            if name.startswith("fastformer"):
                assert one["checked"] and not one["wrong"] and one["problem"] is None, row
                assert one["error"] <= one["allowed"]
            elif one["problem"] is None:
                assert one["checked"] == ("dropout" not in row["name"])


@pytest.fixture
def gpu_bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu

    return gpu


def test_speeds_and_chart(dry_run: tuple, gpu_bench, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With numbers that are made up, but small enough to be checked by hand."""
    from gpu_cases import Case

    case = Case("linear", "linear 2x3", torch.float16, True, {}, {}, lambda: None, operations=4e9, bytes=2e6)
    timing = {name: gpu_bench.Timing([t] * 5) for name, t in (("fastformer triton", 1e-3), ("eager", 2e-3))}
    results = {name: gpu_bench.Result(timing=one, error=1e-3, allowed=2e-3) for name, one in timing.items()}
    results["torch.compile"] = gpu_bench.Result(problem="OutOfMemoryError: no memory")
    row = gpu_bench.as_json(case, results, {"float16": 24e12, "bytes_per_s": 12e9}, dry_run=False)
    ours = row["contenders"]["fastformer triton"]
    assert ours["ratio"] == 2 and ours["tflops"] == pytest.approx(12) and ours["gbytes_per_s"] == pytest.approx(6)
    assert ours["of_peak"] == pytest.approx(0.5) and ours["of_bandwidth"] == pytest.approx(0.5)
    assert row["contenders"]["torch.compile"]["median_s"] is None

    content = copy.deepcopy(dry_run[1]) | {"dry_run": False, "ceilings": {"float16": 24e12, "bytes_per_s": 12e9}}
    attention = [row for row in content["rows"] if row["group"] == "attention"]
    for made_up in attention:
        for one in made_up["contenders"].values():
            one |= {"median_s": 1e-3, "spread": 0.1, "tflops": 1.0, "ratio": 1.0}
    content["rows"] = [*attention, row]
    gpu_bench.gpu_chart.draw(content, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 30_000  # axes with lines in them
    gpu_bench.show(content, gpu_bench.Console(width=200))
    printed = capsys.readouterr().out
    assert "24 TFLOP/s in float16 products" in printed and "12 GB/s copied" in printed
    assert "2.00x" in printed and "OutOfMemoryError" in printed
    assert gpu_bench.is_right(content)
    row["contenders"]["fastformer triton"]["problem"] = "wrong"
    assert not gpu_bench.is_right(content)


def test_backends_of_an_op(gpu_bench) -> None:
    """A contender for each that has a kernel for it; one that has none is no failure."""
    from gpu_cases import TINY, rows

    contenders = {
        case.group: case.contenders for case in rows(torch.device("cpu"), torch.float32, TINY, ["triton", "cuda"])
    }
    assert "fastformer cuda" in contenders["linear"] and "fastformer triton" in contenders["linear"]
    assert "fastformer cuda" not in contenders["linear_cross_entropy"]
    assert "fastformer triton" in contenders["linear_cross_entropy"]


def test_wrong_results_are_found(gpu_bench) -> None:
    from gpu_cases import Case

    x = {"input": torch.randn(8, 8)}
    contenders = {
        "fastformer cpu": lambda input: 1.01 * input.exp(),
        "eager": lambda input: input.exp(),
        "raises": lambda input: input @ input[:3],
    }
    for backward in (False, True):
        case = Case("exp", "exp", torch.float32, backward, x, contenders, lambda input: input.exp(), 1, 1)
        options = type("Options", (), {"dry_run": True})
        results = gpu_bench.measure(case, torch.device("cpu"), options)
        assert results["fastformer cpu"].wrong and results["fastformer cpu"].timing is None
        assert not results["eager"].wrong and results["eager"].timing is not None
        assert results["raises"].problem.startswith("RuntimeError") and results["raises"].timing is None


def test_kernels_of_this_machine(dry_run: tuple) -> None:
    assert dry_run[1]["backends"] == ["cpu" if library.available() else "torch"]
