"""Attention forward for few queries of many keys, as in decoding: the keys are split between programs.

One program computes the queries of all heads that share a key head, stacked in one tile, against one part of the keys;
a second kernel adds the parts up by their log-sum-exp (Dao et al., "Flash-Decoding", 2023), always in the same order.

Bytes: key and value once, the least there is, and for each part and query an output in float32, a thousandth of that.
Operations: 4 D for each query and key, padded to 16 queries. Bound: memory.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.attention import (
    LOG2E,
    VARYING,
    Call,
    add_product,
    band,
    dot_in_turns,
    dot_of_rows,
    hide,
    keys_of_mask,
    load_mask,
    load_rows,
    padded_size,
    row_pointer,
    row_statistics,
    rows,
    rows_from,
    scaled,
    sequence_rows,
    visible,
    visible_tiles,
    zero_rows,
)
from fastformer.kernels.attention_forward import (
    any_nan,
    finite_maximum,
    hoists_query,
    log_sum_exp,
    online_softmax,
    without_hidden_values,
)
from fastformer.kernels.configs import Config, pick, target

_BLOCK_M = 16  # queries times the heads that share a key head: the least that tl.dot takes
_MOST_PARTS = 32


@triton.jit(do_not_specialize=(*VARYING, "parts", "part_keys"))
def attention_decode_kernel(
    query, key, value, mask, output, lse, cu_seq_q, cu_seq_k, cu_stride_q, cu_stride_k, total_queries, total_keys,
    parts, part_keys, part_stride_output, part_stride_lse, heads, groups, window_left, window_right, causal_right,
    scale, seed, dropout_threshold, dropout_scale,
    HEAD_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, BLOCKS_D: tl.constexpr, BLOCKS_DV: tl.constexpr,
    BANDED: tl.constexpr, MASK_PER_QUERY: tl.constexpr, MASK_PER_HEAD: tl.constexpr, RELOADS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOIST_Q: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    kv_heads = heads // groups
    part, kv_head, sequence = program % parts, program // parts % kv_heads, program // (parts * kv_heads)
    first_query, queries = sequence_rows(cu_seq_q, cu_stride_q, sequence, total_queries)
    first_key, keys = sequence_rows(cu_seq_k, cu_stride_k, sequence, total_keys)
    row = tl.arange(0, BLOCK_M)
    query_index, head = row // groups, kv_head * groups + row % groups
    inside = query_index < queries
    q_rows = row_pointer(query, sequence, head, first_query + query_index)[:, None]
    q = None
    if not RELOADS:
        q = ()
        for i in tl.static_range(len(BLOCKS_D)):
            column = tl.arange(0, BLOCKS_D[i])[None, :] + i * BLOCKS_D[0]
            q_pointers = q_rows + column.to(tl.int64) * query.stride_column
            q += (tl.load(q_pointers, mask=inside[:, None] & (column < HEAD_SIZE), other=0.0),)

    begin = part * part_keys
    end = tl.minimum(begin + part_keys, keys)
    mask_pointer = None
    if mask is not None:
        if MASK_PER_HEAD:
            mask_pointer = row_pointer(mask, sequence, head, query_index * 0)[:, None]
        else:
            mask_pointer = row_pointer(mask, sequence, kv_head * groups, part * 0)
            if not MASK_PER_QUERY:
                begin, end, _ = keys_of_mask(mask_pointer, mask, begin, end)
    lowest, highest = band(queries, keys, window_left, window_right, causal_right)
    begin, _, _, end = visible_tiles(0, queries, lowest, highest, begin, end, BLOCK_N, BANDED)

    scale *= LOG2E
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = zero_rows(BLOCK_M, BLOCKS_DV)
    for start in tl.range(begin, end, BLOCK_N, disable_licm=not HOIST_Q):
        k_pointer = row_pointer(key, sequence, kv_head, first_key + start)
        v_pointer = row_pointer(value, sequence, kv_head, first_key + start)
        if not RELOADS:
            k = load_rows(k_pointer, key, end - start, BLOCK_N, HEAD_SIZE, BLOCKS_D, True)
        v = load_rows(v_pointer, value, end - start, BLOCK_N, VALUE_SIZE, BLOCKS_DV, True)
        key_index = start + tl.arange(0, BLOCK_N)[None, :]
        values = load_mask(mask_pointer, mask, query_index[:, None], key_index, queries, end, MASK_PER_QUERY)
        seen = visible(query_index[:, None], key_index, end, lowest, highest, values, BANDED)
        if RELOADS:
            k_rows, k_inside = rows_from(k_pointer, key, BLOCK_N), start + tl.arange(0, BLOCK_N)[:, None] < end
            scores = dot_in_turns(q_rows, inside[:, None], query, k_rows, k_inside, key, HEAD_SIZE, BLOCKS_D, PRECISION)
        else:
            scores = dot_of_rows(q, k, PRECISION)
        scores = hide(scores * scale, seen, values)
        p, rescale, m, l = online_softmax(scores, tl.max(scores, 1), m, l)
        acc = add_product(scaled(acc, rescale[:, None]), p.to(v[0].dtype), v, PRECISION)

    if any_nan(acc):
        acc = without_hidden_values(
            q, q_rows, m, query, key, value, mask, mask_pointer, sequence, head, kv_head, first_key, begin, end,
            query_index[:, None], queries, lowest, highest, scale, None, 0, HEAD_SIZE, VALUE_SIZE, BLOCKS_D, BLOCKS_DV,
            BANDED, MASK_PER_QUERY, PRECISION,
        )  # fmt: skip

    acc = scaled(acc, tl.where(l == 0, 0.0, 1 / l)[:, None])
    out_rows = row_pointer(output, sequence, head, first_query + query_index) + part.to(tl.int64) * part_stride_output
    for i in tl.static_range(len(BLOCKS_DV)):
        column = tl.arange(0, BLOCKS_DV[i])[None, :] + i * BLOCKS_DV[0]
        out_pointers = out_rows[:, None] + column * output.stride_column
        tl.store(out_pointers, acc[i].to(output.data.dtype.element_ty), mask=inside[:, None] & (column < VALUE_SIZE))
    lse_pointers = row_pointer(lse, sequence, head, first_query + query_index) + part.to(tl.int64) * part_stride_lse
    tl.store(lse_pointers, log_sum_exp(m, l), mask=inside)


@triton.jit(do_not_specialize=["heads", "queries", "parts"])
def combine_kernel(
    part_output, part_lse, output, lse, part_stride_output, part_stride_lse, heads, queries, parts,
    VALUE_SIZE: tl.constexpr, BLOCK_DV: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One query of one head: the parts' outputs, weighted by exp(lse)."""
    program = tl.program_id(0)
    row, head, sequence = program % queries, program // queries % heads, program // (queries * heads)
    part, column = tl.arange(0, PARTS), tl.arange(0, BLOCK_DV)[None, :]
    lse_pointers = row_pointer(part_lse, sequence, head, row) + part.to(tl.int64) * part_stride_lse
    x = tl.load(lse_pointers, mask=part < parts, other=float("-inf")) * LOG2E
    out_pointers = row_pointer(part_output, sequence, head, row) + part.to(tl.int64)[:, None] * part_stride_output
    inside = (part < parts)[:, None] & (column < VALUE_SIZE)
    outputs = tl.load(out_pointers + column * part_output.stride_column, mask=inside, other=0.0)
    m = tl.max(x, 0)
    weights = tl.exp2(x - finite_maximum(m))
    l = tl.sum(weights, 0)
    out = tl.sum(weights[:, None] * outputs, 0)[None, :] * tl.where(l == 0, 0.0, 1 / l)
    out_pointers = row_pointer(output, sequence, head, row) + column * output.stride_column
    tl.store(out_pointers, out.to(output.data.dtype.element_ty), mask=column < VALUE_SIZE)
    tl.store(row_pointer(lse, sequence, head, row), log_sum_exp(m, l))


def _configs(call: Call) -> list[Config]:
    """Best guess first; not measured."""
    size = call.padded_size
    if target() == "interpreter":
        return [Config({"BLOCK_N": 32})]
    float32 = call.dtype == torch.float32
    if target().startswith("gfx1"):
        return [Config({"BLOCK_N": 16}, num_warps=8 if float32 else 4, num_stages=3 if size <= 64 else 1)]
    if float32 and target().startswith("gfx"):
        return [Config({"BLOCK_N": 16}, num_warps=8, num_stages=2)]
    if float32:
        keys = 16 if call.has_two_tiles else 32
        return [Config({"BLOCK_N": keys}, 8, 3) if size <= 128 else Config({"BLOCK_N": 16}, 16, 3)]
    if size > 128:
        return [Config({"BLOCK_N": keys}, num_warps=8, num_stages=3) for keys in (32, 64)]
    if call.has_two_tiles:
        return [Config({"BLOCK_N": 32}, num_stages=3)]
    most = 128 if size <= 64 and target() == "sm_90" else 64
    return [Config({"BLOCK_N": keys}, num_stages=3) for keys in (most, 32)]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return 8 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _parts(call: Call, device: torch.device, block_n: int) -> int:
    """Enough for two programs on each multiprocessor, but none with fewer than four tiles of keys."""
    programs = call.kv_heads * call.sequences
    wanted = triton.cdiv(2 * _multiprocessors(device), programs)
    return max(min(wanted, call.max_keys // (4 * block_n), _MOST_PARTS), 1)


def attention_decode(call: Call, output: Tensor, lse: Tensor) -> bool:
    """Writes output and lse as attention_forward does, if the call is one for this; was it?"""
    groups = call.arguments["groups"]
    programs = call.kv_heads * call.sequences
    if call.has_dropout or programs == 0 or not 0 < call.max_queries * groups <= _BLOCK_M:
        return False
    config = pick("attention_decode", _configs(call), **call.key)
    block_n = config.tiles["BLOCK_N"]
    parts = _parts(call, output.device, block_n)
    if parts == groups == 1:
        return False
    part_output, part_lse = output[None], lse[None]
    if parts > 1:
        part_output = output.new_empty(parts, *output.shape, dtype=torch.float32)
        part_lse = lse.new_empty(parts, *lse.shape)
    mask = call.arguments["mask"]
    attention_decode_kernel[(parts * programs,)](
        **call.arguments,
        output=rows(part_output[0])._replace(data=part_output),
        lse=row_statistics(part_lse[0])._replace(data=part_lse),
        parts=parts,
        part_keys=triton.cdiv(triton.cdiv(call.max_keys, parts), block_n) * block_n,
        part_stride_output=part_output.stride(0),
        part_stride_lse=part_lse.stride(0),
        MASK_PER_HEAD=mask is not None and groups > 1 and mask.stride_head != 0,
        PRECISION=call.precision,
        BLOCK_M=_BLOCK_M,
        HOIST_Q=hoists_query(call),
        **config.arguments(),
    )
    if parts > 1:
        combine_kernel[(lse.numel(),)](
            rows(part_output[0])._replace(data=part_output),
            row_statistics(part_lse[0])._replace(data=part_lse),
            rows(output),
            row_statistics(lse),
            part_output.stride(0),
            part_lse.stride(0),
            call.heads,
            lse.shape[-1],
            parts,
            VALUE_SIZE=call.arguments["VALUE_SIZE"],
            BLOCK_DV=padded_size(call.arguments["VALUE_SIZE"]),
            PARTS=triton.next_power_of_2(parts),
            num_warps=4,
            enable_fp_fusion=False,  # else lanes that hold the same sum round it differently
        )
    return True
