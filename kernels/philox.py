"""The random bits of dropout: the contract is in fastformer/reference.py."""

import triton
import triton.language as tl


@triton.jit
def dropout_keeps(seed, threshold, first_column, COLUMNS: tl.constexpr, c1, c2, c3):
    """(rows, COLUMNS) bool: does dropout keep the element?

    Args:
        seed: int64 scalar. threshold: uint32 scalar, ``reference.dropout_threshold(p)``.
        first_column: of the tile, a multiple of 64; so is COLUMNS.
        c1: (rows, 1) int32 or uint32, c2, c3: the same or scalars: the last three words of the counter.
    """
    tl.static_assert(COLUMNS % 64 == 0, "64 neighbouring columns share their counters")
    BLOCKS: tl.constexpr = COLUMNS // 64
    counters = first_column // 4 + tl.arange(0, COLUMNS // 4)[None, :]  # 16 for each 64 columns
    c0 = counters.to(tl.uint32) + c1.to(tl.uint32) * 0
    c1 = c1.to(tl.uint32) + c0 * 0
    c2 = tl.to_tensor(c2).to(tl.uint32) + c0 * 0
    c3 = tl.to_tensor(c3).to(tl.uint32) + c0 * 0
    word0, word1, word2, word3 = tl.philox(seed, c0, c1, c2, c3)
    ROWS: tl.constexpr = c0.shape[0]
    words = tl.join(tl.join(word0 >= threshold, word2 >= threshold), tl.join(word1 >= threshold, word3 >= threshold))
    words = tl.reshape(words, (ROWS, BLOCKS, 16, 4))  # (..., block, counter, word)
    return tl.reshape(tl.permute(words, (0, 1, 3, 2)), (ROWS, COLUMNS))
