"""Attention forward, padded or packed: output and the log-sum-exp of each row.

One program computes BLOCK_M queries of one head against the keys that they see, BLOCK_N at a time, with an online
softmax (Dao, "FlashAttention-2", 2023). Tiles that are seen whole run in a loop without any check, those that nobody
sees are left out.

Bytes: query and output once, key and value once for each tile of queries (from L2, where a head's keys fit), lse; no
score leaves the chip. Operations: 2 (D + Dv) and one exp2 for each score of the visible tiles. Bound: tensor cores for
16-bit from some hundred keys on, exp2 beside them where heads are small; float32 by its fused multiply-adds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.attention import (
    LN2,
    LOG2E,
    VARYING,
    Call,
    add_product,
    band,
    dot_in_turns,
    dot_of_rows,
    dropout_keeps_tile,
    hide,
    keys_of_mask,
    load_mask,
    load_rows,
    row_pointer,
    row_statistics,
    rows,
    rows_from,
    scaled,
    sequence_rows,
    skip_whole,
    store_rows,
    visible,
    visible_tiles,
    with_aligned_rows,
    zero_rows,
)
from fastformer.kernels.configs import Config, pick, target


@triton.jit
def finite_maximum(m):
    """0 for a row that has seen no key."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def load_mask_in_time(pointer, mask, query, key, queries, keys, PER_QUERY: tl.constexpr):
    """`load_mask` in a loop whose loads are fetched ahead, but this one: Triton would take each query's floats through
    shared memory, column by column, with bank conflicts. Not so in a branch, which is taken always."""
    values = None
    if mask is not None:
        if PER_QUERY and mask.data.dtype.element_ty != tl.int1:
            values = tl.zeros((query.shape[0], key.shape[1]), tl.float32)
            if keys > 0:
                values = load_mask(pointer, mask, query, key, queries, keys, PER_QUERY)
        else:
            values = load_mask(pointer, mask, query, key, queries, keys, PER_QUERY)
    return values


@triton.jit
def turned(tiles, negative):
    signed = ()
    for i in tl.static_range(len(tiles)):
        signed += (tl.where(negative, -tiles[i], tiles[i]),)
    return signed


@triton.jit
def online_softmax(scores, tile_maximum, m, l):
    """(p, rescale, m, l): the tile's probabilities, what to multiply by what was summed before, and the rows' new
    maximum and sum. Scores in units of log2, -inf where hidden."""
    m_new = tl.maximum(m, tile_maximum)
    shift = finite_maximum(m_new)
    p = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(m - shift)
    return p, rescale, m_new, l * rescale + tl.sum(p, 1)


@triton.jit
def without_hidden_values(
    q, q_rows, m, query, key, value, mask, mask_pointer, sequence, head, kv_head, first_key, begin, end, query_index,
    queries, lowest, highest, scale, seed, dropout_threshold,
    HEAD_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCKS_D: tl.constexpr, BLOCKS_DV: tl.constexpr,
    BANDED: tl.constexpr, MASK_PER_QUERY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of the values again, for a tile whose sum is NaN: of a key or value that is seen, or only because the 0
    of a hidden key was multiplied by a value that is not finite. Those are left out; for one that is seen, NaN.

    The maximum m of each row is known; q is None where it is to be loaded from q_rows. Few keys at a time, so that
    this takes no more registers than the first pass.
    """
    KEYS: tl.constexpr = 16
    acc = zero_rows(m.shape[0], BLOCKS_DV)
    for start in tl.range(begin, end, KEYS, num_stages=1, disable_licm=True):
        k_pointer = row_pointer(key, sequence, kv_head, first_key + start)
        v_pointer = row_pointer(value, sequence, kv_head, first_key + start)
        if q is not None:
            k = load_rows(k_pointer, key, end - start, KEYS, HEAD_SIZE, BLOCKS_D, True)
        v = load_rows(v_pointer, value, end - start, KEYS, VALUE_SIZE, BLOCKS_DV, True)
        key_index = start + tl.arange(0, KEYS)[None, :]
        values = load_mask(mask_pointer, mask, query_index, key_index, queries, end, MASK_PER_QUERY)
        seen = visible(query_index, key_index, end, lowest, highest, values, BANDED)
        if q is None:
            k_rows, key_row = rows_from(k_pointer, key, KEYS), tl.arange(0, KEYS)[:, None]
            scores = dot_in_turns(
                q_rows, query_index < queries, query, k_rows, key_row < end - start, key, HEAD_SIZE, BLOCKS_D, PRECISION
            )
        else:
            scores = dot_of_rows(q, k, PRECISION)
        scores = hide(scores * scale, seen, values)
        p = tl.exp2(scores - finite_maximum(m)[:, None])
        if seed is not None:
            keeps = dropout_keeps_tile(tl.load(seed), dropout_threshold, start, KEYS, query_index, head, sequence)
            p = tl.where(keeps, p, 0.0)
        dtype: tl.constexpr = value.data.dtype.element_ty
        p, seen = p.to(dtype), tl.broadcast_to(seen, p.shape).to(dtype)
        sums = ()
        for i in tl.static_range(len(v)):
            finite = tl.abs(v[i]) < float("inf")
            tile = tl.dot(p, tl.where(finite, v[i], 0.0), acc[i], input_precision=PRECISION)
            not_finite = tl.dot(seen, tl.where(finite, 0.0, 1.0).to(dtype), input_precision=PRECISION)
            sums += (tile + tl.where(not_finite > 0, float("nan"), 0.0),)
        acc = sums
    return acc


@triton.jit
def any_nan(tiles):
    found = tl.max((tiles[0] != tiles[0]).to(tl.int32))
    for i in tl.static_range(1, len(tiles)):
        found = tl.maximum(found, tl.max((tiles[i] != tiles[i]).to(tl.int32)))
    return found > 0


@triton.jit
def log_sum_exp(m, l):
    """Natural; -inf for a row that has seen no key."""
    return (m + tl.log2(l)) * LN2


@triton.jit(do_not_specialize=VARYING)
def attention_forward_kernel(
    query, key, value, mask, output, lse, cu_seq_q, cu_seq_k, cu_stride_q, cu_stride_k, total_queries, total_keys,
    tiles, heads, groups, window_left, window_right, causal_right, scale, seed, dropout_threshold, dropout_scale,
    HEAD_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCKS_D: tl.constexpr, BLOCKS_DV: tl.constexpr,
    BANDED: tl.constexpr, MASK_PER_QUERY: tl.constexpr, RELOADS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOIST_Q: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sequence, head = program // (tiles * heads), program // tiles % heads
    first = (tiles - 1 - program % tiles) * BLOCK_M  # causal: those with most keys begin first
    first_query, queries = sequence_rows(cu_seq_q, cu_stride_q, sequence, total_queries)
    first_key, keys = sequence_rows(cu_seq_k, cu_stride_k, sequence, total_keys)
    if first >= queries:
        return
    kv_head = head // groups
    q_pointer = row_pointer(query, sequence, head, first_query + first)
    q, q_rows = None, rows_from(q_pointer, query, BLOCK_M)
    if RELOADS:
        scale *= LOG2E
    else:
        q = load_rows(q_pointer, query, queries - first, BLOCK_M, HEAD_SIZE, BLOCKS_D, True)
        q = turned(q, scale < 0)  # so that a row's maximum can be taken before the scale
        scale = tl.abs(scale) * LOG2E
    query_index = first + tl.arange(0, BLOCK_M)[:, None]

    begin, end = keys * 0, keys
    mask_pointer = None
    if mask is not None:
        mask_pointer = row_pointer(mask, sequence, head, first * 0)
        if not MASK_PER_QUERY:
            begin, end, plain = keys_of_mask(mask_pointer, mask, begin, end)
    lowest, highest = band(queries, keys, window_left, window_right, causal_right)
    begin, whole_begin, whole_end, end = visible_tiles(
        first, tl.minimum(queries - first, BLOCK_M), lowest, highest, begin, end, BLOCK_N, BANDED
    )
    if MASK_PER_QUERY:
        whole_end = whole_begin
    elif mask is not None:
        whole_end = tl.where(plain, whole_end, whole_begin)

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_rows(BLOCK_M, BLOCKS_DV)
    for CHECKED in tl.static_range(MASK_PER_QUERY, 2):  # the tiles that are seen whole, then the others
        loop_begin, loop_end = whole_begin, whole_end
        if CHECKED:
            loop_begin, loop_end = begin, end - (whole_end - whole_begin)
        # Loads are only fetched ahead of a product under a condition where the number of stages is written out.
        for loop_start in tl.range(
            loop_begin,
            loop_end,
            BLOCK_N,
            num_stages=2 if MASK_PER_QUERY and not RELOADS else None,
            disable_licm=not HOIST_Q,
        ):
            start = skip_whole(loop_start, whole_begin, whole_end) if CHECKED else loop_start
            k_pointer = row_pointer(key, sequence, kv_head, first_key + start)
            v_pointer = row_pointer(value, sequence, kv_head, first_key + start)
            if not RELOADS:
                k = load_rows(k_pointer, key, keys - start, BLOCK_N, HEAD_SIZE, BLOCKS_D, CHECKED)
            v = load_rows(v_pointer, value, keys - start, BLOCK_N, VALUE_SIZE, BLOCKS_DV, CHECKED)
            any_seen = True
            if CHECKED:
                key_index = start + tl.arange(0, BLOCK_N)[None, :]
                values = load_mask_in_time(mask_pointer, mask, query_index, key_index, queries, keys, MASK_PER_QUERY)
                seen = visible(query_index, key_index, keys, lowest, highest, values, BANDED)
                if MASK_PER_QUERY:
                    any_seen = tl.max(seen.to(tl.int32)) > 0
            if any_seen:
                if RELOADS:
                    k_rows, k_inside = rows_from(k_pointer, key, BLOCK_N), start + tl.arange(0, BLOCK_N)[:, None] < keys
                    scores = dot_in_turns(
                        q_rows, query_index < queries, query, k_rows, k_inside, key, HEAD_SIZE, BLOCKS_D, PRECISION
                    )
                else:
                    scores = dot_of_rows(q, k, PRECISION)  # (BLOCK_M, BLOCK_N)
                if CHECKED or RELOADS:
                    scores *= scale
                    if CHECKED:
                        scores = hide(scores, seen, values)
                    tile_maximum = tl.max(scores, 1)
                else:
                    tile_maximum = tl.max(scores, 1) * scale
                    scores *= scale
                p, rescale, m, l = online_softmax(scores, tile_maximum, m, l)
                if seed is not None:
                    keeps = dropout_keeps_tile(
                        tl.load(seed), dropout_threshold, start, BLOCK_N, query_index, head, sequence
                    )
                    p = tl.where(keeps, p, 0.0)
                acc = add_product(scaled(acc, rescale[:, None]), p.to(v[0].dtype), v, PRECISION)

    if any_nan(acc):
        acc = without_hidden_values(
            q, q_rows, m, query, key, value, mask, mask_pointer, sequence, head, kv_head, first_key, begin, end,
            query_index, queries, lowest, highest, scale, seed, dropout_threshold, HEAD_SIZE, VALUE_SIZE, BLOCKS_D,
            BLOCKS_DV, BANDED, MASK_PER_QUERY, PRECISION,
        )  # fmt: skip

    acc = scaled(acc, tl.where(l == 0, 0.0, dropout_scale / l)[:, None])
    output_pointer = row_pointer(output, sequence, head, first_query + first)
    store_rows(output_pointer, output, acc, queries - first, VALUE_SIZE)
    lse_pointers = row_pointer(lse, sequence, head, first_query + first) + tl.arange(0, BLOCK_M) * lse.stride_row
    tl.store(lse_pointers, log_sum_exp(m, l), mask=tl.arange(0, BLOCK_M) < queries - first)


# (BLOCK_M, BLOCK_N, num_warps, num_stages) by the padded head size, the larger one of key and value: the best guess
# first. Not measured: chosen so that nothing spills and that the shared memory is there on every
# GPU of the family.
_PLAIN = {
    "mma": {64: [(128, 64, 8, 2), (128, 32, 8, 2)], 128: [(128, 32, 8, 2), (64, 64, 8, 2)], 256: [(64, 32, 8, 2)]},
    "wgmma": {64: [(128, 128, 8, 2), (128, 64, 8, 3)], 128: [(128, 64, 8, 2), (64, 64, 8, 2)], 256: [(64, 32, 8, 2)]},
    "cdna": {64: [(128, 64, 4, 2), (64, 64, 4, 2)], 128: [(64, 64, 4, 2)], 256: [(64, 32, 4, 2)]},
    "rdna": {64: [(64, 32, 8, 2), (32, 16, 8, 2)], 128: [(64, 32, 8, 1), (32, 16, 8, 1)], 256: [(16, 16, 4, 1)]},
    "float32": {64: [(32, 32, 8, 2), (32, 64, 8, 2)], 128: [(16, 64, 16, 2), (16, 32, 8, 2)], 256: [(16, 32, 16, 2)]},
    "float32 cdna": {64: [(64, 32, 8, 2)], 128: [(32, 32, 4, 2)], 256: [(32, 16, 4, 2)]},
    "float32 rdna": {64: [(16, 16, 8, 2)], 128: [(16, 16, 8, 1)], 256: [(16, 16, 8, 1)]},
    "tf32x3": {64: [(32, 32, 8, 2)], 128: [(16, 64, 8, 2), (16, 32, 8, 2)]},
}
_DROPOUT = {  # its words are drawn for 64 keys at once, or for each key by itself
    "mma": {64: [(64, 64, 8, 2)], 128: [(64, 64, 8, 2)], 256: [(16, 64, 8, 1)]},
    "wgmma": {64: [(128, 64, 8, 3), (64, 64, 8, 2)], 128: [(64, 64, 8, 2)], 256: [(16, 64, 8, 1)]},
    "cdna": {64: [(64, 64, 4, 2), (128, 64, 4, 2)], 128: [(64, 64, 4, 2)], 256: [(32, 64, 4, 1)]},
    "rdna": {64: [(32, 16, 8, 2)], 128: [(32, 16, 8, 1)], 256: [(16, 16, 4, 1)]},
    "float32": {64: [(16, 64, 8, 2)], 128: [(16, 64, 16, 2)], 256: [(16, 32, 16, 2)]},
    "float32 cdna": {64: [(16, 64, 8, 2)], 128: [(32, 32, 4, 2)], 256: [(32, 16, 4, 2)]},
    "float32 rdna": {64: [(16, 16, 8, 2)], 128: [(16, 16, 8, 1)], 256: [(16, 16, 8, 1)]},
    "tf32x3": {64: [(16, 64, 8, 2)], 128: [(16, 64, 8, 2)]},
}
_MASK_PER_QUERY = {
    "mma": {64: [(128, 32, 8, 2)], 128: [(64, 32, 8, 2)], 256: [(16, 32, 8, 1)]},
    "wgmma": {64: [(128, 64, 8, 3), (128, 32, 8, 2)], 128: [(64, 64, 8, 2)], 256: [(64, 32, 8, 2)]},
    "cdna": {64: [(64, 64, 4, 2), (128, 64, 4, 2)], 128: [(64, 64, 4, 2)], 256: [(64, 32, 4, 2)]},
    "rdna": {64: [(64, 32, 8, 2), (32, 16, 8, 2)], 128: [(32, 16, 8, 1)], 256: [(16, 16, 4, 1)]},
    "float32": {64: [(32, 32, 8, 2)], 128: [(16, 32, 8, 2)], 256: [(16, 16, 8, 2)]},
    "float32 cdna": {64: [(32, 32, 8, 2)], 128: [(16, 32, 8, 2)], 256: [(16, 16, 8, 2)]},
    "float32 rdna": {64: [(16, 16, 8, 2)], 128: [(16, 16, 8, 1)], 256: [(16, 16, 8, 1)]},
    "tf32x3": {64: [(32, 32, 8, 2)], 128: [(16, 32, 8, 2)]},
}

_DROPOUT_AND_MASK = {  # of each query; where _DROPOUT has no room for it
    ("mma", 64): [(64, 32, 8, 2)],
    ("cdna", 256): [(16, 64, 4, 1)],
}


def hoists_query(call: Call) -> bool:
    """May it be in registers as an operand throughout the loop? Not where a thread would have whole rows of it, which
    spill, as without tensor cores."""
    if target().startswith("gfx1"):
        return not call.arguments["RELOADS"]
    return call.dtype != torch.float32 or call.precision != "ieee"


def _configs(call: Call) -> list[Config]:
    if target() == "interpreter":
        return [Config({"BLOCK_M": 32, "BLOCK_N": 64 if call.has_dropout else 32})]
    if target().startswith("gfx"):
        family = "cdna" if target().startswith("gfx9") else "rdna"
    else:
        family = "wgmma" if target() in ("sm_90", "sm_100", "sm_103") else "mma"
    if call.dtype == torch.float32:
        family = f"float32 {family}" if target().startswith("gfx") else "float32"
        if call.precision == "tf32x3":
            family = "tf32x3"
    table = _DROPOUT if call.has_dropout else _MASK_PER_QUERY if call.arguments["MASK_PER_QUERY"] else _PLAIN
    size = max(call.padded_size, 64)
    table_rows = table[family][size]
    if call.has_dropout and call.arguments["MASK_PER_QUERY"]:
        table_rows = _DROPOUT_AND_MASK.get((family, size), table_rows)
    if table is _PLAIN and (call.arguments["mask"] is not None or (family == "tf32x3" and call.has_two_tiles)):
        table_rows = table_rows[-1:]  # for what takes registers, as a float mask
    return [Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages) for m, n, warps, stages in table_rows]


def attention_forward(call: Call, output: Tensor, lse: Tensor) -> None:
    """Writes output, (B, H, Sq, Dv) or (Tq, H, Dv), and lse, float32 (B, H, Sq) or (H, Tq)."""
    call = with_aligned_rows(call)
    config = pick(
        "attention_forward",
        _configs(call),
        **call.key,
        dropout=call.has_dropout,
        masked=call.arguments["mask"] is not None,
        dense_mask=call.arguments["MASK_PER_QUERY"],
    )
    tiles = triton.cdiv(call.max_queries, config.tiles["BLOCK_M"])
    programs = tiles * call.heads * call.sequences
    if programs == 0:
        return
    attention_forward_kernel[(programs,)](
        **call.arguments,
        output=rows(output),
        lse=row_statistics(lse),
        tiles=tiles,
        PRECISION=call.precision,
        HOIST_Q=hoists_query(call),
        **config.arguments(),
    )
