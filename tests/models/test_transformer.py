"""The encoder-decoder Transformer: as torch.nn.Transformer with the same weights, saved and loaded, accelerated; what
it generates, as a search over whole sequences without a cache finds it."""

import copy
from pathlib import Path

import pytest
import torch
from accuracy import assert_close_to_reference
from torch import Tensor, nn

import fastformer
from fastformer import library, models
from fastformer.models import TransformerConfig, TransformerForConditionalGeneration
from fastformer.models.transformer import sinusoids

PAD, BOS, EOS = 0, 1, 2
SIZES = dict(vocab_size=23, d_model=48, nhead=3, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=80)
LENGTHS, TARGETS = torch.tensor([7, 3, 1, 5]), torch.tensor([4, 6, 2, 6])
needs_library = pytest.mark.skipif(not library.available(), reason="needs the op library")
both_norms = pytest.mark.parametrize("norm_first", [False, True])


def small(**options) -> TransformerForConditionalGeneration:
    torch.manual_seed(0)
    model = TransformerForConditionalGeneration(TransformerConfig(**{**SIZES, "dropout": 0.0, **options}))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and layer-norms that do something, logits that are no tie
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    kept = torch.arange(7) < LENGTHS[:, None]
    labelled = torch.arange(6) < TARGETS[:, None]
    source = torch.randint(3, 23, (4, 7)).where(kept, PAD)
    target = torch.randint(3, 23, (4, 6)).where(torch.arange(6) < TARGETS[:, None] - 1, EOS).where(labelled, -100)
    return {"input_ids": source, "attention_mask": kept, "labels": target}


def torch_transformer(model: TransformerForConditionalGeneration) -> nn.Transformer:
    """torch's, with the same weights, in float64."""
    config = model.config
    theirs = nn.Transformer(
        config.d_model, config.nhead, config.num_encoder_layers, config.num_decoder_layers, config.dim_feedforward,
        0.0, config.activation, batch_first=True, norm_first=config.norm_first, dtype=torch.float64,
    )  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part in ("encoder", "decoder"):
            state[f"{part}.layers.{rest}"] = value
        elif part.endswith("_norm"):
            state[f"{part.removesuffix('_norm')}.norm.{rest}"] = value
    for name in [name for name in state if ".q_proj." in name]:
        parts = [state.pop(name.replace("q_proj.", f"{x}_proj.")) for x in "qkv"]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    if not config.norm_first:  # torch's post-norm has one more at the end
        theirs.encoder.norm = theirs.decoder.norm = None
    theirs.load_state_dict(state)
    return theirs.eval()


def torch_logits(
    model: TransformerForConditionalGeneration, theirs: nn.Transformer, source: Tensor, kept: Tensor, target: Tensor
) -> Tensor:
    """In float64; target: what the decoder reads."""
    table, scale = model.embedding.weight.double(), model.config.d_model**0.5
    embedded = [table[x] * scale for x in (source, target)]
    embedded = [x + sinusoids(0, x.float()).double() for x in embedded]
    causal = nn.Transformer.generate_square_subsequent_mask(target.size(1), dtype=torch.float64)
    masks = {"src_key_padding_mask": ~kept, "memory_key_padding_mask": ~kept}
    return theirs(*embedded, tgt_mask=causal, tgt_is_causal=True, **masks) @ table.T


@both_norms
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_as_torch_transformer(norm_first: bool, activation: str) -> None:
    """Logits, and the smoothed loss with all its gradients."""
    model, given = small(norm_first=norm_first, activation=activation), batch()
    labels = given["labels"]
    read = torch.cat([torch.full((4, 1), BOS), labels[:, :-1].clamp(min=PAD)], 1)
    with torch.no_grad():
        expected = torch_logits(model, torch_transformer(model), given["input_ids"], given["attention_mask"], read)
        exact = copy.deepcopy(model).double()
        out = exact(given["input_ids"], given["attention_mask"], decoder_input_ids=read)
        assert out.loss is None
        torch.testing.assert_close(out.logits, expected, rtol=1e-9, atol=1e-6)  # positions are computed in float32
        loss = nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    assert model(**given).loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_positions() -> None:
    """Section 3.5 of the paper, number by number, from any begin on."""
    like = torch.empty(5, 7, dtype=torch.float64)
    for t in range(5):
        for i in range(7):
            angle = torch.tensor((3 + t) / 10000 ** (2 * (i // 2) / 7))
            expected = angle.sin() if i % 2 == 0 else angle.cos()
            assert sinusoids(3, like)[t, i].item() == pytest.approx(expected.item(), abs=1e-6)


def test_padding_says_nothing() -> None:
    model, given = small(), batch()
    with torch.no_grad():
        memory = model.decode(torch.full((4, 1), BOS), *_encoded(model, given))
        given["input_ids"] = given["input_ids"].where(given["attention_mask"], 9)
        torch.testing.assert_close(model.decode(torch.full((4, 1), BOS), *_encoded(model, given)), memory)
        short = given["input_ids"][1:2, :3]
        alone = model.decode(torch.tensor([[BOS]]), model.encode(short, None), None)
        torch.testing.assert_close(memory[1:2], alone, rtol=1e-4, atol=1e-5)


def _encoded(model: TransformerForConditionalGeneration, given: dict[str, Tensor]) -> tuple:
    mask = model.mask(given["input_ids"], given["attention_mask"])
    return model.encode(given["input_ids"], mask), mask


@both_norms
@pytest.mark.parametrize("accelerated", [False, pytest.param(True, marks=needs_library)])
def test_cached_decoding(norm_first: bool, accelerated: bool) -> None:
    """A token at a time, on kept keys and values: the states of the whole target at once."""
    model, given = small(norm_first=norm_first), batch()
    if accelerated:
        fastformer.accelerate(model, strict=True)
    tokens = torch.randint(3, 23, (4, 6))
    with torch.no_grad():
        memory, mask = _encoded(model, given)
        whole = model.decode(tokens, memory, mask)
        cache = models.generation.KeyValueCache(2, 6)
        kept = [layer.multihead_attn.key_value(memory) for layer in model.decoder]
        steps = [model.decode(tokens[:, i : i + 1], kept, mask, cache) for i in range(6)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def likeliest(model: TransformerForConditionalGeneration, source: Tensor, length: int, beams: int) -> list[int]:
    """Greedy or beam search for one source in plain Python, on torch's Transformer in float64 and without a cache."""
    running, ended, theirs = [([], 0.0)], [], torch_transformer(model)
    for count in range(1, length + 1):
        candidates = []
        for tokens, score in running:
            kept = torch.ones_like(source, dtype=torch.bool)
            logits = torch_logits(model, theirs, source, kept, torch.tensor([[BOS, *tokens]]))[0, -1]
            for token, log_p in enumerate(logits.log_softmax(-1).tolist()):
                candidates.append(([*tokens, token], score + log_p))
        candidates.sort(key=lambda pair: -pair[1])
        if beams == 1:
            running = candidates[:1]
            if running[0][0][-1] == EOS:
                break
            continue
        stops = [(t, s / count) for t, s in candidates[:beams] if t[-1] == EOS or count == length]
        ended = sorted(ended + stops, key=lambda pair: -pair[1])[:beams]
        running = [pair for pair in candidates[: 2 * beams] if pair[0][-1] != EOS][:beams]
        if len(ended) == beams and running[0][1] / count <= ended[-1][1]:
            break
    return running[0][0] if beams == 1 else ended[0][0]


def half_trained() -> tuple[TransformerForConditionalGeneration, dict[str, Tensor]]:
    """A model that is of several minds about what comes next, and when to stop."""
    model, given = small(norm_first=True), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        model(**given).loss.backward()
        optimizer.step()
    return model, given


def test_beams_find_what_greedy_does_not() -> None:
    """Else the test of both would say little."""
    model, given = half_trained()
    found = [model.generate(given["input_ids"], given["attention_mask"], max_new_tokens=8, num_beams=n) for n in (1, 3)]
    assert found[0].tolist() != found[1].tolist()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("accelerated", [False, pytest.param(True, marks=needs_library)])
def test_generate(accelerated: bool, beams: int) -> None:
    """Padded and batched, it finds what a search for each source alone does; padding follows an end."""
    model, given = half_trained()
    with torch.no_grad():
        expected = [
            likeliest(model, source[None, :length], 8, beams)
            for source, length in zip(given["input_ids"], LENGTHS.tolist(), strict=True)
        ]
    if accelerated:
        fastformer.accelerate(model, strict=True)
    generated = model.generate(given["input_ids"], given["attention_mask"], max_new_tokens=8, num_beams=beams)
    longest = max(map(len, expected))
    assert generated.tolist() == [tokens + [PAD] * (longest - len(tokens)) for tokens in expected]
    assert len({len(tokens) for tokens in expected}) > 1


@needs_library
@both_norms
def test_accelerated(norm_first: bool) -> None:
    """Everything is fused; logits, loss and gradients follow the accuracy rule, in training and in inference."""
    given = batch()
    read = given["labels"].clamp(min=PAD)
    eager = small(norm_first=norm_first)
    exact, fused = copy.deepcopy(eager).double(), fastformer.accelerate(copy.deepcopy(eager), strict=True)
    assert not fastformer.report(fused).left
    source = given["input_ids"], given["attention_mask"]
    with torch.no_grad(), fastformer.backend("cpu", strict=True):
        logits = fused(*source, read).logits
    with torch.no_grad():
        assert_close_to_reference(logits, eager(*source, read).logits, exact(*source, read).logits)
    gradients = []
    for model in (fused, eager, exact):
        loss = model.train()(**given).loss
        loss.backward()
        modules = {name: list(m.parameters(recurse=False)) for name, m in model.named_modules()}
        # Weight and bias together: that of the bias of the keys is exactly 0.
        joined = {name: torch.cat([p.grad.flatten() for p in own]) for name, own in modules.items() if own}
        gradients.append({"loss": loss.detach(), **joined})
    for name in gradients[0]:
        assert_close_to_reference(*(g[name] for g in gradients), name)
    fastformer.restore(fused)
    assert all(torch.equal(x, y) for x, y in zip(fused.parameters(), eager.parameters(), strict=True))


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, given = small(norm_first=True, activation="silu"), batch()
    model.save_pretrained(tmp_path)
    loaded = models.load(tmp_path)
    assert type(loaded) is type(model) and loaded.config == model.config
    assert loaded.lm_head.weight is loaded.embedding.weight
    torch.testing.assert_close(loaded(**given).loss, model(**given).loss, rtol=0, atol=0)


def test_dropout_and_initial_weights() -> None:
    """In training it drops; the first logits of a new model say nearly nothing."""
    model, given = TransformerForConditionalGeneration(TransformerConfig(**SIZES)), batch()
    assert not torch.equal(model(**given).loss, model(**given).loss)
    assert model.eval()(**given).loss.item() == pytest.approx(torch.tensor(23.0).log().item(), rel=0.25)
    assert not model.embedding.weight[PAD].any()


def test_errors() -> None:
    model, source = small(n_positions=8), torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="decoder_input_ids must be given"):
        model(source)
    with pytest.raises(ValueError, match=r"attention_mask must have shape .* = \(2, 3\)"):
        model(source, source[:, :2], source)
    with pytest.raises(TypeError, match="attention_mask must be bool"):
        model(source, source.float(), source)
    with pytest.raises(ValueError, match="within the model's 8 positions"):
        model(source.repeat(1, 3), None, source)
    with pytest.raises(ValueError, match="max_new_tokens must be 1 to 8, got 9"):
        model.generate(source, max_new_tokens=9)
    with pytest.raises(ValueError, match="num_beams must be 1 or more, got 0"):
        model.generate(source, max_new_tokens=2, num_beams=0)
    with pytest.raises(ValueError, match="multiple of the number of heads"):
        TransformerConfig(d_model=10, nhead=3)
