"""Packed weights are never older than the weights: every way to change one, and every way to lose the module."""

import copy
import io
import pickle
import threading

import pytest
import torch
from accelerated.small import MODELS, bert, gpt2, ids, logits, packed_modules
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fastformer
from fastformer import library, packing

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the op library")


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    """Accelerated, in eval mode, after an inference."""
    model = fastformer.accelerate(MODELS[request.param]())
    assert_fresh(model)
    assert packed_modules(model)
    return model


def assert_fresh(model: nn.Module) -> Tensor:
    """Fused and stock forward of the same modules agree: nothing fused runs on older weights."""
    fused = logits(model)
    with fastformer.backend("torch"):
        stock = logits(model)
    torch.testing.assert_close(fused, stock, atol=1e-5 * max(1, stock.abs().max().item()), rtol=1e-4)
    return fused


def assert_changes(model: nn.Module, change) -> None:
    before = logits(model)
    change()
    after = assert_fresh(model)
    assert not torch.allclose(before, after, atol=1e-3)


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices of the layers, biases and layer-norms apart, and none of the embeddings."""
    return {
        name: p
        for name, p in model.named_parameters()
        if p.dim() == 2 and "embeddings" not in name and ".wte" not in name and ".wpe" not in name
    }


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(input_ids=ids(), labels=ids()).loss.backward()
    optimizer.step()


OPTIMIZERS = {
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, fused=True),
    "foreach AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, foreach=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
}


@pytest.mark.parametrize("training", [True, False], ids=["train mode", "eval mode"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_step(model, optimizer, training):
    stepper = OPTIMIZERS[optimizer](model.parameters())

    def change():
        model.train(training)
        train_step(model, stepper)
        model.eval()

    assert_changes(model, change)
    assert_changes(model, change)


@pytest.mark.parametrize("model", ["bert", "gpt2"], indirect=True)
def test_optimizer_step_that_changes_one_element(model):
    """No version counter moves, and no sample sees it."""
    weight = next(
        p for name, p in model.named_parameters() if name.endswith(("intermediate.dense.weight", "c_fc.weight"))
    )

    def change():
        weight.grad = torch.zeros_like(weight)
        weight.grad[3, 5] = 1
        torch.optim.AdamW([weight], lr=30.0, weight_decay=0.0, fused=True).step()

    assert_changes(model, change)


def test_fused_adamw_moves_no_version_counter():
    """Why optimizer steps are counted."""
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    before = weight._version
    torch.optim.AdamW([weight], fused=True).step()
    assert weight._version == before and not torch.equal(weight, torch.ones(4))


def edit_in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(1.5)


def edit_one_element(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[3, 5] += 30


def edit_data(weight: nn.Parameter) -> None:
    weight.data.mul_(1.5)


def merge_lora(weight: nn.Parameter) -> None:
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(*shape, generator=generator) for shape in ((2, weight.shape[1]), (weight.shape[0], 2)))
    weight.data += b @ a * 0.3


def assign_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 1.5


@pytest.mark.parametrize("edit", [edit_in_place, edit_one_element, edit_data, merge_lora, assign_data])
def test_edit_of_one_weight(model, edit):
    for weight in weights(model).values():
        assert_changes(model, lambda weight=weight: edit(weight))


def test_edit_of_vectors(model):
    """Biases and layer-norms are used as they are, edited through .data too."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not name.endswith(("key.bias", "seq_relationship.bias")):
            before = logits(model)
            parameter.data += torch.randn(parameter.shape)
            assert not torch.equal(before, assert_fresh(model)), name


def test_edit_of_all_weights_at_once(model):
    assert_changes(
        model, lambda: vector_to_parameters(parameters_to_vector(model.parameters()) * 1.1, model.parameters())
    )


def test_new_parameter(model):
    for name, weight in weights(model).items():
        owner, _, attribute = name.rpartition(".")

        def change(owner=owner, attribute=attribute, weight=weight):
            setattr(model.get_submodule(owner), attribute, nn.Parameter(weight.detach() * 1.5))

        assert_changes(model, change)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(model, assign):
    other = {name: tensor * 1.1 for name, tensor in model.state_dict().items() if tensor.is_floating_point()}

    def change():
        model.load_state_dict(other, strict=False, assign=assign)
        assert not packed_modules(model)

    assert_changes(model, change)


def test_other_dtype_and_back(model):
    before = logits(model)
    model.to(torch.float64)
    assert not packed_modules(model)
    exact = logits(model)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(before.double(), exact, atol=1e-4, rtol=1e-4)
    assert_fresh(model.to(torch.float32))


def test_train_drops_them(model):
    model.train()
    assert not packed_modules(model)
    model.eval()
    assert_fresh(model)
    for module in model.modules():
        module.training = True  # as train() would, but by hand
    model(input_ids=ids())
    assert not packed_modules(model)


def test_deepcopy_has_its_own(model):
    copied = copy.deepcopy(model)
    assert not packed_modules(copied) and packed_modules(model)
    torch.testing.assert_close(assert_fresh(copied), logits(model))
    original = logits(model)
    assert_changes(copied, lambda: edit_in_place(next(iter(weights(copied).values()))))
    torch.testing.assert_close(logits(model), original, rtol=0, atol=0)


def test_pickle_holds_none(model):
    expected = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    for data in (pickle.dumps(model), buffer.getvalue()):
        assert b"fastformer_packed" not in data
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-4)


def test_state_dict_holds_none(model):
    stock = fastformer.restore(copy.deepcopy(model)).state_dict()
    state = model.state_dict()
    assert [*state] == [*stock]
    for name in state:
        assert torch.equal(state[name], stock[name])


def test_repack_is_for_single_elements_edited_through_data():
    model = fastformer.accelerate(gpt2())
    before = logits(model)
    weight = model.transformer.h[0].mlp.c_fc.weight
    weight.data[3, 5] += 30  # no counter moves and no sample sees it
    fastformer.repack(model)
    assert not packed_modules(model)
    assert not torch.allclose(before, assert_fresh(model), atol=1e-3)


@pytest.mark.skipif(len(library.isas()) < 2, reason="this machine runs one instruction set")
def test_instruction_set_changes(model):
    used = library.isa()
    try:
        for isa in library.isas():
            torch.ops.fastformer_cpu.set_isa(isa)
            assert_fresh(model)
    finally:
        torch.ops.fastformer_cpu.set_isa(used)


def test_inference_tensors():
    with torch.inference_mode():
        model = fastformer.accelerate(bert())
        weight = model.bert.encoder.layer[0].attention.self.query.weight
        assert weight.is_inference()
        before = model(input_ids=ids()).logits
        weight.mul_(1.5)
        fused = model(input_ids=ids()).logits
        with fastformer.backend("torch"):
            stock = model(input_ids=ids()).logits
        torch.testing.assert_close(fused, stock, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(before, fused, atol=1e-3)


def test_packed_under_inference_mode_used_without():
    model = fastformer.accelerate(bert())
    with torch.inference_mode():
        model(input_ids=ids())
    assert_fresh(model)


def test_two_threads_meet_a_fresh_model():
    model = fastformer.accelerate(bert(num_hidden_layers=6))
    with fastformer.backend("torch"):
        expected = logits(model)
    barrier, outputs = threading.Barrier(4), [None] * 4

    def run(i: int) -> None:
        barrier.wait()
        outputs[i] = logits(model)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output in outputs:
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


def test_a_backend_per_thread():
    model = fastformer.accelerate(bert())
    results = {}
    with fastformer.backend("torch"):
        thread = threading.Thread(target=lambda: results.update(fused=logits(model)))
        thread.start()
        thread.join()
        assert packed_modules(model)  # by the other thread
        results["stock"] = logits(model)
    fastformer.restore(model)
    torch.testing.assert_close(results["stock"], logits(model), rtol=0, atol=0)


def test_gradients_use_the_weights_as_they_are(model):
    """Neither with gradients nor under autocast is anything packed."""
    fastformer.repack(model)
    model(input_ids=ids()).logits.sum().backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids())
    assert not packed_modules(model)


def test_frozen_weights_are_packed_with_grad_mode_on(model):
    fastformer.repack(model.requires_grad_(False))
    assert not model(input_ids=ids()).logits.requires_grad
    assert packed_modules(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, monkeypatch):
    monkeypatch.setattr(library, "multiplies_bfloat16", lambda: False)
    model = fastformer.accelerate(bert().to(dtype))
    before = logits(model)
    assert before.dtype == dtype and packed_modules(model)
    model.bert.encoder.layer[0].intermediate.dense.weight.data.mul_(2)
    assert not torch.equal(before, logits(model))


def test_bfloat16_where_torch_is_faster(monkeypatch):
    monkeypatch.setattr(library, "multiplies_bfloat16", lambda: True)
    model = fastformer.accelerate(bert().bfloat16())
    logits(model)
    assert not any(packing.kept(module).panels for module in packed_modules(model))
