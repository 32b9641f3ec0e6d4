"""As test_mutations.py, of what sm_90 has: mbarrier, tensor maps, wgmma."""

import re

import pytest

from ptx.kernel_tests import running
from ptx.mutating import CALLS, COPY, RACE, WRONG, Mutation, check_found, every, one

pytestmark = pytest.mark.slow

PRODUCT = r"(wgmma\.mma_async[^;]*?\}, )([^;]*);"
NO_FENCE, UNDER_WAY, NO_PROXY_FENCE = (
    "a wgmma.fence lacks",
    "a wgmma (that is|or a bulk copy that is) under way",
    "with no fence.proxy.async in",
)
WGMMA = [
    ("no wgmma.fence", every(r"wgmma\.fence\.sync\.aligned;", ""), NO_FENCE),
    ("the first wgmma.fence lacks", one(r"wgmma\.fence\.sync\.aligned;", "", 0), NO_FENCE),
    ("no wgmma.commit_group", every(r"wgmma\.commit_group\.sync\.aligned;", ""), UNDER_WAY),
    ("no wgmma.wait_group", every(r"wgmma\.wait_group\.sync\.aligned \d;", ""), UNDER_WAY),
    ("waits that leave two groups", every(r"(wgmma\.wait_group\.sync\.aligned) \d;", r"\1 2;"), UNDER_WAY),
    ("b is negated", every(r"(wgmma\.mma_async[^;]*, )1, 1(, [01])", r"\g<1>1, -1\2"), WRONG),
    ("b is transposed", every(r"(wgmma\.mma_async[^;]*, 1, 1(?:, 0)?, )0;", r"\g<1>1;"), f"{WRONG}|nobody wrote|bytes"),
    ("one product adds to nothing", one(r"(wgmma\.mma_async[^;]*, )%p\d+(, 1, 1)", r"\g<1>0\2", 0), WRONG),
]
# The upper bits of the descriptors: swizzles of 128 bytes, 1024 from eight rows to the next
DESCRIPTOR = 0x4000004000000000
DESCRIPTORS = [
    ("no swizzle", every(str(DESCRIPTOR), str(DESCRIPTOR & ~(3 << 62))), f"{WRONG}|nobody wrote"),
    ("a swizzle of 64 bytes", every(str(DESCRIPTOR), str(DESCRIPTOR ^ 3 << 62)), f"{WRONG}|nobody wrote"),
    ("rows that are nearer", every(str(DESCRIPTOR), str(DESCRIPTOR - (1 << 32))), f"{WRONG}|nobody wrote"),
]
ATTENTION = [("no fence.proxy.async", every(r"fence\.proxy\.async[\w.:]*;", ""), NO_PROXY_FENCE)]
EXPECT = r"(mbarrier\.arrive\.expect_tx[^;]*, )(\d+);"
WAIT = r"(mbarrier\.try_wait\.parity[^;]*), %r\d+;"
TENSOR = r"(cp\.async\.bulk\.tensor\.2d[^;{]*)\{([^,]*), ([^}]*)\}([^;]*);"


def more(bytes_: int):
    return lambda body: re.sub(EXPECT, lambda m: f"{m[1]}{int(m[2]) + bytes_};", body)


LINEAR = [
    ("16 bytes more are expected", more(16), r"deadlock: .* and 16 bytes"),
    ("16 bytes fewer are expected", more(-16), r"deadlock: .* and -16 bytes"),
    ("nothing is expected", every(r"@%p\d+ mbarrier\.arrive\.expect_tx[^;]*;", ""), "deadlock: .* of 1 arrivals"),
    ("the other parity", every(WAIT, r"\1, 1;"), f"{COPY}|nobody wrote|{RACE}|arrivals"),
    ("no initialization", every(r"@%p\d+ mbarrier\.init[^;]*;", ""), "is no mbarrier that is initialized"),
    ("one initialization lacks", one(r"@%p\d+ mbarrier\.init[^;]*;", "", 1), "is no mbarrier that is initialized"),
    ("two arrivals are wanted", every(r"(mbarrier\.init[^;]*), 1;", r"\1, 2;"), "deadlock: .* lacks 1 of 2 arrivals"),
    ("coordinates swapped", every(TENSOR, r"\1{\3, \2}\4;"), WRONG),
    ("one copy lacks", one(r"@%p\d+ cp\.async\.bulk\.tensor[^;]*;", "", 1), r"deadlock: .* bytes"),
    (
        "a copy to another mbarrier",
        one(r"(cp\.async\.bulk[^;]*\[%r\d+)\];", r"\1+8];", 0),
        "bytes|no mbarrier|deadlock",
    ),
]
MUTATIONS = [
    Mutation(name, "triton sm_90", call, edit, found)
    for call, mistakes in (("attention", WGMMA + DESCRIPTORS + ATTENTION), ("linear", WGMMA[:5] + DESCRIPTORS + LINEAR))
    for name, edit, found in mistakes
]
# What is written by hand in CUDA. The producer's waits come first in the text.
CUDA_WAIT = r"(mbarrier\.try_wait\.parity[^;]*), %r\d+;"
CUDA = (
    WGMMA[:6]
    + DESCRIPTORS
    + [
        ("b is transposed", every(r"(wgmma\.mma_async[^;]*, 1, 1, 0, )0;", r"\g<1>1;"), f"{WRONG}|nobody wrote|bytes"),
        ("16 bytes more are expected", every(r"(expect_tx[^;]*\]), %r\d+;", r"\1, 32784;"), "deadlock: .* 16 bytes"),
        ("16 bytes fewer are expected", every(r"(expect_tx[^;]*\]), %r\d+;", r"\1, 32752;"), "deadlock: .* -16 bytes"),
        ("one copy lacks", one(r"cp\.async\.bulk\.tensor[^;]*;", "", 1), "deadlock: .* bytes"),
        ("coordinates swapped", every(TENSOR, r"\1{\3, \2}\4;"), WRONG),
        ("always parity 0", every(CUDA_WAIT, r"\1, 0;"), "deadlock|nobody wrote|under way|race|arrivals"),
        ("always parity 1", every(CUDA_WAIT, r"\1, 1;"), f"{COPY}|nobody wrote|{RACE}|arrivals"),
        ("the consumers don't arrive", every(r"mbarrier\.arrive\.shared::cta\.b64 [^;]*;", ""), "deadlock"),
        (
            "half of the consumers suffice",
            every(r"(mbarrier\.init[^;]*\]), %r\d+;", r"\1, 1;"),
            "race|under way|arrivals",
        ),
        ("no barrier behind the initialization", one(r"bar\.sync\s+0\s*;", "", 0), f"{RACE}|is no mbarrier"),
        ("more registers than there are", every(r"(setmaxnreg\.inc\S*) 232;", r"\1 248;"), "registers, of 65536"),
    ]
)
MUTATIONS += [Mutation(name, "cuda sm_90", "deep linear", edit, found) for name, edit, found in CUDA]


def test_no_fence_behind_the_initialization():
    """It is no fault, as Triton's kernels do without: it is counted."""
    call, _ = CALLS["deep linear"]
    for edit in (None, every(r"fence\.proxy\.async[\w.:]*;", "")):
        with running("cuda sm_90")(edit=edit) as launches:
            call()
        assert launches[0].counts.mma and bool(launches[0].counts.unfenced_barriers) == (edit is not None)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutations(mutation):
    check_found(mutation)
