"""Attention backward, padded or packed: the probabilities come back tile by tile from the scores and the log-sum-exp.

With S = scale Q K^T + mask, P = exp(S - lse) and Pd = dropout(P):
    dV = Pd^T dO,  dP = dropout(dO V^T),  dS = P (dP - delta) with delta = rowsum(dO O),  dQ = scale dS K,
    dK = scale dS^T Q                                              (Dao, "FlashAttention-2", 2023, algorithm 2)

`grad_key_value_kernel` has a program for each tile of keys of a key/value head, which goes over the queries that see
it, of all query heads of its group; its scores are transposed, so that P and dS are left operands of the products as
they come. `grad_query_kernel` has a program for each tile of queries of a head, which goes over the keys. Every element
is written by one program, which adds in a fixed order: no atomics, the same bits each time. dK and dV of wide heads
come in parts, some columns at a time, each with the scores computed anew.

Bytes: query, output, gradient of the output, and the gradients once; key and value once for each tile of queries, query
and gradient of the output once for each tile of keys (from L2, where a head fits); lse and delta. Operations: 7
products where a single kernel with atomics has 5 (more for heads whose dK and dV come in parts), and two exp2 for each
score of the visible tiles. Bound: tensor cores for 16-bit from some hundred rows on; float32 by fused multiply-adds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.attention import (
    LOG2E,
    VARYING,
    Call,
    add_product,
    aligned_rows,
    band,
    dot_in_turns,
    dot_of_rows,
    dropout_keeps_each,
    dropout_keeps_tile,
    head_blocks,
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
    tile_limits,
    visible,
    visible_tiles,
    with_aligned_rows,
    zero_rows,
)
from fastformer.kernels.configs import Config, pick, shared_memory, target
from fastformer.kernels.philox import dropout_keeps

# But a group of one head, which is the usual one, has a kernel of its own: without the loop over the group there are
# registers for larger tiles.
_VARYING = (*(name for name in VARYING if name != "groups"), "kv_heads")


@triton.jit(do_not_specialize=VARYING)
def delta_kernel(
    grad_output, output, delta, cu_seq_q, cu_stride_q, total_queries, tiles, heads,
    VALUE_SIZE: tl.constexpr, BLOCKS_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """rowsum(dO O) in float32."""
    program = tl.program_id(0)
    sequence, head, first = program // (tiles * heads), program // tiles % heads, program % tiles * BLOCK_M
    first_query, queries = sequence_rows(cu_seq_q, cu_stride_q, sequence, total_queries)
    if first >= queries:
        return
    left = queries - first
    do_pointer = row_pointer(grad_output, sequence, head, first_query + first)
    o_pointer = row_pointer(output, sequence, head, first_query + first)
    do = load_rows(do_pointer, grad_output, left, BLOCK_M, VALUE_SIZE, BLOCKS_DV, True)
    o = load_rows(o_pointer, output, left, BLOCK_M, VALUE_SIZE, BLOCKS_DV, True)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(len(BLOCKS_DV)):
        sums += tl.sum(do[i].to(tl.float32) * o[i].to(tl.float32), 1)
    row = tl.arange(0, BLOCK_M)
    delta_pointer = row_pointer(delta, sequence, head, first_query + first)
    tl.store(delta_pointer + row * delta.stride_row, sums, mask=row < left)


@triton.jit
def load_lse(pointer, lse, rows, ROWS: tl.constexpr):
    """(ROWS,) in units of log2; inf for a row that sees no key: then its probabilities are 0."""
    row = tl.arange(0, ROWS)
    natural = tl.load(pointer + row * lse.stride_row, mask=row < rows, other=float("-inf"))
    return tl.where(natural == float("-inf"), float("inf"), natural * LOG2E)


@triton.jit
def load_delta(pointer, delta, rows, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    return tl.load(pointer + row * delta.stride_row, mask=row < rows, other=0.0)


@triton.jit(do_not_specialize=_VARYING)
def grad_key_value_kernel(
    grad_output, query, key, value, mask, lse, delta, grad_key, grad_value, query_part, grad_output_part, cu_seq_q,
    cu_seq_k, cu_stride_q, cu_stride_k, total_queries, total_keys, tiles, heads, kv_heads, groups, window_left,
    window_right, causal_right, scale, seed, dropout_threshold, dropout_scale,
    HEAD_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCKS_D: tl.constexpr, BLOCKS_DV: tl.constexpr,
    PART_SIZE: tl.constexpr, VALUE_PART_SIZE: tl.constexpr, BLOCKS_PART: tl.constexpr, BLOCKS_VALUE_PART: tl.constexpr,
    BANDED: tl.constexpr, MASK_PER_QUERY: tl.constexpr, RELOADS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOIST: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """dK and dV, or the columns of them that query_part and grad_output_part have: None where it is all."""
    program = tl.program_id(0)
    sequence, kv_head, first = program // (tiles * kv_heads), program // tiles % kv_heads, program % tiles * BLOCK_N
    first_query, queries = sequence_rows(cu_seq_q, cu_stride_q, sequence, total_queries)
    first_key, keys = sequence_rows(cu_seq_k, cu_stride_k, sequence, total_keys)
    if first >= keys:
        return
    key_row, left = first_key + first, keys - first
    k_pointer, v_pointer = row_pointer(key, sequence, kv_head, key_row), row_pointer(value, sequence, kv_head, key_row)
    if RELOADS:
        k_rows, v_rows = rows_from(k_pointer, key, BLOCK_N), rows_from(v_pointer, value, BLOCK_N)
    else:
        k = load_rows(k_pointer, key, left, BLOCK_N, HEAD_SIZE, BLOCKS_D, True)
        v = load_rows(v_pointer, value, left, BLOCK_N, VALUE_SIZE, BLOCKS_DV, True)
    key_index = first + tl.arange(0, BLOCK_N)[:, None]
    lowest, highest = band(queries, keys, window_left, window_right, causal_right)
    first_begin, first_whole, end_whole, last_end = visible_tiles(
        first, tl.minimum(left, BLOCK_N), -highest, -lowest, 0, queries, BLOCK_M, BANDED
    )

    dk = zero_rows(BLOCK_N, BLOCKS_PART)  # without the scale
    dv = zero_rows(BLOCK_N, BLOCKS_VALUE_PART)
    for member in tl.range(0, groups):
        head = kv_head * groups + member
        begin, whole_begin, whole_end, end = first_begin, first_whole, end_whole, last_end
        mask_pointer = None
        if mask is not None:
            mask_pointer = row_pointer(mask, sequence, head, first * 0)
            if MASK_PER_QUERY:
                whole_end = whole_begin
            else:
                values = load_mask(mask_pointer, mask, 0, key_index, 0, keys, False)
                shown = visible(0, key_index, keys, 0, 0, values, False)
                plain = shown
                if values.dtype != tl.int1:
                    plain = values == 0
                plain |= key_index >= keys
                end = tl.where(tl.max(shown.to(tl.int32)) > 0, end, begin)
                whole_end = tl.where((tl.min(plain.to(tl.int32)) > 0) & (begin < end), whole_end, whole_begin)
        for CHECKED in tl.static_range(MASK_PER_QUERY, 2):  # tiles that are seen whole, then the others
            loop_begin, loop_end = whole_begin, whole_end
            if CHECKED:
                loop_begin, loop_end = begin, end - (whole_end - whole_begin)
            for loop_start in tl.range(loop_begin, loop_end, BLOCK_M, disable_licm=not HOIST):
                start = skip_whole(loop_start, whole_begin, whole_end) if CHECKED else loop_start
                row = first_query + start
                q_pointer = row_pointer(query, sequence, head, row)
                do_pointer = row_pointer(grad_output, sequence, head, row)
                if RELOADS:
                    q_rows, do_rows = rows_from(q_pointer, query, BLOCK_M), rows_from(do_pointer, grad_output, BLOCK_M)
                    q_inside = start + tl.arange(0, BLOCK_M)[:, None] < queries
                else:
                    q = load_rows(q_pointer, query, queries - start, BLOCK_M, HEAD_SIZE, BLOCKS_D, CHECKED)
                    do = load_rows(do_pointer, grad_output, queries - start, BLOCK_M, VALUE_SIZE, BLOCKS_DV, CHECKED)
                    q_part, do_part = q, do
                if query_part is not None:
                    q_pointer = row_pointer(query_part, sequence, head, row)
                    do_pointer = row_pointer(grad_output_part, sequence, head, row)
                    q_part = load_rows(q_pointer, query_part, queries - start, BLOCK_M, PART_SIZE, BLOCKS_PART, CHECKED)
                    do_part = load_rows(
                        do_pointer, grad_output_part, queries - start, BLOCK_M, VALUE_PART_SIZE, BLOCKS_VALUE_PART,
                        CHECKED,
                    )  # fmt: skip
                m = load_lse(row_pointer(lse, sequence, head, row), lse, queries - start, BLOCK_M)[None, :]
                d = load_delta(row_pointer(delta, sequence, head, row), delta, queries - start, BLOCK_M)[None, :]
                query_index = start + tl.arange(0, BLOCK_M)[None, :]
                any_seen = True
                if CHECKED:
                    values = load_mask(mask_pointer, mask, query_index, key_index, queries, keys, MASK_PER_QUERY)
                    seen = visible(query_index, key_index, keys, lowest, highest, values, BANDED)
                    if MASK_PER_QUERY:
                        any_seen = tl.max(seen.to(tl.int32)) > 0
                if any_seen:
                    if seed is not None:  # in every turn: else the 20 words made of it stay in registers, too many
                        bits = tl.load(seed, volatile=True)
                    if RELOADS:
                        scores = dot_in_turns(
                            k_rows, key_index < keys, key, q_rows, q_inside, query, HEAD_SIZE, BLOCKS_D, PRECISION
                        )
                    else:
                        scores = dot_of_rows(k, q, PRECISION, APART)
                    scores *= scale * LOG2E  # (BLOCK_N, BLOCK_M)
                    if CHECKED:
                        scores = hide(scores, seen, values)
                    p = tl.exp2(scores - m)
                    dropped = p
                    if seed is not None:
                        if BLOCK_N % 64 == 0:
                            query_column = start + tl.arange(0, BLOCK_M)[:, None]
                            kept = tl.trans(
                                dropout_keeps(bits, dropout_threshold, first, BLOCK_N, query_column, head, sequence)
                            )
                        else:
                            kept = dropout_keeps_each(bits, dropout_threshold, query_index, key_index, head, sequence)
                        dropped = tl.where(kept, p * dropout_scale, 0.0)
                    dv = add_product(dv, dropped.to(do_part[0].dtype), do_part, PRECISION)
                    if RELOADS:
                        dp = dot_in_turns(
                            v_rows, key_index < keys, value, do_rows, q_inside, grad_output, VALUE_SIZE, BLOCKS_DV,
                            PRECISION,
                        )  # fmt: skip
                    else:
                        dp = dot_of_rows(v, do, PRECISION)
                    if seed is not None:
                        dp = tl.where(kept, dp * dropout_scale, 0.0)
                    ds = p * (dp - d)
                    if CHECKED:
                        ds = tl.where(seen, ds, 0.0)  # dp may be anything where nothing is seen
                    dk = add_product(dk, ds.to(q_part[0].dtype), q_part, PRECISION)
    store_rows(row_pointer(grad_key, sequence, kv_head, key_row), grad_key, scaled(dk, scale), left, PART_SIZE)
    store_rows(row_pointer(grad_value, sequence, kv_head, key_row), grad_value, dv, left, VALUE_PART_SIZE)


@triton.jit(do_not_specialize=_VARYING)
def grad_query_kernel(
    grad_output, query, key, value, mask, lse, delta, grad_query, cu_seq_q, cu_seq_k, cu_stride_q, cu_stride_k,
    total_queries, total_keys, tiles, heads, groups, window_left, window_right, causal_right, scale, seed,
    dropout_threshold, dropout_scale,
    HEAD_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCKS_D: tl.constexpr, BLOCKS_DV: tl.constexpr,
    BANDED: tl.constexpr, MASK_PER_QUERY: tl.constexpr, RELOADS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sequence, head = program // (tiles * heads), program // tiles % heads
    first = (tiles - 1 - program % tiles) * BLOCK_M  # causal: those with most keys begin first
    first_query, queries = sequence_rows(cu_seq_q, cu_stride_q, sequence, total_queries)
    first_key, keys = sequence_rows(cu_seq_k, cu_stride_k, sequence, total_keys)
    if first >= queries:
        return
    row, left = first_query + first, queries - first
    q_pointer, do_pointer = row_pointer(query, sequence, head, row), row_pointer(grad_output, sequence, head, row)
    if RELOADS:
        q_rows, do_rows = rows_from(q_pointer, query, BLOCK_M), rows_from(do_pointer, grad_output, BLOCK_M)
    else:
        q = load_rows(q_pointer, query, left, BLOCK_M, HEAD_SIZE, BLOCKS_D, True)
        do = load_rows(do_pointer, grad_output, left, BLOCK_M, VALUE_SIZE, BLOCKS_DV, True)
    m = load_lse(row_pointer(lse, sequence, head, row), lse, left, BLOCK_M)[:, None]
    d = load_delta(row_pointer(delta, sequence, head, row), delta, left, BLOCK_M)[:, None]
    kv_head = head // groups
    query_index = first + tl.arange(0, BLOCK_M)[:, None]

    begin, end = 0, keys
    mask_pointer = None
    if mask is not None:
        mask_pointer = row_pointer(mask, sequence, head, first * 0)
        if not MASK_PER_QUERY:
            begin, end, plain = keys_of_mask(mask_pointer, mask, begin, end)
    lowest, highest = band(queries, keys, window_left, window_right, causal_right)
    begin, whole_begin, whole_end, end = visible_tiles(
        first, tl.minimum(left, BLOCK_M), lowest, highest, begin, end, BLOCK_N, BANDED
    )
    if MASK_PER_QUERY:
        whole_end = whole_begin
    elif mask is not None:
        whole_end = tl.where(plain, whole_end, whole_begin)

    bits = tl.load(seed) if seed is not None else None
    dq = zero_rows(BLOCK_M, BLOCKS_D)  # without the scale
    for CHECKED in tl.static_range(MASK_PER_QUERY, 2):  # tiles that are seen whole, then the others
        loop_begin, loop_end = whole_begin, whole_end
        if CHECKED:
            loop_begin, loop_end = begin, end - (whole_end - whole_begin)
        for loop_start in tl.range(loop_begin, loop_end, BLOCK_N, disable_licm=not HOIST):
            start = skip_whole(loop_start, whole_begin, whole_end) if CHECKED else loop_start
            k_pointer = row_pointer(key, sequence, kv_head, first_key + start)
            v_pointer = row_pointer(value, sequence, kv_head, first_key + start)
            if RELOADS:
                k_rows, v_rows = rows_from(k_pointer, key, BLOCK_N), rows_from(v_pointer, value, BLOCK_N)
                k_inside = start + tl.arange(0, BLOCK_N)[:, None] < keys
            else:
                k = load_rows(k_pointer, key, keys - start, BLOCK_N, HEAD_SIZE, BLOCKS_D, CHECKED)
                v = load_rows(v_pointer, value, keys - start, BLOCK_N, VALUE_SIZE, BLOCKS_DV, CHECKED)
            key_index = start + tl.arange(0, BLOCK_N)[None, :]
            any_seen = True
            if CHECKED:
                values = load_mask(mask_pointer, mask, query_index, key_index, queries, keys, MASK_PER_QUERY)
                seen = visible(query_index, key_index, keys, lowest, highest, values, BANDED)
                if MASK_PER_QUERY:
                    any_seen = tl.max(seen.to(tl.int32)) > 0
            if any_seen:
                if RELOADS:
                    scores = dot_in_turns(
                        q_rows, query_index < queries, query, k_rows, k_inside, key, HEAD_SIZE, BLOCKS_D, PRECISION
                    )
                else:
                    scores = dot_of_rows(q, k, PRECISION)
                scores *= scale * LOG2E  # (BLOCK_M, BLOCK_N)
                if CHECKED:
                    scores = hide(scores, seen, values)
                p = tl.exp2(scores - m)
                if RELOADS:
                    dp = dot_in_turns(
                        do_rows, query_index < queries, grad_output, v_rows, k_inside, value, VALUE_SIZE, BLOCKS_DV,
                        PRECISION,
                    )  # fmt: skip
                else:
                    dp = dot_of_rows(do, v, PRECISION)
                if seed is not None:
                    kept = dropout_keeps_tile(bits, dropout_threshold, start, BLOCK_N, query_index, head, sequence)
                    dp = tl.where(kept, dp * dropout_scale, 0.0)
                ds = p * (dp - d)
                if CHECKED:
                    ds = tl.where(seen, ds, 0.0)  # dp may be anything where nothing is seen
                if RELOADS:
                    k = load_rows(k_pointer, key, keys - start, BLOCK_N, HEAD_SIZE, BLOCKS_D, CHECKED)
                dq = add_product(dq, ds.to(k[0].dtype), k, PRECISION)
    store_rows(row_pointer(grad_query, sequence, head, row), grad_query, scaled(dq, scale), left, HEAD_SIZE)


# By kind of GPU and padded head size, the larger one of key and value: (BLOCK_M, BLOCK_N, num_warps). With dropout
# where it has no row of its own, too. Best guess first, unmeasured: the largest tiles whose registers don't spill.
# The last one has room for the loop over a group of heads and for a mask of each query's own; a row "crowded" for more
# than one of what Call.is_crowded names.
_Tiles = dict[str, dict[int, list[tuple[int, int, int]]]]
_KEY_VALUE: _Tiles = {
    "sm_80": {64: [(32, 128, 8), (16, 64, 4), (16, 64, 8)], 128: [(16, 128, 8), (32, 64, 8)], 256: [(16, 32, 8)]},
    "sm_80 dropout": {64: [(16, 128, 8), (16, 64, 8)], 128: [(32, 64, 8), (16, 64, 8)], 256: [(16, 32, 8)]},
    "sm_80 crowded": {64: [(16, 64, 8)], 128: [(16, 64, 8)], 256: [(16, 32, 8)]},
    "sm_90": {64: [(64, 128, 8), (32, 128, 8)], 128: [(32, 128, 8), (16, 128, 8)], 256: [(16, 128, 8), (16, 32, 8)]},
    "sm_90 dropout": {64: [(32, 128, 8), (16, 128, 8)], 128: [(32, 128, 8), (16, 64, 8)], 256: [(16, 128, 8)]},
    "sm_100": {64: [(32, 128, 8), (16, 128, 8)], 128: [(16, 128, 8), (16, 32, 8)], 256: [(16, 128, 8), (16, 32, 8)]},
    "sm_100 crowded": {64: [(16, 64, 8)], 128: [(16, 64, 8)], 256: [(16, 32, 8)]},
    "sm_120": {64: [(32, 128, 8), (16, 64, 4)], 128: [(32, 64, 8), (16, 64, 8)], 256: [(16, 32, 8)]},
    "sm_120 dropout": {64: [(16, 64, 4), (16, 64, 8)], 128: [(32, 64, 8), (16, 64, 8)], 256: [(16, 32, 8)]},
    "sm_120 crowded": {64: [(16, 64, 8)], 128: [(16, 64, 8)], 256: [(16, 32, 8)]},
    "gfx9": {64: [(32, 64, 4), (16, 64, 4)], 128: [(16, 64, 8)], 256: [(16, 32, 4)]},
    "gfx11": {64: [(16, 32, 4)], 128: [(16, 32, 8)], 256: [(16, 32, 8)]},
    "gfx11 dropout": {64: [(16, 32, 4)], 128: [(16, 32, 8)], 256: [(16, 16, 4)]},
    "float32": {64: [(16, 32, 8)], 128: [(16, 32, 8), (16, 16, 8)], 256: [(16, 16, 8)]},
    "float32 crowded": {64: [(16, 32, 4)], 128: [(16, 32, 8)], 256: [(16, 16, 8)]},
    "float32 crowded dropout": {64: [(16, 16, 4)], 128: [(16, 32, 8)], 256: [(16, 16, 8)]},
    "tf32x3": {64: [(16, 32, 8)], 128: [(16, 16, 8)]},
    "gfx9 float32": {64: [(16, 64, 4), (16, 32, 4)], 128: [(16, 32, 4)], 256: [(16, 16, 4)]},
    "gfx11 float32": {64: [(16, 16, 8)], 128: [(16, 32, 8), (16, 16, 8)], 256: [(16, 16, 8)]},
}
_QUERY: _Tiles = {
    "sm_80": {64: [(128, 64, 8), (64, 64, 8)], 128: [(128, 32, 8), (64, 64, 8)], 256: [(32, 64, 8)]},
    "sm_80 dropout": {64: [(128, 64, 8), (64, 64, 8)], 128: [(64, 64, 8)], 256: [(32, 64, 8)]},
    "sm_80 crowded": {64: [(64, 32, 4)], 128: [(64, 32, 8)], 256: [(32, 32, 8)]},
    "sm_90": {64: [(128, 64, 8), (64, 64, 4)], 128: [(128, 64, 8), (64, 64, 4)], 256: [(32, 64, 8)]},
    "sm_100": {64: [(64, 64, 4)], 128: [(64, 64, 8)], 256: [(32, 64, 8)]},
    "sm_100 dropout": {64: [(128, 64, 8), (64, 64, 4)], 128: [(64, 64, 8)], 256: [(32, 64, 8)]},
    "sm_100 crowded": {64: [(64, 32, 4)], 128: [(64, 32, 8)], 256: [(32, 32, 8)]},
    "sm_120": {64: [(128, 64, 8), (64, 64, 4)], 128: [(128, 32, 8), (64, 64, 8)], 256: [(32, 64, 8)]},
    "sm_120 dropout": {64: [(128, 32, 8), (64, 64, 8)], 128: [(64, 64, 8)], 256: [(32, 64, 8)]},
    "sm_120 crowded": {64: [(64, 32, 4)], 128: [(64, 32, 8)], 256: [(32, 32, 8)]},
    "gfx9": {64: [(64, 64, 4)], 128: [(64, 64, 4)], 256: [(32, 32, 4)]},
    "gfx11": {64: [(64, 16, 4)], 128: [(64, 32, 8), (32, 16, 4)], 256: [(32, 16, 4), (16, 16, 4)]},
    "float32": {64: [(32, 64, 8), (32, 32, 8)], 128: [(32, 32, 8), (16, 32, 8)], 256: [(16, 16, 8)]},
    "float32 dropout": {64: [(32, 64, 8), (16, 64, 8)], 128: [(16, 64, 8), (16, 32, 8)], 256: [(16, 16, 8)]},
    "float32 crowded": {64: [(16, 32, 8)], 128: [(16, 16, 8)], 256: [(16, 16, 8)]},
    "tf32x3": {64: [(32, 16, 8)], 128: [(16, 16, 8)]},
    "gfx9 float32": {64: [(32, 32, 4), (16, 32, 4)], 128: [(16, 32, 4)], 256: [(16, 16, 4)]},
    "gfx11 float32": {64: [(16, 16, 8)], 128: [(16, 32, 8), (16, 16, 8)], 256: [(16, 16, 8)]},
}


def _kind(call: Call) -> str:
    """The row of the GPU, or of the nearest one that has a row."""
    gpu = {"sm_103": "sm_100", "sm_121": "sm_120"}.get(target(), target())
    if gpu.startswith("gfx"):
        gpu = "gfx9" if gpu.startswith("gfx9") else "gfx11"
        return gpu + " float32" * (call.dtype == torch.float32)
    if call.dtype == torch.float32:
        return "tf32x3" if call.precision == "tf32x3" else "float32"
    return gpu if gpu in _KEY_VALUE else "sm_80"


def _configs(call: Call, table: _Tiles) -> list[Config]:
    if target() == "interpreter":
        return [Config({"BLOCK_M": 16, "BLOCK_N": 64 if call.has_dropout else 16})]
    kind = _kind(call)
    size = max(call.padded_size, 64)
    row = kind + " crowded" * _is_crowded(call)
    tiles = table.get(row + " dropout" * call.has_dropout, table[row])[size]
    several = call.arguments["groups"] > 1 or call.arguments["MASK_PER_QUERY"]
    if several:
        tiles = tiles[-1:]
    exact = call.dtype == torch.float32
    amd = target().startswith("gfx")
    narrow = size == 256 and shared_memory(target()) < 128 * 1024
    one_stage = (narrow and not exact) or (amd and (exact or kind == "gfx11"))
    one_stage |= (several and call.has_dropout) or (kind == "float32" and (several or call.has_float_mask))
    if _is_crowded(call):
        one_stage = not exact or size == 256
    return [Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps, 1 if one_stage else 2) for m, n, num_warps in tiles]


def _is_crowded(call: Call) -> bool:
    return call.is_crowded and f"{_kind(call)} crowded" in _KEY_VALUE


def _hoists(call: Call) -> bool:
    """May operands that stay be in registers throughout? RDNA's lanes have no room for them, nor have crowded calls in
    16 bits, but for those with dropout: there it is the other way that spills."""
    crowded = _is_crowded(call) and call.dtype != torch.float32 and not call.has_dropout
    return not (target().startswith("gfx1") or crowded)


_APART = Config({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=4, num_stages=1)


def _sums_apart(call: Call) -> bool:
    """Are scores sums of 16 columns each? Of a single query, eager's product adds several columns at once, too: one sum
    over a whole head would be less exact."""
    exact = call.dtype == torch.float32 and call.precision == "ieee" and not call.arguments["RELOADS"]
    return exact and call.max_queries == 1 and call.arguments["HEAD_SIZE"] > 16


def _columns(call: Call) -> int:
    """Of dK and dV, in one program: as many as the registers hold beside what gives the probabilities."""
    return 64 if call.padded_size > 128 and not call.arguments["RELOADS"] else 128


def attention_backward(
    call: Call,
    grad_output: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Writes the gradients, which have the shapes of query, key and value."""
    key = {
        **call.key, "dropout": call.has_dropout, "grouped": call.arguments["groups"] > 1,
        "float_mask": call.has_float_mask, "dense_mask": call.arguments["MASK_PER_QUERY"], "crowded": call.is_crowded,
    }  # fmt: skip
    delta = torch.empty_like(lse)
    call, grad_output = with_aligned_rows(call), aligned_rows(grad_output)
    arguments = {
        **call.arguments,
        "grad_output": rows(grad_output),
        "lse": row_statistics(lse),
        "delta": row_statistics(delta),
        "PRECISION": call.precision,
        "HOIST": _hoists(call),
    }
    block = 16 if call.padded_size > 128 else 32
    tiles = triton.cdiv(call.max_queries, block)
    if programs := tiles * call.heads * call.sequences:
        a = call.arguments
        delta_kernel[(programs,)](
            arguments["grad_output"], rows(output), arguments["delta"], a["cu_seq_q"], a["cu_stride_q"],
            a["total_queries"], tiles, call.heads, a["VALUE_SIZE"], a["BLOCKS_DV"], block,
        )  # fmt: skip
    columns = _columns(call)
    apart = _sums_apart(call)
    configs = [_APART] if apart and target().startswith("sm_") else _configs(call, _KEY_VALUE)
    config = pick("attention_grad_key_value", configs, **key, apart=apart)
    tiles = triton.cdiv(call.max_keys, config.tiles["BLOCK_N"])
    if programs := tiles * call.kv_heads * call.sequences:
        widest = max(call.arguments["HEAD_SIZE"], call.arguments["VALUE_SIZE"])
        alone = call.padded_size <= columns and not call.arguments["RELOADS"]
        limits = limits_of_query = tile_limits(widest, call.dtype)
        of_keys = arguments
        if apart:
            limits_of_query = 16, 16
            of_keys = arguments | {"BLOCKS_D": head_blocks(call.arguments["HEAD_SIZE"], 16, 16), "HOIST": False}
        for first in range(0, widest, columns):
            part = slice(first, first + columns)
            dk, dv = grad_key[..., part], grad_value[..., part]
            grad_key_value_kernel[(programs,)](
                **of_keys,
                grad_key=rows(dk),
                grad_value=rows(dv),
                query_part=None if alone else rows(call.arguments["query"].data[..., part]),
                grad_output_part=None if alone else rows(grad_output[..., part]),
                PART_SIZE=dk.shape[-1],
                VALUE_PART_SIZE=dv.shape[-1],
                BLOCKS_PART=head_blocks(dk.shape[-1], *limits_of_query),
                BLOCKS_VALUE_PART=head_blocks(dv.shape[-1], *limits),
                tiles=tiles,
                kv_heads=call.kv_heads,
                APART=apart,
                **config.arguments(),
            )
    config = pick("attention_grad_query", _configs(call, _QUERY), **key)
    tiles = triton.cdiv(call.max_queries, config.tiles["BLOCK_M"])
    if programs := tiles * call.heads * call.sequences:
        grad_query_kernel[(programs,)](**arguments, grad_query=rows(grad_query), tiles=tiles, **config.arguments())
