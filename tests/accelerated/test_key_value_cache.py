"""GrowingLayer is transformers' DynamicLayer in all that it gives, and keeps what it has where it is."""

import copy
import gc
import pickle
import tracemalloc

import pytest
import torch
import transformers
from accelerated.small import VOCABULARY, B, S, gpt2, ids, padding
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

import fastformer
from fastformer import library
from fastformer.cli.measure import _resident
from fastformer.integrations.key_value_cache import GrowingLayer, growing_layers

H, D = 3, 8


def states(length: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(batch, H, length, D, dtype=dtype) for _ in range(2))


def pair(length: int = 5) -> tuple[GrowingLayer, DynamicLayer]:
    """The same keys and values in both."""
    layers = GrowingLayer(), DynamicLayer()
    given = states(length)
    for layer in layers:
        with torch.no_grad():
            layer.update(*given)
    return layers


def assert_same(growing: GrowingLayer, dynamic: DynamicLayer) -> None:
    assert growing.get_seq_length() == dynamic.get_seq_length()
    assert growing.get_mask_sizes(3) == dynamic.get_mask_sizes(3)
    assert growing.is_initialized == dynamic.is_initialized
    if dynamic.get_seq_length():
        assert growing.dtype == dynamic.dtype and growing.device == dynamic.device
        assert torch.equal(growing.keys, dynamic.keys) and torch.equal(growing.values, dynamic.values)


class TestLayer:
    @pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad mode"])
    def test_update(self, grad):
        growing, dynamic = GrowingLayer(), DynamicLayer()
        assert_same(growing, dynamic)
        with torch.set_grad_enabled(grad):
            for length in (3, 1, 1, 100, 1, 64, 0, 2):
                given = states(length)
                outputs = growing.update(*given), dynamic.update(*given)
                for x, y in zip(*outputs, strict=True):
                    assert torch.equal(x, y)
                assert_same(growing, dynamic)

    def test_memory_stays_until_it_is_full(self):
        layer, addresses = GrowingLayer(), []
        with torch.no_grad():
            for _ in range(1000):
                keys, _ = layer.update(*states(1))
                addresses.append(keys.data_ptr())
        moves = sum(x != y for x, y in zip(addresses[1:], addresses, strict=False))
        assert len(set(addresses[:64])) == 1 and moves <= 8  # half as much again each time
        assert layer.get_seq_length() == 1000

    def test_crop(self):
        growing, dynamic = pair(9)
        for removed in (-2, 0, -1):
            for layer in (growing, dynamic):
                layer.crop(removed)
            assert_same(growing, dynamic)
            given = states(3)  # in the place of what was cropped
            with torch.no_grad():
                for layer in (growing, dynamic):
                    layer.update(*given)
            assert_same(growing, dynamic)
        for layer in (growing, dynamic):
            layer.crop(-100)
        assert growing.get_seq_length() == dynamic.get_seq_length() == 0
        with pytest.raises(ValueError, match="positive"):
            growing.crop(3)
        GrowingLayer().crop(-1)

    def test_beams(self):
        growing, dynamic = pair()
        given = states(2, batch=6)
        for call in (
            lambda layer: layer.batch_repeat_interleave(3),
            lambda layer: layer.reorder_cache(torch.tensor([5, 0, 0, 2, 3, 3])),
            lambda layer: layer.update(*given),
            lambda layer: layer.batch_select_indices(torch.tensor([1, 4])),
            lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        ):
            with torch.no_grad():
                for layer in (growing, dynamic):
                    call(layer)
            assert_same(growing, dynamic)

    def test_beams_of_nothing(self):
        growing, dynamic = GrowingLayer(), DynamicLayer()
        for layer in (growing, dynamic):
            layer.batch_repeat_interleave(3)
            layer.reorder_cache(torch.tensor([0]))
        assert_same(growing, dynamic)

    def test_reset(self):
        growing, dynamic = pair()
        for layer in (growing, dynamic):
            layer.reset()
        assert_same(growing, dynamic)
        given = states(4, batch=5, dtype=torch.float64)  # another batch and dtype
        with torch.no_grad():
            for layer in (growing, dynamic):
                layer.update(*given)
        assert_same(growing, dynamic)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_copies_have_their_own_memory(self, copied):
        growing, dynamic = pair()
        new = copied(growing)
        assert_same(new, dynamic)
        with torch.no_grad():
            new.update(*states(1))
        assert_same(growing, dynamic)
        assert new.get_seq_length() == 6

    def test_views_are_not_written_over(self):
        """What update gave stays as it is while more is appended, whether or not memory moves."""
        layer, given, kept = GrowingLayer(), [], []
        with torch.no_grad():
            for _ in range(200):
                keys, values = layer.update(*states(1))
                given.append((keys, values))
                kept.append((keys.clone(), values.clone()))
        for x, y in zip(given, kept, strict=True):
            assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])

    @pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
    @pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad, torch.enable_grad])
    def test_modes(self, first, then):
        growing, dynamic = GrowingLayer(), DynamicLayer()
        for mode in (first, then, first):
            with mode():
                for _ in range(2):
                    given = states(2)
                    for layer in (growing, dynamic):
                        layer.update(*given)
                    assert_same(growing, dynamic)

    def test_gradients(self):
        """Keys that autograd has seen are not written over, when inference goes on with the same layer."""
        prefix = [x.requires_grad_() for x in states(3)]
        growing, dynamic = GrowingLayer(), DynamicLayer()
        gradients, more = [], states(2)
        for layer in (growing, dynamic):
            layer.update(*prefix)
            keys, values = layer.update(*more)
            loss = (keys.softmax(-1) * values.exp()).sum()
            with torch.no_grad():
                layer.crop(-2)
                layer.update(*states(2))
                layer.update(*states(1))
            gradients.append(torch.autograd.grad(loss, prefix))
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y)

    def test_other_lengths_of_keys_and_values(self):
        """As of a latent attention: concatenated, each with its own size."""
        growing, dynamic = GrowingLayer(), DynamicLayer()
        with torch.no_grad():
            for _ in range(3):
                given = torch.randn(2, H, 1, D), torch.randn(2, H, 1, 2 * D)
                for layer in (growing, dynamic):
                    layer.update(*given)
        assert_same(growing, dynamic)

    def test_from_a_dynamic_layer(self):
        """The layer itself goes on as one that grows; also one that holds nothing yet, and one in grad mode."""
        for length in (0, 5):
            dynamic, reference = DynamicLayer(), DynamicLayer()
            given = states(length)
            if length:
                for layer in (dynamic, reference):
                    layer.update(*given)
            growing = GrowingLayer.of(dynamic)
            assert growing is dynamic
            assert_same(growing, reference)
            with torch.no_grad():
                given = states(1)
                for layer in (growing, reference):
                    layer.update(*given)
            assert_same(growing, reference)

    def test_offload_and_prefetch(self):
        growing, dynamic = pair()
        growing.offload()
        growing.prefetch()
        assert_same(growing, dynamic)


class TestGrowingLayers:
    config = transformers.GPT2Config(n_layer=2)

    def test_dynamic_cache(self):
        for cache in (DynamicCache(config=self.config), DynamicCache()):
            layers = growing_layers(cache, 2)
            assert [*map(type, layers)] == [GrowingLayer] * 2 and layers == cache.layers
            assert growing_layers(cache, 2) == layers

    def test_other_numbers_of_layers(self):
        assert growing_layers(DynamicCache(config=self.config), 3) is None
        assert growing_layers(DynamicCache(config=self.config), 1) is None

    def test_other_caches(self):
        dynamic = DynamicCache(config=self.config)
        encoder_decoder = transformers.EncoderDecoderCache(DynamicCache(config=self.config), dynamic)
        sliding = DynamicCache(config=transformers.MistralConfig(num_hidden_layers=2, sliding_window=4))
        static = transformers.StaticCache(config=self.config, max_cache_len=30)
        own = type("OwnCache", (DynamicCache,), {})(config=self.config)  # as QuantizedCache
        offloading = DynamicCache(config=self.config)
        offloading.offloading = True
        for cache in (encoder_decoder, sliding, static, own, offloading, None):
            before = None if cache is None else [type(layer) for layer in getattr(cache, "layers", ())]
            assert growing_layers(cache, 2) is None
            assert before is None or [type(layer) for layer in getattr(cache, "layers", ())] == before


needs_library = pytest.mark.skipif(not library.available(), reason="needs the op library")


def step(model: nn.Module, cache: transformers.Cache, begin: int, end: int, mask: Tensor | None = None) -> Tensor:
    given = {} if mask is None else {"attention_mask": mask[:, :end]}
    with torch.no_grad():
        return model(input_ids=ids()[:, begin:end], past_key_values=cache, **given).logits


def runs(recorder) -> int:
    return recorder.names().count("fastformer_cpu::packed_layers")


@needs_library
@pytest.mark.parametrize("order", ["stock first", "fused first"])
@pytest.mark.parametrize("padded", [None, "left"])
def test_stock_and_fused_models_share_a_cache(order, padded, recorder):
    eager = gpt2()
    fused = fastformer.accelerate(copy.deepcopy(eager))
    models = (eager, fused, eager, fused) if order == "stock first" else (fused, eager, fused, eager)
    mask = padding(padded) if padded else None
    cache, reference = DynamicCache(config=eager.config), DynamicCache(config=eager.config)
    with recorder:
        for model, (begin, end) in zip(models, ((0, 5), (5, 6), (6, 9), (9, S)), strict=True):
            output, expected = step(model, cache, begin, end, mask), step(eager, reference, begin, end, mask)
            kept = slice(None) if mask is None else mask[:, begin:end].bool()
            torch.testing.assert_close(output[kept], expected[kept], atol=1e-5, rtol=1e-4)
    assert runs(recorder) == 2
    assert cache.get_seq_length() == reference.get_seq_length() == S


@needs_library
def test_crop_and_go_on(recorder):
    """As assisted generation does: a guess of several tokens, some of them taken back."""
    model = fastformer.accelerate(gpt2())
    cache = DynamicCache(config=model.config)
    with recorder:
        step(model, cache, 0, 9)
        cache.crop(-4)
        assert cache.get_seq_length() == 5
        output = step(model, cache, 5, S)
    assert runs(recorder) == 2
    torch.testing.assert_close(output, step(model, DynamicCache(config=model.config), 0, S)[:, 5:])


@needs_library
def test_a_prompt_that_is_continued_twice():
    """Each continuation has a copy of the cache."""
    model = fastformer.accelerate(gpt2())
    cache = DynamicCache(config=model.config)
    step(model, cache, 0, 5)
    copies = [copy.deepcopy(cache) for _ in range(2)]
    outputs = [step(model, one, 5, S) for one in copies]
    assert torch.equal(*outputs) and cache.get_seq_length() == 5


@needs_library
@pytest.mark.parametrize("name", ["static", "encoder-decoder"])
def test_other_caches_go_layer_by_layer(name, recorder):
    eager = gpt2()
    fused = fastformer.accelerate(copy.deepcopy(eager))

    def make() -> transformers.Cache:
        if name == "static":
            return transformers.StaticCache(config=eager.config, max_cache_len=30)
        dynamic = DynamicCache(config=eager.config)
        return transformers.EncoderDecoderCache(dynamic, DynamicCache(config=eager.config))

    caches = make(), make()
    with recorder:
        for begin, end in ((0, 5), (5, 6), (6, S)):
            output, expected = step(fused, caches[0], begin, end), step(eager, caches[1], begin, end)
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    assert runs(recorder) == 0


@needs_library
def test_caches_of_another_kind_of_tensor(recorder):
    """Keys in another dtype, or with gradients: not in one op, and as the stock model has it."""
    eager = gpt2().requires_grad_(False)
    fused = fastformer.accelerate(copy.deepcopy(eager))
    outputs = []
    for model in (fused, eager):
        cache = DynamicCache(config=eager.config)
        with torch.enable_grad():
            torch.manual_seed(3)
            prefix = torch.randn(B, 3, 2, 16, requires_grad=True)
            for layer in range(2):
                cache.update(prefix * 1.0, prefix * 2.0, layer)
        with recorder:
            outputs.append(step(model, cache, 0, S))
    assert runs(recorder) == 0
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


@needs_library
def test_inference_mode_and_no_grad_in_turn(recorder):
    model = fastformer.accelerate(gpt2())
    expected = step(model, DynamicCache(config=model.config), 0, S)
    for modes in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        cache, outputs = DynamicCache(config=model.config), []
        for i, (begin, end) in enumerate(((0, 5), (5, 6), (6, 8), (8, S))):
            with modes[i % 2](), recorder:
                outputs.append(model(ids()[:, begin:end], past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat([x.clone() for x in outputs], 1), expected, atol=1e-5, rtol=1e-4)
    assert runs(recorder) == 8


def generate_all(model: nn.Module, prompts: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(3)
    for i in range(prompts):
        prompt = torch.randint(3, VOCABULARY, (1 + i % 3, 1 + i % 7), generator=generator)
        mask = torch.ones_like(prompt)
        model.generate(prompt, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)


@needs_library
@pytest.mark.parametrize(
    ("prompts", "tokens"), [(20, 10), pytest.param(50, 40, marks=pytest.mark.slow)], ids=["short", "2,000 tokens"]
)
def test_memory_does_not_grow(prompts, tokens):
    """Neither tensors nor Python's objects nor the process, after ten prompts have warmed it up."""

    def tensors() -> tuple[int, int]:
        gc.collect()
        found = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
        return len(found), sum(x.untyped_storage().nbytes() for x in found)

    model = fastformer.accelerate(gpt2())
    generate_all(model, 10, tokens)
    tracemalloc.start()
    try:
        generate_all(model, 10, tokens)
        before, (objects, _), resident = tensors(), tracemalloc.get_traced_memory(), _resident("RssAnon")
        generate_all(model, prompts, tokens)
        after = tensors()
        assert after[0] <= before[0] and after[1] <= before[1]  # what other tests left may go meanwhile
        assert tracemalloc.get_traced_memory()[0] - objects < 200_000
    finally:
        tracemalloc.stop()
    now = _resident("RssAnon")
    assert now is None or now - resident < 8e6
