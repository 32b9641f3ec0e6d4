"""The tuned table: what is read, what is written, and that calls follow it."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastformer
from fastformer import backends, library, ops, tuning

CPU = torch.device("cpu")
X = torch.ones(200, 8)
pytestmark = pytest.mark.skipif(not library.available(), reason=f"no op library: {library.why_unavailable()}")


@pytest.fixture(autouse=True)
def table_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuning, "table", None)
    monkeypatch.setattr(tuning, "problem", None)
    monkeypatch.setenv("FASTFORMER_TUNED", str(tmp_path / "deep" / "tuned.json"))
    monkeypatch.delenv("FASTFORMER_BACKEND", raising=False)
    return tmp_path / "deep" / "tuned.json"


def record(op: str, backend: str, *tensors: torch.Tensor, options: tuple = ()) -> None:
    tuning.record(CPU, {tuning.key_text(*tuning.call_class(op, tensors, options)): backend}, {})


def chosen(op: str, *tensors: torch.Tensor, **options) -> str:
    return backends.choose(op, *tensors, **options)


class TestPath:
    def test_order(self, monkeypatch):
        monkeypatch.setenv("FASTFORMER_TUNED", "~/here.json")
        assert tuning.path() == Path.home() / "here.json"
        monkeypatch.setenv("FASTFORMER_TUNED", "")
        monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
        assert tuning.path() == Path("/cache/fastformer/tuned.json")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert tuning.path() == Path.home() / ".cache/fastformer/tuned.json"


class TestChoice:
    def test_followed(self, recorder):
        record("layer_norm", "torch", X, None, None)
        with recorder:
            ops.layer_norm(X, 8)
            ops.layer_norm(X.bfloat16(), 8)  # another class
        assert recorder.names().count("fastformer_cpu::layer_norm") == 1

    def test_over_the_default(self):
        """Also where the default is plain PyTorch."""
        assert chosen("linear", X, X, torch_is_faster=True, options=(None, False)) == "torch"
        record("linear", "cpu", X, X, options=(None, False))
        assert chosen("linear", X, X, torch_is_faster=True, options=(None, False)) == "cpu"
        assert chosen("linear", X, X, torch_is_faster=True, options=("gelu", False)) == "torch"

    def test_after_what_was_asked_for(self, monkeypatch):
        record("layer_norm", "torch", X, None)
        assert chosen("layer_norm", X, None) == "torch"
        with fastformer.backend("cpu"):
            assert chosen("layer_norm", X, None) == "cpu"
        monkeypatch.setenv("FASTFORMER_BACKEND", "cpu")
        assert chosen("layer_norm", X, None) == "cpu"

    @pytest.mark.parametrize("winner", ["triton", "cuda", "no such backend", None, 3])
    def test_a_winner_that_cannot_take_the_call(self, winner):
        record("layer_norm", winner, X, None)
        assert chosen("layer_norm", X, None) == "cpu"

    def test_classes(self):
        """Rows by powers of two, widths as they are, training and inference apart, threads."""

        def of(*shape: int, requires_grad: bool = False) -> tuple:
            return tuning.call_class("layer_norm", (torch.ones(shape, requires_grad=requires_grad), None))

        assert of(128, 8) == of(2, 70, 8) == of(255, 8) != of(256, 8)
        assert of(128, 8) != of(128, 9)
        assert of(128, 8) != of(128, 8, requires_grad=True)
        with torch.no_grad():
            assert of(128, 8) == of(128, 8, requires_grad=True)
        one = of(128, 8)
        torch.set_num_threads(2)
        assert of(128, 8) != one
        assert of(0, 8) and of(3, 0)  # empty ones have a class, too

    def test_attention_and_products(self):
        def attention(queries: int, keys: int) -> tuple:
            return tuning.call_class(
                "scaled_dot_product_attention", (torch.ones(1, 2, queries, 8), torch.ones(1, 2, keys, 8), None)
            )

        assert attention(4, 64) == attention(4, 127) != attention(4, 128)
        product = [tuning.call_class("linear", (X, torch.ones(n, 8), None, None)) for n in (5, 6)]
        assert product[0] != product[1]

    def test_compiled_calls_take_the_default(self):
        record("layer_norm", "torch", X, None, None)
        torch._dynamo.reset()
        graphs = []
        torch.compile(lambda x: ops.layer_norm(x, 8), backend=lambda g, _: graphs.append(g) or g, fullgraph=True)(X)
        assert "fastformer_cpu.layer_norm" in graphs[0].code


class TestFile:
    def test_content(self, table_path):
        tuning.record(CPU, {"a": "cpu"}, {"k dtype=float32": {"tiles": {"B": 1}}})
        tuning.record(CPU, {"b": "torch"}, {})
        content = json.loads(table_path.read_text())
        assert content["versions"] == tuning.versions() and content["versions"]["fastformer"] == fastformer.__version__
        name = tuning.device_name(CPU)
        assert library.isa() in name
        assert content["devices"] == {
            name: {"backends": {"a": "cpu", "b": "torch"}, "configs": {"k dtype=float32": {"tiles": {"B": 1}}}}
        }
        assert tuning.table.devices == content["devices"] and os.listdir(table_path.parent) == ["tuned.json"]

    def test_none(self, recwarn):
        tuning.reload()
        assert (tuning.table, tuning.problem, len(recwarn)) == (None, None, 0)

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "{}", '{"versions": {}, "devices": []}', '{"versions": {}, "devices": {"a": {}}}', "\x00"],
    )
    def test_that_does_not_parse(self, table_path, text):
        table_path.parent.mkdir()
        table_path.write_text(text)
        with pytest.warns(UserWarning, match="tuned.json is not used: it can't be read: .*Run `fastformer tune`"):
            tuning.reload()
        assert tuning.table is None
        assert chosen("layer_norm", X, None) == "cpu"

    def test_of_another_version(self, table_path):
        record("layer_norm", "torch", X, None)
        content = json.loads(table_path.read_text())
        content["versions"]["torch"] = "1.0"
        table_path.write_text(json.dumps(content))
        with pytest.warns(UserWarning, match="it was measured with torch 1.0"):
            tuning.reload()
        assert tuning.table is None and tuning.problem == "it was measured with torch 1.0"
        record("layer_norm", "torch", X, None)  # measured anew
        assert tuning.problem is None and chosen("layer_norm", X, None) == "torch"

    def test_that_cannot_be_written(self, monkeypatch):
        monkeypatch.setenv("FASTFORMER_TUNED", "/proc/tuned.json")
        with pytest.raises(OSError):
            record("layer_norm", "torch", X, None)


class TestTarget:
    @pytest.mark.parametrize("backend, arch, name", [("cuda", 90, "sm_90"), ("hip", "gfx1100", "gfx1100")])
    def test_each_device_is_asked_once(self, backend, arch, name, monkeypatch):
        configs = pytest.importorskip("fastformer.kernels.configs")
        asked = []

        class Driver:
            def get_current_target(self):
                asked.append(torch.cuda.current_device())
                return SimpleNamespace(backend=backend, arch=arch)

        monkeypatch.setattr(configs, "TRITON_DEVICE", "cuda")
        monkeypatch.setattr(configs.driver, "_active", Driver())
        for device in (0, 1, 0, 1):
            monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
            assert configs.target() == name
        assert asked == [0, 1]


class TestPick:
    """kernels.configs: nothing here launches a kernel."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        """As if the kernels were compiled for an H100, device 1."""
        self.configs = pytest.importorskip("fastformer.kernels.configs")
        monkeypatch.setattr(self.configs, "TRITON_DEVICE", "cuda")
        monkeypatch.setattr(self.configs, "target", lambda: "sm_90")
        monkeypatch.setattr(self.configs, "_picked", {})
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(tuning, "_gpu_name", lambda index: f"GPU {index}")
        self.candidates = [self.configs.Config({"BLOCK": size}, num_warps=8) for size in (16, 32, 64)]

    def test_the_first_without_a_table(self):
        assert self.configs.pick("k", self.candidates, dtype=torch.float16) is self.candidates[0]

    def test_the_winner(self):
        key = tuning.config_key("k", {"dtype": torch.float16, "head_dim": 64})
        assert key == "k dtype=float16 head_dim=64"
        tuning.record(torch.device("cuda", 1), {}, {key: dataclasses.asdict(self.candidates[2])})
        pick = self.configs.pick
        assert pick("k", self.candidates, dtype=torch.float16, head_dim=64) is self.candidates[2]
        assert pick("k", self.candidates, dtype=torch.float16, head_dim=128) is self.candidates[0]
        assert pick("other", self.candidates, dtype=torch.float16, head_dim=64) is self.candidates[0]

    def test_of_another_gpu(self):
        tuning.record(torch.device("cuda", 0), {}, {"k": dataclasses.asdict(self.candidates[2])})
        assert self.configs.pick("k", self.candidates) is self.candidates[0]

    def test_a_winner_that_is_no_candidate_any_more(self):
        gone = self.configs.Config({"BLOCK": 256})
        tuning.record(torch.device("cuda", 1), {}, {"k": dataclasses.asdict(gone)})
        assert self.configs.pick("k", self.candidates) is self.candidates[0]

    def test_looked_up_once(self, monkeypatch):
        tuning.record(torch.device("cuda", 1), {}, {"k": dataclasses.asdict(self.candidates[1])})
        assert self.configs.pick("k", self.candidates) is self.candidates[1]
        monkeypatch.setattr(tuning.Table, "config", None)
        assert self.configs.pick("k", self.candidates) is self.candidates[1]

    def test_shared_memory(self):
        limits = [
            self.configs.shared_memory(t) // 1024 for t in ("sm_80", "sm_89", "sm_90", "sm_120", "gfx942", "sm_999")
        ]
        assert limits == [163, 99, 227, 99, 64, 99]

    def test_trial(self):
        with self.configs.trial() as trial:
            assert self.configs.pick("k", self.candidates, size=1) is self.candidates[0]
            assert trial.candidates == {"k size=1": self.candidates}
            trial.chosen["k size=1"] = self.candidates[2]
            assert self.configs.pick("k", self.candidates, size=1) is self.candidates[2]
        assert self.configs.pick("k", self.candidates, size=1) is self.candidates[0]
