"""Runs the CUDA kernels on the simulator (docs/sim.md): its own tests, then the op tests, which know nothing of it, in
several orders of the threads, with lazy copies and under sanitizers.

    python tests/sim/verify.py [--quick]       quick: without sanitizers
"""

import os
import subprocess
import sys
import time

import build_sim

OPS = ("scaled_dot_product_attention", "varlen_attn", "layer_norm", "add_layer_norm", "linear", "feed_forward")
OP_TESTS = [f"tests/ops/test_{op}.py" for op in OPS]
SUBSET = "sizes or narrow or dropout_accuracy or layouts or residual_of_another_dtype"  # what sanitizers are given

# (variant, FASTFORMER_SIM, arguments of pytest)
RUNS = [
    ("plain", "forward", ["tests/sim"]),
    ("plain", "forward", OP_TESTS),
    ("plain", "reverse,lazy", OP_TESTS),
    ("plain", "random=1,lazy", OP_TESTS),
    ("asan", "random=2,lazy", [*OP_TESTS, "-k", SUBSET]),
    ("tsan", "forward", [*OP_TESTS, "-k", SUBSET]),
]


def main() -> None:
    runs = [run for run in RUNS if run[0] == "plain" or "--quick" not in sys.argv]
    lines, failed = [], False
    for variant in dict.fromkeys(run[0] for run in runs):
        started = time.monotonic()
        build_sim.build(variant)
        lines.append(f"{'built ' + variant:<36} {time.monotonic() - started:6.1f} s")
    for variant, options, arguments in runs:
        title = f"{variant}, {options}: {' '.join(arguments[:1])}"
        print(f"== {title}", flush=True)
        environment = os.environ | build_sim.environment(variant)
        environment |= {"FASTFORMER_BACKEND": "cuda", "FASTFORMER_SIM": options, "OMP_NUM_THREADS": "1"}
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", *arguments]
        finished = subprocess.run(command, cwd=build_sim.ROOT, env=environment)
        failed |= finished.returncode != 0
        verdict = "" if finished.returncode == 0 else "  FAILED"
        lines.append(f"{title:<60} {time.monotonic() - started:6.1f} s{verdict}")
    print("\n".join(lines))
    sys.exit(failed)


if __name__ == "__main__":
    main()
