"""Raw op packed_layers: the layers of BERT and GPT-2 in one call, against the same layers in plain PyTorch."""

import eager
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_close_to_reference
from tensors import DTYPES, FLOATS, randn
from torch import Tensor

pytestmark = pytest.mark.cpu_only
raw = torch.ops.fastformer_cpu
EPS = 1e-5
MATRICES = ("qkv", "projection", "hidden", "output")
VECTORS = ("norm1", "norm1_bias", "qkv_bias", "projection_bias", "norm2", "norm2_bias", "hidden_bias", "output_bias")
SIZES = {  # heads, head size, hidden features
    "small": (3, 16, 80),
    "odd": (5, 13, 33),
    "one": (1, 1, 1),
}
Layer = dict[str, Tensor | None]


def make_layers(size: str = "small", count: int = 2, dtype: torch.dtype = torch.float32) -> list[Layer]:
    heads, head_dim, hidden = SIZES[size]
    width = heads * head_dim
    shapes = {"qkv": (3 * width, width), "projection": (width, width)}
    shapes |= {"hidden": (hidden, width), "output": (width, hidden)}
    lengths = dict(zip(VECTORS, (width, width, 3 * width, width, width, width, hidden, width), strict=True))
    return [
        {name: randn(*shape, dtype=dtype) / shape[1] ** 0.5 for name, shape in shapes.items()}
        | {name: randn(length, dtype=dtype) for name, length in lengths.items()}
        for _ in range(count)
    ]


def split(x: Tensor, heads: int) -> Tensor:
    """(B, S, E) -> (B, H, S, D)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def run_eagerly(
    x: Tensor,
    layers: list[Layer],
    heads: int,
    *,
    pre_norm: bool,
    final: tuple[Tensor | None, Tensor | None] = (None, None),
    mask: Tensor | None = None,
    activation: str | None = "gelu",
    scale: float | None = None,
    past: list[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """In the dtype of x, everything; past: of each layer keys and values (B, H, P, D), before those of x."""
    width = x.shape[-1:]

    def of(layer: Layer, name: str) -> Tensor | None:
        return None if layer[name] is None else layer[name].to(x.dtype)

    def linear(layer: Layer, name: str, x: Tensor) -> Tensor:
        return F.linear(x, of(layer, name), of(layer, f"{name}_bias"))

    def norm(layer: Layer, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, width, of(layer, name), of(layer, f"{name}_bias"), EPS)

    for i, layer in enumerate(layers):
        query, key, value = linear(layer, "qkv", norm(layer, "norm1", x) if pre_norm else x).chunk(3, -1)
        query, key, value = (split(part, heads) for part in (query, key, value))
        if past is not None:
            key, value = (torch.cat([old.to(x.dtype), new], 2) for old, new in zip(past[i], (key, value), strict=True))
        context = eager.scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2).flatten(2)
        x = x + linear(layer, "projection", context)
        y = norm(layer, "norm2" if pre_norm else "norm1", x)
        x = x if pre_norm else y
        x = x + linear(layer, "output", eager.ACTIVATIONS[activation](linear(layer, "hidden", y)))
        x = x if pre_norm else norm(layer, "norm2", x)
    if pre_norm:
        weight, bias = (None if v is None else v.to(x.dtype) for v in final)
        x = F.layer_norm(x, width, weight, bias, EPS)
    return x


def pack_one(matrix: Tensor, panels: str | None) -> Tensor:
    if panels == "int8":
        return raw.quantize_weight(matrix)
    return raw.pack_weight(matrix, getattr(torch, panels) if panels else None)


def pack(layers: list[Layer], panels: str | None = None) -> list[Tensor]:
    return [pack_one(layer[name], panels) for layer in layers for name in MATRICES]


def vectors(layers: list[Layer]) -> list[Tensor]:
    """The ten of each layer; a bias of query, key and value at once takes the first of three places."""
    none = torch.empty(0)
    return [
        none if x is None else x
        for layer in layers
        for x in (*(layer[name] for name in VECTORS[:3]), None, None, *(layer[name] for name in VECTORS[3:]))
    ]


def run_packed(
    x: Tensor,
    layers: list[Layer],
    heads: int,
    *,
    pre_norm: bool,
    final: tuple[Tensor | None, Tensor | None] = (None, None),
    is_causal: bool = False,
    mask: Tensor | None = None,
    activation: str | None = "gelu",
    scale: float | None = None,
    panels: str | None = None,
    cu_seq: Tensor | None = None,
    longest: int = 0,
    caches: tuple[list[Tensor], list[Tensor]] = ((), ()),
    past: int = 0,
    head: tuple[Tensor, Tensor | None] | None = None,
    keep: int = 0,
) -> Tensor:
    """head: weight (vocabulary, E) and bias."""
    scale = (x.shape[-1] // heads) ** -0.5 if scale is None else scale
    to_logits = (None, None, 0) if head is None else (pack_one(head[0], panels), head[1], head[0].shape[0])
    return raw.packed_layers(
        x, pack(layers, panels), vectors(layers), *final, *to_logits, keep, pre_norm, is_causal, heads,
        layers[0]["hidden"].shape[0], activation, scale, EPS, mask, cu_seq, longest, *caches, past,
    )  # fmt: skip


def final_of(layers: list[Layer], pre_norm: bool) -> tuple[Tensor | None, Tensor | None]:
    width, dtype = layers[0]["qkv"].shape[1], layers[0]["qkv"].dtype
    return (randn(width, dtype=dtype), randn(width, dtype=dtype)) if pre_norm else (None, None)


def visible(queries: int, keys: int, is_causal: bool) -> Tensor | None:
    """Causal: the last query sees all keys."""
    return eager.visible(queries, keys, window_size=(-1, 0)) if is_causal else None


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("pre_norm", [False, True], ids=["BERT", "GPT"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_layers(isa, size, dtype, pre_norm, is_causal):
    heads, head_dim, _ = SIZES[size]
    for batch, length, activation in ((3, 7, "gelu"), (1, 1, "gelu_tanh"), (2, 70, "relu")):
        layers = make_layers(size, dtype=dtype)
        x, final = randn(batch, length, heads * head_dim, dtype=dtype), final_of(layers, pre_norm)
        given = dict(pre_norm=pre_norm, final=final, activation=activation, scale=0.3)
        output = run_packed(x, layers, heads, is_causal=is_causal, **given)
        mask = visible(length, length, is_causal)
        expected = (run_eagerly(y, layers, heads, mask=mask, **given) for y in (x, x.double()))
        assert_close_to_reference(output, *expected, slack=1)


@pytest.mark.parametrize("shape", [(4, 1, 1, 9), (1, 1, 1, 9), (4, 3, 9, 9), (1, 3, 1, 9), (4, 1, 9, 9)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(isa, dtype, kind, shape):
    """Of any strides; a float mask is in the type that the kernels compute in. Rows without a key give 0."""
    layers, x = make_layers(dtype=dtype), randn(4, 9, 48, dtype=dtype)
    mask = randn(*shape, dtype=torch.bool)
    if shape[2] > 1:
        mask[:, :, 2] = False
    if kind == "float":
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        mask = randn(*shape).to(compute).masked_fill(~mask, -torch.inf)
    mask = mask.mT.contiguous().mT
    for is_causal in (False, True):
        whole = mask
        if is_causal:
            kept = eager.visible(9, 9, window_size=(-1, 0))
            whole = mask & kept if kind == "bool" else mask.masked_fill(~kept, -torch.inf)
        output = run_packed(x, layers, 3, pre_norm=False, is_causal=is_causal, mask=mask)
        expected = (run_eagerly(y, layers, 3, pre_norm=False, mask=whole) for y in (x, x.double()))
        assert_close_to_reference(output, *expected)


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_end_to_end(isa, threads, dtype, is_causal):
    """(1, tokens, E): each sequence is what it is alone."""
    layers, lengths = make_layers(dtype=dtype), [5, 1, 0, 40, 9]
    x, final = randn(1, sum(lengths), 48, dtype=dtype), final_of(layers, True)
    cu_seq = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    given = dict(pre_norm=True, final=final)
    output = run_packed(x, layers, 3, is_causal=is_causal, cu_seq=cu_seq, longest=max(lengths), **given)
    expected = [
        torch.cat(
            [run_eagerly(s, layers, 3, mask=visible(s.shape[1], s.shape[1], is_causal), **given) for s in parts], 1
        )
        for parts in (y.split(lengths, 1) for y in (x, x.double()))
    ]
    assert_close_to_reference(output, *expected)


def random_caches(batch: int, past: int, capacity: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Of two layers; what is written nowhere is NaN."""
    keys, values = ([torch.full((batch, 3, capacity, 16), torch.nan, dtype=dtype) for _ in range(2)] for _ in range(2))
    for cache in (*keys, *values):
        cache[:, :, :past] = randn(batch, 3, past, 16, dtype=dtype)
    return keys, values


@pytest.mark.parametrize("sizes", [(1, 0, 1, 1), (3, 0, 7, 64), (3, 5, 1, 6), (2, 5, 4, 20), (2, 600, 1, 640)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_caches(isa, threads, dtype, sizes):
    """batch, past, new tokens, capacity"""
    batch, past, new, capacity = sizes
    layers, x = make_layers(dtype=dtype), randn(batch, new, 48, dtype=dtype)
    final, caches = final_of(layers, True), random_caches(batch, past, capacity, dtype)
    before = [[cache.clone() for cache in of_one] for of_one in caches]
    given = dict(pre_norm=True, final=final)
    output = run_packed(x, layers, 3, is_causal=True, caches=caches, past=past, **given)
    old = [(k[:, :, :past], v[:, :, :past]) for k, v in zip(*before, strict=True)]
    mask = visible(new, past + new, True)
    expected = (run_eagerly(y, layers, 3, mask=mask, past=old, **given) for y in (x, x.double()))
    assert_close_to_reference(output, *expected)
    for cache, was in zip((*caches[0], *caches[1]), (*before[0], *before[1]), strict=True):
        assert torch.equal(cache[:, :, :past], was[:, :, :past])
        assert not cache[:, :, past : past + new].isnan().any() and cache[:, :, past + new :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_padded_batch_token_by_token(isa, dtype):
    """A prompt in chunks, each behind the caches of those before it, gives what it gives at once."""
    layers, x, final = make_layers(dtype=dtype), randn(3, 9, 48, dtype=dtype), (None, None)
    kept = torch.arange(9) >= torch.tensor([0, 3, 6])[:, None]
    caches, outputs = random_caches(3, 0, 9, dtype), []
    for begin, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
        outputs.append(
            run_packed(
                x[:, begin:end],
                layers,
                3,
                pre_norm=True,
                final=final,
                is_causal=True,
                mask=kept[:, None, None, :end],
                caches=caches,
                past=begin,
            )  # fmt: skip
        )
    mask = kept[:, None, None] & eager.visible(9, 9, window_size=(-1, 0))
    expected = (run_eagerly(y, layers, 3, pre_norm=True, mask=mask)[kept] for y in (x, x.double()))
    assert_close_to_reference(torch.cat(outputs, 1)[kept], *expected)


@pytest.mark.parametrize("panels", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", [1, 40])
def test_weights_in_16_bits(isa, dtype, panels, length):
    """Those of the weights rounded to 16 bits, whatever the input is in."""
    layers = make_layers(dtype=torch.float32)
    rounded = [layer | {name: layer[name].to(getattr(torch, panels)).float() for name in MATRICES} for layer in layers]
    x, final = randn(2, length, 48, dtype=dtype), final_of(layers, True)
    output = run_packed(x, layers, 3, pre_norm=True, final=final, is_causal=True, panels=panels)
    given = dict(pre_norm=True, final=final, mask=visible(length, length, True))
    expected = (run_eagerly(y, rounded, 3, **given) for y in (x, x.double()))
    assert_close_to_reference(output, *expected)


@pytest.mark.parametrize("pre_norm", [False, True], ids=["BERT", "GPT"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", [1, 40])
def test_weights_in_8_bits(int8_isa, dtype, pre_norm, length):
    """What the ops on quantized weights give, one after the other."""
    layers = make_layers(dtype=dtype)
    x, final = randn(2, length, 48, dtype=dtype), final_of(layers, pre_norm)
    output = run_packed(x, layers, 3, pre_norm=pre_norm, final=final, panels="int8")
    for layer, (qkv, projection, hidden, out) in zip(layers, batched(pack(layers, "int8"), 4), strict=True):

        def norm(x: Tensor, name: str, layer=layer) -> Tensor:
            return raw.layer_norm(x, layer[name], layer[f"{name}_bias"], EPS)[0]

        y = norm(x, "norm1") if pre_norm else x
        parts = raw.packed_linear(y, qkv, 144, layer["qkv_bias"], None, None).chunk(3, -1)
        heads = [split(part, 3) for part in parts]
        context = raw.scaled_dot_product_attention(*heads, None, 0.0, None, False, 0.25, -1, -1)[0]
        context = context.transpose(1, 2).flatten(2)
        x = raw.packed_linear(context, projection, 48, layer["projection_bias"], None, x)
        x = x if pre_norm else norm(x, "norm1")
        y = norm(x, "norm2") if pre_norm else x
        biases = layer["hidden_bias"], layer["output_bias"]
        x = raw.packed_feed_forward(y, hidden, 80, biases[0], out, 48, biases[1], "gelu", x)
        x = x if pre_norm else norm(x, "norm2")
    expected = raw.layer_norm(x, *final, EPS)[0] if pre_norm else x
    assert torch.equal(output, expected)


def batched(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


@pytest.mark.parametrize("layout", ["padding", "end to end", "caches"])
@pytest.mark.parametrize("panels", [None, "int8"])
def test_whole_sequences_for_each_thread(layout, panels):
    """As many sequences as are shared out among the threads: each is bit by bit what it is alone."""
    layers, lengths = make_layers(), [70, 3, 70, 61, 70, 12, 64, 70, 1, 70]
    x, final = randn(len(lengths), 70, 48), final_of(layers, True)
    keep = torch.arange(70) < torch.tensor(lengths)[:, None]
    cu_seq = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    common = dict(pre_norm=True, final=final, is_causal=True, panels=panels)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        if layout == "end to end":
            output = run_packed(x[keep][None], layers, 3, cu_seq=cu_seq, longest=70, **common)[0].split(lengths)
        elif layout == "padding":
            output = run_packed(x, layers, 3, mask=keep[:, None, None], **common)
        else:
            keys, values = caches = random_caches(len(lengths), 0, 80, torch.float32)
            output = run_packed(x, layers, 3, caches=caches, **common)
        for i, length in enumerate(lengths):
            alone_caches = random_caches(1, 0, 80, torch.float32)
            alone = run_packed(x[i : i + 1, :length], layers, 3, caches=alone_caches, **common)[0]
            assert torch.equal(output[i][:length], alone)
            if layout == "caches":
                for cache, expected in zip((*keys, *values), (*alone_caches[0], *alone_caches[1]), strict=True):
                    assert torch.equal(cache[i, :, :length], expected[0, :, :length])


@pytest.mark.parametrize("panels", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_give_the_same_bits(isa, dtype, panels):
    layers, x = make_layers(dtype=dtype), randn(2, 90, 48, dtype=dtype)
    outputs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        caches = random_caches(2, 0, 100, dtype)
        whole = run_packed(x, layers, 3, pre_norm=True, is_causal=True, panels=panels, caches=caches)
        token = run_packed(x[:, :1], layers, 3, pre_norm=True, is_causal=True, panels=panels, caches=caches, past=90)
        outputs.append((whole, token, *caches[0], *caches[1]))
    for output in outputs[1:]:
        assert all(x.view(torch.uint8).equal(y.view(torch.uint8)) for x, y in zip(output, outputs[0], strict=True))


@pytest.mark.parametrize("panels", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_head(isa, threads, dtype, panels, bias):
    """What the product of the hidden states with the head is, bit by bit, at the last positions of each sequence."""
    layers, final = make_layers(dtype=dtype), final_of(make_layers(dtype=dtype), True)
    head = randn(131, 48, dtype=dtype), randn(131, dtype=dtype) if bias else None
    for batch, length, keep in ((1, 1, 1), (3, 7, 1), (3, 7, 4), (2, 5, 5), (9, 70, 2)):
        x = randn(batch, length, 48, dtype=dtype)
        given = dict(pre_norm=True, final=final, is_causal=True, panels=panels)
        hidden_states = run_packed(x, layers, 3, **given)[:, -keep:].contiguous()
        expected = raw.packed_linear(hidden_states, pack_one(head[0], panels), 131, head[1], None, None)
        assert torch.equal(run_packed(x, layers, 3, head=head, keep=keep, **given), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_biases_and_norms_without_weights(isa, dtype):
    """Each may be missing, and those of query, key and value may be three; vectors may have any dtype and strides."""
    layers, x = make_layers(dtype=dtype), randn(2, 5, 48, dtype=dtype)
    three = vectors(layers)
    for i in range(len(layers)):
        three[10 * i + 2 : 10 * i + 5] = layers[i]["qkv_bias"].chunk(3)
    apart = [v[:, None].expand(-1, 2).contiguous()[:, 0] if v.numel() else v for v in three]
    wide = [v.double() for v in three]
    arguments = (None, None, None, None, 0, 0, False, False, 3, 80, "gelu", 0.25, EPS, None, None, 0, [], [], 0)
    expected = run_packed(x, layers, 3, pre_norm=False)
    for given in (three, apart, wide):
        assert torch.equal(raw.packed_layers(x, pack(layers), given, *arguments), expected)
    for name in VECTORS:
        without = [layer | {name: None} for layer in layers]
        output = run_packed(x, without, 3, pre_norm=False)
        assert_close_to_reference(output, *(run_eagerly(y, without, 3, pre_norm=False) for y in (x, x.double())))


def test_rows_apart():
    """Rows that are not one after the other in memory."""
    layers = make_layers()
    wide = randn(2, 5, 50)
    x = wide[:, :, 1:49]
    assert torch.equal(run_packed(x, layers, 3, pre_norm=True), run_packed(x.contiguous(), layers, 3, pre_norm=True))
    assert torch.equal(run_packed(x, layers, 3, pre_norm=False), run_packed(x.contiguous(), layers, 3, pre_norm=False))


@pytest.mark.parametrize("shape", [(0, 5, 48), (3, 0, 48), (0, 0, 48)], ids=str)
def test_empty(isa, shape):
    layers, x = make_layers(), torch.empty(shape)
    for pre_norm in (False, True):
        assert run_packed(x, layers, 3, pre_norm=pre_norm).shape == shape
    caches = random_caches(shape[0], 2, 64, torch.float32)
    assert run_packed(x, layers, 3, pre_norm=True, is_causal=True, caches=caches, past=2).shape == shape


class TestWrongArguments:
    @pytest.fixture
    def given(self):
        return make_layers(), randn(2, 5, 48)

    @staticmethod
    def run(x, packed, vectors, keys=(), values=(), past=0):
        shared = 3, 80, "gelu", 0.25, EPS, None, None, 0
        return raw.packed_layers(
            x, packed, vectors, None, None, None, None, 0, 0, True, True, *shared, keys, values, past
        )

    def test_numbers_of_weights(self, given):
        layers, x = given
        packed, vs = pack(layers), vectors(layers)
        for wrong in ((packed[:-1], vs), (packed, vs[:-1]), ([], []), (packed[:4], vs)):
            with pytest.raises(RuntimeError, match="4 packed weights and 10 vectors for each layer"):
                self.run(x, *wrong)

    def test_numbers_of_caches(self, given):
        layers, x = given
        keys, values = random_caches(2, 0, 64, torch.float32)
        for wrong in ((keys, values[:1]), (keys[:1], values[:1]), (keys, [])):
            with pytest.raises(RuntimeError, match="caches for all layers or none"):
                self.run(x, pack(layers), vectors(layers), *wrong)

    def test_caches(self, given):
        layers, x = given
        right = random_caches(2, 0, 64, torch.float32)
        narrow = [key[:, :, :4].contiguous() for key in right[0]]
        wrong_keys = [
            [right[0][0], right[0][1].double()],
            [right[0][0], right[0][1][:1]],
            [right[0][0], right[0][1].mT.contiguous().mT],
            [right[0][0], narrow[1]],
            narrow,
        ]
        for keys in wrong_keys:
            with pytest.raises(RuntimeError, match=r"a cache must be \(batch, heads, capacity, head_dim\), contiguous"):
                self.run(x, pack(layers), vectors(layers), keys, right[1])
        with pytest.raises(RuntimeError, match="a cache must be"):
            self.run(x, pack(layers), vectors(layers), *right, past=60)

    def test_heads(self, given):
        layers, x = given
        head = randn(131, 48), None
        for wrong in (dict(keep=0), dict(keep=6), dict(keep=1, pre_norm=False)):
            with pytest.raises(RuntimeError, match="a head follows the last layer-norm"):
                run_packed(x, layers, 3, head=head, **{"pre_norm": True, **wrong})
        with pytest.raises(RuntimeError, match="pack it again"):
            run_packed(x, layers, 3, head=(randn(131, 50), None), keep=1, pre_norm=True)

    def test_packed_for_other_sizes(self, given):
        layers, x = given
        with pytest.raises(RuntimeError, match="pack it again"):
            self.run(x, pack(make_layers("odd")), vectors(layers))
        with pytest.raises(RuntimeError, match="pack it again"):
            self.run(x.double(), pack(layers), vectors(layers))
