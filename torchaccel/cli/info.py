"""``torchaccel info``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def info(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False) -> None:
    """Versions and devices, as a bug report needs them; measures nothing."""
    import torch

    from ..cost.probe import core_count, device_name
    from ..evaluation.machine import versions

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
