"""Training steps on CPUs, plain PyTorch against fastformer: speed in turn in one process, memory each in its own.

    python bench/training.py [--threads 1 2] [--seconds 20] [--only MLM] [--json FILE]

A step is forward, backward, AdamW(fused=True) and zero_grad(); for single ops forward and backward. Memory is the peak
beyond what lies there before the step, without the gradients of the parameters. With their dropout off for one step,
losses and gradients have to be those of plain PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from peers.workloads import MIXED
from torch import Tensor, nn

import fastformer
from fastformer import ops
from fastformer.cli.machine import cpu, versions
from fastformer.cli.measure import peak_memory, time_interleaved

Batch = dict[str, Tensor]


@dataclass
class Contender:
    loss: Callable[[], Tensor]
    parameters: list[Tensor]
    module: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None

    def step(self) -> None:
        self.loss().backward()
        if self.optimizer:
            self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None


def pretraining() -> tuple[nn.Module, Batch]:
    ids = torch.randint(5, 30000, (8, 128))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": (torch.arange(128) > 60).long().expand(8, 128),
        "labels": ids.where(torch.rand(8, 128) < 0.15, -100),
        "next_sentence_label": torch.arange(8) % 2,
    }
    return transformers.BertForPreTraining(transformers.BertConfig()), batch


def classification() -> tuple[nn.Module, Batch]:
    mask = (torch.arange(128) < torch.tensor(MIXED)[:, None]).long()
    batch = {
        "input_ids": torch.randint(5, 30000, (16, 128)) * mask,
        "attention_mask": mask,
        "labels": torch.arange(16) % 2,
    }
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2)), batch


def generation() -> tuple[nn.Module, Batch]:
    ids = torch.randint(50257, (4, 256))
    return transformers.GPT2LMHeadModel(transformers.GPT2Config()), {"input_ids": ids, "labels": ids}


MODELS = {
    "BERT-base, MLM and next sentence, 8 x 128": pretraining,
    "BERT-base, classification, 16 x 128, mixed lengths": classification,
    "GPT-2 small, 4 x 256": generation,
}
ATTENTION = {
    "attention with dropout, 8 x 12 x 128 x 64": (8, 12, 128, 64),
    "attention with dropout, 1 x 12 x 512 x 64": (1, 12, 512, 64),
}
CROSS_ENTROPY = {
    "linear_cross_entropy, 1024 x 768 to 50257, all labelled": 1.0,
    "linear_cross_entropy, 1024 x 768 to 50257, 15% labelled": 0.15,
}
WORKLOADS = [*MODELS, *ATTENTION, *CROSS_ENTROPY]


def contenders(name: str) -> dict[str, Callable[[], Contender]]:
    """By their names, how to make each; all of one workload start from the same weights and inputs."""
    torch.manual_seed(0)
    if name in MODELS:
        model, batch = MODELS[name]()

        def make(accelerated: bool) -> Contender:
            mine = copy.deepcopy(model).train()
            if accelerated:
                fastformer.accelerate(mine)
            parameters = list(mine.parameters())
            optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
            return Contender(lambda: mine(**batch).loss, parameters, mine, optimizer)

        return {"eager": lambda: make(False), "fastformer": lambda: make(True)}
    if name in ATTENTION:
        query, key, value, weights = (torch.randn(ATTENTION[name]) for _ in range(4))

        def attend(function: Callable[..., Tensor]) -> Contender:
            leaves = [x.clone().requires_grad_() for x in (query, key, value)]
            return Contender(lambda: (function(*leaves, dropout_p=DROPOUT.p) * weights).sum(), leaves)

        return {
            "eager": lambda: attend(F.scaled_dot_product_attention),
            "fastformer": lambda: attend(ops.scaled_dot_product_attention),
        }
    classes = 50257
    input, weight = torch.randn(1024, 768), torch.randn(classes, 768) / 768**0.5
    target = torch.randint(classes, (1024,)).where(torch.rand(1024) < CROSS_ENTROPY[name], -100)

    def lose(function: Callable[..., Tensor]) -> Contender:
        leaves = [x.clone().requires_grad_() for x in (input, weight)]
        return Contender(lambda: function(*leaves, target), leaves)

    named = {"eager": lambda *x: F.cross_entropy(F.linear(*x[:2]), x[2]), "fastformer": ops.linear_cross_entropy}
    if hasattr(F, "linear_cross_entropy"):
        named["torch's own"] = F.linear_cross_entropy
    return {kind: (lambda function=function: lose(function)) for kind, function in named.items()}


DROPOUT = nn.Dropout(0.1)  # of the attention op


@contextmanager
def without_dropout(module: nn.Module | None) -> Iterator[None]:
    layers = [m for m in (module or DROPOUT).modules() if isinstance(m, nn.Dropout)]
    before = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, p in zip(layers, before, strict=True):
            layer.p = p


def check(made: dict[str, Contender]) -> None:
    """Loss and size of the gradient of one step without dropout."""
    results = {}
    for kind, contender in made.items():
        with without_dropout(contender.module):
            loss = contender.loss()
            loss.backward()
        norm = sum(p.grad.double().square().sum().item() for p in contender.parameters if p.grad is not None) ** 0.5
        results[kind] = torch.tensor([loss.item(), norm])
        for parameter in contender.parameters:
            parameter.grad = None
    for kind, found in results.items():
        if not torch.allclose(found, results["eager"], rtol=1e-4):
            sys.exit(f"{kind}: loss and gradient {found.tolist()}, eager has {results['eager'].tolist()}")


def memory_of(name: str, kind: str) -> int | None:
    """Bytes, in a process of its own."""
    command = [sys.executable, __file__, "--memory", name, kind]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout
    return json.loads(found.splitlines()[-1])


def print_memory(name: str, kind: str) -> None:
    contender = contenders(name)[kind]()
    contender.step()
    gradients = sum(p.nbytes for p in contender.parameters)
    peak = peak_memory(contender.step)
    print(json.dumps(None if peak is None else peak - gradients))


def measure(name: str, threads: int, seconds: float) -> dict:
    torch.set_num_threads(threads)
    made = {kind: make() for kind, make in contenders(name).items()}
    check(made)
    times = time_interleaved({kind: contender.step for kind, contender in made.items()}, seconds, repeats=5)
    del made
    row = {"workload": name, "threads": threads, "contenders": {}}
    for kind, timing in times.items():
        memory = memory_of(name, kind) if threads == 1 else None
        row["contenders"][kind] = {"median_s": timing.median, "spread": timing.spread, "memory": memory}
    return row


def table(rows: list[dict]) -> str:
    heads = "step", "threads", "contender", "time", "times as fast", "spread", "memory", "of eager's"
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        eager = row["contenders"]["eager"]
        for kind, one in row["contenders"].items():
            memory = "" if one["memory"] is None else f"{one['memory'] / 2**20:.0f} MiB"
            share = f"{one['memory'] / eager['memory']:.2f}" if one["memory"] is not None and eager["memory"] else ""
            cells = [
                row["workload"], str(row["threads"]), kind, f"{one['median_s'] * 1e3:.4g} ms",
                f"{eager['median_s'] / one['median_s']:.2f}", f"{one['spread']:.0%}", memory, share,
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20, help="of each row")
    parser.add_argument("--only", default="", help="part of the workloads' names")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--memory", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        torch.set_num_threads(1)
        return print_memory(*options.memory)
    rows = []
    for threads in options.threads:
        for name in WORKLOADS:
            if options.only in name:
                rows.append(measure(name, threads, options.seconds))
                print(f"{name}, {threads} thread{'s' * (threads > 1)}: done", file=sys.stderr, flush=True)
    print(table(rows))
    if options.json:
        content = {"environment": {"cpu": cpu(), "versions": versions()}, "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
