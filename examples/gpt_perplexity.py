"""The perplexity of a model of gpt_pretrain.py on text that it has not seen, with float32, 16-bit and 8-bit weights.

    python examples/gpt_pretrain.py --save /tmp/gpt
    python examples/gpt_perplexity.py /tmp/gpt

The text is what the modules of Python's library say of themselves.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import sys
from pathlib import Path

import torch
from gpt_pretrain import END
from torch import Tensor
from transformers import GPT2LMHeadModel

import fastformer

MODULES = "argparse collections copy datetime decimal doctest fractions heapq logging pickle random string textwrap"
WEIGHTS = {"float32": {}, "bfloat16": {"weights": "bfloat16"}, "int8": {"quantize": "int8"}}  # options of accelerate


def held_out() -> str:
    modules = [importlib.import_module(name) for name in MODULES.split()]
    return "\n\n".join(inspect.cleandoc(module.__doc__) for module in modules)


def perplexity(model: GPT2LMHeadModel, rows: Tensor) -> float:
    """exp of the mean negative log-likelihood of each token after the first of its row; rows: (B, S) tokens."""
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss for row in rows]
    return math.exp(torch.stack(losses).double().mean())


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, metavar="DIR", help="what gpt_pretrain.py --save wrote")
    parser.add_argument("--tokens", type=int, default=8192, help="so many at most, in rows of the model's length")
    args = parser.parse_args(argv)

    model = GPT2LMHeadModel.from_pretrained(args.model).eval()
    length = model.config.n_positions - 1
    text = torch.tensor([*held_out().encode()])[: args.tokens]
    rows = text[: len(text) // length * length].view(-1, length)
    rows = torch.nn.functional.pad(rows, (1, 0), value=END)
    results = {name: perplexity(fastformer.accelerate(model, **options), rows) for name, options in WEIGHTS.items()}
    sys.stdout.write(f"perplexity of {rows[:, 1:].numel():,} bytes\n")
    for name, value in results.items():
        sys.stdout.write(f"{name:9} {value:.4f}  {value / results['float32'] - 1:+.3%}\n")
    return results


if __name__ == "__main__":
    main()
