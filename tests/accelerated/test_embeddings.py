"""BERT's embeddings in one op: the results of the stock modules, and the calls that these keep."""

import copy
import re

import pytest
import torch
from accelerated.small import VOCABULARY, B, S, assert_agrees, bert, gradients, ids
from torch import Tensor, nn

import fastformer
from fastformer import library, models

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the op library")

LIBRARIES = {"transformers": lambda **config: bert("BertModel", **config)}
LIBRARIES["reference"] = lambda **config: bert("BertModel", models, **config)
BOTH = pytest.mark.parametrize("build", LIBRARIES.values(), ids=LIBRARIES)
IDS = {
    "words": {},
    "token types": {"token_type_ids": ids() % 2},
    "positions": {"position_ids": torch.arange(3, S + 3)[None]},
    "all": {"token_type_ids": ids() % 2, "position_ids": torch.arange(B * S).view(B, S) % 30},
}


def embed(model: nn.Module, **given) -> Tensor:
    given = {"input_ids": ids(), "token_type_ids": None, "position_ids": None} | given
    return model.embeddings(**given)


def ran(recorder, call) -> list[str]:
    recorder.calls.clear()
    with recorder:
        call()
    return [name for name in recorder.names() if name.startswith("fastformer") and not name.endswith("::isa")]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", IDS)
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_as_stock(build, mode, given, dtype):
    def results(m: nn.Module) -> dict[str, Tensor]:
        m.train(mode == "training")
        with torch.set_grad_enabled(mode == "training"):
            out = embed(m, **IDS[given])
        if mode == "inference":
            return {"output": out}
        out.square().mean().backward()
        return {"output": out.detach(), **gradients(m.embeddings)}

    assert_agrees(build(), results, dtype)


@BOTH
def test_one_op(build, recorder):
    model = fastformer.accelerate(build())
    with torch.no_grad():
        for _ in range(2):
            assert ran(recorder, lambda: embed(model)) == ["fastformer_cpu::embeddings"]
    assert ran(recorder, lambda: embed(model))[0] == "fastformer::embeddings"
    with torch.autocast("cpu", torch.bfloat16):
        assert embed(model).dtype == torch.float32
    fastformer.restore(model)
    assert ran(recorder, lambda: embed(model)) == []


@BOTH
def test_the_padding_token_gets_no_gradient(build):
    fused, tokens = fastformer.accelerate(build(pad_token_id=4)), ids()
    tokens[:, 3:6] = 4
    embed(fused, input_ids=tokens).square().sum().backward()
    grad = fused.embeddings.word_embeddings.weight.grad
    assert (grad[4] == 0).all() and (grad[tokens[0, 0]] != 0).any()


@BOTH
def test_dropout(build):
    """As much as was asked for, in training only; its gradient has the mask of the output."""
    fused = fastformer.accelerate(build(hidden_dropout_prob=0.25))
    assert (embed(fused.eval()) != 0).all()
    nn.init.zeros_(fused.embeddings.LayerNorm.weight), nn.init.ones_(fused.embeddings.LayerNorm.bias)
    out = embed(fused.train())
    assert out.unique().tolist() == [0, pytest.approx(1 / 0.75)]
    assert abs((out == 0).float().mean().item() - 0.25) < 0.03
    (grad,) = torch.autograd.grad(out.sum(), fused.embeddings.LayerNorm.bias)
    torch.testing.assert_close(grad, out.detach().sum((0, 1)))


def sparse(m: nn.Module) -> None:
    m.word_embeddings.sparse = True


def max_norm(m: nn.Module) -> None:
    m.position_embeddings.max_norm = 2.0


def by_frequency(m: nn.Module) -> None:
    m.token_type_embeddings.scale_grad_by_freq = True


def hook(m: nn.Module) -> None:
    m.word_embeddings.register_forward_hook(lambda module, args, output: output * 1.1)


def hook_on_norm(m: nn.Module) -> None:
    m.LayerNorm.register_forward_hook(lambda module, args, output: output * 1.1)


def other_dtype(m: nn.Module) -> None:
    m.token_type_embeddings.double(), m.LayerNorm.double()


class Shifted(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def other_class(m: nn.Module) -> None:
    m.word_embeddings.__class__ = Shifted


@BOTH
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (sparse, "word_embeddings has sparse"),
        (max_norm, "position_embeddings has max_norm"),
        (by_frequency, "token_type_embeddings has scale_grad_by_freq"),
        (hook, "word_embeddings has hooks"),
        (hook_on_norm, "LayerNorm has hooks"),
        (other_class, "word_embeddings is a .*Shifted"),
        (other_dtype, "of different dtypes"),
    ],
)
def test_what_is_left(build, change, reason, late, recorder):
    """Before it is accelerated, or after it has run."""
    model = build()
    fused = copy.deepcopy(model)
    change(model.embeddings)
    if late:
        fastformer.accelerate(fused)
        with torch.no_grad():
            embed(fused)
        change(fused.embeddings)
    else:
        change(fused.embeddings)
        fastformer.accelerate(fused)
    found = [row for row in fastformer.report(fused).left if row.name == "embeddings"]
    assert len(found) == 1 and re.search(reason, " ".join(found[0].reasons))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert not any("embeddings" in name for name in ran(recorder, lambda: embed(fused)))
            out, expected = embed(fused), embed(model)
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    if change is sparse:
        embed(fused).sum().backward()
        assert fused.embeddings.word_embeddings.weight.grad.is_sparse


def test_inputs_embeds(recorder):
    """Those of a user."""
    model = bert("BertModel")
    fused, x = fastformer.accelerate(copy.deepcopy(model)), torch.randn(B, S, 48)
    for m in (model, fused):
        m.requires_grad_(False)
    names = ran(recorder, lambda: embed(fused, input_ids=None, inputs_embeds=x))
    assert "fastformer_cpu::embeddings" not in names
    given = {"input_ids": None, "inputs_embeds": x}
    torch.testing.assert_close(embed(fused, **given), embed(model, **given), atol=1e-5, rtol=1e-4)


@BOTH
@pytest.mark.parametrize("grad", [False, True])
def test_errors_are_torchs(build, grad):
    wrong = ids()
    wrong[2, 3] = VOCABULARY
    fused = fastformer.accelerate(build())
    with torch.set_grad_enabled(grad):
        for given in ({"input_ids": wrong}, {"position_ids": torch.full((1, S), 40)}):
            with pytest.raises(IndexError, match="out of range"):
                embed(fused, **{"token_type_ids": ids() % 2} | given)
        with pytest.raises(RuntimeError, match="scalar types|Long, Int"):
            embed(fused, input_ids=ids().float(), token_type_ids=ids() % 2, position_ids=torch.arange(S)[None])
        with pytest.raises(RuntimeError, match="must match"):
            embed(fused, position_ids=torch.arange(S - 1)[None], token_type_ids=ids() % 2)


@BOTH
@pytest.mark.filterwarnings("ignore:.*no fused backend runs on meta")
def test_edits_and_devices_are_seen(build):
    """Nothing of a table is packed: an edit counts at once."""
    model = build().requires_grad_(False)
    fused = fastformer.accelerate(copy.deepcopy(model))
    embed(fused)
    for m in (model, fused):
        m.embeddings.word_embeddings.weight.data[ids()[0, 0]] += 1
        m.embeddings.LayerNorm.bias.data[3] += 1
    torch.testing.assert_close(embed(fused), embed(model), atol=1e-5, rtol=1e-4)
    assert embed(fused.to("meta"), input_ids=ids().to("meta")).shape == (B, S, 48)
