"""Small random models of both libraries, and the accuracy rule over all the results of an accelerated one."""

import copy
from collections.abc import Callable

import torch
import transformers
from accuracy import assert_close_to_reference
from torch import Tensor, nn

import fastformer
from fastformer import models, packing

B, S, VOCABULARY = 10, 13, 60
LENGTHS = torch.tensor([5, S, 9, 1, 7, S, 3, 12, 2, 11])
BERT = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=80,
    max_position_embeddings=40,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
GPT2 = dict(
    vocab_size=VOCABULARY,
    n_embd=48,
    n_layer=2,
    n_head=3,
    n_positions=64,
    bos_token_id=1,
    eos_token_id=2,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)


def bert(architecture: str = "BertForMaskedLM", library=transformers, **config) -> nn.Module:
    return spread(getattr(library, architecture)(library.BertConfig(**{**BERT, **config})))


def gpt2(architecture: str = "GPT2LMHeadModel", **config) -> nn.Module:
    return spread(getattr(transformers, architecture)(transformers.GPT2Config(**{**GPT2, **config})))


def reference_gpt(architecture: str = "GptLMHeadModel", **config) -> nn.Module:
    return spread(getattr(models, architecture)(models.GptConfig(**{**GPT2, **config})))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "gpt2": gpt2,
    "reference bert": lambda: bert(library=models),
    "reference gpt": reference_gpt,
}


def spread(model: nn.Module) -> nn.Module:
    """Every parameter matters: biases and layer norms are not 0 and 1 either."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def ids(batch: int = B, length: int = S) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(side: str) -> Tensor:
    """(B, S) of 1 and 0"""
    mask = (torch.arange(S) < LENGTHS[:, None]).long()
    return mask.flip(1) if side == "left" else mask


def packed_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if packing.kept(module) is not None]


def logits(model: nn.Module, **inputs) -> Tensor:
    with torch.no_grad():
        return model(**({"input_ids": ids()} | inputs)).logits


def assert_agrees(model: nn.Module, results: Callable[[nn.Module], dict[str, Tensor]], dtype=torch.float32) -> None:
    """The accelerated model's results are as close to those of a float64 copy as the stock model's."""
    model = model.to(dtype)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    fused = fastformer.accelerate(model)
    assert not fastformer.report(fused).left
    runs = [results(m) for m in (fused, eager, exact)]
    assert runs[0].keys() == runs[1].keys() == runs[2].keys() and runs[0]
    assert_all_close(*runs)


def assert_all_close(out: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """The largest error of all results, each relative to its own size, judged as one: in tensors as small as these the
    largest error of one is luck. What is 0 but for rounding, as the gradient of the keys' bias, has no size of its own:
    it is held against the largest result."""
    for name in out:
        assert out[name].shape == eager[name].shape, name
    exponents = {name: x.abs().max().frexp().exponent for name, x in exact.items()}  # a power of two divides exactly
    largest = max(exponents.values())
    exponents = {name: largest if e < largest - 40 else e for name, e in exponents.items()}
    joined = (torch.cat([x[name].ldexp(-exponents[name]).flatten() for name in out]) for x in (out, eager, exact))
    assert_close_to_reference(*joined, "of all results together, the largest")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
