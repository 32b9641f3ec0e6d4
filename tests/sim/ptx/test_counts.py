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


@pytest.mark.parametrize("source", ["cuda", "triton"])
def test_layer_norm(source):
    rows, width = 37, 768
    given = [torch.randn(n, dtype=F16) for n in ((rows, width), (width,), (width,))]
    forward = launches_of(source, lambda x, w, b: ops.layer_norm(x, width, w, b), *given)[0]
    assert forward.counts.loaded_bytes == 3 * rows * width * 2  # each row reads weight and bias
    assert forward.counts.stored_bytes == rows * (width * 2 + 8)
    assert forward.counts.sectors == 4 * rows * width * 2 // 32 + 2 * rows
