"""Mistakes in the PTX, as an asm string or a compiler could make them: each is a fault, or a wrong answer."""

import pytest

from ptx.kernel_tests import running
from ptx.mutating import CALLS, COPY, MMA, RACE, WRONG, Mutation, check_found, every, one

pytestmark = pytest.mark.slow

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
    check_found(mutation)


@pytest.mark.parametrize("source", ["cuda", "triton", "triton sm_90"])
@pytest.mark.parametrize("call", ["attention", "linear", "layer_norm"])
def test_without_a_mutation(source, call):
    with running(source)():
        CALLS[call][0]()
