"""The logits of language models in training, which wait until somebody looks: as if they were there all along."""

import copy
import gc
import io

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerated.small import assert_all_close, bert, gpt2, ids, reference_gpt
from torch import nn

import fastformer
from fastformer import library, models
from fastformer.integrations.logits import Logits, _Product, waiting

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the op library")
NSP = {"next_sentence_label": torch.arange(10) % 2}
MODELS = {
    "BertForMaskedLM": lambda: (bert(), {}),
    "BertForPreTraining": lambda: (bert("BertForPreTraining"), NSP),
    "BertLMHeadModel": lambda: (bert("BertLMHeadModel", is_decoder=True), {}),
    "GPT2LMHeadModel": lambda: (gpt2(), {}),
    "GPT2DoubleHeadsModel": lambda: (gpt2("GPT2DoubleHeadsModel"), {}),
    "reference BertForMaskedLM": lambda: (bert(library=models), {}),
    "reference BertForPreTraining": lambda: (bert("BertForPreTraining", library=models), NSP),
    "reference GptLMHeadModel": lambda: (reference_gpt(), {}),
}


def labels():
    """Half of the tokens have one."""
    kept = torch.rand(ids().shape, generator=torch.Generator().manual_seed(2)) < 0.5
    return ids().where(kept, -100)


def logits_of(outputs):
    return outputs.prediction_logits if hasattr(outputs, "prediction_logits") else outputs.logits


def is_pending(logits):
    return logits._product.output is None


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name):
    """By the accuracy rule; and the logits are never computed."""
    eager, more = MODELS[name]()
    runs = {}
    for kind in ("fused", "eager", "float64"):
        model = copy.deepcopy(eager).train()
        if kind == "float64":
            model.double()
        elif kind == "fused":
            fastformer.accelerate(model)
        outputs = model(input_ids=ids(), labels=labels(), **more)
        outputs.loss.backward()
        if kind == "fused":
            assert isinstance(logits_of(outputs), Logits)
            assert is_pending(logits_of(outputs))
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        runs[kind] = {"loss": outputs.loss.detach()} | gradients
    assert runs["fused"].keys() == runs["eager"].keys()
    assert_all_close(*runs.values())


@pytest.mark.parametrize("name", MODELS)
def test_whoever_looks_sees_them(name):
    """With their gradient, and whatever is done with them first."""
    eager, more = MODELS[name]()
    eager.train()
    fused = fastformer.accelerate(copy.deepcopy(eager))
    expected, outputs = (m(input_ids=ids(), labels=labels(), **more) for m in (eager, fused))
    logits, wanted = logits_of(outputs), logits_of(expected)
    assert (logits.shape, logits.dtype, logits.requires_grad) == (wanted.shape, wanted.dtype, True)
    torch.testing.assert_close(logits, wanted)
    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))
    for loss in (logits.logsumexp(-1).sum(), wanted.logsumexp(-1).sum()):
        loss.backward()
    for (n, p), q in zip(fused.named_parameters(), eager.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=n)


def test_not_where_nothing_is_trained():
    fused = fastformer.accelerate(gpt2().train())
    with torch.no_grad():
        assert type(fused(input_ids=ids(), labels=labels()).logits) is torch.Tensor
    fused.requires_grad_(False)
    assert type(fused(input_ids=ids(), labels=labels()).logits) is torch.Tensor
    with fastformer.backend("torch"):
        assert type(fused.requires_grad_()(input_ids=ids(), labels=labels()).logits) is torch.Tensor


def test_trainer_does_not_look(tmp_path, monkeypatch):
    """transformers' Trainer wants the loss alone."""
    pytest.importorskip("accelerate")
    looks = []
    monkeypatch.setattr(_Product, "compute", looks.append)
    rows = [{"input_ids": row, "labels": row} for row in ids()]
    arguments = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=5, num_train_epochs=1, report_to=[], save_strategy="no", use_cpu=True
    )
    transformers.Trainer(fastformer.accelerate(gpt2()), arguments, train_dataset=rows).train()
    assert not looks


@pytest.fixture
def operands():
    torch.manual_seed(0)
    return [torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 16), (100, 16), (100,))]


@pytest.fixture
def target():
    return torch.tensor([3, 99, -100, 0, 5, 7, -100, 8, 9, 20])


class TestLogits:
    @pytest.mark.parametrize(
        "options",
        [{}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 5}, {"label_smoothing": 0.1}]
        + [{"weight": torch.linspace(0.5, 2, 100)}],
    )
    def test_cross_entropy(self, operands, target, options):
        target = target.clamp(min=0) if "ignore_index" in options else target
        logits = waiting(*operands)
        loss = F.cross_entropy(logits.float().view(-1, 100), target, **options)
        expected = F.cross_entropy(F.linear(*operands).view(-1, 100), target, **options)
        torch.testing.assert_close(loss, expected)
        assert is_pending(logits)
        for ours, eager in zip(
            *(torch.autograd.grad(x.sum(), operands, retain_graph=True) for x in (loss, expected)), strict=True
        ):
            torch.testing.assert_close(ours, eager)

    def test_losses_as_modules_and_shifted(self, operands, target):
        logits = waiting(*operands)
        full = F.linear(*operands)
        for shift in (lambda x: x[:, :-1].flatten(0, -2), lambda x: x[..., :-1, :].contiguous().view(-1, x.size(-1))):
            loss = nn.CrossEntropyLoss()(shift(logits), target[:8])
            torch.testing.assert_close(loss, nn.CrossEntropyLoss()(shift(full), target[:8]))
        assert is_pending(logits)

    @pytest.mark.parametrize("index", [(0,), (slice(None), 1), (..., 3), (0, 1, 2), (..., slice(10)), (None,)])
    def test_other_indices(self, operands, index):
        torch.testing.assert_close(waiting(*operands)[index], F.linear(*operands)[index])

    def test_functions_of_autograd(self, operands):
        """They see the tensor as it is, and its gradient is that of the product."""

        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, grad):
                return grad * 2

        ours, eager = (
            torch.autograd.grad(Double.apply(x.view(-1, 100)).square().sum(), operands)
            for x in (waiting(*operands), F.linear(*operands))
        )
        for x, y in zip(ours, eager, strict=True):
            torch.testing.assert_close(x, y)

    def test_edits_in_place_reach_views_and_losses(self, operands, target):
        logits, full = waiting(*operands), F.linear(*operands)
        flat, flat_full = logits.view(-1, 100), full.view(-1, 100)
        for x in (logits, full):
            x[0] /= 3
        torch.testing.assert_close(F.cross_entropy(flat, target), F.cross_entropy(flat_full, target))
        torch.testing.assert_close(F.cross_entropy(logits.view(-1, 100), target), F.cross_entropy(flat_full, target))

    def test_they_print_save_and_convert(self, operands):
        logits, full = waiting(*operands), F.linear(*operands)
        assert repr(logits) == repr(full)
        assert logits.tolist() == full.tolist()
        file = io.BytesIO()
        torch.save(logits.detach(), file)
        file.seek(0)
        assert torch.equal(torch.load(file), full)
        assert (logits.detach().numpy() == full.detach().numpy()).all()

    def test_optimizer_step_comes_after_those_still_held(self, operands, target):
        """As a user who counts right answers at the end of the loop."""
        expected = F.linear(*operands).detach()
        logits = waiting(*operands)
        F.cross_entropy(logits.view(-1, 100), target).backward()
        torch.optim.AdamW([torch.zeros(2, requires_grad=True)], fused=True).step()  # of something else
        assert is_pending(logits)
        torch.optim.AdamW(operands, lr=0.1, fused=True).step()
        torch.testing.assert_close(logits.detach(), expected)

    def test_nobody_holds_them(self, operands, target, recorder):
        F.cross_entropy(waiting(*operands).view(-1, 100), target).backward()
        gc.collect()
        with recorder:
            torch.optim.AdamW(operands, lr=0.1, fused=True).step()
        assert "aten::addmm" not in recorder.names()

    def test_an_edit_by_hand_is_no_silent_change(self, operands):
        logits = waiting(*operands)
        with torch.no_grad():
            operands[1].mul_(2)
        with pytest.raises(RuntimeError, match="edited since"):
            logits.sum()
