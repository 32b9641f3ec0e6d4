"""What cuda_mutations.py plants: (tests, compiled file, changed file, function) -> {mistake: (text, wrong text)}.

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
HOPPER_MATMUL_BF16 = (
    "tests/sim/test_cuda_matmul_hopper.py",
    "-k",
    "(more_steps or split or tma) and not dtype1",
)
ATTENTION_F32, ATTENTION_BF16 = (
    ("tests/sim/test_cuda_attention.py", "-k", f"(many_tiles or orders or Split) and {dtype}")
    for dtype in ("dtype0", "dtype1")
)
HOPPER_ATTENTION_BF16 = (
    "tests/sim/test_cuda_attention_hopper.py",
    "-k",
    "(many_tiles or masks or not_finite or skipped) and not dtype1",
)
HIDDEN_BF16 = ("tests/sim/test_cuda_attention.py", "-k", "not_finite and dtype1 or masked_whole or bank")
LARGE = ("tests/sim/test_cuda_large.py",)

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
    },
    (MATMUL_BF16, "matmul_bf16.cu", "matmul_epilogue.h", "void finish_tile("): {
        "the last row is left out": ("place.row + r >= rows", "place.row + r + 1 >= rows"),
        "the parts of a product go to one place": ("(blockIdx.y * rows + place.row + r)", "(place.row + r)"),
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
    (HOPPER_MATMUL_BF16, "matmul_hopper_bf16.cu", "matmul_hopper.h", "matmul_hopper_kernel("): {
        "the barriers' initialisation is not fenced": ("    ptx::fence_proxy_async();\n", ""),
        "no barrier after the initialisation": ("  __syncthreads();\n", ""),
        "a stage is filled before it is empty": ("ptx::mbarrier_wait(empty + stage, (round + 1) % 2);", ""),
        "wrong parity of an empty stage": ("(round + 1) % 2", "round % 2"),
        "too few bytes are expected": ("(full + stage, Tile::kStageBytes)", "(full + stage, Tile::kABytes)"),
        "where the part of the depth begins is forgotten": ("static_cast<int>(begin) + step * kTileDepth",
                                                            "step * kTileDepth"),
        "a stage is multiplied before it is full": ("ptx::mbarrier_wait(full + stage, step / kStages % 2);", ""),
        "wrong parity of a full stage": ("step / kStages % 2", "(step / kStages + 1) % 2"),
        "the registers are not fenced": ("    ptx::wgmma_fence(d);\n", ""),
        "a wrong step along the depth": ("offset + k * ptx::kNextDepth<kBDepth>",
                                         "offset + k * ptx::kNextDepth<!kBDepth>"),
        "every step multiplies the first stage": ("a0 + offset", "a0"),
        "the step before is not waited for": ("ptx::wgmma_wait<1>();", "ptx::wgmma_wait<2>();"),
        "a stage is given back a step too early": ("(step - 1) % kStages", "step % kStages"),
        "the last step is not waited for": ("ptx::wgmma_wait<0>(d);", "ptx::wgmma_wait<1>(d);"),
        "no barrier between the last step and the product": (
            "ptx::barrier_sync(1, 2 * kWarpgroup);  // nobody reads operands any more", "",
        ),
        "no barrier between writing and reading the product": (
            "  ptx::barrier_sync(1, 2 * kWarpgroup);\n  finish_tile", "  finish_tile",
        ),
        "both consumers multiply the same rows": ("shared + consumer * kSquare", "shared"),
        "tiles side by side are one": ("kBDepth ? 0 : kSquare", "0"),
    },
    (HOPPER_MATMUL_BF16, "matmul_hopper_bf16.cu", "matmul_hopper.h", "void fetch("): {
        "tiles side by side are the same": ("first + i * 64", "first"),
    },
    (HOPPER_MATMUL_BF16, "matmul.cu", "matmul.cu", "bool tma_takes("): {
        "TMA is given rows that are not aligned": ("operand.aligned && ", ""),
        "TMA is given a row that repeats": ("operand.stride >= (depth_adjacent ? depth : operand.count) && ", ""),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_forward.h", "forward_kernel("): {
        "a tile is not waited for": ("cp_async_wait<0>();\n      __sync", "cp_async_wait<1>();\n      __sync"),
        "no barrier after a tile has come": (
            "__syncthreads();  // this tile has come, and nobody reads the one before it any more", "",
        ),
        "the last key is hidden": ("key >= begin && key < end &&", "key >= begin && key < end - 1 &&"),
        "the parts' log-sum-exps go to one place": (" + part * args.part_stride_lse", ""),
        "a query head reads another key head": (
            "first_head / (args.heads / args.kv_heads)", "first_head % args.kv_heads",
        ),
        "a block of keys has the dropout of another": (
            "Kept* const from = kept_of_blocks + start / 64 % 2 * kRows", "Kept* const from = kept_of_blocks",
        ),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_forward.h", "void online_softmax("): {
        "the sum keeps its old maximum": ("l *= rescale;", ""),
        "the output keeps its old maximum": ("out[j][2 * half] *= rescale;", ""),
    },
    (HIDDEN_BF16, "attention_bf16.cu", "attention_forward.h", "void take_again("): {
        "a row that is NaN is not taken again": ("if (!(lanes & 15) || row >= rows) continue;", "continue;"),
    },
    (HIDDEN_BF16, "attention_bf16.cu", "attention_forward.h", "forward_kernel("): {
        "no barrier where there was no tile": (
            "// where there was no tile: for the rows that others have copied here\n  __syncthreads();", "",
        ),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_forward.h", "combine_kernel("): {
        "all parts weigh the same": ("weight = exponential<T>(x - finite_maximum(m))", "weight = 1"),
        "the log-sum-exp of the parts is that of the largest": ("log_sum_exp<T>(m, l)", "log_sum_exp<T>(m, 1)"),
    },
    (HOPPER_ATTENTION_BF16, "attention_hopper_bf16.cu", "attention_hopper.h", "forward_hopper_kernel("): {
        "a stage is filled before it is empty": (
            "ptx::mbarrier_wait(pipeline.empty(step, kind), pipeline.parity(step) ^ 1);", "",
        ),
        "keys are multiplied before they have come": (
            "    ptx::mbarrier_wait(pipeline.full(step, 0), pipeline.parity(step));\n", "",
        ),
        "values are multiplied before they have come": (
            "    ptx::mbarrier_wait(pipeline.full(step, 1), pipeline.parity(step));\n", "",
        ),
        "queries are multiplied before they have come": (
            "if (steps > 0) ptx::mbarrier_wait(pipeline.barriers, 0);", "",
        ),
        "a lane is ahead of its warp": ("    __syncwarp();  // all lanes have seen that it is full\n", ""),
        "scores are read before they are there": ("ptx::wgmma_wait<0>(p);", ""),
        "the output is rescaled before it is there": ("ptx::wgmma_wait<0>(out);", "ptx::wgmma_wait<1>(out);"),
        "the registers of the output are not fenced": ("      ptx::wgmma_fence(out);\n", ""),
        "the second half of a head is the first": ("i / 4 * (Shape::kSquares / 16) + ", ""),
        "both consumers have the same queries": ("memory + consumer * 64 * 128", "memory"),
        "the last key is hidden": ("row + band.highest + 1, end) - start", "row + band.highest, end) - start"),
        "a mask with holes has none": ("      if (masked) {\n", "      if (false) {\n"),
        "the output is written before the queries are read": (
            "ptx::barrier_sync(1, 2 * kWarpgroup);  // nobody reads queries any more", "",
        ),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_visible.h", "struct Band {"): {
        "the last diagonal is hidden": ("key - query <= highest", "key - query < highest"),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_visible.h", "Band band_of("): {
        "the window is not at the last key": ("offset = keys - queries", "offset = 0"),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_visible.h", "Columns visible_columns("): {
        "tiles that are seen in part count as whole": ("min(end, first + band.highest + 1)",
                                                       "min(end, last + band.highest + 1)"),
        "the last keys' tile is left out": ("min(end, last + band.highest + 1)", "min(end, last + band.highest)"),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_visible.h", "void add_mask("): {
        "the mask's sum is lost": ("scores[j][e] += mask_value", "scores[j][e] += 0 * mask_value"),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_visible.h", "void draw_kept("): {
        "dropout's counter is of another block": ("block * 16 + lane % 16", "block * 64 + lane % 16"),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_tiles.h", "const T* first, int left) {"): {
        "a row behind the last is read": ("row < left ?", "row <= left ?"),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_tiles.h", "void store_rows("): {
        "no barrier of the warp between writing and reading its rows": (
            "  __syncwarp();\n  constexpr int kChunks", "  constexpr int kChunks",
        ),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_tiles.h", "void multiply_transposed("): {
        "a wrong register of a fragment": ("b0[2] = {pairs[0], pairs[1]}", "b0[2] = {pairs[0], pairs[2]}"),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_tiles.h", "void multiply("): {
        "values are read untransposed": ("ptx::ldmatrix<4, true>(pairs", "ptx::ldmatrix<4>(pairs"),
    },
    (HIDDEN_BF16, "attention_bf16.cu", "attention_tiles.h", "int chunk_at("): {
        "no swizzle": ("more ^ row / (8 / kPermuted) % kPermuted ^", "more ^"),
    },
    (ATTENTION_F32, "attention_f32.cu", "attention_tiles.h", "void multiply("): {
        "no barrier of the warp between writing and reading an operand": (
            "  __syncwarp();\n#pragma unroll 1", "#pragma unroll 1",
        ),
        "no barrier of the warp in front of the next operand": (
            "    __syncwarp();\n#pragma unroll\n    for (int j", "#pragma unroll\n    for (int j",
        ),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_backward.h", "delta_kernel("): {
        "a lane's columns are summed once": ("column += 32", "column += 64"),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_backward.h", "    grad_key_value_kernel("): {
        "a tile is not waited for": ("cp_async_wait<0>();\n      __sync", "cp_async_wait<1>();\n      __sync"),
        "no barrier after a tile has come": (
            "__syncthreads();  // this tile has come, and nobody reads the one before it any more", "",
        ),
        "the last tile of queries is left out": ("index < groups * tiles; ++index",
                                                 "index < groups * tiles - 1; ++index"),
        "the mask is lost to the keys' gradient": ("mask_shows(args.mask, mask_at(0, row, column))", "true"),
        "one head of a group is all": ("groups = args.heads / args.kv_heads", "groups = 1"),
        "the keys' gradient is not scaled": ("grad_key[j][e] *= args.scale", "grad_key[j][e] *= 1"),
        "dropout's counter is of another block": (
            "stage * kQueries, args.dropout, first / 64", "stage * kQueries, args.dropout, first / 128",
        ),
        "dropout forgets the probabilities' gradient": ("drop(ds[j][e], j, e) - ", "ds[j][e] - "),
        "the log-sum-exp is of the other stage": (
            "lse = lse_of_stages + stage * kQueries", "lse = lse_of_stages + (stage ^ 1) * kQueries",
        ),
    },
    (HIDDEN_BF16, "attention_bf16.cu", "attention_backward.h", "    grad_key_value_kernel("): {
        "no barrier where there was no tile": (
            "// where there was no tile: for the rows that others have copied here\n  __syncthreads();", "",
        ),
    },
    (ATTENTION_BF16, "attention_bf16.cu", "attention_backward.h", "    grad_query_kernel("): {
        "the last tile of keys is left out": ("start < columns.end; start", "start + kKeys < columns.end; start"),
        "the mask is lost to the queries' gradient": (
            "mask_shows(args.mask, mask_at[half] + key * args.mask.stride_column)", "true",
        ),
        "a query head reads another key head": ("head / (args.heads / args.kv_heads)", "head % args.kv_heads"),
        "the queries' gradient is not scaled": ("grad_query[j][e] *= args.scale", "grad_query[j][e] *= 1"),
        "delta is not subtracted": (" - delta[half];", ";"),
    },
    (LARGE, "attention_bf16.cu", "attention_tiles.h", "T* row_of("): {
        "a row's offset is a 32-bit number": ("row * x.stride_row", "int(row * x.stride_row)"),
    },
    (LARGE, "matmul_bf16.cu", "matmul_kernels.h", "static __device__ __forceinline__ void copy("): {
        "a row's offset is a 32-bit number": (
            "(first_row + row) * operand.stride", "int((first_row + row) * operand.stride)",
        ),
    },
    (LARGE, "layer_norm.cu", "layer_norm.h", "forward_kernel("): {
        "a row's offset is a 32-bit number": ("row * a.residual.stride", "int(row * a.residual.stride)"),
    },
}  # fmt: skip
