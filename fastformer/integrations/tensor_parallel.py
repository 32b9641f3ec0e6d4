"""Tensor parallelism: linears that `torch.distributed.tensor.parallel.parallelize_module` has split, computed by the
fused ops on this process's share.

ColwiseParallel, RowwiseParallel and the styles of parallel_styles.py make the parameters of a linear DTensors, and
register two hooks: one makes its input a DTensor in the layout that the product needs (with whatever communication that
takes), the other gives its output the layout that was asked for. A fused layer runs these hooks, and its op on the
local tensors in between.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastformer import ops
from fastformer.reference import ACTIVATIONS

_HOOKS = "torch.distributed.tensor._api"  # where distribute_module defines them


def is_sharded(parameter: Tensor | None) -> bool:
    return parameter.__class__.__name__ == "DTensor"  # torch.distributed.tensor takes long to import


def is_parallel(linear: nn.Module) -> bool:
    """Is a nn.Linear, or a Conv1D of transformers, as they leave it?"""
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    if not is_sharded(weight):
        return False
    hooks = [*linear._forward_pre_hooks.values(), *linear._forward_hooks.values()]
    return (
        (bias is None or is_sharded(bias))
        and [placement.is_shard() for placement in weight.placements] == [True]
        and [getattr(hook, "__module__", None) for hook in hooks] == [_HOOKS] * 2
        and not linear._backward_hooks
        and not linear._backward_pre_hooks
        and "forward" not in linear.__dict__
    )


def linear(module: nn.Module, x: Tensor, activation: str | None = None, *, is_transposed: bool = False) -> Tensor:
    """activation(module(x)) of a linear that `is_parallel`; transposed: its weight is (in_features, out_features)."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    weight, bias, inputs = module.weight, module.bias, (x,)
    mesh, local, of_columns = weight.device_mesh, weight.to_local(), 0
    if is_transposed:
        local, of_columns = local.t(), 1
    for hook in module._forward_pre_hooks.values():
        x = hook(module, inputs)
    if weight.placements[0].is_shard(
        of_columns
    ):  # some of the output features: each process has a part of x's gradient
        x, bias = x.to_local(grad_placements=[Partial()]), None if bias is None else bias.to_local()
        output = ops.linear(x, local, bias, activation=activation)
        output = DTensor.from_local(output, mesh, [Shard(-1)], run_check=False)
    else:  # some of the input features: each process has a part of the sum
        output = DTensor.from_local(ops.linear(x.to_local(), local), mesh, [Partial()], run_check=False)
        output = output.redistribute(placements=[Replicate()])
        output = ACTIVATIONS[activation](output if bias is None else output + bias)
    for hook in module._forward_hooks.values():
        output = hook(module, inputs, output)
    return output
