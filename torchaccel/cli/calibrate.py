"""``torchaccel calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import interruptible, progress_bar, streams, usage_errors
from .parameters import Device, Dtype


def calibrate(
    method: Annotated[str, typer.Option(help="A method whose calibration is optional or required.")],
    out: Annotated[Path, typer.Option("--out", "-o", dir_okay=False, help="Write the plan to this file.")],
    model: Annotated[str, typer.Option(help="demo, llama-110m, or a folder in the Hugging Face format.")] = "demo",
    text: Annotated[
        Path | None, typer.Option(exists=True, help="A text file or a folder of them; default: an excerpt of a novel.")
    ] = None,
    options: Annotated[str, typer.Option(help="The method's options as JSON, '{\"key_density\": 0.25}'.")] = "{}",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of text at most.")] = 65_536,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window of text.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Windows read together.")] = 4,
    seed: Annotated[int, typer.Option(help="Of whatever is random.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Make the plan that a method needs from a model and text, once for all deployments of the model."""
    from ..calibration.calibrate import calibrate as make
    from ..calibration.calibrate import calibrated_method
    from ..evaluation.bench import resolve_device, resolve_dtype
    from ..evaluation.models import load_model
    from ..evaluation.prompts import excerpt
    from ..evaluation.texts import cut_windows, read_texts
    from ..evaluation.variants import parse_options

    with streams(None) as (stdout, console), usage_errors(console), interruptible(console, "no plan was written"):
        calibrated_method(method)  # before a model is loaded
        given = parse_options(options)
        loaded = load_model(model, dtype=resolve_dtype(dtype), device=str(resolve_device(device)))
        if loaded.tokenizer is None:
            raise ValueError(
                f"model {model!r} has no tokenizer, so text says nothing to it; give a model folder with one"
            )
        texts = [excerpt()] if text is None else read_texts(text)
        windows = cut_windows(texts, loaded.tokenizer, window, max(1, tokens // window))
        batches = [rows.to(loaded.model.device) for rows in windows.split(batch)]
        with progress_bar(console) as progress:
            progress.begin(len(batches))
            plan = make(
                loaded.model,
                method,
                batches,
                given,
                seed=seed,
                progress=lambda done, steps: progress.advance(f"calibrating {method}"),
            )
        plan.save(out)
        size = out.stat().st_size / 2**20
        print(
            f"{out}: {len(plan.tensors)} tensors, {size:.1f} MiB, from {windows.numel()} tokens "
            f"(sha256 {plan.digest[:16]})",
            file=stdout,
        )
