"""Matrix products with an epilogue: out = dropout(activation(a @ b + bias)) + residual, and what backward makes of it.

A program computes a tile (BLOCK_M, BLOCK_N) of the output in float32, along the depth K in steps of BLOCK_K. Tiles go
in groups of 8 rows of tiles, so that programs that run together share operands in L2. Where the output has too few
tiles for the machine, the depth is split: each part writes its float32 sums, and a second kernel adds the parts in
order and applies the epilogue. Two schedules: one program for each tile, which reads through pointers of any strides
(cp.async pipelining where there is such a thing), and on sm_90 and later, for 16-bit operands that its TMA unit can
read, one program for each multiprocessor, which fetches the next tile's operands while it writes this tile.

Operations: 2 M N K. Bytes: M K + K N + M N elements and what the epilogue reads and writes, each once, from memory; K
(BLOCK_M + BLOCK_N) elements for each tile into a multiprocessor. Bound: tensor cores for 16-bit operands where M, N and
K are some hundreds and more; memory for few rows (M <= 16, the weight is read once); float32 "ieee": multiply-adds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastformer.kernels.activations import activation_and_slope, dropout_arguments, row_dropout_keeps
from fastformer.kernels.configs import Config, float32_precision, pick, target


@triton.jit
def _tile_of(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The index-th tile: (row of tiles, column of tiles)."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.maximum(tl.cdiv(N, BLOCK_N), 1)
    group = index // (GROUP_M * tiles_n)
    within = index % (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % height, within // height


@triton.jit
def _halves(tile):
    """The left and the right half of the columns."""
    left_and_right = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(left_and_right, (0, 2, 1)))


@triton.jit
def _epilogue(
    product, rows, first_column, M, N,
    out_ptr, bias_ptr, stride_bias, pre_ptr, hidden_ptr, seed_ptr, threshold, scale, residual_ptr, stride_rm, stride_rn,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Of a tile of the product, float32; rows: its rows, int64. out, pre and hidden are (M, N), contiguous.

    Forward: dropout(activation(product + bias)) + residual; product + bias is kept in pre.
    GRADIENT: dropout(product) * activation'(pre); dropout(activation(pre)), which is needed as well, goes to hidden.
    """
    BLOCK_N: tl.constexpr = product.shape[1]
    columns = first_column + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    offsets = rows[:, None] * N + columns[None, :]
    dtype = out_ptr.dtype.element_ty
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns.to(tl.int64) * stride_bias, columns < N, other=0.0)
        product += bias.to(tl.float32)[None, :]
    if GRADIENT:
        pre = tl.load(pre_ptr + offsets, inside, other=0.0).to(tl.float32)
        hidden, slope = activation_and_slope(pre, ACTIVATION)
        out = product * slope
    else:
        if pre_ptr is not None:
            tl.store(pre_ptr + offsets, product.to(dtype), inside)
        out, _ = activation_and_slope(product, ACTIVATION)
    if seed_ptr is not None:
        kept = row_dropout_keeps(seed_ptr, threshold, rows, first_column, BLOCK_N)
        out = tl.where(kept, out * scale, 0.0)
        if hidden_ptr is not None:
            hidden = tl.where(kept, hidden * scale, 0.0)
    if hidden_ptr is not None:
        tl.store(hidden_ptr + offsets, hidden.to(dtype), inside)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + rows[:, None] * stride_rm + columns[None, :].to(tl.int64) * stride_rn
        out += tl.load(residual_ptrs, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, out.to(dtype), inside)


PART = tl.constexpr(64)  # columns


@triton.jit
def _finish(
    acc, sums, tile_m, tile_n, split, M, N, partial_ptr, partial_sums_ptr, sums_ptr,
    out_ptr, bias_ptr, stride_bias, pre_ptr, hidden_ptr, seed_ptr, threshold, scale, residual_ptr, stride_rm, stride_rn,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores the part of a split product, else applies the epilogue; `sums` are those of a's rows, (BLOCK_M)."""
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if partial_ptr is not None:  # (splits, M, N), and for the sums (splits, M)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows[:, None] < M) & (columns[None, :] < N)
        rows += split.to(tl.int64) * M
        tl.store(partial_ptr + rows[:, None] * N + columns[None, :], acc, inside)
        if partial_sums_ptr is not None:
            if tile_n == 0:
                tl.store(partial_sums_ptr + rows, sums, rows < (split + 1).to(tl.int64) * M)
    else:
        if sums_ptr is not None:
            if tile_n == 0:
                tl.store(sums_ptr + rows, sums.to(sums_ptr.dtype.element_ty), rows < M)
        # By parts of the columns: for the whole tile, what the epilogue needs at once is more than the registers.
        PARTS: tl.constexpr = max(BLOCK_N // PART, 1)
        if PARTS == 1:
            parts = (acc,)
        elif PARTS == 2:
            parts = _halves(acc)
        else:
            left, right = _halves(acc)
            parts = _halves(left) + _halves(right)
        for i in tl.static_range(PARTS):
            _epilogue(
                parts[i], rows, tile_n * BLOCK_N + i * (BLOCK_N // PARTS), M, N,
                out_ptr, bias_ptr, stride_bias, pre_ptr, hidden_ptr, seed_ptr, threshold, scale, residual_ptr,
                stride_rm, stride_rn, ACTIVATION, GRADIENT,
            )  # fmt: skip


def _matmul(
    a_ptr, stride_am, stride_ak, b_ptr, stride_bk, stride_bn, M, N, K,  # (M, K) and (K, N)
    steps,  # of a split: BLOCK_K of the depth each
    partial_ptr, partial_sums_ptr, sums_ptr,
    out_ptr, bias_ptr, stride_bias, pre_ptr, hidden_ptr, seed_ptr, threshold, scale, residual_ptr, stride_rm, stride_rn,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program for each tile and split."""
    split = tl.program_id(1)
    tile_m, tile_n = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, last = split * steps * BLOCK_K, tl.minimum((split + 1) * steps * BLOCK_K, K)
    k = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
    a_ptrs = a_ptr + rows[:, None] * stride_am + k[None, :] * stride_ak
    b_ptrs = b_ptr + k[:, None] * stride_bk + columns[None, :] * stride_bn
    a_inside, b_inside = rows[:, None] < M, columns[None, :] < N

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # 16-bit rows are added up as a product with ones, in 16 equal columns: if `a` were needed as it is, beside the
    # operand, Triton would not swizzle it in shared memory, and the loads of the operand would have bank conflicts.
    ONES: tl.constexpr = 1 if a_ptr.dtype.element_ty == tl.float32 else 16
    sums = tl.zeros((BLOCK_M, ONES), tl.float32)
    for start in range(first, last, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(a_ptrs, a_inside, other=0.0), tl.load(b_ptrs, b_inside, other=0.0)
        else:
            k_inside = start + tl.arange(0, BLOCK_K) < K
            a = tl.load(a_ptrs, a_inside & k_inside[None, :], other=0.0)
            b = tl.load(b_ptrs, b_inside & k_inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if SUMS:
            if tile_n == 0:
                if ONES == 1:
                    sums += tl.sum(a, axis=1, keep_dims=True)
                else:
                    ones = tl.full((BLOCK_K, ONES), 1.0, a.dtype)
                    sums = tl.dot(a, ones, sums, input_precision=PRECISION)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    _finish(
        acc, tl.max(sums, axis=1), tile_m, tile_n, split, M, N, partial_ptr, partial_sums_ptr, sums_ptr,
        out_ptr, bias_ptr, stride_bias, pre_ptr, hidden_ptr, seed_ptr, threshold, scale, residual_ptr, stride_rm,
        stride_rn, ACTIVATION, GRADIENT, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _load(descriptor, row, column, TRANSPOSED: tl.constexpr):
    """A tile of a matrix whose columns, if TRANSPOSED, are the rows in memory; 0 outside of it."""
    if TRANSPOSED:
        tile = descriptor.load([column, row]).T
    else:
        tile = descriptor.load([row, column])
    return tile


def _persistent_matmul(
    a_descriptor, b_descriptor, M, N, K, steps, splits, partial_ptr, partial_sums_ptr, sums_ptr,
    out_ptr, bias_ptr, stride_bias, pre_ptr, hidden_ptr, seed_ptr, threshold, scale, residual_ptr, stride_rm, stride_rn,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th tile; operands come through TMA."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0), flatten=True):
        split = index // tiles
        tile_m, tile_n = _tile_of(index % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums = tl.zeros((BLOCK_M,), tl.float32)
        for k in range(split * steps * BLOCK_K, tl.minimum((split + 1) * steps * BLOCK_K, K), BLOCK_K):
            a = _load(a_descriptor, tile_m * BLOCK_M, k, A_TRANSPOSED)
            b = _load(b_descriptor, k, tile_n * BLOCK_N, B_TRANSPOSED)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            if SUMS:
                if tile_n == 0:
                    sums += tl.sum(a.to(tl.float32), axis=1)
        _finish(
            acc, sums, tile_m, tile_n, split, M, N, partial_ptr, partial_sums_ptr, sums_ptr,
            out_ptr, bias_ptr, stride_bias, pre_ptr, hidden_ptr, seed_ptr, threshold, scale, residual_ptr, stride_rm,
            stride_rn, ACTIVATION, GRADIENT, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "splits", "threshold", "scale"])
def _add_splits(
    partial_ptr, partial_sums_ptr, sums_ptr, splits, M, N,
    out_ptr, bias_ptr, stride_bias, pre_ptr, hidden_ptr, seed_ptr, threshold, scale, residual_ptr, stride_rm, stride_rn,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the parts of a split product, in order, and applies the epilogue."""
    tile_m, tile_n = tl.program_id(0), tl.program_id(1)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    ptrs = partial_ptr + rows[:, None] * N + columns[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(splits):
        acc += tl.load(ptrs, inside, other=0.0)
        ptrs += M.to(tl.int64) * N
    if sums_ptr is not None:
        if tile_n == 0:
            sums = tl.zeros((BLOCK_M,), tl.float32)
            sums_ptrs = partial_sums_ptr + rows
            for _ in range(splits):
                sums += tl.load(sums_ptrs, rows < M, other=0.0)
                sums_ptrs += M
            tl.store(sums_ptr + rows, sums.to(sums_ptr.dtype.element_ty), rows < M)
    _epilogue(
        acc, rows, tile_n * BLOCK_N, M, N,
        out_ptr, bias_ptr, stride_bias, pre_ptr, hidden_ptr, seed_ptr, threshold, scale, residual_ptr, stride_rm,
        stride_rn, ACTIVATION, GRADIENT,
    )  # fmt: skip


# The size that varies by call is not specialized on: M of products with a weight, K of the gradients of weights.
_VARY = ["threshold", "scale", "steps", "splits"]
KERNELS = {
    (persistent, varying): triton.jit(function, do_not_specialize=[*names, varying])
    for persistent, function, names in ((False, _matmul, _VARY[:3]), (True, _persistent_matmul, _VARY))
    for varying in ("M", "K")
}


def _config(BLOCK_M: int, BLOCK_N: int, BLOCK_K: int, num_warps: int, num_stages: int) -> Config:
    tiles = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "GROUP_M": 8}
    return Config(tiles, num_warps, num_stages)


# Best guess first. None of them spills registers, whatever the epilogue.
_HALF = [_config(128, 128, 64, 8, 3), _config(128, 64, 64, 8, 3), _config(128, 128, 32, 8, 4)]
_HALF_WIDE = [_config(128, 256, 64, 8, 3), _config(128, 128, 64, 8, 4)]
_HALF_AMD = [_config(128, 128, 32, 8, 2), _config(64, 128, 32, 8, 2)]
_HALF_SOME_ROWS = [_config(64, 64, 64, 4, 3), _config(32, 64, 64, 4, 3)]
_HALF_ODD = [_config(64, 64, 64, 8, 3), _config(64, 64, 32, 8, 3)]  # read element by element: addresses take registers
_HALF_FEW_ROWS = [_config(16, 64, 64, 4, 4), _config(16, 128, 64, 4, 4)]
_FLOAT = [_config(128, 64, 16, 8, 3), _config(64, 64, 16, 8, 3)]
_FLOAT_SMALL = [_config(64, 64, 16, 8, 3), _config(64, 64, 16, 4, 3)]
_FLOAT_AMD = [_config(64, 64, 16, 8, 2), _config(32, 64, 16, 4, 2)]
_FLOAT_FEW_ROWS = [_config(16, 64, 16, 4, 3), _config(16, 64, 32, 8, 3)]


def _candidates(kind: str, dtype: str, rows: str, epilogue: str, persistent: bool, aligned: bool) -> list[Config]:
    if kind == "interpreter":
        return [_config(16 if rows == "few" else 32, 64 if epilogue != "none" else 32, 32, 4, 2)]
    if dtype in ("float32", "tf32x3"):
        if rows == "few":
            return _FLOAT_FEW_ROWS
        if dtype == "tf32x3" and kind == "sm_120":
            return [_config(32, 64, 16, 4, 3)]  # larger ones spill there
        small = not aligned or epilogue in ("sums", "dropout") or (dtype == "tf32x3" and epilogue == "gradient")
        return _FLOAT_AMD if kind.startswith("gfx") else _FLOAT_SMALL if small else _FLOAT
    if rows == "few":
        return _HALF_FEW_ROWS
    if not aligned:
        return _HALF_ODD
    if rows == "some":
        return _HALF_SOME_ROWS
    if kind.startswith("gfx"):
        return _HALF_AMD
    wide = {"sm_90": ("none", "dropout", "sums"), "sm_100": ("none", "dropout"), "sm_103": ("none", "dropout")}
    if persistent and epilogue in wide.get(kind, ()):
        return _HALF_WIDE
    return _HALF


def _multiprocessors(device: torch.device) -> int:
    return 8 if target() == "interpreter" else torch.cuda.get_device_properties(device).multi_processor_count


def _has_tma() -> bool:
    kind = target()
    return kind == "interpreter" or (kind.startswith("sm_") and int(kind[3:]) >= 90)


def _transposed_for_tma(x: Tensor) -> bool | None:
    """TMA reads 16-byte aligned rows: are they x's columns (True) or its rows (False)? None: it can't read x."""
    for transposed, (stride, inner) in ((False, x.stride()), (True, x.stride()[::-1])):
        if inner == 1 and stride > 0 and stride * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0:
            return transposed
    return None


def _is_aligned(x: Tensor) -> bool:
    """Can 16 bytes of its rows or of its columns be read at once? Triton takes note of multiples of 16."""
    inner, stride = sorted(x.stride())
    return inner == 1 and stride % 16 == 0 and x.data_ptr() % 16 == 0


def _descriptor(x: Tensor, block: list[int], transposed: bool) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x.t(), block[::-1]) if transposed else TensorDescriptor.from_tensor(x, block)


def _splits(tiles: int, K: int, BLOCK_K: int, processors: int) -> tuple[int, int]:
    """In how many parts the depth is split where there are too few tiles, and the steps of each."""
    least_depth = 64 if target() == "interpreter" else 1024
    wanted = max(min(processors // tiles, K // least_depth), 1)
    steps = max(triton.cdiv(triton.cdiv(K, BLOCK_K), wanted), 1)
    return max(triton.cdiv(K, steps * BLOCK_K), 1), steps


def matmul(
    a: Tensor, b: Tensor, *, varying: str = "M", bias: Tensor | None = None, activation: str | None = None,
    dropout_p: float = 0.0, seed: Tensor | None = None, residual: Tensor | None = None,
    pre_activation: Tensor | None = None, gradient: bool = False, hidden: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dropout(activation(a @ b + bias)) + residual, (M, N), in a's dtype.

    Args:
        a: (M, K), b: (K, N), residual: (M, N), bias: (N): any strides.
        varying: the size that varies from call to call, "M" or "K"; the others are widths of the model.
        pre_activation: (M, N), contiguous; gets a @ b + bias. With `gradient` it is read:
            the result is dropout(a @ b) * activation'(pre_activation).
        hidden: with `gradient`, (M, N), contiguous; gets dropout(activation(pre_activation)).
        sums: (M); gets the sums of a's rows.
    """
    (M, K), N = a.shape, b.shape[1]
    out = torch.empty(M, N, dtype=a.dtype, device=a.device)
    if M == 0 or (N == 0 and sums is None):
        return out
    rows = "few" if M <= 16 else "some" if M <= 64 else "many"
    layouts = None
    if rows != "few" and a.element_size() == 2 and K > 0 and N > 0 and _has_tma():
        layouts = _transposed_for_tma(a), _transposed_for_tma(b)
    persistent = layouts is not None and None not in layouts
    epilogue = "gradient" if gradient else "dropout" if dropout_p > 0 else "none"
    if sums is not None:
        epilogue = "sums"
    dtype = "tf32x3" if float32_precision() == "tf32x3" and a.element_size() == 4 else str(a.dtype)[len("torch.") :]
    aligned = persistent or (_is_aligned(a) and _is_aligned(b))
    key = {"dtype": dtype, "rows": rows, "epilogue": epilogue, "persistent": persistent, "aligned": aligned}
    config = pick("matmul", _candidates(target(), **key), **key)
    BLOCK_M, BLOCK_N, BLOCK_K = (config.tiles[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    tiles = triton.cdiv(M, BLOCK_M) * max(triton.cdiv(N, BLOCK_N), 1)
    processors = _multiprocessors(a.device)
    splits, steps = _splits(tiles, K, BLOCK_K, processors)
    partial = partial_sums = None
    if splits > 1:
        partial = torch.empty(splits, M, N, dtype=torch.float32, device=a.device)
        partial_sums = None if sums is None else torch.empty(splits, M, dtype=torch.float32, device=a.device)
    operands = (
        out, bias, 0 if bias is None else bias.stride(0), pre_activation, hidden, *dropout_arguments(dropout_p, seed),
        residual, *((0, 0) if residual is None else residual.stride()),
    )  # fmt: skip
    flags = {"ACTIVATION": activation, "GRADIENT": gradient}
    options = {**flags, "PRECISION": float32_precision(), "SUMS": sums is not None, **config.arguments()}
    if persistent:
        a_descriptor = _descriptor(a, [BLOCK_M, BLOCK_K], layouts[0])
        b_descriptor = _descriptor(b, [BLOCK_K, BLOCK_N], layouts[1])
        KERNELS[True, varying][(min(processors, tiles * splits),)](
            a_descriptor, b_descriptor, M, N, K, steps, splits, partial, partial_sums, sums, *operands,
            A_TRANSPOSED=layouts[0], B_TRANSPOSED=layouts[1], **options,
        )  # fmt: skip
    else:
        KERNELS[False, varying][tiles, splits](
            a, *a.stride(), b, *b.stride(), M, N, K, steps, partial, partial_sums, sums, *operands,
            EVEN_K=K % BLOCK_K == 0, **options,
        )  # fmt: skip
    if splits > 1:
        BLOCK_M, BLOCK_N = (16, 64) if target() == "interpreter" else (16, 128)
        _add_splits[triton.cdiv(M, BLOCK_M), max(triton.cdiv(N, BLOCK_N), 1)](
            partial, partial_sums, sums, splits, M, N, *operands, **flags, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out
