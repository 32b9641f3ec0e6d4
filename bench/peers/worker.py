"""The process of one contender: it is told what to load and run, and answers with results and times."""

from __future__ import annotations

import gc
import importlib
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SHORT = 0.25  # seconds: shorter calls are run once more before each turn, because others had the caches meanwhile


def main(pipe: Connection, name: str, precision: str, threads: int, folder: Path) -> None:
    """Answers ("load", model), ("first", workload) and ("turn", workload, seconds) until None comes. An answer is what
    was asked for, or the exception's text."""
    from contenders import CONTENDERS

    contender = CONTENDERS[name]
    for module in contender.imports:
        importlib.import_module(module)
    pipe.send(None)
    loaded: dict[str, Any] = {}
    last: dict[str, float] = {}  # seconds of the last call, by workload
    while (order := pipe.recv()) is not None:
        what, subject, *rest = order
        try:
            if what == "load":
                start = time.perf_counter()
                loaded[subject.name] = contender.load(subject, folder, threads, precision)
                pipe.send(time.perf_counter() - start)
            elif what == "first":
                start = time.perf_counter()
                output = loaded[subject.model.name](subject)
                first = last[subject.name] = time.perf_counter() - start
                pipe.send((first, output))
            else:
                run = loaded[subject.model.name]
                pipe.send(turn(partial(run, subject), last[subject.name] < SHORT, *rest))
        except Exception as error:  # of any kind: what this contender can't do is told in the table
            pipe.send(f"{type(error).__name__}: {error}".strip().splitlines()[0][:200])


def turn(call: Any, warm: bool, seconds: float) -> tuple[list[float], float]:
    """The times of calls that take about `seconds` together, at least one, and how many cores were busy meanwhile."""
    samples: list[float] = []
    gc.disable()
    if warm:
        call()
    cpu, begin = time.process_time(), time.perf_counter()
    while not samples or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    cores = (time.process_time() - cpu) / (time.perf_counter() - begin)
    gc.enable()
    return samples, cores
