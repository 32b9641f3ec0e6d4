"""What the examples share: options, text, and a training loop that can be killed at any step and resumed.

A batch is a function of the seed and the step, so the position in the data is the number of the step. A checkpoint
holds that, the model, the optimizer, the schedule, torch's random state (dropout) and the losses so far.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import fastformer

CHECKPOINT = "checkpoint.pt"
Batch = Callable[[torch.Generator], dict[str, Tensor]]


def options(description: str, steps: int, batch: int, lr: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch, help="examples of a step")
    parser.add_argument("--lr", type=float, default=lr, help="the largest learning rate")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, metavar="DIR", help="folder of the checkpoint")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --save")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="stop there, as if it had been killed")
    parser.add_argument("--eager", action="store_true", help="plain PyTorch, for comparison")
    return parser


def documents() -> list[str]:
    """The text that every Python has: its own manual, one document a topic."""
    return [topics.topics[name].strip() for name in sorted(topics.topics)]


def train(
    model: nn.Module,
    batch: Batch,
    loss_of: Callable[[dict[str, Tensor]], Tensor],
    args: argparse.Namespace,
    *,
    accelerate: bool = True,
) -> list[float]:
    """Trains in place with AdamW and a linear warm-up and decay; returns the loss of every step.

    batch(generator) makes a batch whose "input_ids" are counted as its tokens, loss_of(batch) is its loss. A model that
    is built from fastformer.nn needs no `accelerate`.
    """
    if args.resume and args.save is None:
        raise SystemExit("--resume wants the folder of the checkpoint: --save DIR")
    if accelerate and not args.eager:
        fastformer.accelerate(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    warmup = max(args.steps // 10, 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / max(args.steps - warmup, 1))
    )
    losses: list[float] = []
    torch.manual_seed(args.seed)
    if args.resume:
        losses = load(args.save / CHECKPOINT, model, optimizer, scheduler)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console, tokens, since = Console(), 0, time.perf_counter()
    backend = fastformer.backend("torch") if args.eager else contextlib.nullcontext()
    with backend, Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=args.steps, completed=len(losses))
        for step in range(len(losses), min(args.steps, args.stop_after or args.steps)):
            given = batch(torch.Generator().manual_seed(args.seed * 1_000_003 + step))
            loss = loss_of(given)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            tokens += given["input_ids"].numel()
            progress.update(task, advance=1, description=f"loss {losses[-1]:.4f}")
            if (step + 1) % 20 == 0 or step + 1 == args.steps:
                speed = tokens / (time.perf_counter() - since)
                console.print(f"step {step + 1}: loss {losses[-1]:.4f}, {speed:,.0f} tokens/s")
                tokens, since = 0, time.perf_counter()
            if args.save and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
                save(args.save / CHECKPOINT, model, optimizer, scheduler, losses)
    return losses


def save(file: Path, model: nn.Module, optimizer, scheduler, losses: list[float]) -> None:
    """The file is replaced at once: whoever is killed meanwhile leaves the one before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": torch.get_rng_state(),
        "losses": losses,
    }
    torch.save(content, file.with_suffix(".new"))
    os.replace(file.with_suffix(".new"), file)


def load(file: Path, model: nn.Module, optimizer, scheduler) -> list[float]:
    if not file.exists():
        raise SystemExit(f"--resume: there is no {file}")
    content = torch.load(file, weights_only=True)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    scheduler.load_state_dict(content["scheduler"])
    torch.set_rng_state(content["random"])
    return content["losses"]
