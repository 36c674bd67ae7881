"""Command line parameters that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="llama-110m (random weights), demo, or a folder in the Hugging Face format.")]
Context = Annotated[int, typer.Option(min=1, help="Tokens in the cache (decode) or in the prompt.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows of the batch.")]
Baselines = Annotated[
    str,
    typer.Option(
        help="Comma-separated: eager, inductor, static, flex, hf_quantized[:quanto|hqq|fp8], kvpress:<press>[:ratio]."
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option(help='One more variant: torchaccel options as JSON, \'{"kv_compression": "int8"}\'; repeatable.'),
]
JsonOut = Annotated[str | None, typer.Option("--json", help="Write the results document to this file, - for stdout.")]
HtmlOut = Annotated[
    Path | None, typer.Option("--html", dir_okay=False, help="Write a report, one HTML page, to this file.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Warmup = Annotated[int, typer.Option(min=0, help="Untimed calls of each variant after the first.")]
Cold = Annotated[bool, typer.Option("--cold/--warm", help="Compile into an empty cache folder, or the usual one.")]
Quiet = Annotated[
    bool, typer.Option("--require-quiet", help="Refuse to measure while other processes use the machine.")
]
Fidelity = Annotated[bool, typer.Option(help="Compare logits with the float32 eager model.")]
