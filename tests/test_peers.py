"""What bench/peers says of measurements; none of the other engines is needed."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "bench" / "peers"


@pytest.fixture(scope="module")
def peers() -> Iterator[dict[str, ModuleType]]:
    """Its modules by name, which are gone after these tests: other folders have some of the same name."""
    names = ("workloads", "contenders", "worker", "run", "report")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        loaded = {name: importlib.import_module(name) for name in names}
        assert all(Path(module.__file__).parent == FOLDER for module in loaded.values())
        yield loaded
        for name in names:
            del sys.modules[name]


def workload(peers: dict[str, ModuleType], model: str, lengths: list[int], task: str = "encode") -> Any:
    kinds = peers["workloads"]
    ids = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    return kinds.Workload(getattr(kinds, model), "test", ids, np.array(lengths), task)


def checked(peers: dict[str, ModuleType], one: Any, output: np.ndarray, expected: np.ndarray, precision: str) -> Any:
    result = peers["run"].Result()
    peers["run"].check(result, one, output, expected, precision)
    return result


def test_spearman_is_the_correlation_of_ranks(peers: dict[str, ModuleType]) -> None:
    spearman = peers["run"].spearman
    x = np.array([0.1, 3.0, 0.2, 5.0])
    assert spearman(x, x**3) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, np.array([1.0, 2.0, 4.0, 3.0])) == pytest.approx(0.4)  # ranks 0 2 1 3 and 0 1 3 2


def test_a_generated_token_that_differs_is_wrong_in_float32_alone(peers: dict[str, ModuleType]) -> None:
    one = workload(peers, "GPT2", [3, 3], "generate")
    expected = np.array([[1, 2], [3, 4]])
    output = np.array([[1, 2], [3, 5]])
    assert checked(peers, one, output, expected, "float32").wrong
    result = checked(peers, one, output, expected, "int8")
    assert (result.tokens, result.wrong, result.error) == (0.75, False, None)
    assert not checked(peers, one, expected, expected, "float32").wrong


@pytest.mark.parametrize("wrong", [False, True])
def test_logits_are_wrong_above_the_tolerance(peers: dict[str, ModuleType], wrong: bool) -> None:
    one = workload(peers, "GPT2", [3], "prefill")
    expected = np.array([[2.0, -4.0, 1.0]], dtype=np.float32)
    output = expected + np.float32([[0, 0, (1.5 if wrong else 0.5) * 4 * peers["run"].TOLERANCE]])
    assert checked(peers, one, output, expected, "float32").wrong == wrong


def test_nan_is_wrong(peers: dict[str, ModuleType]) -> None:
    one = workload(peers, "GPT2", [3], "token")
    assert checked(peers, one, np.full((1, 2), np.nan), np.ones((1, 2)), "float32").wrong


def test_hidden_states_behind_a_sequences_end_do_not_count(peers: dict[str, ModuleType]) -> None:
    one = workload(peers, "MINILM", [2, 1, 2])
    expected = np.random.default_rng(0).normal(size=(3, 2, 4))
    output = expected.copy()
    output[1, 1] = 1e6
    result = checked(peers, one, output, expected, "float32")
    assert (result.error, result.wrong) == (0, False)
    assert [result.cosine, result.sentences, result.spearman] == pytest.approx([1, 1, 1])


def measured(peers: dict[str, ModuleType], median: float | None, **fields: Any) -> Any:
    samples = [] if median is None else [median] * 3
    return peers["run"].Result(load_s=1.0, first_s=2.0 if samples else None, samples_s=samples, **fields)


def test_tables(peers: dict[str, ModuleType]) -> None:
    results = {
        ("eager", "float32"): measured(peers, 0.04, error=0.0, cosine=1.0),
        ("CTranslate2", "float32"): measured(peers, None, problem="keeps its cache"),
        ("CTranslate2", "int8"): measured(peers, None, problem="keeps its cache"),
        ("fastformer", "float32"): measured(peers, 0.02, error=1e-5, cosine=1.0, wrong=True),
        ("fastformer", "int8"): measured(peers, 0.01, error=0.25, cosine=0.5),
    }
    one = workload(peers, "GPT2", [3], "token")
    bandwidth = 4 * one.model.weights_read / 0.02  # bytes a second
    environment = {
        "cpu": {"name": "A CPU", "cores": 2, "features": ["avx2", "avx512_vnni"]},
        "versions": dict.fromkeys([*peers["run"].LIBRARIES, "fastformer"], "1.0"),
    }
    content = {"environment": environment, "rows": [peers["run"].as_json(one, 1, results, bandwidth)]}
    text = peers["report"].markdown(content)
    assert text.startswith("A CPU, 2 cores (avx512_vnni); torch 1.0, ")
    assert "| GPT-2 small, test | 40 ms | - | wrong |" in text
    assert "| GPT-2 small, test | 40 ms | - | 4.00 |" in text
    assert "| workload | contender | error | cosine | bandwidth | cold | first |" in text
    assert "| GPT-2 small, test | eager | 0.0e+00 | 1.00000 | 50% | 3.00 s | 2.00 s |" in text
    assert "| GPT-2 small, test | fastformer | 2.5e-01 | 0.50000 | 50% | 3.00 s | 2.00 s |" in text
    assert text.endswith("\n- CTranslate2 float32, CTranslate2 int8: keeps its cache")
    assert "bfloat16" not in text


def test_every_contender_but_eager_has_a_color(peers: dict[str, ModuleType]) -> None:
    assert {"eager", *peers["report"].COLORS} == set(peers["contenders"].CONTENDERS)


def test_every_workload_has_eager_first(peers: dict[str, ModuleType]) -> None:
    contenders = peers["contenders"].CONTENDERS
    assert next(iter(contenders)) == "eager"
    assert {task for one in contenders.values() for task in one.tasks} == set(contenders["eager"].tasks)
