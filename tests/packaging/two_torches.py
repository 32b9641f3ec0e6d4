"""Shows that one build of the op library gives the same answers in two versions of torch (`make torch214`).

Run by the Python of the one:   two_torches.py save FILE
and by the Python of the other: two_torches.py compare FILE
"""

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from fastformer import backend, library, ops  # noqa: E402

LIBRARY = Path(library.__file__).with_name("libfastformer_cpu.so")


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (2, 37, 64),
        "residual": (2, 37, 64),
        "weight1": (256, 64),
        "bias1": (256,),
        "weight2": (64, 256),
        "bias2": (64,),
        "query": (2, 4, 37, 16),
        "key": (2, 4, 37, 16),
        "value": (2, 4, 37, 16),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@backend("cpu", strict=True)
def answers(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs and gradients of every op; the names of inputs are those of `inputs`."""
    t = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    outputs = {
        "layer_norm": ops.layer_norm(t["x"], (64,), t["bias2"]),
        "add_layer_norm": ops.add_layer_norm(t["x"], t["residual"], (64,), t["bias2"])[0],
        "linear": ops.linear(t["x"], t["weight1"], t["bias1"], activation="gelu"),
        "feed_forward": ops.feed_forward(t["x"], t["weight1"], t["bias1"], t["weight2"], t["bias2"]),
        "attention": ops.scaled_dot_product_attention(t["query"], t["key"], t["value"], is_causal=True),
    }
    sum(output.square().sum() for output in outputs.values()).backward()
    return outputs | {f"gradient of {name}": tensor.grad for name, tensor in t.items()}


def main() -> None:
    _, action, file = sys.argv
    if not library.available():
        sys.exit(library.why_unavailable())
    digest = hashlib.sha256(LIBRARY.read_bytes()).hexdigest()
    print(f"torch {torch.__version__}, {LIBRARY.name} {digest[:16]}, {library.isa()}")
    torch.set_num_threads(1)
    if action == "save":
        given = inputs()
        torch.save(
            {"digest": digest, "torch": str(torch.__version__), "inputs": given, "answers": answers(given)}, file
        )
        return

    saved = torch.load(file, weights_only=True)
    if saved["digest"] != digest:
        sys.exit("the library was built anew in between: save again")
    differ = []
    for name, answer in answers(saved["inputs"]).items():
        error = (answer - saved["answers"][name]).abs().max().item()
        print(f"  {name:<24} largest difference {error:.1e}")
        if not error <= 1e-6 * answer.abs().max().item():
            differ.append(name)
    if differ:
        sys.exit(f"torch {torch.__version__} and {saved['torch']} differ in: {', '.join(differ)}")
    print(f"torch {torch.__version__} and {saved['torch']} agree")


if __name__ == "__main__":
    main()
