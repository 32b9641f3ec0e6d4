"""Mistakes planted in the PTX of a call's kernels."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from accuracy import assert_close_to_reference

from fastformer import ops

from .faults import Fault
from .kernel_tests import F16, running

Edit = Callable[[str], str]


def attention() -> None:
    """Five tiles of keys, the last one ragged."""
    q, k, v = (torch.randn(1, 1, n, 64).to(F16) for n in (70, 290, 290))
    expected = torch.nn.functional.scaled_dot_product_attention
    output = ops.scaled_dot_product_attention(q, k, v)
    assert_close_to_reference(output, expected(q, k, v), expected(q.double(), k.double(), v.double()))


def linear(depth: int = 152) -> None:
    """Steps of 32: five, of which the last one, ragged, lies in the memory of the first."""
    x, w = torch.randn(70, depth).to(F16), torch.randn(72, depth).to(F16) / depth**0.5
    expected = torch.nn.functional.linear
    assert_close_to_reference(ops.linear(x, w), expected(x, w), expected(x.double(), w.double()))


def layer_norm() -> None:
    x = torch.randn(5, 1100)
    expected = torch.nn.functional.layer_norm
    assert_close_to_reference(ops.layer_norm(x, 1100), expected(x, (1100,)), expected(x.double(), (1100,)))


CALLS = {
    "attention": (attention, r"forward_kernel"),
    "linear": (linear, r"matmul"),
    "deep linear": (partial(linear, 600), r"matmul_hopper_kernel"),  # ten steps of 64
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


def check_found(mutation: Mutation) -> None:
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
