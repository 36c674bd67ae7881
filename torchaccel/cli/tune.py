"""``torchaccel tune``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .console import deliver, interruptible, progress_bar, results_console, streams, usage_errors
from .parameters import Device, Dtype, JsonOut, Model

Shapes = Annotated[str, typer.Option(help="Prompts as batch x tokens, with commas between them: 1x32768,8x4096.")]
CachePath = Annotated[
    Path | None, typer.Option("--cache", dir_okay=False, help="The file of results; default: torchaccel cache show.")
]
OptionsJson = Annotated[str, typer.Option("--options", help="torchaccel options as JSON.")]
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def tune(
    model: Model = "llama-110m",
    shapes: Shapes = "1x4096",
    effort: Annotated[str, typer.Option(help="quick (the likeliest candidates) or full (all).")] = "quick",
    budget: Annotated[str, typer.Option(help="Time after which nothing new is begun: 120s, 10min, none.")] = "120s",
    options: OptionsJson = "{}",
    cache: CachePath = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_out: JsonOut = None,
) -> None:
    """Measure the kernels a model needs on this machine; results are kept at once, and a second run goes on."""
    from ..evaluation.variants import parse_options

    with streams(json_out) as (stdout, console), usage_errors(console):
        sizes, seconds, given = read_shapes(shapes), read_seconds(budget), dict(parse_options(options))
        if cache is not None:
            given["cache"] = str(cache)
        with (
            interruptible(console, "what was measured is kept; the same command goes on"),
            progress_bar(console) as bar,
        ):
            found = _run(model, sizes, effort, seconds, given, device, dtype, bar)
        if json_out != "-":
            out = results_console(stdout)
            out.print(_table(found["results"]))
            out.print(
                f"{found['measured']} measured, {found['failed']} failed, {found['known']} known before, "
                f"{found['left']} left for another run; {found['seconds']:.0f} s",
                highlight=False,
            )
        deliver(found, json_out, stdout)


def _run(
    name: str,
    sizes: list[tuple[int, int]],
    effort: str,
    budget: float | None,
    options: dict[str, Any],
    device: str,
    dtype: str,
    progress: Any,
) -> dict[str, Any]:
    import torch

    from ..capture import capture_tasks
    from ..errors import TuningError
    from ..evaluation.bench import resolve_device, resolve_dtype
    from ..evaluation.models import load_model
    from ..options import resolve
    from ..tuning.cache import TuningCache, default_path
    from ..tuning.tuner import Tuner

    loaded = load_model(name, dtype=resolve_dtype(dtype), device=str(resolve_device(device)))
    tasks = []
    for batch, tokens in sizes:
        ids = torch.zeros(batch, tokens, dtype=torch.int64, device=loaded.model.device)
        tasks += capture_tasks(loaded.model, ids, options)
    if not tasks:
        raise TuningError(f"no kernel of torchaccel's was found in {name} for these options; see torchaccel.explain")
    cache = TuningCache(resolve(options).cache or default_path())
    tuner = Tuner(cache, loaded.model.device, effort=effort, budget=budget)  # type: ignore[arg-type]
    summary = tuner.run(tasks, progress)
    return {
        "cache": str(cache.path),
        "measured": summary.measured,
        "failed": summary.failed,
        "known": summary.known,
        "left": summary.left,
        "stored": summary.stored,
        "seconds": summary.seconds,
        "results": [record.to_dict() for record in summary.records],
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("kernel", "shape", "candidate", "ms", "result")
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if "timing" in row:
            key = row["key"]["spec"], row["key"]["bucket"]
            best[key] = min(best.get(key, float("inf")), row["timing"]["median_ms"])
    for row in sorted(rows, key=lambda row: (row["key"]["kernel"], row["key"]["spec"], row["key"]["bucket"])):
        kernel, shape = row["key"]["kernel"], row["key"]["bucket"].replace(",", " ")
        if "timing" in row:
            ms = row["timing"]["median_ms"]
            fastest = "fastest" if ms == best[row["key"]["spec"], row["key"]["bucket"]] else ""
            table.add_row(kernel, shape, row["candidate"], f"{ms:.3f}", fastest)
        else:
            failure = row["failure"]
            table.add_row(kernel, shape, row["candidate"], "", f"{failure['kind']}: {failure['message'][:80]}")
    return table


def read_shapes(text: str) -> list[tuple[int, int]]:
    """(batch, tokens) of each part of "1x32768,8x4096"; ``ValueError`` for anything else."""
    parts = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part.strip()) for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"shapes are batch x tokens, such as 1x32768,8x4096; found {text!r}")
    return [(int(part[1]), int(part[2])) for part in parts if part is not None]


def read_seconds(text: str) -> float | None:
    """Seconds of "120", "120s", "10min" or "1h", None for "none"; ``ValueError`` for anything else."""
    if text.strip() == "none":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip())
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"a budget is a time such as 120s, 10min or none; found {text!r}")
    return float(found[1]) * _UNITS[found[2]]
