"""Command line parameters that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

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
