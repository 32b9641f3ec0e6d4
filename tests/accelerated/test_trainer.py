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
    assert not fastformer.report(fused).left
