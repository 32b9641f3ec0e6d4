"""The encoder without padding: what is the same, and when the batch is computed as it is."""

import copy

import pytest
import torch
from accelerated.small import LENGTHS, VOCABULARY, B, S, bert, ids, padding
from accuracy import assert_close_to_reference

import fastformer
from fastformer import models

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


@BOTH
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_real_tokens_as_in_eager(model, side):
    mask = padding(side) if side != "holes" else (torch.rand(B, S) < 0.6).long()
    mask[:, 4] = 1
    real = mask.bool()
    outputs = [hidden(copy.deepcopy(model), mask), hidden(copy.deepcopy(model).double(), mask)]
    fused = fastformer.accelerate(copy.deepcopy(model))
    tokens = Tokens(fused)
    out = hidden(fused, mask)
    assert tokens.seen == [int(mask.sum())]
    assert_close_to_reference(out[real], outputs[0][real], outputs[1][real])
    assert (out[~real] == 0).all()


@BOTH
def test_the_batch_as_it_is(model):
    """Without padding, with gradients, with unpad=False, on the torch backend, and where a hook looks on."""
    mask, padded = padding("right"), B * S
    fused = fastformer.accelerate(copy.deepcopy(model))
    tokens = Tokens(fused)
    hidden(fused, torch.ones_like(mask))
    fused(ids(), attention_mask=mask)
    with fastformer.backend("torch"):
        hidden(fused, mask)
    fused.train()
    hidden(fused, mask)
    fused.eval()
    hook = fused.encoder.layer[0].register_forward_hook(lambda *_: None)
    hidden(fused, mask)
    assert tokens.seen == [padded] * 5
    hook.remove()
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
