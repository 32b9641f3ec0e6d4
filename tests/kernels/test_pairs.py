"""Every two features of an op are translated together, to Triton's IR."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

pytest.importorskip("triton")

import pairs
import torch
import triton
import triton.language as tl
from aot import compiling_for
from calls import KINDS
from triton.compiler.errors import CompilationError


@pytest.mark.parametrize("op", pairs.OPS)
def test_covering(op):
    """Each two levels that can be together are, and no call has what can't be."""
    factors, possible, _ = pairs.OPS[op]
    rows = list(pairs.covering(factors, possible))
    assert all(row.keys() == factors.keys() and possible(row) for row in rows)
    for names in pairs.possible_pairs(factors, possible):
        assert any(names.items() <= row.items() for row in rows), names


@pytest.mark.parametrize("target", ["sm_90", "gfx1100"])  # with TMA; where wide heads are loaded anew
def test_translated(target):
    """To Triton's IR, where names, types and shapes are checked."""
    before = torch.get_float32_matmul_precision()
    try:
        for call, kind in pairs.KIND_OF:
            torch.set_float32_matmul_precision("high" if kind == "tf32x3" else "highest")
            with compiling_for(target, only_translate=True) as kernels:
                pairs.CALLS[call](KINDS[kind])
            assert kernels, call
    finally:
        torch.set_float32_matmul_precision(before)


@triton.jit
def uses_a_name_twice(x_ptr):
    value = tl.load(x_ptr + tl.arange(0, 16))
    for start in range(0, x_ptr.dtype.element_ty.primitive_bitwidth, 16):
        value = value[None, :] + start
    tl.store(x_ptr + tl.arange(0, 16), value)


def test_translation_finds_mistakes():
    with compiling_for("sm_90", only_translate=True), pytest.raises(CompilationError):
        uses_a_name_twice[(1,)](torch.empty(16))
