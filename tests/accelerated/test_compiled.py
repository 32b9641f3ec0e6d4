"""Accelerated models under torch.compile and torch.export: one graph, and the results of the stock model."""

import copy

import pytest
import torch
from accelerated.small import MODELS, assert_all_close, bert, gradients, ids, logits, padding
from torch import Tensor, nn

import fastformer
from fastformer import library

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the op library")


@pytest.fixture(autouse=True)
def forget_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


QUICK = [("bert", "inference", "left"), ("gpt2", "training", None)]
CASES = [(model, mode, padded) for model in MODELS for mode in ("inference", "training") for padded in (None, "left")]


@pytest.mark.parametrize(
    ("model", "mode", "padded"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_one_graph(model, mode, padded):
    given = {"attention_mask": padding(padded)} if padded else {}
    kept = given.get("attention_mask", torch.ones_like(ids())).bool()

    def results(forward, m: nn.Module) -> dict[str, Tensor]:
        with torch.set_grad_enabled(mode == "training"):
            out = forward(input_ids=ids(), **given).logits[kept]
        if mode == "inference":
            return {"logits": out}
        out.square().mean().backward()
        return {"logits": out.detach(), **gradients(m)}

    eager = MODELS[model]()
    exact = copy.deepcopy(eager).double()
    fused = fastformer.accelerate(copy.deepcopy(eager))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_all_close(results(compiled, fused), results(eager, eager), results(exact, exact))
    if mode == "inference":  # and then without compiling, and back
        torch.testing.assert_close(logits(fused, **given)[kept], logits(compiled, **given)[kept], atol=1e-5, rtol=1e-4)


def test_compiled_graph_holds_the_fused_ops():
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.code))
        return graph

    with torch.enable_grad():
        torch.compile(fastformer.accelerate(bert()), backend=backend, fullgraph=True)(input_ids=ids())
    assert "fastformer.scaled_dot_product_attention" in graphs[0] and "fastformer.add_layer_norm" in graphs[0]


@pytest.mark.slow
def test_compiled_with_a_layer_that_is_left():
    model = bert()
    model.bert.encoder.layer[0].output.dense = nn.Sequential(model.bert.encoder.layer[0].output.dense, nn.Identity())
    expected = logits(model)
    compiled = torch.compile(fastformer.accelerate(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_before_a_layer_is_replaced():
    model = fastformer.accelerate(bert())
    compiled = torch.compile(model, backend="aot_eager")
    before = logits(compiled)
    dense = model.bert.encoder.layer[0].output.dense
    model.bert.encoder.layer[0].output.dense = nn.Sequential(dense, nn.Dropout(0.0), nn.ReLU())
    after = logits(compiled)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, logits(fastformer.restore(copy.deepcopy(model))), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_inductor():
    model = bert()
    expected = logits(model)
    compiled = torch.compile(fastformer.accelerate(model), fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert", "reference bert"])
def test_export(model):
    fused = fastformer.accelerate(MODELS[model]())
    mask = padding("right")
    program = torch.export.export(fused, (ids(), mask))
    with torch.no_grad():
        out = program.module()(ids(), mask)
    exported = out["logits"] if isinstance(out, dict) else out[1] if out[0] is None else out.logits
    torch.testing.assert_close(
        exported[mask.bool()], logits(fused, attention_mask=mask)[mask.bool()], atol=1e-5, rtol=1e-4
    )
