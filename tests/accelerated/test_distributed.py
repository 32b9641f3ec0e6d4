"""Accelerated models in DDP, FSDP2 and tensor parallelism, on gloo; one process, and two that see different data (in
tensor parallelism: have some of the heads and hidden features each)."""

import copy
import os
import tempfile
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerated.small import (
    MODELS,
    bert,
    gpt2,
    gradients,
    ids,
    logits,
    packed_modules,
    padding,
    reference_gpt,
    spread,
)
from accelerated.test_unpadding import Tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastformer
from fastformer import library, models
from fastformer.integrations.parallel_styles import Columns, Heads, Rows

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
        globals()[test]((MODELS | SPLIT)[model](), rank, world)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("test", ["check_ddp", "check_fsdp2"])
def test_distributed(test, model, world):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (world, f"{folder}/store", test, model), nprocs=world)


COLUMNS = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "intermediate.dense", "linear1")
ROWS = ("output.dense", "out_proj", "linear2")
GPT = {"transformer.h.*.attn": Heads(), "transformer.h.*.mlp.c_fc": Columns(), "transformer.h.*.mlp.c_proj": Rows()}
SPLIT: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: bert(num_attention_heads=4),
    "reference bert": lambda: bert(library=models, num_attention_heads=4),
    "gpt2": lambda: gpt2(n_head=4),
    "reference gpt": lambda: reference_gpt(n_head=4),
    "transformer": lambda: spread(models.TransformerForConditionalGeneration(models.TransformerConfig(**TRANSFORMER))),
}
TRANSFORMER = dict(
    vocab_size=60, d_model=48, nhead=4, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=80, dropout=0.0
)


def test_fsdp2_transformer():
    """Encoder and decoder are called layer by layer, as FSDP2 wants it."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (2, f"{folder}/store", "check_fsdp2_transformer", "transformer"), nprocs=2)


def check_fsdp2_transformer(model: nn.Module, rank: int, world: int) -> None:
    expected = results(copy.deepcopy(model))
    fastformer.accelerate(model, strict=True)
    mesh = init_device_mesh("cpu", (world,))
    for layer in (*model.encoder, *model.decoder):
        fully_shard(layer, mesh=mesh)
    assert_split_is_whole(results(fully_shard(model, mesh=mesh)), expected)


def test_tensor_parallel():
    """Everything stays fused, on this process's shards; outputs and gradients are those of the whole model."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_tensor_parallel, (f"{folder}/store",), nprocs=2)


def run_tensor_parallel(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for make in SPLIT.values():
        for accelerate_first in (True, False):
            torch.manual_seed(0)
            check_tensor_parallel(make(), accelerate_first)
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(ValueError, match="GPT2Attention: 3 heads can't be shared out to 2 processes"):
        parallelize_module(gpt2(n_head=3), mesh, GPT)
    for style in (Columns(), Rows()):
        with pytest.raises(TypeError, match="expected nn.Linear or Conv1D, got Embedding"):
            parallelize_module(gpt2(), mesh, {"transformer.wte": style})
    dist.destroy_process_group()


def check_tensor_parallel(model: nn.Module, accelerate_first: bool) -> None:
    eager = copy.deepcopy(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    plan = {name: ColwiseParallel() for name in linears if name.endswith(COLUMNS)}
    plan |= {name: RowwiseParallel() for name in linears if name.endswith(ROWS)}
    plan = plan or GPT
    if accelerate_first:
        fastformer.accelerate(model, strict=True)
        with torch.no_grad():
            model.eval()(input_ids=ids(), labels=ids())
        assert packed_modules(model)
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    if not accelerate_first:
        fastformer.accelerate(model, strict=True)
    report = fastformer.report(model)
    assert report.fused and not report.left, str(report)
    stock = mock.patch("torch.nn.functional.scaled_dot_product_attention", side_effect=AssertionError("not fused"))
    with stock, fastformer.backend("cpu", strict=True), pytest.raises(AssertionError, match="not fused"):
        eager(input_ids=ids(), labels=ids())
    expected = results(eager)
    with stock, fastformer.backend("cpu", strict=True):
        assert_split_is_whole(results(model), expected)
    assert_split_is_whole(results(fastformer.restore(model)), expected)


def results(model: nn.Module) -> dict[str, torch.Tensor]:
    """Loss and logits (the Transformer has them without labels only) in inference, and the gradients of the loss; of a
    padded batch in BERT, whose encoder leaves the padding out."""
    batch, real = {"input_ids": ids(), "labels": ids()}, torch.ones_like(ids()).bool()
    if hasattr(model, "bert"):
        batch, real = padded(ids()), padding("right").bool()
    with torch.no_grad():
        output = model.eval()(**batch)
    model.zero_grad()
    model.train()(**batch).loss.backward()
    found = {"loss": output.loss, **gradients(model)}
    if output.logits is not None:
        found["logits"] = output.logits[real]
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}


def assert_split_is_whole(split: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> None:
    assert split.keys() == whole.keys() and len(whole) > 10
    for name, x in split.items():
        torch.testing.assert_close(x, whole[name], atol=1e-5, rtol=1e-3, msg=name)


def padded(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = padding("right")
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def batches(world: int) -> list[dict[str, torch.Tensor]]:
    return [padded(tokens) for tokens in ids(batch=10 * world).chunk(world)]


def stock_step(model: nn.Module, world: int, optimizer: torch.optim.Optimizer) -> None:
    """What a distributed step has to come to: the mean over the processes."""
    optimizer.zero_grad()
    for batch in batches(world):
        (model(**batch).loss / world).backward()
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
        wrapped(**batch).loss.backward()
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
    tokens = Tokens(model.bert) if hasattr(model, "bert") else None
    steppers = [torch.optim.AdamW(m.parameters(), lr=0.01, fused=fused) for m, fused in ((model, False), (eager, True))]
    for _ in range(3):
        model.eval()
        torch.testing.assert_close(logits(model), logits(eager.eval()), atol=1e-4, rtol=1e-3)
        assert not packed_modules(model)
        model.train(), eager.train()
        steppers[0].zero_grad()
        batch = batches(world)[rank]
        model(**batch).loss.backward()
        if tokens is not None:  # FSDP2's hooks do not bring the padding back
            assert tokens.seen[-1] == int(batch["attention_mask"].sum()) < batch["attention_mask"].numel()
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
