"""The kernels as nvcc and Triton compiled them: right by the accuracy rule of the ops, forward and backward, without
a race, an access outside of a tensor, a read of what nobody wrote; in 16 bits, no bank conflict in main loops.
"""

import pytest
import torch

from fastformer import ops
from ptx.kernel_tests import CASES, DTYPES, check, running

FAST = {  # those that `make test` runs
    ("triton", "layer_norm", "bfloat16"),
    ("triton", "linear", "float16"),
    ("triton", "attention, mask", "bfloat16"),
    ("triton sm_90", "linear", "bfloat16"),
    ("triton sm_90", "attention, causal", "float16"),
}
OF_CUDA = [case for case in CASES if not case.startswith("linear_cross_entropy") and case != "layer_norm, wide"]
# On sm_90, CUDA has other kernels for products and attention's forward in 16 bits.
OF_HOPPER = ["linear", "linear, ragged", "linear, deep", "linear, other strides", "feed_forward", "attention"]
OF_HOPPER += [f"attention, {what}" for what in ("long", "causal", "ragged", "window", "padding", "not finite")]
OF_HOPPER += ["attention, nothing seen", "attention, wide", "varlen_attn"]
IN_16_BITS = ["bfloat16", "float16"]
RUN = [
    ("cuda", OF_CUDA, DTYPES),
    ("cuda sm_90", OF_HOPPER, IN_16_BITS),
    ("triton", CASES, DTYPES),
    ("triton sm_90", CASES, DTYPES),
    ("triton sm_100", CASES, ["float32"]),  # in 16 bits its products are tcgen05, which is not known
    ("triton sm_100", [case for case in CASES if case.startswith(("layer_norm", "add_"))], IN_16_BITS),
]
ALL = [
    pytest.param(source, case, dtype, marks=() if (source, case, dtype) in FAST else pytest.mark.slow)
    for source, cases, dtypes in RUN
    for case in cases
    for dtype in dtypes
]


@pytest.mark.parametrize("source,case,dtype", ALL)
def test_kernels(source, case, dtype):
    check(source, case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["cuda", "triton", "triton sm_90"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["attention", "layer_norm", "linear"])
def test_orders_give_the_same_bits(source, dtype, name):
    """Whatever warp runs first, or all at once."""

    def gradients(order: str) -> list[torch.Tensor]:
        torch.manual_seed(3)
        with running(source)(order=order, seed=5):
            if name == "attention":
                given = [torch.randn(1, 2, n, 64, dtype=DTYPES[dtype]).requires_grad_() for n in (40, 290, 290)]
                output = ops.scaled_dot_product_attention(*given, is_causal=True, dropout_p=0.2)
            elif name == "layer_norm":
                given = [torch.randn(n, dtype=DTYPES[dtype]).requires_grad_() for n in ((5, 1100), (1100,), (1100,))]
                output = ops.layer_norm(given[0], 1100, *given[1:])
            else:
                given = [torch.randn(n, dtype=DTYPES[dtype]).requires_grad_() for n in ((40, 170), (72, 170), (72,))]
                output = ops.linear(*given, activation="gelu")
            return [output.detach(), *torch.autograd.grad(output, given, torch.ones_like(output))]

    results = [gradients(order) for order in ("together", "forward", "reverse", "random")]
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
