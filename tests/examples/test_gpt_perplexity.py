"""examples/gpt_perplexity.py: its figure is that of a loop over the tokens, and narrow weights hardly move it."""

import importlib
import math
from pathlib import Path

import pytest
import torch
import transformers

from fastformer import library

FOLDER = Path(__file__).resolve().parents[2] / "examples"
pytestmark = [
    pytest.mark.skipif(not library.available(), reason="needs the op library"),
    pytest.mark.filterwarnings("ignore:fastformer.accelerate.*no instructions for 8-bit"),
]


def test_perplexity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    example = importlib.import_module("gpt_perplexity")
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, n_positions=21, n_embd=32, n_layer=2, n_head=2)
    config = transformers.GPT2Config(**sizes, bos_token_id=256, eos_token_id=256)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    results = example.main([str(tmp_path), "--tokens", "70"])

    text = example.held_out().encode()
    assert len(text) > 2000 and text.isascii()
    negative = []
    for begin in (0, 20, 40):  # whole rows: 60 of the 70 bytes
        row = [256, *text[begin : begin + 20]]
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        negative += [-logits[i, token].item() for i, token in enumerate(row[1:])]
    expected = math.exp(sum(negative) / len(negative))
    assert results["float32"] == pytest.approx(expected, rel=1e-4)
    assert [*results] == ["float32", "bfloat16", "int8"] and len(set(results.values())) == 3
    assert all(value == pytest.approx(expected, rel=0.01) for value in results.values())
    assert "perplexity of 60 bytes" in capsys.readouterr().out
