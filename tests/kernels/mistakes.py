"""The mistakes that mutations.py plants: (tests, file in kernels/, function) -> {mistake: (text, wrong text)}."""

NORM = ("ops/test_layer_norm.py", "ops/test_add_layer_norm.py")
MASKS = ("ops/test_attention_masks.py",)
TILES = ("kernels/test_attention.py",)
ATTENTION = ("ops/test_scaled_dot_product_attention.py", "ops/test_attention_masks.py", "ops/test_varlen_attn.py")
PRODUCT = ("ops/test_linear.py", "ops/test_feed_forward.py")
LOSS = ("ops/test_linear_cross_entropy.py", "kernels/test_linear_cross_entropy.py")
DROPOUT = ("ops/test_add_layer_norm.py", "ops/test_linear.py", "ops/test_scaled_dot_product_attention.py")

# The text stands once in the function.
MISTAKES = {
    (ATTENTION, "attention.py", "visible"): {
        "a key too many is visible": ("seen = key < keys", "seen = key <= keys"),
        "the diagonal is hidden": ("key - query <= highest", "key - query < highest"),
    },
    (ATTENTION, "attention.py", "band"): {
        "windows start at the top left": ("offset = keys - queries", "offset = keys * 0"),
    },
    (ATTENTION, "attention.py", "visible_tiles"): {
        "tiles end before the last visible key": ("last_column + 1\n", "last_column\n"),
        "a tile at the diagonal counts as whole": (
            "first + rows - 1 + lowest)\n        whole_last", "first + lowest)\n        whole_last",
        ),
    },
    (ATTENTION, "attention.py", "load_rows"): {
        "rows behind the end are read": ("mask=row < rows, other", "mask=row <= rows, other"),
    },
    (ATTENTION, "attention.py", "store_rows"): {
        "rows behind the end are written": ("mask=(row < rows)", "mask=(row <= rows)"),
    },
    (TILES, "attention.py", "load_rows"): {
        "a head's second tile has the columns of the first": ("ROWS, i * BLOCKS[0], BLOCKS[i]", "ROWS, 0, BLOCKS[i]"),
    },
    (TILES, "attention.py", "dot_of_rows"): {
        "a head's second tile is left out of the scores": ("range(1, len(a))", "range(1, 1)"),
    },
    (TILES, "attention.py", "dot_in_turns"): {
        "a tile of a wide head has the columns of the first": ("[None, :] + i * BLOCKS[0]", "[None, :]"),
    },
    (MASKS, "attention.py", "load_mask"): {
        "float masks are not in units of log2": ("values * LOG2E", "values"),
    },
    (ATTENTION, "attention_forward.py", "attention_forward_kernel"): {
        "scores are not scaled": ("scale = tl.abs(scale) * LOG2E", "scale = LOG2E"),
        "the accumulator is not rescaled": ("scaled(acc, rescale[:, None])", "acc"),
        "the last tile is skipped": (
            "begin, end - (whole_end - whole_begin)", "begin, end - (whole_end - whole_begin) - BLOCK_N",
        ),
        "a wrong key head of a group": ("kv_head = head // groups", "kv_head = head % groups"),
        "dropout counts sequences as heads": (
            "start, BLOCK_N, query_index, head, sequence", "start, BLOCK_N, query_index, sequence, head",
        ),
    },
    (ATTENTION, "attention_forward.py", "online_softmax"): {
        "the sum is not rescaled": ("l * rescale + ", "l + "),
    },
    (ATTENTION, "attention_forward.py", "log_sum_exp"): {
        "lse is in units of log2": (" * LN2", ""),
    },
    (ATTENTION, "attention_backward.py", "grad_key_value_kernel"): {
        "the gradient of the keys has no scale": ("grad_key, scaled(dk, scale),", "grad_key, dk,"),
        "the backward's dropout counts key heads": (
            "first, BLOCK_N, query_column, head, sequence)", "first, BLOCK_N, query_column, kv_head, sequence)",
        ),
        "only the group's first head counts": ("kv_head * groups + member", "kv_head * groups"),
    },
    (ATTENTION, "attention_backward.py", "grad_query_kernel"): {
        "the backward loses the mask": ("scores = hide(scores, seen, values)", "pass"),
        "dropout is not in the gradient of the scores": ("dp = tl.where(kept, dp * dropout_scale, 0.0)", "pass"),
    },
    (ATTENTION, "attention_backward.py", "delta_kernel"): {
        "delta leaves out the output": ("do[i].to(tl.float32) * o[i].to(tl.float32)", "do[i].to(tl.float32)"),
    },
    (ATTENTION, "attention_backward.py", "load_lse"): {
        "lse is read in the wrong base": ("natural * LOG2E", "natural"),
    },
    (NORM, "norm.py", "_statistics"): {
        "the variance of a sample": ("squares / COLUMNS", "squares / (COLUMNS - 1 + (COLUMNS == 1))"),
        "eps is left out": ("variance + eps", "variance"),
    },
    (NORM, "norm.py", "_load_sum"): {
        "the residual is dropped": ("x += _load(residual_ptr, row, residual_stride, column, inside, VECTOR)", "pass"),
        "the input's stride is the width": ("_load(input_ptr, row, input_stride,", "_load(input_ptr, row, BLOCK_N,"),
    },
    (NORM, "norm.py", "_tile"): {
        "a row too many": ("inside = row < rows", "inside = row <= rows"),
    },
    (NORM, "norm.py", "_dropout"): {
        "dropout's counter is of the next row": ("row.to(tl.uint32)", "(row + 1).to(tl.uint32)"),
    },
    (NORM, "norm.py", "backward_kernel"): {
        "the gradient misses its second mean": ("h - mean_h - x_hat * mean_hx", "h - mean_h"),
        "rows are summed twice": ("tl.num_programs(0) * BLOCK_M)", "BLOCK_M)"),
    },
    (NORM, "norm.py", "_store_gradients"): {
        "the gradient of the sum is dropped": ("grad += _load(grad_sum_ptr", "grad = grad + 0 * _load(grad_sum_ptr"),
    },
    (NORM, "norm.py", "sum_shares_kernel"): {
        "shares of the weight's gradient are left out": (
            "range(0, programs, BLOCK_M)", "range(0, programs - 1, BLOCK_M)",
        ),
    },
    (PRODUCT, "matmul.py", "_epilogue"): {
        "the residual is dropped": ("out += tl.load(residual_ptrs", "out += 0 * tl.load(residual_ptrs"),
        "what dropout keeps is not scaled": (
            "out = tl.where(kept, out * scale, 0.0)", "out = tl.where(kept, out, 0.0)",
        ),
    },
    (PRODUCT, "matmul.py", "_matmul"): {
        "the depth's last tile is not masked": ("b_inside & k_inside[:, None]", "b_inside"),
        "the depth's last tile is skipped": (
            "range(first, last, BLOCK_K)", "range(first, last - BLOCK_K + 1, BLOCK_K)",
        ),
    },
    (PRODUCT, "matmul.py", "_finish"): {
        "the parts of a product go to one place": ("rows += split.to(tl.int64) * M", "pass"),
    },
    (PRODUCT, "matmul.py", "_add_splits"): {
        "the same part of a product is added again": ("ptrs += M.to(tl.int64) * N", "pass"),
    },
    (PRODUCT, "matmul.py", "_load"): {
        "a transposed operand's tile is taken as it is": (
            "descriptor.load([column, row]).T", "descriptor.load([column, row])",
        ),
    },
    (PRODUCT, "activations.py", "activation_and_slope"): {
        "the slope of GELU misses a term": ("cdf + x * density", "cdf"),
        "relu's slope at 0 is 1": ("tl.where(x <= 0.0, 0.0, 1.0)", "tl.where(x < 0.0, 0.0, 1.0)"),
    },
    (PRODUCT, "activations.py", "row_dropout_keeps"): {
        "dropout's high counter is the row's low half": (
            "first_column, COLUMNS, c1, c2, 0", "first_column, COLUMNS, c1, c1, 0",
        ),
    },
    (DROPOUT, "philox.py", "dropout_keeps"): {
        "the words of a counter in another order": ("(0, 1, 3, 2)", "(0, 1, 2, 3)"),
        "dropout keeps the bits below the threshold only": ("word0 >= threshold", "word0 < threshold"),
    },
    (LOSS, "linear_cross_entropy.py", "_statistics"): {
        "the sum is not rescaled": ("sum_exp * tl.exp(m - new_m)", "sum_exp"),
        "classes behind the last count": ("logits = tl.where((columns < C)[None, :], logits, -float(\"inf\"))", "pass"),
    },
    (LOSS, "linear_cross_entropy.py", "_join"): {
        "smoothing is not divided by the classes": ("label_smoothing / C * distance", "label_smoothing * distance"),
    },
    (LOSS, "linear_cross_entropy.py", "_gradient_of_logits"): {
        "the target is not subtracted": ("at_target[:, None], 0.0)", "0.0, 0.0)"),
    },
    (LOSS, "linear_cross_entropy.py", "_weight_gradient"): {
        "the weight's gradient is the last chunk's": ("acc += tl.load(out_ptrs, inside, other=0.0)", "pass"),
    },
}  # fmt: skip
