"""The ``torchaccel`` command: demo, bench, methods, info."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A torch.compile backend for long-context transformers: demonstration, benchmarks, methods.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure torchaccel against other ways of running the same model.")
app.add_typer(bench, name="bench")

Model = Annotated[str, typer.Option(help="llama-110m (random weights), demo, or a folder in the Hugging Face format.")]
Context = Annotated[int, typer.Option(min=1, help="Tokens in the cache (decode) or in the prompt.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows of the batch.")]
Baselines = Annotated[str, typer.Option(help="Comma-separated: eager, inductor, static.")]
Options = Annotated[
    list[str] | None,
    typer.Option(help='One more variant: torchaccel options as JSON, \'{"kv_compression": "int8"}\'; repeatable.'),
]
JsonOut = Annotated[str | None, typer.Option("--json", help="Write the results document to this file, - for stdout.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Warmup = Annotated[int, typer.Option(min=0, help="Untimed calls of each variant after the first.")]
Cold = Annotated[bool, typer.Option("--cold/--warm", help="Compile into an empty cache folder, or the usual one.")]
Fidelity = Annotated[bool, typer.Option(help="Compare logits with the float32 eager model.")]


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


@app.command()
def demo(
    context: Context = 768,
    new_tokens: Annotated[int, typer.Option(min=5, help="Tokens to generate.")] = 48,
    calls: Annotated[int, typer.Option(min=1, help="Timed generate() calls of each variant.")] = 3,
    recall: Annotated[int, typer.Option(min=0, help="Recall questions per task.")] = 10,
    json_out: JsonOut = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    cold: Cold = False,
) -> None:
    """The embedded model answers a question in eager, Inductor and torchaccel, exact and lossy; takes minutes."""
    from .evaluation.bench import Setup
    from .evaluation.demo import answer_text, run_demo
    from .evaluation.session import Case
    from .evaluation.tables import notes

    with _streams(json_out) as (stdout, console), _usage_errors(console), _progress(console) as progress:
        case = Case("generate", context, 1, new_tokens, rounds=calls, warmup=1, recall_questions=recall)
        found = run_demo(case, Setup("demo", device, dtype, cold), ["torchaccel", *sys.argv[1:]], progress)
    out = Console() if json_out != "-" else console
    out.print(f"\nThe prompt: {context} tokens, ending in “…{found.prompt_tail}”", highlight=False)
    out.print(f"Eager answers “{answer_text(found)}”; {found.question.answer} is right.\n", highlight=False)
    out.print(found.table())
    for line in (found.legend(), *notes(found.document)):
        out.print(line, highlight=False)
    _deliver(found.document, json_out, stdout)


@app.command()
def methods(
    family: Annotated[str | None, typer.Option(help="Only the methods of this family.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """The methods there are, and what each needs."""
    from .methods import FAMILIES, list_methods

    if family is not None and family not in FAMILIES:
        _refuse(Console(stderr=True), f"unknown family {family!r}; the families are {', '.join(FAMILIES)}")
    found = list_methods(family)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table()
    for name in ("family", "method", "fidelity", "phases", "calibration", "paper"):
        table.add_column(name)
    for row in found:
        phases = ", ".join(row["phases"])
        table.add_row(row["family"], row["method"], row["fidelity"], phases, row["calibration"], row["paper"])
    Console().print(table)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False) -> None:
    """Versions and devices, as a bug report needs them; measures nothing."""
    import torch

    from .evaluation.machine import core_count, device_name, versions

    facts: dict[str, Any] = {name: version for name, version in versions().items()}
    facts |= {"cpu": device_name(torch.device("cpu")), "cores": core_count(), "threads": torch.get_num_threads()}
    facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    facts["cuda"] = device_name(torch.device("cuda")) if torch.cuda.is_available() else None
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, "not found" if value is None else str(value))
    Console().print(table)


def _bench(
    kind: str,
    case: dict[str, Any],
    setup: dict[str, Any],
    baselines: str,
    options: list[str] | None,
    json_out: str | None,
) -> None:
    from .evaluation.bench import Setup, default_variants, run_bench
    from .evaluation.results import exit_code
    from .evaluation.session import Case
    from .evaluation.tables import notes, results_table
    from .evaluation.variants import parse_baselines, parse_options

    with _streams(json_out) as (stdout, console):
        with _usage_errors(console):
            extra = [parse_options(text) for text in options or []]
            variants = [*parse_baselines(baselines), *default_variants(kind, extra)]
            with _progress(console) as progress:
                found = run_bench(Case(kind, **case), variants, Setup(**setup), ["torchaccel", *sys.argv[1:]], progress)
        if json_out != "-":
            out = Console(file=stdout)
            out.print(results_table(found))
            for line in notes(found):
                out.print(line, highlight=False)
        _deliver(found, json_out, stdout)
    raise typer.Exit(exit_code(found["results"]))


def _deliver(found: dict[str, Any], json_out: str | None, stdout: TextIO) -> None:
    if json_out is None:
        return
    text = json.dumps(found, indent=2) + "\n"
    if json_out == "-":
        stdout.write(text)
        stdout.flush()
    else:
        Path(json_out).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _streams(json_out: str | None) -> Iterator[tuple[TextIO, Console]]:
    """The stream results go to, and a console on stderr for everything else.

    With ``--json -`` whatever anyone else prints on stdout, native code included, goes to stderr, so that stdout holds
    one document.
    """
    console = Console(stderr=True)
    if json_out != "-":
        yield sys.stdout, console
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(saved), "w", encoding="utf-8") as stdout:
            yield stdout, console
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def _usage_errors(console: Console) -> Iterator[None]:
    """Turn errors about what the user asked for into a line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        _refuse(console, str(error))


def _refuse(console: Console, message: str) -> None:
    console.print(f"[red]error:[/red] {message}", highlight=False)
    raise typer.Exit(2)


class _Bar:
    """Progress of a run on a terminal, or one line per change of what is being done where there is none."""

    def __init__(self, bar: ProgressBar, console: Console) -> None:
        self._bar = bar
        self._console = console
        self._task = bar.add_task("loading the model, measuring the machine", total=None)
        self._doing = ""

    def begin(self, steps: int) -> None:
        """The run has ``steps`` steps."""
        self._bar.update(self._task, total=steps, completed=0)

    def advance(self, doing: str) -> None:
        """One step is done; ``doing`` names the next."""
        self._bar.update(self._task, description=doing, advance=1)
        if doing != self._doing and not self._console.is_terminal:
            self._console.print(doing, highlight=False)
        self._doing = doing


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[_Bar]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield _Bar(bar, console)
