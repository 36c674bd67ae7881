"""The figure and the table of ``kv_budgets.py``, from its results document."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

# Losses below it are drawn on it: a logarithmic axis has no zero.
FLOOR = 1e-4
BEGIN, END = "<!-- table of benchmarks/kv_budgets.py -->", "<!-- end of the table -->"
HEAD = (
    "| method | KV bytes | perplexity | 95 % | KL | top 1 | recall |",
    "|---|---|---|---|---|---|---|",
)


def name_of(row: dict[str, Any]) -> str:
    """What a result's methods are called, joined by "+"."""
    asked = row["options"].get("kv_compression")
    if not asked:
        return "exact"
    name = "+".join(one["method"] for one in (asked if isinstance(asked, list) else [asked]))
    return "random, decoding" if name == "random" and asked.get("decoding") else name


def setting_of(row: dict[str, Any]) -> str:
    """The options of a result's methods that tell it from others of the name."""
    asked = row["options"].get("kv_compression") or []
    told = [
        f"{key} {value}"
        for one in (asked if isinstance(asked, list) else [asked])
        for key, value in one.items()
        if key in ("tokens", "ratio", "key_bits", "value_bits", "key_density")
    ]
    return ", ".join(told).replace("_", " ")


def recall_of(row: dict[str, Any]) -> float:
    """The mean over the tasks."""
    return mean(row["fidelity"]["recall"].values())


def measured(document: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The exact result, and all that have a compressed cache."""
    rows = [row for row in document["results"] if row["status"] == "ok" and row["variant"] != "eager"]
    exact = next(row for row in rows if name_of(row) == "exact")
    return exact, [row for row in rows if row is not exact]


def tabulate(document: dict[str, Any], path: Path) -> None:
    """Put the table between the marks in the Markdown file at ``path``."""
    exact, rows = measured(document)
    lines = [line_of(row, exact) for row in (exact, *rows)]
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text("\n".join((before + BEGIN, "", *HEAD, *lines, "", END + after)), encoding="utf-8")


def line_of(row: dict[str, Any], exact: dict[str, Any]) -> str:
    """A row of the table."""
    fidelity = row["fidelity"]
    low, high = fidelity["perplexity_ratio_ci95"]
    setting = setting_of(row)
    name = f"`{name_of(row)}`" + (f" {setting}" if setting else "")
    share = row["kv_bytes"] / exact["kv_bytes"]
    told = f"{fidelity['perplexity_ratio']:.3f} | {low:.3f}-{high:.3f} | {fidelity['kl']:.3f} | {fidelity['top1']:.2f}"
    return f"| {name} | {share:.3f} | {told} | {recall_of(row):.2f} |"


def draw(document: dict[str, Any], path: Path) -> None:
    """Allocated bytes over those of exact against perplexity over float32, and against recall."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    exact, rows = measured(document)
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in (exact, *rows):
        lost = row["fidelity"]["perplexity_ratio"] - 1
        point = (row["kv_bytes"] / exact["kv_bytes"], max(lost, FLOOR), recall_of(row))
        lines.setdefault(name_of(row), []).append(point)
    # The same names in the same file, whenever it is drawn.
    pyplot.rcParams["svg.hashsalt"] = "kv_budgets"
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6), layout="constrained")
    colours = pyplot.get_cmap("tab20")
    for index, (label, points) in enumerate(lines.items()):
        points.sort()
        style: dict[str, Any] = {"marker": "osD^v"[index % 5], "color": colours(index % 20), "markersize": 5}
        if label.startswith(("random", "exact")):
            style |= {"color": "black", "linestyle": "--" if label == "random" else ":"}
        sizes = [point[0] for point in points]
        axes[0].plot(sizes, [point[1] for point in points], label=label, linewidth=1, **style)
        axes[1].plot(sizes, [point[2] for point in points], label=label, linewidth=1, **style)
    axes[0].set_yscale("log")
    axes[0].set_ylabel(f"perplexity over float32, minus one (at least {FLOOR:g})")
    axes[1].set_ylabel("facts recalled, mean of three tasks")
    for one in axes:
        one.set_xscale("log", base=2)
        one.set_xlabel("allocated KV bytes over those of exact")
        one.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small", frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
