"""Every Triton kernel compiles for every GPU, and its machine code is within its budget: see docs/verification.md."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under the interpreter", allow_module_level=True)

pytest.importorskip("triton")

import budgets
import torch
from aot import TARGETS, compiling_for
from calls import BF16, attention, cases, layer_norm, linear, masked_attention, varlen
from torch.utils._python_dispatch import TorchDispatchMode

from fastformer.ops import common

BUDGETS = budgets.load()

# A fast choice for every day: one NVIDIA and one AMD GPU, and what is most likely to spill.
FAST = {
    ("sm_90", "layer_norm 768", "bfloat16"),
    ("sm_80", "add_layer_norm 1024, dropout", "bfloat16"),
    ("sm_80", "linear 768 to 768, dropout", "bfloat16"),
    ("sm_90", "linear 768 to 2304, one row", "float32"),
    ("sm_90", "feed_forward 768, gelu", "bfloat16"),
    ("sm_100", "feed_forward 768, gelu", "tf32x3"),
    ("sm_80", "attention 64, padding, dropout", "bfloat16"),
    ("sm_90", "attention 64, float mask", "float32"),
    ("sm_90", "attention 128, causal", "bfloat16"),
    ("gfx942", "attention 64, causal", "bfloat16"),
    ("sm_90", "decode 64", "float32"),
    ("sm_90", "varlen_attn 64", "bfloat16"),
    ("sm_90", "linear_cross_entropy 768 to 30522", "bfloat16"),
}


def every_case() -> list:
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(*case, id="-".join(case), marks=marks[case in FAST]) for case in cases(TARGETS)]


@pytest.mark.parametrize("target, call, kind", every_case())
def test_within_budget(target, call, kind):
    limits = BUDGETS.get(call, {}).get(kind, {}).get(target, {})
    faults = []
    for name, facts in budgets.compile_call(target, call, kind).items():
        found = budgets.faults(target, kind, facts, limits.get(name)) + ([] if name in limits else ["no budget"])
        faults += [f"{name}: {fault}" for fault in found]
    assert not faults, f"{call}, {kind}, {target}: " + "; ".join(faults)


TUNED = (
    "layer_norm 768",
    "layer_norm 4096",
    "add_layer_norm 1024, dropout",
    "linear 768 to 768, dropout",
    "linear 768 to 2304, one row",
    "linear_cross_entropy 768 to 30522",
    "attention 64, causal",
    "attention 64, padding, dropout",
    "attention 128, causal",
    "decode 64",
    "decode 128, grouped",
)


@pytest.mark.slow
@pytest.mark.parametrize("call", TUNED)
def test_candidates(call):
    """What `fastformer tune` may choose instead has no stack, no spills, and the shared memory that is there, on the
    target that has the least."""
    candidates = budgets.compile_candidates("sm_89", call, "bfloat16")
    faults = {name: found for name, x in candidates.items() if (found := budgets.faults("sm_89", "bfloat16", x, None))}
    assert candidates and not faults


def test_heads_too_large_for_tf32x3(monkeypatch):
    """Above 128 it would spill: those are multiplied as by default."""
    monkeypatch.setattr(budgets, "CALLS", {"large": lambda dtype: attention(dtype, 256, is_causal=True)})
    kernels = budgets.compile_call("sm_80", "large", "tf32x3")
    assert {tuple(facts.precisions) for facts in kernels.values()} == {("ieee",), ()}


# What a kernel's host function must not do: wait for the GPU, or read what is there.
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique2"}


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._opname not in READS, func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "target, call, kind", [case for case in every_case() if case.values[0] == "sm_90" and case.values[2] == "bfloat16"]
)
def test_no_host_reads(target, call, kind, monkeypatch):
    """Then a call can be captured in a CUDA graph."""

    def read(*args) -> None:
        raise AssertionError("reads on the host")

    def launcher(op: str, raw_name: str):
        launch = plain(op, raw_name)

        def watched(*args):
            with NoReads(), monkeypatch.context() as patch:
                for name in ("tolist", "numpy", "cpu"):
                    patch.setattr(torch.Tensor, name, read)
                watched_calls.append(raw_name)
                return launch(*args)

        return watched

    watched_calls: list[str] = []
    plain = common._launcher
    monkeypatch.setattr(common, "_launcher", launcher)
    budgets.compile_call(target, call, kind)
    assert watched_calls


SIZES = {
    "layer_norm": lambda batch, sequence: layer_norm(BF16, batch=batch, sequence=sequence),
    "linear": lambda batch, sequence: linear(BF16, batch=batch, sequence=sequence, activation="gelu"),
    "attention": lambda batch, sequence: attention(BF16, batch=batch, sequence=sequence, is_causal=True),
    "attention, mask": lambda batch, sequence: masked_attention(BF16, batch=batch, sequence=sequence),
    "varlen_attn": lambda batch, sequence: varlen(BF16, rows=batch * sequence),
}


def launches(call, *sizes: tuple[int, int]) -> set[str]:
    with compiling_for("sm_80") as kernels:
        for size in sizes:
            call(*size)
    return {kernel.hash for kernel in kernels}


@pytest.mark.parametrize("call", SIZES.values(), ids=SIZES)
def test_no_compilation_for_a_new_size(call):
    """Another batch or sequence length takes the kernels that are there: those of many rows, over which the gradient of
    a weight is split, and of fewer. Lengths that are no multiple of 16 may want their own, once: then a mask's rows are
    not aligned."""
    even = launches(call, (8, 512), (3, 512))
    assert launches(call, (8, 256), (16, 1024), (5, 768), (2, 64), (64, 256)) <= even
    odd = launches(call, (8, 77), (8, 511))
    assert launches(call, (3, 77), (5, 101), (7, 999)) <= even | odd
    assert len(even | odd) <= 2 * len(even)


def test_budgets_are_of_calls_that_exist():
    known = {(target, call, kind) for call, kinds in BUDGETS.items() for kind in kinds for target in kinds[kind]}
    assert known == set(cases(TARGETS)) >= FAST
