"""Training accelerated models: a plain loop, and transformers' Trainer."""

import copy

import pytest
import torch
import transformers
from accelerated.small import MODELS, B, bert, gpt2, ids, padding
from torch import nn

import fastformer
from fastformer import library

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the op library")


@pytest.mark.parametrize("model", MODELS)
def test_plain_loop(model):
    """Evaluation in between, on weights that have just changed."""
    eager = MODELS[model]()
    fused = fastformer.accelerate(copy.deepcopy(eager))
    losses = {}
    for kind, m in (("fused", fused), ("eager", eager)):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True)
        losses[kind] = []
        for _ in range(4):
            m.train()
            loss = m(input_ids=ids(), labels=ids()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            m.eval()
            with torch.no_grad():
                evaluated = m(input_ids=ids(), labels=ids()).loss
            losses[kind] += [loss.item(), evaluated.item()]
    assert losses["fused"] == pytest.approx(losses["eager"], rel=1e-4)
    assert losses["fused"][-1] < losses["fused"][0]


def losses_of(model, steps: int, seed: int) -> torch.Tensor:
    """Of `steps` steps on batches of a text with structure: tokens that count up, from any start."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3, fused=True)
    losses = []
    for _ in range(steps):
        start = torch.randint(0, 50, (B, 1), generator=generator)
        tokens = 3 + (start + torch.arange(12)) % 50
        labels = tokens.where(torch.rand(tokens.shape, generator=generator) < 0.4, -100)
        given = tokens.where(labels == -100, 2) if "Bert" in type(model).__name__ else tokens
        loss = model(input_ids=given, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_200_steps(model):
    eager = MODELS[model]()
    fused = fastformer.accelerate(copy.deepcopy(eager))
    expected, losses = losses_of(eager, 200, 0), losses_of(fused, 200, 0)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    assert losses[-20:].mean() < 0.7 * losses[:20].mean()


DROPOUT = {
    "bert": lambda: bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
    "gpt2": lambda: gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", DROPOUT)
def test_dropout_over_seeds(model):
    """Other masks than eager's: the final losses agree within the noise of five seeds."""
    final = {}
    for kind in ("eager", "fused"):
        runs = []
        for seed in range(5):
            trained = DROPOUT[model]()
            if kind == "fused":
                fastformer.accelerate(trained)
            runs.append(losses_of(trained, 200, seed)[-40:].mean())
        final[kind] = torch.stack(runs)
    difference = final["fused"] - final["eager"]  # of the same batches
    assert abs(difference.mean()) <= 3 * difference.std() / 5**0.5


class Sentences(torch.utils.data.Dataset):
    """Padded ones."""

    def __len__(self) -> int:
        return B

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens, mask = ids()[i], padding("right")[i]
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def train(model: nn.Module, folder, **options) -> list[float]:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=5,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        learning_rate=1e-3,
        disable_tqdm=True,
        **options,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Sentences(), eval_dataset=Sentences())
    trainer.train()
    log = trainer.state.log_history
    return [entry[name] for entry in log for name in ("loss", "eval_loss") if name in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}, {"bf16": True}],
    ids=["float32", "checkpoints", "accumulated", "bf16"],
)
@pytest.mark.parametrize("build", [bert, gpt2])
def test_trainer(build, options, tmp_path):
    pytest.importorskip("accelerate")
    eager = build()
    fused = fastformer.accelerate(copy.deepcopy(eager))
    losses = [train(model, tmp_path / str(i), **options) for i, model in enumerate((fused, eager))]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if "bf16" in options else 1e-4)
    # Checkpointing, transformers hooks the word embeddings: their output is to need a gradient.
    left = ["bert.embeddings"] if build is bert and "gradient_checkpointing" in options else []
    assert [row.name for row in fastformer.report(fused).left] == left
