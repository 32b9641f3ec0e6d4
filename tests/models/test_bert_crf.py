"""BertCrfForTokenClassification: BERT's token classification with a CRF on its logits."""

import itertools

import pytest
import torch

import fastformer
from fastformer import models, ops

CONFIG = models.BertConfig(
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
    num_labels=3,
)
IDS = torch.arange(1, 15).view(2, 7)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
LABELS = torch.tensor([[-100, 0, 2, -100, 1, 1, -100], [-100, 2, 0, -100, 1, 1, 1]])  # the last three are padding


@pytest.fixture
def model() -> models.BertCrfForTokenClassification:
    torch.manual_seed(0)
    return models.BertCrfForTokenClassification(CONFIG).eval()


def test_loss_is_that_of_all_paths(model) -> None:
    """Path by path: of the tokens that are labelled and no padding, [CLS], pieces of words and [SEP] left out."""
    loss, logits = model(IDS, MASK, labels=LABELS)
    expected = 0.0
    for emissions, labels in zip(logits, LABELS.where(MASK == 1, -100), strict=True):
        emissions, labels = emissions[labels != -100], labels[labels != -100]
        scores = {}
        for path in itertools.product(range(3), repeat=len(labels)):
            score = model.crf.start_transitions[path[0]] + model.crf.end_transitions[path[-1]]
            score = score + sum(row[tag] for row, tag in zip(emissions, path, strict=True))
            scores[path] = score + sum(model.crf.transitions[pair] for pair in itertools.pairwise(path))
        total = torch.stack(list(scores.values())).logsumexp(0)
        expected = expected + (total - scores[tuple(labels.tolist())]) / 2
    torch.testing.assert_close(loss, expected)


def test_decode(model) -> None:
    labelled = (LABELS != -100) & MASK.bool()
    logits = model(IDS, MASK).logits
    for mask in (labelled, labelled.long()):
        tags = model.decode(logits, mask)
        assert torch.equal(tags == -100, ~labelled)
    crf = model.crf
    with fastformer.backend("torch"):
        expected = ops.crf_decode(logits, crf.transitions, crf.start_transitions, crf.end_transitions, labelled)
    assert torch.equal(tags, expected)
    assert (model.decode(logits) >= 0).all()


def test_learns_which_tags_follow(model) -> None:
    """Tags that the tokens say nothing about, but whose order is fixed: only the transitions can know it."""
    model.train()
    optimizer = torch.optim.Adam(model.crf.parameters(), lr=0.1)
    ids, labels = torch.full((4, 9), 5), torch.arange(9).expand(4, 9) % 3
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()
    model.eval()
    assert torch.equal(model.decode(model(ids).logits), labels)


def test_every_parameter_has_a_gradient(model) -> None:
    model.train()
    model(IDS, MASK, labels=LABELS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_round_trip(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    again = models.load(tmp_path)
    assert type(again) is models.BertCrfForTokenClassification
    assert torch.equal(again(IDS, MASK, labels=LABELS).loss, model(IDS, MASK, labels=LABELS).loss)


def test_from_a_checkpoint_without_a_crf(model, tmp_path) -> None:
    models.BertForTokenClassification(CONFIG).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="newly initialised, as not in the checkpoint: crf.end_transitions"):
        again = models.BertCrfForTokenClassification.from_pretrained(tmp_path)
    assert again.crf.transitions.abs().max() <= 0.1


def test_accelerated(model) -> None:
    loss, logits = model(IDS, MASK, labels=LABELS)
    fastformer.accelerate(model, unpad=False)
    fused = model(IDS, MASK, labels=LABELS)
    torch.testing.assert_close(fused.logits[MASK.bool()], logits[MASK.bool()], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused.loss, loss, atol=1e-5, rtol=1e-5)
