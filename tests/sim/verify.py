"""Runs the CUDA kernels on the simulator (docs/sim.md): its own tests, then the op tests, which know nothing of it, in
several orders of the threads, with lazy copies and under sanitizers.

    python tests/sim/verify.py [--quick]       quick: fewer orders, and a few tests under sanitizers

As many of the runs below as there are CPUs go on at a time (MAX_JOBS says otherwise).
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import build_sim

OPS = ("scaled_dot_product_attention", "varlen_attn", "layer_norm", "add_layer_norm", "linear", "feed_forward")
OP_TESTS = [f"tests/ops/test_{op}.py" for op in OPS] + ["tests/ops/test_attention_masks.py"]
SIM_TESTS = ["tests/sim", "--ignore=tests/sim/ptx"]
KERNEL_TESTS = [
    f"tests/sim/test_cuda_{kernels}.py"
    for kernels in ("attention", "attention_hopper", "matmul", "matmul_hopper", "layer_norm")
]
HOPPER_TESTS = [test for test in OP_TESTS if "layer_norm" not in test]
SUBSET = "sizes or narrow or accuracy or layouts or residual_of_another_dtype or sequence_for_itself or grouped_query"
FEW = "many_tiles or split_depth or SplitKeys or masked_whole or many_rows or steps and size0"
FEW = f"({FEW} or orders_give and not matmul) and not (dtype2 or eager or reverse or random)"

# (variant, FASTFORMER_SIM, arguments of pytest). The kernel tests go through the orders by themselves.
QUICK_RUNS = [
    ("plain", "forward", SIM_TESTS),
    *((variant, "forward", [*KERNEL_TESTS, "-k", FEW]) for variant in ("asan", "tsan")),
    ("plain", "forward", OP_TESTS),
    ("plain", "random=1,lazy", OP_TESTS),
    ("plain", "random=1,lazy,hopper", HOPPER_TESTS),
]
RUNS = [
    ("tsan", "forward", OP_TESTS),
    ("plain", "forward", SIM_TESTS),
    ("plain", "forward", OP_TESTS),
    ("plain", "reverse,lazy", OP_TESTS),
    ("plain", "random=1,lazy", OP_TESTS),
    ("asan", "random=2,lazy", OP_TESTS),
    *(("plain", f"{options},hopper", HOPPER_TESTS) for options in ("forward", "reverse,lazy", "random=1,lazy")),
    *((variant, "random=2,lazy,hopper", [*HOPPER_TESTS, "-k", SUBSET]) for variant in ("asan", "tsan")),
    *((variant, "forward", KERNEL_TESTS) for variant in ("asan", "tsan")),
    *(("asan", options, [*OP_TESTS, "-k", SUBSET]) for options in ("forward", "reverse,lazy")),
    *(("tsan", options, [*OP_TESTS, "-k", SUBSET]) for options in ("reverse,lazy", "random=2,lazy")),
]


def run(variant: str, options: str, arguments: list[str]) -> tuple[str, bool]:
    """What to say of it, and whether it failed; the tests' own words come at their end."""
    environment = os.environ | build_sim.environment(variant)
    environment |= {"FASTFORMER_BACKEND": "cuda", "FASTFORMER_SIM": options, "OMP_NUM_THREADS": "1"}
    # -s: a sanitizer that ends the program is heard.
    command = [sys.executable, "-m", "pytest", "-q", "-s", "--color=no", "-p", "no:cacheprovider", *arguments]
    started = time.monotonic()
    finished = subprocess.run(
        command, cwd=build_sim.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seconds = time.monotonic() - started
    what = f"{variant}, {options}: {' '.join(argument.removeprefix('tests/') for argument in arguments[:1])}"
    what += " and others" * (len(arguments) > 1) + ", some" * ("-k" in arguments)
    print(f"== {what}\n{finished.stdout}", flush=True)
    failed = finished.returncode != 0
    return f"{what:<70} {seconds:6.1f} s{'  FAILED' if failed else ''}", failed


def main() -> None:
    started = time.monotonic()
    runs = QUICK_RUNS if "--quick" in sys.argv else RUNS
    lines = []
    for variant in dict.fromkeys(variant for variant, _, _ in runs):
        begun = time.monotonic()
        build_sim.build(variant)
        lines.append(f"{'built ' + variant:<70} {time.monotonic() - begun:6.1f} s")
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda each: run(*each), runs))
    lines += [line for line, _ in results]
    print("\n".join([*lines, f"{'all':<70} {time.monotonic() - started:6.1f} s"]))
    sys.exit(any(failed for _, failed in results))


if __name__ == "__main__":
    main()
