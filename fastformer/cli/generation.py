"""The rows of `fastformer compare` for generation: tokens one by one, through transformers' generate."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import nn

from fastformer.cli.measure import Timing, time_interleaved

NEW_TOKENS = 64
ROUNDS = 3  # of eager and fused, after one that warms them up

LEGEND = """\
tokens/s of a generation: new tokens, over the time from the prompt to the last of them
first    token of a generation: time from the prompt to it
tokens   new tokens that are eager's, up to the first that is another"""


@dataclass
class Run:
    """A model's continuation of a prompt, (1, length) tokens; each call generates it anew."""

    model: nn.Module
    prompt: torch.Tensor
    tokens: torch.Tensor | None = None  # (1, length + NEW_TOKENS) of the last call
    first: list[float] = field(default_factory=list)  # seconds to the first token, of each call

    def __call__(self) -> None:
        self.start, self.pieces = time.perf_counter(), 0
        self.tokens = self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            streamer=self,
        )

    def put(self, tokens: torch.Tensor) -> None:
        """What generate calls with the prompt, and with each token."""
        self.pieces += 1
        if self.pieces == 2:
            self.first.append(time.perf_counter() - self.start)

    def end(self) -> None: ...


@dataclass(frozen=True)
class Generation:
    workload: str
    inputs: str
    timings: Mapping[str, Timing]  # of "eager" and "fused", the whole call
    first: Mapping[str, Timing]  # the first token
    equal: int  # fused tokens that are eager's, up to the first that is another
    must_be_equal: bool

    @property
    def agree(self) -> bool:
        return self.equal == NEW_TOKENS or not self.must_be_equal

    @property
    def ratio(self) -> float:
        return self.timings["eager"].median / self.timings["fused"].median

    def tokens_per_s(self, name: str) -> float:
        return NEW_TOKENS / self.timings[name].median


def measure_generation(
    workload: str, models: Mapping[str, nn.Module], prompt: torch.Tensor, must_be_equal: bool
) -> Generation:
    """models: "eager" and "fused". Tokens must be equal where both compute the same numbers in float32."""
    runs = {name: Run(model, prompt) for name, model in models.items()}
    timings = time_interleaved(runs, 0, ROUNDS)
    first = {name: Timing(run.first[1:]) for name, run in runs.items()}  # but for the one that warms up
    new = [run.tokens[0, prompt.shape[1] :] for run in runs.values()]
    equal = int((new[0] == new[1]).long().cumprod(0).sum()) if new[0].shape == new[1].shape else 0
    inputs = f"generate, {prompt.shape[1]} + {NEW_TOKENS} tokens, greedy"
    return Generation(workload, inputs, timings, first, equal, must_be_equal)


def generation_table(generations: list[Generation], duration: Any) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("workload")
    table.add_column("")
    for name in ("tokens", "tokens/s", "spread", "ratio", "first"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in generations:
        for label, name in zip((one.workload, one.inputs), one.timings, strict=True):
            fused = name == "fused"
            equal = f"{one.equal} of {NEW_TOKENS}" if one.agree else f"[bold red]NO: {one.equal} of {NEW_TOKENS}[/]"
            table.add_row(
                escape(label),
                name,
                equal if fused else "",
                f"{one.tokens_per_s(name):,.1f}",
                f"{one.timings[name].spread:.1%}",
                f"[bold {'green' if one.ratio >= 1 else 'red'}]{one.ratio:.2f}x[/]" if fused else "",
                duration(one.first[name].median),
                end_section=fused,
            )
    return table


def as_json(generations: list[Generation]) -> list[dict[str, Any]]:
    return [
        {
            "workload": one.workload,
            "inputs": one.inputs,
            "agree": one.agree,
            "new_tokens": NEW_TOKENS,
            "equal_tokens": one.equal,
            "ratio": one.ratio,
            "contenders": {
                name: {
                    "median_s": timing.median,
                    "spread": timing.spread,
                    "tokens_per_s": one.tokens_per_s(name),
                    "first_token_s": one.first[name].median,
                    "samples_s": timing.samples,
                }
                for name, timing in one.timings.items()
            },
        }
        for one in generations
    ]
