"""The table of tuned results that ``tune`` and ``cache show`` print."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from rich.table import Table

from ..tuning.record import Record, Timing
from ..tuning.words import described


def records_table(records: Iterable[Record]) -> Table:
    """One block per key, its candidates from the fastest to the failed; the device where there are several."""
    found = sorted(records, key=lambda record: (_order(record), _rank(record)))
    several = len({record.key.fingerprint for record in found}) > 1
    table = Table("kernel", "shape", "of", *(["device"] if several else []), "candidate", "ms", "result")
    for _, group in groupby(found, key=_order):
        for place, record in enumerate(group):
            key, outcome = record.key, record.outcome
            cells = (
                [key.kernel, key.bucket.replace(",", " "), described(key.kernel, key.spec)] if place == 0 else [""] * 3
            )
            if several:
                cells.append(key.fingerprint.device if place == 0 else "")
            if isinstance(outcome, Timing):
                result = "fastest" if place == 0 else ""
                table.add_row(*cells, record.candidate, f"{outcome.median_ms:.3f}", result)
            else:
                table.add_row(*cells, record.candidate, "", f"{outcome.kind}: {outcome.message[:80]}")
        table.add_section()
    return table


def _order(record: Record) -> tuple[str, ...]:
    return tuple(str(value) for value in record.key.to_dict().values())


def _rank(record: Record) -> tuple[bool, float]:
    timed = isinstance(record.outcome, Timing)
    return not timed, record.outcome.median_ms if isinstance(record.outcome, Timing) else 0.0
