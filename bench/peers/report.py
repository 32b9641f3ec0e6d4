"""The table and the chart of what bench/peers/run.py measured; alone: python bench/peers/report.py FILE.json"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

PRECISIONS = ("float32", "bfloat16", "int8")
NOISY = 0.25  # spread from which a row is marked
COLORS = {
    "torch.compile": "0.85", "ONNX Runtime": "0.7", "OpenVINO": "0.55", "CTranslate2": "0.4", "llama.cpp": "0.25",
    "fastformer": "tab:blue", "fastformer GPT": "tab:cyan",
}  # fmt: skip


def markdown(content: dict[str, Any]) -> str:
    """One table for each number of threads and precision: times faster than eager, and eager's time."""
    lines = [heading(content["environment"])]
    for threads in dict.fromkeys(row["threads"] for row in content["rows"]):
        for precision in PRECISIONS:
            rows, labels = select(content, threads, precision)
            if labels:
                lines += ["", f"{precision}, {threads} thread{'s' * (threads > 1)}, times as fast as eager in float32"]
                lines += speeds(rows, labels)
                lines += [
                    "",
                    f"{precision}, {threads} thread{'s' * (threads > 1)}, outputs against eager's, and cold start",
                ]
                lines += checks(rows, ["eager float32"] * (precision == "float32") + labels)
    return "\n".join([*lines, "", *problems(content["rows"])])


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """Why there is no number, each reason once."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, one in row["contenders"].items():
            if one["problem"] and name not in found.setdefault(one["problem"], []):
                found[one["problem"]].append(name)
    return [f"- {', '.join(names)}: {problem}" for problem, names in found.items()]


def heading(environment: dict[str, Any]) -> str:
    names = ("torch", "transformers", "onnxruntime", "openvino", "nncf", "ctranslate2", "fastformer")
    cpu, versions = environment["cpu"], environment["versions"]
    known = [name for name in cpu["features"] if name.startswith(("avx512_", "amx", "avx_vnni"))]
    return f"{cpu['name']}, {cpu['cores']} cores ({' '.join(known)}); " + ", ".join(
        f"{name} {versions[name]}" for name in names
    )


def contenders(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["contenders"]))


def select(content: dict[str, Any], threads: int, precision: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a table or panel, and the contenders beside eager."""
    rows = [row for row in content["rows"] if row["threads"] == threads]
    labels = [name for name in contenders(rows) if name.endswith(precision) and name != "eager float32"]
    return [row for row in rows if any(label in row["contenders"] for label in labels)], labels


def speeds(rows: list[dict[str, Any]], labels: list[str]) -> list[str]:
    lines = table_head(["workload", "eager", *(label.rpartition(" ")[0] for label in labels)])
    for row in rows:
        eager = row["contenders"]["eager float32"]["median_s"]
        cells = [cell(row["contenders"].get(label)) for label in labels]
        lines.append(table_row([row["workload"], "-" if eager is None else f"{eager * 1e3:.3g} ms", *cells]))
    return lines


def cell(one: dict[str, Any] | None) -> str:
    if one is None or one["ratio"] is None:
        return "-"
    if one["wrong"]:
        return "wrong"
    noise = f" (spread {one['spread']:.0%})" if (one["spread"] or 0) > NOISY else ""
    return f"{one['ratio']:.2f}{noise}"


def checks(rows: list[dict[str, Any]], labels: list[str]) -> list[str]:
    """With those columns only that anything stands in."""
    formats = {
        "error": "{:.1e}", "cosine": "{:.5f}", "sentences": "{:.5f}", "spearman": "{:.5f}", "tokens": "{:.1%}",
        "bandwidth": "{:.0%}", "cold_s": "{:.2f} s", "first_s": "{:.2f} s",
    }  # fmt: skip
    ran = [
        (row["workload"], label, row["contenders"][label])
        for row in rows
        for label in labels
        if row["contenders"].get(label, {}).get("first_s") is not None
    ]
    formats = {name: text for name, text in formats.items() if any(one[name] is not None for *_, one in ran)}
    titles = [name.removesuffix("_s").replace("spearman", "Spearman") for name in formats]
    lines = table_head(["workload", "contender", *titles])
    for workload, label, one in ran:
        cells = ["" if one[name] is None else text.format(one[name]) for name, text in formats.items()]
        lines.append(table_row([workload, label.rpartition(" ")[0], *cells]))
    return lines


def table_head(cells: list[str]) -> list[str]:
    return [table_row(cells), "|" + "---|" * len(cells)]


def table_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def draw(content: dict[str, Any], path: Path) -> None:
    """A panel for each precision and number of threads: bars of how many times faster than eager each is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = list(dict.fromkeys(row["threads"] for row in content["rows"]))
    precisions = [precision for precision in PRECISIONS if select(content, threads[0], precision)[1]]
    figure, panels = plt.subplots(
        len(precisions), len(threads), figsize=(10 * len(threads), 4.5 * len(precisions)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for line, precision in zip(panels, precisions, strict=True):
        for axes, count in zip(line, threads, strict=True):
            bars(axes, *select(content, count, precision))
            axes.set_title(f"{precision}, {count} thread{'s' * (count > 1)}")
    figure.suptitle(textwrap.fill(heading(content["environment"]), 110 * len(threads)), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bars(axes: Any, rows: list[dict[str, Any]], labels: list[str]) -> None:
    width = 0.8 / max(len(labels), 1)
    for number, label in enumerate(labels):
        results = [row["contenders"].get(label) for row in rows]
        ratios = [one["ratio"] or 0 if one and not one["wrong"] else 0 for one in results]
        places = [i + (number - (len(labels) - 1) / 2) * width for i in range(len(rows))]
        name = label.rpartition(" ")[0]
        drawn = axes.bar(places, ratios, width, label=name, color=COLORS[name])
        axes.bar_label(drawn, [f"{ratio:.1f}" if ratio else "" for ratio in ratios], fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row["workload"].replace(", ", "\n", 1) for row in rows], fontsize=7)
    axes.set_ylabel("times as fast as eager in float32")
    axes.legend(fontsize=8)


if __name__ == "__main__":
    content = json.loads(Path(sys.argv[1]).read_text())
    print(markdown(content))
    draw(content, Path(sys.argv[1]).with_suffix(".png"))
