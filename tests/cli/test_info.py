import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastformer
from fastformer import backends, library, tuning
from fastformer.cli import machine


def test_json(fastformer_cli: Callable) -> None:
    result = fastformer_cli("info", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["versions"]["fastformer"] == fastformer.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]["name"] and found["cpu"]["cores"] >= 1
    assert found["cpu"]["kernels_isas"] == library.isas()
    assert (found["cpu"]["kernels_isa"] is None) == (not library.available())
    listed = {(backend, one["op"]) for backend, support in found["backends"].items() for one in support["ops"]}
    assert listed == {(one.backend, one.op) for one in backends.implementations()}


def test_every_declaration_is_shown(fastformer_cli: Callable) -> None:
    result = fastformer_cli("info")
    assert result.exit_code == 0, result.output
    for one in backends.implementations():
        assert one.backend in result.stdout and one.op in result.stdout
    for label in ("torch", "python", "CPU features", "threads"):
        assert label in result.stdout


def test_missing_library_is_explained(fastformer_cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "available", lambda: False)
    monkeypatch.setattr(library, "why_unavailable", lambda: "no compiler [g++]")
    monkeypatch.setattr(backends, "why_unavailable", lambda name: "no compiler [g++]" if name == "cpu" else None)
    result = fastformer_cli("info")
    assert result.exit_code == 0, result.output
    assert "nothing: no compiler [g++]" in result.stdout
    assert "cpu is unavailable: no compiler [g++]" in result.stdout
    found = json.loads(fastformer_cli("info", "--json").stdout)
    assert found["cpu"]["kernels_unavailable"] == "no compiler [g++]"
    assert found["backends"]["cpu"]["unavailable"] == "no compiler [g++]"


def test_missing_package_comes_with_its_command(fastformer_cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "package_version", lambda name: "1.0" if name == "torch" else None)
    assert "not installed: pip install 'fastformer[hf]'" in fastformer_cli("info").stdout


def test_triton_without_a_gpu(fastformer_cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "triton is unavailable: no GPU" in fastformer_cli("info").stdout
    found = json.loads(fastformer_cli("info", "--json").stdout)
    assert found["backends"]["triton"]["unavailable"].startswith("no GPU") and found["triton_target"] is None


def test_tuned_table(fastformer_cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTFORMER_TUNED", str(tmp_path / "tuned.json"))
    monkeypatch.setattr(tuning, "table", None)
    monkeypatch.setattr(tuning, "problem", None)
    assert "none for this machine: fastformer tune" in fastformer_cli("info").stdout
    tuning.record(torch.device("cpu"), {"a": "cpu", "b": "torch"}, {})
    assert json.loads(fastformer_cli("info", "--json").stdout)["tuned"] == {
        "path": str(tmp_path / "tuned.json"), "in_use": True, "choices": 2, "problem": None,
    }  # fmt: skip
    assert "2 choices for this machine" in fastformer_cli("info").stdout.replace("\n", "")
    (tmp_path / "tuned.json").write_text("{")
    with pytest.warns(UserWarning):
        tuning.reload()
    assert "is not used: it can't be read" in " ".join(fastformer_cli("info").stdout.split())
