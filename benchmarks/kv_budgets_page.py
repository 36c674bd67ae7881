"""The figure and the table of ``kv_budgets.py`` and ``kv_policies.py``, from a results document."""

from __future__ import annotations

from math import nan
from pathlib import Path
from statistics import mean
from typing import Any

from torchaccel.evaluation.intervals import paired_ratio

# Losses below it are drawn on it: a logarithmic axis has no zero.
FLOOR = 1e-4
BEGIN, END = "<!-- table of benchmarks/{} -->", "<!-- end of the table of benchmarks/{} -->"
HEAD = (
    "| method | KV bytes | perplexity over exact | over random of the size | KL | top 1 | recall |",
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
        if key in ("tokens", "ratio", "key_bits", "value_bits", "key_density", "value_norm", "entropy")
    ]
    return ", ".join(told).replace("_", " ")


def recall_of(row: dict[str, Any]) -> float:
    """The mean over the tasks; not a number where nothing was asked."""
    return mean(row["fidelity"]["recall"].values()) if row["fidelity"]["recall"] else nan


def measured(document: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The exact result, and all that have a compressed cache."""
    rows = [row for row in document["results"] if row["status"] == "ok" and row["variant"] != "eager"]
    exact = next(row for row in rows if name_of(row) == "exact")
    return exact, [row for row in rows if row is not exact]


def tabulate(document: dict[str, Any], path: Path, script: str) -> None:
    """Put the table between the marks of ``script`` in the Markdown file at ``path``."""
    exact, rows = measured(document)
    lines = [line_of(row, exact, floor_of(row, rows)) for row in (exact, *rows)]
    text = path.read_text(encoding="utf-8")
    begin, end = BEGIN.format(script), END.format(script)
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    path.write_text("\n".join((before + begin, "", *HEAD, *lines, "", end + after)), encoding="utf-8")


def floor_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Random eviction of as many tokens, and at the same times."""
    asked = row["options"].get("kv_compression")
    if not isinstance(asked, dict) or "tokens" not in asked:
        return None
    same = (one for one in rows if name_of(one).startswith("random"))
    return next((one for one in same if one["options"]["kv_compression"]["tokens"] == asked["tokens"]), None)


def line_of(row: dict[str, Any], exact: dict[str, Any], floor: dict[str, Any] | None) -> str:
    """A row of the table."""
    fidelity = row["fidelity"]
    setting = setting_of(row)
    name = f"`{name_of(row)}`" + (f" {setting}" if setting else "")
    share = row["kv_bytes"] / exact["kv_bytes"]
    told = interval(fidelity["perplexity_ratio"], fidelity["perplexity_ratio_ci95"])
    over = "" if floor is None or floor is row else over_floor(row, floor)
    recall = "" if not fidelity["recall"] else f"{recall_of(row):.2f}"
    return f"| {name} | {share:.3f} | {told} | {over} | {fidelity['kl']:.3f} | {fidelity['top1']:.2f} | {recall} |"


def over_floor(row: dict[str, Any], floor: dict[str, Any]) -> str:
    """Perplexity over that of the floor, paired over windows where they are known."""
    windows = [one["details"].get("windows") for one in (row, floor)]
    if None in windows:
        return f"{row['fidelity']['perplexity_ratio'] / floor['fidelity']['perplexity_ratio']:.3f}"
    ours, theirs = (one["nll"] for one in windows)
    return interval(*paired_ratio([a - b for a, b in zip(ours, theirs, strict=True)]))


def interval(value: float, bounds: list[float] | None) -> str:
    """A value and its bounds."""
    return f"{value:.3f}" if bounds is None else f"{value:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


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
