"""Accelerated models in DDP and FSDP2, on gloo; one process, and two that see different data."""

import copy
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerated.small import MODELS, gradients, ids, logits, packed_modules
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastformer
from fastformer import library

pytestmark = [
    pytest.mark.skipif(not library.available(), reason="needs the op library"),
    pytest.mark.slow,
]


def run(rank: int, world: int, store: str, test: str, model: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        globals()[test](MODELS[model](), rank, world)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("test", ["check_ddp", "check_fsdp2"])
def test_distributed(test, model, world):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (world, f"{folder}/store", test, model), nprocs=world)


def batches(world: int) -> list[torch.Tensor]:
    return list(ids(batch=10 * world).chunk(world))


def stock_step(model: nn.Module, world: int, optimizer: torch.optim.Optimizer) -> None:
    """What a distributed step has to come to: the mean over the processes."""
    optimizer.zero_grad()
    for batch in batches(world):
        (model(input_ids=batch, labels=batch).loss / world).backward()
    optimizer.step()


def check_ddp(model: nn.Module, rank: int, world: int) -> None:
    eager = copy.deepcopy(model).train()
    wrapped = DistributedDataParallel(fastformer.accelerate(model))
    steppers = [torch.optim.AdamW(m.parameters(), lr=0.01, fused=True) for m in (wrapped, eager)]
    for _ in range(2):
        wrapped.eval()
        torch.testing.assert_close(logits(wrapped), logits(eager.eval()), atol=1e-4, rtol=1e-3)
        assert packed_modules(model)
        wrapped.train(), eager.train()
        steppers[0].zero_grad()
        batch = batches(world)[rank]
        wrapped(input_ids=batch, labels=batch).loss.backward()
        steppers[0].step()
        stock_step(eager, world, steppers[1])
        for name, gradient in gradients(eager).items():
            torch.testing.assert_close(gradients(model)[name], gradient, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(logits(wrapped.eval()), logits(eager.eval()), atol=1e-4, rtol=1e-3)


def check_fsdp2(model: nn.Module, rank: int, world: int) -> None:
    """Sharded weights are gathered for each use into memory that is used again: nothing of them is packed."""
    eager = copy.deepcopy(model).train()
    fastformer.accelerate(model)
    torch.testing.assert_close(logits(model), logits(eager.eval()), atol=1e-5, rtol=1e-4)
    assert packed_modules(model)
    mesh = init_device_mesh("cpu", (world,))
    layers = model.bert.encoder.layer if hasattr(model, "bert") else model.transformer.h
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert type(layers[0]).__name__.startswith("FSDP") and isinstance(layers[0], FSDPModule)
    steppers = [torch.optim.AdamW(m.parameters(), lr=0.01, fused=fused) for m, fused in ((model, False), (eager, True))]
    for _ in range(3):
        model.eval()
        torch.testing.assert_close(logits(model), logits(eager.eval()), atol=1e-4, rtol=1e-3)
        assert not packed_modules(model)
        model.train(), eager.train()
        steppers[0].zero_grad()
        batch = batches(world)[rank]
        model(input_ids=batch, labels=batch).loss.backward()
        steppers[0].step()
        stock_step(eager, world, steppers[1])
    with torch.no_grad():
        for sharded, weight in zip(model.parameters(), eager.parameters(), strict=True):
            sharded.mul_(1.1), weight.mul_(1.1)
    model.eval(), eager.eval()
    expected = logits(eager)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(RuntimeError, match="FSDP.*before fully_shard"):
        fastformer.restore(model)
    assert fastformer.report(model).fused
    late = fully_shard(fastformer.restore(copy.deepcopy(eager)), mesh=mesh)
    with pytest.raises(NotImplementedError, match="DTensor"):
        fastformer.accelerate(late, strict=True)
