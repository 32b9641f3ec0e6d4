"""Styles for `torch.distributed.tensor.parallel.parallelize_module` where those of torch do not serve GPT-2.

ColwiseParallel and RowwiseParallel know nn.Linear only, and transformers' GPT-2 has Conv1D, whose weight is
(in_features, out_features). And its c_attn makes query, key and value side by side, of which each process is to have
its own heads:

    parallelize_module(model, mesh, {
        "transformer.h.*.attn": Heads(),
        "transformer.h.*.mlp.c_fc": Columns(),
        "transformer.h.*.mlp.c_proj": Rows(),
    })

They serve models before and after `fastformer.accelerate`, and without it; nn.Linear, too.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.distributed.tensor.placement_types import Placement

from fastformer import integrations
from fastformer.integrations.fused import LINEARS, TRANSPOSED


class Columns(ParallelStyle):
    """Each process has some of the output features, of an input (..., in_features) that is whole in all of them.

    Args:
        parts: what the output features are, side by side: 3 for query, key and value. Each process gets its share of
            each, (..., out_features / processes). The weights are split in one piece (a checkpoint then fits any
            number of processes), so the outputs are gathered first.

    Raises TypeError: the module is neither nn.Linear nor Conv1D.
    """

    def __init__(self, parts: int = 1):
        self.parts = parts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        of_weight = _sharded(module, by_columns=True)
        return distribute_module(
            module,
            device_mesh,
            lambda *_: _split(self, module, device_mesh, of_weight, Shard(0)),
            lambda _, inputs, mesh: _distributed(inputs[0], mesh, Replicate()),
            lambda _, output, mesh: self._own(output),
        )

    def _own(self, output: DTensor) -> Tensor:
        if self.parts > 1:
            output = output.redistribute(placements=[Replicate()]).unflatten(-1, (self.parts, -1))
            return output.redistribute(placements=[Shard(output.dim() - 1)]).to_local().flatten(-2)
        return output.to_local()


class Rows(ParallelStyle):
    """Each process has some of the input features and their part of the output, which is summed up.

    Raises TypeError: the module is neither nn.Linear nor Conv1D.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        of_weight = _sharded(module, by_columns=False)
        return distribute_module(
            module,
            device_mesh,
            lambda *_: _split(self, module, device_mesh, of_weight, Replicate()),
            lambda _, inputs, mesh: _distributed(inputs[0], mesh, Shard(-1)),
            lambda _, output, mesh: output.redistribute(placements=[Replicate()]).to_local(),
        )


class Heads(ParallelStyle):
    """GPT-2's attention, of transformers or of fastformer.models: each process has some of the heads.

    Raises ValueError: the heads can't be shared out evenly.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        heads, processes = module.num_heads, device_mesh.size()
        if heads % processes:
            raise ValueError(f"{type(module).__name__}: {heads} heads can't be shared out to {processes} processes")
        for name, style in {"c_attn": Columns(parts=3), "c_proj": Rows()}.items():
            parallelize_module(getattr(module, name), device_mesh, style, src_data_rank=self.src_data_rank)
        if hasattr(module, "split_size"):  # by which the stock forward of transformers takes c_attn's output apart
            module.split_size //= processes
        return module


def _sharded(linear: nn.Module, by_columns: bool) -> Shard:
    """How its weight is split."""
    integrations.load()
    if type(linear) not in LINEARS:
        raise TypeError(f"expected nn.Linear or Conv1D, got {type(linear).__name__}")
    return Shard(int(by_columns == (type(linear) in TRANSPOSED)))


def _split(style: ParallelStyle, linear: nn.Module, mesh: DeviceMesh, of_weight: Shard, of_bias: Placement) -> None:
    for name, placement in (("weight", of_weight), ("bias", of_bias)):
        if (parameter := getattr(linear, name)) is not None:
            split = distribute_tensor(parameter, mesh, [placement], src_data_rank=style.src_data_rank)
            linear.register_parameter(name, nn.Parameter(split, requires_grad=parameter.requires_grad))


def _distributed(x: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [placement], run_check=False)
