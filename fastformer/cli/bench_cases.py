"""What `fastformer bench` measures: the op calls of a model's layers, and whole layers, each against eager PyTorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastformer import nn as fused_nn
from fastformer.cli import calls, tune
from fastformer.cli.calls import Call
from fastformer.cli.tune import Sizes

Function = Callable[..., Any]
CPU = torch.device("cpu")
BATCHES = ((1, 128), (8, 128))  # (batch, length)
LAYERS = ("EncoderLayer", "DecoderLayer")
ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu}


@dataclass(frozen=True)
class Case:
    op: str
    what: str
    dtype: str  # float32, bfloat16 or int8: float32 with the products in 8 bits
    backward: bool  # forward and backward, or the forward alone
    tensors: dict[str, Tensor]
    contenders: dict[str, Function]  # of the tensors, by name: eager first
    reference: Function  # eager in any dtype
    operations: float  # multiplications and additions of the products; of all that is run
    bytes: float  # that must be read or written, likewise
    modules: dict[str, nn.Module] = field(default_factory=dict)  # by contender, and "reference" in float64

    @property
    def name(self) -> str:
        return f"{self.op} {self.what}"


def cases(models: list[Sizes], ops: list[str], dtypes: list[str]) -> Iterator[Case]:
    """One after the other, so that the tensors of one are gone when the next is made; models share many of them."""
    seen = set()
    for sizes in models:
        for batch, length in BATCHES:
            length = min(length, sizes.positions)
            for call, modes in model_calls(sizes, batch, length):
                if call.op not in ops or (call.op, call.what) in seen:
                    continue
                seen.add((call.op, call.what))
                for dtype in dtypes:
                    yield from of_call(call, dtype, modes)
            for layer in LAYERS:
                what = f"{batch}x{length}x{sizes.hidden}, {'pre' if sizes.is_causal else 'post'}-norm"
                if layer in ops and (layer, what) not in seen:
                    seen.add((layer, what))
                    for dtype in dtypes:
                        yield from of_layer(layer, what, sizes, batch, length, dtype)


def model_calls(sizes: Sizes, batch: int, length: int) -> Iterator[tuple[Call, tuple[str, ...]]]:
    """What `tune` measures, but for dropout, which eager PyTorch draws otherwise; the embeddings, the loss over the
    vocabulary, and the tags of a sequence."""
    for call, modes in tune.calls_of(sizes, batch, length):
        if "dropout_p" not in call.options:
            yield call, modes
    rows, E = batch * length, sizes.hidden
    if not sizes.is_causal:
        what = f"{batch}x{length}x{E} of {sizes.vocabulary} words"
        tables = calls.embedding_tables(sizes.vocabulary, sizes.positions, E)
        yield Call("embeddings", what, tables, calls.embedding_ids(batch, length, sizes.vocabulary)), tune.BOTH
        yield from crf_calls(batch, length)
    if batch > 1:
        shapes = {"input": (rows, E), "linear_weight": (sizes.vocabulary, E)}
        target = {"target": partial(calls.targets, rows, sizes.vocabulary)}
        yield Call("linear_cross_entropy", f"{rows}x{E} to {sizes.vocabulary}", shapes, target), tune.TRAINING


TAGS = 9  # of names, places and the like: begin and inside, and outside


def crf_calls(batch: int, length: int) -> Iterator[tuple[Call, tuple[str, ...]]]:
    """Against a loop over the positions, as eager PyTorch has to do it."""
    shapes = {"emissions": (batch, length, TAGS), "transitions": (TAGS, TAGS), "start": (TAGS,), "end": (TAGS,)}
    mask = {"mask": lambda device: calls.padding_mask(batch, length, device)[:, 0, 0]}
    tags = {"tags": lambda device: calls.targets(batch * length, TAGS, device).view(batch, length).clamp(min=0)}
    what = f"{batch}x{length}, {TAGS} tags"
    yield Call("crf_log_likelihood", what, shapes, mask | tags), tune.TRAINING
    yield Call("crf_decode", what, shapes, mask), tune.INFERENCE


def of_call(call: Call, dtype: str, modes: tuple[str, ...]) -> Iterator[Case]:
    eager, fused = call.bind(call.eager, CPU), call.bind(call.fused, CPU)
    storage = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    for mode in modes:
        tensors = call.tensors(CPU, storage)
        contenders = {"eager": eager, "fastformer": fused}
        if dtype == "int8":
            if mode == "training" or call.op not in ("linear", "feed_forward"):
                continue
            contenders["fastformer"] = quantized(call, tensors)
        elif mode == "inference":
            ready = tune.packed(call, tensors)
            contenders |= {f"fastformer {name}": ignoring_arguments(run) for name, run in ready.items()}
        times = 3 if mode == "training" else 1
        yield Case(
            call.op, call.what, dtype, mode == "training", tensors, contenders, eager,
            times * operations(call), moved_bytes(call, dtype, times),
        )  # fmt: skip


def quantized(call: Call, tensors: dict[str, Tensor]) -> Function:
    """The product as accelerated models run it with quantize="int8", its weights quantized before."""
    raw = torch.ops.fastformer_cpu
    activation = call.options.get("activation")
    if call.op == "linear":
        packed = raw.quantize_weight(tensors["weight"])
        return lambda input, weight, bias: raw.packed_linear(input, packed, len(weight), bias, activation, None)
    packed1, packed2 = (raw.quantize_weight(tensors[name]) for name in ("weight1", "weight2"))
    return lambda input, weight1, bias1, weight2, bias2: raw.packed_feed_forward(
        input, packed1, len(weight1), bias1, packed2, len(weight2), bias2, activation, None
    )


def ignoring_arguments(run: Callable[[], Any]) -> Function:
    return lambda **_: run()


def operations(call: Call) -> float:
    """Of the forward's matrix products: two for each pair of numbers that is multiplied; masked keys are left out."""
    shapes, options = call.shapes, call.options
    if call.op == "linear":
        return 2 * math.prod(shapes["input"]) * shapes["weight"][0]
    if call.op == "feed_forward":
        return 4 * math.prod(shapes["input"]) * shapes["weight1"][0]
    if call.op == "linear_cross_entropy":
        return 2 * math.prod(shapes["input"]) * shapes["linear_weight"][0]
    causal = 0.5 if options.get("is_causal") or options.get("window_size") == (-1, 0) else 1.0
    if call.op == "scaled_dot_product_attention":
        kept = options["attn_mask"](CPU).float().mean().item() if "attn_mask" in options else 1.0
        return 4 * causal * kept * math.prod(shapes["query"]) * shapes["key"][2]
    if call.op == "varlen_attn":
        lengths = options["cu_seq_q"](CPU).diff().double()
        return 4 * causal * math.prod(shapes["query"][1:]) * lengths.square().sum().item()
    return 0.0  # norms, embeddings, tags


def moved_bytes(call: Call, dtype: str, times: int = 1) -> float:
    """The forward's tensors and outputs, as many times; weights in 8 bits take one byte each."""
    shapes = call.shapes
    weights = sum(math.prod(shape) for name, shape in shapes.items() if "weight" in name and len(shape) == 2)
    rows = sum(map(math.prod, shapes.values())) - weights
    if call.op == "linear":
        rows += math.prod(shapes["input"][:-1]) * shapes["weight"][0]
    elif call.op == "add_layer_norm":
        rows += 2 * math.prod(shapes["input"])
    elif call.op == "embeddings":  # a row of words for each of the output; and the gradient of the whole table, once
        words, width = shapes["word_embeddings"]
        rows = 2 * call.options["input_ids"](CPU).numel() * width + (words * width / times if times > 1 else 0)
    elif call.op in ("scaled_dot_product_attention", "varlen_attn", "layer_norm"):
        rows += math.prod(shapes["query" if "query" in shapes else "input"])
    item = 2 if dtype == "bfloat16" else 4
    return times * (rows * item + weights * (1 if dtype == "int8" else item))


def of_layer(layer: str, what: str, sizes: Sizes, batch: int, length: int, dtype: str) -> Iterator[Case]:
    """torch.nn's layer, and fastformer.nn's with the same weights."""
    if dtype == "int8":
        return
    storage, norm_first = getattr(torch, dtype), sizes.is_causal
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first, "dtype": storage}
    torch.manual_seed(0)
    size = sizes.hidden, sizes.heads, sizes.intermediate
    stock = getattr(nn, f"Transformer{layer}")(*size, activation=ACTIVATIONS[sizes.activation], **options).eval()
    fused = getattr(fused_nn, layer)(*size, activation=sizes.activation, **options).eval()
    fused.load_state_dict(stock.state_dict())
    modules = {"eager": stock, "fastformer": fused, "reference": copy.deepcopy(stock).double()}
    masks = {"tgt_is_causal": True} if layer == "DecoderLayer" else {"is_causal": sizes.is_causal}
    is_causal = any(masks.values())
    mask = {"tgt_mask" if layer == "DecoderLayer" else "src_mask": torch.ones(length, length).triu(1).bool()}
    with_mask = masks | (mask if is_causal else {})  # torch.nn wants it beside is_causal
    functions = {
        name: partial(run, module, masks if name == "fastformer" else with_mask) for name, module in modules.items()
    }
    x = (batch, length, sizes.hidden)
    names = ("input", "memory") if layer == "DecoderLayer" else ("input",)
    tensors = Call(layer, what, dict.fromkeys(names, x)).tensors(CPU, storage)
    weights = sum(p.numel() for p in stock.parameters())
    products = sum(p.numel() for p in stock.parameters() if p.dim() == 2)
    attentions = (0.5 if is_causal else 1.0) + (layer == "DecoderLayer")
    scores = attentions * batch * length**2 * sizes.hidden
    for times in (1, 3):
        yield Case(
            layer, what, dtype, times == 3, tensors,
            {name: functions[name] for name in ("eager", "fastformer")}, functions["reference"],
            times * (2 * products * batch * length + 4 * scores),
            times * (weights + (len(names) + 1) * math.prod(x)) * storage.itemsize, modules,
        )  # fmt: skip


def run(layer: nn.Module, masks: dict[str, Any], **tensors: Tensor) -> Tensor:
    return layer(*tensors.values(), **masks)
