"""Encoders and GPT-2 on CPUs: fastformer against eager PyTorch, torch.compile, ONNX Runtime, OpenVINO, CTranslate2.

    python bench/peers/run.py [--threads 1 2] [--seconds S] [--rounds N] [--workload TEXT] [--contender NAME]

Every contender runs in a process of its own (their OpenMP runtimes don't go together); the processes take turns, round
by round, one at a time. Before a turn's times are taken, short calls are run once. Models are converted once and kept
in build/peers. The outputs are checked against eager's: `error` is the largest difference of a real token's hidden
state, `cosine` the least cosine of one; for sentence encoders, `sentences` is the least cosine of a sentence's mean,
`Spearman` the correlation of all similarities between two sentences. For GPT-2, `error` and `cosine` are those of the
last token's logits, and `tokens` is the share of generated tokens that are eager's (behind one that is not, few are).
`bandwidth` is the bytes of the weights over the time of a token, as a part of what this machine reads from memory at
most, measured between the turns.
`cold` is the time to load the model, once its libraries are imported, and make the first call; preparing (exporting,
quantizing, converting) comes before that and is in the JSON file, `first` is that of the first call alone; for one
token, both hold the prefill of its cache.
Exits with 1 if a float32 output is wrong: for generation, if any token differs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import worker  # noqa: E402
from contenders import CONTENDERS  # noqa: E402
from workloads import Workload, save_models, workloads  # noqa: E402

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "transformers", "onnxruntime", "openvino", "nncf", "ctranslate2", "llama-cpp-python")
PAUSE = 0.05  # seconds between two turns: threads that wait for work go to sleep
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of an element of a weight
TOLERANCE = 1e-3  # float32 errors above this part of eager's largest value are mistakes


@dataclass
class Result:
    """Of one contender on one workload."""

    load_s: float | None = None
    first_s: float | None = None
    samples_s: list[float] = field(default_factory=list)
    cores: float | None = None  # busy ones, the most in a turn
    error: float | None = None
    cosine: float | None = None
    sentences: float | None = None
    spearman: float | None = None  # of all pairs of sentences, similarities against eager's
    tokens: float | None = None  # share of the generated ones that are eager's
    wrong: bool = False
    problem: str | None = None  # why it did not run

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples_s) if self.samples_s else None

    @property
    def spread(self) -> float | None:
        """Interquartile range as a part of the median."""
        if len(self.samples_s) < 2:
            return None
        low, middle, high = statistics.quantiles(self.samples_s, n=4, method="inclusive")
        return (high - low) / middle


def main() -> int:
    options = parse()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    in_process(save_models, folder)
    todo = [one for one in workloads(folder) if not options.workload or any(w in one.name for w in options.workload)]
    chosen = [
        (name, precision)
        for name, contender in CONTENDERS.items()
        if contender.is_installed
        for precision in contender.precisions
        if name == "eager" or not options.contender or name in options.contender
        if any(contender.takes(workload) and precision in workload.model.precisions for workload in todo)
    ]
    for name, contender in CONTENDERS.items():
        if not contender.is_installed:
            say(f"{name} is left out: its packages are not installed")
    prepared = prepare({name for name, _ in chosen}, todo, folder)
    content: dict[str, Any] = {
        "method": " ".join(__doc__.split("\n\n")[2].split()),
        "environment": environment(),
        "settings": {"seconds": options.seconds, "rounds": options.rounds},
        "prepare_s": prepared,
        "rows": [],
    }
    start = time.perf_counter()
    for threads in options.threads:
        with processes(chosen, threads, folder) as pipes:
            loaded = load(pipes, todo)
            for workload in todo:
                say(f"{threads} threads: {workload.name}")
                results, bandwidth = measure(workload, pipes, loaded, threads, options.rounds, options.seconds)
                content["rows"].append(as_json(workload, threads, results, bandwidth))
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    say(f"measured in {time.perf_counter() - start:.0f} s")
    import report

    print(report.markdown(content))
    report.draw(content, options.json.with_suffix(".png"))
    say(f"written to {options.json} and {options.json.with_suffix('.png')}")
    return 1 if any(one["wrong"] for row in content["rows"] for one in row["contenders"].values()) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender on each workload")
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn; it has one call at least")
    parser.add_argument("--workload", nargs="+", metavar="TEXT", help="only those with one of these in their name")
    parser.add_argument("--contender", nargs="+", choices=CONTENDERS, metavar="NAME", help="only these, and eager")
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "peers.json", metavar="FILE")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "peers", help="for converted models")
    return parser.parse_args()


def environment() -> dict[str, Any]:
    from fastformer.cli import machine

    found = machine.environment()
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES if name in installed}
    return found | {"versions": found["versions"] | versions}


def prepare(names: set[str], todo: list[Workload], folder: Path) -> dict[str, dict[str, float]]:
    """Converts what is not converted yet; seconds by contender and model, as they were when it was."""
    path = folder / "prepared.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    for name in sorted(names):
        contender = CONTENDERS[name]
        for model in dict.fromkeys(workload.model for workload in todo if contender.takes(workload)):
            if contender.prepare is None or model.name in found.get(name, {}):
                continue
            say(f"{name}: preparing {model.label}")
            start = time.perf_counter()
            in_process(prepare_one, name, model, folder)
            found.setdefault(name, {})[model.name] = time.perf_counter() - start
            path.write_text(json.dumps(found))
    return found


def prepare_one(name: str, model: Any, folder: Path) -> None:
    calibration = [workload for workload in workloads(folder) if workload.model == model]
    CONTENDERS[name].prepare(model, folder, calibration)


def in_process(function: Any, *args: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed: see above")


Key = tuple[str, str]  # name and precision of a contender


@contextlib.contextmanager
def processes(chosen: list[Key], threads: int, folder: Path) -> Iterator[dict[Key, Connection]]:
    """One for each contender, its libraries imported; torch.compile starts without what it compiled in earlier runs."""
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    started, pipes = [], {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for key in chosen:
            pipes[key], theirs = context.Pipe()
            started.append(context.Process(target=worker.main, args=(theirs, *key, threads, folder)))
            started[-1].start()
            theirs.close()
        for pipe in pipes.values():
            pipe.recv()
        try:
            yield pipes
        finally:
            for pipe in pipes.values():
                with contextlib.suppress(BrokenPipeError):
                    pipe.send(None)
            for process in started:
                process.join(10)
                process.kill()


def ask(pipe: Connection, *order: Any) -> Any:
    """The answer, or the text of what went wrong."""
    try:
        pipe.send(order)
        return pipe.recv()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return "its process died"


def load(pipes: dict[Key, Connection], todo: list[Workload]) -> dict[tuple[Key, str], float | str]:
    """Seconds, or what went wrong, by contender and model."""
    return {
        (key, model.name): ask(pipe, "load", model)
        for model in dict.fromkeys(workload.model for workload in todo)
        for key, pipe in pipes.items()
        if key[1] in model.precisions
        and any(workload.model == model and CONTENDERS[key[0]].takes(workload) for workload in todo)
    }


def measure(
    workload: Workload,
    pipes: dict[Key, Connection],
    loaded: dict[tuple[Key, str], float | str],
    threads: int,
    rounds: int,
    seconds: float,
) -> tuple[dict[Key, Result], float | None]:
    """And the bytes a second that are read from memory, where a workload does little else."""
    pipes = {key: pipe for key, pipe in pipes.items() if key[1] in workload.model.precisions}
    results = {key: Result() for key in pipes}
    expected: np.ndarray | None = None
    for key, pipe in pipes.items():  # eager is the first
        result, contender = results[key], CONTENDERS[key[0]]
        if not contender.takes(workload):
            result.problem = contender.absent
            continue
        time_or_problem = loaded[key, workload.model.name]
        if isinstance(time_or_problem, str):
            result.problem = time_or_problem
            continue
        result.load_s = time_or_problem
        answer = ask(pipe, "first", workload)
        if isinstance(answer, str):
            result.problem = answer
            continue
        result.first_s, output = answer
        if expected is None:
            expected = output
        check(result, workload, output, expected, key[1])
    bandwidth = None
    for _ in range(rounds):
        for key, pipe in pipes.items():
            if results[key].problem is None:
                time.sleep(PAUSE)
                answer = ask(pipe, "turn", workload, seconds)
                if isinstance(answer, str):
                    results[key].problem = answer
                    continue
                results[key].samples_s += answer[0]
                results[key].cores = max(results[key].cores or 0, answer[1])
        if workload.task == "token":
            bandwidth = max(bandwidth or 0.0, read_memory(threads))
    return results, bandwidth


def read_memory(threads: int) -> float:
    """Bytes a second, the best of a few runs."""
    from fastformer.cli.bench_ceilings import MEMORY, use_threads

    memory = torch.ones(MEMORY * threads, dtype=torch.int8)
    best = 0.0
    with use_threads(threads):
        for _ in range(10):
            start = time.perf_counter()
            count = torch.ops.fastformer_cpu.read_memory(memory, 1)
            best = max(best, count / (time.perf_counter() - start))
    return best


def check(result: Result, workload: Workload, output: np.ndarray, expected: np.ndarray, precision: str) -> None:
    """Compares tokens, the hidden states of the real tokens, or logits, with eager's."""
    if workload.task == "generate":
        result.tokens = float((output == expected).mean())
        result.wrong = precision == "float32" and result.tokens < 1
        return
    ours, theirs = output.astype(np.float64), expected.astype(np.float64)
    real = workload.mask.astype(bool) if workload.task == "encode" else np.ones(len(ours), dtype=bool)
    result.error = float(np.abs(ours[real] - theirs[real]).max())
    result.cosine = float(cosines(ours[real], theirs[real]).min())
    result.wrong = not result.error <= TOLERANCE * np.abs(theirs[real]).max() if precision == "float32" else False
    if workload.model.is_sentence_encoder:
        means = [(x * real[..., None]).sum(1) / real.sum(1, keepdims=True) for x in (ours, theirs)]
        result.sentences = float(cosines(*means).min())
        if len(real) > 2:
            result.spearman = spearman(*map(similarities, means))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the rows of two matrices."""
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def similarities(means: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of different rows."""
    unit = means / np.linalg.norm(means, axis=-1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(means), 1)]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def as_json(workload: Workload, threads: int, results: dict[Key, Result], bandwidth: float | None) -> dict[str, Any]:
    eager = results["eager", "float32"].median
    return {
        "workload": workload.name,
        "shape": list(workload.ids.shape),
        "tokens": int(workload.lengths.sum()),
        "threads": threads,
        "bandwidth": bandwidth,  # bytes a second read from memory
        "contenders": {
            f"{name} {precision}": {
                "median_s": result.median,
                "spread": result.spread,
                "ratio": eager / result.median if eager and result.median else None,
                "cold_s": None if result.first_s is None else result.load_s + result.first_s,
                "bandwidth": workload.model.weights_read * BYTES[precision] / result.median / bandwidth
                if bandwidth and result.median
                else None,
                **asdict(result),
            }
            for (name, precision), result in results.items()
        },
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
