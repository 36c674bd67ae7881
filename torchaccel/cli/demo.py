"""``torchaccel demo``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from .console import deliver, progress_bar, streams, usage_errors
from .parameters import Cold, Context, Device, Dtype, JsonOut


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
    from ..evaluation.bench import Setup
    from ..evaluation.demo import answer_text, run_demo
    from ..evaluation.session import Case
    from ..evaluation.tables import notes

    with streams(json_out) as (stdout, console), usage_errors(console), progress_bar(console) as progress:
        case = Case("generate", context, 1, new_tokens, rounds=calls, warmup=1, recall_questions=recall)
        found = run_demo(case, Setup("demo", device, dtype, cold), ["torchaccel", *sys.argv[1:]], progress)
    out = Console(emoji=False) if json_out != "-" else console
    out.print(f"\nThe prompt: {context} tokens, ending in “…{found.prompt_tail}”", highlight=False)
    out.print(f"Eager answers “{answer_text(found)}”; {found.question.answer} is right.\n", highlight=False)
    out.print(found.table())
    for line in (found.legend(), *notes(found.document)):
        out.print(line, highlight=False)
    deliver(found.document, json_out, stdout)
