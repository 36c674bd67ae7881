"""Every KV-compression method at several sizes of the cache: what it keeps of the text, and the plot of it.

    python benchmarks/kv_budgets.py --json benchmarks/results/kv-budgets-demo.json --plot docs/kv_budgets.svg

Methods that drop tokens get budgets of 0.5, 0.25 and 0.125 of the prompt; methods that shorten them are taken as they
are, and behind an eviction. Random eviction at the same budgets is the floor. The text is read 192 tokens far behind a
prompt of 832, so that most of the cache is what the method left of the prompt. An interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchaccel.passes.kv_compression import METHODS
from torchaccel.passes.kv_compression.evicting import EvictingMethod

BUDGETS = (0.5, 0.25, 0.125)
PROTOCOL = ("--tasks", "perplexity,recall", "--window", "1024", "--prompt", "832", "--lengths", "512,1024")
QUANTISERS = ("int8", "int4", "turboquant")
# Losses below it are drawn on it: a logarithmic axis has no zero.
FLOOR = 1e-4


def main() -> None:
    """Parse the arguments, evaluate unless told not to, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, minilm, or a folder in the Hugging Face format")
    parser.add_argument("--methods", default="", help="only these, by commas")
    parser.add_argument("--json", type=Path, required=True, help="the results document")
    parser.add_argument("--plot", type=Path, help="write a figure, its suffix names the format")
    parser.add_argument("--plot-only", action="store_true", help="read the document instead of evaluating")
    arguments = parser.parse_args()
    if not arguments.plot_only:
        chosen = [one for one in variants() if not arguments.methods or names(one) in arguments.methods.split(",")]
        given = [part for one in chosen for part in ("--options", json.dumps({"kv_compression": one}))]
        command = [str(Path(sys.executable).with_name("torchaccel")), "evaluate", "--model", arguments.model, *PROTOCOL]
        status = subprocess.run([*command, "--options", "{}", *given, "--json", str(arguments.json)]).returncode
        if status:
            raise SystemExit(status)
    if arguments.plot:
        draw(json.loads(arguments.json.read_text(encoding="utf-8")), arguments.plot)


def variants() -> Iterator[Any]:
    """What is asked of ``kv_compression``, one after another."""
    for method in METHODS:
        if issubclass(method, EvictingMethod):
            yield from ({"method": method.name, "ratio": budget} for budget in BUDGETS)
        elif method.calibration != "required":
            yield {"method": method.name}
    yield from ({"method": "random", "ratio": budget, "decoding": True} for budget in BUDGETS)
    yield from ({"method": "turboquant", "key_bits": bits, "value_bits": 2} for bits in (4, 2))
    for share in BUDGETS[:2]:
        yield from ([{"method": "snapkv", "ratio": share}, {"method": name}] for name in QUANTISERS)


def names(asked: Any) -> str:
    """The methods of a variant, joined by "+"."""
    return "+".join(one["method"] for one in (asked if isinstance(asked, list) else [asked]))


def draw(document: dict[str, Any], path: Path) -> None:
    """Allocated bytes over those of exact against perplexity over float32, and against recall."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in document["results"] if row["status"] == "ok" and row["kv_bytes"]]
    exact = next(row for row in rows if not row["options"].get("kv_compression"))
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        asked = row["options"].get("kv_compression")
        label = "exact" if not asked else names(asked)
        if label == "random" and asked.get("decoding"):
            label = "random, decoding"
        recall = list(row["fidelity"]["recall"].values())
        lost = row["fidelity"]["perplexity_ratio"] - 1
        point = (row["kv_bytes"] / exact["kv_bytes"], max(lost, FLOOR), sum(recall) / len(recall))
        lines.setdefault(label, []).append(point)
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


if __name__ == "__main__":
    main()
