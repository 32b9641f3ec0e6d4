"""Each mistake that cuda_mutations.py plants has a place in the kernels; `make mutations-cuda` runs the tests on it."""

import shutil
from pathlib import Path

import pytest
from cuda_mutations import CUDA, MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[f"{m.file}-{m.what}" for m in MUTATIONS])
def test_can_be_planted(mutation, tmp_path: Path):
    shutil.copytree(CUDA, tmp_path / "cuda")
    mutation.apply(tmp_path / "cuda")
    assert (tmp_path / "cuda" / mutation.file).read_text() != (CUDA / mutation.file).read_text()
    assert (CUDA / mutation.kernels).exists()
