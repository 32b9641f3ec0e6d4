"""What tests/ops does not reach: heads to the largest, many tiles, split keys, every order of the threads, what each
launch does."""

from functools import partial

import eager
import pytest
import torch
from accuracy import assert_close_to_reference, assert_op_close
from attention import assert_attention_close, dense, tensors

import fastformer
from fastformer import ops, reference
from fastformer.backends import implementations

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def kernels(sim):
    with fastformer.backend("cuda", strict=True):
        yield


def named(launches, word: str) -> list:
    return [launch for launch in launches if word in launch.kernel]


def gradients(given: dict[str, torch.Tensor], **options) -> list[torch.Tensor]:
    """The output and the gradients."""
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    torch.manual_seed(1)
    output = ops.scaled_dot_product_attention(**leaves, **options)
    weight = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, leaves.values(), weight)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [20, 32, 64, 80, 96, 128, 129, 256])
def test_head_sizes(dtype, size):
    given = tensors(1, 2, 37, 75, size, size, dtype)
    assert_attention_close(given, is_causal=True)
    assert_attention_close(given, torch.randn(1, 1, 37, 75), dropout_p=0.3)


def test_largest_head_size_is_the_declared_one():
    assert {i.max_size for i in implementations() if i.backend == "cuda" and "att" in i.op} == {256}
    x = torch.ones(1, 1, 2, 257)
    with pytest.raises(RuntimeError, match="takes head sizes up to 256, got 257"):
        torch.ops.fastformer_cuda.scaled_dot_product_attention(x, x, x, None, 0.0, None, False, 1.0, -1, -1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_many_tiles(dtype):
    """5 to 40 tiles of keys and of queries, the last ones not full."""
    given = tensors(1, 2, 130, 283, 64, 40, dtype, kv_heads=1)
    assert_attention_close(given, window_size=(200, 30))
    mask = torch.randn(130, 283).masked_fill(torch.rand(130, 283) < 0.2, -torch.inf)
    assert_attention_close(given, mask, dropout_p=0.2)
    # The last key that the last row of a tile sees is the first of its tile.
    assert_attention_close(tensors(1, 1, 256, 257, 16, 16, dtype), window_size=(-1, 0))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", FLOATS)
def test_orders_give_the_same_bits(sim, dtype, size):
    """Of threads and blocks, with copies at once and as late as can be."""
    given = tensors(1, 2, 70, 150, size, size, dtype, kv_heads=1)
    mask = torch.rand(1, 1, 1, 150) < 0.9
    results = []
    for order in (sim.Order.forward, sim.Order.reverse, sim.Order.random):
        options = sim.options()
        options.threads = options.blocks = order
        options.lazy_copies = order != sim.Order.forward
        results.append(gradients(given, attn_mask=mask, is_causal=True, dropout_p=0.2, enable_gqa=True))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


class TestSplitKeys:
    """Where queries are few, several blocks share the keys of a head, and a group's heads a tile."""

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("queries", [1, 3])
    def test_accuracy(self, sim, dtype, queries):
        given = tensors(1, 4, queries, 600, 64, 48, dtype, kv_heads=2)
        mask = torch.rand(1, 1, 1, 600) < 0.8
        mask[..., :300] = False  # a part without any key
        assert_attention_close(given, mask, window_size=(-1, 0))
        assert_attention_close(given, torch.randn(1, 4, queries, 600), dropout_p=0.2)
        launches = sim.launches()
        assert {launch.grid[0] for launch in named(launches, "attention_forward")} == {2 * 2}  # parts * key heads
        assert len(named(launches, "attention_combine")) == len(named(launches, "attention_forward"))

    def test_as_without(self):
        """One query after the other, or so many that nothing is split."""
        given = tensors(1, 1, 70, 530, 32, 32, torch.float32)
        whole = ops.scaled_dot_product_attention(**given)
        for query in (0, 69):
            one = ops.scaled_dot_product_attention(**given | {"query": given["query"][:, :, query : query + 1]})
            torch.testing.assert_close(one, whole[:, :, query : query + 1])

    def test_packed(self):
        lengths = [1, 2], [520, 300]
        q = torch.randn(3, 4, 32)
        k, v = torch.randn(2, 820, 2, 32)
        bounds = [torch.tensor([0, a, a + b], dtype=torch.int32) for a, b in lengths]
        options = dict(max_q=2, max_k=520, enable_gqa=True, window_size=(-1, 0), dropout_p=0.1)
        torch.manual_seed(2)
        output = ops.varlen_attn(q, k, v, *bounds, **options)
        torch.manual_seed(2)
        torch.testing.assert_close(output, reference.varlen_attn(q, k, v, *bounds, **options))


class TestSkippedTiles:
    def test_causal(self, sim):
        """Blocks of 64 queries see 1, 2, 3 and 4 tiles of 64 keys; of the last, only the first warp has rows. A warp
        multiplies a tile twice by 4 times 8 mma."""
        ops.scaled_dot_product_attention(**tensors(1, 1, 200, 200, 64, 64, torch.bfloat16), is_causal=True)
        (launch,) = named(sim.launches(), "attention_forward")
        assert launch.mma == ((1 + 2 + 3) * 4 + 4) * 2 * 4 * 8

    @pytest.mark.parametrize("kind", ["bool", "float", "of each query"])
    def test_masked_whole(self, sim, kind):
        """Padding: what comes after the 70th key costs nothing, forward and backward; it is not even read, but for a
        mask of each query's own."""
        given = tensors(1, 1, 64, 256, 64, 64, torch.bfloat16)
        mask = torch.arange(256) < 70
        if kind == "float":
            mask = torch.zeros(256).masked_fill(~mask, -torch.inf)
        if kind == "of each query":
            mask = mask.expand(64, 256).contiguous()
        gradients(given, attn_mask=mask)
        padded = sim.launches()
        sim.clear_launches()
        gradients({name: x if name == "query" else x[:, :, :70] for name, x in given.items()})
        for word in ("attention_forward", "attention_grad_key_value", "attention_grad_query"):
            (with_mask,), (without,) = named(padded, word), named(sim.launches(), word)
            assert with_mask.mma == without.mma > 0
            if kind != "of each query" and word != "attention_grad_key_value":  # whole tiles of 64 and 32 keys
                assert with_mask.copied_bytes <= without.copied_bytes + 2 * 58 * 64 * 2

    def test_masked_whole_for_all(self):
        """No tile at all, for any warp."""
        given = tensors(1, 1, 64, 64, 64, 64, torch.bfloat16)
        assert not any(x.any() for x in gradients(given, attn_mask=torch.zeros(64, dtype=torch.bool)))


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_bank_conflicts(sim, dtype, size):
    """None in 16 bits; float32 has some where it writes the result."""
    sim.options().count_conflicts = True
    gradients(tensors(1, 1, 64, 130, size, size, dtype), is_causal=True, dropout_p=0.1)
    launches = named(sim.launches(), "attention")
    assert len(launches) == 4
    assert {launch.kernel: launch.bank_conflicts for launch in launches if launch.bank_conflicts} == {}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("queries", [5, 70])
def test_hidden_values_that_are_not_finite(dtype, queries):
    """Those behind the padding, and of keys in the future, reach no output. Such a row is summed in another order."""
    given = tensors(1, 2, queries, 150, 64, 64, dtype)
    mask = torch.arange(150) < 90
    whole = dense(mask, True, (-1, -1), queries, 150)
    expected = eager.scaled_dot_product_attention(**given, mask=whole)
    ref64 = eager.scaled_dot_product_attention(**{name: x.double() for name, x in given.items()}, mask=whole)
    given["value"][..., 90:, :] = torch.nan
    given["value"][..., 95, 3] = torch.inf
    hidden = ops.scaled_dot_product_attention(**given, attn_mask=mask, is_causal=True)
    assert_close_to_reference(hidden, expected, ref64)
    given["value"][:, 1, 3, 7] = torch.nan  # from the fourth query on, in one column
    output = ops.scaled_dot_product_attention(**given, attn_mask=mask, is_causal=True)
    assert output[:, 1, 3:, 7].isnan().all() and output.isnan().sum() == queries - 3
    finite = ~output.isnan()
    assert_close_to_reference(output[finite], expected[finite], ref64[finite])


def test_dropout_of_hidden_values_that_are_not_finite():
    given = tensors(1, 1, 40, 70, 16, 16, torch.float32)
    torch.manual_seed(3)
    clean = ops.scaled_dot_product_attention(**given, is_causal=True, dropout_p=0.5)
    given["value"][..., 69, :] = torch.nan
    torch.manual_seed(3)
    torch.testing.assert_close(ops.scaled_dot_product_attention(**given, is_causal=True, dropout_p=0.5), clean)
    given["value"][..., 20, :] = torch.nan
    torch.manual_seed(3)
    output = ops.scaled_dot_product_attention(**given, is_causal=True, dropout_p=0.5)
    assert output[..., 20:, :].isnan().all()
    torch.testing.assert_close(output[..., :20, :], clean[..., :20, :])


@pytest.mark.parametrize("dtype", FLOATS)
def test_varlen_of_many_tiles(dtype):
    lengths = [100, 0, 150]
    bounds = torch.tensor([0, 100, 100, 250], dtype=torch.int32)
    given = {name: torch.randn(250, 2, 64).to(dtype) for name in ("query", "key", "value")}
    where = dict(cu_seq_q=bounds, cu_seq_k=bounds, max_q=max(lengths), max_k=max(lengths), dropout_p=0.1)
    assert_op_close(partial(ops.varlen_attn, **where), partial(reference.varlen_attn, **where), given)


def test_opcheck():
    raw, seed = torch.ops.fastformer_cuda, torch.tensor(5)
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    options = (0.1, seed, True, 0.3, -1, -1)
    output, lse = raw.scaled_dot_product_attention(q, k, v, None, *options)
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    packed, where = torch.randn(3, 6, 2, 8), (bounds, bounds, 4, 4, 0.0, None, 0.3, -1, 0)
    packed_output, packed_lse = raw.varlen_attn(*packed, *where)
    for op, arguments in (
        (raw.scaled_dot_product_attention, (q, k, v, None, *options)),
        (raw.scaled_dot_product_attention_backward, (output, q, k, v, None, output, lse, *options)),
        (raw.varlen_attn, (*packed, *where)),
        (raw.varlen_attn_backward, (packed_output, *packed, packed_output, packed_lse, *where)),
        (torch.ops.fastformer.varlen_attn, (packed[0].clone().requires_grad_(), *packed[1:], *where, "cuda")),
    ):
        torch.library.opcheck(op.default, arguments)
