"""``torchaccel bench``: decode, prefill, generate."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from .console import deliver, progress_bar, streams, usage_errors
from .parameters import Baselines, Batch, Cold, Context, Device, Dtype, Fidelity, JsonOut, Model, Options, Warmup

bench = typer.Typer(no_args_is_help=True, help="Measure torchaccel against other ways of running the same model.")


@bench.command()
def decode(
    model: Model = "llama-110m",
    context: Context = 32768,
    batch: Batch = 1,
    baselines: Baselines = "eager,inductor",
    options: Options = None,
    json_out: JsonOut = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each variant.")] = 20,
    warmup: Warmup = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cold: Cold = True,
    fidelity: Fidelity = True,
) -> None:
    """One new token at a time after a long cache of random content; the time is per token."""
    case = {"context": context, "batch": batch, "rounds": steps, "warmup": warmup, "fidelity": fidelity}
    setup = {"model": model, "device": device, "dtype": dtype, "cold": cold}
    _bench("decode", case, setup, baselines, options, json_out)


@bench.command()
def prefill(
    model: Model = "llama-110m",
    context: Context = 8192,
    batch: Batch = 1,
    baselines: Baselines = "eager,inductor",
    options: Options = None,
    json_out: JsonOut = None,
    prompts: Annotated[int, typer.Option(min=1, help="Timed prompts of each variant.")] = 5,
    warmup: Warmup = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cold: Cold = True,
    fidelity: Fidelity = True,
) -> None:
    """A whole prompt at once, logits of its last token; the time is per prompt."""
    case = {"context": context, "batch": batch, "rounds": prompts, "warmup": warmup, "fidelity": fidelity}
    setup = {"model": model, "device": device, "dtype": dtype, "cold": cold}
    _bench("prefill", case, setup, baselines, options, json_out)


@bench.command()
def generate(
    model: Model = "demo",
    context: Context = 1024,
    batch: Batch = 1,
    baselines: Baselines = "eager,inductor",
    options: Options = None,
    json_out: JsonOut = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    calls: Annotated[int, typer.Option(min=1, help="Timed generate() calls of each variant.")] = 5,
    warmup: Warmup = 1,
    recall: Annotated[int, typer.Option(min=0, help="Recall questions per task (models with a tokenizer).")] = 20,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cold: Cold = True,
) -> None:
    """model.generate() on a real prompt: time to the first token, and per token after it."""
    case = {"context": context, "batch": batch, "rounds": calls, "warmup": warmup}
    case |= {"new_tokens": new_tokens, "recall_questions": recall}
    setup = {"model": model, "device": device, "dtype": dtype, "cold": cold}
    _bench("generate", case, setup, baselines, options, json_out)


def _bench(
    kind: str,
    case: dict[str, Any],
    setup: dict[str, Any],
    baselines: str,
    options: list[str] | None,
    json_out: str | None,
) -> None:
    from ..evaluation.bench import Setup, default_variants, run_bench
    from ..evaluation.results import exit_code
    from ..evaluation.session import Case
    from ..evaluation.tables import notes, results_table
    from ..evaluation.variants import parse_baselines, parse_options

    with streams(json_out) as (stdout, console):
        with usage_errors(console):
            extra = [parse_options(text) for text in options or []]
            variants = [*parse_baselines(baselines), *default_variants(kind, extra)]
            with progress_bar(console) as progress:
                found = run_bench(Case(kind, **case), variants, Setup(**setup), ["torchaccel", *sys.argv[1:]], progress)
        if json_out != "-":
            out = Console(file=stdout)
            out.print(results_table(found))
            for line in notes(found):
                out.print(line, highlight=False)
        deliver(found, json_out, stdout)
    raise typer.Exit(exit_code(found["results"]))
