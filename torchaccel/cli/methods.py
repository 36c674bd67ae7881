"""``torchaccel methods``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .console import refuse


def methods(
    family: Annotated[str | None, typer.Option(help="Only the methods of this family.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """The methods there are, and what each needs."""
    from ..methods import FAMILIES, list_methods

    if family is not None and family not in FAMILIES:
        refuse(Console(stderr=True), f"unknown family {family!r}; the families are {', '.join(FAMILIES)}")
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
