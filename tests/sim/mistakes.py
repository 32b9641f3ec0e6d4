"""The mistakes that mutations.py plants: (tests, compiled file, changed file, function) -> {mistake: (text, wrong)}.

The tests are arguments of pytest: the fewest that are to find the mistakes of that place.
"""

NORM = ("tests/ops/test_add_layer_norm.py", "-k", "sizes or dropout_accuracy or layouts")
WIDE_NORM = ("tests/sim/test_cuda_layer_norm.py", "-k", "orders or (widths and (1025 or 4100))")
# Mistakes in what is compiled for each type are compiled for one: dtype0 is float32, 1 bfloat16, 2 float16.
PRODUCT_F32, PRODUCT_F16 = (
    ("tests/ops/test_linear.py", "-k", f"(sizes or dropout_accuracy or layouts) and {dtype}")
    for dtype in ("dtype0", "dtype2")
)
MATMUL_BF16, MATMUL_F16 = (
    ("tests/sim/test_cuda_matmul.py", "-k", f"(four_steps or split or bank or many_rows) and {dtype}")
    for dtype in ("dtype1", "dtype2")
)
ATTENTION_BF16 = ("tests/sim/test_cuda_attention.py", "-k", "(many_tiles or orders or Split) and dtype1")
HIDDEN_BF16 = ("tests/sim/test_cuda_attention.py", "-k", "not_finite and dtype1 or masked_whole or bank")

# The text stands once in the function.
MISTAKES = {
    (WIDE_NORM, "layer_norm.cu", "layer_norm.h", "void row_sum("): {
        "no barrier in front of the next sum": ("__syncthreads();  // the sums before these have been read", ""),
        "no barrier between writing and reading the warps' sums": (
            "  __syncthreads();\n#pragma unroll", "#pragma unroll",
        ),
        "rows of a block share their sums": ("(threadIdx.y * warps + lane) * kCount", "lane * kCount"),
    },
    (NORM, "layer_norm.cu", "layer_norm.h", "forward_kernel("): {
        "eps is left out": ("- shift * shift + a.eps", "- shift * shift"),
        "a row too many": ("int limit = row < a.rows ?", "int limit = row <= a.rows ?"),
        "columns behind the last count": ("(kAligned ? 0 : j) < left(i) ? x[i][j] - first_mean : 0.0f",
                                          "x[i][j] - first_mean"),
    },
    (NORM, "layer_norm.cu", "layer_norm.h", "uint32_t kept("): {
        "dropout's counter is of the next row": ("static_cast<uint32_t>(row), ", "static_cast<uint32_t>(row + 1), "),
    },
    (NORM, "layer_norm.cu", "layer_norm.h", "backward_kernel("): {
        "the gradient misses its second mean": ("h - mean_h - x_hat * mean_hx", "h - mean_h"),
        "rows are summed twice": ("first += int64_t(gridDim.x) * blockDim.y", "first += blockDim.y"),
    },
    (WIDE_NORM, "layer_norm.cu", "layer_norm.h", "sum_groups_kernel("): {
        "no barrier in front of the last sum": ("  __syncthreads();\n", ""),
    },
    (MATMUL_BF16, "matmul_bf16.cu", "matmul_kernels.h", "matmul_kernel("): {
        "a step is not waited for": ("cp_async_wait<kStages - 2>()", "cp_async_wait<kStages - 1>()"),
        "no barrier after a step has come": (
            "__syncthreads();  // the step has come for all threads, and none reads the one before it any more", "",
        ),
        "a stage too few": ("step % kStages * (", "step % (kStages - 1) * ("),
        "no barrier between the last step and the product": ("__syncthreads();  // nobody reads operands any more", ""),
        "no barrier between writing and reading the product": (
            "product.store(tile, m0, n0);\n  __syncthreads();", "product.store(tile, m0, n0);",
        ),
        "the last row is left out": ("if (row + r >= rows) continue;", "if (row + r + 1 >= rows) continue;"),
        "the parts of a product go to one place": ("(blockIdx.y * rows + row + r)", "(row + r)"),
    },
    (MATMUL_BF16, "matmul_bf16.cu", "matmul_kernels.h", "void load(uint32_t (&registers)[4]"): {
        "halves of a fragment are swapped": ("16 * k + 8 * depth_half + r, first / 8 + count_half",
                                             "16 * k + 8 * count_half + r, first / 8 + depth_half"),
        "a wrong register of a fragment": ("b[n / 2][n % 2 * 2 + 1]", "b[n / 2][1]"),
    },
    (MATMUL_BF16, "matmul_bf16.cu", "matmul_kernels.h", "int place_of("): {
        "no swizzle": ("(chunk ^ (kChunks == 4 ? row / 2 % 4 : row % 8))", "chunk"),
    },
    (MATMUL_BF16, "matmul_bf16.cu", "matmul_kernels.h", "static __device__ __forceinline__ void copy("): {
        "a row behind the end is read": ("first_row + row < rows", "first_row + row <= rows"),
        "the depth's last chunk is read whole": ("left < kChunkSize<T> ? left : kChunkSize<T>", "kChunkSize<T>"),
    },
    (PRODUCT_F32, "matmul_f32.cu", "matmul_kernels.h", "static __device__ __forceinline__ Quad read("): {
        "a depth of the last step is left out": ("fmaf(kADepth ? a[i][depth]", "fmaf(kADepth ? a[i][depth / 3 * 3]"),
        "the step's sum is not added": ("d[i][j] += sum[i][j]", "d[i][j] = sum[i][j]"),
    },
    (PRODUCT_F16, "matmul_f16.cu", "matmul_epilogue.h", "void finish("): {
        "the bias is lost": ("values[j] += bias[j]", "values[j] += 0 * bias[j]"),
        "the slope of the activation is lost": ("values[j] *= at.slope", "values[j] *= 1"),
        "the residual is read at the output's stride": ("row * e.residual_stride + column", "row * columns + column"),
    },
    (PRODUCT_F16, "matmul_f16.cu", "matmul_epilogue.h", "uint32_t kept_by("): {
        "dropout's counter is the column": ("column / 64 * 16 + column % 16", "column"),
        "the words of a counter in another order": ("<< (4 * i + j)", "<< (4 * (3 - i) + j)"),
    },
    (MATMUL_F16, "matmul_f16.cu", "matmul_epilogue.h", "finish_kernel("): {
        "the same part of a product is added again": ("(split * a.rows + row)", "row"),
    },
    (MATMUL_F16, "matmul_f16.cu", "matmul_epilogue.h", "column_sums_kernel("): {
        "no barrier in front of the last sum": ("  __syncthreads();\n", ""),
        "the rows of the last group are left out": (
            "begin + a.group_rows, a.rows)", "begin + a.group_rows, a.rows - 1)",
        ),
    },
    (PRODUCT_F32, "matmul_f32.cu", "activations.h", "Activated gelu("): {
        "the slope of GELU misses a term": ("cdf + x * density", "cdf"),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_forward.h", "forward_kernel("): {
        "a tile is not waited for": ("cp_async_wait<0>();\n      __sync", "cp_async_wait<1>();\n      __sync"),
        "no barrier after a tile has come": (
            "__syncthreads();  // this tile has come, and nobody reads the one before it any more", "",
        ),
        "the sum keeps its old maximum": ("l[half] *= rescale;", ""),
        "the output keeps its old maximum": ("out[j][2 * half] *= rescale;", ""),
        "the last key is hidden": ("key >= begin && key < end &&", "key >= begin && key < end - 1 &&"),
        "the parts' log-sum-exps go to one place": (" + part * args.part_stride_lse", ""),
    },
    (HIDDEN_BF16, "attention_bf16.cu", "attention_forward.h", "forward_kernel("): {
        "a row that is NaN is not taken again": ("if (!(lanes & 15) || row >= rows) continue;", "continue;"),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_forward.h", "combine_kernel("): {
        "all parts weigh the same": ("weight = exponential<T>(x - finite_maximum(m))", "weight = 1"),
    },
}  # fmt: skip
