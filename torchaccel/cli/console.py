"""Streams, progress and errors of the commands: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table


def deliver(found: dict[str, Any], json_out: str | None, stdout: TextIO) -> None:
    """Write a document to where ``--json`` says, if anywhere."""
    from ..evaluation.results import write_document

    if json_out == "-":
        stdout.write(json.dumps(found, indent=2) + "\n")
        stdout.flush()
    elif json_out is not None:
        write_document(found, Path(json_out))


@contextlib.contextmanager
def streams(json_out: str | None) -> Iterator[tuple[TextIO, Console]]:
    """The stream results go to, and a console on stderr for everything else.

    With ``--json -`` whatever anyone else prints on stdout, native code included, goes to stderr, so that stdout holds
    one document.
    """
    console = Console(stderr=True, emoji=False)
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


def results_console(stdout: TextIO) -> Console:
    """A console for tables on ``stdout``: as wide as the terminal, or wide enough for any table where there is none."""
    return Console(file=stdout, width=None if stdout.isatty() else 160, emoji=False)


def show(found: dict[str, Any], table: Table, stdout: TextIO) -> None:
    """Print a document's table and what the table cannot say."""
    from ..evaluation.tables import notes

    out = results_console(stdout)
    out.print(table)
    for line in notes(found):
        out.print(line, highlight=False)


@contextlib.contextmanager
def interruptible(console: Console, kept: str) -> Iterator[None]:
    """Turn Ctrl-C into exit code 130 and a line that says what was ``kept``."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"interrupted{kept and f'; {kept}'}", highlight=False)
        raise typer.Exit(130) from None


@contextlib.contextmanager
def usage_errors(console: Console) -> Iterator[None]:
    """Turn errors about what the user asked for into a line on stderr and exit code 2."""
    try:
        yield
    except typer.Exit:  # a RuntimeError too
        raise
    except (ValueError, RuntimeError, OSError) as error:
        refuse(console, str(error))


def refuse(console: Console, message: str) -> None:
    console.print(f"[red]error:[/red] {escape(message)}", highlight=False)
    raise typer.Exit(2)


class Bar:
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
def progress_bar(console: Console) -> Iterator[Bar]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Bar(bar, console)
