"""Generation with the reference models: greedy, sampling and beam search, on a cache of keys and values written in
place.

Letters in shapes: B batch, N beams, P prompt, V vocabulary, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .layers import padding_mask

KeyValue = tuple[Tensor, Tensor]  # one layer's keys and values, (B, H, K, D) each


class LayerCache:
    """One layer's keys and values, of which `length` are written: (B, H, capacity, D) each, made at first use."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0
        self.memory: KeyValue | None = None

    def reserve(self, like: Tensor, batch: int, heads: int, length: int, head_dim: int) -> KeyValue:
        """The memory, which has room for so many more keys (batch, heads, length, head_dim) in like's dtype."""
        if self.memory is None:
            self.memory = tuple(like.new_empty(batch, heads, self.capacity, head_dim) for _ in range(2))
        keys = self.memory[0]
        have, got = (keys.size(0), keys.size(1), keys.size(3)), (batch, heads, head_dim)
        if have != got or keys.dtype != like.dtype:
            raise ValueError(
                f"past_key_values holds (batch, heads, head size) = {have} in {keys.dtype}, got {got} in {like.dtype}"
            )
        if self.length + length > self.capacity:
            raise ValueError(
                f"past_key_values has room for {self.capacity} tokens, got {self.length} and {length} more"
            )
        return self.memory

    def append(self, key: Tensor, value: Tensor) -> KeyValue:
        """Keys and values of all tokens: those so far, and these (B, H, S, D)."""
        if key.requires_grad or value.requires_grad:
            raise ValueError("past_key_values: a KeyValueCache is written in place, which wants torch.no_grad()")
        batch, heads, length, head_dim = key.shape
        memory = self.reserve(key, batch, heads, length, head_dim)
        for whole, new in zip(memory, (key, value), strict=True):
            whole[:, :, self.length : self.length + length] = new
        self.length += length
        keys, values = (whole[:, :, : self.length] for whole in memory)
        return keys, values

    def select(self, rows: Tensor) -> None:
        """The sequences of these indices in place of those that are there."""
        selected = []
        for whole in self.memory or ():
            new = whole.new_empty(len(rows), *whole.shape[1:])
            torch.index_select(whole[:, :, : self.length], 0, rows, out=new[:, :, : self.length])
            selected.append(new)
        self.memory = tuple(selected) or None


class KeyValueCache:
    """The keys and values of all layers, in memory for `capacity` tokens: a model appends to it in place, and gives the
    same cache back. For inference; the list that a model makes without it holds for gradients, too."""

    def __init__(self, num_layers: int, capacity: int):
        self.layers = [LayerCache(capacity) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        return self.layers[0].length

    def select(self, rows: Tensor) -> None:
        """The sequences of these indices, (B,) int64, in place of those that are there: as beams go on."""
        for layer in self.layers:
            layer.select(rows)


class GenerationMixin:
    """`generate`, for a language model with a forward as that of GptLMHeadModel."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_beams: int = 1,
        stop_tokens: Sequence[int] = (),
        generator: torch.Generator | None = None,
        on_token: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Prompts continued token by token: by the likeliest one, or by one that is drawn where temperature, top_k or
        top_p is given; or, with num_beams, by the likeliest sequence that beam search finds. For a model in eval mode.

        Args:
            input_ids: (B, P) int64.
            attention_mask: (B, P) bool or integer, 0 = padding on the left of a shorter prompt; None keeps all.
                Positions count the tokens that are kept.
            max_new_tokens: as many at most.
            temperature: the logits are divided by it before a token is drawn.
            top_k: draws among so many of the likeliest tokens.
            top_p: draws among the fewest likeliest tokens whose probabilities reach this sum (nucleus sampling,
                Holtzman et al. 2020).
            num_beams: so many sequences are kept at each step, judged by the sum of the tokens' log-probabilities over
                their number.
            stop_tokens: a sequence ends behind one of these.
            generator: for torch.multinomial; None is torch's own.
            on_token: called with the tokens (B,) of each step as soon as they are known.

        Returns:
            (B, P + the most tokens that a prompt got) int64: prompt and continuation. Behind the end of a shorter one
            stands config.pad_token_id, or else the first of the stop_tokens.

        Raises:
            ValueError: an argument out of its range, a prompt that is empty or ends in padding, more tokens than the
                model's positions, or beam search with arguments for drawing or with on_token.
            TypeError: an attention_mask in floating point.
        """
        _check_prompt(input_ids, attention_mask, max_new_tokens, self.config.n_positions)
        draws = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        _check_choice(draws, num_beams, stop_tokens, self.config.vocab_size, on_token)
        steps = _Steps(self, input_ids, attention_mask, max_new_tokens)
        end = max_new_tokens, stop_tokens, self.config.pad_token_id
        if num_beams > 1:
            return search(steps, input_ids, *end, num_beams)
        drawn = any(option is not None for option in draws.values())
        choose = partial(_draw, **draws, generator=generator) if drawn else partial(torch.argmax, dim=-1)
        return continued(steps, input_ids, *end, choose, on_token)


class Steps(Protocol):
    """A model that generates, with its cache."""

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, V), float32 at least: of what comes behind these tokens (B, S), which follow those so far."""

    def select(self, rows: Tensor) -> None:
        """Goes on with the sequences of these indices in place of those that are there."""


class _Steps:
    """A model with its cache and the mask of a prompt."""

    def __init__(self, model: GenerationMixin, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int):
        self.model, self.mask = model, None
        self.cache = KeyValueCache(model.config.n_layer, input_ids.size(1) + max_new_tokens - 1)
        if attention_mask is not None and not attention_mask.all():
            new = attention_mask.new_ones(attention_mask.size(0), max_new_tokens)
            self.mask = torch.cat([attention_mask, new], 1).bool()
            self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)

    def logits(self, tokens: Tensor) -> Tensor:
        begin, end = self.cache.length, self.cache.length + tokens.size(1)
        mask, positions = (None, None) if self.mask is None else (self.mask[:, :end], self.positions[:, begin:end])
        logits = self.model(tokens, mask, positions, self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)
        if self.mask is not None:
            self.mask, self.positions = self.mask[rows], self.positions[rows]


def _room_for(
    tokens: Tensor, max_new_tokens: int, stop_tokens: Sequence[int], pad_token: int | None
) -> tuple[Tensor, Tensor]:
    """(B, P + max_new_tokens), the prompt and what stands behind an end; and the stop_tokens as a tensor."""
    if pad_token is None:
        pad_token = stop_tokens[0] if stop_tokens else 0
    new = tokens.new_full((tokens.size(0), max_new_tokens), pad_token)
    return torch.cat([tokens, new], 1), tokens.new_tensor(stop_tokens)


def continued(
    steps: Steps,
    input_ids: Tensor,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    pad_token: int | None,
    choose: Callable[[Tensor], Tensor],
    on_token: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """The prompts (B, P) continued token by token: choose takes logits (B, V) and gives tokens (B,)."""
    batch, length = input_ids.shape
    tokens, stops = _room_for(input_ids, max_new_tokens, stop_tokens, pad_token)
    running = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    new = input_ids
    for end in range(length, length + max_new_tokens):
        tokens[:, end] = torch.where(running, choose(steps.logits(new)), tokens[:, end])
        new = tokens[:, end : end + 1]
        if on_token is not None:
            on_token(tokens[:, end].clone())
        if stop_tokens:
            running &= ~torch.isin(new[:, 0], stops)
            if not running.any():
                return tokens[:, : end + 1]
    return tokens


def _draw(
    logits: Tensor, temperature: float | None, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """(B,) of logits (B, V)"""
    if temperature is not None:
        logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        logits = logits.scatter(-1, order, ordered.masked_fill(before >= top_p, -torch.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def search(
    steps: Steps,
    input_ids: Tensor,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    pad_token: int | None,
    num_beams: int,
) -> Tensor:
    """Beam search. A prompt's beams are running, and the best of those that have ended are kept beside them: until
    there are num_beams of these, and none that runs is above the last of them now."""
    (batch, length), device = input_ids.shape, input_ids.device
    first = torch.arange(batch, device=device)[:, None]  # rows of (B, ...)
    logits = steps.logits(input_ids).repeat_interleave(num_beams, 0)
    steps.select(first.expand(batch, num_beams).flatten())
    tokens, stops = _room_for(input_ids, max_new_tokens, stop_tokens, pad_token)
    tokens = tokens[:, None].repeat(1, num_beams, 1)  # (B, N, P + max_new_tokens)
    scores = torch.full((batch, num_beams), -torch.inf, dtype=logits.dtype, device=device)
    best, best_scores, best_lengths = tokens, scores, torch.zeros_like(scores, dtype=torch.int64)
    scores = scores.clone()
    scores[:, 0] = 0  # at first all beams are the prompt
    improves = torch.ones(batch, 1, dtype=torch.bool, device=device)

    for count in range(1, max_new_tokens + 1):
        sums = (logits.log_softmax(-1).unflatten(0, (batch, num_beams)) + scores[:, :, None]).flatten(1)
        # So many that num_beams of them go on, whatever of the others stops here.
        sums, order = sums.topk(min(num_beams * (1 + max(1, len(stop_tokens))), sums.size(1)))
        beams, chosen = order // logits.size(-1), order % logits.size(-1)
        candidates = tokens[first, beams]
        candidates[:, :, length + count - 1] = chosen
        stopped = torch.isin(chosen, stops) | (count == max_new_tokens)

        ended = torch.where(stopped & improves, sums / count, -torch.inf)[:, :num_beams]
        best_scores, order = torch.cat([best_scores, ended], 1).topk(num_beams)
        best = torch.cat([best, candidates[:, :num_beams]], 1)[first, order]
        best_lengths = torch.cat([best_lengths, torch.full_like(best_lengths, count)], 1)[first, order]

        scores, order = sums.masked_fill(stopped, -torch.inf).topk(num_beams)
        tokens = candidates[first, order]
        improves = improves & (scores[:, :1] / count > best_scores[:, -1:])
        if count == max_new_tokens or not improves.any():
            break
        steps.select((beams[first, order] + first * num_beams).flatten())
        logits = steps.logits(tokens[:, :, length + count - 1].flatten()[:, None])
    return best[:, 0, : length + int(best_lengths[:, 0].max())] if batch else input_ids


def _check_prompt(input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int, n_positions: int) -> None:
    if input_ids.dim() != 2 or input_ids.size(1) == 0:
        raise ValueError(
            f"input_ids must have shape (batch, length) with a token or more, got {tuple(input_ids.shape)}"
        )
    batch, length = input_ids.shape
    mask = padding_mask(attention_mask, batch, length)
    if mask is not None and not mask[..., -1].all():
        raise ValueError("attention_mask must keep the last token of each prompt: padding stands on the left")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if length + max_new_tokens > n_positions:
        raise ValueError(
            f"max_new_tokens must end within the model's {n_positions} positions, got {max_new_tokens} after a prompt"
            f" of {length}"
        )


def _check_choice(
    draws: dict[str, float | None],
    num_beams: int,
    stop_tokens: Sequence[int],
    vocab_size: int,
    on_token: Callable[[Tensor], object] | None,
) -> None:
    temperature, top_k, top_p = draws.values()
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be above 0 (None takes the likeliest token), got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if num_beams < 1:
        raise ValueError(f"num_beams must be 1 or more, got {num_beams}")
    for token in stop_tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"stop_tokens must be tokens of the vocabulary, 0 to {vocab_size - 1}, got {token}")
    if num_beams == 1:
        return
    for name, option in draws.items():
        if option is not None:
            raise ValueError(f"{name} must be None with num_beams={num_beams}: beam search draws nothing, got {option}")
    if on_token is not None:
        raise ValueError("on_token must be None with num_beams: beam search knows no token before its end")
