"""`fastformer tune`: which backend, and on a GPU which tiles, are the fastest for a model's shapes on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import fastformer
from fastformer import backends, library, tuning
from fastformer.cli import calls, machine
from fastformer.cli.calls import Call
from fastformer.cli.compare import Announce, duration, progress
from fastformer.cli.errors import UserError
from fastformer.cli.measure import Timing, accuracy, time_on
from fastformer.cli.workloads import check_folder

LEGEND = """\
each cell   median time and spread (interquartile range in percent of the median); contenders take turns
packed      how accelerated models run on CPUs without gradients: shown to compare, ops.* can't choose it
won         what will run: another than before only where it is 5% faster and three quarters of its times are below the
            fastest quarter of what was before; ties change nothing"""


@dataclass(frozen=True)
class Sizes:
    """Of a model's layers."""

    name: str
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    activation: str
    is_causal: bool
    dropout: float
    positions: int


BERT_BASE = Sizes("BERT-base", 768, 12, 3072, 30522, "gelu", False, 0.1, 512)
GPT2 = Sizes("GPT-2", 768, 12, 3072, 50257, "gelu_tanh", True, 0.1, 1024)
BATCHES = {  # (batch, length), the largest first: at these a kernel's tiles are chosen
    "cpu": [(4, 512), (8, 128), (1, 128), (1, 64), (1, 16)],
    "cuda": [(8, 1024), (16, 512), (32, 128), (8, 128), (1, 512), (1, 128)],
}
QUICK = {"cpu": [(8, 128), (1, 128)], "cuda": [(16, 512), (8, 128)]}
WRONG = 4  # times the allowed error. One draw says little about a largest error: `fastformer verify` judges by the rule
DTYPES = {
    "cpu": [torch.float32, torch.bfloat16],
    "cuda": [torch.bfloat16, torch.float16, torch.float32],
}


@dataclass(frozen=True)
class Contest:
    """Contenders for one class of calls."""

    call: str
    dtype: str
    mode: str  # "inference" or "training": forward and backward
    key: str  # in the tuned table
    timings: dict[str, Timing]  # by backend, or by config of a kernel
    wrong: dict[str, str]  # the contenders that may not win, and why
    before: str
    winner: str

    @property
    def gain(self) -> float | None:
        if self.before == self.winner or self.before not in self.timings:
            return None
        return self.timings[self.before].median / self.timings[self.winner].median


def tune(
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Checkpoint folder of transformers (default: BERT-base and GPT-2)."),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Default: the GPU, if there is one.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes, shorter measurements.")] = False,
) -> None:
    """Measure every backend on a model's shapes, and remember what is fastest for later calls of fastformer.ops."""
    on = chosen_device(device)
    if asked_for := os.environ.get("FASTFORMER_BACKEND"):
        raise UserError(f"FASTFORMER_BACKEND={asked_for} decides for every call: unset it to measure what is to decide")
    models = [sizes_of(model)] if model else [BERT_BASE, GPT2]
    seconds = 0.1 if quick else 0.5
    with progress() as announce, without_table():
        contests, configs = measure(models, on, quick, seconds, announce)
    try:
        tuning.record(on, {c.key: c.winner for c in contests if c.winner in c.timings}, configs.winners)
    except OSError as error:
        raise UserError(f"cannot write {tuning.path()}: {error.strerror}") from None
    show(contests, configs.contests, on)


def chosen_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in BATCHES:
        raise UserError(f"--device: got {name!r}, expected one of {', '.join(BATCHES)}")
    if name == "cuda" and (reason := machine.why_no_gpu()):
        raise UserError(f"--device cuda: {reason}")
    return torch.device(name)


def sizes_of(folder: Path) -> Sizes:
    """From the config.json of a BERT or a GPT-2."""
    config = json.loads((check_folder(folder) / "config.json").read_text(encoding="utf-8"))
    try:
        if config["model_type"] == "bert":
            return Sizes(
                folder.name, config["hidden_size"], config["num_attention_heads"], config["intermediate_size"],
                config["vocab_size"], activation(config.get("hidden_act", "gelu")), False,
                config.get("hidden_dropout_prob", 0.1), config["max_position_embeddings"],
            )  # fmt: skip
        if config["model_type"] == "gpt2":
            return Sizes(
                folder.name, config["n_embd"], config["n_head"], config.get("n_inner") or 4 * config["n_embd"],
                config["vocab_size"], activation(config.get("activation_function", "gelu_new")), True,
                config.get("resid_pdrop", 0.1), config["n_positions"],
            )  # fmt: skip
    except KeyError as error:
        raise UserError(f"--model {folder}: config.json has no {error}") from None
    raise UserError(f"--model {folder}: tune knows the shapes of bert and gpt2, not of {config['model_type']}")


def activation(name: str) -> str:
    """What ops.linear calls transformers' activation."""
    known = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}
    if name not in known:
        raise UserError(f"--model: the activation {name} has no fused kernel")
    return known[name]


@contextlib.contextmanager
def without_table() -> Iterator[None]:
    """Defaults are what is to be beaten, not what an earlier table says."""
    previous, tuning.table = tuning.table, None
    try:
        yield
    finally:
        tuning.table = previous


def measure(
    models: list[Sizes], device: torch.device, quick: bool, seconds: float, announce: Announce
) -> tuple[list[Contest], Configs]:
    contests: dict[str, Contest] = {}  # by key: models share many classes
    configs = Configs(device, seconds)
    for sizes in models:
        for dtype in DTYPES[device.type][: 1 if quick else None]:
            for batch, length in (QUICK if quick else BATCHES)[device.type]:
                if length > sizes.positions:
                    continue
                for call, modes in calls_of(sizes, batch, length):
                    for mode in modes:
                        announce(f"{sizes.name} {batch}x{length}, {mode}: {call.op} {call.what}")
                        contest = contend(call, dtype, mode, device, seconds, configs, contests)
                        if contest is not None:
                            contests[contest.key] = contest
    return list(contests.values()), configs


INFERENCE, TRAINING = ("inference",), ("training",)
BOTH = INFERENCE + TRAINING


def calls_of(sizes: Sizes, batch: int, length: int) -> Iterator[tuple[Call, tuple[str, ...]]]:
    """The op calls of a model's layers, each with the modes in which a model makes it."""
    E, I, H, p = sizes.hidden, sizes.intermediate, sizes.heads, sizes.dropout
    x, vector = (batch, length, E), (E,)
    size, norm = "x".join(map(str, x)), {"normalized_shape": E}
    yield Call("layer_norm", size, {"input": x, "weight": vector, "bias": vector}, norm), BOTH
    both = {"input": x, "residual": x, "weight": vector, "bias": vector}
    yield Call("add_layer_norm", size, both, norm), BOTH
    yield Call("add_layer_norm", f"{size}, dropout", both, norm | {"dropout_p": p}), TRAINING if p else ()
    for features in (3 * E, E):
        linear = {"input": x, "weight": (features, E), "bias": (features,)}
        yield Call("linear", f"{size} to {features}", linear), BOTH
    yield Call("linear", f"{size} to {E}, dropout", linear, {"dropout_p": p}), TRAINING if p else ()
    network = {"input": x, "weight1": (I, E), "bias1": (I,), "weight2": (E, I), "bias2": vector}
    options = {"activation": sizes.activation}
    yield Call("feed_forward", f"{size} to {I}, {sizes.activation}", network, options), BOTH
    yield (
        Call("feed_forward", f"{size} to {I}, {sizes.activation}, dropout", network, options | {"dropout_p": p}),
        TRAINING if p else (),
    )

    heads = {name: (batch, H, length, E // H) for name in ("query", "key", "value")}
    size = f"{batch}x{H}x{length}x{E // H}" + (", causal" if sizes.is_causal else "")
    causal = {"is_causal": sizes.is_causal}
    yield Call("scaled_dot_product_attention", size, heads, causal), BOTH
    dropout = causal | {"dropout_p": p}
    yield Call("scaled_dot_product_attention", f"{size}, dropout", heads, dropout), TRAINING if p else ()
    if batch == 1:
        return
    padding = causal | {"attn_mask": partial(calls.padding_mask, batch, length)}
    yield Call("scaled_dot_product_attention", f"{size}, padding mask", heads, padding), BOTH
    lengths = torch.linspace(length, length / 2, batch).long().tolist()
    packed = {name: (sum(lengths), H, E // H) for name in ("query", "key", "value")}
    bounds = {name: partial(calls.bounds, lengths) for name in ("cu_seq_q", "cu_seq_k")}
    window = {"window_size": (-1, 0)} if sizes.is_causal else {}
    yield Call("varlen_attn", size, packed, bounds | {"max_q": length, "max_k": length} | window), INFERENCE


def contend(
    call: Call,
    dtype: torch.dtype,
    mode: str,
    device: torch.device,
    seconds: float,
    configs: Configs,
    known: dict[str, Contest],
) -> Contest | None:
    """All backends that take the call; None where the same class was measured before."""
    tensors = call.tensors(device, dtype)
    fused = call.bind(call.fused, device)
    run = in_mode(mode, tensors)
    key, default, names = asked(lambda: run(fused))
    if key in known:
        return None
    if call.op == "varlen_attn" and device.type == "cuda":
        names.remove("torch")  # the reference reads its bounds on the host
    contenders = {name: partial(on_backend, name, run, fused) for name in names}
    if mode == "inference" and device.type == "cpu" and library.available():
        contenders |= packed(call, tensors)
    check = Check(call, tensors, mode, device)
    wrong = {name: why for name, contender in contenders.items() if (why := check.why_wrong(contender))}
    if "triton" in contenders and "triton" not in wrong:
        configs.sweep(f"{call.op} {call.what}", dtype, mode, contenders["triton"], check)
    with configs.in_use():
        timings = time_on(device, {name: one for name, one in contenders.items() if name not in wrong}, seconds)
    playing = {name: timing for name, timing in timings.items() if name != "packed"}
    winner = best(playing, default) if playing else default
    return Contest(f"{call.op} {call.what}", tuning.key_text(dtype), mode, key, timings, wrong, default, winner)


def in_mode(mode: str, tensors: dict[str, Tensor]) -> Callable[[Callable], tuple[Tensor, ...]]:
    """Runs a function on the tensors: the outputs, in training the gradients as well."""
    if mode == "inference":

        def forward(function: Callable) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return as_tuple(function(**tensors))

        return forward
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    weights: list[Tensor] = []  # of the outputs' sum, drawn at the first run

    def both(function: Callable) -> tuple[Tensor, ...]:
        outputs = as_tuple(function(**leaves))
        if not weights:
            generator = torch.Generator().manual_seed(2)
            weights.extend(torch.randn(out.shape, generator=generator).to(out) for out in outputs)
        return outputs + torch.autograd.grad(outputs, leaves.values(), weights)

    return both


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def on_backend(name: str, run: Callable[[Callable], tuple[Tensor, ...]], function: Callable) -> tuple[Tensor, ...]:
    with fastformer.backend(name, strict=True):
        return run(function)


def asked(call: Callable[[], Any]) -> tuple[str, str, list[str]]:
    """Of the one op call in here: its class, the backend that it takes by default, and all that could take it."""
    noted: list[tuple[str, str, list[str]]] = []

    def choose(op: str, *tensors: Tensor | None, options: tuple = (), **rest: Any) -> str:
        able = []
        for name in backends.BACKENDS:
            with contextlib.suppress(NotImplementedError), fastformer.backend(name, strict=True):
                able.append(original(op, *tensors, options=options, **rest))
        default = original(op, *tensors, options=options, **rest)
        noted.append((tuning.key_text(*tuning.call_class(op, tensors, options)), default, able))
        return default

    original, backends.choose = backends.choose, choose
    try:
        call()
    finally:
        backends.choose = original
    return noted[0]


def packed(call: Call, tensors: dict[str, Tensor]) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """A product on weights that were packed before."""
    raw = torch.ops.fastformer_cpu
    if call.op == "linear" and "dropout_p" not in call.options:
        panels = raw.pack_weight(tensors["weight"])
        arguments = tensors["input"], panels, len(tensors["weight"]), tensors["bias"], None, None
        return {"packed": lambda: (raw.packed_linear(*arguments),)}
    if call.op == "feed_forward" and "dropout_p" not in call.options:
        panels = [raw.pack_weight(tensors[name]) for name in ("weight1", "weight2")]
        arguments = (
            tensors["input"], panels[0], len(tensors["weight1"]), tensors["bias1"],
            panels[1], len(tensors["weight2"]), tensors["bias2"], call.options["activation"], None,
        )  # fmt: skip
        return {"packed": lambda: (raw.packed_feed_forward(*arguments),)}
    return {}


class Check:
    """Of what a contender gives, against float64."""

    def __init__(self, call: Call, tensors: dict[str, Tensor], mode: str, device: torch.device):
        eager = call.bind(call.eager, device)
        torch.manual_seed(1)
        self._expected = in_mode(mode, tensors)(eager)
        torch.manual_seed(1)
        self._ref64 = in_mode(mode, {name: x.double() for name, x in tensors.items()})(eager)

    def why_wrong(self, contender: Callable[[], tuple[Tensor, ...]]) -> str | None:
        torch.manual_seed(1)  # the same dropout
        try:
            results = contender()
        except Exception as error:  # a kernel that does not run here; the others may
            return f"{type(error).__name__}: {error}".splitlines()[0]
        for result, expected, ref64 in zip(results, self._expected, self._ref64, strict=True):
            judged = accuracy(result.detach(), expected.detach(), ref64.detach())
            if not judged.fused <= WRONG * judged.allowed:  # NaN is wrong, too
                return f"error {judged.fused:.1e}, {judged.allowed:.1e} allowed"
        return None


def best(timings: dict[str, Timing], default: str) -> str:
    """The fastest, if it is 5% faster than the default and its upper quartile is below the default's lower one."""
    fastest = min(timings, key=lambda name: timings[name].median)
    if default not in timings:
        return fastest
    apart = quartiles(timings[fastest])[1] < quartiles(timings[default])[0]
    return fastest if apart and 1.05 * timings[fastest].median < timings[default].median else default


def quartiles(timing: Timing) -> tuple[float, float]:
    low, _, high = statistics.quantiles(timing.samples, n=4, method="inclusive")
    return low, high


class Configs:
    """The tiles of the Triton kernels: what was measured of each kernel and key, and the best so far."""

    def __init__(self, device: torch.device, seconds: float):
        self.contests: list[Contest] = []
        self._device, self._seconds = device, seconds
        self._chosen: dict[str, Any] = {}  # by key, a `Config`

    @property
    def winners(self) -> dict[str, dict[str, Any]]:
        """For `tuning.record`"""
        return {key: dataclasses.asdict(config) for key, config in self._chosen.items()}

    def sweep(
        self, call: str, dtype: torch.dtype, mode: str, run: Callable[[], tuple[Tensor, ...]], check: Check
    ) -> None:
        """Measures the candidates of each kernel that `run` launches and that was not measured before."""
        with self.in_use() as trial:
            run()
            for key, candidates in list(trial.candidates.items()):
                if key in self._chosen or len(candidates) < 2:
                    continue
                contenders, wrong = {}, {}
                for config in candidates:
                    contender = partial(with_config, trial, key, config, run)
                    if why := check.why_wrong(contender):  # more registers or shared memory than there are, perhaps
                        wrong[config_text(config)] = why
                    else:
                        contenders[config_text(config)] = contender
                if not contenders:
                    continue
                timings = time_on(self._device, contenders, self._seconds)
                before = config_text(candidates[0])
                winner = best(timings, before)
                trial.chosen[key] = next(config for config in candidates if config_text(config) == winner)
                self._chosen[key] = trial.chosen[key]
                self.contests.append(Contest(call, tuning.key_text(dtype), mode, key, timings, wrong, before, winner))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Any]:
        """Inside, the kernels run with the best configs so far; gives the trial that says so."""
        if backends.why_unavailable("triton"):
            yield None
            return
        from fastformer.kernels import configs  # imports Triton, which takes its time

        with configs.trial() as trial:
            trial.chosen |= self._chosen
            yield trial


def with_config(trial: Any, key: str, config: Any, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    trial.chosen[key] = config
    return run()


def config_text(config: Any) -> str:
    """BLOCK_M=64 BLOCK_N=32 warps=4 stages=2"""
    tiles = " ".join(f"{name}={size}" for name, size in config.tiles.items())
    return f"{tiles} warps={config.num_warps} stages={config.num_stages}"


def show(contests: list[Contest], configs: list[Contest], device: torch.device) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    console.print(f"{tuning.device_name(device)}{threads}", markup=False)
    names = [*backends.BACKENDS, "packed"]
    console.print(table(contests, [name for name in names if any(name in c.timings for c in contests)]))
    for contest in configs:
        console.print(f"{contest.key} (at {contest.call}, {contest.mode})", style="bold", markup=False)
        for name, timing in contest.timings.items():
            console.print(f"  {cell(timing)}  {name}{'  <- won' * (name == contest.winner)}", markup=False)
    for contest in [*contests, *configs]:
        for name, why in contest.wrong.items():
            line = f"{contest.call}, {contest.dtype}, {contest.mode}: {name} was left out: {why}"
            console.print(line, style="yellow", markup=False, soft_wrap=True)
    console.print(LEGEND, style="dim")
    changed = sum(contest.winner != contest.before for contest in contests + configs)
    total = len(contests) + len(configs)
    console.print(f"{changed} of {total} choices changed; written to {tuning.path()}", markup=False, soft_wrap=True)


def table(contests: list[Contest], names: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("call", "dtype", "mode"):
        table.add_column(name)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("won")
    for contest in contests:
        cells = [cell(contest.timings[name]) if name in contest.timings else "" for name in names]
        table.add_row(escape(contest.call), contest.dtype, contest.mode, *cells, outcome(contest))
    return table


def cell(timing: Timing) -> str:
    return f"{duration(timing.median)} {timing.spread:.0%}"


def outcome(contest: Contest) -> str:
    if contest.winner == contest.before:
        return f"{contest.winner}, no change"
    gain = "" if contest.gain is None else f", {contest.gain:.2f}x"
    return f"[bold green]{contest.winner}[/], was {contest.before}{gain}"
