"""generate on an accelerated GPT-2 gives the stock model's tokens, and every cache its logits."""

import copy

import pytest
import torch
import transformers
from accelerated.small import VOCABULARY, B, S, assert_agrees, gpt2, ids, padding, reference_gpt
from torch import Tensor, nn

import fastformer
from fastformer import library

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the op library")

WAYS = {
    "greedy": dict(do_sample=False),
    "beam": dict(num_beams=3, do_sample=False),
    "sampling": dict(do_sample=True, top_k=20),
    "static cache": dict(do_sample=False, cache_implementation="static", disable_compile=True),
    "no cache": dict(do_sample=False, use_cache=False),
    "prompt lookup": dict(do_sample=False, prompt_lookup_num_tokens=3),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padded", [None, "left"])
def test_tokens(way, padded):
    eager = gpt2()
    fused = fastformer.accelerate(copy.deepcopy(eager))
    prompt, mask = ids(), padding("left") if padded else torch.ones_like(ids())
    if way == "prompt lookup":  # takes one prompt
        prompt, mask = prompt[:1], mask[:1]
    tokens = []
    for model in (fused, eager):
        torch.manual_seed(7)
        tokens.append(model.generate(prompt, attention_mask=mask, max_new_tokens=12, pad_token_id=0, **WAYS[way]))
    assert torch.equal(*tokens) and tokens[0].shape[1] > S


def caches(model: nn.Module) -> dict[str, transformers.Cache]:
    return {
        "dynamic": transformers.DynamicCache(config=model.config),
        "static": transformers.StaticCache(config=model.config, max_cache_len=30),
        "encoder-decoder": transformers.EncoderDecoderCache(
            transformers.DynamicCache(config=model.config), transformers.DynamicCache(config=model.config)
        ),
    }


@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "encoder-decoder"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad mode"])
def test_chunks_after_a_cache(cache, padded, grad):
    """A prompt, a chunk of several tokens, single tokens."""
    mask = padding(padded) if padded else None

    def results(model: nn.Module) -> dict[str, Tensor]:
        past, outputs = caches(model)[cache], {}
        for begin, end in ((0, 5), (5, 9), (9, 10), (10, 11), (11, S)):
            given = {} if mask is None else {"attention_mask": mask[:, :end]}
            with torch.set_grad_enabled(grad):
                logits = model(input_ids=ids()[:, begin:end], past_key_values=past, use_cache=True, **given).logits
            kept = slice(None) if mask is None else mask[:, begin:end].bool()
            outputs[f"tokens {begin} to {end}"] = logits.detach()[kept]
        return {name: x for name, x in outputs.items() if x.numel()}

    assert_agrees(gpt2(), results)


@pytest.mark.parametrize("padded", [None, "left", "right"])
def test_chunks_of_the_reference_gpt(padded):
    mask = padding(padded) if padded else None

    def results(model: nn.Module) -> dict[str, Tensor]:
        past, outputs = None, {}
        for begin, end in ((0, 5), (5, 9), (9, 10), (10, 11), (11, S)):
            with torch.no_grad():
                given = None if mask is None else mask[:, :end]
                out = model(ids()[:, begin:end], given, past_key_values=past, use_cache=True)
            past = out.past_key_values
            kept = slice(None) if mask is None else mask[:, begin:end].bool()
            outputs[f"tokens {begin} to {end}"] = out.logits[kept]
        return {name: x for name, x in outputs.items() if x.numel()}

    assert_agrees(reference_gpt(), results)


def test_a_cache_that_needs_gradients():
    """As in prefix tuning: the model is frozen, what stands in its cache is trained."""

    def results(model: nn.Module) -> dict[str, Tensor]:
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(4)
        shape = (B, model.config.n_head, 3, model.config.n_embd // model.config.n_head)
        prefix = [torch.randn(shape, generator=generator).to(model.dtype).requires_grad_() for _ in range(4)]
        cache = transformers.DynamicCache(config=model.config)
        for layer in range(2):
            cache.update(prefix[2 * layer], prefix[2 * layer + 1], layer)
        out = model(input_ids=ids(), past_key_values=cache).logits
        out.square().mean().backward()
        return {"logits": out.detach()} | {f"gradient {i}": x.grad for i, x in enumerate(prefix)}

    assert_agrees(gpt2(), results)


def test_packed_sequences():
    """Positions that begin anew are sequences of their own."""
    positions = torch.cat([torch.arange(5), torch.arange(S - 5)]).expand(B, S)

    def results(model: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": model(input_ids=ids(), position_ids=positions).logits}

    assert_agrees(gpt2(), results)


def test_embeddings_as_inputs():
    def results(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        embeddings = model.get_input_embeddings()(ids()).detach().requires_grad_()
        out = model.requires_grad_(False)(inputs_embeds=embeddings, attention_mask=padding("right")).logits
        out[padding("right").bool()].square().mean().backward()
        return {"gradient": embeddings.grad}

    assert_agrees(gpt2(), results)


def test_bidirectional_gpt2():
    def results(model: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": model(input_ids=ids(), is_causal=False).logits}

    assert_agrees(gpt2(), results)


def test_vocabulary_is_as_expected():
    assert gpt2().lm_head.weight.shape[0] == VOCABULARY
