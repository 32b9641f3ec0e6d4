"""What is measured against each other: each contender prepared, loaded and called in the way that suits it best.

`prepare` converts a checkpoint once and writes files; `load` gives a function of a workload to what its task asks for,
tokens int64 or else float32, on that many threads; hidden states behind a sequence's end are arbitrary. Each runs in a
process of its own.
"""

from __future__ import annotations

import importlib.util
import math
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llama import load_llama, prepare_llama
from workloads import NEW, Model, Workload, word

Run = Callable[[Workload], np.ndarray]
Prepare = Callable[[Model, Path, list[Workload]], None]
Load = Callable[[Model, Path, int, str], Run]

COMPILING = 120  # seconds after which torch.compile begins with no other shape of a model

# ---- PyTorch ----


def load_torch(model: Model, folder: Path, threads: int, change: Callable[[Any], Any]) -> Run:
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    if model.weights_read:
        kind, options = transformers.AutoModelForCausalLM, {}
    else:
        kind, options = transformers.AutoModel, {"add_pooling_layer": False}
    changed = change(kind.from_pretrained(folder / model.name, attn_implementation="sdpa", **options).eval())
    caches: dict[str, Any] = {}  # by workload

    def last(ids: Any, cache: Any = None) -> Any:
        """Logits of the last token, and the cache."""
        return changed(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def run(workload: Workload) -> np.ndarray:
        ids, mask = torch.from_numpy(workload.ids), torch.from_numpy(workload.mask)
        with torch.inference_mode():
            if workload.task == "encode":
                return changed(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
            if workload.task == "generate":
                tokens = changed.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
                return tokens[:, ids.size(1) :].numpy()
            if workload.task == "prefill":
                return last(ids).logits[:, -1].numpy()
            if workload.name not in caches:
                caches[workload.name] = last(ids[:, :-1]).past_key_values
            cache = caches[workload.name]
            logits = last(ids[:, -1:], cache).logits[:, -1].numpy()
            cache.crop(-1)  # the token itself: the next call finds the same cache
            return logits

    return run


def load_eager(model: Model, folder: Path, threads: int, precision: str) -> Run:
    return load_torch(model, folder, threads, lambda loaded: loaded)


def load_compiled(model: Model, folder: Path, threads: int, precision: str) -> Run:
    """Weights as constants, packed by the compiler; one graph for each shape, until COMPILING has passed."""
    import torch
    import torch._inductor.config

    torch._inductor.config.freezing = True
    torch._dynamo.config.recompile_limit = 64
    compiled = load_torch(model, folder, threads, lambda loaded: torch.compile(loaded, dynamic=False))
    seconds: dict[str, float] = {}  # of each workload's first call

    def run(workload: Workload) -> np.ndarray:
        if workload.name in seconds:
            return compiled(workload)
        if sum(seconds.values()) > COMPILING:
            raise TimeoutError(f"compiling the shapes before took the {COMPILING} s that a model has for it")
        start = time.perf_counter()
        output = compiled(workload)
        seconds[workload.name] = time.perf_counter() - start
        return output

    return run


OPTIONS = {"float32": {}, "bfloat16": {"weights": "bfloat16"}, "int8": {"quantize": "int8"}}  # of accelerate


def load_fastformer(model: Model, folder: Path, threads: int, precision: str) -> Run:
    import fastformer

    return load_torch(model, folder, threads, lambda loaded: fastformer.accelerate(loaded, **OPTIONS[precision]))


def load_fastformer_gpt(model: Model, folder: Path, threads: int, precision: str) -> Run:
    """The reference GPT in place of transformers' model, and its generate."""
    import torch

    import fastformer
    from fastformer.models import GptLMHeadModel

    torch.set_num_threads(threads)
    loaded = fastformer.accelerate(GptLMHeadModel.from_pretrained(folder / model.name), **OPTIONS[precision])

    def run(workload: Workload) -> np.ndarray:
        return loaded.generate(torch.from_numpy(workload.ids), max_new_tokens=NEW)[:, workload.ids.shape[1] :].numpy()

    return run


# ---- ONNX Runtime ----


def prepare_onnx(model: Model, folder: Path, calibration: list[Workload]) -> None:
    """Exported, attention and all else fused by the transformers optimizer; in 8 bits with dynamic activations."""
    import onnx
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    work = folder / "onnx" / model.name
    work.mkdir(parents=True, exist_ok=True)
    encoder = plain_encoder(model, folder)
    sizes = {0: "batch", 1: "length"}
    names = ["input_ids", "attention_mask"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that the optimizer's patterns were written for is the older one
        torch.onnx.export(
            encoder, (torch.ones(2, 16, dtype=torch.int64), torch.ones(2, 16, dtype=torch.int64)),
            work / "exported.onnx", input_names=names, output_names=["hidden"],
            dynamic_axes=dict.fromkeys([*names, "hidden"], sizes), opset_version=17, dynamo=False,
        )  # fmt: skip
    fused = optimizer.optimize_model(
        str(work / "exported.onnx"), "bert", model.heads, model.hidden, FusionOptions("bert"), opt_level=0
    )
    if not fused.get_fused_operator_statistics()["Attention"]:
        raise RuntimeError("ONNX Runtime's optimizer fused no attention")
    fused.save_model_to_file(str(work / "float32.onnx"))
    options = {"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(
        work / "float32.onnx", work / "int8.onnx", per_channel=True, weight_type=QuantType.QInt8, extra_options=options
    )


def plain_encoder(model: Model, folder: Path) -> Any:
    """The encoder with its attention and its mask as the optimizer's patterns expect them."""
    import torch
    import transformers
    from torch import nn

    loaded = transformers.AutoModel.from_pretrained(folder / model.name, attn_implementation="eager").eval()
    size = model.hidden // model.heads

    def attention(self: Any, hidden: Any, attention_mask: Any, **_: Any) -> tuple[Any, None]:
        q, k, v = (
            linear(hidden).view(hidden.size(0), hidden.size(1), model.heads, size).permute(0, 2, 1, 3)
            for linear in (self.query, self.key, self.value)
        )
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(size) + attention_mask
        out = torch.matmul(scores.softmax(-1), v).permute(0, 2, 1, 3).contiguous()
        return out.view(out.size(0), out.size(1), model.hidden), None

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = loaded

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            mask = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * -10000.0
            hidden = self.model.embeddings(input_ids=input_ids, token_type_ids=torch.zeros_like(input_ids))
            for layer in self.model.encoder.layer:
                hidden = layer(hidden, mask)
            return hidden

    for layer in loaded.encoder.layer:
        layer.attention.self.forward = types.MethodType(attention, layer.attention.self)
    return Encoder().eval()


def load_onnx(model: Model, folder: Path, threads: int, precision: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    path = folder / "onnx" / model.name / f"{precision}.onnx"
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda workload: session.run(None, {"input_ids": workload.ids, "attention_mask": workload.mask})[0]


# ---- OpenVINO ----


def prepare_openvino(model: Model, folder: Path, calibration: list[Workload]) -> None:
    """Converted from PyTorch; weights and activations in 8 bits by NNCF, calibrated on the workloads themselves."""
    import nncf
    import openvino
    import torch
    import transformers
    from torch import nn

    loaded = transformers.AutoModel.from_pretrained(
        folder / model.name, attn_implementation="sdpa", add_pooling_layer=False
    )

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = loaded

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids = torch.randint(1000, 2000, (2, 16))
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0  # else the trace has no mask in it
    converted = openvino.convert_model(Encoder().eval(), example_input={"input_ids": ids, "attention_mask": mask})
    work = folder / "openvino" / model.name
    openvino.save_model(converted, work / "float32.xml", compress_to_fp16=False)
    batches = [
        {"input_ids": workload.ids[i : i + 1, :length], "attention_mask": np.ones((1, length), np.int64)}
        for workload in calibration
        for i, length in enumerate(workload.lengths)
    ]
    quantized = nncf.quantize(
        converted, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)
    )
    openvino.save_model(quantized, work / "int8.xml", compress_to_fp16=False)


def load_openvino(model: Model, folder: Path, threads: int, precision: str) -> Run:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the machine has AMX
    }
    compiled = openvino.Core().compile_model(folder / "openvino" / model.name / f"{precision}.xml", "CPU", settings)
    return lambda workload: compiled({"input_ids": workload.ids, "attention_mask": workload.mask})[0]


# ---- CTranslate2 ----


def prepare_ctranslate2(model: Model, folder: Path, calibration: list[Workload]) -> None:
    import ctranslate2

    converter = ctranslate2.converters.TransformersConverter(str(folder / model.name))
    converter.convert(str(folder / "ctranslate2" / model.name), force=True)


def load_ctranslate2(model: Model, folder: Path, threads: int, precision: str) -> Run:
    import ctranslate2

    kind = ctranslate2.Generator if model.weights_read else ctranslate2.Encoder
    loaded = kind(
        str(folder / "ctranslate2" / model.name), compute_type=precision, intra_threads=threads, inter_threads=1
    )

    def run(workload: Workload) -> np.ndarray:
        if workload.task == "encode":
            ids, lengths = workload.ids.astype(np.int32), workload.lengths.astype(np.int32)
            views = map(ctranslate2.StorageView.from_array, (ids, lengths))
            return np.array(loaded.forward_batch(*views).last_hidden_state)
        prompts = [[word(token) for token in tokens] for tokens in workload.ids.tolist()]
        whole = {"include_prompt_in_result": False}  # prompts are run at once
        if workload.task == "generate":
            results = loaded.generate_batch(prompts, min_length=NEW, max_length=NEW, **whole)
            return np.array([result.sequences_ids[0] for result in results])
        # forward_batch computes all tokens' logits; the first step of generation those of the last
        results = loaded.generate_batch(prompts, max_length=1, return_logits_vocab=True, **whole)
        return np.stack([np.array(result.logits[0][0]).reshape(-1) for result in results])

    return run


@dataclass(frozen=True)
class Contender:
    load: Load
    precisions: tuple[str, ...]
    imports: tuple[str, ...]  # whose time is not counted
    prepare: Prepare | None = None
    tasks: tuple[str, ...] = ("encode",)
    absent: str = ""  # why it does not take part in the other tasks

    @property
    def is_installed(self) -> bool:
        return all(importlib.util.find_spec(name.partition(".")[0]) for name in self.imports)

    def takes(self, workload: Workload) -> bool:
        return workload.task in self.tasks


ALL = ("encode", "generate", "prefill", "token")
THREE = ("float32", "bfloat16", "int8")
CONTENDERS = {
    "eager": Contender(load_eager, ("float32",), ("torch", "transformers"), tasks=ALL),
    "torch.compile": Contender(
        load_compiled, ("float32",), ("torch", "transformers", "torch._inductor.config"),
        absent="set up here with a graph for each shape, and a growing cache has another at each token",
    ),
    "ONNX Runtime": Contender(
        load_onnx, ("float32", "int8"), ("onnxruntime",), prepare_onnx,
        absent="generation is in a package of its own, onnxruntime-genai, which is not measured",
    ),
    "OpenVINO": Contender(
        load_openvino, ("float32", "int8"), ("openvino",), prepare_openvino,
        absent="generation is in a package of its own, openvino-genai, which is not measured",
    ),
    "CTranslate2": Contender(
        load_ctranslate2, THREE, ("ctranslate2",), prepare_ctranslate2, ("encode", "generate", "prefill"),
        absent="keeps its cache to itself, so no token of a generation can be run alone",
    ),
    "llama.cpp": Contender(
        load_llama, THREE, ("llama_cpp",), prepare_llama, ("generate", "prefill", "token"),
        absent="is measured on GPT-2 alone",
    ),
    "fastformer": Contender(load_fastformer, THREE, ("torch", "transformers", "fastformer"), tasks=ALL),
    "fastformer GPT": Contender(
        load_fastformer_gpt, THREE, ("torch", "fastformer.models"), tasks=("generate",),
        absent="shows its own generate alone",
    ),
}  # fmt: skip
