"""The reference GPT's own generate gives transformers' tokens, with and without fused kernels."""

import copy
import dataclasses

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastformer
from fastformer import library, models
from fastformer.models.generation import KeyValueCache, LayerCache

V, P = 50, 6
SIZES = dict(vocab_size=V, n_embd=24, n_layer=3, n_head=3, n_positions=40, bos_token_id=None, eos_token_id=None)
STOPS = 37, 30, 12  # tokens that this model likes
LIBRARY = pytest.mark.skipif(not library.available(), reason="needs the op library")


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[nn.Module, nn.Module]:
    """Ours and transformers', the same random weights."""
    folder = tmp_path_factory.mktemp("gpt")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(folder)
    return models.load(folder).eval(), theirs


@pytest.fixture(params=["eager", pytest.param("fused", marks=LIBRARY)])
def ours(request, both) -> nn.Module:
    model = copy.deepcopy(both[0])
    return fastformer.accelerate(model) if request.param == "fused" else model


@pytest.fixture
def theirs(both) -> nn.Module:
    return both[1]


def prompts(batch: int = 8, seed: int = 1) -> Tensor:
    return torch.randint(1, V, (batch, P), generator=torch.Generator().manual_seed(seed))


def left_padding(batch: int = 8) -> Tensor:
    return (torch.arange(P) >= torch.arange(batch)[:, None] % P).long()


def expected_tokens(theirs: nn.Module, stop_tokens: tuple[int, ...] = (), **options) -> Tensor:
    options = {"do_sample": False, "attention_mask": torch.ones_like(options["input_ids"])} | options
    ends = {"eos_token_id": list(stop_tokens) or None, "pad_token_id": stop_tokens[0] if stop_tokens else 0}
    return theirs.generate(**options, **ends)


@pytest.mark.parametrize("stop_tokens", [(), (30,), STOPS], ids=["no stop", "one stop", "stops"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("num_beams", [1, 2, 4])
def test_greedy_and_beams(ours, theirs, num_beams, padded, stop_tokens):
    ended_early = False
    for seed in range(4):
        given = {"input_ids": prompts(seed=seed)}
        if padded:
            given["attention_mask"] = left_padding()
        options = dict(max_new_tokens=14, num_beams=num_beams)
        tokens = ours.generate(**given, **options, stop_tokens=stop_tokens)
        expected = expected_tokens(theirs, **given, **options, stop_tokens=stop_tokens)
        assert torch.equal(tokens, expected)
        ended_early |= bool(torch.isin(tokens[:, P:-1], torch.tensor(stop_tokens)).any())
    assert ended_early == bool(stop_tokens)


@pytest.mark.parametrize(
    "options",
    [dict(temperature=0.7), dict(top_k=5), dict(top_p=0.6), dict(temperature=1.5, top_k=20, top_p=0.9), dict(top_k=99)],
    ids=str,
)
def test_sampling(ours, theirs, options):
    """The same random numbers draw the tokens that transformers draws."""
    given = dict(input_ids=prompts(), attention_mask=left_padding(), max_new_tokens=14)
    torch.manual_seed(3)
    tokens = ours.generate(**given, **options)
    torch.manual_seed(3)
    all_options = dict(temperature=1.0, top_k=0, top_p=1.0) | options
    assert torch.equal(tokens, expected_tokens(theirs, **given, do_sample=True, **all_options))
    assert not torch.equal(tokens, ours.generate(**given))


def test_generator(ours):
    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return ours.generate(prompts(), max_new_tokens=14, temperature=2.0, generator=generator)

    state = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-4)], ids=str)
def test_sampling_of_the_likeliest(ours, options):
    assert torch.equal(
        ours.generate(prompts(), max_new_tokens=8, **options), ours.generate(prompts(), max_new_tokens=8)
    )


@pytest.mark.parametrize("num_beams", [1, 3])
def test_padding_changes_nothing(ours, num_beams):
    """A padded prompt goes on as it does alone."""
    mask = left_padding(4)
    together = ours.generate(prompts(4), mask, max_new_tokens=10, num_beams=num_beams)
    for i in range(4):
        alone = ours.generate(prompts(4)[i, mask[i].bool()][None], max_new_tokens=10, num_beams=num_beams)
        assert torch.equal(together[i, P:], alone[0, mask[i].sum() :])


def test_on_token(ours):
    """The tokens of each step, also those that are filled in behind an end."""
    steps: list[Tensor] = []
    tokens = ours.generate(prompts(), max_new_tokens=9, stop_tokens=STOPS, on_token=steps.append)
    assert all(step.shape == (8,) for step in steps)
    assert torch.equal(torch.stack(steps, 1), tokens[:, P:])


def test_stops_early(ours):
    whole = ours.generate(prompts(1), max_new_tokens=9)
    stop = int(whole[0, P + 2])
    end = P + 1 + whole[0, P:].tolist().index(stop)
    assert torch.equal(ours.generate(prompts(1), max_new_tokens=9, stop_tokens=(stop,)), whole[:, :end])


def test_filling(ours, monkeypatch):
    """Behind the end of a prompt's continuation: the first stop token, or pad_token_id where the config has one."""
    tokens = ours.generate(prompts(), max_new_tokens=14, stop_tokens=STOPS)[:, P:]
    ends = [next((i for i, x in enumerate(row) if x in STOPS), len(row)) for row in tokens.tolist()]
    assert min(ends) < max(ends)
    for row, end in zip(tokens, ends, strict=True):
        assert (row[end + 1 :] == STOPS[0]).all()
    monkeypatch.setattr(ours, "config", dataclasses.replace(ours.config, pad_token_id=49))
    padded = ours.generate(prompts(), max_new_tokens=14, stop_tokens=STOPS)[:, P:]
    for row, other, end in zip(padded, tokens, ends, strict=True):
        assert (row[end + 1 :] == 49).all() and torch.equal(row[: end + 1], other[: end + 1])


def test_longest(ours):
    """Up to the model's last position."""
    assert ours.generate(prompts(2), max_new_tokens=34).shape == (2, 40)
    assert ours.generate(prompts(2), max_new_tokens=1, num_beams=3).shape == (2, 7)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_no_prompts(ours, num_beams):
    tokens = ours.generate(prompts()[:0], max_new_tokens=3, num_beams=num_beams)
    assert tokens.shape[0] == 0 and tokens.dtype == torch.int64


def test_more_beams_than_continuations(ours):
    """Of 50 tokens: beams that the first step can't fill."""
    tokens = ours.generate(prompts(2), max_new_tokens=3, num_beams=60)
    assert tokens.shape == (2, P + 3) and tokens.max() < V


@LIBRARY
@pytest.mark.parametrize("num_beams", [1, 3])
def test_one_op_a_token(both, recorder, num_beams):
    model = fastformer.accelerate(copy.deepcopy(both[0]))
    with recorder:
        model.generate(prompts(), left_padding(), max_new_tokens=7, num_beams=num_beams)
    names = recorder.names()
    assert names.count("fastformer_cpu::packed_layers") == 7 and "fastformer_cpu::packed_linear" not in names
    assert "fastformer_cpu::scaled_dot_product_attention" not in names
    heads = [args for func, args in recorder.calls if func.name() == "fastformer_cpu::packed_linear"]
    assert all(args[0].shape[1] == 1 for args in heads)  # logits of the last position alone


@LIBRARY
@pytest.mark.parametrize("options", [dict(weights="bfloat16"), dict(quantize="int8")], ids=str)
@pytest.mark.filterwarnings("ignore:fastformer.accelerate.*no instructions for 8-bit")
def test_narrow_weights(both, options):
    """Token by token as in one forward of the same model."""
    model = fastformer.accelerate(copy.deepcopy(both[0]), **options)
    tokens = model.generate(prompts(), max_new_tokens=10)
    with torch.no_grad():
        logits = model(tokens).logits[:, P - 1 : -1]
    chosen = logits.gather(-1, tokens[:, P:, None])[..., 0]
    assert (logits.max(-1).values - chosen <= 0.02 * logits.std()).all()  # equal but for 8-bit roundings of other rows


class TestKeyValueCache:
    def test_forward(self, ours):
        """In chunks, as in one call; the same cache comes back, and its memory stays where it is."""
        ids, mask = prompts(), left_padding()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, outputs, addresses = KeyValueCache(3, 10), [], set()
        with torch.no_grad():
            for begin, end in ((0, 3), (3, 4), (4, P)):
                out = ours(ids[:, begin:end], mask[:, :end], positions[:, begin:end], cache, use_cache=True)
                assert out.past_key_values is cache and cache.length == end
                outputs.append(out.logits)
                addresses |= {x.data_ptr() for layer in cache.layers for x in layer.memory}
            whole = ours(ids, mask, positions, use_cache=True)
        kept = mask.bool()
        torch.testing.assert_close(torch.cat(outputs, 1)[kept], whole.logits[kept], atol=1e-5, rtol=1e-5)
        assert len(addresses) == 6
        for layer, pair in zip(cache.layers, whole.past_key_values, strict=True):
            for x, y in zip(layer.memory, pair, strict=True):
                rows = kept[:, None, :, None].expand_as(y)
                torch.testing.assert_close(x[:, :, :P][rows], y[rows], atol=1e-5, rtol=1e-5)

    def test_select(self, ours):
        ids, cache = prompts(), KeyValueCache(3, 10)
        with torch.no_grad():
            ours(ids[:, :4], past_key_values=cache)
            cache.select(torch.tensor([2, 2, 5]))
            logits = ours(ids[[2, 2, 5], 4:], past_key_values=cache).logits
            torch.testing.assert_close(logits, ours(ids[[2, 2, 5]]).logits[:, 4:], atol=1e-5, rtol=1e-5)

    def test_errors(self, ours):
        ids, cache = prompts(), KeyValueCache(3, 7)
        with torch.no_grad():
            ours(ids, past_key_values=cache)
            with pytest.raises(ValueError, match="past_key_values has room for 7 tokens, got 6 and 2 more"):
                ours(ids[:, :2], past_key_values=cache)
            with pytest.raises(ValueError, match=r"past_key_values holds .* = \(8, 3, 8\).*, got \(2, 3, 8\)"):
                ours(ids[:2, :1], past_key_values=cache)
            with pytest.raises(ValueError, match="past_key_values must have 3 layers, got 2"):
                ours(ids, past_key_values=KeyValueCache(2, 7))
        with pytest.raises(ValueError, match="past_key_values: a KeyValueCache is written in place, .* torch.no_grad"):
            ours(ids, past_key_values=KeyValueCache(3, 7))

    def test_dtype(self):
        layer = LayerCache(4)
        layer.append(torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 3))
        with pytest.raises(ValueError, match="in torch.float32, got .* in torch.float64"):
            layer.append(*(torch.ones(1, 2, 1, 3, dtype=torch.float64) for _ in range(2)))


def test_logits_to_keep(ours):
    with torch.no_grad():
        whole, last = ours(prompts()).logits, ours(prompts(), logits_to_keep=2).logits
    torch.testing.assert_close(last, whole[:, -2:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="logits_to_keep must be 0 with labels, got 2"):
        ours(prompts(), labels=prompts(), logits_to_keep=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(ours, dtype):
    tokens = ours.to(dtype).generate(prompts(), max_new_tokens=5, num_beams=2)
    assert tokens.shape == (8, P + 5) and tokens.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens must be 1 or more, got 0"),
        (
            dict(max_new_tokens=35),
            "max_new_tokens must end within the model's 40 positions, got 35 after a prompt of 6",
        ),
        (dict(temperature=0.0), "temperature must be above 0 .*, got 0.0"),
        (dict(temperature=float("nan")), "temperature must be above 0"),
        (dict(top_k=0), "top_k must be 1 or more, got 0"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
        (dict(top_p=1.5), "top_p must be above 0 and at most 1, got 1.5"),
        (dict(num_beams=0), "num_beams must be 1 or more, got 0"),
        (dict(num_beams=2, temperature=1.0), "temperature must be None with num_beams=2"),
        (dict(num_beams=2, top_k=3), "top_k must be None with num_beams=2"),
        (dict(num_beams=2, on_token=print), "on_token must be None with num_beams"),
        (dict(stop_tokens=(3, 50)), "stop_tokens must be tokens of the vocabulary, 0 to 49, got 50"),
        (dict(attention_mask=torch.ones(8, P - 1)), r"attention_mask must have shape \(batch, length\) = \(8, 6\)"),
        (dict(attention_mask=left_padding().flip(1)), "attention_mask must keep the last token of each prompt"),
        (dict(input_ids=prompts()[0]), r"input_ids must have shape \(batch, length\) .*, got \(6,\)"),
        (dict(input_ids=prompts()[:, :0]), r"input_ids must have shape .* with a token or more, got \(8, 0\)"),
    ],
    ids=str,
)
def test_wrong_arguments(both, options, message):
    with pytest.raises(ValueError, match=message):
        both[0].generate(**{"input_ids": prompts(), "max_new_tokens": 5} | options)


def test_mask_in_floating_point(both):
    with pytest.raises(TypeError, match="attention_mask must be bool or integer"):
        both[0].generate(prompts(), torch.ones(8, P), max_new_tokens=5)
