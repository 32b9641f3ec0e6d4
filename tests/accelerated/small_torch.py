"""Small modules of torch.nn with inputs and masks for them."""

import torch
from accelerated.small import gradients, spread
from torch import Tensor, nn

B, S, L = 3, 7, 5
SIZES = {"odd": (48, 3), "whole panels": (64, 4)}  # torch's fast path takes an even number of heads only
SEQUENCES = [S, 3, 5]
PADDING = torch.arange(S) >= torch.tensor(SEQUENCES)[:, None]  # (B, S), True is ignored
LAYOUTS = ("batch first", "sequence first", "no batch")
MODES = ("inference", "training")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sequence(length: int, width: int, layout: str, seed: int = 0) -> Tensor:
    x = randn(B, length, width, seed=seed)
    return x if layout == "batch first" else x.transpose(0, 1).contiguous() if layout == "sequence first" else x[1]


def real(x: Tensor, padding: Tensor | None, layout: str) -> Tensor:
    if padding is None:
        return x
    return x[~(padding[1] if layout == "no batch" else padding if layout == "batch first" else padding.T)]


def typed(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x.to(dtype) if x is not None and x.is_floating_point() else x


def no_first(mask: Tensor) -> Tensor:
    """Every query sees a key."""
    mask[..., 0] = False
    return mask


def masks_of(name: str, heads: int, queries: int, layout: str) -> dict:
    """key_padding_mask, attn_mask and is_causal of nn.MultiheadAttention."""
    batch = 1 if layout == "no batch" else B
    hidden = no_first(randn(queries, S, seed=5) > 0)
    per_head = no_first(randn(batch * heads, queries, S, seed=6) > 0)
    padding = PADDING[1] if layout == "no batch" else PADDING
    bias = torch.where(padding, -2.0, 0.3)
    causal = torch.ones(queries, S, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": bias},
        "mask": {"attn_mask": hidden},
        "float mask": {"attn_mask": randn(queries, S)},
        "mask per head": {"attn_mask": per_head},
        "float mask per head": {"attn_mask": randn(batch * heads, queries, S)},
        "both": {"key_padding_mask": padding, "attn_mask": per_head},
        "both float": {"key_padding_mask": bias, "attn_mask": randn(queries, S)},
        "mixed": {"key_padding_mask": padding, "attn_mask": randn(queries, S)},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal and padding": {"key_padding_mask": padding, "attn_mask": causal, "is_causal": True},
    }[name]


MASKS = ("none", "padding", "float padding", "mask", "float mask", "mask per head", "float mask per head", "both",
         "both float", "mixed", "causal", "causal and padding")  # fmt: skip


def results_of(call, inputs: list[Tensor], mode: str, select=lambda x: x):
    """A function of a module: the output and, in training, the gradients of parameters and inputs."""

    def results(m: nn.Module) -> dict[str, Tensor]:
        dtype = next(m.parameters()).dtype
        leaves = [x.detach().to(dtype).requires_grad_(mode == "training") for x in inputs]
        m.train(mode == "training")
        with torch.set_grad_enabled(mode == "training"):
            out = select(call(m, *leaves))
        if mode == "inference":
            return {"output": out}
        (out * randn(*out.shape, seed=9).to(dtype)).sum().backward()
        grads = {f"gradient of input {i}": x.grad for i, x in enumerate(leaves)}
        return {"output": out.detach(), **grads, **gradients(m)}

    return results


def encoder_layer(width: int = 64, heads: int = 4, **options) -> nn.Module:
    return spread(nn.TransformerEncoderLayer(width, heads, **{"dim_feedforward": 80, "dropout": 0.0, **options}))


def decoder_layer(width: int = 64, heads: int = 4, **options) -> nn.Module:
    return spread(nn.TransformerDecoderLayer(width, heads, **{"dim_feedforward": 80, "dropout": 0.0, **options}))


def encoder(heads: int = 4, layers: int = 2, norm: bool = True, **options) -> nn.Module:
    options = {"dim_feedforward": 80, "dropout": 0.0, "batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(64, heads, **options)
    return spread(nn.TransformerEncoder(layer, layers, nn.LayerNorm(64) if norm else None))


class Tagger(nn.Module):
    """A module of a user's own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.transformer = nn.Transformer(64, 4, 1, 1, 80, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(64)
        self.pooler = nn.MultiheadAttention(64, 4, batch_first=True)
        self.head = nn.Linear(64, 5)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=self.head.weight.dtype)
        x = self.transformer(self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True)
        x = self.norm(x)
        return self.head(self.pooler(x[:, :1], x, x, need_weights=False)[0])


def tagger() -> nn.Module:
    return spread(Tagger())


IDS = [torch.randint(20, (B, n), generator=torch.Generator().manual_seed(n)) for n in (S, L)]
