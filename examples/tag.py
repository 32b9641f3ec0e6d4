"""Tags words as parts of names, dates and places with BERT and a linear-chain CRF, on sentences made from templates.

Tags are B-X for the first word of an X, I-X for the next, O for the others: I-X comes after B-X or I-X only, and the
CRF learns that.
"""

from __future__ import annotations

import common
import torch
from torch import Tensor

from fastformer.models import BertConfig, BertCrfForTokenClassification

TEMPLATES = (
    "{person} moved to {place} on {date}",
    "on {date} {person} met {person} in {place}",
    "the train from {place} to {place} left without {person}",
    "{place} has been the home of {person} since {date}",
)
FIRST, LAST = "ada alan grace john mary noam rosa paul".split(), "berg hill lake may rivers stone wood young".split()
PLACES = ("new york", "paris", "rio", "san juan", "north lake", "hill wood")
MONTHS = "may june july march april august".split()
TAGS = ("O", "B-person", "I-person", "B-place", "I-place", "B-date", "I-date")
WORDS = sorted(
    {word for text in (*TEMPLATES, *PLACES) for word in text.split() if "{" not in word}
    | {*FIRST, *LAST, *MONTHS, *map(str, range(1, 29))}
)
IDS = {word: i + 1 for i, word in enumerate(WORDS)}  # 0 is padding


def sentence(generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Ids and tags of the words of one."""

    def choose(values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    makers = {
        "{person}": lambda: choose(FIRST) + (f" {choose(LAST)}" if choose((True, False)) else ""),
        "{place}": lambda: choose(PLACES),
        "{date}": lambda: f"{choose(MONTHS)} {choose(range(1, 29))}",
    }
    ids, tags = [], []
    for slot in choose(TEMPLATES).split():
        words = makers[slot]().split() if slot in makers else [slot]
        kind = slot.strip("{}")
        ids += [IDS[word] for word in words]
        tags += [TAGS.index(f"{'I' if i else 'B'}-{kind}") if slot in makers else 0 for i in range(len(words))]
    return ids, tags


def sentences(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    pairs = [sentence(generator) for _ in range(count)]
    length = max(len(ids) for ids, _ in pairs)
    input_ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in pairs])
    labels = torch.tensor([tags + [-100] * (length - len(tags)) for _, tags in pairs])
    return {"input_ids": input_ids, "attention_mask": input_ids != 0, "labels": labels}


def main(argv: list[str] | None = None) -> list[float]:
    args = common.options(__doc__.split("\n")[0], steps=150, batch=32, lr=2e-3).parse_args(argv)
    torch.manual_seed(args.seed)
    config = BertConfig(
        vocab_size=len(WORDS) + 1, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=32, num_labels=len(TAGS), id2label=dict(enumerate(TAGS)),
        hidden_dropout_prob=args.dropout, attention_probs_dropout_prob=args.dropout,
    )  # fmt: skip
    model = BertCrfForTokenClassification(config)
    losses = common.train(
        model, lambda generator: sentences(args.batch, generator), lambda model, given: model(**given).loss, args
    )

    test = sentences(200, torch.Generator().manual_seed(-1))
    model.eval()
    with torch.no_grad():
        tags = model.decode(model(test["input_ids"], test["attention_mask"]).logits, test["attention_mask"])
    print(
        f"sentences that are tagged without a mistake: {(tags == test['labels']).all(1).float().mean():.1%} of 200 new"
    )
    return losses


if __name__ == "__main__":
    main()
