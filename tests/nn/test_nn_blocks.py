"""The parts that people build with: LayerNorm, Linear, FeedForward, SelfAttention, CrossAttention."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_close_to_reference
from nn.agreement import assert_all_close_to_reference
from torch import Tensor
from torch.nn.utils import parametrizations, prune

from fastformer import backends, nn

B, S, SOURCE, E, HEADS, HIDDEN = 2, 6, 5, 16, 4, 24


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def assert_agree(ours, theirs, *inputs: Tensor) -> None:
    """The outputs of two modules and the gradients of their parameters; `theirs` is judged in float64, too."""
    got = []
    for module, dtype in (
        (ours, torch.float32),
        (theirs, torch.float32),
        (copy.deepcopy(theirs).double(), torch.double),
    ):
        output = module(*(x.to(dtype) for x in inputs))
        output.square().sum().backward()
        got.append({"output": output.detach(), **{f"gradient {i}": p.grad for i, p in enumerate(module.parameters())}})
    assert_all_close_to_reference(*got)


@pytest.mark.parametrize(
    "arguments",
    [(E,), ((S, E), 1e-3), (E, 1e-5, False), (E, 1e-5, True, False)],
    ids=["one_dim", "two_dims", "not_affine", "no_bias"],
)
def test_layer_norm_is_a_drop_in(arguments):
    theirs, ours = randomize(torch.nn.LayerNorm(*arguments)), nn.LayerNorm(*arguments)
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    if list(theirs.parameters()):
        assert_agree(ours, theirs, torch.randn(B, S, E))
    else:
        x = torch.randn(B, S, E)
        assert_close_to_reference(ours(x), theirs(x), theirs(x.double()))


def test_layer_norm_adds_a_residual():
    norm = randomize(nn.LayerNorm(E))
    x, residual = torch.randn(B, S, E), torch.randn(B, S, E)
    normalized, s = norm(x, residual)
    assert torch.equal(s, x + residual)
    assert_close_to_reference(normalized, norm(s), torch.nn.LayerNorm.forward(copy.deepcopy(norm).double(), s.double()))
    _, dropped = norm(x, residual, 0.5)
    ratio = (dropped - residual) / x
    assert ((ratio.abs() < 1e-3) | ((ratio - 2).abs() < 1e-3)).all() and 0.2 < (ratio > 1).float().mean() < 0.8
    with pytest.raises(ValueError, match="dropout_p: expected 0 without a residual, got 0.5"):
        norm(x, dropout_p=0.5)


def test_linear_is_a_drop_in():
    theirs, ours = torch.nn.Linear(E, HIDDEN), nn.Linear(E, HIDDEN)
    ours.load_state_dict(theirs.state_dict())
    assert_agree(ours, theirs, torch.randn(B, S, E))


class EagerFeedForward(torch.nn.Module):
    def __init__(self, ours: nn.FeedForward):
        super().__init__()
        self.linear1, self.linear2 = torch.nn.Linear(E, HIDDEN), torch.nn.Linear(HIDDEN, E)
        self.load_state_dict(ours.state_dict())

    def forward(self, input, residual):
        return self.linear2(F.gelu(self.linear1(input))) + residual


def test_feed_forward():
    ours = randomize(nn.FeedForward(E, HIDDEN, dropout=0.0))
    assert_agree(ours, EagerFeedForward(ours), torch.randn(B, S, E), torch.randn(B, S, E))


def test_feed_forward_drops_in_training_only():
    module = nn.FeedForward(E, HIDDEN, dropout=0.5)
    x = torch.randn(B, S, E)
    assert not torch.equal(module(x), module(x))
    assert (module(x) == 0).float().mean() > 0.2  # of the output itself
    module.eval()
    assert torch.equal(module(x), module(x))


def test_feed_forward_drops_the_hidden_activation():
    module = nn.FeedForward(E, HIDDEN, dropout=0.5, activation="relu")
    with torch.no_grad():
        module.linear1.weight.zero_(), module.linear1.bias.fill_(1)  # the hidden activation is 1
        module.linear2.weight.fill_(1 / HIDDEN), module.linear2.bias.zero_()  # and the output its mean
    output = module(torch.randn(B, S, E))
    kept = output[output != 0]
    assert 0 < len(kept) < output.numel() and kept.std() > 0.1
    module.eval()
    torch.testing.assert_close(module(torch.randn(B, S, E)), torch.ones(B, S, E))


def test_attention_drops_probabilities():
    module = randomize(nn.SelfAttention(E, HEADS, dropout=1.0))
    x = torch.randn(S, B, E)
    torch.testing.assert_close(module(x), module.out_proj.bias.expand(S, B, E))
    module.eval()
    assert not torch.allclose(module(x), module.out_proj.bias)


class Adapter(torch.nn.Module):
    """A low-rank update beside a linear layer, whose weight it shows as its own (as in LoRA)."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base = base
        self.down, self.up = torch.nn.Linear(base.in_features, 2), torch.nn.Linear(2, base.out_features)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, input):
        return self.base(input) + self.up(self.down(input))


def test_an_adapter_is_not_passed_over(monkeypatch):
    monkeypatch.setattr(backends, "_said", set())
    module = randomize(nn.FeedForward(E, HIDDEN, dropout=0.0))
    eager = EagerFeedForward(module)
    module.linear1, eager.linear1 = Adapter(module.linear1), Adapter(eager.linear1)
    eager.load_state_dict(module.state_dict())
    with pytest.warns(UserWarning, match="linear1 or linear2 has hooks or another forward"):
        assert_agree(module, eager, torch.randn(B, S, E), torch.randn(B, S, E))
    assert module.linear1.up.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("hook", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"])
def test_hooks_on_the_linear_layers_run(hook):
    module = nn.FeedForward(E, HIDDEN, dropout=0.0)
    x = torch.randn(B, S, E, requires_grad=True)
    expected, calls = module(x), []
    handle = getattr(module.linear2, f"register_{hook}")(lambda *args: calls.append(hook))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = module(x)
    output.sum().backward()
    assert calls == [hook]
    torch.testing.assert_close(output, expected)
    handle.remove()
    module(x).sum().backward()
    assert calls == [hook]


def test_parametrized_and_pruned_weights_are_used():
    module, x = nn.FeedForward(E, HIDDEN, dropout=0.0), torch.randn(B, S, E)
    parametrizations.weight_norm(module.linear1)
    with torch.no_grad():
        expected = module(x)
        module.linear1.parametrizations.weight.original0.mul_(2)
        assert not torch.allclose(module(x), expected)
    module(x).sum().backward()
    assert module.linear1.parametrizations.weight.original0.grad.abs().sum() > 0
    prune.l1_unstructured(module.linear2, "weight", amount=0.5)  # its mask is applied by a hook
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.linear2.weight_orig.add_(1)
        eager = F.linear(F.gelu(F.linear(x, module.linear1.weight, module.linear1.bias)),
                         module.linear2.weight_orig * module.linear2.weight_mask, module.linear2.bias)  # fmt: skip
        torch.testing.assert_close(module(x), eager)


def attention_pair(ours_class, **options):
    theirs = randomize(torch.nn.MultiheadAttention(E, HEADS, batch_first=True, **options))
    ours = ours_class(E, HEADS, batch_first=True, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_attention_is_that_of_torch(bias):
    class Eager(torch.nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, query, key=None):
            key = query if key is None else key
            return self.attention(query, key, key, need_weights=False)[0]

    ours, theirs = attention_pair(nn.SelfAttention, bias=bias)
    assert_agree(ours, Eager(theirs), torch.randn(B, S, E))
    ours, theirs = attention_pair(nn.CrossAttention, bias=bias)
    assert_agree(ours, Eager(theirs), torch.randn(B, S, E), torch.randn(B, SOURCE, E))


def test_meta_device_then_reset():
    """How large models are built: parameters without memory, filled afterwards."""
    layer = nn.EncoderLayer(E, HEADS, HIDDEN, device="meta").to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
    assert layer.self_attn.in_proj_bias.abs().sum() == 0 and layer(torch.randn(S, B, E)).isfinite().all()
