"""linear_cross_entropy: log-sum-exp of input @ linear_weight.T without the logits in memory, and the gradients.

Rows: the labelled ones are listed on the device, so that nothing waits for their number; tiles beyond it end at once.
Loss: a program takes a tile of rows and some tiles of classes, one after the other, and keeps the largest logit, the
sum of exponentials and the target's logit; a second kernel joins the parts. Gradients: for a chunk of rows whose logits
fill at most CHUNK_BYTES, the logits are computed again, tile by tile, and softmax - one-hot is written in the operands'
dtype; two products take it to the gradients of input and weight, which are summed in float32, the weight's chunk by
chunk in order. To keep the logits instead would save a quarter of the operations and write and read them in float32;
to compute them again keeps the loss alone free of them.

M labelled rows, C classes, D features. Operations: 2 M C D for the loss and 6 M C D with the gradients' products, 8 in
all of at least 6. Bytes: M D + C D read for each product, 3 M C elements written and read for the gradients, 8 C D for
the weight's gradient (float32) for each chunk. Bound: tensor cores for 16-bit operands, float32 fused multiply-adds.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels import configs
from fastformer.kernels.configs import Config, float32_precision, pick
from fastformer.kernels.linear import rows_of

CHUNK_BYTES = 256 << 20  # of the gradient of the logits

LOWEST = tl.constexpr(-3.4028234663852886e38)  # not -inf, which would make a NaN of classes that are ruled out


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _list_labelled(
    target_ptr, class_weight_ptr, labelled_ptr, count_ptr, total_ptr, N, C, ignore_index, BLOCK: tl.constexpr
):
    """The rows with a label, in order; how many there are, and the sum of their weights. One program."""
    count = tl.zeros((), tl.int32)
    total = tl.zeros((), tl.float32)
    for first in range(0, N, BLOCK):
        row = first + tl.arange(0, BLOCK)
        target = tl.load(target_ptr + row, row < N, other=ignore_index)
        kept = (target != ignore_index).to(tl.int32)
        tl.store(labelled_ptr + count + tl.cumsum(kept) - 1, row, kept != 0)
        count += tl.sum(kept)
        if class_weight_ptr is not None:
            total += tl.sum(tl.where(kept != 0, _weight_of(class_weight_ptr, target, kept != 0, C), 0.0))
    tl.store(count_ptr, count)
    tl.store(total_ptr, count.to(tl.float32) if class_weight_ptr is None else total)


@triton.jit
def _weight_of(class_weight_ptr, target, inside, C):
    """Of the target's class; NaN for a target that is no class, so that it shows in the loss."""
    is_class = (target >= 0) & (target < C)
    if class_weight_ptr is None:
        weight = tl.where(is_class, 1.0, float("nan"))
    else:
        weight = tl.load(class_weight_ptr + target, inside & is_class, other=float("nan"))
    return weight


@triton.jit
def _logits(
    x_ptr, stride_xm, stride_xk, rows, inside, w_ptr, stride_wn, stride_wk, bias_ptr, columns, C, D,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) float32: of these rows and classes."""
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xm + k[None, :] * stride_xk
    w_ptrs = w_ptr + columns.to(tl.int64)[None, :] * stride_wn + k[:, None] * stride_wk
    x_inside, w_inside = inside[:, None], (columns < C)[None, :]
    logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN_K:
            x, w = tl.load(x_ptrs, x_inside, other=0.0), tl.load(w_ptrs, w_inside, other=0.0)
        else:
            x = tl.load(x_ptrs, x_inside & (start + k < D)[None, :], other=0.0)
            w = tl.load(w_ptrs, w_inside & (start + k < D)[:, None], other=0.0)
        logits = tl.dot(x, w, logits, input_precision=PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + columns, columns < C, other=0.0).to(tl.float32)[None, :]
    return logits


@triton.jit(do_not_specialize=["N"])
def _statistics(
    x_ptr, stride_xm, stride_xk, w_ptr, stride_wn, stride_wk, bias_ptr, class_weight_ptr, target_ptr,
    labelled_ptr, count_ptr, partial_ptr, N, C, D, SMOOTHING: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of TILES tiles of classes, for each row: largest logit m, sum(exp(logit - m)), the target's logit, and with
    SMOOTHING sum(class_weight (m - logit)) and sum(class_weight). partial is (5, splits, N)."""
    first, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    count = tl.load(count_ptr)
    if first >= count:
        return
    position = first + tl.arange(0, BLOCK_M)
    inside = position < count
    rows = tl.load(labelled_ptr + position, inside, other=0)
    target = tl.load(target_ptr + rows, inside, other=-1)

    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    sum_exp = tl.zeros((BLOCK_M,), tl.float32)
    target_logit = tl.zeros((BLOCK_M,), tl.float32)
    distance = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first_column = split * TILES * BLOCK_N
    for column in range(first_column, tl.minimum(first_column + TILES * BLOCK_N, C), BLOCK_N):
        columns = column + tl.arange(0, BLOCK_N)
        logits = _logits(
            x_ptr, stride_xm, stride_xk, rows, inside, w_ptr, stride_wn, stride_wk, bias_ptr, columns, C, D,
            PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        logits = tl.where((columns < C)[None, :], logits, -float("inf"))
        new_m = tl.maximum(m, tl.max(logits, axis=1))  # without NaN, which the sum keeps
        sum_exp = sum_exp * tl.exp(m - new_m) + tl.sum(tl.exp(logits - new_m[:, None]), axis=1)
        target_logit += tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), axis=1)
        if SMOOTHING:
            weight = tl.load(class_weight_ptr + columns, columns < C, other=0.0)
            distances = tl.where((columns < C)[None, :], weight[None, :] * (new_m[:, None] - logits), 0.0)
            distance += total * (new_m - m) + tl.sum(distances, axis=1)
            total += tl.sum(weight)
        m = new_m
    partial_ptrs = partial_ptr + split.to(tl.int64) * N + position
    step = tl.num_programs(1).to(tl.int64) * N
    tl.store(partial_ptrs, m, inside)
    tl.store(partial_ptrs + step, sum_exp, inside)
    tl.store(partial_ptrs + 2 * step, target_logit, inside)
    if SMOOTHING:
        tl.store(partial_ptrs + 3 * step, distance, inside)
        tl.store(partial_ptrs + 4 * step, total, inside)


@triton.jit(do_not_specialize=["splits", "N", "label_smoothing"])
def _join(
    partial_ptr, splits, class_weight_ptr, target_ptr, labelled_ptr, count_ptr, lse_ptr, loss_ptr, N, C,
    label_smoothing, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """lse (its two parts) and loss of each row from the statistics of its parts."""
    count = tl.load(count_ptr)
    if tl.program_id(0) * BLOCK >= count:
        return
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < count
    rows = tl.load(labelled_ptr + position, inside, other=0)
    target = tl.load(target_ptr + rows, inside, other=-1)
    step = splits.to(tl.int64) * N

    m = tl.full((BLOCK,), LOWEST, tl.float32)
    partial_ptrs = partial_ptr + position
    for _ in range(splits):
        m = tl.maximum(m, tl.load(partial_ptrs, inside, other=0.0))
        partial_ptrs += N
    sum_exp = tl.zeros((BLOCK,), tl.float32)
    target_logit = tl.zeros((BLOCK,), tl.float32)
    partial_ptrs = partial_ptr + position
    for _ in range(splits):
        scale = tl.exp(tl.load(partial_ptrs, inside, other=0.0) - m)
        sum_exp += scale * tl.load(partial_ptrs + step, inside, other=0.0)
        target_logit += tl.load(partial_ptrs + 2 * step, inside, other=0.0)
        partial_ptrs += N
    log_sum = tl.log(sum_exp)
    loss = _weight_of(class_weight_ptr, target, inside, C) * (m - target_logit + log_sum)
    if SMOOTHING:
        distance = tl.zeros((BLOCK,), tl.float32)  # sum(class_weight (lse - logit))
        partial_ptrs = partial_ptr + position
        for _ in range(splits):
            part_m = tl.load(partial_ptrs, inside, other=0.0)
            distance += tl.load(partial_ptrs + 3 * step, inside, other=0.0)
            distance += tl.load(partial_ptrs + 4 * step, inside, other=0.0) * (m - part_m + log_sum)
            partial_ptrs += N
        loss = (1 - label_smoothing) * loss + label_smoothing / C * distance
    tl.store(lse_ptr + rows, m, inside)
    tl.store(lse_ptr + N + rows, log_sum, inside)
    tl.store(loss_ptr + rows, loss, inside)


@triton.jit(do_not_specialize=["N", "first_row", "label_smoothing"])
def _gradient_of_logits(
    x_ptr, stride_xm, stride_xk, w_ptr, stride_wn, stride_wk, bias_ptr, class_weight_ptr, class_total_ptr, target_ptr,
    labelled_ptr, count_ptr, lse_ptr, N, factor_ptr, out_ptr, first_row, C, D, label_smoothing, SMOOTHING: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """factor ((1 - smoothing) weight[target] (softmax - one-hot) + smoothing / C sum(weight softmax - weight)) of the
    chunk's rows, (chunk, C); the factor is the gradient of the row's loss, 1 where there is none."""
    first, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    count = tl.load(count_ptr)
    if first_row + first >= count:
        return
    position = first_row + first + tl.arange(0, BLOCK_M)
    inside = position < count
    rows = tl.load(labelled_ptr + position, inside, other=0)
    target = tl.load(target_ptr + rows, inside, other=-1)
    columns = column + tl.arange(0, BLOCK_N)
    logits = _logits(
        x_ptr, stride_xm, stride_xk, rows, inside, w_ptr, stride_wn, stride_wk, bias_ptr, columns, C, D,
        PRECISION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    m = tl.load(lse_ptr + rows, inside, other=0.0)
    log_sum = tl.load(lse_ptr + N + rows, inside, other=0.0)
    softmax = tl.exp(logits - m[:, None] - log_sum[:, None])
    at_target = _weight_of(class_weight_ptr, target, inside, C)
    if factor_ptr is not None:
        factor = tl.load(factor_ptr + rows, inside, other=0.0)
        at_target *= factor
    scale = at_target
    if SMOOTHING:
        at_target *= 1 - label_smoothing
        everywhere = tl.full((BLOCK_M,), 1.0, tl.float32) * label_smoothing / C
        if factor_ptr is not None:
            everywhere *= factor
        scale = at_target + everywhere * tl.load(class_total_ptr)
    gradient = softmax * scale[:, None]
    gradient -= tl.where(columns[None, :] == target[:, None], at_target[:, None], 0.0)
    if SMOOTHING:
        weight = tl.load(class_weight_ptr + columns, columns < C, other=0.0)
        gradient -= everywhere[:, None] * weight[None, :]
    offsets = (first + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None] * C + columns[None, :]
    tl.store(out_ptr + offsets, gradient.to(out_ptr.dtype.element_ty), inside[:, None] & (columns < C)[None, :])


@triton.jit
def _mean(x, total_ptr, count):
    """x / total; x where no row is labelled, which is 0."""
    if total_ptr is not None:
        x = tl.where(count > 0, x / tl.load(total_ptr), x)
    return x


@triton.jit(do_not_specialize=["first_row"])
def _input_gradient(
    gradient_ptr, w_ptr, stride_wn, stride_wk, labelled_ptr, count_ptr, total_ptr, out_ptr, first_row, C, D,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[labelled] (N, D) float32 = gradient (chunk, C) @ weight (C, D) [/ total]"""
    first = tl.program_id(0) * BLOCK_M
    count = tl.load(count_ptr)
    if first_row + first >= count:
        return
    position = first_row + first + tl.arange(0, BLOCK_M)
    inside = position < count
    features = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    g_ptrs = gradient_ptr + (first + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None] * C + k[None, :]
    w_ptrs = w_ptr + k.to(tl.int64)[:, None] * stride_wn + features[None, :] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        g = tl.load(g_ptrs, inside[:, None] & (start + k < C)[None, :], other=0.0)
        w = tl.load(w_ptrs, (start + k < C)[:, None] & (features < D)[None, :], other=0.0)
        acc = tl.dot(g, w, acc, input_precision=PRECISION)
        g_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wn
    rows = tl.load(labelled_ptr + position, inside, other=0).to(tl.int64)
    out_ptrs = out_ptr + rows[:, None] * D + features[None, :]
    tl.store(out_ptrs, _mean(acc, total_ptr, count), inside[:, None] & (features < D)[None, :])


@triton.jit(do_not_specialize=["first_row", "chunk"])
def _weight_gradient(
    gradient_ptr, x_ptr, stride_xm, stride_xk, labelled_ptr, count_ptr, total_ptr, out_ptr, bias_ptr,
    first_row, chunk, C, D, ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (C, D) float32 = or, with ADD, += gradient (chunk, C).T @ x[labelled] [/ total]; bias (C) its row sums."""
    count = tl.load(count_ptr)
    if ADD:
        if first_row >= count:
            return
    tile_n = tl.program_id(0)
    classes = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, tl.minimum(chunk, count - first_row), BLOCK_K):
        inside = first_row + start + k < count
        inside &= start + k < chunk
        g_ptrs = gradient_ptr + (start + k).to(tl.int64)[None, :] * C + classes[:, None]
        g = tl.load(g_ptrs, (classes < C)[:, None] & inside[None, :], other=0.0)
        if out_ptr is not None:
            rows = tl.load(labelled_ptr + first_row + start + k, inside, other=0).to(tl.int64)
            x_ptrs = x_ptr + rows[:, None] * stride_xm + features[None, :] * stride_xk
            x = tl.load(x_ptrs, inside[:, None] & (features < D)[None, :], other=0.0)
            acc = tl.dot(g, x, acc, input_precision=PRECISION)
        if bias_ptr is not None:
            if tile_n == 0:
                sums += tl.sum(g.to(tl.float32), axis=1)
    if out_ptr is not None:
        out_ptrs = out_ptr + classes.to(tl.int64)[:, None] * D + features[None, :]
        inside = (classes < C)[:, None] & (features < D)[None, :]
        acc = _mean(acc, total_ptr, count)
        if ADD:
            acc += tl.load(out_ptrs, inside, other=0.0)
        tl.store(out_ptrs, acc, inside)
    if bias_ptr is not None:
        if tile_n == 0:
            sums = _mean(sums, total_ptr, count)
            if ADD:
                sums += tl.load(bias_ptr + classes, classes < C, other=0.0)
            tl.store(bias_ptr + classes, sums, classes < C)


def _config(BLOCK_M: int, BLOCK_N: int, BLOCK_K: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}, num_warps, num_stages)


# Best guess first. The tiles of logits leave registers for the exponentials.
_HALF = {
    "sm_80": [_config(128, 128, 32, 8, 4), _config(128, 128, 64, 8, 3), _config(64, 128, 64, 4, 3)],
    "sm_90": [_config(128, 128, 64, 8, 4), _config(128, 128, 64, 4, 3), _config(64, 128, 64, 4, 4)],
    "sm_100": [_config(128, 128, 64, 8, 4), _config(128, 128, 64, 4, 3)],
    "gfx": [_config(128, 128, 32, 8, 2), _config(64, 128, 64, 4, 2)],
    "other": [_config(128, 128, 32, 8, 3), _config(64, 128, 64, 4, 3)],
}
_HALF_ODD = [_config(64, 64, 32, 8, 3)]  # read element by element: addresses take registers
_FLOAT32 = {"sm_100": [_config(64, 64, 16, 4, 3)], "other": [_config(64, 64, 16, 8, 3), _config(64, 64, 16, 8, 2)]}


def _candidates(dtype: torch.dtype, aligned: bool) -> list[Config]:
    kind = configs.target()
    if kind == "interpreter":
        return [_config(16, 32, 32, 4, 2)]
    if dtype == torch.float32:
        return _FLOAT32.get(kind, _FLOAT32["other"])
    if not aligned:
        return _HALF_ODD
    return _HALF.get(kind, _HALF["gfx" if kind.startswith("gfx") else "other"])


@dataclass
class _Loss:
    """A call's operands as the kernels take them; N rows, C classes, D features."""

    x: Tensor  # (N, D)
    linear_weight: Tensor  # (C, D)
    bias: Tensor | None  # (C), contiguous
    class_weight: Tensor | None  # (C) float32, contiguous; always there with label smoothing
    target: Tensor  # (N), contiguous
    label_smoothing: float
    labelled: Tensor  # (N) int32, the first `count` of which count
    count: Tensor  # int32
    total: Tensor  # float32, the weights of the labelled rows

    def pick(self, kernel: str) -> Config:
        """By whether 16 bytes of each row can be read at once: Triton takes note of multiples of 16."""
        aligned = all(
            x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0 for x in (self.x, self.linear_weight)
        )
        dtype = self.x.dtype
        return pick(kernel, _candidates(dtype, aligned), dtype=str(dtype), aligned=aligned)

    def launch(self, kernel, grid: tuple[int, int], config: Config, *arguments) -> None:
        """Of _statistics and _gradient_of_logits, which begin and end with the same arguments."""
        kernel[grid](
            self.x, *self.x.stride(), self.linear_weight, *self.linear_weight.stride(), self.bias, self.class_weight,
            *arguments, SMOOTHING=self.label_smoothing > 0, PRECISION=float32_precision(),
            EVEN_K=self.x.shape[1] % config.tiles["BLOCK_K"] == 0, **config.arguments(),
        )  # fmt: skip


def _prepare(input, linear_weight, target, linear_bias, weight, ignore_index, label_smoothing) -> _Loss:
    x, targets = rows_of(input), target.reshape(-1).contiguous()
    if label_smoothing > 0 and weight is None:
        weight = torch.ones(len(linear_weight), device=x.device)
    weight = None if weight is None else weight.float().contiguous()
    labelled, count = (torch.empty(n, dtype=torch.int32, device=x.device) for n in (len(x), ()))
    total = torch.empty((), dtype=torch.float32, device=x.device)
    _list_labelled[(1,)](
        targets, weight, labelled, count, total, len(x), len(linear_weight), ignore_index,
        BLOCK=64 if configs.target() == "interpreter" else 1024, num_warps=4,
    )  # fmt: skip
    bias = None if linear_bias is None else linear_bias.contiguous()
    return _Loss(x, linear_weight, bias, weight, targets, label_smoothing, labelled, count, total)


def _losses(loss: _Loss) -> tuple[Tensor, Tensor]:
    """Losses (N), and lse in two parts (2, N), of the rows, 0 where there is no label."""
    (N, D), C = loss.x.shape, len(loss.linear_weight)
    losses, lse = torch.zeros(N, device=loss.x.device), torch.zeros(2, N, device=loss.x.device)
    if N == 0 or C == 0:
        return losses, lse
    config = loss.pick("linear_cross_entropy")
    tiles = 2 if configs.target() == "interpreter" else 8  # of classes for each program
    splits = triton.cdiv(C, tiles * config.tiles["BLOCK_N"])
    partial = torch.empty(5, splits, N, device=loss.x.device)
    config = Config(config.tiles | {"TILES": tiles}, config.num_warps, config.num_stages)
    loss.launch(
        _statistics, (triton.cdiv(N, config.tiles["BLOCK_M"]), splits), config,
        loss.target, loss.labelled, loss.count, partial, N, C, D,
    )  # fmt: skip
    _join[(triton.cdiv(N, 128),)](
        partial, splits, loss.class_weight, loss.target, loss.labelled, loss.count, lse, losses, N, C,
        loss.label_smoothing, SMOOTHING=loss.label_smoothing > 0, BLOCK=128, num_warps=4,
    )  # fmt: skip
    return losses, lse


def _gradients(
    loss: _Loss, lse: Tensor, factor: Tensor | None, total: Tensor | None, shape: torch.Size,
    need_input: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of the sum of factor (N) x loss, divided by total; float32, empty where it isn't needed."""
    (N, D), C = loss.x.shape, len(loss.linear_weight)
    like = {"dtype": torch.float32, "device": loss.x.device}
    grad_input = torch.zeros(shape if need_input else 0, **like)
    grad_weight = torch.zeros((C, D) if need_weight else 0, **like)
    grad_bias = torch.zeros(C if need_bias else 0, **like)
    needed = need_input, need_weight, need_bias
    if N == 0 or C == 0 or not any(needed):
        return grad_input, grad_weight, grad_bias
    dtype = loss.x.dtype
    logits, to_input, to_weight = (
        loss.pick(f"linear_cross_entropy {name}") for name in ("logits", "grad_input", "grad_weight")
    )
    chunk = min(max(CHUNK_BYTES // (C * dtype.itemsize) // 128 * 128, 128), N)
    gradient = torch.empty(chunk, C, dtype=dtype, device=loss.x.device)
    class_total = None if loss.class_weight is None else loss.class_weight.sum()
    precision = float32_precision()
    for first in range(0, N, chunk):
        rows = min(chunk, N - first)
        loss.launch(
            _gradient_of_logits, _grid(rows, C, logits), logits,
            class_total, loss.target, loss.labelled, loss.count, lse, N, factor, gradient, first, C, D,
            loss.label_smoothing,
        )  # fmt: skip
        if need_input and D > 0:
            _input_gradient[_grid(rows, D, to_input)](
                gradient, loss.linear_weight, *loss.linear_weight.stride(), loss.labelled, loss.count, total,
                grad_input, first, C, D, PRECISION=precision, **to_input.arguments(),
            )  # fmt: skip
        if need_bias or (need_weight and D > 0):
            tiles_m, tiles_n = _grid(C, D, to_weight)
            _weight_gradient[max(tiles_n, 1) if need_weight else 1, tiles_m](
                gradient, loss.x, *loss.x.stride(), loss.labelled, loss.count, total,
                grad_weight if need_weight and D > 0 else None, grad_bias if need_bias else None,
                first, rows, C, D, ADD=first > 0, PRECISION=precision, **to_weight.arguments(),
            )  # fmt: skip
    return grad_input, grad_weight, grad_bias


def _grid(rows: int, columns: int, config: Config) -> tuple[int, int]:
    return triton.cdiv(rows, config.tiles["BLOCK_M"]), triton.cdiv(columns, config.tiles["BLOCK_N"])


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = _prepare(input, linear_weight, target, linear_bias, weight, ignore_index, label_smoothing)
    losses, lse = _losses(loss)
    total = loss.total if reduction == "mean" else None
    gradients = _gradients(loss, lse, None, total, input.shape, need_input, need_weight, need_bias)
    if reduction == "none":
        return losses.view(target.shape), lse, *gradients
    return losses.sum() if total is None else losses.sum() / total, lse, *gradients


def linear_cross_entropy_backward(
    grad_output: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = _prepare(input, linear_weight, target, linear_bias, weight, ignore_index, label_smoothing)
    factor = grad_output.reshape(-1).contiguous()
    return _gradients(loss, lse, factor, None, input.shape, need_input, need_weight, need_bias)
