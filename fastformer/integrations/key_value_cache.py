"""Keys and values of a growing sequence, in memory that has room for more."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

_BLOCK = 64  # positions; a multiple of them is reserved, half as many again as there are


class _Rows:
    """(B, H, length, D), the first positions of (B, H, capacity, D)."""

    __slots__ = ("memory", "length")

    def __init__(self, x: Tensor):
        self.memory, self.length = x, x.shape[-2]

    def view(self) -> Tensor:
        return self.memory.narrow(-2, 0, self.length)

    def reserve(self, count: int) -> Tensor:
        """The memory, contiguous, with room for so many more."""
        wanted, memory = self.length + count, self.memory
        fixed = memory.is_inference() and not torch.is_inference_mode_enabled()  # such tensors can't be written to
        if wanted > memory.shape[-2] or fixed or not memory.is_contiguous():
            capacity = -(-max(wanted, self.length * 3 // 2) // _BLOCK) * _BLOCK
            grown = memory.new_empty((*memory.shape[:-2], capacity, memory.shape[-1]))
            grown.narrow(-2, 0, self.length).copy_(self.view())
            self.memory = grown
        return self.memory


class GrowingLayer(DynamicLayer):
    """transformers' DynamicLayer, but for its memory: a token is written behind the others, which stay where they are.

    `keys` and `values` are views of it: after a crop, what is written next takes the place of what was cropped. Whoever
    sets them sets the memory.
    """

    def __init__(self):
        self._keys = self._values = None
        super().__init__()

    @classmethod
    def of(cls, layer: DynamicLayer) -> GrowingLayer:
        """The layer itself, from now on of this class."""
        keys, values = layer.__dict__.pop("keys", None), layer.__dict__.pop("values", None)
        layer.__class__ = cls
        layer.keys, layer.values = keys, values
        return layer

    @property
    def keys(self) -> Tensor | None:
        return None if self._keys is None else self._keys.view()

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys = _rows(keys)

    @property
    def values(self) -> Tensor | None:
        return None if self._values is None else self._values.view()

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._values = _rows(values)

    def get_seq_length(self) -> int:
        return 0 if self._keys is None else self._keys.length

    def reserve(self, like: Tensor, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor] | None:
        """The memory of keys and values, with room for new ones of a shape (B, H, S, D); None if they don't fit."""
        if self._keys is None:
            self.dtype, self.device, self.is_initialized = like.dtype, like.device, True
            batch, heads, _, size = shape
            self._keys, self._values = (_Rows(like.new_empty((batch, heads, 0, size))) for _ in range(2))
        for rows in (self._keys, self._values):
            x = rows.memory
            if type(x) is not Tensor or x.requires_grad or x.dtype != like.dtype or x.device != like.device:
                return None
            if (x.shape[0], x.shape[1], x.shape[3]) != (shape[0], shape[1], shape[3]):
                return None
        return self._keys.reserve(shape[2]), self._values.reserve(shape[2])

    def advance(self, count: int) -> None:
        """So many positions were written."""
        self._keys.length += count
        self._values.length += count

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        memory = None
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and key_states.shape == value_states.shape:
            memory = self.reserve(key_states, tuple(key_states.shape))
        if memory is None:  # what autograd has seen must not be written over
            if self._keys is None:
                self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
                self.keys, self.values = key_states, value_states
            else:
                self.keys = torch.cat([self.keys, key_states], dim=-2)
                self.values = torch.cat([self.values, value_states], dim=-2)
            return self.keys, self.values
        for rows, states in zip((self._keys, self._values), (key_states, value_states), strict=True):
            rows.memory.narrow(-2, rows.length, states.shape[-2]).copy_(states)
        self.advance(key_states.shape[-2])
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove >= 0 or self._keys is None:
            return super().crop(tokens_to_remove)
        for rows in (self._keys, self._values):
            rows.length = max(0, rows.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for rows in (self._keys, self._values):
            if rows is not None and rows.length:
                rows.memory = rows.memory.index_select(0, beam_idx.to(rows.memory.device))


def _rows(x: Tensor | None) -> _Rows | None:
    """None for the empty list of keys that a DynamicLayer begins with."""
    return None if x is None or x.dim() < 4 else _Rows(x)


def growing_layers(cache: Cache, count: int) -> list[GrowingLayer] | None:
    """The layers of a DynamicCache, so many of them, made to grow in place; None for any other cache."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return None
    while len(cache.layers) < count and cache.layer_class_to_replicate in (DynamicLayer, GrowingLayer):
        cache.layers.append(GrowingLayer())
    if len(cache.layers) != count or any(type(layer) not in (DynamicLayer, GrowingLayer) for layer in cache.layers):
        return None
    return [layer if type(layer) is GrowingLayer else GrowingLayer.of(layer) for layer in cache.layers]
