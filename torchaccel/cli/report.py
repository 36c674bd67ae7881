"""``torchaccel report``, and the report that other commands write at their end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .console import usage_errors


def report(
    documents: Annotated[list[Path], typer.Argument(metavar="DOC.json", help="Files that --json FILE wrote.")],
    html: Annotated[Path, typer.Option("--html", dir_okay=False, help="The page to write.")],
) -> None:
    """Results documents as one HTML page of tables, plots and the commands that measure again."""
    console = Console(stderr=True, emoji=False)
    with usage_errors(console):
        prepare_html(html)
        from ..evaluation.html.documents import read_documents

        found = read_documents(documents)
    deliver_html(found, html)
    console.print(f"wrote {html}", highlight=False, markup=False)


def prepare_html(path: Path | None) -> None:
    """Raise ``ValueError`` or ``RuntimeError`` for what would keep a report from being written to ``path``."""
    from ..evaluation.html.requirement import require_matplotlib

    if path is None:
        return
    require_matplotlib()
    if not path.parent.is_dir():
        raise ValueError(f"--html {path} cannot be written, there is no folder {path.parent}; make it first")


def deliver_html(found: list[dict[str, Any]], path: Path | None) -> None:
    """Write the report about the documents ``found``, if one was asked for."""
    if path is None:
        return
    from ..evaluation.html.page import write_report

    write_report(found, path)
