"""The embeddings of BERT, for every library whose modules have the names of transformers.

Letters in shapes: B batch, S positions, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastformer import ops
from fastformer.integrations.fused import DROPOUTS, EMBEDDINGS, NORMS, Fused, Path, dropout_p
from fastformer.ops.embeddings import looked_up

_raw = torch.ops.fastformer_cpu

_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
_OPTIONS = ("max_norm", "scale_grad_by_freq", "sparse")  # of nn.Embedding: the op has none of them


class BertEmbeddings(Fused):
    """On CPUs; elsewhere only the layer-norm inside is fused."""

    inner = {**dict.fromkeys(_TABLES, EMBEDDINGS), "LayerNorm": NORMS, "dropout": DROPOUTS}

    @staticmethod
    def own_obstacles(module: nn.Module) -> list[str]:
        tables = [module._modules.get(name) for name in _TABLES]
        if any(table.__class__ not in EMBEDDINGS for table in tables):
            return []  # `survey` says so
        obstacles = []
        for name, table in zip(_TABLES, tables, strict=True):
            obstacles += [f"{name} has {option}" for option in _OPTIONS if table.__dict__[option]]
        weights = [table._parameters["weight"] for table in tables]
        if len({(weight.dtype, *weight.shape[1:]) for weight in weights}) > 1:
            obstacles.append("its embeddings are of different dtypes or widths")
        return obstacles

    def groups(self):
        return [] if self.LayerNorm.normalized_shape == self.word_embeddings.weight.shape[1:] else None

    def embed(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor | None:
        """dropout(LayerNorm(word + token type + position)), (B, S, E) of ids that broadcast to input_ids (B, S); None
        for a call that the stock forward has to take."""
        ids = [_expanded(x, input_ids) for x in (input_ids, position_ids, token_type_ids)]
        if any(x is None for x in ids):
            return None
        path, packed = self.choose(*ids)
        if path is Path.STOCK:
            return None
        *tables, norm, dropout = packed.children if packed else [self._modules[name] for name in self.inner]
        weight, bias = norm._parameters["weight"], norm._parameters["bias"]
        lookups = [x for i, table in zip(ids, tables, strict=True) for x in (i, table._parameters["weight"])]
        if path is Path.PACKED:
            return looked_up(_raw.embeddings, *lookups, weight, bias, norm.eps, -1, 0.0, None)
        if self.groups() is None:
            return None
        options = {"padding_idx": tables[0].padding_idx, "dropout_p": dropout_p(dropout)}
        return ops.embeddings(*lookups, weight, bias, norm.eps, **options)


def _expanded(ids: Tensor, like: Tensor) -> Tensor | None:
    """int64 on the CPU, and of that shape; or None."""
    if ids.dtype != torch.int64 or not ids.is_cpu:
        return None
    shape, wanted = ids.shape, like.shape
    if shape == wanted:
        return ids
    fits = len(shape) <= len(wanted) and all(n in (1, m) for n, m in zip(shape[::-1], wanted[::-1], strict=False))
    return ids.expand(wanted) if fits else None
