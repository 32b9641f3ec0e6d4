"""The encoder without padding: what is the same, and when the batch is computed as it is."""

import copy
from functools import partial

import pytest
import torch
import transformers
from accelerated.small import LENGTHS, VOCABULARY, B, S, assert_agrees, bert, gradients, ids, padding
from accuracy import assert_close_to_reference
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastformer
from fastformer import library, models

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the op library")

BOTH = pytest.mark.parametrize(
    "model", [bert("BertModel"), bert("BertModel", models)], ids=["transformers", "reference"]
)


class Tokens:
    """Counts the tokens that a layer inside sees."""

    def __init__(self, model):
        self.seen = []
        norm = model.encoder.layer[-1].attention.output
        self.hook = norm.register_forward_hook(lambda module, args, output: self.seen.append(output.shape[:-1].numel()))


def hidden(model, mask, **options):
    with torch.no_grad():
        return model(ids(), attention_mask=mask, **options).last_hidden_state


def mask_of(side: str) -> Tensor:
    """(B, S) of 1 and 0; every sequence has a token."""
    mask = padding(side) if side != "holes" else (torch.rand(B, S) < 0.6).long()
    mask[:, 4] = 1
    return mask


@BOTH
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_real_tokens_as_in_eager(model, side):
    mask = mask_of(side)
    real = mask.bool()
    outputs = [hidden(copy.deepcopy(model), mask), hidden(copy.deepcopy(model).double(), mask)]
    fused = fastformer.accelerate(copy.deepcopy(model))
    tokens = Tokens(fused)
    out = hidden(fused, mask)
    assert tokens.seen == [int(mask.sum())]
    assert_close_to_reference(out[real], outputs[0][real], outputs[1][real])
    assert (out[~real] == 0).all()


@BOTH
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap
def test_the_batch_as_it_is(model):
    """Without padding, with unpad=False, on the torch backend, under a transform, and where a hook looks on."""
    mask, padded = padding("right"), B * S
    fused = fastformer.accelerate(copy.deepcopy(model))
    tokens = Tokens(fused)
    for training in (False, True):
        fused.train(training)
        hidden(fused, torch.ones_like(mask))
        with fastformer.backend("torch"):
            hidden(fused, mask)
        torch.func.vmap(lambda x: fused.encoder(x, mask.bool()[:, None, None])[0])(torch.randn(1, B, S, 48))
        hook = fused.encoder.layer[0].register_forward_hook(lambda *_: None)
        fused(ids(), attention_mask=mask)
        hook.remove()
    assert tokens.seen == [padded] * 8
    fused.eval()
    hidden(fused, mask)
    assert tokens.seen[-1] == int(LENGTHS.sum())
    plain = fastformer.accelerate(copy.deepcopy(model), unpad=False)
    tokens = Tokens(plain)
    hidden(plain, mask)
    assert tokens.seen == [padded]


def test_hidden_states_when_asked_for():
    model, mask = bert("BertModel"), padding("right")
    fused = fastformer.accelerate(copy.deepcopy(model))
    tokens = Tokens(fused)
    with torch.no_grad():
        states = [m(ids(), attention_mask=mask, output_hidden_states=True).hidden_states for m in (model, fused)]
    assert tokens.seen == [B * S]
    for eager, out in zip(*states, strict=True):
        torch.testing.assert_close(out[mask.bool()], eager[mask.bool()])
    hidden(fused, mask)  # the hooks that captured them stay, asleep
    assert tokens.seen[-1] == int(mask.sum())


def test_a_mask_of_the_user_is_no_padding():
    model, mask = bert("BertModel"), padding("right").bool()[:, None, None]
    fused = fastformer.accelerate(copy.deepcopy(model))
    torch.testing.assert_close(hidden(fused, mask), hidden(model, mask))


def test_one_sequence_of_nothing_but_padding():
    model, mask = bert("BertModel"), padding("right")
    mask[3] = 0
    real = mask.bool()
    fused = fastformer.accelerate(copy.deepcopy(model))
    torch.testing.assert_close(hidden(fused, mask)[real], hidden(model, mask)[real])


def test_heads_on_top():
    labels = torch.randint(VOCABULARY, (B, S)).masked_fill(padding("right") == 0, -100)
    model = bert("BertForMaskedLM")
    fused = fastformer.accelerate(copy.deepcopy(model))
    with torch.no_grad():
        eager, out = (m(ids(), attention_mask=padding("right"), labels=labels).loss for m in (model, fused))
    torch.testing.assert_close(out, eager)


@BOTH
@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_gradients(model, side, mode):
    """Of a loss of the real tokens: those of a float64 model that computes the padding, which gets no gradient."""
    mask = mask_of(side)
    real, seen = mask.bool(), []

    def results(m: nn.Module) -> dict[str, Tensor]:
        m.train(mode == "training")
        embedded = torch.randn(B, S, 48, generator=torch.Generator().manual_seed(3)).to(next(m.parameters()).dtype)
        hook = m.embeddings.register_forward_hook(lambda *_: embedded.requires_grad_())
        tokens = Tokens(m)
        out = m(ids(), attention_mask=mask).last_hidden_state[real]
        out.square().mean().backward()
        hook.remove(), tokens.hook.remove()
        seen.append(tokens.seen[0])
        assert (embedded.grad[~real] == 0).all() and (embedded.grad[real] != 0).all()
        return {"output": out.detach(), "gradient of the input": embedded.grad, **gradients(m)}

    assert_agrees(copy.deepcopy(model), results)
    assert seen == [int(mask.sum()), B * S, B * S]


@BOTH
def test_dropout_of_the_attention_is_that_of_the_padded_batch(model):
    mask = padding("right")
    fused = fastformer.accelerate(copy.deepcopy(model))
    for layer in fused.encoder.layer:
        layer.attention.self.dropout.p = 0.3
    fused.train()
    outs, tokens = [], Tokens(fused)
    for unpad in (True, False):
        fastformer.accelerate(fused, unpad=unpad).zero_grad()
        torch.manual_seed(2)
        out = fused(ids(), attention_mask=mask).last_hidden_state[mask.bool()]
        out.square().mean().backward()
        outs.append({"output": out.detach(), **gradients(fused)})
    assert tokens.seen == [int(mask.sum()), B * S]
    torch.testing.assert_close(*outs)
    fused.eval()
    assert not torch.allclose(hidden(fused, mask)[mask.bool()], outs[0]["output"], atol=1e-3)


@BOTH
def test_dropout_everywhere(model):
    """The gradients are those of what was computed, with the masks that were drawn for it."""
    fused = fastformer.accelerate(copy.deepcopy(model)).double().train()
    for module in fused.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()[:, None, None]
    mask.is_padding = True

    def encode(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        output = fused.encoder(x, mask)
        return getattr(output, "last_hidden_state", output)

    tokens = Tokens(fused)
    assert torch.autograd.gradcheck(encode, torch.randn(2, 4, 48).double().requires_grad_(), fast_mode=True)
    assert set(tokens.seen) == {4}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("way", ["of transformers", "of torch"])
@BOTH
def test_layers_that_are_computed_again(model, way):
    """Gradient checkpointing: without padding, too, each time."""
    mask, seen = padding("right"), []
    if way == "of transformers" and not hasattr(model, "gradient_checkpointing_enable"):
        pytest.skip("no such method")

    def results(m: nn.Module) -> dict[str, Tensor]:
        m.train()
        if way == "of transformers":
            m.gradient_checkpointing_enable()
        else:
            for layer in m.encoder.layer:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        tokens = Tokens(m)
        out = m(ids(), attention_mask=mask).last_hidden_state[mask.bool()]
        out.square().mean().backward()
        tokens.hook.remove()
        seen.append(tokens.seen)
        return {"output": out.detach(), **gradients(m)}

    assert_agrees(copy.deepcopy(model), results)
    assert seen == [[int(mask.sum())] * 2, [B * S] * 2, [B * S] * 2]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_training_where_somebody_looks_inside(implementation):
    """Only "eager" of the stock model has attention weights."""
    asked = "output_attentions" if implementation == "eager" else "output_hidden_states"
    model, mask = bert("BertModel").train(), padding("left")
    fused = fastformer.accelerate(copy.deepcopy(model))
    model.set_attn_implementation(implementation)
    tokens = Tokens(fused)
    eager, out = (m(ids(), attention_mask=mask, **{asked: True}) for m in (model, fused))
    assert tokens.seen == [B * S]
    for name in ("hidden_states", "attentions"):
        inside = [x.transpose(1, -2)[mask.bool()] for x in out.get(name, ())]
        assert len(inside) == len(eager.get(name, ()))
        for x, y in zip(inside, eager.get(name, ()), strict=True):
            torch.testing.assert_close(x, y.transpose(1, -2)[mask.bool()], atol=1e-5, rtol=1e-4)


@BOTH
def test_autocast(model):
    mask = padding("right")
    real, exact = mask.bool(), copy.deepcopy(model).double()(ids(), attention_mask=padding("right"))[0]
    fused, errors = fastformer.accelerate(copy.deepcopy(model)), []
    tokens = Tokens(fused)
    for m in (fused, model):
        with torch.autocast("cpu", torch.bfloat16):
            out = m(ids(), attention_mask=mask).last_hidden_state
        out[real].float().square().mean().backward()
        errors.append((out.double() - exact)[real].abs().max().item())
    assert tokens.seen == [int(mask.sum())] and errors[0] <= 2 * errors[1]


@BOTH
def test_training_on_nothing_but_padding(model):
    """Where the stock model's outputs are numbers without a meaning, these are 0 and so are the gradients."""
    fused = fastformer.accelerate(copy.deepcopy(model)).train()
    out = fused(ids(), attention_mask=torch.zeros(B, S, dtype=torch.long)).last_hidden_state
    out.sum().backward()
    assert (out == 0).all()
    assert all((g == 0).all() for g in gradients(fused.encoder).values())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("library_of", [transformers, models], ids=["transformers", "reference"])
def test_question_answering_keeps_padding(library_of, training):
    """The softmax over all positions, and so the loss, sees it."""

    def results(m: nn.Module) -> dict[str, Tensor]:
        answers = {"start_positions": torch.zeros(B, dtype=torch.long), "end_positions": LENGTHS - 1}
        output = m.train(training)(input_ids=ids(), attention_mask=padding("right"), **answers)
        output.loss.backward()
        logits = {"start": output.start_logits.detach(), "end": output.end_logits.detach()}
        return {"loss": output.loss.detach(), **logits, **gradients(m)}

    assert_agrees(bert("BertForQuestionAnswering", library=library_of), results)


def test_feed_forward_in_chunks():
    """transformers' chunk_size_feed_forward wants a length that it divides; the tokens are of any number."""
    mask = padding("right")

    def results(m: nn.Module) -> dict[str, Tensor]:
        out = m.train()(ids(), attention_mask=mask).last_hidden_state[mask.bool()]
        out.square().mean().backward()
        return {"output": out.detach(), **gradients(m)}

    model = bert("BertModel", chunk_size_feed_forward=1)
    eager, fused = results(copy.deepcopy(model)), results(fastformer.accelerate(copy.deepcopy(model)))
    for name, x in eager.items():
        torch.testing.assert_close(fused[name], x, atol=1e-5, rtol=1e-4, msg=name)
