"""What the examples share: options, text, and a training loop that can be killed at any step and resumed.

A micro-batch, dropout included, is a function of the seed and its number, so the position in the data is the number of
the step. A checkpoint holds the model, the optimizer and the losses so far. Under torchrun the processes share out the
micro-batches of a step (parallel.py), and so any number of them gives the losses of one.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics

import parallel
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import fastformer

LIBRARIES = "fastformer.models", "transformers"
Batch = Callable[[torch.Generator], dict[str, Tensor]]
Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def options(description: str, steps: int, batch: int, lr: float, library: str | None = None) -> argparse.ArgumentParser:
    """library: the one whose model is trained by default, where both have it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch, help="examples of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches of a step")
    parser.add_argument("--lr", type=float, default=lr, help="the largest learning rate")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, metavar="DIR", help="folder of the checkpoint")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --save")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="stop there, as if it had been killed")
    parser.add_argument("--eager", action="store_true", help="plain PyTorch, for comparison")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--bfloat16", action="store_true", help="autocast")
    parser.add_argument("--checkpointing", action="store_true", help="compute each layer again for its backward")
    if library:
        parser.add_argument("--library", choices=LIBRARIES, default=library, help="whose model")
    parser.add_argument("--parallel", choices=parallel.KINDS, default="ddp", help="under torchrun")
    return parser


def documents() -> list[str]:
    """The text that every Python has: its own manual, one document a topic."""
    return [topics.topics[name].strip() for name in sorted(topics.topics)]


def train(
    model: nn.Module, batch: Batch, loss_of: Loss, args: argparse.Namespace, *, accelerate: bool = True
) -> list[float]:
    """Trains in place with AdamW and a linear warm-up and decay; returns the loss of every step. The model ends on the
    CPU.

    batch(generator) makes a micro-batch whose "input_ids" are counted as its tokens, loss_of(model, batch) is its loss,
    a step takes the mean of its micro-batches' losses. A model that is built from fastformer.nn needs no `accelerate`.
    """
    if args.resume and args.save is None:
        raise SystemExit("--resume wants the folder of the checkpoint: --save DIR")
    if accelerate and not args.eager:
        fastformer.accelerate(model)
    rank, world = parallel.start()
    device = parallel.own_device(args.device)
    model.to(device).train()
    trained = model if world == 1 else parallel.distributed(model, args.parallel)
    shares = world if args.parallel != "tensor" else 1  # of a step's micro-batches
    if args.accumulate % shares:
        raise SystemExit(f"--accumulate must be a multiple of the {shares} processes, got {args.accumulate}")
    sharded = trained is not model and args.parallel != "ddp"
    optimizer = torch.optim.AdamW(trained.parameters(), lr=args.lr, fused=not sharded, foreach=False)
    losses = parallel.load(args.save, trained, optimizer) if args.resume else []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console, tokens, since = Console(quiet=rank > 0), 0, time.perf_counter()
    backend = fastformer.backend("torch") if args.eager else contextlib.nullcontext()
    layers = parallel.recomputed(trained) if args.checkpointing else contextlib.nullcontext()
    with backend, layers, Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=args.steps, completed=len(losses))
        for step in range(len(losses), min(args.steps, args.stop_after or args.steps)):
            optimizer.param_groups[0]["lr"] = args.lr * schedule(step, args.steps)
            optimizer.zero_grad()
            total = 0.0
            mine = range(step * args.accumulate + rank % shares, (step + 1) * args.accumulate, shares)
            for number in mine:
                torch.manual_seed(args.seed * 1_000_003 + number)
                given = batch(torch.Generator().manual_seed(args.seed * 1_000_003 + number))
                given = {name: x.to(device) for name, x in given.items()}
                with parallel.unsynchronized(trained, number != mine[-1]):
                    with torch.autocast(device.type, torch.bfloat16, enabled=args.bfloat16):
                        loss = loss_of(trained, given)
                    (loss / len(mine)).backward()
                total += loss.item() / len(mine)
                tokens += given["input_ids"].numel() * shares
            parallel.clip_gradients(trained, 1.0)
            optimizer.step()
            losses.append(parallel.mean(total))
            progress.update(task, advance=1, description=f"loss {losses[-1]:.4f}")
            if (step + 1) % 20 == 0 or step + 1 == args.steps:
                speed = tokens / (time.perf_counter() - since)
                console.print(f"step {step + 1}: loss {losses[-1]:.4f}, {speed:,.0f} tokens/s")
                tokens, since = 0, time.perf_counter()
            if args.save and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
                parallel.save(args.save, step + 1, trained, optimizer, losses)
    if sharded:
        parallel.write_back(trained, model)
    model.cpu()
    if args.save and len(losses) == args.steps and rank == 0 and hasattr(model, "save_pretrained"):
        model.save_pretrained(args.save)
    parallel.stop()
    return losses


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then down to 0."""
    warmup = max(steps // 10, 1)
    return min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))
