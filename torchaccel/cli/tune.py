"""``torchaccel tune``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import deliver, interruptible, progress_bar, results_console, streams, usage_errors
from .parameters import Device, Dtype, JsonOut, Model, Quiet

if TYPE_CHECKING:
    from ..tuning.tuner import Summary

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
    shared_prompt: Annotated[
        bool, typer.Option("--shared-prompt", help="Also for rows that continue one prompt, stored once.")
    ] = False,
    cache: CachePath = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    json_out: JsonOut = None,
) -> None:
    """Measure the kernels a model needs on this machine; results are kept at once, and a second run goes on."""
    from ..evaluation.timing import LoadWatch, require_quiet
    from ..evaluation.variants import parse_options
    from .records import records_table

    with streams(json_out) as (stdout, console), usage_errors(console):
        sizes, seconds, given = read_shapes(shapes), read_seconds(budget), dict(parse_options(options))
        if cache is not None:
            given["cache"] = str(cache)
        if quiet:
            require_quiet()
        watch = LoadWatch()
        with (
            interruptible(console, "what was measured is kept; the same command goes on"),
            progress_bar(console) as bar,
            watch.watching(),
        ):
            path, summary = _run(model, sizes, effort, seconds, given, shared_prompt, device, dtype, bar)
        load = watch.result()
        if json_out != "-":
            out = results_console(stdout)
            if summary.records:
                out.print(records_table(summary.records))
            for line in _lines(path, summary, busy=load["busy"]):
                out.print(line, highlight=False)
        found = {name: value for name, value in vars(summary).items() if name != "records"}
        results = [record.to_dict() for record in summary.records]
        deliver({"cache": str(path), **found, **load, "results": results}, json_out, stdout)


def _lines(path: Path, summary: Summary, *, busy: bool) -> list[str]:
    """What was done, where it is kept, and what may be wrong with it."""
    found = [
        f"{summary.measured} measured, {summary.failed} failed, {summary.known} known before, {summary.left} left, "
        f"in {summary.seconds:.0f} s"
    ]
    if summary.stored:
        found.append(f"kept in {path}, where every compilation on this machine looks")
    else:
        found.append(f"{path} could not be written: these results are lost")
    if summary.left:
        found.append("the budget was spent: the same command goes on with what is left")
    if busy and summary.measured:
        found.append(
            "other processes used the machine meanwhile: choices between one thread and several may be wrong; "
            "torchaccel cache prune --older-than 0 forgets them"
        )
    return found


def _run(
    name: str,
    sizes: list[tuple[int, int]],
    effort: str,
    budget: float | None,
    options: dict[str, Any],
    shared_prompt: bool,
    device: str,
    dtype: str,
    progress: Any,
) -> tuple[Path, Summary]:
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
        tasks += capture_tasks(loaded.model, ids, options, shared_prompt=shared_prompt)
    if not tasks:
        raise TuningError(f"no kernel of torchaccel's was found in {name} for these options; see torchaccel.explain")
    cache = TuningCache(resolve(options).cache or default_path())
    tuner = Tuner(cache, loaded.model.device, effort=effort, budget=budget)  # type: ignore[arg-type]
    return cache.path, tuner.run(tasks, progress)


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
