import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastformer import backends, library
from fastformer.cli import calls, machine, verify


@pytest.fixture
def few_calls(monkeypatch: pytest.MonkeyPatch) -> list[calls.Call]:
    """One of each op: all of them are run by the slow test."""
    found = list({call.op: call for call in calls.main_options(quick=True)}.values())
    monkeypatch.setattr(calls, "main_options", lambda quick: found)
    return found


def test_every_op_has_calls() -> None:
    for quick in (True, False):
        assert {call.op for call in calls.main_options(quick)} == set(backends.OPS) == set(calls.EAGER)


def test_all_that_runs_here(fastformer_cli: Callable, few_calls: list, tmp_path: Path) -> None:
    target = tmp_path / "verify.json"
    result = fastformer_cli("verify", "--quick", "--json", target)
    assert result.exit_code == 0, result.output
    found = json.loads(target.read_text())
    here = {name for name in backends.BACKENDS if not machine.why_not_here(name)}
    assert {row["backend"] for row in found["rows"]} == here >= {"torch"}
    declared = {(i.backend, i.op, str(d).removeprefix("torch.")) for i in backends.implementations() for d in i.dtypes}
    assert {(r["backend"], r["op"], r["dtype"]) for r in found["rows"]} == {d for d in declared if d[0] in here}
    assert all(row["ok"] and 0 <= row["error"] <= row["bound"] for row in found["rows"])
    assert f"{len(found['rows'])} of {len(found['rows'])} calls are right" in result.stdout


@pytest.mark.slow
def test_every_call(fastformer_cli: Callable) -> None:
    result = fastformer_cli("verify", "--quick", "--backend", "cpu")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_exit_1_if_a_result_is_wrong(
    fastformer_cli: Callable, few_calls: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, factor: float
) -> None:
    fused = calls.Call.fused.fget

    def scaled(call: calls.Call) -> Callable:
        if call.op != "linear":
            return fused(call)
        return lambda **tensors: factor * fused(call)(**tensors)

    monkeypatch.setattr(calls.Call, "fused", property(scaled))
    target = tmp_path / "verify.json"
    result = fastformer_cli("verify", "--quick", "--backend", "torch", "--json", target)
    assert result.exit_code == 1
    assert "torch: linear" in result.stdout and "float32: error" in result.stdout
    assert {row["op"] for row in json.loads(target.read_text())["rows"] if not row["ok"]} == {"linear"}


def test_a_kernel_that_raises(few_calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other calls are judged; a call that the backend does not take is no failure."""

    def raising(error: Exception) -> verify.Verdict:
        def fused(**tensors):
            raise error

        monkeypatch.setattr(calls.Call, "fused", property(lambda call: fused))
        return verify.judge(few_calls[0], "torch", "torch", torch.device("cpu"), torch.float32)

    verdict = raising(RuntimeError("out of resources"))
    assert not verdict.ok and verdict.problem == "RuntimeError: out of resources"
    verdict = raising(NotImplementedError("takes rows up to 3"))
    assert verdict.ok and verdict.declined == "takes rows up to 3"
    assert "not taken" in verify.cell(verdict)


@pytest.mark.skipif(not library.available(), reason="no op library")
def test_every_instruction_set() -> None:
    before = library.isa()
    seen = []
    for label, setting in verify.variants("cpu", quick=False):
        with setting():
            seen.append((label, library.isa()))
    assert seen == [(f"cpu, {isa}", isa) for isa in library.isas()] and library.isa() == before


def test_unavailable_backend(fastformer_cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("verify", "compare"):
        result = fastformer_cli(command, "--backend", "triton")
        assert result.exit_code == 2 and result.stdout == ""
        assert result.stderr.startswith("fastformer: --backend triton: no GPU")
    result = fastformer_cli("verify", "--backend", "abacus")
    assert result.exit_code == 2 and "expected one of cpu, triton, cuda, torch" in result.stderr
