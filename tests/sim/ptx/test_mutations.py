"""Mistakes in the PTX, as an asm string or a compiler could make them: each is a fault, or a wrong answer."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from accuracy import assert_close_to_reference

from fastformer import ops
from ptx.faults import Fault
from ptx.kernel_tests import F16, running

pytestmark = pytest.mark.slow
Edit = Callable[[str], str]


def attention() -> None:
    """Five tiles of keys, the last one ragged."""
    q, k, v = (torch.randn(1, 1, n, 64).to(F16) for n in (70, 290, 290))
    expected = torch.nn.functional.scaled_dot_product_attention
    output = ops.scaled_dot_product_attention(q, k, v)
    assert_close_to_reference(output, expected(q, k, v), expected(q.double(), k.double(), v.double()))


def linear() -> None:
    """Five steps: the last one, ragged, lies in the memory of the first."""
    x, w = torch.randn(70, 152).to(F16), torch.randn(72, 152).to(F16) / 12
    expected = torch.nn.functional.linear
    assert_close_to_reference(ops.linear(x, w), expected(x, w), expected(x.double(), w.double()))


def layer_norm() -> None:
    x = torch.randn(5, 1100)
    expected = torch.nn.functional.layer_norm
    assert_close_to_reference(ops.layer_norm(x, 1100), expected(x, (1100,)), expected(x.double(), (1100,)))


CALLS = {
    "attention": (attention, r"forward_kernel"),
    "linear": (linear, r"matmul"),
    "layer_norm": (layer_norm, r"forward_kernel"),
}


def every(pattern: str, replacement: str) -> Edit:
    return lambda body: re.sub(pattern, replacement, body)


def one(pattern: str, replacement: str, number: int) -> Edit:
    """Of that number, from 0; a KeyError where there are not so many."""

    def edit(body: str) -> str:
        found = list(re.finditer(pattern, body))
        if number >= len(found):
            raise KeyError(f"{len(found)} of {pattern}")
        return body[: found[number].start()] + found[number].expand(replacement) + body[found[number].end() :]

    return edit


MMA = r"(mma\.sync[\w.]+\s+)\{([^}]*)\}, \{([^},]*),([^},]*),([^},]*),([^}]*)\}, \{([^},]*),([^}]*)\}"
WRONG, RACE, COPY = "error .*, at most .* allowed", "race: ", "to which a copy is under way"


@dataclass(frozen=True)
class Mutation:
    name: str
    source: str
    call: str
    edit: Edit
    found: str  # in the message

    def __str__(self) -> str:
        return f"{self.source}, {self.call}: {self.name}"


BOTH = [
    ("registers of a swapped", every(MMA, r"\1{\2}, {\3,\5,\4,\6}, {\7,\8}"), WRONG),
    ("registers of b swapped", every(MMA, r"\1{\2}, {\3,\4,\5,\6}, {\8,\7}"), WRONG),
    ("one mma with registers of b swapped", one(MMA, r"\1{\2}, {\3,\4,\5,\6}, {\8,\7}", 0), WRONG),
    ("copies of no group", every(r"cp\.async\.commit_group\s*;", ""), COPY),
    (
        "copies are not waited for",
        every(r"cp\.async\.wait_group\s+0x?\d*\s*;|cp\.async\.wait_group\s+\d+\s*;", ""),
        COPY,
    ),
    ("a wait that leaves four groups more", every(r"cp\.async\.wait_group\s+(\d+)", r"cp.async.wait_group 4\1"), COPY),
    ("ldmatrix without .trans", every(r"(ldmatrix[\w.]*x4)\.trans", r"\1"), WRONG),
    ("no barrier at all", every(r"bar\.sync\s+0\s*;", ""), RACE),
]
MUTATIONS = [
    Mutation(name, source, "attention", edit, found) for source in ("cuda", "triton") for name, edit, found in BOTH
]
# Others run only where a row is NaN or the kernel has dropout, or order no two accesses.
MUTATIONS += [
    Mutation(f"no barrier {i}", source, "attention", one(r"bar\.sync\s+0\s*;", "", i), RACE)
    for source, numbers in (("cuda", (0,)), ("triton", (0, 1, 3, 4, 6)))
    for i in numbers
]
MUTATIONS += [
    Mutation(name, "cuda", call, edit, found)
    for call, name, edit, found in [
        (
            "attention",
            "half of the bytes are copied",
            every(r"cp\.async\.cg([^;]*), 16,", r"cp.async.ca\1, 8,"),
            "nobody",
        ),
        ("attention", "another lane's value", every(r"shfl\.sync\.bfly", "shfl.sync.down"), WRONG),
        (
            "attention",
            "2^x twice",
            every(r"(ex2\.approx\.ftz\.f32) (%f\d+), (%f\d+);", r"\1 \2, \3; \1 \2, \2;"),
            WRONG,
        ),
        ("attention", "sum of d and another c", one(r"(mma[\w.]+ *\{%f\d+, )(%f\d+), (%f\d+)", r"\1\3, \2", 5), WRONG),
        ("linear", "registers of a swapped", every(MMA, r"\1{\2}, {\3,\5,\4,\6}, {\7,\8}"), WRONG),
        ("linear", "a wait that leaves a group more", every(r"cp\.async\.wait_group 2", "cp.async.wait_group 3"), COPY),
        ("linear", "bytes behind the end are copied", every(r"(cp\.async\.cg[^;]*, 16), %r\d+", r"\1"), WRONG),
        ("linear", "the wrong matrix of ldmatrix", one(r"(ldmatrix[\w.]+ *\{)(%r\d+), (%r\d+)", r"\1\3, \2", 0), WRONG),
        *(("linear", f"no barrier {i}", one(r"bar\.sync\s+0\s*;", "", i), RACE) for i in range(3)),
        *(
            ("layer_norm", f"no barrier {i}", one(r"bar\.sync\s+0\s*;", "", i), RACE) for i in (1, 3)
        ),  # 0 and 2 part sums that share no memory
    ]
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutations(mutation):
    call, kernel = CALLS[mutation.call]
    changed = []

    def edit(body: str) -> str:
        if not re.search(kernel, body[:300]):
            return body
        new = mutation.edit(body)
        changed.append(new != body)
        return new

    with pytest.raises((Fault, AssertionError), match=mutation.found), running(mutation.source)(edit=edit):
        call()
    assert any(changed)


@pytest.mark.parametrize("source", ["cuda", "triton"])
@pytest.mark.parametrize("call", CALLS)
def test_without_a_mutation(source, call):
    with running(source)():
        CALLS[call][0]()
