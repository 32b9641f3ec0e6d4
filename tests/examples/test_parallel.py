"""The scripts in examples/ by two processes, on gloo: the losses and the result of one."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from examples.short import FOLDER, SCRIPTS

import fastformer.nn
from fastformer import library

KINDS = "ddp", "fsdp", "tensor"
pytestmark = pytest.mark.skipif(not library.available(), reason="needs the op library")


def losses(script: str, *options: object) -> list[float]:
    return importlib.import_module(script).main([*SCRIPTS[script], "--steps", "4", *map(str, options)])


def run(rank: int, world: int, folder: str, script: str, runs: list[list[str]]) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(FOLDER))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = [losses(script, *options) for options in runs]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def by_two(folder: Path, script: str, *runs: list[object]) -> list[list[float]]:
    """The losses of one run after the other, of which both processes know the same."""
    given = [[str(option) for option in options] for options in runs]
    mp.spawn(run, (2, str(folder), script, given), nprocs=2)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    (folder / "store").unlink(missing_ok=True)
    return first


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    """With dropout, two micro-batches each; and what they save is what one process saves. Without dropout under tensor
    parallelism, where other elements would be dropped: heads and features lie in another process."""
    options = {
        "ddp": ["--accumulate", 4, "--dropout", 0.1],
        "fsdp": ["--accumulate", 4, "--dropout", 0.1],
        "tensor": ["--accumulate", 2],
    }
    runs = [[*given, "--parallel", kind, "--save", tmp_path / kind] for kind, given in options.items()]
    found = dict(zip(options, by_two(tmp_path, "tag", *runs), strict=True))
    for kind, given in options.items():
        alone = tmp_path / f"{kind} alone"
        assert found[kind] == pytest.approx(losses("tag", *given, "--save", alone), rel=1e-5), kind
        model, expected = (fastformer.models.load(folder) for folder in (tmp_path / kind, alone))
        for (name, x), y in zip(model.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5, msg=f"{kind}: {name}")


@pytest.mark.slow
@pytest.mark.parametrize(("script", "kind"), [*(("tag", kind) for kind in KINDS), ("gpt_pretrain", "tensor")])
def test_resumed(tmp_path: Path, script: str, kind: str) -> None:
    """Two processes save their shards, and go on from there, or one does: the losses of the run that was left alone."""
    options = ["--accumulate", 2, "--parallel", kind, "--save-every", 2]
    whole, first = by_two(tmp_path, script, options, [*options, "--save", tmp_path / "two", "--stop-after", 3])
    assert first == whole[:3]
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    assert by_two(tmp_path, script, [*options, "--save", tmp_path / "two", "--resume"]) == [whole]
    alone = losses(script, *options, "--save", tmp_path / "one", "--resume")
    assert alone[:2] == whole[:2] and alone == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["bert_pretrain", "gpt_pretrain"])
def test_bfloat16_accumulated_and_recomputed(tmp_path: Path, script: str) -> None:
    """All at once, and each kind gives what one process does; tied weights are sharded once."""
    options = ["--accumulate", 4, "--bfloat16", "--checkpointing", "--steps", 2]
    expected = losses(script, *options)
    exact = losses(script, "--accumulate", 4, "--steps", 2)
    assert expected == pytest.approx(exact, rel=2e-2) and expected != exact
    found = by_two(tmp_path, script, *([*options, "--parallel", kind] for kind in KINDS))
    for kind, got in zip(KINDS, found, strict=True):
        assert got == pytest.approx(expected, rel=1e-3), kind


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script(tmp_path: Path, small_data: dict[str, list[str]], script: str) -> None:
    """In each kind the losses of one process; fastformer.nn's layers have no linears that tensor parallelism splits."""
    options = [*small_data.get(script, []), "--accumulate", 2]
    kinds = [kind for kind in KINDS if (script, kind) != ("custom_task", "tensor")]
    found = by_two(tmp_path, script, *([*options, "--parallel", kind] for kind in kinds))
    expected = losses(script, *options)
    for kind, got in zip(kinds, found, strict=True):
        assert got == pytest.approx(expected, rel=1e-5), kind


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """The command of the documentation: one process speaks, and what it saved, one can go on with."""
    options = [str(FOLDER / "tag.py"), *SCRIPTS["tag"], "--accumulate", "2", "--save", str(tmp_path)]
    by_torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(FOLDER.parent), *sys.path])
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [*by_torchrun, *options, "--steps", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    saved = losses("tag", *options[1:], "--resume")
    assert done.stdout.count(f"step 4: loss {saved[3]:.4f}") == done.stdout.count("tagged without a mistake") == 1
    assert saved == pytest.approx(losses("tag", "--accumulate", 2), rel=1e-5)


def test_split() -> None:
    """The first linears of a pair by output features, the second by input features; others stay whole."""
    parallel = importlib.import_module("parallel")
    config = fastformer.models.BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2)
    plan = parallel.split(fastformer.models.BertModel(config))
    styles = {name.removeprefix("encoder.layer.0."): type(style).__name__ for name, style in plan.items()}
    columns = ["attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense"]
    rows = ["attention.output.dense", "output.dense"]
    assert styles == dict.fromkeys(columns, "ColwiseParallel") | dict.fromkeys(rows, "RowwiseParallel")
    with pytest.raises(SystemExit, match="--parallel tensor: EncoderLayer has no linears"):
        parallel.split(fastformer.nn.EncoderLayer(8, 2))


def test_clip_gradients() -> None:
    parallel = importlib.import_module("parallel")
    clipped, stock = (torch.nn.Linear(3, 2) for _ in range(2))
    for model in (clipped, stock):
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.arange(1.0, parameter.numel() + 1).view_as(parameter) + i
    parallel.clip_gradients(clipped, 0.5)
    torch.nn.utils.clip_grad_norm_(stock.parameters(), 0.5)
    for x, y in zip(clipped.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad)
