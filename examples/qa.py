"""Answers questions by a span of a passage, with BERT; passages and questions are made from templates.

A passage tells where a person was born, what they became and what they liked, in any order; a question asks for one.
"""

from __future__ import annotations

import importlib

import common
import torch
from torch import Tensor

PEOPLE = "ada alan grace john mary noam rosa paul".split()
PLACES = ("new york", "paris", "rio", "san juan", "north lake", "oslo")
JOBS = ("painter", "doctor", "sea captain", "teacher", "judge", "train driver")
THINGS = ("tea", "old books", "the sea", "cold soup", "long walks")
FACTS = (  # sentence, question, answers
    ("{person} was born in {answer} .", "where was {person} born ?", PLACES),
    ("{person} became a {answer} .", "what did {person} become ?", JOBS),
    ("{person} liked {answer} .", "what did {person} like ?", THINGS),
)
SPECIAL = ["[PAD]", "[CLS]", "[SEP]"]
TEXT = " ".join((*PEOPLE, *PLACES, *JOBS, *THINGS, *(text for fact in FACTS for text in fact[:2])))
IDS = {word: i for i, word in enumerate([*SPECIAL, *sorted({word for word in TEXT.split() if "{" not in word})])}


def example(generator: torch.Generator) -> tuple[list[int], int, int, int]:
    """Ids of [CLS] question [SEP] passage [SEP], where the passage begins, first and last word of the answer."""

    def draw(values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    person, asked = draw(PEOPLE), draw(range(len(FACTS)))
    words = ["[CLS]", *FACTS[asked][1].format(person=person).split(), "[SEP]"]
    passage = len(words)
    for fact in torch.randperm(len(FACTS), generator=generator).tolist():
        told, _, answers = FACTS[fact]
        answer = draw(answers).split()
        if fact == asked:
            first = len(words) + told.split().index("{answer}")
            last = first + len(answer) - 1
        words += told.format(person=person, answer=" ".join(answer)).split()
    return [IDS[word] for word in [*words, "[SEP]"]], passage, first, last


def examples(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    drawn = [example(generator) for _ in range(count)]
    length = max(len(ids) for ids, *_ in drawn)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, *_ in drawn])
    passage, first, last = (torch.tensor(values) for values in list(zip(*drawn, strict=True))[1:])
    return {
        "input_ids": ids,
        "attention_mask": ids != 0,
        "token_type_ids": ((torch.arange(length) >= passage[:, None]) & (ids != 0)).long(),
        "start_positions": first,
        "end_positions": last,
    }


def main(argv: list[str] | None = None) -> list[float]:
    parser = common.options(__doc__.split("\n")[0], steps=400, batch=32, lr=1e-3, library="fastformer.models")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    library = importlib.import_module(args.library)
    model = library.BertForQuestionAnswering(
        library.BertConfig(
            vocab_size=len(IDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=64, hidden_dropout_prob=args.dropout, attention_probs_dropout_prob=args.dropout,
        )
    )  # fmt: skip
    losses = common.train(
        model, lambda generator: examples(args.batch, generator), lambda model, given: model(**given).loss, args
    )
    test = examples(200, torch.Generator().manual_seed(-1))
    first, last = test.pop("start_positions"), test.pop("end_positions")
    model.eval()
    with torch.no_grad():
        output = model(**test)
    exact = (output.start_logits.argmax(1) == first) & (output.end_logits.argmax(1) == last)
    print(f"answers that are exactly right: {exact.float().mean():.1%} of 200 new")
    return losses


if __name__ == "__main__":
    main()
