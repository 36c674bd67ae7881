"""Records as a JSON text: what ``cache export`` writes, ``cache import`` reads, and a bundle carries."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from .record import Record

FORMAT = 1


def to_text(records: Iterable[Record]) -> str:
    """The records as a JSON document, each with its digest."""
    rows = [{**record.to_dict(), "digest": record.digest()} for record in records]
    return json.dumps({"format": FORMAT, "records": rows}, indent=1)


def from_text(text: str) -> list[Record]:
    """The records of a document; ``ValueError`` that names the first thing that is not as ``to_text`` wrote it."""
    try:
        found: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"an export is a JSON document; found something else ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("records"), list):
        raise ValueError("an export is an object with format and records; export it with torchaccel cache export")
    if found.get("format") != FORMAT:
        raise ValueError(
            f"the export has format {found.get('format')!r}, this version reads {FORMAT}; export it again with it"
        )
    return [_record(number, row) for number, row in enumerate(found["records"])]


def _record(number: int, row: Any) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"record {number} is no object")
    fields = {name: value for name, value in row.items() if name != "digest"}
    try:
        record = Record.from_dict(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"record {number}: {error}") from error
    if record.digest() != row.get("digest"):
        raise ValueError(f"record {number} is not what was exported (its digest differs)")
    return record
