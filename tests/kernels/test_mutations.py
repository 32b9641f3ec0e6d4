"""Every mistake that mutations.py plants still has a place in the kernels; `make mutations` runs the tests on them."""

import shutil
from pathlib import Path

import pytest
from mutations import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[f"{m.file}-{m.what}" for m in MUTATIONS])
def test_can_be_planted(mutation, tmp_path: Path):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    mutation.apply(tmp_path / "kernels")
    source = (tmp_path / "kernels" / mutation.file).read_text()
    assert source != (ROOT / "kernels" / mutation.file).read_text()
    compile(source, mutation.file, "exec")
