"""fastformer.nn against torch.nn: the same weights, the same inputs, judged against float64."""

import copy
import pickle

import pytest
import torch
from accuracy import assert_close_to_reference
from nn.agreement import assert_all_close_to_reference
from torch import Tensor

import fastformer
from fastformer import nn, reference

B, S, SOURCE, E, HEADS, HIDDEN = 3, 17, 13, 48, 3, 100
LAYERS = {
    "encoder": (nn.EncoderLayer, torch.nn.TransformerEncoderLayer),
    "decoder": (nn.DecoderLayer, torch.nn.TransformerDecoderLayer),
}
layers = pytest.mark.parametrize("kind", LAYERS)
norm_first = pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])


def pair(kind: str, **options):
    """Ours and torch's with the same weights, in which biases and layer norms are not 0 and 1; without dropout."""
    arguments = {"d_model": E, "nhead": HEADS, "dim_feedforward": HIDDEN, "dropout": 0.0, **options}
    ours, theirs = (cls(**{"batch_first": True, **arguments}) for cls in LAYERS[kind])
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(kind: str) -> tuple[Tensor, ...]:
    """(src,) or (tgt, memory), batch first."""
    lengths = (S,) if kind == "encoder" else (S, SOURCE)
    return tuple(torch.randn(B, length, E, requires_grad=True) for length in lengths)


def padding(length: int) -> Tensor:
    """(B, length) bool, True = ignore: the batch's sequences end 0, 1, ... before the longest."""
    return torch.arange(length) >= length - torch.arange(B)[:, None]


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def as_double(x):
    return x.detach().double().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def results(layer, inputs: tuple[Tensor, ...], masks: dict, weight: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of `(output * weight).sum()`."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    output = layer(*inputs, **masks)
    (output * weight).sum().backward()
    gradients = {f"grad of input {i}": x.grad for i, x in enumerate(inputs)}
    gradients |= {f"grad of {name}": p.grad for name, p in layer.named_parameters()}
    return {"output": output.detach(), **gradients}


def assert_agree(ours, theirs, inputs, masks, their_masks=None) -> None:
    """Forward and backward; `theirs` is eager PyTorch in the same dtype and, in a copy, the float64 reference."""
    their_masks = masks if their_masks is None else their_masks
    weight = torch.randn_like(inputs[0])
    out = results(ours, inputs, masks, weight)
    eager = results(theirs, inputs, their_masks, weight)
    masks64 = {name: as_double(mask) for name, mask in their_masks.items()}
    ref64 = results(copy.deepcopy(theirs).double(), tuple(map(as_double, inputs)), masks64, as_double(weight))
    assert_all_close_to_reference(out, eager, ref64)


@layers
@norm_first
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_forward_and_gradients(kind, norm_first, activation, bias):
    ours, theirs = pair(kind, norm_first=norm_first, activation=activation, bias=bias, layer_norm_eps=1e-3)
    assert_agree(ours, theirs, inputs(kind), {})


@norm_first
@pytest.mark.parametrize(
    "masks",
    [
        {"src_key_padding_mask": padding(S)},
        {"src_mask": causal(S)},
        {"src_mask": causal(S), "src_key_padding_mask": padding(S)},
        {"src_mask": torch.randn(S, S)},
        {"src_mask": torch.randn(B * HEADS, S, S)},
        {"src_mask": torch.randn(B * HEADS, S, S) < -1},
        {"src_key_padding_mask": torch.randn(B, S)},
        {"src_mask": torch.randn(S, S), "src_key_padding_mask": torch.where(padding(S), -torch.inf, 0.0)},
    ],
    ids=["padding", "causal", "causal_padding", "float", "float_heads", "bool_heads", "float_padding", "float_both"],
)
def test_encoder_masks(norm_first, masks):
    ours, theirs = pair("encoder", norm_first=norm_first)
    assert_agree(ours, theirs, inputs("encoder"), masks)


@norm_first
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_is_causal_needs_no_mask(norm_first, padded):
    ours, theirs = pair("encoder", norm_first=norm_first)
    masks = {"src_key_padding_mask": padding(S)} if padded else {}
    assert_agree(ours, theirs, inputs("encoder"), {"is_causal": True, **masks}, {"src_mask": causal(S), **masks})


def test_is_causal_beside_a_mask_is_applied():
    ours, theirs = pair("encoder")
    near = (torch.arange(S)[:, None] - torch.arange(S)).abs() > 2  # True = ignore
    assert_agree(ours, theirs, inputs("encoder"), {"src_mask": near, "is_causal": True}, {"src_mask": near | causal(S)})


@norm_first
def test_decoder_masks(norm_first):
    ours, theirs = pair("decoder", norm_first=norm_first)
    masks = {"tgt_key_padding_mask": padding(S), "memory_key_padding_mask": padding(SOURCE)}
    assert_agree(ours, theirs, inputs("decoder"), {"tgt_is_causal": True, **masks}, {"tgt_mask": causal(S), **masks})
    memory_masks = {"tgt_mask": causal(S), "memory_mask": torch.randn(S, SOURCE)}
    assert_agree(ours, theirs, inputs("decoder"), memory_masks)
    seen = {"memory_mask": causal(S)[:, :SOURCE]}
    assert_agree(ours, theirs, inputs("decoder"), {"memory_is_causal": True}, seen)


def test_padding_reaches_nothing():
    layer, _ = pair("encoder", norm_first=True)
    (src,) = inputs("encoder")
    changed = torch.where(padding(S)[..., None], torch.randn_like(src), src)
    kept = ~padding(S)
    one, other = (layer(x, src_key_padding_mask=padding(S)) for x in (src, changed))
    assert torch.equal(one[kept], other[kept]) and not torch.equal(one, other)


@layers
def test_rows_without_a_key_are_finite(kind):
    layer, _ = pair(kind)
    nobody = torch.ones(B, S, dtype=torch.bool)
    name = "src_key_padding_mask" if kind == "encoder" else "tgt_key_padding_mask"
    got = results(layer, inputs(kind), {name: nobody}, torch.randn(B, S, E))
    assert all(x.isfinite().all() for x in got.values())


@layers
@norm_first
def test_eval(kind, norm_first):
    """In inference torch.nn takes its own fused path; dropout is off in both."""
    ours, theirs = pair(kind, norm_first=norm_first, activation="gelu", dropout=0.5)
    ours.eval(), theirs.eval()
    x = inputs(kind)
    with torch.no_grad():
        out, eager = ours(*x), theirs(*x)
        ref64 = theirs.double()(*(x.double() for x in x))
    assert_close_to_reference(out, eager, ref64)


@layers
@pytest.mark.parametrize("batched", [True, False], ids=["sequence_first", "unbatched"])
def test_other_layouts(kind, batched):
    ours, theirs = pair(kind, batch_first=False)
    x = tuple(x.transpose(0, 1) if batched else x[1] for x in inputs(kind))
    name = "src_key_padding_mask" if kind == "encoder" else "tgt_key_padding_mask"
    assert_agree(ours, theirs, x, {name: padding(S) if batched else padding(S)[1]})


@layers
@norm_first
def test_bfloat16(kind, norm_first):
    ours, theirs = (layer.bfloat16() for layer in pair(kind, norm_first=norm_first, activation="gelu"))
    assert_agree(ours, theirs, tuple(x.detach().bfloat16() for x in inputs(kind)), {})


@norm_first
def test_autocast_keeps_the_residual_in_float32(norm_first):
    ours, theirs = pair("encoder", norm_first=norm_first, activation="gelu")
    (src,) = inputs("encoder")
    ref64 = copy.deepcopy(theirs).double()(src.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, eager = ours(src), theirs(src)
    assert out.dtype == torch.float32
    assert_close_to_reference(out, eager, ref64)


def test_activations_torch_nn_does_not_name():
    for activation, function in {"gelu_tanh": torch.nn.GELU("tanh"), "silu": torch.nn.SiLU()}.items():
        theirs = torch.nn.TransformerEncoderLayer(E, HEADS, HIDDEN, 0.0, function, batch_first=True)
        ours = nn.EncoderLayer(E, HEADS, HIDDEN, 0.0, activation, batch_first=True)
        ours.load_state_dict(theirs.state_dict())
        assert_agree(ours, theirs, inputs("encoder"), {})


@layers
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_state_dict_both_ways(kind, bias):
    ours, theirs = pair(kind, bias=bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    fresh_ours, fresh_theirs = pair(kind, bias=bias)
    fresh_theirs.load_state_dict(ours.state_dict())
    fresh_ours.load_state_dict(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(fresh_theirs.state_dict()[name], value), name
        assert torch.equal(fresh_ours.state_dict()[name], value), name


@layers
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_parameters_in_the_order_and_with_the_initial_values_of_torch(kind, bias):
    built = []
    for cls in LAYERS[kind]:
        torch.manual_seed(3)
        built.append(list(cls(E, HEADS, HIDDEN, bias=bias).named_parameters()))
    assert [name for name, _ in built[0]] == [name for name, _ in built[1]]
    for (name, ours), (_, theirs) in zip(*built, strict=True):
        assert torch.equal(ours, theirs), name


def test_stands_in_a_torch_transformer():
    """torch.nn.Transformer hands float masks and hints of causality down to its layers."""
    (encoder, theirs_encoder), (decoder, theirs_decoder) = pair("encoder"), pair("decoder")
    ours, theirs = (
        torch.nn.Transformer(
            batch_first=True, d_model=E, nhead=HEADS,
            custom_encoder=torch.nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False),
            custom_decoder=torch.nn.TransformerDecoder(decoder, 2),
        )
        for encoder, decoder in ((encoder, decoder), (theirs_encoder, theirs_decoder))
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    masks = {"src_key_padding_mask": padding(SOURCE), "memory_key_padding_mask": padding(SOURCE)}
    masks["tgt_mask"] = causal(S)
    source, target = torch.randn(B, SOURCE, E), torch.randn(B, S, E)
    out, eager = ours(source, target, **masks), theirs(source, target, **masks)
    assert_close_to_reference(out, eager, theirs.double()(source.double(), target.double(), **masks))


@layers
@norm_first
def test_dropout_follows_manual_seed(kind, norm_first):
    layer, _ = pair(kind, norm_first=norm_first, dropout=0.3)
    x = inputs(kind)

    def run(seed):
        torch.manual_seed(seed)
        return layer(*x)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    layer.eval()
    assert torch.equal(run(1), run(2))


@layers
@norm_first
def test_dropout_is_that_of_the_reference(kind, norm_first):
    """The torch backend draws the same seeds for the same masks."""
    layer, _ = pair(kind, norm_first=norm_first, dropout=0.3)
    x, weight = inputs(kind), torch.randn(B, S, E)

    def run(layer, x, weight):
        torch.manual_seed(1)
        return results(layer, x, {}, weight)

    out = run(copy.deepcopy(layer), x, weight)
    with fastformer.backend("torch"):
        eager = run(copy.deepcopy(layer), x, weight)
        ref64 = run(layer.double(), tuple(map(as_double, x)), weight.double())
    assert_all_close_to_reference(out, eager, ref64)


@layers
@norm_first
def test_every_dropout_is_there(kind, norm_first):
    """Each draws one seed: probabilities and output of each attention, hidden activation and output of the network."""
    layer, _ = pair(kind, norm_first=norm_first, dropout=0.3)
    x = inputs(kind)
    torch.manual_seed(1)
    layer(*x)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    for _ in range(4 if kind == "encoder" else 6):
        reference.draw_seed(torch.device("cpu"))
    assert torch.equal(after, torch.get_rng_state())


@layers
def test_dropout_of_everything_leaves_the_residual(kind):
    x = inputs(kind)
    layer, _ = pair(kind, norm_first=True, dropout=1.0)
    assert torch.equal(layer(*x), x[0])
    layer, _ = pair(kind, norm_first=False, dropout=1.0)
    norms = [layer.norm1, layer.norm2] if kind == "encoder" else [layer.norm1, layer.norm2, layer.norm3]
    assert torch.allclose(layer(*x), torch.nn.Sequential(*norms)(x[0]))


@layers
def test_deepcopy_and_pickle(kind):
    layer, _ = pair(kind, norm_first=True)
    x = inputs(kind)
    expected = layer(*x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(*x), expected)
        assert all(p is not q for p, q in zip(copied.parameters(), layer.parameters(), strict=True))


@layers
@norm_first
def test_compiles_without_a_graph_break(kind, norm_first):
    layer, _ = pair(kind, norm_first=norm_first, dropout=0.3)
    x, weight = inputs(kind), torch.randn(B, S, E)
    masks = {"is_causal": True, "src_key_padding_mask": padding(S)}
    if kind == "decoder":
        masks = {"tgt_is_causal": True, "memory_key_padding_mask": padding(SOURCE)}
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    got = {}
    for name, module in (("eager", layer), ("compiled", compiled)):
        torch.manual_seed(1)
        got[name] = results(module, x, masks, weight)
    for (what, eager), compiled in zip(got["eager"].items(), got["compiled"].values(), strict=True):
        torch.testing.assert_close(compiled, eager, msg=lambda m, what=what: f"{what}: {m}")


def test_repr_names_what_was_asked_for():
    text = repr(nn.EncoderLayer(E, HEADS, HIDDEN, activation="gelu", norm_first=True))
    assert "activation='gelu', norm_first=True" in text and "SelfAttention(" in text and f"{E}, {HEADS}" in text


@pytest.mark.parametrize(
    "options, text",
    [
        ({"nhead": 5}, "embed_dim: expected a multiple of num_heads, got 48 for 5 heads"),
        ({"nhead": 0}, "embed_dim: expected a multiple of num_heads, got 48 for 0 heads"),
        ({"dropout": 1.5}, "dropout: expected a probability from 0 to 1, got 1.5"),
        ({"activation": "swish"}, "activation: expected one of .*'gelu'.*, got 'swish'"),
        ({"activation": torch.nn.functional.relu}, "activation: expected one of .*'relu'.*, got <function relu"),
    ],
)
@layers
def test_construction_errors(kind, options, text):
    with pytest.raises(ValueError, match=text):
        LAYERS[kind][0](**{"d_model": E, "nhead": HEADS, **options})


def test_call_errors():
    layer, _ = pair("encoder")
    src = torch.randn(B, S, E)
    with pytest.raises(TypeError, match=r"key_padding_mask: expected bool \(True = ignore\).*, got torch.int64"):
        layer(src, src_key_padding_mask=torch.ones(B, S, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"key_padding_mask: expected shape \(3, 17\), got \(17, 3\)"):
        layer(src, src_key_padding_mask=torch.ones(S, B, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attn_mask: expected shape \(17, 17\) or \(9, 17, 17\), got \(1, 17, 16\)"):
        layer(src, torch.ones(1, S, S - 1, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"memory: expected \(batch, length, 48\) or \(length, 48\), got \(3, 13, 47\)"
    ):
        pair("decoder")[0](src, torch.randn(B, SOURCE, E - 1))
    with pytest.raises(ValueError, match=r"input: expected \(length, batch, 48\) or \(length, 48\), got \(48,\)"):
        nn.SelfAttention(E, HEADS)(torch.randn(E))
