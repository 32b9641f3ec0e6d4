import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import fastformer
from fastformer import library, ops
from fastformer.cli import bench, bench_cases, bench_ceilings, calls, tune
from fastformer.cli.bench import Result, Row
from fastformer.cli.bench_ceilings import Ceilings
from fastformer.cli.calls import Call
from fastformer.cli.measure import Timing

pytestmark = pytest.mark.skipif(not library.available(), reason="no op library")
CEILINGS = Ceilings(threads=1, float32=1e9, bfloat16=2e9, int8=4e9, memory=1e8, l2=5e8, l2_bytes=1000)


@pytest.fixture
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ceilings, "measure", lambda threads, seconds: CEILINGS)


@pytest.fixture
def run(fastformer_cli: Callable, known_ceilings: None, tmp_path: Path) -> Callable[..., tuple[int, str, dict]]:
    """Runs it with short measurements: exit status, what it printed, and the JSON file's content."""

    def run(*args: str | Path) -> tuple[int, str, dict]:
        path = tmp_path / "bench.json"
        result = fastformer_cli("bench", *args, "--seconds", "0", "--threads", "1", "--json", path)
        assert path.exists(), result.output
        return result.exit_code, result.stdout, json.loads(path.read_text())

    return run


def test_a_model(run: Callable, bert_folder: Path) -> None:
    status, output, content = run("--model", bert_folder, "--no-compile")
    assert status == 0 and content["agree"], output
    assert "outputs agree" in output and "torch.compile was left out: --no-compile" in output
    rows = {(row["case"], row["dtype"], row["backward"]): row["contenders"] for row in content["rows"]}
    assert len(rows) == len(content["rows"])
    assert {row["op"] for row in content["rows"]} == {
        "layer_norm", "add_layer_norm", "linear", "feed_forward", "scaled_dot_product_attention", "varlen_attn",
        "linear_cross_entropy", "embeddings", "crf_log_likelihood", "crf_decode", "EncoderLayer", "DecoderLayer",
    }  # fmt: skip
    for (_, dtype, _), contenders in rows.items():
        assert list(contenders)[:2] == ["eager", "fastformer"]
        for name, one in contenders.items():
            assert one["problem"] is None and len(one["samples_s"]) >= 5
            assert (one["cosine"] or 0) >= 0.995 if dtype == "int8" and name != "eager" else one["error"] is not None
    assert "fastformer packed" in rows["linear 1x16x32 to 96", "float32", False]
    assert "fastformer packed" not in rows["linear 1x16x32 to 96", "float32", True]
    assert {case.split()[0] for case, dtype, _ in rows if dtype == "int8"} == {"linear", "feed_forward"}
    assert not [backward for _, dtype, backward in rows if dtype == "int8" and backward]


def test_what_is_asked_for(run: Callable, gpt2_folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "roofline.png"
    _, output, content = run(
        "EncoderLayer", "linear", "--model", gpt2_folder, "--dtype", "float32", "--no-compile", "--png", picture
    )
    assert content["agree"], output
    assert {row["op"] for row in content["rows"]} == {"EncoderLayer", "linear"}
    assert {row["dtype"] for row in content["rows"]} == {"float32"}
    assert "EncoderLayer 8x16x32, pre-norm" in {row["case"] for row in content["rows"]}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_compiled(run: Callable, bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(bench, "why_no_compiler", lambda: None)
    _, output, content = run("layer_norm", "EncoderLayer", "--model", bert_folder, "--dtype", "float32")
    assert len(content["rows"]) == 8  # two batches, forward alone and with backward
    for row in content["rows"]:
        one = row["contenders"]["torch.compile"]
        assert one["problem"] is None and one["first_call_s"] > 0 and one["ratio"] > 0
    assert content["torch.compile"] is None and "torch.compile was" not in output


def test_no_compiler(run: Callable, bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def get_cpp_compiler() -> str:
        raise RuntimeError("No working C++ compiler found\nin a long list")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", get_cpp_compiler)
    status, output, content = run("layer_norm", "--model", bert_folder, "--dtype", "float32")
    assert status == 0
    assert "torch.compile was left out: it has no C++ compiler: No working C++ compiler found\n" in output
    assert "torch.compile" not in content["rows"][0]["contenders"]


def test_wrong_outputs(run: Callable, bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.layer_norm
    monkeypatch.setattr(ops, "layer_norm", lambda *args, **options: right(*args, **options) * 1.001)
    status, output, content = run("layer_norm", "--model", bert_folder, "--dtype", "float32", "--no-compile")
    assert status == 1 and not content["agree"] and "outputs do not agree" in output
    for row in content["rows"]:
        assert row["contenders"]["fastformer"]["problem"] == "wrong"
        assert row["contenders"]["fastformer"]["median_s"] is None  # what is wrong is not timed
        assert row["contenders"]["eager"]["median_s"] > 0


def test_a_wrong_gradient(run: Callable, bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = calls.EAGER["layer_norm"]

    def half_gradient(input: torch.Tensor, **options) -> torch.Tensor:
        return right(input / 2 + (input / 2).detach(), **options)

    monkeypatch.setitem(calls.EAGER, "layer_norm", half_gradient)
    _, _, content = run("layer_norm", "--model", bert_folder, "--dtype", "float32", "--no-compile")
    problems = {row["backward"]: row["contenders"]["fastformer"]["problem"] for row in content["rows"]}
    assert problems == {False: None, True: "wrong"}


def test_percentages() -> None:
    results = {"eager": Result(Timing([2e-6] * 5)), "fastformer": Result(Timing([1e-6] * 5)), "other": Result(None)}
    row = Row("linear 2x3", "linear", "float32", False, operations=500, bytes=200, results=results)
    found = bench.speeds(row, "fastformer", CEILINGS)
    assert found["ratio"] == pytest.approx(2) and found["median_s"] == 1e-6 and found["spread"] == 0
    assert found["flops"] == pytest.approx(5e8) and found["of_peak"] == pytest.approx(0.5)
    assert found["bytes_per_s"] == pytest.approx(2e8) and found["of_bandwidth"] == pytest.approx(0.4)  # of L2
    large = Row("linear 2x3", "linear", "int8", False, operations=500, bytes=2000, results=results)
    found = bench.speeds(large, "eager", CEILINGS)
    assert found["of_bandwidth"] == pytest.approx(10)  # of memory: 1e9 bytes a second
    assert found["of_peak"] == pytest.approx(0.25)  # eager multiplies floats
    assert bench.speeds(large, "fastformer", CEILINGS)["of_peak"] == pytest.approx(0.125)
    assert bench.speeds(row, "other", CEILINGS)["ratio"] is None


def test_operations_and_bytes() -> None:
    linear = Call("linear", "", {"input": (2, 3, 8), "weight": (5, 8), "bias": (5,)})
    assert bench_cases.operations(linear) == 2 * 6 * 8 * 5
    assert bench_cases.moved_bytes(linear, "float32") == 4 * (6 * 8 + 5 * 8 + 5 + 6 * 5)
    tables, ids = calls.embedding_tables(50, 9, 8), calls.embedding_ids(2, 3, 50)
    embeddings = Call("embeddings", "", tables, ids)
    assert bench_cases.moved_bytes(embeddings, "float32") == 4 * 2 * 6 * 8
    assert bench_cases.moved_bytes(embeddings, "bfloat16", 3) == 2 * (3 * 2 * 6 * 8 + 50 * 8)
    assert bench_cases.moved_bytes(linear, "int8") == 4 * (6 * 8 + 5 + 6 * 5) + 5 * 8
    shapes = {name: (2, 3, 8, 4) for name in ("query", "key", "value")}
    attention = partial(Call, "scaled_dot_product_attention", "", shapes)
    assert bench_cases.operations(attention()) == 4 * 2 * 3 * 8 * 8 * 4
    assert bench_cases.operations(attention({"is_causal": True})) == 2 * 2 * 3 * 8 * 8 * 4
    padding = attention({"attn_mask": partial(calls.padding_mask, 2, 8)})  # 8 and 4 of 8 keys
    assert bench_cases.operations(padding) == 3 * 2 * 3 * 8 * 8 * 4
    assert bench_cases.moved_bytes(attention(), "bfloat16") == 2 * 4 * 2 * 3 * 8 * 4
    packed = {name: (12, 3, 4) for name in ("query", "key", "value")}
    varlen = Call("varlen_attn", "", packed, {"cu_seq_q": partial(calls.bounds, (8, 4))})
    assert bench_cases.operations(varlen) == 4 * 3 * 4 * (64 + 16)


def test_operations_of_a_layer() -> None:
    sizes = tune.Sizes("tiny", 8, 2, 16, 50, "gelu", False, 0.0, 16)
    forward, both = bench_cases.of_layer("EncoderLayer", "", sizes, 2, 4, "float32")
    products = 2 * (4 * 8 * 8 + 2 * 8 * 16) * 2 * 4
    assert forward.operations == products + 4 * 2 * 4 * 4 * 8
    assert both.operations == 3 * forward.operations and both.backward


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ceilings, "MEMORY", 2**22)
    monkeypatch.setattr(bench_ceilings, "PRODUCT", 16)
    monkeypatch.setattr(bench_ceilings, "ROUNDS", {False: 100, True: 100})
    threads = torch.get_num_threads()
    found = bench_ceilings.measure(2, 0)
    assert torch.get_num_threads() == threads and found.threads == 2
    assert found.l2_bytes == 2 * bench_ceilings.l2_bytes() > 0
    assert min(found.float32, found.memory, found.l2) > 0 and found.bfloat16 >= found.float32
    assert (found.int8 is not None) == library.multiplies_int8()
    assert [found.operations(name) for name in bench.DTYPES] == [found.float32, found.bfloat16, found.int8]
    assert found.bandwidth(found.l2_bytes) == found.l2 and found.bandwidth(found.l2_bytes + 1) == found.memory


def test_loops_count_what_they_do(isa: str, threads: int) -> None:
    raw = torch.ops.fastformer_cpu
    lanes = {"baseline": 4, "avx2": 8, "avx512": 16}[isa]
    assert raw.multiply_adds(10, False) == 10 * 12 * lanes * 2 * threads
    assert raw.read_memory(torch.ones(3 * 4096, dtype=torch.int8), 5) == (3 // threads) * threads * 4096 * 5


def test_loops_of_8_bits(int8_isa: str) -> None:
    if not library.multiplies_int8():
        with pytest.raises(RuntimeError, match="has no instruction for products of 8 bits"):
            torch.ops.fastformer_cpu.multiply_adds(1, True)
        return
    per_round = {"avx512_vnni": 12 * 64 * 2, "avx512_amx": 4 * 16 * 16 * 64 * 2}[int8_isa]
    assert torch.ops.fastformer_cpu.multiply_adds(10, True) == 10 * per_round


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["layernorm"], "OP: got 'layernorm', expected one of"),
        (["--dtype", "float64"], "--dtype: got 'float64', expected one of float32, bfloat16, int8"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--json", "no/such/folder.json"], "--json no/such/folder.json: cannot write there"),
        (["--png", "no/such/folder.png"], "--png no/such/folder.png: cannot write there"),
        (["--threads", "0"], "threads"),
    ],
)
def test_errors(fastformer_cli: Callable, args: list[str], message: str) -> None:
    result = fastformer_cli("bench", *args)
    assert result.exit_code == 2 and result.stderr.startswith("fastformer: ")
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_no_matplotlib(fastformer_cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = fastformer_cli("bench", "--png", tmp_path / "a.png")
    assert result.exit_code == 2 and "--png needs matplotlib: pip install 'fastformer[bench]'" in result.stderr


def test_the_backend_that_is_asked_for(run: Callable, bert_folder: Path, recorder) -> None:
    with fastformer.backend("torch"), recorder:
        run("layer_norm", "--model", bert_folder, "--dtype", "float32", "--no-compile")
    assert "fastformer_cpu::layer_norm" not in recorder.names()
