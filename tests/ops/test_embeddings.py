from functools import partial

import eager
import pytest
import torch
from accuracy import assert_op_close, assert_strides_do_not_matter
from tensors import BACKEND, DTYPES, FLOATS, LAYOUTS, randn
from torch import Tensor
from torch.autograd import gradcheck

import fastformer
from fastformer import backends, ops, reference

pytestmark = pytest.mark.skipif(BACKEND not in backends.declared("embeddings"), reason=f"no {BACKEND} kernel")

TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
IDS = ("input_ids", "position_ids", "token_type_ids")
WIDTHS = [1, 7, 16, 17, 63, 64, 65, 97, 768]


def tensors(width: int, dtype: torch.dtype = torch.float32, words: int = 50, **layout: str) -> dict[str, Tensor]:
    tables = {name: randn(rows, width, dtype=dtype, **layout) for name, rows in zip(TABLES, (words, 9, 2), strict=True)}
    return tables | {"weight": randn(width, dtype=dtype), "bias": randn(width, dtype=dtype)}


def ids(batch: int = 6, length: int = 7, words: int = 50) -> dict[str, Tensor]:
    positions = torch.arange(2, 2 + length)
    types = (torch.arange(length) > torch.randint(length, (batch, 1))).long()
    return {"input_ids": torch.randint(words, (batch, length)), "position_ids": positions, "token_type_ids": types}


def both(**options) -> tuple:
    """The op and what eager PyTorch composes, with these ids and options."""
    return partial(ops.embeddings, **options), partial(eager.embeddings, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS[1:])
def test_widths(isa, dtype, width):
    assert_op_close(*both(**ids()), tensors(width, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_column(isa, dtype):
    """The layer-norm of one number is its bias."""
    given = tensors(1, dtype)
    output = ops.embeddings(**given, **ids())
    assert torch.equal(output, given["bias"].expand_as(output))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left_out", [("position",), ("token_type",), ("position", "token_type")])
def test_tables_that_are_left_out(isa, dtype, left_out):
    given = {name: x for name, x in tensors(33, dtype).items() if not name.startswith(left_out)}
    assert_op_close(*both(**{name: x for name, x in ids().items() if not name.startswith(left_out)}), given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left_out", [("weight",), ("bias",), ("weight", "bias")])
def test_optional_vectors(isa, dtype, left_out):
    assert_op_close(*both(**ids()), tensors(33, dtype) | dict.fromkeys(left_out))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (1, 1), (3, 1, 5)])
def test_leading_dimensions(shape):
    given = {"input_ids": torch.randint(50, shape), "position_ids": torch.randint(9, shape[-1:])}
    given["token_type_ids"] = torch.randint(2, (*shape[:-1], 1))
    assert_op_close(*both(**given, dropout_p=0.2), tensors(20))


def test_strides_of_ids():
    """And of 32 bits."""
    given, plain = ids(), tensors(20)
    expected = ops.embeddings(**plain, **given)
    wide = {name: torch.stack([x, torch.full_like(x, -5)], -1)[..., 0] for name, x in given.items()}
    wide["input_ids"] = wide["input_ids"].mT.contiguous().mT
    assert torch.equal(ops.embeddings(**plain, **wide), expected)
    assert torch.equal(ops.embeddings(**plain, **{name: x.int() for name, x in given.items()}), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_tables(isa, dtype, layout):
    assert_strides_do_not_matter(partial(ops.embeddings, **ids(), dropout_p=0.2), tensors(34, dtype, layout=layout))


@pytest.mark.parametrize("shape", [(0,), (0, 7), (3, 0)])
def test_nothing_to_look_up(shape):
    given = {"input_ids": torch.zeros(shape, dtype=torch.long)}
    given |= {name: torch.zeros(1, dtype=torch.long) for name in IDS[1:]}
    assert_op_close(*both(**given), tensors(20))


def test_no_columns():
    assert_op_close(*both(**ids()), tensors(0))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("words", [1, 2, 63, 64, 3000])
def test_words_that_are_frequent_and_rare(isa, dtype, words):
    """Sums of one and of a thousand gradients; tables of many rows, which are shared out otherwise than of few."""
    given = {"input_ids": torch.randint(words, (40, 30)) ** 2 % words}
    assert_op_close(*both(**given), {name: x for name, x in tensors(70, dtype, words).items() if name[0] in "wb"})


def test_large_table(threads):
    """Of which a few rows get a gradient: exactly 0 in the others, as nothing else was written there before."""
    table = torch.full((20_000, 64), torch.nan)
    table[:100] = randn(100, 64)
    looked_up = torch.randint(100, (8, 8))
    (grad,) = torch.autograd.grad(ops.embeddings(looked_up, table.requires_grad_()).square().sum(), table)
    touched = torch.zeros(20_000, dtype=torch.bool)
    touched[looked_up] = True
    assert (grad[~touched] == 0).all() and (grad[touched] != 0).any(1).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_number_of_threads(dtype):
    """Bit for bit."""
    given = {name: x.requires_grad_() for name, x in tensors(97, dtype, words=300).items()}
    looked_up, results = ids(batch=100, words=300), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        output = ops.embeddings(**given, **looked_up, dropout_p=0.2)
        results.append((output, *torch.autograd.grad(output.float().square().sum(), given.values())))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_padding_idx(isa, padding_idx):
    given = ids()
    given["input_ids"][::2, 3:] = padding_idx % 50
    assert_op_close(*both(**given, padding_idx=padding_idx), tensors(33))
    table = tensors(33)["word_embeddings"].requires_grad_()
    (grad,) = torch.autograd.grad(
        ops.embeddings(given["input_ids"], table, padding_idx=padding_idx).square().sum(), table
    )
    assert (grad[padding_idx] == 0).all() and (grad != 0).any()


@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_eps(eps):
    assert_op_close(*both(**ids(), eps=eps), tensors(70))


@pytest.mark.parametrize("dtype", FLOATS)
def test_mean_far_from_zero(isa, dtype):
    given = tensors(70, dtype)
    given["word_embeddings"] += 1000
    assert_op_close(*both(**ids()), given)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vectors", DTYPES)
def test_weight_and_bias_of_another_dtype(dtype, vectors):
    given = tensors(70, dtype) | {name: randn(70, dtype=vectors) for name in ("weight", "bias")}
    looked_up = ids()
    assert_op_close(partial(ops.embeddings, **looked_up), partial(reference.embeddings, **looked_up), given)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_accuracy(isa, dtype, p):
    assert_op_close(*both(**ids(), dropout_p=p), tensors(130, dtype))


def test_dropout_mask(isa):
    """That of the rows of the output, over all leading dimensions."""
    given, looked_up = tensors(70), ids()
    torch.manual_seed(4)
    output = ops.embeddings(**given, **looked_up, dropout_p=0.3)
    torch.manual_seed(4)
    kept = reference.row_dropout_mask(reference.draw_seed(torch.device("cpu")), 0.3, 42, 70).view(6, 7, 70)
    torch.testing.assert_close(output, ops.embeddings(**given, **looked_up) * kept / 0.7)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("left_out", [(), ("weight",), ("bias",)])
def test_gradcheck(isa, p, left_out):
    given = {name: x for name, x in tensors(9, torch.float64, words=8).items() if name not in left_out}
    looked_up = ids(batch=2, words=8)

    def function(*inputs):
        torch.manual_seed(3)
        return ops.embeddings(**dict(zip(given, inputs, strict=True)), **looked_up, dropout_p=p)

    assert gradcheck(function, [x.requires_grad_() for x in given.values()])


@pytest.mark.parametrize("wanted", [*TABLES, "weight", "bias"])
def test_one_gradient_alone(wanted):
    given, looked_up = tensors(6), ids()
    given[wanted].requires_grad_()
    ops.embeddings(**given, **looked_up).square().sum().backward()
    alone = given[wanted].grad
    for x in given.values():
        x.grad = None
        x.requires_grad_()
    ops.embeddings(**given, **looked_up).square().sum().backward()
    assert torch.equal(alone, given[wanted].grad)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(isa, value):
    """Rows that look it up become NaN, others stay."""
    given, looked_up = tensors(37), ids()
    looked_up["input_ids"][1, 2] = 5
    clean = ops.embeddings(**given, **looked_up)
    given["word_embeddings"][5, 35] = value
    output, there = ops.embeddings(**given, **looked_up), looked_up["input_ids"] == 5
    assert output[there].isnan().all() and torch.equal(output[~there], clean[~there])


def test_as_the_modules_compute_it():
    """nn.Embedding, nn.LayerNorm and their sum."""
    given, looked_up = tensors(48), ids()
    words, positions, types = (torch.nn.Embedding.from_pretrained(given[name]) for name in TABLES)
    norm = torch.nn.LayerNorm(48, eps=1e-12)
    norm.load_state_dict({"weight": given["weight"], "bias": given["bias"]})
    s = words(looked_up["input_ids"]) + types(looked_up["token_type_ids"]) + positions(looked_up["position_ids"])
    torch.testing.assert_close(ops.embeddings(**given, **looked_up, eps=1e-12), norm(s))


class TestErrors:
    @pytest.mark.parametrize("name", IDS)
    @pytest.mark.parametrize("wrong", [-1, 50, -(2**62), 2**62])
    @pytest.mark.parametrize("training", [False, True])
    def test_index_out_of_range(self, isa, name, wrong, training):
        given, looked_up = tensors(20), ids()
        looked_up[name] = looked_up[name].clone()
        looked_up[name][..., -1] = wrong
        given["weight"].requires_grad_(training)
        with pytest.raises(IndexError, match=f"{name}: index out of range, expected 0 to .*, got {wrong}"):
            ops.embeddings(**given, **looked_up)

    def test_index_out_of_range_on_torch(self):
        with fastformer.backend("torch"), pytest.raises(IndexError, match="index out of range"):
            ops.embeddings(torch.tensor([50]), tensors(20)["word_embeddings"])

    def test_index_out_of_range_compiled(self):
        torch._dynamo.reset()
        compiled = torch.compile(ops.embeddings, backend="aot_eager", fullgraph=True)
        assert compiled(torch.tensor([3]), tensors(20)["word_embeddings"]).shape == (1, 20)
        with pytest.raises((IndexError, RuntimeError), match="input_ids: index out of range"):
            compiled(torch.tensor([50]), tensors(20)["word_embeddings"])

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"input_ids": torch.ones(2, 3)}, TypeError, "input_ids: expected an int64 .* got torch.float32"),
            ({"input_ids": [1, 2]}, TypeError, "input_ids: expected an int64 or int32 Tensor, got list"),
            ({"token_type_ids": torch.ones(2, 3).bool()}, TypeError, "token_type_ids: expected an int64 .*torch.bool"),
            ({"word_embeddings": torch.ones(5, 4).long()}, TypeError, "word_embeddings: expected a floating"),
            ({"position_embeddings": randn(9, 20).double()}, TypeError, "position_embeddings: expected torch.float32"),
            ({"position_ids": None}, ValueError, "position_ids, position_embeddings: .*position_embeddings alone"),
            ({"token_type_embeddings": None}, ValueError, "both or neither, got token_type_ids alone"),
            ({"position_ids": torch.ones(4).long()}, ValueError, r"position_ids: .* input_ids' \(6, 7\), got \(4,\)"),
            ({"token_type_ids": torch.ones(2, 6, 7).long()}, ValueError, r"token_type_ids: .*, got \(2, 6, 7\)"),
            ({"word_embeddings": randn(20)}, ValueError, r"word_embeddings: expected \(rows, width\), got \(20,\)"),
            ({"position_embeddings": randn(9, 21)}, ValueError, r"position_embeddings: expected \(rows, 20\), got"),
            ({"weight": randn(21)}, ValueError, r"weight: expected shape \(20,\)"),
            ({"bias": randn(1, 20)}, ValueError, r"bias: expected shape \(20,\)"),
            ({"dropout_p": 1.5}, ValueError, "dropout_p: expected a probability"),
            ({"padding_idx": 50}, ValueError, "padding_idx: expected a row of word_embeddings' 50, got 50"),
            ({"padding_idx": -51}, ValueError, "padding_idx: expected a row of word_embeddings' 50, got -51"),
        ],
    )  # fmt: skip
    def test_arguments(self, raises_before_anything_runs, change, error, message):
        given = tensors(20) | ids() | change
        raises_before_anything_runs(lambda: ops.embeddings(**given), error, message)

    @pytest.mark.parametrize("name", [*TABLES[1:], *IDS])
    def test_devices(self, raises_before_anything_runs, name):
        given = tensors(20) | ids()
        given[name] = given[name].to("meta")
        raises_before_anything_runs(lambda: ops.embeddings(**given), ValueError, f"{name}: expected on cpu as")
