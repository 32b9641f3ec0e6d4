"""All layers in one op: when a model takes it, when it must not, and the stock model's results either way."""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from accelerated.small import MODELS, B, S, assert_agrees, gpt2, ids, logits, padding
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastformer
from fastformer import library, packing

pytestmark = pytest.mark.skipif(not library.available(), reason="needs the op library")

Changes = dict[str, Callable[[nn.Module], object]]


@pytest.fixture
def stacked(recorder) -> Callable[..., int]:
    """How often a call with these inputs ran all layers in one op; its logits are the stock forward's."""

    def call(model: nn.Module, **inputs) -> int:
        before = recorder.names().count("fastformer_cpu::packed_layers")
        with recorder:
            output = logits(model, **inputs)
        with fastformer.backend("torch"):
            expected = logits(model, **inputs)
        kept = inputs.get("attention_mask", torch.ones(1)).bool()
        if kept.dim() == 2:
            output, expected = output[kept], expected[kept]
        torch.testing.assert_close(output, expected, atol=1e-5 * max(1, expected.abs().max().item()), rtol=1e-4)
        return recorder.names().count("fastformer_cpu::packed_layers") - before

    return call


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return fastformer.accelerate(MODELS[request.param]())


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.bert.encoder.layer


def attention_of(layer: nn.Module) -> nn.Module:
    return layer.attn if hasattr(layer, "attn") else layer.attention.self


def dense_of(layer: nn.Module) -> nn.Module:
    """The second of the feed-forward network."""
    return layer.mlp.c_proj if hasattr(layer, "mlp") else layer.output.dense


def norms_of(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    return (
        (layer.ln_1, layer.ln_2)
        if hasattr(layer, "ln_1")
        else (layer.attention.output.LayerNorm, layer.output.LayerNorm)
    )


@pytest.mark.parametrize("padded", [None, "left", "right"])
def test_one_op_for_all_layers(model, stacked, padded):
    inputs = {"attention_mask": padding(padded)} if padded else {}
    assert stacked(model, **inputs) == 1
    assert stacked(model, **inputs) == 1
    if padded:
        assert stacked(model) == 1


def bend(x: Tensor) -> Tensor:
    """What no layer-norm takes back."""
    return x * torch.linspace(1, 3, x.shape[-1])


def bend_output(module: nn.Module, args, output):
    return bend(output) if isinstance(output, Tensor) else (bend(output[0]), *output[1:])


def bend_input(module: nn.Module, args):
    return bend(args[0]), *args[1:]


def with_own_forward(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda *args, **kwargs: bend_output(module, args, original(*args, **kwargs))


class Bent(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return bend(super().forward(x))


def replace_dense(model: nn.Module) -> None:
    layer = layers_of(model)[1]
    hidden, width = (layer.mlp.c_fc if hasattr(layer, "mlp") else layer.intermediate.dense, norms_of(layer)[0])
    out_features, in_features = width.normalized_shape[0], hidden.bias.shape[0]
    owner = layer.mlp if hasattr(layer, "mlp") else layer.output
    setattr(owner, "c_proj" if hasattr(layer, "mlp") else "dense", Bent(in_features, out_features))


def change_scale(model: nn.Module) -> None:
    attention = attention_of(layers_of(model)[0])
    if hasattr(attention, "scaling"):
        attention.scaling *= 2
    else:
        norms_of(layers_of(model)[0])[1].eps = 0.5


def change_one_eps(model: nn.Module) -> None:
    norms_of(layers_of(model)[1])[0].eps = 0.5


def narrow_layer(model: nn.Module) -> None:
    """40 hidden features in the place of 80 or 192."""
    layer = layers_of(model)[1]
    width = norms_of(layer)[0].normalized_shape[0]
    make = (lambda x, y: Conv1D(y, x)) if isinstance(dense_of(layer), Conv1D) else nn.Linear
    if hasattr(layer, "mlp"):
        layer.mlp.c_fc, layer.mlp.c_proj = make(width, 40).eval(), make(40, width).eval()
    else:
        layer.intermediate.dense, layer.output.dense = nn.Linear(width, 40).eval(), nn.Linear(40, width).eval()


STOPPED: Changes = {
    "hook on a layer": lambda m: layers_of(m)[1].register_forward_hook(bend_output),
    "pre-hook on a layer": lambda m: layers_of(m)[0].register_forward_pre_hook(bend_input),
    "hook on attention": lambda m: attention_of(layers_of(m)[1]).register_forward_hook(bend_output),
    "hook on a linear": lambda m: dense_of(layers_of(m)[0]).register_forward_hook(bend_output),
    "hook on a layer-norm": lambda m: norms_of(layers_of(m)[0])[0].register_forward_hook(bend_output),
    "own forward of a layer": lambda m: with_own_forward(layers_of(m)[1]),
    "own forward of attention": lambda m: with_own_forward(attention_of(layers_of(m)[1])),
    "replaced linear": replace_dense,
    "fewer hidden features": narrow_layer,
    "scale": change_scale,
    "eps of one layer-norm": change_one_eps,
}  # fmt: skip


@pytest.mark.parametrize("change", STOPPED)
def test_layers_that_must_be_called(model, stacked, change):
    """Seen whether it is there before the first inference or comes later."""
    late = copy.deepcopy(model)
    before = logits(late)
    for one in (model, late):
        STOPPED[change](one)
        assert stacked(one) == stacked(one, attention_mask=padding("right")) == 0
    assert not torch.allclose(logits(late), before, atol=1e-3)


def test_hooks_that_are_gone(model, stacked):
    handle = layers_of(model)[1].register_forward_hook(bend_output)
    assert stacked(model) == 0
    handle.remove()
    assert stacked(model) == 1


def edit(parameter_of: Callable[[nn.Module], nn.Parameter], through_data: bool) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        parameter = parameter_of(layers_of(model)[1])
        with torch.no_grad():
            (parameter.data if through_data else parameter).mul_(1.5).add_(0.3)

    return change


def new_parameter(name: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        dense = dense_of(layers_of(model)[0])
        setattr(dense, name, nn.Parameter(getattr(dense, name).detach() * 1.5 + 0.3))

    return change


def change_all_eps(model: nn.Module) -> None:
    norms = [norm for layer in layers_of(model) for norm in norms_of(layer)]
    if hasattr(model, "transformer"):
        norms.append(model.transformer.ln_f)
    for norm in norms:
        norm.eps = 0.5


def change_activations(model: nn.Module) -> None:
    for layer in layers_of(model):
        if hasattr(layer, "mlp"):
            layer.mlp.act = nn.ReLU().eval()
        else:
            layer.intermediate.intermediate_act_fn = nn.ReLU().eval()


def swap_layers(model: nn.Module) -> None:
    layers = layers_of(model)
    layers[0], layers[1] = layers[1], layers[0]
    for i, layer in enumerate(layers):
        attention_of(layer).layer_idx = i


def remove_layer(model: nn.Module) -> None:
    del layers_of(model)[1]
    if isinstance(model, transformers.PreTrainedModel):  # the number of layers of its cache
        model.config.num_hidden_layers = 1


FOLLOWED: Changes = {
    "weight": edit(lambda layer: dense_of(layer).weight, through_data=False),
    "weight.data": edit(lambda layer: dense_of(layer).weight, through_data=True),
    "bias": edit(lambda layer: dense_of(layer).bias, through_data=False),
    "bias.data": edit(lambda layer: dense_of(layer).bias, through_data=True),
    "weight of a layer-norm": edit(lambda layer: norms_of(layer)[0].weight, through_data=True),
    "new weight": new_parameter("weight"),
    "new bias": new_parameter("bias"),
    "eps of all layer-norms": change_all_eps,
    "all activations": change_activations,
    "order of layers": swap_layers,
    "fewer layers": remove_layer,
    "load_state_dict": lambda m: m.load_state_dict({name: x * 1.1 for name, x in m.state_dict().items()}),
}


@pytest.mark.parametrize("change", FOLLOWED)
def test_what_changes_is_followed(model, stacked, change):
    assert stacked(model) == 1
    before = logits(model)
    FOLLOWED[change](model)
    assert stacked(model) == 1
    assert not torch.allclose(logits(model), before, atol=1e-3)


def test_dtype_and_back(model, stacked):
    assert stacked(model) == 1
    with fastformer.backend("torch"):
        expected = logits(model.double())
    torch.testing.assert_close(logits(model), expected, atol=1e-9, rtol=1e-9)
    assert stacked(model) == stacked(model.float()) == 1


def test_training_and_gradients(model, recorder):
    def count(*contexts) -> int:
        with recorder:
            model(input_ids=ids())
        return recorder.names().count("fastformer_cpu::packed_layers")

    assert count() == 0  # grad mode
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert count() == 0
        with fastformer.backend("torch"):
            assert count() == 0
        model.train()
        assert count() == 0
        layers_of(model.eval())[0].train()
        assert count() == 0
        model.eval()
        assert count() == 1


def test_deepcopy_and_restore(model, stacked):
    assert stacked(model) == 1
    copied = copy.deepcopy(model)
    edit(lambda layer: dense_of(layer).weight, through_data=True)(copied)
    assert stacked(copied) == 1
    expected = logits(model)
    fastformer.restore(model)
    assert stacked(model) == 0
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_outputs_of_each_layer(name, stacked):
    """They come from the layers, called one by one; the next call that wants none is one op again."""
    eager = MODELS[name]()
    model = fastformer.accelerate(copy.deepcopy(eager))
    eager.set_attn_implementation("eager")  # the others give no attentions
    for wanted in ("output_hidden_states", "output_attentions"):
        assert stacked(model) == 1
        assert stacked(model, **{wanted: True}) == 0
        with torch.no_grad():
            output, expected = (getattr(m(ids(), **{wanted: True}), wanted[7:]) for m in (model, eager))
        assert len(output) == len(expected) >= 2
        for x, y in zip(output, expected, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
    assert stacked(model) == 1
    model.config.output_hidden_states = True
    assert stacked(model) == 0


def four_dimensional() -> Tensor:
    return (torch.ones(S, S).tril().bool() & padding("right")[:, None, None].bool()).expand(B, 1, S, S)


CALLS = {  # of GPT-2: which inputs run in one op
    "position_ids and mask": (1, dict(position_ids=torch.arange(S)[None] + 3, attention_mask=padding("left"))),
    "float mask": (1, dict(attention_mask=padding("left").float())),
    "no cache": (1, dict(use_cache=False)),
    "last logits": (1, dict(logits_to_keep=1)),
    "4D mask": (0, dict(attention_mask=four_dimensional())),
    "additive 4D mask": (0, dict(attention_mask=torch.zeros(B, 1, S, S).masked_fill(~four_dimensional(), -1e9))),
    "both directions": (0, dict(is_causal=False)),
    "position_ids alone": (0, dict(position_ids=torch.cat([torch.arange(5), torch.arange(S - 5)])[None])),
    "token types": (0, dict(token_type_ids=torch.ones_like(ids()))),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_calls_of_gpt2(stacked, call):
    expected, inputs = CALLS[call]
    model = fastformer.accelerate(gpt2())
    if call in ("float mask", "last logits", "4D mask", "additive 4D mask"):  # shapes that `stacked` can't mask
        with fastformer.backend("torch"):
            stock = logits(model, **inputs)
        kept = four_dimensional()[:, 0].any(1) if "4D" in call else padding("left").bool()
        kept = slice(None) if call == "last logits" else kept
        torch.testing.assert_close(logits(model, **inputs)[kept], stock[kept], atol=1e-5, rtol=1e-4)
    else:
        assert stacked(model, **inputs) == expected


def test_bidirectional_layers(stacked):
    model = fastformer.accelerate(gpt2())
    assert stacked(model) == 1
    for block in model.transformer.h:
        block.attn.is_causal = False
    assert stacked(model) == 0


@pytest.mark.parametrize(
    "config", [dict(scale_attn_by_inverse_layer_idx=True), dict(reorder_and_upcast_attn=True)], ids=str
)
def test_configs_that_one_op_has_no_place_for(stacked, config):
    assert stacked(fastformer.accelerate(gpt2(**config))) == (1 if "reorder_and_upcast_attn" in config else 0)


@pytest.mark.parametrize("use_cache", [False, True])
def test_config_use_cache(stacked, use_cache):
    model = fastformer.accelerate(gpt2(use_cache=use_cache))
    assert stacked(model) == 1
    with torch.no_grad():
        cache = model(ids()).past_key_values
    assert (cache is not None) == use_cache and (not use_cache or cache.get_seq_length() == S)


def test_tuples():
    model = fastformer.accelerate(gpt2())
    eager = fastformer.restore(copy.deepcopy(model))
    for inner in (lambda m: m, lambda m: m.transformer):
        with torch.no_grad():
            output, expected = (inner(m)(ids(), return_dict=False) for m in (model, eager))
        assert isinstance(output, tuple) and len(output) == len(expected)
        torch.testing.assert_close(output[0], expected[0], atol=1e-5, rtol=1e-4)


def test_a_cache_that_is_given_but_not_wanted(recorder):
    """use_cache=False with a cache: it is read and written, and not returned."""
    model = fastformer.accelerate(gpt2())
    with torch.no_grad():
        cache = model(ids()[:, :5]).past_key_values
        with recorder:
            output = model(ids()[:, 5:], past_key_values=cache, use_cache=False)
        assert output.past_key_values is None and cache.get_seq_length() == S
        assert "fastformer_cpu::packed_layers" not in recorder.names()
        torch.testing.assert_close(output.logits, model(ids()).logits[:, 5:], atol=1e-5, rtol=1e-4)


def other_final_norm(model: nn.Module) -> None:
    model.transformer.ln_f = nn.Identity()


@pytest.mark.parametrize(
    "change",
    [
        other_final_norm,
        lambda m: m.transformer.ln_f.register_forward_hook(bend_output),
        lambda m: m.transformer.drop.register_forward_hook(bend_output),
        lambda m: setattr(m.transformer.ln_f, "eps", 0.5),
    ],
    ids=["another module", "hook on the last norm", "hook on the dropout", "eps of the last norm"],
)
@pytest.mark.parametrize("late", [False, True])
def test_what_stands_around_the_layers(stacked, change, late):
    model = fastformer.accelerate(gpt2())
    if late:
        assert stacked(model) == 1
    change(model)
    assert stacked(model) == 0


def replace_head(model: nn.Module) -> None:
    model.lm_head = nn.Linear(48, 60, bias=True).eval()


HEADS: Changes = {  # what leaves the head out of the op, if not the layers
    "hook": lambda m: m.lm_head.register_forward_hook(bend_output),
    "own forward": lambda m: with_own_forward(m.lm_head),
    "another module": lambda m: setattr(m, "lm_head", Bent(48, 60, bias=False).eval()),
    "a linear that is not swapped": replace_head,
}


@pytest.mark.parametrize("make", [gpt2, MODELS["reference gpt"]], ids=["gpt2", "reference gpt"])
class TestHeads:
    @pytest.fixture
    def ops(self, recorder):
        def of(model: nn.Module, **inputs) -> tuple[int, int]:
            """How often all layers, and products on their own, ran."""
            before = recorder.names()
            with recorder, torch.no_grad():
                model(ids(), **inputs)
            names = recorder.names()[len(before) :]
            return names.count("fastformer_cpu::packed_layers"), names.count("fastformer_cpu::packed_linear")

        return of

    @pytest.mark.parametrize("keep", [0, 1, 4, S, S + 3])
    def test_in_the_same_op(self, make, ops, keep):
        model = fastformer.accelerate(make())
        assert ops(model, logits_to_keep=keep) == (1, 0)
        output = logits(model, logits_to_keep=keep)
        with fastformer.backend("torch"):
            expected = logits(model, logits_to_keep=keep)
        assert output.shape == expected.shape
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("change", HEADS)
    @pytest.mark.parametrize("late", [False, True])
    def test_heads_that_must_be_called(self, make, ops, stacked, change, late):
        model = fastformer.accelerate(make())
        if late:
            assert ops(model) == (1, 0)
        before = logits(model)
        HEADS[change](model)
        assert stacked(model) == 1 and ops(model) == (1, change in ("hook", "own forward"))
        assert not torch.allclose(logits(model), before, atol=1e-3)

    def test_the_model_without_its_head(self, make, ops):
        """One stack serves both, whichever is asked for first."""
        model = fastformer.accelerate(make())
        assert ops(model.transformer) == (1, 0)
        assert ops(model) == (1, 0)
        both = packing.kept(model.transformer)
        assert ops(model.transformer) == ops(model) == (1, 0) and packing.kept(model.transformer) is both
        handle = model.transformer.register_forward_hook(lambda *args: None)
        assert ops(model) == (1, 1)  # the hook is to be called
        handle.remove()
        assert ops(model) == (1, 0)

    def test_tied_weights_stay_tied(self, make, ops):
        model = fastformer.accelerate(make())
        embedding = model.transformer.wte.weight
        assert ops(model) == (1, 0) and model.lm_head.weight is embedding
        with torch.no_grad():
            embedding.mul_(2)
        with fastformer.backend("torch"):
            expected = logits(model)
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
        assert ops(model) == (1, 0)


def test_labels_and_chosen_logits(stacked):
    """Of GPT-2: a loss, and the positions that a tensor names, come from the head on its own."""
    model = fastformer.accelerate(gpt2())
    assert stacked(model, labels=ids()) == stacked(model, logits_to_keep=torch.tensor([3, 1])) == 1
    with torch.no_grad():
        loss = model(ids(), labels=ids()).loss
        with fastformer.backend("torch"):
            torch.testing.assert_close(loss, model(ids(), labels=ids()).loss, atol=1e-5, rtol=1e-4)


def test_warning_of_padding_without_a_mask(caplog):
    model = fastformer.accelerate(gpt2(pad_token_id=0))
    prompt = ids()
    prompt[0, 0] = 0
    transformers.utils.logging.enable_propagation()
    try:
        transformers.modeling_utils.logger.warning_once.cache_clear()
        logits(model, input_ids=prompt)
    finally:
        transformers.utils.logging.disable_propagation()
    assert "attention_mask" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_accuracy(name, dtype):
    """By the rule, in one op and padded on either side."""

    def results(model: nn.Module) -> dict[str, Tensor]:
        masks = {side: padding(side) for side in ("left", "right")}
        outputs = {side: logits(model, attention_mask=mask)[mask.bool()] for side, mask in masks.items()}
        return outputs | {"whole": logits(model), "one": logits(model, input_ids=ids()[:1, :1])}

    assert_agrees(MODELS[name](), results, dtype)
