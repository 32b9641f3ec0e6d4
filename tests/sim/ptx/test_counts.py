"""What launches do, counted, against closed forms."""

from functools import partial

import pytest
import torch

from fastformer import ops
from ptx.kernel_tests import running

pytestmark = pytest.mark.slow
F16 = torch.float16


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def seen_tiles(queries: int, keys: int, causal: bool, rows: int, columns: int) -> int:
    """How many of the tiles of rows x columns of the scores have one that is visible."""
    seen = torch.zeros(ceil(queries, rows) * rows, ceil(keys, columns) * columns, dtype=torch.bool)
    seen[:queries, :keys] = torch.ones(queries, keys).tril().bool() if causal else True
    return int(seen.view(-1, rows, seen.shape[1] // columns, columns).any(3).any(1).sum())


def launches_of(source: str, function, *given: torch.Tensor) -> list:
    with running(source)() as launches:
        output = function(*(x.requires_grad_() for x in given))
        torch.autograd.grad(output, given, torch.ones_like(output))
    return launches


def mma(launches: list, word: str) -> int:
    (found,) = [sum(launch.counts.mma.values()) for launch in launches if word in launch.kernel]
    return found


@pytest.mark.parametrize("sequence,causal", [(256, False), (200, False), (200, True), (256, True)])
def test_attention_of_warpgroups(sequence, causal):
    """Triton for sm_90: wgmma of 64 rows; tiles of 128 x 128."""
    heads, size = 2, 64
    given = [torch.randn(1, heads, sequence, size, dtype=F16) for _ in range(3)]
    function = partial(ops.scaled_dot_product_attention, is_causal=causal)
    scores = heads * seen_tiles(sequence, sequence, causal, 128, 128) * 128 * 128
    for launch in launches_of("triton sm_90", function, *given):
        assert all(opcode.startswith("wgmma.") for opcode in launch.counts.mma)
        products = {"attention_forward_kernel": 2, "grad_key_value_kernel": 4, "grad_query_kernel": 3}
        assert launch.counts.operations == 2 * size * scores * products.get(launch.kernel, 0)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("sequence,causal", [(256, False), (300, False), (300, True), (520, True)])
def test_attention_of_warpgroups_in_cuda(sequence, causal, size):
    """For sm_90a: a consumer has 64 rows, and leaves out tiles of 128 keys that it doesn't see; copies are for two
    consumers. Of shared memory, wgmma reads 16 numbers of 64 rows or 8 of 16 in 8 x 16 bytes at once: 128 bytes a
    wavefront; and so do copies write, whole boxes of 128 rows. The output goes through it once, there and back."""
    heads = 2
    given = [torch.randn(1, heads, sequence, size, dtype=F16) for _ in range(3)]
    function = partial(ops.scaled_dot_product_attention, is_causal=causal)
    forward = launches_of("cuda sm_90", function, *given)[0].counts
    products = heads * seen_tiles(sequence, sequence, causal, 64, 128)
    tiles = [seen_tiles(128 * (i + 1), sequence, causal, 128, 128) for i in range(ceil(sequence, 128))]
    tiles = [after - before for before, after in zip([0, *tiles], tiles, strict=False)]  # of each block
    assert forward.operations == products * 2 * 2 * 64 * 128 * size
    row = 2 * size  # bytes
    assert forward.copied_bytes == heads * row * (sequence + 2 * sum(min(128 * n, sequence) for n in tiles))
    copied = heads * 128 * row * (len(tiles) + 2 * sum(tiles))
    scores = size // 16 * (64 + 128) * 32
    assert forward.loaded_bytes == 0 and forward.stored_bytes == heads * sequence * (row + 4)
    through = 2 * heads * len(tiles) * 128 * row  # rows behind the last are written, but not read: 16 at a time
    unread = heads * row * (len(tiles) * 128 - sequence)
    assert 128 * forward.wavefronts == copied + products * (scores + 8 * size * 32) + through - unread
    assert not forward.conflicts


@pytest.mark.parametrize("source", ["cuda", "triton"])
@pytest.mark.parametrize("sequence,causal", [(256, False), (200, False), (200, True), (256, True)])
def test_attention(source, sequence, causal):
    """Each mma is 16 x 8 x 16. CUDA: warps of 16 rows leave out tiles that they don't see; forward 64 keys at a time,
    backward 32 of the other side. Triton: programs of 128 x 64, or 64 x 64 of keys."""
    heads, size = 2, 64
    given = [torch.randn(1, heads, sequence, size, dtype=F16) for _ in range(3)]
    launches = launches_of(source, lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, is_causal=causal), *given)

    def expected(products: int, rows: int, columns: int, of_keys: bool = False) -> int:
        tiles = seen_tiles(sequence, sequence, causal, *((columns, rows) if of_keys else (rows, columns)))
        return heads * products * tiles * rows * columns * size // (16 * 8 * 16)

    if source == "cuda":
        assert mma(launches, "forward_kernel") == expected(2, 16, 64)
        assert mma(launches, "grad_key_value_kernel") == expected(4, 16, 32, of_keys=True)
        assert mma(launches, "grad_query_kernel") == expected(3, 16, 32)
        if sequence == 200 and causal:
            assert mma(launches, "forward_kernel") == heads * 1792
    else:
        assert mma(launches, "forward_kernel") == expected(2, 128, 64)
        assert mma(launches, "grad_query_kernel") == expected(3, 128, 64)
    forward = next(launch for launch in launches if "forward_kernel" in launch.kernel)
    assert forward.counts.stored_bytes == heads * sequence * (size * 2 + 4)  # output and lse
    assert forward.counts.operations == mma(launches, "forward_kernel") * 4096


def test_attention_reads():
    """CUDA: a block of 64 rows copies its queries, and the keys and values that it sees, once."""
    given = [torch.randn(1, 1, 256, 64, dtype=F16) for _ in range(3)]
    forward = launches_of("cuda", lambda q, k, v: ops.scaled_dot_product_attention(q, k, v, is_causal=True), *given)[0]
    row = 64 * 2
    assert forward.counts.copied_bytes == 256 * row + 2 * row * (64 + 128 + 192 + 256)
    assert forward.counts.sectors == (forward.counts.copied_bytes + 256 * row) // 32 + 256 // 8 + 0
    assert forward.counts.loaded_bytes == 0


@pytest.mark.parametrize("rows,width,out", [(100, 200, 136), (64, 96, 64), (130, 72, 260)])
def test_linear(rows, width, out):
    """CUDA: tiles of 128 x 128 or 64 x 64, steps of 32."""
    given = [torch.randn(n, dtype=F16) for n in ((rows, width), (out, width))]
    forward = launches_of("cuda", lambda x, w: ops.linear(x, w), *given)[0]
    tile = 128 if "Li128ELi128E" in forward.kernel else 64
    tiles = ceil(rows, tile) * ceil(out, tile)
    assert sum(forward.counts.mma.values()) == tiles * tile * tile * ceil(width, 32) * 32 // (16 * 8 * 16)
    assert forward.counts.copied_bytes == 2 * width * (rows * ceil(out, tile) + out * ceil(rows, tile))


@pytest.mark.parametrize(
    "rows,width,out,tile",
    [(100, 200, 136, (128, 256)), (64, 96, 64, (64, 64)), (130, 72, 264, (128, 256)), (300, 256, 512, (128, 256))],
)
def test_linear_of_tensor_maps(rows, width, out, tile):
    """Triton for sm_90: bulk copies of what is inside of the matrices, wgmma of whole tiles, 64 deep."""
    given = [torch.randn(n, dtype=F16) for n in ((rows, width), (out, width))]
    forward = launches_of("triton sm_90", lambda x, w: ops.linear(x, w), *given)[0]
    m, n = ceil(rows, tile[0]), ceil(out, tile[1])
    assert forward.counts.operations == 2 * m * n * tile[0] * tile[1] * ceil(width, 64) * 64
    assert forward.counts.copied_bytes == 2 * width * (rows * n + out * m)
    assert forward.counts.loaded_bytes == 0


@pytest.mark.parametrize("rows,width,out", [(100, 200, 136), (130, 72, 264), (300, 256, 512)])
def test_linear_of_tensor_maps_in_cuda(rows, width, out):
    """For sm_90a: tiles of 128 x 128 or 256, steps of 64; boxes of 64 x 64, or those of 128 rows."""
    given = [torch.randn(n, dtype=F16) for n in ((rows, width), (out, width))]
    forward = launches_of("cuda sm_90", lambda x, w: ops.linear(x, w), *given)[0]
    counts, tile = forward.counts, 256 if "HopperTileILi256E" in forward.kernel else 128
    m, n, steps = ceil(rows, 128), ceil(out, tile), ceil(width, 64)
    assert counts.operations == 2 * m * n * 128 * tile * steps * 64
    assert counts.copied_bytes == 2 * width * (rows * n + out * m)
    assert counts.loaded_bytes == counts.conflicts_in_main_loops == 0


@pytest.mark.parametrize("source", ["cuda", "triton"])
def test_layer_norm(source):
    rows, width = 37, 768
    given = [torch.randn(n, dtype=F16) for n in ((rows, width), (width,), (width,))]
    forward = launches_of(source, lambda x, w, b: ops.layer_norm(x, width, w, b), *given)[0]
    assert forward.counts.loaded_bytes == 3 * rows * width * 2  # each row reads weight and bias
    assert forward.counts.stored_bytes == rows * (width * 2 + 8)
    assert forward.counts.sectors == 4 * rows * width * 2 // 32 + 2 * rows
