"""What tuning found out, in one file: timings and failures of every candidate, and measured facts about devices."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import platformdirs

from .database import Database
from .fingerprint import Fingerprint
from .key import Key
from .record import Failure, Record, Timing

FILE_NAME = "tuning.sqlite"
KEY_FIELDS = ("kernel", "spec", "bucket", *(field.name for field in fields(Fingerprint)))
SCHEMA = (
    "CREATE TABLE IF NOT EXISTS entries (id INTEGER PRIMARY KEY,"
    f" {', '.join(f'{name} NOT NULL' for name in KEY_FIELDS)}, UNIQUE ({', '.join(KEY_FIELDS)}))",
    "CREATE TABLE IF NOT EXISTS timings (entry INTEGER NOT NULL REFERENCES entries, candidate TEXT NOT NULL,"
    " median_ms REAL NOT NULL, samples TEXT NOT NULL, error REAL NOT NULL, at REAL NOT NULL, digest TEXT NOT NULL,"
    " PRIMARY KEY (entry, candidate))",
    "CREATE TABLE IF NOT EXISTS failures (entry INTEGER NOT NULL REFERENCES entries, candidate TEXT NOT NULL,"
    " kind TEXT NOT NULL, message TEXT NOT NULL, at REAL NOT NULL, digest TEXT NOT NULL,"
    " PRIMARY KEY (entry, candidate))",
    "CREATE TABLE IF NOT EXISTS facts (fingerprint TEXT PRIMARY KEY, facts TEXT NOT NULL, digest TEXT NOT NULL)",
)
_SELECT = f"SELECT {', '.join(f'e.{name}' for name in KEY_FIELDS)}, t.candidate, "
_TIMINGS = _SELECT + "t.at, t.digest, t.median_ms, t.samples, t.error FROM timings t JOIN entries e ON e.id = t.entry"
_FAILURES = _SELECT + "t.at, t.digest, t.kind, t.message FROM failures t JOIN entries e ON e.id = t.entry"


def default_path(environment: Mapping[str, str] | None = None) -> Path:
    """Where the cache lies unless an option says otherwise: TORCHACCEL_CACHE, or the platform's folder for caches."""
    named = (os.environ if environment is None else environment).get("TORCHACCEL_CACHE")
    return Path(named) if named else platformdirs.user_cache_path("torchaccel") / FILE_NAME


@dataclass(frozen=True)
class Checked:
    """Every row of a cache: the records that are what was written, and a line about each row that is not."""

    records: tuple[Record, ...]
    invalid: tuple[str, ...]


class TuningCache:
    """The cache at ``path``, shared by any number of processes.

    Every row carries a digest of itself and its key, and one that does not match it is not used. No method raises for
    the state of the file: see ``Database``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = Database(path, SCHEMA)

    def check(self, fingerprint: Fingerprint | None = None) -> Checked:
        """All rows, or those of one fingerprint, checked one by one; timings first."""
        return self._check({} if fingerprint is None else fingerprint.to_dict())

    def records(self, fingerprint: Fingerprint | None = None) -> tuple[Record, ...]:
        """The valid records, of one fingerprint if given."""
        return self.check(fingerprint).records

    def of(self, key: Key) -> dict[str, Timing | Failure]:
        """What is known about the candidates of a key; a candidate that ever failed has failed."""
        return outcomes(self._check(key.to_dict()).records)

    def _check(self, fields: Mapping[str, str | int]) -> Checked:
        where = f" WHERE {' AND '.join(f'e.{name} = ?' for name in fields)}" if fields else ""

        def work(connection: sqlite3.Connection) -> Checked:
            records, invalid = [], []
            for select, outcome in ((_TIMINGS, _timing), (_FAILURES, _failure)):
                for row in connection.execute(f"{select}{where} ORDER BY t.rowid", tuple(fields.values())):
                    try:
                        records.append(_record(row, outcome))
                    except (ValueError, TypeError) as error:
                        invalid.append(f"{row[0]} {row[2]} {row[len(KEY_FIELDS)]}: {error}")
            return Checked(tuple(records), tuple(invalid))

        return self._database.read(work, Checked((), ()))

    def add(self, *records: Record) -> bool:
        """Store records, in place of those of the same key, candidate and kind; whether they are stored now."""

        def work(connection: sqlite3.Connection) -> None:
            for record in records:
                _insert(connection, record)

        return self._database.write(work)

    def facts(self, fingerprint: Fingerprint) -> dict[str, Any] | None:
        """The measured facts of a device as they were stored; None when there are none."""

        name = _text(fingerprint)

        def work(connection: sqlite3.Connection) -> list[tuple[str, str]]:
            return connection.execute("SELECT facts, digest FROM facts WHERE fingerprint = ?", (name,)).fetchall()

        rows: list[tuple[str, str]] = self._database.read(work, [])
        for text, digest in rows:
            if digest == _digest(name, text):
                return dict(json.loads(text))
        return None

    def add_facts(self, fingerprint: Fingerprint, facts: Mapping[str, Any]) -> bool:
        """Store measured facts of a device (JSON values) in place of earlier ones; whether they are stored now."""
        name, text = _text(fingerprint), json.dumps(dict(facts), sort_keys=True)
        row = name, text, _digest(name, text)
        return self._database.write(lambda connection: connection.execute("REPLACE INTO facts VALUES (?, ?, ?)", row))

    def remove(self, unwanted: Callable[[Record], bool], *, invalid: bool = False) -> int:
        """Delete the records that ``unwanted`` names, and invalid rows when asked; returns how many are gone."""
        checked = self.check()
        kept = [record for record in checked.records if not unwanted(record)]
        gone = len(checked.records) - len(kept) + (len(checked.invalid) if invalid else 0)
        if not gone:
            return 0

        def work(connection: sqlite3.Connection) -> None:
            if invalid:
                for table in ("timings", "failures", "entries"):
                    connection.execute(f"DELETE FROM {table}")
                for record in kept:
                    _insert(connection, record)
                return
            for record in checked.records:
                if unwanted(record):
                    table = "timings" if isinstance(record.outcome, Timing) else "failures"
                    connection.execute(f"DELETE FROM {table} WHERE digest = ?", (record.digest(),))

        return gone if self._database.write(work) else 0


def outcomes(records: Iterable[Record]) -> dict[str, Timing | Failure]:
    """By candidate what ``records`` of one key say; a failure outlives any timing."""
    found: dict[str, Timing | Failure] = {}
    for record in records:
        if not isinstance(found.get(record.candidate), Failure):
            found[record.candidate] = record.outcome
    return found


def _insert(connection: sqlite3.Connection, record: Record) -> None:
    found = tuple(record.key.to_dict()[name] for name in KEY_FIELDS)
    connection.execute(f"INSERT OR IGNORE INTO entries ({', '.join(KEY_FIELDS)}) VALUES ({_marks(found)})", found)
    where = " AND ".join(f"{name} = ?" for name in KEY_FIELDS)
    ((entry,),) = connection.execute(f"SELECT id FROM entries WHERE {where}", found).fetchall()
    outcome = record.outcome
    values: tuple[Any, ...]
    if isinstance(outcome, Timing):
        table = "timings"
        values = (outcome.median_ms, json.dumps(outcome.samples), outcome.error)
    else:
        table = "failures"
        values = (outcome.kind, outcome.message)
    row = (entry, record.candidate, *values, record.at, record.digest())
    connection.execute(f"REPLACE INTO {table} VALUES ({_marks(row)})", row)


def _record(row: tuple[Any, ...], outcome: Callable[..., dict[str, Any]]) -> Record:
    key = dict(zip(KEY_FIELDS, row, strict=False))
    candidate, at, digest, *values = row[len(KEY_FIELDS) :]
    record = Record.from_dict({"key": key, "candidate": candidate, "at": at, **outcome(*values)})
    if record.digest() != digest:
        raise ValueError("the row is not what was written (its digest differs)")
    return record


def _timing(median_ms: Any, samples: Any, error: Any) -> dict[str, Any]:
    return {"timing": {"median_ms": median_ms, "samples": json.loads(samples), "error": error}}


def _failure(kind: Any, message: Any) -> dict[str, Any]:
    return {"failure": {"kind": kind, "message": message}}


def _text(fingerprint: Fingerprint) -> str:
    return json.dumps(fingerprint.to_dict(), sort_keys=True)


def _digest(*texts: object) -> str:
    return hashlib.sha256("\n".join(str(text) for text in texts).encode()).hexdigest()


def _marks(row: Iterable[Any]) -> str:
    return ", ".join("?" for _ in row)
