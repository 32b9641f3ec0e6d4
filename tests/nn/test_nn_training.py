"""Two small models built from the layers learn: a decoder-only and an encoder-decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer import nn

VOCABULARY, LENGTH, E = 12, 8, 32
BEGIN, PAD = 0, 1


class Embedding(torch.nn.Module):
    """Tokens and positions; (B, S) int64 -> (B, S, E)"""

    def __init__(self):
        super().__init__()
        self.token, self.position = torch.nn.Embedding(VOCABULARY, E), torch.nn.Embedding(LENGTH + 1, E)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.position.weight[: tokens.shape[1]]


class DecoderOnly(torch.nn.Module):
    """A GPT: pre-norm layers, causal, and a last layer norm."""

    def __init__(self):
        super().__init__()
        self.embedding = Embedding()
        self.layers = torch.nn.ModuleList(
            nn.EncoderLayer(E, 4, 64, dropout=0.1, activation="gelu_tanh", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(E)
        self.head = nn.Linear(E, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, is_causal=True)
        return self.head(self.norm(x))


class EncoderDecoder(torch.nn.Module):
    """The model of "Attention Is All You Need": post-norm, the source padded, the target causal."""

    def __init__(self):
        super().__init__()
        options = {"dropout": 0.1, "batch_first": True}
        self.embedding = Embedding()
        self.encoder = torch.nn.ModuleList(nn.EncoderLayer(E, 4, 64, **options) for _ in range(2))
        self.decoder = torch.nn.ModuleList(nn.DecoderLayer(E, 4, 64, **options) for _ in range(2))
        self.head = nn.Linear(E, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        padding = source == PAD
        memory = self.embedding(source)
        for layer in self.encoder:
            memory = layer(memory, src_key_padding_mask=padding)
        x = self.embedding(target)
        for layer in self.decoder:
            x = layer(x, memory, tgt_is_causal=True, memory_key_padding_mask=padding)
        return self.head(x)


def train(model: torch.nn.Module, batches, steps: int) -> list[float]:
    """The losses; a batch is the model's inputs and the (B, S) labels, -100 where there are none."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        *inputs, labels = next(batches)
        loss = F.cross_entropy(model(*inputs).flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses


def counting():
    """Sequences that count up from a random start, modulo the vocabulary; each token is to foretell the next."""
    while True:
        tokens = (torch.randint(VOCABULARY, (32, 1)) + torch.arange(LENGTH + 1)) % VOCABULARY
        yield tokens[:, :-1], tokens[:, 1:]


def copying():
    """A source of 4 to LENGTH tokens, padded; the target is the source."""
    while True:
        source = torch.randint(2, VOCABULARY, (32, LENGTH))
        padding = torch.arange(LENGTH) >= torch.randint(4, LENGTH + 1, (32, 1))
        source = source.masked_fill(padding, PAD)
        target = torch.cat([torch.full((32, 1), BEGIN), source[:, :-1]], dim=1)
        yield source, target, source.masked_fill(padding, -100)


def test_decoder_only_learns_to_count():
    torch.manual_seed(0)
    model = DecoderOnly()
    losses = train(model, counting(), 60)
    assert losses[-1] < 0.1 * losses[0]
    model.eval()
    tokens = torch.tensor([[3]])
    with torch.no_grad():
        for _ in range(LENGTH - 1):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert tokens[0].tolist() == [(3 + i) % VOCABULARY for i in range(LENGTH)]


def test_encoder_decoder_learns_to_copy():
    torch.manual_seed(0)
    losses = train(EncoderDecoder(), copying(), 80)
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])
