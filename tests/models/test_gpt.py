"""GPT-2 against transformers: the same checkpoint, the same inputs, the same outputs."""

import pytest
import torch
import transformers
from torch import Tensor

from fastformer import models

B, S, V = 3, 10, 50
SIZES = dict(
    vocab_size=V,
    n_embd=24,
    n_layer=3,
    n_head=3,
    n_positions=16,
    layer_norm_epsilon=0.01,
    bos_token_id=0,
    eos_token_id=0,
)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def both(folder, architecture: str = "GPT2LMHeadModel", **config):
    """A small random model in which every parameter matters, and ours read from its checkpoint."""
    torch.manual_seed(0)
    theirs = getattr(transformers, architecture)(transformers.GPT2Config(**{**SIZES, **config})).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(folder)
    return models.load(folder), theirs


def padded(side: str) -> dict[str, Tensor]:
    """Lengths 10, 7 and 2, with positions that count from the first token that is kept."""
    input_ids = torch.randint(1, V, (B, S), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(S) < torch.tensor([S, 7, 2])[:, None]).long()
    if side == "left":
        mask = mask.flip(1)
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("architecture", ["GPT2Model", "GPT2LMHeadModel"])
def test_equals_transformers(architecture: str, tmp_path) -> None:
    ours, theirs = both(tmp_path, architecture)
    assert isinstance(ours, models.GptModel if architecture == "GPT2Model" else models.GptLMHeadModel)
    input_ids = padded("right")["input_ids"]
    with torch.no_grad():
        if architecture == "GPT2Model":
            close(ours(input_ids).last_hidden_state, theirs(input_ids).last_hidden_state)
        else:
            close(ours(input_ids).logits, theirs(input_ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str, tmp_path) -> None:
    ours, theirs = both(tmp_path)
    given = padded(side)
    keep = given["attention_mask"].bool()
    with torch.no_grad():
        logits = ours(**given).logits
        close(logits[keep], theirs(**given).logits[keep])
        alone = ours(given["input_ids"][1, keep[1]][None]).logits[0]
    close(logits[1, keep[1]], alone)


@pytest.mark.parametrize(
    "config",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"n_inner": 40},
        *({"activation_function": name} for name in ("gelu_pytorch_tanh", "gelu", "relu", "silu")),
    ],
    ids=lambda config: "-".join(f"{name}={value}" for name, value in config.items()),
)
def test_configs(config: dict, tmp_path) -> None:
    ours, theirs = both(tmp_path, **config)
    input_ids = padded("right")["input_ids"]
    with torch.no_grad():
        close(ours(input_ids).logits, theirs(input_ids).logits)


def test_loss_and_gradients(tmp_path) -> None:
    ours, theirs = both(tmp_path)
    given = padded("left")
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    outputs, expected = ours(**given, labels=labels), theirs(**given, labels=labels)
    close(outputs.loss, expected.loss)

    outputs.loss.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        gradient = gradients[name].t() if name.endswith(ours.transposed) else gradients[name]
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[10], [1] * 10, [4, 1, 5], [1, 3, 3, 3]], ids=str)
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "left-padded"])
def test_cache(chunks: list[int], padding: bool, tmp_path) -> None:
    """Fed in chunks, a sequence gives the logits that it gives at once, and those of transformers."""
    ours, theirs = both(tmp_path)
    given = padded("left") if padding else {"input_ids": padded("left")["input_ids"]}
    keep = given["attention_mask"].bool() if padding else torch.ones(B, S, dtype=torch.bool)
    past, logits, end = None, [], 0
    with torch.no_grad():
        for chunk in chunks:
            start, end = end, end + chunk
            step = {name: value[:, start:end] for name, value in given.items()}
            if padding:
                step["attention_mask"] = given["attention_mask"][:, :end]
            outputs = ours(**step, past_key_values=past, use_cache=True)
            past = outputs.past_key_values
            logits.append(outputs.logits)
            assert [tuple(x.shape) for layer in past for x in layer] == [(B, 3, end, 8)] * 6
        close(torch.cat(logits, 1)[keep], ours(**given).logits[keep])
        close(torch.cat(logits, 1)[keep], theirs(**given).logits[keep])


def test_cache_is_left_as_it_was(tmp_path) -> None:
    """Two continuations of one prompt share its cache."""
    ours, _ = both(tmp_path)
    input_ids = padded("left")["input_ids"]
    with torch.no_grad():
        past = ours(input_ids[:, :6], use_cache=True).past_key_values
        before = [x.clone() for layer in past for x in layer]
        ours(input_ids[:, 6:], past_key_values=past, use_cache=True)
    assert all(torch.equal(x, y) for x, y in zip(before, [x for layer in past for x in layer], strict=True))
    assert ours(input_ids).past_key_values is None


def test_greedy_decoding(tmp_path) -> None:
    ours, theirs = both(tmp_path)
    input_ids = padded("left")["input_ids"][:1, :4]
    expected = theirs.generate(input_ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens, past, step = input_ids, None, input_ids
    with torch.no_grad():
        for _ in range(8):
            _, logits, past = ours(step, past_key_values=past, use_cache=True)
            step = logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, step], 1)
    assert torch.equal(tokens, expected)


def test_dropout_acts_in_training_alone(tmp_path) -> None:
    ours, _ = both(tmp_path)
    input_ids = padded("left")["input_ids"]
    assert torch.equal(ours(input_ids).logits, ours(input_ids).logits)
    ours.train()
    assert not torch.allclose(ours(input_ids).logits, ours(input_ids).logits)


@pytest.mark.parametrize("field", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_each_dropout_rate_is_read(field: str) -> None:
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    input_ids = padded("left")["input_ids"]
    model = models.GptModel(models.GptConfig(**SIZES, **{**off, field: 0.5})).train()
    assert not torch.allclose(model(input_ids).last_hidden_state, model(input_ids).last_hidden_state)
    model = models.GptModel(models.GptConfig(**SIZES, **off)).train()
    assert torch.equal(model(input_ids).last_hidden_state, model(input_ids).last_hidden_state)


def test_initial_weights() -> None:
    model = models.GptLMHeadModel(models.GptConfig(**{**SIZES, "n_embd": 96, "n_layer": 8}))
    block = model.transformer.h[0]
    for weight in (block.attn.c_attn.weight, block.mlp.c_fc.weight, model.transformer.wte.weight):
        assert abs(weight.std() - 0.02) < 0.001
    for weight in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
        assert abs(weight.std() - 0.005) < 0.0003  # 0.02 / sqrt(2 * 8)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_wrong_inputs() -> None:
    model = models.GptModel(models.GptConfig(**SIZES))
    ids = torch.ones(2, 5, dtype=torch.long)
    past = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values must have 3 layers, got 2"):
        model(ids, past_key_values=past[:2])
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(batch, length\) = \(2, 10\), got \(2, 5\)"):
        model(ids, past_key_values=past, attention_mask=ids)
    with pytest.raises(ValueError, match="16 positions, got a length of 17"):
        model(torch.ones(2, 12, dtype=torch.long), past_key_values=past)
    with pytest.raises(ValueError, match="multiple of the number of heads, got 24, 5"):
        models.GptConfig(n_embd=24, n_head=5)
    with pytest.raises(NotImplementedError, match="activation_function='tanh'"):
        models.GptConfig(activation_function="tanh")
