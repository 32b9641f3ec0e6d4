import math
import sys

import pytest
import torch

from fastformer.cli.measure import Timing, accuracy, first_call, max_error, peak_memory, time_interleaved, ulp

MB = 1_000_000


def test_accuracy_is_judged_by_the_eager_error() -> None:
    ref64 = torch.tensor([1.0, -3.0], dtype=torch.float64)
    eager = torch.tensor([1.0, -3.0 + 1e-3])
    unit = 2 * torch.finfo(torch.float32).eps  # of 3.0
    judged = accuracy(torch.tensor([1.0 + 2e-3, -3.0]), eager, ref64)
    assert judged.eager == pytest.approx(1e-3, rel=1e-3)
    assert judged.allowed == 2 * judged.eager + unit
    assert judged.agree
    assert not accuracy(torch.tensor([1.0 + 2.01e-3, -3.0]), eager, ref64).agree


def test_accuracy_allows_one_unit_where_eager_is_exact() -> None:
    ref64 = torch.tensor([1.0], dtype=torch.float64)
    eager, unit = torch.ones(1), torch.finfo(torch.float32).eps
    assert accuracy(eager + unit, eager, ref64).agree
    assert not accuracy(eager + 2 * unit, eager, ref64).agree


def test_nan_and_other_shapes_do_not_agree() -> None:
    ref64 = torch.ones(2, dtype=torch.float64)
    assert not accuracy(torch.tensor([1.0, math.nan]), torch.ones(2), ref64).agree
    assert not accuracy(torch.ones(2), torch.tensor([1.0, math.nan]), ref64).agree
    assert max_error(torch.ones(1, 2), ref64) == math.inf
    assert not accuracy(torch.ones(1, 2), torch.ones(2), ref64).agree


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0, 1.75, -3.0, 0.3])
def test_ulp_is_the_step_to_the_next_number(dtype: torch.dtype, value: float) -> None:
    rounded = torch.tensor(abs(value), dtype=dtype)
    step = torch.nextafter(rounded, torch.tensor(math.inf, dtype=dtype)) - rounded
    assert ulp(torch.tensor([value, 0.1], dtype=torch.float64), dtype) == step.item()


def test_ulp_of_nothing() -> None:
    assert ulp(torch.zeros(2), torch.float32) == ulp(torch.empty(0), torch.float32) == 0


def test_contenders_take_turns() -> None:
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = time_interleaved(contenders, seconds=0, repeats=3)
    assert calls == ["a", "b"] * 4  # a round to warm up, then three
    assert {name: len(timing.samples) for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_median_and_spread() -> None:
    timing = Timing([5.0, 1.0, 2.0, 4.0, 3.0])
    assert timing.median == 3.0
    assert timing.spread == pytest.approx((4.0 - 2.0) / 3.0)


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_memory_is_what_the_call_touches() -> None:
    held = []

    def pass_through() -> torch.Tensor:
        return torch.ones(25 * MB).sum()

    def keep() -> torch.Tensor:
        held.append(torch.ones(25 * MB))
        return held[-1]

    assert peak_memory(pass_through) == pytest.approx(100 * MB, rel=0.1)
    assert peak_memory(lambda: torch.ones(1)) < 5 * MB
    assert first_call(pass_through).kept < 10 * MB
    assert first_call(keep).kept == pytest.approx(100 * MB, rel=0.1)


def test_quantized_outputs_are_judged_by_their_direction() -> None:
    ref64 = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    eager = ref64.float()
    for angle, agrees in ((0.09, True), (0.11, False)):  # the cosine of 0.1 is 0.995
        turned = torch.tensor([[1.0, 0.0], [-2 * math.sin(angle), 2 * math.cos(angle)]])
        judged = accuracy(turned, eager, ref64, quantized=True)
        assert judged.cosine == pytest.approx(math.cos(angle)) and judged.agree is agrees
    assert not accuracy(eager * math.nan, eager, ref64, quantized=True).agree
