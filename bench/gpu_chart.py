"""The chart of bench/gpu.py's rows."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def draw(content: dict[str, Any], path: Path) -> None:
    """Attention over the length, one panel for each head size, direction and mask; below, all else against eager."""
    timed = [row for row in content["rows"] if any(c["median_s"] for c in row["contenders"].values())]
    attention = [row for row in timed if row["group"] == "attention"]
    panels = list(dict.fromkeys(map(panel, attention)))
    others = [row for row in timed if row["group"] != "attention"]
    columns = 4
    lines = max(1, -(-len(panels) // columns))
    figure = plt.figure(figsize=(20, 4 * lines + 0.4 * len(others) + 3), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(4 * lines, 0.4 * len(others) + 3))
    for name, axes in zip(panels, top.subplots(lines, columns, squeeze=False).flat, strict=False):
        attention_panel(axes, name, [row for row in attention if panel(row) == name])
    speedups(bottom.subplots(), others)
    device = content["environment"]["gpus"]
    figure.suptitle("dry run: nothing was measured" if content["dry_run"] else ", ".join(device))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def panel(row: dict[str, Any]) -> str:
    size, _, what = row["name"].removeprefix("scaled_dot_product_attention ").partition(", ")
    direction = "forward and backward" if row["backward"] else "forward"
    return f"head size {size.split('x')[-1]}, {row['dtype']}, {what or 'no mask'}\n{direction}"


def attention_panel(axes: Any, name: str, rows: list[dict[str, Any]]) -> None:
    axes.set_title(name, fontsize=9)
    for contender in dict.fromkeys(label for row in rows for label in row["contenders"]):
        found = [(length(row), row["contenders"].get(contender)) for row in rows]
        points = [(s, c["tflops"]) for s, c in found if c and c["tflops"]]
        if points:
            fused = contender.startswith("fastformer")
            axes.plot(*zip(*points, strict=True), marker="o", linewidth=2.5 if fused else 1, label=contender)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("length")
    axes.set_ylabel("TFLOP/s")
    axes.legend(fontsize=7)


def length(row: dict[str, Any]) -> int:
    return int(row["name"].split()[1].rstrip(",").split("x")[2])


def speedups(axes: Any, rows: list[dict[str, Any]]) -> None:
    """How many times faster than eager each contender is; losses lie left of 1."""
    labels = []
    for number, row in enumerate(rows):
        labels.append(f"{row['name']}, {row['dtype']}{', backward' * row['backward']}")
        for label, one in row["contenders"].items():
            if one["ratio"] and label != "eager":
                fused = label.startswith("fastformer")
                axes.plot(one["ratio"], number, "o" if fused else "x", color="tab:blue" if fused else "tab:gray")
    axes.axvline(1, color="black", linewidth=0.5)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as eager (dots: fastformer, crosses: torch.compile and torch's own)")
