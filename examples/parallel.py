"""One process or several: what the examples do under torchrun.

    torchrun --nproc-per-node 2 examples/tag.py --accumulate 2 --parallel fsdp

"ddp" keeps the whole model in each process, "fsdp" a part of each layer's weights, which it gathers for the layer's
turn; both share out the micro-batches of a step. "tensor" splits the matrices inside of a layer: each process computes
its heads and hidden features of all micro-batches.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from fastformer.integrations.parallel_styles import Columns, Heads, Rows

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is for one process
warnings.filterwarnings("ignore", ".*returned a view tensor")  # which nothing here changes in place

KINDS = ("ddp", "fsdp", "tensor")
# The linears that are split by output features, and those behind them, split by input features.
BY_COLUMNS = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "intermediate.dense", "linear1", "c_fc")
BY_ROWS = ("output.dense", "out_proj", "linear2", "mlp.c_proj")


def start() -> tuple[int, int]:
    """Rank and number of the processes; those of torchrun find each other, by gloo on CPUs and by NCCL on GPUs."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group()
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_device(kind: str) -> torch.device:
    """Of each process on a machine another GPU."""
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(kind)


def stop() -> None:
    """The first process alone has something to say after training."""
    if dist.is_torchelastic_launched():
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
        dist.destroy_process_group()


def layers(model: nn.Module) -> list[nn.Module]:
    return [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]


@contextlib.contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Activation checkpointing: of each layer only the input is kept, and its forward runs once more in backward."""
    for layer in layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    yield
    for layer in layers(model):
        del layer.forward


def unsynchronized(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager:
    """For the micro-batches before the last one: DDP need not average their gradients."""
    return model.no_sync() if wanted and isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def distributed(model: nn.Module, kind: str) -> nn.Module:
    """The model for training: around the given one for "ddp", else a copy, sharded."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    model = copy.deepcopy(model)
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    if kind == "fsdp":
        for layer in layers(model):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return parallelize_module(model, mesh, split(model))


def split(model: nn.Module) -> dict[str, ParallelStyle]:
    """How `parallelize_module` is to split each linear: a pair of them needs one sum over the processes."""
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if hasattr(module, "c_attn"):  # query, key and value of GPT-2 in one
            plan[name] = Heads()
        elif type(module) is nn.Linear or type(module).__name__ == "Conv1D":
            styles = (ColwiseParallel, RowwiseParallel) if type(module) is nn.Linear else (Columns, Rows)
            for style, names in zip(styles, (BY_COLUMNS, BY_ROWS), strict=True):
                if name.endswith(names):
                    plan[name] = style()
    if not plan:
        raise SystemExit(f"--parallel tensor: {type(model).__name__} has no linears that are known to split")
    return plan


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def write_back(trained: nn.Module, model: nn.Module) -> None:
    """The weights of a sharded copy, into the model."""
    state = {name: whole(x) for name, x in trained.state_dict().items()}
    model.load_state_dict(state)


def clip_gradients(model: nn.Module, max_norm: float) -> None:
    """As nn.utils.clip_grad_norm_, which does not take tensors and DTensors at once."""
    kinds: dict[type, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            kinds.setdefault(type(parameter.grad), []).append(parameter)
    norms = [whole(nn.utils.get_total_norm([p.grad for p in parameters])) for parameters in kinds.values()]
    for parameters in kinds.values():
        nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.stack(norms).norm())


def mean(x: float) -> float:
    """Over the processes."""
    total = torch.tensor(x, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total.item()


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, losses: list[float]) -> None:
    """Each process writes its part; the file .metadata comes last. Then the checkpoints of earlier steps go."""
    weights, moments = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": moments, "losses": losses}
    dcp.save(content, checkpoint_id=folder / f"step-{step}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        for other in folder.glob("step-*"):
            if other.name != f"step-{step}":
                shutil.rmtree(other)


def load(folder: Path, model: nn.Module, optimizer: Optimizer) -> list[float]:
    """The losses up to the last checkpoint that is whole, into which model and optimizer are put."""
    steps = [int(file.parent.name.removeprefix("step-")) for file in folder.glob("step-*/.metadata")]
    if not steps:
        raise SystemExit(f"--resume: there is no checkpoint in {folder}")
    weights, moments = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": moments, "losses": []}
    dcp.load(content, checkpoint_id=folder / f"step-{max(steps)}")
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    return content["losses"]
