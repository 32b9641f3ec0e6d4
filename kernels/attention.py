"""What the kernels of attention share, forward and backward, padded and packed: where rows are and who sees whom.

A tensor is addressed as (sequence, head, row, column): padded (B, H, S, D) as it is, packed (T, H, D) with sequences of
stride 0 whose first rows are in cu_seq. A query sees the keys of a band of diagonals: lowest <= key - query <= highest.
Causality (aligned to the top left), a window (to the bottom right) and both together are such a band.

The columns of a head are a tuple of tiles, whose sizes are powers of two: 80 columns are 64 and 16, and not 128 of
which 48 would be multiplied for nothing.

Scores are kept in units of log2: exp(x) = exp2(x log2(e)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer import reference
from fastformer.kernels.configs import float32_precision, target
from fastformer.kernels.philox import dropout_keeps

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
FAR = tl.constexpr(2**30)  # diagonals away: more than any sequence has
SCAN = tl.constexpr(1024)  # keys of a mask that are looked at together


class Rows(NamedTuple):
    """A tensor for a kernel."""

    data: Tensor
    stride_sequence: int
    stride_head: int
    stride_row: int
    stride_column: int


@triton.jit
def sequence_rows(cu_seq, stride, sequence, total):
    """First row and number of rows; cu_seq is None where every sequence has all `total` rows.

    Bounds that go down or out of the tensor are cut, so that nothing is read or written outside of it.
    """
    first, end = total * 0, total
    if cu_seq is not None:
        first = tl.load(cu_seq + sequence.to(tl.int64) * stride)
        end = tl.load(cu_seq + (sequence.to(tl.int64) + 1) * stride)
        first = tl.minimum(tl.maximum(first, 0), total)
        end = tl.minimum(tl.maximum(end, first), total)
    return first, end - first


@triton.jit
def row_pointer(x, sequence, head, row):
    """To one row: its offset may need 64 bits."""
    return (
        x.data
        + sequence.to(tl.int64) * x.stride_sequence
        + head.to(tl.int64) * x.stride_head
        + row.to(tl.int64) * x.stride_row
    )


@triton.jit
def rows_from(pointer, x, ROWS: tl.constexpr):
    """(ROWS, 1) pointers to the rows from the one at `pointer` on."""
    return pointer + tl.arange(0, ROWS)[:, None].to(tl.int64) * x.stride_row


@triton.jit
def tile_of_rows(pointer, x, ROWS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """The pointers to (ROWS, BLOCK) elements from the row at `pointer` and column FIRST on, their rows and columns."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :] + FIRST
    return rows_from(pointer, x, ROWS) + column.to(tl.int64) * x.stride_column, row, column


@triton.jit
def load_rows(pointer, x, rows, ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, CHECKED: tl.constexpr):
    """ROWS rows from the one at `pointer` on; 0 beyond SIZE columns and, where CHECKED, beyond `rows` rows."""
    tiles = ()
    for i in tl.static_range(len(BLOCKS)):
        pointers, row, column = tile_of_rows(pointer, x, ROWS, i * BLOCKS[0], BLOCKS[i])
        if CHECKED and SIZE < i * BLOCKS[0] + BLOCKS[i]:
            tile = tl.load(pointers, mask=(row < rows) & (column < SIZE), other=0.0)
        elif CHECKED:
            tile = tl.load(pointers, mask=row < rows, other=0.0)
        elif SIZE < i * BLOCKS[0] + BLOCKS[i]:
            tile = tl.load(pointers, mask=column < SIZE, other=0.0)
        else:
            tile = tl.load(pointers)
        tiles += (tile,)
    return tiles


@triton.jit
def store_rows(pointer, x, tiles, rows, SIZE: tl.constexpr):
    """The first `rows` rows and SIZE columns, from the row at `pointer` on."""
    for i in tl.static_range(len(tiles)):
        tile, first = tiles[i], i * tiles[0].shape[1]
        pointers, row, column = tile_of_rows(pointer, x, tile.shape[0], first, tile.shape[1])
        tl.store(pointers, tile.to(x.data.dtype.element_ty), mask=(row < rows) & (column < SIZE))


@triton.jit
def zero_rows(ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(BLOCKS)):
        tiles += (tl.zeros((ROWS, BLOCKS[i]), tl.float32),)
    return tiles


@triton.jit
def scaled(tiles, factor):
    """Each times factor."""
    products = ()
    for i in tl.static_range(len(tiles)):
        products += (tiles[i] * factor,)
    return products


@triton.jit
def dot_of_rows(a, b, PRECISION: tl.constexpr, APART: tl.constexpr = False):
    """(rows of a, rows of b); where APART, each tile of columns is summed by itself."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        if APART:  # times 1, for an addition would be compiled to what is below
            product = tl.fma(tl.dot(a[i], tl.trans(b[i]), input_precision=PRECISION), 1.0, product)
        else:
            product = tl.dot(a[i], tl.trans(b[i]), product, input_precision=PRECISION)
    return product


@triton.jit
def dot_in_turns(
    a_rows, a_inside, a, b_rows, b_inside, b, SIZE: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr
):
    """`dot_of_rows`, but each tile of columns is loaded when its turn has come: for heads that registers don't hold.

    Args:
        a_rows, b_rows: pointers to the rows, (rows, 1).
        a_inside, b_inside: (rows, 1); the others are 0.
    """
    product = tl.zeros((a_rows.shape[0], b_rows.shape[0]), tl.float32)
    for i in tl.static_range(len(BLOCKS)):
        column = tl.arange(0, BLOCKS[i])[None, :] + i * BLOCKS[0]
        x = tl.load(a_rows + column.to(tl.int64) * a.stride_column, mask=a_inside & (column < SIZE), other=0.0)
        y = tl.load(b_rows + column.to(tl.int64) * b.stride_column, mask=b_inside & (column < SIZE), other=0.0)
        product = tl.dot(x, tl.trans(y), product, input_precision=PRECISION)
    return product


@triton.jit
def add_product(sums, weights, x, PRECISION: tl.constexpr):
    """sums + weights x: each row of the sum gets its weights (sums' rows, x's rows) of the rows of x."""
    tiles = ()
    for i in tl.static_range(len(x)):
        tiles += (tl.dot(weights, x[i], sums[i], input_precision=PRECISION),)
    return tiles


@triton.jit
def band(queries, keys, window_left, window_right, causal_right):
    """Lowest and highest visible diagonal of a sequence, at most FAR from 0."""
    offset = keys - queries
    return tl.maximum(offset - window_left, -FAR), tl.minimum(offset + window_right, causal_right)


@triton.jit
def visible_tiles(first, rows, lowest, highest, first_column, end_column, BLOCK: tl.constexpr, BANDED: tl.constexpr):
    """(begin, whole_begin, whole_end, end): which columns the rows first .. first + rows - 1 see.

    Rows are queries and columns keys; with (-highest, -lowest) for the band it is the other way round. Tiles of BLOCK
    columns from `begin` to `end` hold all that any row sees of first_column .. end_column - 1; those from `whole_begin`
    to `whole_end` are seen whole by all rows, and need no check. All but `end` are multiples of BLOCK.
    """
    last_column = end_column - 1
    whole_first, whole_last = first_column, last_column
    if BANDED:
        whole_first = tl.maximum(first_column, first + rows - 1 + lowest)
        whole_last = tl.maximum(tl.minimum(last_column, first + highest), -1)
        first_column = tl.maximum(first_column, first + lowest)
        last_column = tl.minimum(last_column, first + rows - 1 + highest)
    begin, end = first_column // BLOCK * BLOCK, last_column + 1
    whole_begin, whole_end = tl.cdiv(whole_first, BLOCK) * BLOCK, (whole_last + 1) // BLOCK * BLOCK
    any_whole = whole_begin < whole_end
    return begin, tl.where(any_whole, whole_begin, begin), tl.where(any_whole, whole_end, begin), end


@triton.jit
def skip_whole(start, whole_begin, whole_end):
    """For a loop over the tiles that need a check: `for start in range(begin, end - (whole_end - whole_begin), BLOCK)`
    counts on where the whole tiles begin; this is the column where the tile really starts."""
    return tl.where(start < whole_begin, start, start + (whole_end - whole_begin))


@triton.jit
def load_mask(pointer, mask, query, key, queries, keys, PER_QUERY: tl.constexpr):
    """The mask of a tile, or None without one: bool, or float32 in units of log2.

    Args:
        pointer: to the mask of the sequence and the head, ``row_pointer(mask, sequence, head, 0)``.
        query, key: (Q, 1) and (1, K), or (1, Q) and (K, 1).
        PER_QUERY: False where it is the same for all queries: then only one row is read, and (1, K) or (K, 1) returned.
    """
    values = None
    if mask is not None:
        pointers = pointer + key.to(tl.int64) * mask.stride_column
        inside = key < keys
        if PER_QUERY:
            pointers += query.to(tl.int64) * mask.stride_row
            inside &= query < queries
        if mask.data.dtype.element_ty == tl.int1:
            # Through a reduction of one: else Triton takes what is made of it for an operand that was loaded as bytes,
            # and lays out the products for that, with bank conflicts.
            values = tl.reduce_or(tl.load(pointers, mask=inside, other=False)[None], 0)
        else:
            values = tl.load(pointers, mask=inside, other=0.0)
            # The lowest finite number hides less than -inf: it must not become -inf. The maximum keeps NaN.
            finite = tl.maximum(values * LOG2E, -3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL)
            values = tl.where(values == float("-inf"), values, finite)
    return values


@triton.jit
def visible(query, key, keys, lowest, highest, mask_values, BANDED: tl.constexpr):
    """bool, of a shape that broadcasts to the tile's: which key each query sees. Queries beyond the last see, too."""
    seen = key < keys
    if BANDED:
        seen &= (key - query >= lowest) & (key - query <= highest)
    if mask_values is not None:
        if mask_values.dtype == tl.int1:
            seen &= mask_values
        else:
            seen &= mask_values != float("-inf")
    return seen


@triton.jit
def hide(scores, seen, mask_values):
    """Scores in units of log2, with a float mask added, and -inf where a key is not seen."""
    if mask_values is not None:
        if mask_values.dtype != tl.int1:
            scores += mask_values
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def keys_of_mask(pointer, mask, begin, end):
    """First and last + 1 of the keys begin .. end - 1 that a mask for all queries shows, and whether it does nothing in
    between."""
    first, last, plain = FAR + begin * 0, begin * 0 - 1, begin * 0
    for start in tl.range(begin, end, SCAN):
        key = start + tl.arange(0, SCAN)[None, :]
        values = load_mask(pointer, mask, 0, key, 0, end, False)
        seen = visible(0, key, end, 0, 0, values, False)
        first = tl.minimum(first, tl.min(tl.where(seen, key, FAR)))
        last = tl.maximum(last, tl.max(tl.where(seen, key, -1)))
        if values.dtype == tl.int1:
            plain += tl.sum(seen.to(tl.int32))
        else:
            plain += tl.sum((values == 0).to(tl.int32) * seen.to(tl.int32))
    end = last + 1
    begin = tl.minimum(first, end)
    return begin, end, plain == end - begin


@triton.jit
def dropout_keeps_each(seed, threshold, query, key, head, sequence):
    """bool, of the shape that query and key broadcast to: does dropout keep the probability? For tiles of fewer keys
    than share their counters: each element draws four words, and takes one."""
    c0 = (key // 64 * 16 + key % 16 + query * 0).to(tl.uint32)
    c1, c2, c3 = query.to(tl.uint32) + c0 * 0, head.to(tl.uint32) + c0 * 0, sequence.to(tl.uint32) + c0 * 0
    word0, word1, word2, word3 = tl.philox(seed, c0, c1, c2, c3)
    word = key // 16 % 4
    return tl.where(word < 2, tl.where(word == 0, word0, word1), tl.where(word == 2, word2, word3)) >= threshold


@triton.jit
def dropout_keeps_tile(seed, threshold, first_key, KEYS: tl.constexpr, query, head, sequence):
    """(Q, KEYS) bool: does dropout keep the probability? `query` is (Q, 1)."""
    if KEYS % 64 == 0:
        keeps = dropout_keeps(seed, threshold, first_key, KEYS, query, head, sequence)
    else:
        key = first_key + tl.arange(0, KEYS)[None, :]
        keeps = dropout_keeps_each(seed, threshold, query, key, head, sequence)
    return keeps


@dataclass(frozen=True)
class Call:
    """A call of a raw op, padded or packed: its sizes, and its tensors as every kernel takes them."""

    sequences: int
    heads: int
    kv_heads: int
    max_queries: int  # of a sequence
    max_keys: int
    dtype: torch.dtype
    arguments: dict  # of the kernels, by name

    @property
    def padded_size(self) -> int:
        """A power of two, not below the head sizes of query and value."""
        return padded_size(max(self.arguments["HEAD_SIZE"], self.arguments["VALUE_SIZE"]))

    @property
    def precision(self) -> str:
        """`float32_precision`, but "ieee" where "tf32x3" would spill its registers: for heads above 128 and crowded
        calls."""
        return "ieee" if self.padded_size > 128 or self.is_crowded else float32_precision()

    @property
    def key(self) -> dict:
        """For `configs.pick`: what of the call matters to every kernel."""
        sizes = {name: "+".join(map(str, self.arguments[name])) for name in ("BLOCKS_D", "BLOCKS_DV")}
        return {"dtype": str(self.dtype), "precision": self.precision, **sizes}

    @property
    def has_dropout(self) -> bool:
        return self.arguments["seed"] is not None

    @property
    def has_float_mask(self) -> bool:
        mask = self.arguments["mask"]
        return mask is not None and mask.data.dtype != torch.bool

    @property
    def has_two_tiles(self) -> bool:
        """Or more, of a head's columns."""
        return len(self.arguments["BLOCKS_D"]) > 1 or len(self.arguments["BLOCKS_DV"]) > 1

    @property
    def is_crowded(self) -> bool:
        """Do several of what takes registers beside the tiles come together?"""
        takes_registers = (
            self.has_float_mask or self.arguments["MASK_PER_QUERY"],
            self.arguments["groups"] > 1,
            self.has_dropout,
            self.has_two_tiles,
        )
        return sum(takes_registers) > 1


# Not to be compiled anew for: pass to @triton.jit(do_not_specialize=VARYING).
VARYING = (
    "cu_stride_q", "cu_stride_k", "total_queries", "total_keys", "tiles", "heads", "groups", "window_left",
    "window_right", "causal_right", "dropout_threshold",
)  # fmt: skip


def rows(x: Tensor) -> Rows:
    """Of (B, H, S, D) or (T, H, D)."""
    if x.dim() == 4:
        return Rows(x, *x.stride())
    return Rows(x, 0, x.stride(1), x.stride(0), x.stride(2))


def row_statistics(x: Tensor) -> Rows:
    """Of (B, H, S) or (H, T): one number for each row."""
    return Rows(x, *x.stride(), 1) if x.dim() == 3 else Rows(x, 0, *x.stride(), 1)


def padded_size(size: int) -> int:
    """Columns of one tile that holds a head."""
    return max(triton.next_power_of_2(size), 16)


def reloads(size: int) -> bool:
    """Do the kernels load the rows that stay anew in every turn, a tile of a head's columns at a time? RDNA's lanes
    hold each element of an operand twice, and have no room for a wide head."""
    return target().startswith("gfx1") and padded_size(size) > 64


def tile_limits(size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Columns of a tile at least and at most, for heads of `size` columns; "tf32x3" spills beside one of 16."""
    least = 32 if dtype == torch.float32 and float32_precision() == "tf32x3" else 16
    if reloads(size):
        return least, 32 if dtype == torch.float32 else 64
    return least, 256


def head_blocks(size: int, least: int, most: int) -> tuple[int, ...]:
    """Columns of the tiles that hold a head, all but the last one equal: 64 and 16 for 80. At least and at most so
    many, but for a head smaller than that."""
    padded = padded_size(size)
    first = min(padded // 2, most)
    count = triton.cdiv(size, first)
    last = max(padded_size(size - (count - 1) * first), least)
    return (padded,) if padded <= most and last >= first else (first,) * (count - 1) + (last,)


def call_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    cu_seq_q: Tensor | None = None,
    cu_seq_k: Tensor | None = None,
    max_queries: int,
    max_keys: int,
    dropout_p: float,
    seed: Tensor | None,
    is_causal: bool = False,
    scale: float,
    window_left: int,
    window_right: int,
) -> Call:
    """The arguments are those of the raw ops."""
    packed = cu_seq_q is not None
    heads, kv_heads = query.shape[1], key.shape[1]
    far = FAR.value
    widest = max(query.shape[-1], value.shape[-1])
    limits = tile_limits(widest, query.dtype)
    arguments = {
        "query": rows(query),
        "key": rows(key),
        "value": rows(value),
        "mask": None if attn_mask is None else rows(attn_mask),
        "cu_seq_q": cu_seq_q,
        "cu_seq_k": cu_seq_k,
        "cu_stride_q": cu_seq_q.stride(0) if packed else 0,
        "cu_stride_k": cu_seq_k.stride(0) if packed else 0,
        "total_queries": query.shape[-2] if not packed else query.shape[0],
        "total_keys": key.shape[-2] if not packed else key.shape[0],
        "heads": heads,
        "groups": heads // max(kv_heads, 1),  # query heads of each key head
        "window_left": far if window_left < 0 else min(window_left, far),
        "window_right": far if window_right < 0 else min(window_right, far),
        "causal_right": 0 if is_causal else far,
        "scale": scale,
        "seed": seed if dropout_p > 0 else None,
        "dropout_threshold": reference.dropout_threshold(dropout_p),
        "dropout_scale": 1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
        "HEAD_SIZE": query.shape[-1],
        "VALUE_SIZE": value.shape[-1],
        "BLOCKS_D": head_blocks(query.shape[-1], *limits),
        "BLOCKS_DV": head_blocks(value.shape[-1], *limits),
        "RELOADS": reloads(widest),
        "BANDED": is_causal or window_left >= 0 or window_right >= 0,
        "MASK_PER_QUERY": attn_mask is not None and attn_mask.shape[2] > 1 and attn_mask.stride(2) != 0,
    }
    return Call(
        sequences=len(cu_seq_q) - 1 if packed else query.shape[0],
        heads=heads,
        kv_heads=kv_heads,
        max_queries=max_queries,
        max_keys=max_keys,
        dtype=query.dtype,
        arguments=arguments,
    )


def aligned_rows(x: Tensor) -> Tensor:
    """x, or a copy whose rows can be read 16 bytes at a time. Element by element the addresses alone would fill the
    registers, and nothing could be fetched ahead; a row is read for each tile of the others, and copied once."""
    *strides, inner = x.stride()
    if inner == 1 and all(stride % 16 == 0 for stride in strides) and x.data_ptr() % 16 == 0:
        return x
    width = x.shape[-1]
    return x.new_empty(*x.shape[:-1], triton.cdiv(width, 16) * 16)[..., :width].copy_(x)


def with_aligned_rows(call: Call) -> Call:
    tensors = {name: rows(aligned_rows(call.arguments[name].data)) for name in ("query", "key", "value")}
    return replace(call, arguments=call.arguments | tensors)
