"""Calls that have every two features of an op together, in few calls: each has many features at once.

An op's FACTORS have levels; a call has one level of each. `covering` chooses the calls so that each two levels of
different factors meet in one of them, if they can: a pairwise covering array (Cohen et al., "The AETG system", 1997).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import calls
import torch
from calls import BF16, FP32, Call, empty, heads, train
from torch import Tensor

from fastformer import ops

Factors = dict[str, dict[str, Any]]  # factor -> name of a level -> what it stands for
Names = dict[str, str]  # factor -> name of its level


def pairs(names: Names) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for pair in itertools.combinations(names.items(), 2)}


def possible_pairs(factors: Factors, possible: Callable[[Names], bool]) -> list[Names]:
    """What `covering` covers. Of three levels that can't be together, some two can't."""
    return [
        {a: x, b: y}
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[a], factors[b])
        if possible({a: x, b: y})
    ]


def covering(factors: Factors, possible: Callable[[Names], bool] = lambda names: True) -> Iterator[Names]:
    """Always the same ones. `possible` is asked about some of the factors: can these levels be together?"""
    left = {pair: names for names in possible_pairs(factors, possible) for pair in pairs(names)}
    while left:
        row = dict(next(iter(left.values())))
        for factor in sorted(factors.keys() - row.keys(), key=lambda name: (-len(factors[name]), name)):
            rows = [row | {factor: level} for level in factors[factor]]
            row = max((x for x in rows if possible(x)), key=lambda x: len(pairs(x) & left.keys()))
        for pair in pairs(row):
            left.pop(pair, None)
        yield {factor: row[factor] for factor in factors}


KINDS = {kind: kind for kind in calls.KINDS}
DROPOUT = {"": 0.0, "dropout": 0.1}


def apart(x: Tensor, layout: str) -> Tensor:
    """The same shape, laid out otherwise: "odd" has rows that are not aligned to 16 bytes, "columns apart" a stride
    between the elements of a row."""
    if layout == "odd":
        return empty(*x.shape[:-1], x.shape[-1] + 1, dtype=x.dtype)[..., :-1]
    if layout == "columns apart":
        return empty(*x.shape[:-2], x.shape[-1], x.shape[-2], dtype=x.dtype).transpose(-1, -2)
    return x


ATTENTION: Factors = {
    "kind": KINDS,
    "size": {"64": (64, 64), "40": (40, 40), "80 and 128": (80, 128), "256 and 160": (256, 160)},
    "mask": {"": None, "padding": "bool", "float padding": "float", "mask": "bool", "float mask": "float"},
    "band": {
        "": (False, (-1, -1)),
        "causal": (True, (-1, -1)),
        "window": (False, (128, 32)),
        "both": (True, (128, 32)),
    },
    "grouped": {"": 12, "grouped": 3},
    "dropout": DROPOUT,
    "layout": {"": "", "odd": "odd", "columns apart": "columns apart"},
    "length": {"": (512, 512), "509 keys": (300, 509)},
    "form": {"": "padded", "packed": "packed"},
}


def attention_can(names: Names) -> bool:
    packed = names.get("form") == "packed" and (names.get("mask") or names.get("band") in ("causal", "both"))
    return not packed and not (names.get("kind") == "tf32x3" and names.get("size") == "256 and 160")


def attention_mask(dtype: torch.dtype, name: str, kind: str, batch: int, queries: int, keys: int) -> Tensor:
    """One for all heads, or for all queries, too."""
    return torch.empty(
        batch, 1, queries if name.endswith("mask") else 1, keys, dtype=torch.bool if kind == "bool" else dtype
    )


def attention(dtype: torch.dtype, levels: dict[str, Any], names: Names) -> None:
    (size, value_size), (queries, keys), kv_heads = levels["size"], levels["length"], levels["grouped"]
    causal, window = levels["band"]
    options = {"dropout_p": levels["dropout"], "window_size": window, "enable_gqa": True}
    if levels["form"] == "packed":
        shapes = (2000, 12, size), (3000, kv_heads, size), (3000, kv_heads, value_size)
        tensors = [apart(empty(*shape, dtype=dtype), levels["layout"]) for shape in shapes]
        bounds = torch.empty(9, dtype=torch.int32)
        output = ops.varlen_attn(*tensors, bounds, bounds, queries, keys, **options)
    else:
        shapes = (8, 12, queries, size), (8, kv_heads, keys, size), (8, kv_heads, keys, value_size)
        tensors = [
            apart(empty(*shape, dtype=dtype), levels["layout"]) if levels["layout"] else heads(dtype, *shape)
            for shape in shapes
        ]
        mask = levels["mask"] and attention_mask(dtype, names["mask"], levels["mask"], 8, queries, keys)
        output = ops.scaled_dot_product_attention(*tensors, mask, is_causal=causal, **options)
    train(output, *tensors)


DECODE: Factors = {
    "kind": KINDS,
    "size": ATTENTION["size"],
    "mask": {
        "": None,
        "padding": ("bool", 1, 1),
        "float mask": ("float", 1, 3),
        "mask of heads": ("bool", 12, 3),
        "float padding of heads": ("float", 12, 1),
    },
    "band": {"": (-1, -1), "window": (700, 0)},
    "grouped": {"": 12, "grouped": 3},
    "queries": {"": 1, "3 queries": 3},
    "layout": {"": "", "odd": "odd", "columns apart": "columns apart"},
    "form": {"": "padded", "packed": "packed"},
}


def decode_can(names: Names) -> bool:
    kind, mask = names.get("kind"), names.get("mask", "")
    if names.get("form") == "packed" and mask:
        return False
    if mask in ("float mask", "mask of heads") and names.get("queries") == "":
        return False
    return not (kind == "tf32x3" and names.get("size") == "256 and 160")


def decode(dtype: torch.dtype, levels: dict[str, Any], names: Names) -> None:
    (size, value_size), queries, kv_heads = levels["size"], levels["queries"], levels["grouped"]
    options = {"window_size": levels["band"], "enable_gqa": True}
    with torch.no_grad():
        if levels["form"] == "packed":
            shapes = (queries, 12, size), (1024, kv_heads, size), (1024, kv_heads, value_size)
            tensors = [apart(empty(*shape, dtype=dtype), levels["layout"]) for shape in shapes]
            bounds = torch.empty(2, dtype=torch.int32)
            ops.varlen_attn(*tensors, bounds, bounds, queries, 1024, **options)
        else:
            shapes = (1, 12, queries, size), (1, kv_heads, 1024, size), (1, kv_heads, 1024, value_size)
            tensors = [apart(empty(*shape, dtype=dtype), levels["layout"]) for shape in shapes]
            mask = None
            if levels["mask"]:
                mask_kind, of_heads, of_queries = levels["mask"]
                mask = torch.empty(1, of_heads, of_queries, 1024, dtype=torch.bool if mask_kind == "bool" else dtype)
            ops.scaled_dot_product_attention(*tensors, mask, **options)


LINEAR: Factors = {
    "kind": KINDS,
    "activation": {name or "": name for name in (None, "gelu", "gelu_tanh", "silu", "relu")},
    "rows": {"": 4096, "40 rows": 40, "8 rows": 8},
    "layout": {"": "", "odd": "odd", "columns apart": "columns apart"},
    "bias": {"": True, "no bias": False},
    "residual": {"": True, "no residual": False},
    "dropout": DROPOUT,
}


def linear(dtype: torch.dtype, levels: dict[str, Any], names: Names) -> None:
    width, out = (771, 1539) if levels["layout"] == "odd" else (768, 1536)
    x, weight = (apart(empty(n, width, dtype=dtype), levels["layout"]) for n in (levels["rows"], out))
    bias = empty(out, dtype=dtype) if levels["bias"] else None
    residual = apart(empty(levels["rows"], out, dtype=dtype), levels["layout"]) if levels["residual"] else None
    options = {"activation": levels["activation"], "dropout_p": levels["dropout"], "residual": residual}
    train(ops.linear(x, weight, bias, **options), *(t for t in (x, weight, bias, residual) if t is not None))


FEED_FORWARD: Factors = {
    **LINEAR,
    "activation": {name: name for name in ("gelu", "gelu_tanh", "silu")},
    "hidden dropout": {"": 0.0, "hidden dropout": 0.1},
}


def feed_forward(dtype: torch.dtype, levels: dict[str, Any], names: Names) -> None:
    width, hidden = (771, 1539) if levels["layout"] == "odd" else (768, 1536)
    x, weight1 = (apart(empty(n, width, dtype=dtype), levels["layout"]) for n in (levels["rows"], hidden))
    weight2 = apart(empty(width, hidden, dtype=dtype), levels["layout"])
    bias1, bias2 = (empty(n, dtype=dtype) if levels["bias"] else None for n in (hidden, width))
    residual = apart(empty(levels["rows"], width, dtype=dtype), levels["layout"]) if levels["residual"] else None
    output = ops.feed_forward(
        x, weight1, bias1, weight2, bias2, activation=levels["activation"], hidden_dropout_p=levels["hidden dropout"],
        dropout_p=levels["dropout"], residual=residual,
    )  # fmt: skip
    train(output, *(t for t in (x, weight1, bias1, weight2, bias2, residual) if t is not None))


NORM: Factors = {
    "kind": {kind: kind for kind in KINDS if kind != "tf32x3"},  # there is nothing to multiply
    "width": {"768": 768, "1021": 1021, "9000": 9000, "65536": 65536},
    "residual": {"": None, "residual": "same", "residual of another dtype": "other"},
    "affine": {"": (True, True), "no bias": (True, False), "no weight": (False, True), "neither": (False, False)},
    "dropout": DROPOUT,
    "layout": {"": "", "odd": "odd"},
}


def norm_can(names: Names) -> bool:
    return not (names.get("residual") == "" and names.get("dropout"))


def norm(dtype: torch.dtype, levels: dict[str, Any], names: Names) -> None:
    width = levels["width"]
    x = apart(empty(512, width, dtype=dtype), levels["layout"])
    weight, bias = (empty(width, dtype=dtype) if there else None for there in levels["affine"])
    affine = [t for t in (weight, bias) if t is not None]
    if levels["residual"] is None:
        train(ops.layer_norm(x, width, weight, bias), x, *affine)
        return
    other = dtype if levels["residual"] == "same" else BF16 if dtype == FP32 else FP32
    residual = apart(empty(512, width, dtype=other), levels["layout"])
    outputs = ops.add_layer_norm(x, residual, width, weight, bias, dropout_p=levels["dropout"])
    train(outputs, x, residual, *affine)


LINEAR_CROSS_ENTROPY: Factors = {
    "kind": KINDS,
    "reduction": {"": "mean", "none": "none"},
    "layout": {"": "", "odd": "odd", "columns apart": "columns apart"},
    "bias": {"": False, "bias": True},
    "weights": {"": False, "class weights": True},
    "smoothing": {"": 0.0, "smoothing": 0.1},
    "ignored": {"": -100, "0 ignored": 0},
    "frozen": {"": (), "frozen weight": ("weight",)},
}


def linear_cross_entropy(dtype: torch.dtype, levels: dict[str, Any], names: Names) -> None:
    width, classes = (771, 5001) if levels["layout"] == "odd" else (768, 5008)
    x, weight = (apart(empty(n, width, dtype=dtype), levels["layout"]) for n in (1024, classes))
    x, weight = (t.detach() if name in levels["frozen"] else t for name, t in (("input", x), ("weight", weight)))
    bias = empty(classes, dtype=dtype) if levels["bias"] else None
    loss = ops.linear_cross_entropy(
        x, weight, torch.zeros(1024, dtype=torch.int64), linear_bias=bias, reduction=levels["reduction"],
        weight=torch.ones(classes) if levels["weights"] else None, ignore_index=levels["ignored"],
        label_smoothing=levels["smoothing"],
    )  # fmt: skip
    train(loss, *(t for t in (x, weight, bias) if t is not None and t.requires_grad))


OPS: dict[str, tuple[Factors, Callable[[Names], bool], Callable]] = {
    "attention": (ATTENTION, attention_can, attention),
    "decode": (DECODE, decode_can, decode),
    "linear": (LINEAR, lambda names: True, linear),
    "feed_forward": (FEED_FORWARD, lambda names: True, feed_forward),
    "norm": (NORM, norm_can, norm),
    "linear_cross_entropy": (LINEAR_CROSS_ENTROPY, lambda names: True, linear_cross_entropy),
}


def _call(run: Callable, factors: Factors, names: Names) -> Call:
    levels = {factor: factors[factor][name] for factor, name in names.items()}
    return lambda dtype: run(dtype, levels, names)


CALLS: dict[str, Call] = {}
KIND_OF: list[tuple[str, str]] = []  # (call, kind) of each
for _op, (_factors, _possible, _run) in OPS.items():
    for _names in covering(_factors, _possible):
        _name = f"{_op}: {', '.join(level for factor, level in _names.items() if level and factor != 'kind')}"
        CALLS[_name] = _call(_run, _factors, _names)
        KIND_OF.append((_name, _names["kind"]))


def cases(targets: Iterable[str]) -> list[tuple[str, str, str]]:
    """(target, call, kind) of all. "tf32x3" is float32 where there is none."""
    targets = list(targets)
    return [
        (target, call, kind if target.startswith("sm_") or kind != "tf32x3" else "float32")
        for call, kind in KIND_OF
        for target in targets
    ]
