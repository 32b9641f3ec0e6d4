"""Pretrains a GPT-2 on Python's own manual, byte by byte, then lets it write.

Documents are packed: a row holds several, one after the other, positions begin anew in each, and no token attends to
another document. `--large` is a model of about 10 million parameters.
"""

from __future__ import annotations

import sys

import common
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fastformer.models import GptConfig, GptLMHeadModel

END = 256  # of a document; the other tokens are bytes


def packed(documents: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """All documents in a row: tokens, the number of the document of each, and its position there."""
    encoded = [torch.tensor([END, *text.encode()]) for text in documents]
    numbers = torch.cat([torch.full((len(x),), i) for i, x in enumerate(encoded)])
    return torch.cat(encoded), numbers, torch.cat([torch.arange(len(x)) for x in encoded])


def main(argv: list[str] | None = None) -> list[float]:
    parser = common.options(__doc__.split("\n")[0], steps=200, batch=8, lr=1e-3, library="transformers")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--large", action="store_true", help="6 layers of 384, about 10 million parameters")
    parser.add_argument("--prompt", default="The with statement")
    parser.add_argument("--write", type=int, default=100, metavar="BYTES", help="how much to write after training")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    width, layers = (384, 6) if args.large else (128, 4)
    is_ours = args.library == "fastformer.models"
    config = (GptConfig if is_ours else GPT2Config)(
        vocab_size=END + 1, n_positions=args.length, n_embd=width, n_layer=layers, n_head=width // 32,
        resid_pdrop=args.dropout, embd_pdrop=args.dropout, attn_pdrop=args.dropout, bos_token_id=END, eos_token_id=END,
    )  # fmt: skip
    model = (GptLMHeadModel if is_ours else GPT2LMHeadModel)(config)
    tokens, documents, positions = packed(common.documents())
    causal = torch.ones(args.length, args.length, dtype=torch.bool).tril()

    def batch(generator: torch.Generator) -> dict[str, Tensor]:
        start = torch.randint(len(tokens) - args.length, (args.batch, 1), generator=generator)
        at = start + torch.arange(args.length)  # (B, S)
        document = documents[at]
        same = document[:, :, None] == document[:, None, :]
        labels = tokens[at].where(positions[at] > 0, -100)  # the end of one document says nothing of the next
        # Positions begin where the row or the document does: a document may be longer than a row.
        position = torch.minimum(positions[at], torch.arange(args.length))
        return {"input_ids": tokens[at], "attention_mask": (same & causal)[:, None], "position_ids": position,
                "labels": labels}  # fmt: skip

    losses = common.train(model, batch, lambda model, given: model(**given, use_cache=False).loss, args)
    if args.write:
        write(model, args.prompt, min(args.write, args.length - len(args.prompt.encode()) - 1))
    return losses


def write(model: GPT2LMHeadModel | GptLMHeadModel, prompt: str, count: int) -> None:
    ids = torch.tensor([[END, *prompt.encode()]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "top_k": 20}
    if isinstance(model, GPT2LMHeadModel):
        options |= {"do_sample": True, "pad_token_id": END}
    with torch.no_grad():
        output = model.eval().generate(ids, **options)[0]
    sys.stdout.write(bytes(i for i in output.tolist() if i < END).decode(errors="replace") + "\n")


if __name__ == "__main__":
    main()
