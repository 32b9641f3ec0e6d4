"""What bench/training.py compares; nothing is timed."""

import importlib
from pathlib import Path

import pytest
import torch
import transformers
from accelerated.small import BERT

from fastformer import library, ops

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the op library")


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    module = importlib.import_module("training")

    def tiny():
        ids = torch.randint(3, 60, (4, 9))
        config = transformers.BertConfig(**BERT | {"hidden_dropout_prob": 0.5})
        return transformers.BertForMaskedLM(config), {"input_ids": ids, "labels": ids}

    monkeypatch.setattr(module, "MODELS", {"tiny": tiny})
    monkeypatch.setattr(module, "ATTENTION", {"attention": (2, 3, 8, 16)})
    return module


@pytest.mark.parametrize("name", ["tiny", "attention"])
def test_contenders_agree_and_step(training, name):
    made = {kind: make() for kind, make in training.contenders(name).items()}
    training.check(made)
    assert made.keys() == {"eager", "fastformer"}
    for contender in made.values():
        before = [parameter.clone() for parameter in contender.parameters]
        contender.step()
        assert all(parameter.grad is None for parameter in contender.parameters)
        moved = any(not torch.equal(x, y) for x, y in zip(before, contender.parameters, strict=True))
        assert moved == (name == "tiny")


def test_a_wrong_gradient_is_found(training, monkeypatch):
    right = ops.scaled_dot_product_attention
    monkeypatch.setattr(
        ops, "scaled_dot_product_attention", lambda q, k, v, **options: right(q, k, v.detach(), **options)
    )
    made = {kind: make() for kind, make in training.contenders("attention").items()}
    with pytest.raises(SystemExit, match="fastformer: loss and gradient"):
        training.check(made)


def test_table(training):
    one = {"median_s": 2.0, "spread": 0.05, "memory": 100 * 2**20}
    rows = [{"workload": "w", "threads": 1, "contenders": {"eager": one, "fastformer": one | {"median_s": 1.0}}}]
    rows.append({"workload": "w", "threads": 2, "contenders": {"eager": one | {"memory": None}}})
    assert training.table(rows).splitlines()[2:] == [
        "| w | 1 | eager | 2000 ms | 1.00 | 5% | 100 MiB | 1.00 |",
        "| w | 1 | fastformer | 1000 ms | 2.00 | 5% | 100 MiB | 1.00 |",
        "| w | 2 | eager | 2000 ms | 1.00 | 5% |  |  |",
    ]
