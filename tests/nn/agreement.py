"""The accuracy rule for all the results of a module: its output, and the gradients of its inputs and parameters."""

import torch
from accuracy import assert_close_to_reference
from torch import Tensor


def assert_all_close_to_reference(out: dict[str, Tensor], eager: dict[str, Tensor], ref64: dict[str, Tensor]) -> None:
    """The largest error of all results, each relative to its own size, is judged as one.

    In tensors as small as these the largest error of a single one is luck: between runs that are, in the median,
    equally exact, it varies threefold.
    """
    assert out.keys() == eager.keys() == ref64.keys()
    for name in out:
        shapes, dtypes = (out[name].shape, eager[name].shape), (out[name].dtype, eager[name].dtype)
        assert shapes[0] == shapes[1] and dtypes[0] == dtypes[1], f"{name}: {shapes}, {dtypes}"
    exponents = {name: x.abs().max().frexp().exponent for name, x in ref64.items()}  # a power of two divides exactly
    together = (torch.cat([x[name].ldexp(-exponents[name]).flatten() for name in out]) for x in (out, eager, ref64))
    assert_close_to_reference(*together, "of all results together, the largest")
