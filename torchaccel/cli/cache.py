"""``torchaccel cache``: show, export, import, verify, prune."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .console import results_console, usage_errors
from .tune import CachePath

if TYPE_CHECKING:
    from ..tuning.cache import TuningCache

cache = typer.Typer(no_args_is_help=True, help="What tuning found out on this machine, and on others.")
DAY = 86400.0


@cache.command()
def show(
    path: CachePath = None, as_json: Annotated[bool, typer.Option("--json", help="Print a JSON document.")] = False
) -> None:
    """Where the cache lies, and what is in it."""
    from ..tuning import exchange
    from .records import records_table

    found = _open(path)
    records = found.records()
    if as_json:
        print(exchange.to_text(records))
        return
    out = results_console(sys.stdout)
    if records:
        out.print(records_table(records))
    out.print(f"{found.path}: {len(records)} results", highlight=False)


@cache.command("export")
def export_records(
    target: Annotated[Path, typer.Argument(dir_okay=False, help="The JSON file to write.")], path: CachePath = None
) -> None:
    """Write every result to a JSON file, for another machine or for reading."""
    from ..tuning import exchange

    with usage_errors(Console(stderr=True)):
        records = _open(path).records()
        target.write_text(exchange.to_text(records) + "\n", encoding="utf-8")
    print(f"{len(records)} results written to {target}")


@cache.command("import")
def import_records(
    source: Annotated[Path, typer.Argument(dir_okay=False, help="A file that cache export wrote.")],
    path: CachePath = None,
) -> None:
    """Add the results of an export; those of other machines are kept and not used on this one."""
    from ..tuning import exchange

    with usage_errors(Console(stderr=True)):
        records = exchange.from_text(source.read_text(encoding="utf-8"))
        found = _open(path)
        if not found.add(*records):
            raise OSError(f"{found.path} could not be written")
    print(f"{len(records)} results read into {found.path}")


@cache.command()
def verify(path: CachePath = None) -> None:
    """Check every row; the exit code is 1 when one is damaged."""
    found = _open(path)
    checked = found.check()
    for line in checked.invalid:
        print(line)
    print(f"{found.path}: {len(checked.records)} valid results, {len(checked.invalid)} damaged")
    raise typer.Exit(1 if checked.invalid else 0)


@cache.command()
def prune(
    path: CachePath = None,
    older_than: Annotated[float | None, typer.Option(min=0, help="Remove results older than so many days.")] = None,
    foreign: Annotated[bool, typer.Option("--foreign", help="Remove those of other machines or versions.")] = False,
    failures: Annotated[bool, typer.Option("--failures", help="Remove failures, to try them again.")] = False,
) -> None:
    """Remove what is damaged, and what the options name."""
    from ..tuning.record import Failure, Record

    own = None
    if foreign:
        import torch

        from ..tuning.fingerprint import fingerprint

        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        own = [fingerprint(torch.device(device)) for device in devices]
    oldest = None if older_than is None else time.time() - older_than * DAY

    def unwanted(record: Record) -> bool:
        return (
            (oldest is not None and record.at < oldest)
            or (own is not None and record.key.fingerprint not in own)
            or (failures and isinstance(record.outcome, Failure))
        )

    found = _open(path)
    print(f"{found.path}: {found.remove(unwanted, invalid=True)} results removed")


def _open(path: Path | None) -> TuningCache:
    from ..tuning.cache import TuningCache, default_path

    return TuningCache(path or default_path())
