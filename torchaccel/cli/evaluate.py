"""``torchaccel evaluate``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .console import deliver, interruptible, progress_bar, show, streams, usage_errors
from .parameters import Device, Dtype, HtmlOut, JsonOut, Options
from .report import deliver_html, prepare_html


def evaluate(
    model: Annotated[str, typer.Option(help="demo, minilm, or a folder in the Hugging Face format.")] = "demo",
    text: Annotated[
        Path | None, typer.Option(exists=True, help="A text file or a folder of them; default: an excerpt of a novel.")
    ] = None,
    options: Options = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Of perplexity, agreement, recall, ruler, sensitivity, or similarity for encoders; comma-separated "
            "[perplexity,agreement,recall]."
        ),
    ] = "",
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window of text.")] = 1024,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a window that are read at once, the prompt.")] = 256,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text at most.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Windows read together.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate for prefix and timing.")] = 32,
    lengths: Annotated[str, typer.Option(help="Prompt lengths of recall and ruler, by commas.")] = "256,512,1024",
    questions: Annotated[int, typer.Option(min=1, help="Retrieval questions per task, length and depth.")] = 4,
    json_out: JsonOut = None,
    html: HtmlOut = None,
    journal: Annotated[
        Path | None,
        typer.Option(help="Keeps finished pieces until the end, for a repetition to go on [FILE.partial]."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """What options cost in fidelity, beside what they gain: everything compared with the float32 eager model."""
    from ..evaluation.bench import resolve_device, resolve_dtype
    from ..evaluation.evaluate import run_evaluate
    from ..evaluation.evaluation import evaluation_variants, open_evaluation
    from ..evaluation.machine import measure_machine
    from ..evaluation.models import load_model
    from ..evaluation.prompts import excerpt
    from ..evaluation.results import exit_code
    from ..evaluation.tables import evaluation_table
    from ..evaluation.tasks.run import EvaluateCase
    from ..evaluation.texts import read_texts
    from ..evaluation.variants import parse_options

    if journal is None and json_out not in (None, "-"):
        journal = Path(f"{json_out}.partial")
    with streams(json_out) as (stdout, console):
        save = partial(deliver, json_out=json_out, stdout=stdout)
        with usage_errors(console):
            prepare_html(html)
            case = EvaluateCase(
                tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
                window=window,
                prompt=prompt,
                windows=windows,
                batch=batch,
                new_tokens=new_tokens,
                lengths=_numbers(lengths),
                questions=questions,
                text="excerpt" if text is None else str(text),
            )
            variants = evaluation_variants([parse_options(item) for item in options or ["{}"]])
            texts = [excerpt()] if text is None else read_texts(text)
            where = resolve_device(device)
            loaded = load_model(model, dtype=resolve_dtype(dtype), device=str(where))
            kept = f"{journal} keeps what is finished, the same command goes on" if journal else ""
            with interruptible(console, kept), progress_bar(console) as progress:
                session = open_evaluation(loaded, case, measure_machine(where), progress)
                command = ["torchaccel", *sys.argv[1:]]
                found = run_evaluate(case, texts, variants, session, command, journal, save)
        if json_out != "-":
            show(found, evaluation_table(found), stdout)
        deliver_html([found], html)
    raise typer.Exit(exit_code(found["results"]))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--lengths {text!r} must be whole numbers with commas between them") from error
