"""``torchaccel bench``: decode, prefill, generate, attention."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import deliver, interruptible, progress_bar, show, streams, usage_errors
from .parameters import (
    Baselines,
    Batch,
    Cold,
    Context,
    Device,
    Dtype,
    Fidelity,
    HtmlOut,
    JsonOut,
    Model,
    Options,
    Quiet,
    Warmup,
)
from .report import deliver_html, prepare_html

bench = typer.Typer(no_args_is_help=True, help="Measure torchaccel against other ways of running the same model.")


@bench.command()
def decode(
    model: Model = "llama-110m",
    context: Context = 32768,
    batch: Batch = 1,
    baselines: Baselines = "eager,inductor",
    options: Options = None,
    json_out: JsonOut = None,
    html: HtmlOut = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed turns of each variant, of four steps.")] = 20,
    warmup: Warmup = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cold: Cold = True,
    quiet: Quiet = False,
    fidelity: Fidelity = True,
) -> None:
    """One new token at a time after a long cache of random content; the time is per token."""
    case = {"context": context, "batch": batch, "rounds": steps, "warmup": warmup, "fidelity": fidelity}
    setup = {"model": model, "device": device, "dtype": dtype, "cold": cold, "require_quiet": quiet}
    _bench("decode", case, setup, baselines, options, json_out, html)


@bench.command()
def prefill(
    model: Model = "llama-110m",
    context: Context = 8192,
    batch: Batch = 1,
    baselines: Baselines = "eager,inductor",
    options: Options = None,
    json_out: JsonOut = None,
    html: HtmlOut = None,
    prompts: Annotated[int, typer.Option(min=1, help="Timed prompts of each variant.")] = 5,
    warmup: Warmup = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cold: Cold = True,
    quiet: Quiet = False,
    fidelity: Fidelity = True,
) -> None:
    """A whole prompt at once, logits of its last token; the time is per prompt."""
    case = {"context": context, "batch": batch, "rounds": prompts, "warmup": warmup, "fidelity": fidelity}
    setup = {"model": model, "device": device, "dtype": dtype, "cold": cold, "require_quiet": quiet}
    _bench("prefill", case, setup, baselines, options, json_out, html)


@bench.command()
def generate(
    model: Model = "demo",
    context: Context = 1024,
    batch: Batch = 1,
    baselines: Baselines = "eager,inductor",
    options: Options = None,
    json_out: JsonOut = None,
    html: HtmlOut = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    calls: Annotated[int, typer.Option(min=1, help="Timed generate() calls of each variant.")] = 5,
    warmup: Warmup = 1,
    recall: Annotated[int, typer.Option(min=0, help="Recall questions per task (models with a tokenizer).")] = 20,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cold: Cold = True,
    quiet: Quiet = False,
) -> None:
    """model.generate() on a real prompt: time to the first token, and per token after it."""
    case = {"context": context, "batch": batch, "rounds": calls, "warmup": warmup}
    case |= {"new_tokens": new_tokens, "recall_questions": recall}
    setup = {"model": model, "device": device, "dtype": dtype, "cold": cold, "require_quiet": quiet}
    _bench("generate", case, setup, baselines, options, json_out, html)


@bench.command()
def attention(
    model: Model = "llama-110m",
    context: Context = 32768,
    batch: Batch = 1,
    phase: Annotated[str, typer.Option(help="decode (one new token over a cache) or prefill (a prompt).")] = "decode",
    baselines: Annotated[str, typer.Option(help="Comma-separated: sdpa, flex.")] = "sdpa,flex",
    options: Options = None,
    json_out: JsonOut = None,
    html: HtmlOut = None,
    calls: Annotated[int, typer.Option(min=1, help="Timed calls of each variant.")] = 30,
    warmup: Warmup = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cold: Cold = True,
    quiet: Quiet = False,
    suite: Annotated[
        str | None, typer.Option(help="cpu or gpu: every kind of attention on fixed sizes, each with its goal.")
    ] = None,
) -> None:
    """The attention operator of one layer alone, with cold caches; the time is per call."""
    if suite is not None:
        _suite(suite, baselines, quiet, json_out, html)
    case = {"context": context, "batch": batch, "rounds": calls, "warmup": warmup, "phase": phase}
    setup = {"model": model, "device": device, "dtype": dtype, "cold": cold, "require_quiet": quiet}
    _bench("attention", case, setup, baselines, options, json_out, html)


def _suite(name: str, baselines: str, quiet: bool, json_out: str | None, html: Path | None) -> None:
    from ..evaluation.results import exit_code
    from ..evaluation.suites.run import run_suite
    from ..evaluation.suites.table import suite_table

    with streams(json_out) as (stdout, console):
        with usage_errors(console):
            prepare_html(html)
            wanted = [part.strip() for part in baselines.split(",") if part.strip()]
            with interruptible(console, ""), progress_bar(console) as progress:
                found = run_suite(name, ["torchaccel", *sys.argv[1:]], progress, baselines=wanted, quiet=quiet)
        if json_out != "-":
            show(found, suite_table(found), stdout)
        deliver(found, json_out, stdout)
        deliver_html([found], html)
    raise typer.Exit(exit_code(found["results"]))


def _bench(
    kind: str,
    case: dict[str, Any],
    setup: dict[str, Any],
    baselines: str,
    options: list[str] | None,
    json_out: str | None,
    html: Path | None,
) -> None:
    from ..evaluation.bench import Setup, default_variants, run_bench
    from ..evaluation.case import Case
    from ..evaluation.results import exit_code, write_document
    from ..evaluation.runners import parse_baselines
    from ..evaluation.tables import results_table
    from ..evaluation.variants import parse_options

    path = None if json_out in (None, "-") else Path(str(json_out))
    save = None if path is None else lambda found: write_document(found, path)
    command = ["torchaccel", *sys.argv[1:]]
    with streams(json_out) as (stdout, console):
        with usage_errors(console):
            prepare_html(html)
            asked = Case(kind, **case)
            extra = [parse_options(text) for text in options or []]
            variants = [*parse_baselines(baselines, kind), *default_variants(asked, extra)]
            kept = f"{path} holds the variants that were finished" if path else ""
            with interruptible(console, kept), progress_bar(console) as progress:
                found = run_bench(asked, variants, Setup(**setup), command, progress, save)
        if json_out != "-":
            show(found, results_table(found), stdout)
        deliver(found, json_out, stdout)
        deliver_html([found], html)
    raise typer.Exit(exit_code(found["results"]))
