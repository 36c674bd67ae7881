"""The ``torchaccel`` command."""

from __future__ import annotations

import typer

from .bench import bench
from .bundle import bundle
from .cache import cache
from .calibrate import calibrate
from .demo import demo
from .evaluate import evaluate
from .info import info
from .methods import methods
from .predict import predict
from .report import report
from .tune import tune

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A torch.compile backend for long-context transformers: demonstration, benchmarks, methods.",
)
app.add_typer(bench, name="bench")
app.add_typer(cache, name="cache")
app.add_typer(bundle, name="bundle")
for command in (demo, evaluate, predict, calibrate, tune, methods, report, info):
    app.command()(command)
