"""A task and a Dataset of your own on the layers of fastformer.nn: put numbers in order.

At each place of a row the model is to say the number that stands there once the row is sorted.
"""

from __future__ import annotations

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastformer.nn import EncoderLayer, LayerNorm, Linear


class Rows(Dataset):
    """A million rows of numbers; each is made when it is asked for."""

    def __init__(self, length: int, numbers: int):
        self.length, self.numbers = length, numbers

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(self.numbers, (self.length,), generator=torch.Generator().manual_seed(index))


class Sorter(nn.Module):
    def __init__(self, length: int, numbers: int, width: int, layers: int, dropout: float):
        super().__init__()
        self.number = nn.Embedding(numbers, width)
        self.place = nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            EncoderLayer(width, 4, 4 * width, dropout, "gelu", batch_first=True, norm_first=True) for _ in range(layers)
        )
        self.norm = LayerNorm(width)
        self.head = Linear(width, numbers)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.number(input_ids) + self.place.weight
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def main(argv: list[str] | None = None) -> list[float]:
    parser = common.options(__doc__.split("\n")[0], steps=300, batch=64, lr=2e-3)
    parser.add_argument("--length", type=int, default=16, help="numbers in a row")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    numbers = 20
    model = Sorter(args.length, numbers, width=64, layers=2, dropout=args.dropout)
    rows = Rows(args.length, numbers)

    def batch(generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(rows), (args.batch,), generator=generator).tolist()
        return {"input_ids": torch.stack([rows[i] for i in chosen])}

    def loss_of(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(given["input_ids"]).flatten(0, 1), given["input_ids"].sort().values.flatten())

    losses = common.train(model, batch, loss_of, args, accelerate=False)
    new = torch.randint(numbers, (500, args.length), generator=torch.Generator().manual_seed(-1))
    model.eval()
    with torch.no_grad():
        right = (model(new).argmax(-1) == new.sort().values).float().mean()
    print(f"numbers at their place in new rows: {right:.1%}")
    return losses


if __name__ == "__main__":
    main()
