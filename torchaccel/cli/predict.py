"""``torchaccel predict``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .console import deliver, results_console, streams, usage_errors
from .parameters import Batch, JsonOut, Model

if TYPE_CHECKING:
    from ..cost.predict import Cost, Prediction


def predict(
    model: Model = "llama-110m",
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, and then of the cache.")] = 32768,
    batch: Batch = 1,
    options: Annotated[
        str, typer.Option(help='torchaccel options as JSON, \'{"kv_compression": "int8"}\'; {} is the exact model.')
    ] = "{}",
    device: Annotated[
        str, typer.Option(help="h200, a100, mi300x, avx512 and others; cpu and cuda are measured here.")
    ] = "cpu",
    json_out: JsonOut = None,
) -> None:
    """What options should do to time and memory on a device that need not be present; runs no model."""
    from ..evaluation.models import load_model
    from ..evaluation.variants import parse_options
    from ..prediction import predict as predict_

    with streams(json_out) as (stdout, console):
        with usage_errors(console):
            asked = parse_options(options)
            found = predict_(load_model(model).model, {"batch": batch, "context": context}, asked, device)
        if json_out != "-":
            out = results_console(stdout)
            out.print(_table(found, model, asked))
            for note in found.notes:
                out.print(note, highlight=False)
        deliver({"model": model, "options": asked, **found.to_dict()}, json_out, stdout)


def _table(found: Prediction, model: str, options: dict[str, Any]) -> Table:
    title = f"{model} on {found.device.name}: batch {found.batch}, {found.context} tokens"
    table = Table(title=title)
    for column in ("", "exact", json.dumps(options), "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for name, label in _ROWS:
        exact, asked = (_value(cost, name) for cost in (found.exact, found.asked))
        ratio = f"{exact / asked:.2f}x" if asked else ""
        digits = ".1f" if name == "kv_bytes" else ".3f"
        style = "bold" if name in ("decode_ms", "prefill_ms", "kv_bytes") else None
        table.add_row(label, f"{exact:{digits}}", f"{asked:{digits}}", ratio, style=style)
    return table


def _value(cost: Cost, name: str) -> float:
    value: float = getattr(cost, name)
    return value / 1e6 if name == "kv_bytes" else value


_ROWS = (
    ("decode_ms", "one token, ms"),
    ("decode_weights_ms", "  weights"),
    ("decode_attention_ms", "  attention"),
    ("decode_overhead_ms", "  overhead"),
    ("prefill_ms", "prompt, ms"),
    ("prefill_weights_ms", "  weights"),
    ("prefill_attention_ms", "  attention"),
    ("prefill_overhead_ms", "  overhead"),
    ("kv_bytes", "KV cache, MB"),
)
