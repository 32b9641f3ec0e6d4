"""Mistakes in the sources show in what is compiled: a few of them; `make mutations-ptx` plants all."""

import os

import pytest

pytest.importorskip("triton", reason="the PTX of the Triton kernels can't be made")

from ptx_mutations import MUTATIONS, calls_of, found_by

from ptx import cuda

TRITON = {
    ("norm.py", "eps is left out"),
    ("attention_forward.py", "the sum is not rescaled"),
    ("matmul.py", "the depth's last tile is not masked"),
}
CUDA = {
    ("attention_forward.h", "no barrier after a tile has come"),
    ("attention_hopper.h", "the registers of the output are not fenced"),
    ("attention_tiles.h", "no barrier of the warp between writing and reading its rows"),
}


def chosen(names: set[tuple[str, str]]) -> list:
    found = [pytest.param(m, id=f"{m.file}-{m.what}") for m in MUTATIONS if (m.file, m.what) in names]
    assert len(found) == len(names)
    return found


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="with TRITON_INTERPRET=1 nothing is compiled")
@pytest.mark.parametrize("mutation", chosen(TRITON))
def test_triton(mutation):
    assert found_by(mutation)


@pytest.mark.slow
@pytest.mark.skipif(cuda.why_not() is not None, reason=str(cuda.why_not()))
@pytest.mark.parametrize("mutation", chosen(CUDA))
def test_cuda(mutation):
    assert found_by(mutation)


def test_calls():
    """Each mistake has one, unless it is in host code."""
    assert {m.file for m in MUTATIONS if not calls_of(m)} == {"matmul.cu"}
