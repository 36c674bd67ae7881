"""``torchaccel bundle``: create, load, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .console import interruptible, usage_errors
from .parameters import Device, Dtype, Model
from .tune import CachePath, OptionsJson, Shapes, read_shapes

bundle = typer.Typer(no_args_is_help=True, help="What a deployment was tuned and compiled to, in one file.")
BundleFile = Annotated[Path, typer.Argument(dir_okay=False, help="The bundle.")]


@bundle.command()
def create(
    target: BundleFile,
    model: Model = "llama-110m",
    shapes: Shapes = "1x512",
    options: OptionsJson = "{}",
    code: Annotated[bool, typer.Option("--code/--no-code", help="Take compiled code along.")] = True,
    cache: CachePath = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Pack the tuned results, the calibration plans that the options name and, for prompts of these shapes, everything
    a first token needs compiled."""
    from ..evaluation.variants import parse_options

    console = Console(stderr=True)
    with usage_errors(console), interruptible(console, "no bundle was written"):
        sizes, given = read_shapes(shapes), dict(parse_options(options))
        if cache is not None:
            given["cache"] = str(cache)
        _create(target, model, sizes, given, code, device, dtype)
    print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB")


def _create(
    target: Path,
    name: str,
    sizes: list[tuple[int, int]],
    options: dict[str, Any],
    with_code: bool,
    device: str,
    dtype: str,
) -> None:
    import torch

    from ..api import compile
    from ..evaluation.bench import resolve_device, resolve_dtype
    from ..evaluation.models import is_encoder, load_model
    from ..options import resolve
    from ..tuning import code
    from ..tuning.bundle import Bundle
    from ..tuning.cache import TuningCache, default_path
    from ..tuning.fingerprint import fingerprint

    model = load_model(name, dtype=resolve_dtype(dtype), device=str(resolve_device(device))).model

    @torch.no_grad()
    def run() -> None:
        compile(model, **options)
        for batch, tokens in sizes:
            # Each size gets graphs of its own, as the first prompt of a fresh process will.
            torch._dynamo.reset()
            ids = torch.arange(tokens, device=model.device).expand(batch, -1) % 100
            if is_encoder(model):
                model(ids)
            else:
                model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)

    plans = [getattr(method.options, "plan", None) for method in resolve(options).methods]
    kernels, artifacts = code.record(run) if with_code else ({}, None)
    own = fingerprint(model.device)
    Bundle(
        fingerprint=own,
        toolchain=code.toolchain() if with_code else {},
        tuned=TuningCache(resolve(options).cache or default_path()).records(own),
        calibration={plan.method: plan.to_bytes() for plan in plans if plan is not None},
        kernels=kernels,
        artifacts=artifacts,
    ).write(target)


@bundle.command()
def verify(source: BundleFile, device: Device = "auto") -> None:
    """Check every file of a bundle, and whether its code is for this machine; runs nothing of it."""
    from ..evaluation.bench import resolve_device
    from ..tuning import code
    from ..tuning.bundle import read_bundle
    from ..tuning.fingerprint import fingerprint

    with usage_errors(Console(stderr=True)):
        found = read_bundle(source)
        differences = fingerprint(resolve_device(device)).differences(found.fingerprint)
        if found.has_code and not differences:
            differences = found.toolchain_differences(code.toolchain())
    plans = f"calibration of {', '.join(found.calibration)}" if found.calibration else "no calibration"
    print(f"{source} is whole: {len(found.tuned)} tuned results, {plans}, {len(found.kernels)} files of code")
    if differences:
        print("it was made for another device or toolchain, its code is not used here:\n  " + "\n  ".join(differences))
    elif found.has_code:
        print("its code is for this machine; it runs only with options={'bundle': ..., 'trust': True}")


@bundle.command()
def load(
    source: BundleFile,
    trust: Annotated[bool, typer.Option("--trust", help="Also install its code, which can do anything.")] = False,
    cache: CachePath = None,
    device: Device = "auto",
) -> None:
    """Add a bundle's tuned results to the cache of this machine and, with --trust, its code to Inductor's."""
    from ..evaluation.bench import resolve_device
    from ..tuning.cache import TuningCache, default_path
    from ..tuning.deployment import Deployment

    with usage_errors(Console(stderr=True)):
        brought = Deployment().bring(source, trust, resolve_device(device))
        target = TuningCache(cache or default_path())
        if brought.records and not target.add(*brought.records):
            raise OSError(f"{target.path} could not be written")
    print(f"{len(brought.records)} tuned results added to {target.path}")
    print("its code was installed" if brought.refused is None else brought.refused)
