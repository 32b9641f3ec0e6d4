"""Mistakes in the sources of the kernels that runs of what is compiled must find (docs/ptx.md): do the tests test?

    python tests/sim/ptx_mutations.py [--only WORD] [--missing] [--write]

They are those of the Triton kernels (tests/kernels/mistakes.py) and of the CUDA kernels (cuda_mistakes.py). Each goes
into a copy of the sources; Triton's compiler or nvcc makes PTX of it, and calls of ptx/kernel_tests.py run until one
fails; without a mistake they pass. --write puts what was found into the table of docs/ptx.md, a line after the other.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "tests", "tests/kernels")]

import cuda_mutations  # noqa: E402
import mutations as triton_mutations  # noqa: E402
import planted  # noqa: E402
from planted import Mutation  # noqa: E402
from ptx import cuda  # noqa: E402
from ptx.faults import Fault  # noqa: E402
from ptx.kernel_tests import check  # noqa: E402

PAGE = ROOT / "docs" / "ptx.md"
SECONDS = 600  # for a call of the CUDA kernels
Call = tuple[str, str, str]  # source, case, dtype: of ptx/test_kernels.py
MUTATIONS = [*triton_mutations.MUTATIONS, *cuda_mutations.MUTATIONS]

# File, mistake or both -> the calls that run, in this order.
CASES = {
    "attention.py": ("attention, ragged", "attention, causal"),
    "the diagonal is hidden": ("attention, causal",),
    "tiles end before the last visible key": ("attention, window",),
    "a tile at the diagonal counts as whole": ("attention, causal",),
    "windows start at the top left": ("attention, mask",),
    "a tile of a wide head has the columns of the first": ("attention, widest",),
    "float masks are not in units of log2": ("attention, float mask",),
    "attention_forward.py": ("attention, causal", "attention, ragged"),
    "the last tile is skipped": ("attention, ragged",),
    "dropout counts sequences as heads": ("attention, mask",),
    "attention_backward.py": ("attention, causal", "attention, mask"),
    "the backward's dropout counts key heads": ("attention, dropout",),
    "dropout is not in the gradient of the scores": ("attention, dropout",),
    "the backward loses the mask": ("attention, float mask",),
    "norm.py": ("layer_norm",),
    "the residual is dropped": ("add_layer_norm",),
    "matmul.py: the residual is dropped": ("linear",),
    "dropout's counter is of the next row": ("add_layer_norm, dropout",),
    "the gradient of the sum is dropped": ("add_layer_norm",),
    "rows are summed twice": ("layer_norm, many rows",),
    "shares of the weight's gradient are left out": ("layer_norm, two rows",),
    "matmul.py": ("linear, ragged", "linear"),
    "the parts of a product go to one place": ("linear, deep",),
    "the same part of a product is added again": ("linear, deep",),
    "a transposed operand's tile is taken as it is": ("linear, other strides",),
    "activations.py": ("linear", "linear, ragged"),
    "relu's slope at 0 is 1": ("linear, relu at zero",),
    "philox.py": ("add_layer_norm, dropout",),
    "linear_cross_entropy.py": ("linear_cross_entropy",),
    "smoothing is not divided by the classes": ("linear_cross_entropy, split",),
    "the weight's gradient is the last chunk's": ("linear_cross_entropy, chunks",),
    "layer_norm.h": ("layer_norm", "layer_norm, ragged", "add_layer_norm, dropout"),
    "layer_norm.h: a row's offset is a 32-bit number": ("add_layer_norm, far apart",),
    "matmul_kernels.h: a row's offset is a 32-bit number": ("linear, far apart",),
    "attention_tiles.h: a row's offset is a 32-bit number": ("attention, far apart",),
    "matmul_kernels.h": ("linear", "linear, ragged"),
    "matmul_epilogue.h": ("linear", "linear, ragged"),
    "the residual is read at the output's stride": ("linear, other strides",),
    "activations.h": ("linear",),
    "matmul_hopper.h": ("linear", "feed_forward", "linear, deep"),
    "where the part of the depth begins is forgotten": ("linear, deep",),
    "attention_forward.h": ("attention, causal", "attention, mask"),
    "a query head reads another key head": ("attention, dropout",),
    "the last keys' tile is left out": ("attention, window",),
    "the parts' log-sum-exps go to one place": ("decode",),
    "all parts weigh the same": ("decode",),
    "the log-sum-exp of the parts is that of the largest": ("decode",),
    "a row that is NaN is not taken again": ("attention, not finite",),
    "no barrier where there was no tile": ("attention, nothing seen",),
    "attention_hopper.h": ("attention, ragged", "attention, causal"),
    "the second half of a head is the first": ("attention, wide",),
    "a mask with holes has none": ("attention, padding",),
    "the output is written before the queries are read": ("attention, wide",),
    "attention_visible.h": ("attention, causal", "attention, mask"),
    "the mask's sum is lost": ("attention, float mask",),
    "attention_tiles.h": ("attention, causal", "attention, ragged"),
    "attention_backward.h": ("attention, causal", "attention, mask"),
    "the mask is lost to the keys' gradient": ("attention, mask",),
    "the mask is lost to the queries' gradient": ("attention, mask",),
}
NOT_SEEN = {  # mistake -> why runs of the compiled kernels don't find it
    "TMA is given rows that are not aligned": "host code, which these runs take as it was built",
    "TMA is given a row that repeats": "host code, which these runs take as it was built",
    "a lane is ahead of its warp": "lanes that do not branch go in lock step",
    "a tile of a wide head has the columns of the first": "only RDNA's kernels, which are no PTX, load a head in turns",
}


def calls_of(mutation: Mutation) -> list[Call]:
    names = f"{mutation.file}: {mutation.what}", mutation.what, mutation.file
    cases = next((CASES[name] for name in names if name in CASES), ())
    if not mutation.kernels:
        source = "triton sm_90" if mutation.function == "def _load(" else "triton"
        dtype = "float32" if mutation.file in ("norm.py", "philox.py") else "float16"
    else:
        source = "cuda sm_90" if "hopper" in mutation.kernels else "cuda"
        types = {"bf16": "bfloat16", "f16": "float16"}
        dtype = next((types[word] for word in types if f"_{word}." in mutation.kernels), "float32")
    return [(source, case, dtype) for case in cases]


def found_by(mutation: Mutation) -> tuple[Call, str] | None:
    """The first call that fails on it, and its message; None: all pass."""
    return _found_by_cuda(mutation) if mutation.kernels else _found_by_triton(mutation)


def short(message: str) -> str:
    """Without the instruction, and the kernel's name as it is in the sources."""
    message = re.sub(r"; line \d+: .*", "", message)
    return re.sub(r"^_Z\w*?\d([a-z_]+_kernel)\w*", r"\1", message).replace("|", "or")


def _test(call: Call) -> str:
    return f"tests/sim/ptx/test_kernels.py::test_kernels[{'-'.join(call)}]"


def _found_by_triton(mutation: Mutation) -> tuple[Call, str] | None:
    calls = calls_of(mutation)
    run = triton_mutations.run_tests(mutation, [_test(call) for call in calls], compiled=True)
    failed = re.search(r"^FAILED (.*?\]) - (?:\w+\.)*(\w+): (.*)$", run.stdout, re.MULTILINE)
    if failed is None and run.returncode == 0:
        return None
    if failed is None or failed[2] not in ("Fault", "AssertionError", "CompilationError"):
        raise RuntimeError(f"{mutation.what}: the tests did not run\n{run.stdout}\n{run.stderr}")
    call = next(call for call in calls if _test(call) == failed[1])
    return call, "Triton's compiler refuses it" if failed[2] == "CompilationError" else failed[3]


def _found_by_cuda(mutation: Mutation) -> tuple[Call, str] | None:
    texts: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(ROOT / "csrc", directory, ignore=shutil.ignore_patterns("cpu"), dirs_exist_ok=True)
        copy = Path(directory) / "cuda"
        mutation.apply(copy)
        for call in calls_of(mutation):
            kernels = {x for x in _kernels(call) if cuda.file_of(x).stem == Path(mutation.kernels).stem}
            if not kernels:
                raise ValueError(f"{mutation.what}: {call} runs no kernel of {mutation.kernels}")
            if missing := kernels - texts.keys():
                texts |= cuda.compile_kernels(copy, mutation.kernels, missing)
            try:
                with _at_most(SECONDS):
                    _check(call, texts)
            except (Fault, AssertionError, TimeoutError) as error:
                return call, str(error)
    return None


@functools.cache
def _kernels(call: Call) -> set[str]:
    """That it launches; without a mistake it passes."""
    return {launch.kernel for launch in _check(call)}


def _check(call: Call, texts: dict[str, str] | None = None) -> list:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return check(*call, texts=texts)


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_) -> None:
        raise TimeoutError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main(
    only: Annotated[str, typer.Option(help="only those whose file or description has this in it")] = "",
    missing: Annotated[bool, typer.Option(help="only those that docs/ptx.md has no result of")] = False,
    write_page: Annotated[bool, typer.Option("--write", help="put the results into docs/ptx.md")] = False,
) -> None:
    chosen = [m for m in MUTATIONS if only in f"{m.file} {m.what}"]
    if missing:
        chosen = planted.not_run(chosen, PAGE)
    wrong, named = 0, set()
    for mutation in chosen:
        found, reason = found_by(mutation), NOT_SEEN.get(mutation.what)
        wrong += (found is None) == (reason is None)
        cells = [", ".join(found[0]), short(found[1])] if found else ["nothing", reason or "?"]
        print(" | ".join([mutation.file, mutation.what, *cells]), flush=True)
        if found and not mutation.kernels:
            named.add(_test(found[0]))
        if write_page:
            planted.write(PAGE, MUTATIONS, {mutation.place: cells})
    if named and (clean := triton_mutations.run_tests(None, sorted(named), compiled=True)).returncode != 0:
        raise RuntimeError(f"these tests fail without a mistake, too\n{clean.stdout}")
    raise typer.Exit(wrong > 0)


if __name__ == "__main__":
    typer.run(main)
