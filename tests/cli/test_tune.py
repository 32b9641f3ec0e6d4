import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastformer import library, ops, tuning
from fastformer.cli import calls, tune
from fastformer.cli.measure import Timing

pytestmark = pytest.mark.skipif(not library.available(), reason="no op library")
SMALL = {"cpu": [(3, 8)]}


@pytest.fixture(autouse=True)
def table_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuning, "table", None)
    monkeypatch.setattr(tuning, "problem", None)
    monkeypatch.setenv("FASTFORMER_TUNED", str(tmp_path / "tuned.json"))
    monkeypatch.delenv("FASTFORMER_BACKEND", raising=False)
    return tmp_path / "tuned.json"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "QUICK", SMALL)
    monkeypatch.setattr(tune, "time_on", lambda device, contenders, seconds: time_once(contenders))


def time_once(contenders: dict) -> dict[str, Timing]:
    """The last contender wins."""
    for run in contenders.values():
        run()
    return {name: Timing([1.0 / (i + 1)] * 5) for i, name in enumerate(contenders)}


@pytest.mark.parametrize("folder", ["bert_folder", "gpt2_folder"])
def test_a_model(
    fastformer_cli: Callable, small: None, table_path: Path, folder: str, request: pytest.FixtureRequest
) -> None:
    result = fastformer_cli("tune", "--model", request.getfixturevalue(folder), "--device", "cpu", "--quick")
    assert result.exit_code == 0, result.output
    maps = json.loads(table_path.read_text())["devices"][tuning.device_name(torch.device("cpu"))]
    assert maps["configs"] == {}
    assert {key.split()[0] for key in maps["backends"]} == {
        "layer_norm", "add_layer_norm", "linear", "feed_forward", "scaled_dot_product_attention", "varlen_attn",
    }  # fmt: skip
    assert set(maps["backends"].values()) == {"torch"}  # the last of those that ops.* can choose
    assert "torch, was cpu, 2.00x" in result.stdout and "torch, no change" in result.stdout
    assert "packed" in result.stdout and str(table_path) in result.stdout.replace("\n", "")


def test_calls_follow(fastformer_cli: Callable, small: None, bert_folder: Path, recorder) -> None:
    x, weight = torch.ones(3, 8, 32), torch.ones(32)
    before, after = recorder, type(recorder)()
    with before:
        ops.layer_norm(x, 32, weight, weight)
    assert fastformer_cli("tune", "--model", bert_folder, "--device", "cpu", "--quick").exit_code == 0
    with after:
        ops.layer_norm(x, 32, weight, weight)
        ops.layer_norm(x[:, :2], 32, weight, weight)  # too few rows for the class that was measured
    assert "fastformer_cpu::layer_norm" in before.names()
    assert after.names().count("fastformer_cpu::layer_norm") == 1


def test_wrong_contenders_do_not_win(
    fastformer_cli: Callable, small: None, bert_folder: Path, table_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(calls.EAGER, "layer_norm", lambda input, weight, bias, **_: input * 2 + weight + bias)
    result = fastformer_cli("tune", "--model", bert_folder, "--device", "cpu", "--quick")
    assert result.exit_code == 0, result.output
    assert "layer_norm 3x8x32, float32, inference: cpu was left out: error" in result.stdout
    maps = json.loads(table_path.read_text())["devices"][tuning.device_name(torch.device("cpu"))]
    assert not [key for key in maps["backends"] if key.startswith("layer_norm")]


def test_ties_keep_the_default() -> None:
    def timings(first: list[float], second: list[float]) -> dict[str, Timing]:
        return {"cpu": Timing(first), "torch": Timing(second)}

    wide, narrow = [1.0, 1.1, 1.2, 1.5, 2.0], [0.9, 1.0, 1.0, 1.1, 1.2]
    assert tune.best(timings(wide, narrow), "cpu") == "cpu"  # their quartiles overlap
    assert tune.best(timings([1.0] * 5, [0.97] * 5), "cpu") == "cpu"  # by 3%
    assert tune.best(timings([1.0] * 5, [0.9] * 5), "cpu") == "torch"
    assert tune.best(timings([1.0] * 5, [0.9] * 5), "triton") == "torch"  # the default could not be measured


def test_measured_against_the_default(small: None) -> None:
    """Not against what an earlier table says, which is back afterwards."""
    table = tuning.table = tuning.Table({})
    with tune.without_table():
        assert tuning.table is None
    assert tuning.table is table


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (("--device", "tpu"), ("--device", "tpu", "cpu, cuda")),
        (("--device", "cuda"), ("--device cuda", "no GPU")),
        (("--model", "no/such/folder"), ("no/such/folder",)),
    ],
)
def test_wrong_options(
    fastformer_cli: Callable, monkeypatch: pytest.MonkeyPatch, args: tuple, fragments: tuple
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = fastformer_cli("tune", *args)
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert all(fragment in result.stderr for fragment in fragments)


def test_where_the_environment_decides(fastformer_cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFORMER_BACKEND", "torch")
    result = fastformer_cli("tune", "--device", "cpu")
    assert result.exit_code == 2 and "FASTFORMER_BACKEND=torch decides for every call" in result.stderr


def test_another_architecture(fastformer_cli: Callable, bert_folder: Path) -> None:
    config = bert_folder / "config.json"
    config.write_text(config.read_text().replace('"bert"', '"t5"'))
    result = fastformer_cli("tune", "--model", bert_folder, "--device", "cpu")
    assert result.exit_code == 2 and "bert and gpt2, not of t5" in result.stderr


def test_table_that_cannot_be_written(
    fastformer_cli: Callable, small: None, bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTFORMER_TUNED", "/proc/tuned.json")
    result = fastformer_cli("tune", "--model", bert_folder, "--device", "cpu", "--quick")
    assert result.exit_code == 2 and "cannot write /proc/tuned.json" in result.stderr


SWEEP = """
import torch
from fastformer.cli import calls, tune
from fastformer.kernels import configs

made = configs.Config({"BLOCK": 1})
candidates = [configs.Config({"BLOCK": size}) for size in (16, 32, 64)]
picked = []

def kernel(x):
    picked.append(configs.pick("scale", candidates, dtype=x.dtype))
    if picked[-1].tiles["BLOCK"] == 64:
        raise RuntimeError("out of resources: shared memory")
    return (x * 2,)

class Check:
    def why_wrong(self, contender):
        try:
            contender()
        except RuntimeError as error:
            return str(error)

x = torch.ones(3)
tune.time_on = lambda device, contenders, seconds: {
    name: (run(), tune.Timing([1 / (i + 1)] * 5))[1] for i, (name, run) in enumerate(contenders.items())
}
sweep = tune.Configs(torch.device("cpu"), 0.0)
for _ in range(2):
    sweep.sweep("scale 3", torch.float32, "inference", lambda: kernel(x), Check())
(contest,) = sweep.contests
assert contest.key == "scale dtype=float32" and contest.winner.startswith("BLOCK=32"), contest
assert list(contest.wrong.values()) == ["out of resources: shared memory"]
assert sweep.winners == {"scale dtype=float32": {"tiles": {"BLOCK": 32}, "num_warps": 4, "num_stages": 2}}
with sweep.in_use():
    kernel(x)
assert picked[-1] is candidates[1]
kernel(x)
assert picked[-1] is candidates[0]
print("swept")
"""


def test_tiles_are_swept_once_for_each_key() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    finished = subprocess.run([sys.executable, "-c", SWEEP], capture_output=True, text=True, env=environment)
    assert finished.stdout.strip() == "swept", finished.stderr
