"""What bench/gpu.py measures: each op and model on the fused kernels, in eager PyTorch, and what else PyTorch has."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastformer
from fastformer.cli import calls
from fastformer.cli.calls import Call

Function = Callable[..., Any]
FLOATS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    group: str
    name: str
    dtype: torch.dtype
    backward: bool
    tensors: dict[str, Tensor]
    contenders: dict[str, Function]  # of the tensors, by name; "eager" is among them
    reference: Function  # eager, in any dtype, for the error rule
    operations: float  # at least, of the forward; a backward takes twice as many
    bytes: float  # that must be read or written, likewise
    own_masks: tuple[str, ...] = ()  # contenders with another dropout mask, which can't be checked
    part: Callable[[Tensor], Tensor] = lambda x: x  # of tensors and results, what is checked: float64 takes memory
    modules: dict[str, nn.Module] = field(default_factory=dict)  # by contender; a backward reaches their parameters


@dataclass(frozen=True)
class Scale:
    """How large the cases are."""

    tokens: int = 16384  # of an attention call: batch times length
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    head_dims: tuple[int, ...] = (64, 128)
    width: int = 2048  # heads times head size in attention
    rows: tuple[int, ...] = (1024, 16384)
    hidden: tuple[int, ...] = (768, 1024, 4096)
    vocabulary: int = 50257
    dtypes: tuple[torch.dtype, ...] = FLOATS
    bert: dict[str, int] = field(default_factory=dict)  # the defaults are BERT-base
    gpt2: dict[str, int] = field(default_factory=dict)  # and GPT-2 small
    batches: tuple[tuple[int, int], ...] = ((1, 128), (8, 128), (32, 128), (8, 512))
    compiler: str = "inductor"


QUICK = Scale(lengths=(128, 512, 2048), rows=(16384,), hidden=(768,), dtypes=(torch.bfloat16,), batches=((8, 128),))
TINY = Scale(
    tokens=48, lengths=(8, 24), head_dims=(8,), width=16, rows=(6,), hidden=(16,), vocabulary=40,
    dtypes=(torch.float32,), batches=((2, 8),), compiler="eager",
    bert={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
          "vocab_size": 30, "max_position_embeddings": 16},
    gpt2={"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 30, "n_positions": 16},
)  # fmt: skip


def cases(device: torch.device, scale: Scale, backends: list[str]) -> Iterator[Case]:
    """One after the other, so that the tensors of one are gone when the next is made."""
    for dtype in scale.dtypes:
        yield from attention(device, dtype, scale, backends)
        yield from variable_lengths(device, dtype, scale, backends)
        yield from rows(device, dtype, scale, backends)
    yield from models(device, scale)


def fused(call: Call, device: torch.device, backends: list[str]) -> dict[str, Function]:
    """On each of the backends that have a kernel for the op."""
    return {
        f"fastformer {name}": fastformer.backend(name, strict=True)(call.bind(call.fused, device))
        for name in backends
        if name in fastformer.backends.declared(call.op)
    }


def compiled(function: Function, scale: Scale) -> Function:
    return torch.compile(function, backend=scale.compiler, dynamic=False)


def attention(device: torch.device, dtype: torch.dtype, scale: Scale, backends: list[str]) -> Iterator[Case]:
    for head_dim in scale.head_dims:
        heads = scale.width // head_dim
        for length in scale.lengths:
            batch = max(scale.tokens // length, 1)
            shapes = {name: (batch, heads, length, head_dim) for name in ("query", "key", "value")}
            size = f"{batch}x{heads}x{length}x{head_dim}"
            padding = {"attn_mask": partial(calls.padding_mask, batch, length)}
            for what, options in (
                ("", {}),
                (", causal", {"is_causal": True}),
                (", padding mask", padding),
                (", dropout", {"dropout_p": 0.1}),
            ):
                call = Call("scaled_dot_product_attention", size + what, shapes, options)
                kept = 0.75 if options is padding else 0.5 if "is_causal" in options else 1.0
                for backward in (False, True):
                    if "dropout_p" in options and not backward:
                        continue
                    eager = call.bind(composed_attention, device)
                    contenders = fused(call, device, backends) | torch_attention(call, device)
                    if length <= 2048:  # the score matrix takes memory
                        contenders["eager"] = eager
                        if dtype == scale.dtypes[0]:  # a compilation takes its time
                            contenders["torch.compile"] = compiled(eager, scale)
                    own = (
                        tuple(name for name in contenders if "fastformer" not in name) if "dropout_p" in options else ()
                    )
                    yield Case(
                        "attention", f"{call.op} {call.what}", dtype, backward, call.tensors(device, dtype),
                        contenders, partial(reference_attention, call, device),
                        4 * kept * batch * heads * length**2 * head_dim,
                        4 * batch * heads * length * head_dim * dtype.itemsize, own, first_heads,
                    )  # fmt: skip


def first_heads(x: Tensor) -> Tensor:
    """Two heads of the first sequence, and the mask of these."""
    return x[:1, :2]


def reference_attention(call: Call, device: torch.device, **tensors: Tensor) -> Tensor:
    options = {name: first_heads(x(device)) if callable(x) else x for name, x in call.options.items()}
    return call.eager(**tensors, **options)


def composed_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p=0.0, is_causal=False
) -> Tensor:
    """As written by hand: a score matrix, a softmax, torch's dropout."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    return F.dropout(scores.softmax(-1), dropout_p) @ value


def torch_attention(call: Call, device: torch.device) -> dict[str, Function]:
    """torch's own, on each of its backends; those that do not take the call say so when they run."""

    def on(kernel: SDPBackend, function: Function, **tensors: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return function(**tensors)

    function = call.bind(F.scaled_dot_product_attention, device)
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    if call.shapes["query"][2] <= 2048:
        kernels["math"] = SDPBackend.MATH
    return {f"torch {name}": partial(on, kernel, function) for name, kernel in kernels.items()}


def variable_lengths(device: torch.device, dtype: torch.dtype, scale: Scale, backends: list[str]) -> Iterator[Case]:
    head_dim = scale.head_dims[0]
    heads = scale.width // head_dim
    for length in scale.lengths[1:4:2]:
        batch = max(scale.tokens // length, 2)
        lengths = torch.linspace(length, length / 8, batch).long().tolist()
        total = sum(lengths)
        shapes = {name: (total, heads, head_dim) for name in ("query", "key", "value")}
        bounds = {name: partial(calls.bounds, lengths) for name in ("cu_seq_q", "cu_seq_k")}
        options = bounds | {"max_q": length, "max_k": length}
        call = Call("varlen_attn", f"{batch} of {length} to {length // 8} tokens, {heads}x{head_dim}", shapes, options)
        places = torch.cat([i * length + torch.arange(n) for i, n in enumerate(lengths)]).to(device)
        mask = (torch.arange(length) < torch.tensor(lengths)[:, None])[:, None, None].to(device)
        for backward in (False, True):
            contenders = fused(call, device, backends) | {
                "torch varlen_attn": call.bind(torch_varlen, device),
                "eager": partial(padded_attention, places, mask),
            }
            operations = 4 * heads * head_dim * sum(n**2 for n in lengths)
            yield Case(
                "varlen", f"varlen_attn {call.what}", dtype, backward, call.tensors(device, dtype), contenders,
                call.bind(call.eager, device), operations, 4 * total * heads * head_dim * dtype.itemsize,
            )  # fmt: skip


def torch_varlen(query: Tensor, key: Tensor, value: Tensor, cu_seq_q, cu_seq_k, max_q: int, max_k: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def padded_attention(places: Tensor, mask: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Padding and all, by torch's attention with a mask. `places`: (tokens,) in the padded batch; mask (B, 1, 1, S)."""
    batch, length = mask.shape[0], mask.shape[-1]

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(batch * length, *x.shape[1:]).index_copy(0, places, x)
        return padded.unflatten(0, (batch, length)).transpose(1, 2)

    output = F.scaled_dot_product_attention(pad(query), pad(key), pad(value), mask)
    return output.transpose(1, 2).flatten(0, 1)[places]


def rows(device: torch.device, dtype: torch.dtype, scale: Scale, backends: list[str]) -> Iterator[Case]:
    """layer_norm, add_layer_norm, linear with GELU, feed_forward, linear_cross_entropy."""
    for count in scale.rows:
        for E in scale.hidden:
            x, vector = (count, E), (E,)
            norm, size = {"normalized_shape": E}, f"{count}x{E}"
            one = {"input": x, "weight": vector, "bias": vector}
            two = {"input": x, "residual": x, "weight": vector, "bias": vector}
            product = {"input": x, "weight": (4 * E, E), "bias": (4 * E,)}
            network = {"input": x, "weight1": (4 * E, E), "bias1": (4 * E,), "weight2": (E, 4 * E), "bias2": vector}
            logits = {"input": x, "linear_weight": (scale.vocabulary, E)}
            target = {"target": partial(calls.targets, count, scale.vocabulary)}
            item, matrix = dtype.itemsize, 2 * count * E * 4 * E
            loss = 2 * count * E * scale.vocabulary
            for call, operations, moved in (
                (Call("layer_norm", size, one, norm), 0, 2 * count * E * item),
                (Call("add_layer_norm", size, two, norm), 0, 4 * count * E * item),
                (Call("linear", f"{size} to {4 * E}, gelu", product, {"activation": "gelu"}), matrix,
                 (5 * count * E + 4 * E * E) * item),
                (Call("feed_forward", f"{size} to {4 * E}, gelu", network), 2 * matrix,
                 (2 * count * E + 8 * E * E) * item),
                (Call("linear_cross_entropy", f"{size} to {scale.vocabulary}", logits, target), loss,
                 (count * E + scale.vocabulary * E) * item),
            ):  # fmt: skip
                eager = call.bind(call.eager, device)
                for backward in (False, True):
                    contenders = fused(call, device, backends)
                    contenders |= {"eager": eager, "torch.compile": compiled(eager, scale)}
                    tensors = call.tensors(device, dtype)
                    name = f"{call.op} {call.what}"
                    yield Case(call.op, name, dtype, backward, tensors, contenders, eager, operations, moved)


def models(device: torch.device, scale: Scale) -> Iterator[Case]:
    """Whole models; the fused one on whatever backend is chosen for each call, as a user gets it."""
    for name, make in (("BERT", bert), ("GPT-2", gpt2)):
        for dtype in scale.dtypes:
            torch.manual_seed(0)
            stock = make(scale).to(device, dtype).eval()
            accelerated = fastformer.accelerate(copy.deepcopy(stock))
            parameters = sum(p.numel() for layer in layers(stock) for p in layer.parameters())
            for batch, length in scale.batches:
                call = Call("", "", {"inputs_embeds": (batch, length, stock.config.hidden_size)})
                modules = {"fastformer": accelerated, "eager": stock, "torch.compile": stock}
                contenders = {label: partial(hidden_states, module) for label, module in modules.items()}
                contenders["torch.compile"] = compiled(contenders["torch.compile"], scale)
                for backward in (False, True):
                    yield Case(
                        "models", f"{name} {batch}x{length}", dtype, backward, call.tensors(device, dtype), contenders,
                        partial(reference_states, stock), 2 * parameters * batch * length, parameters * dtype.itemsize,
                        modules=modules,
                    )  # fmt: skip


def bert(scale: Scale) -> nn.Module:
    config = transformers.BertConfig(attn_implementation="sdpa", **scale.bert)
    return transformers.BertModel(config, add_pooling_layer=False)


def gpt2(scale: Scale) -> nn.Module:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(attn_implementation="sdpa", use_cache=False, **ends, **scale.gpt2)
    return transformers.GPT2Model(config)


def layers(model: nn.Module) -> nn.ModuleList:
    return model.encoder.layer if hasattr(model, "encoder") else model.h


def hidden_states(model: nn.Module, inputs_embeds: Tensor) -> Tensor:
    return model(inputs_embeds=inputs_embeds).last_hidden_state


def reference_states(model: nn.Module, inputs_embeds: Tensor) -> Tensor:
    """In the dtype of the inputs."""
    return hidden_states(copy.deepcopy(model).to(inputs_embeds.dtype), inputs_embeds)
