"""Results documents as the report reads them: a value that is missing or of another type than agreed is None."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

PREFIX = "torchaccel:"
PER = {"decode": " per token", "prefill": " per prompt", "attention": " per call"}
LARGEST = 1e18
# What neither XML nor UTF-8 can hold: control characters, lone surrogates, two non-characters.
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some samples, in milliseconds."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Row:
    """One variant of a document; ``record`` is its result as it came."""

    record: Mapping[str, Any]

    @property
    def variant(self) -> str:
        return str(self.record["variant"])

    @property
    def options(self) -> Mapping[str, Any]:
        return mapping(self.record, "options")

    @property
    def key(self) -> tuple[str, str]:
        """What identifies a variant across documents: its label and its options."""
        return self.variant, json.dumps(self.options, sort_keys=True)

    @property
    def status(self) -> str:
        return text(self.record, "status") or "unknown"

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def ran(self) -> bool:
        """Whether its numbers are measurements; a declined variant ran, without what it declined."""
        return self.status in ("ok", "declined")

    @property
    def ours(self) -> bool:
        """Whether this is torchaccel rather than what it is compared with."""
        return self.variant.startswith(PREFIX)

    def number(self, *path: str) -> float | None:
        return number(self.record, *path)

    def spread(self, name: str) -> Spread | None:
        """The times called ``name``; None unless all three numbers are there and positive."""
        found = [self.number(name, part) for part in ("median", "min", "max")]
        times = [value for value in found if value is not None and value > 0]
        return Spread(*times) if len(times) == 3 else None

    @cached_property
    def mean_recall(self) -> float | None:
        """Mean score over the recall tasks, 0 to 1."""
        recall = mapping(self.record, "fidelity", "recall")
        scores = [score for task in recall if (score := number(recall, task)) is not None]
        return sum(scores) / len(scores) if scores else None


@dataclass(frozen=True)
class Document:
    """A results document, the ``index``-th of the report, counted from 1."""

    index: int
    record: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def kind(self) -> str:
        return text(self.record, "case", "kind") or "measurement"

    @property
    def per(self) -> str:
        """What the field "ms" is the time of."""
        return PER.get(self.kind, "")

    @property
    def model(self) -> str:
        return text(self.record, "model", "name") or "unnamed model"

    @property
    def busy(self) -> bool:
        return find(self.record, "machine", "busy") is True

    @property
    def command(self) -> list[str]:
        return [part for part in sequence(self.record, "command") if isinstance(part, str)]

    @property
    def title(self) -> str:
        """Kind and size, such as "decode, context 512, batch 1"."""
        phase = text(self.record, "case", "phase")
        names = {"context": "context", "batch": "batch", "new_tokens": "new tokens"}
        sizes = [(label, self.number("case", name)) for name, label in names.items()]
        kind = self.kind if phase is None else f"{self.kind}, {phase}"
        return ", ".join([kind, *(f"{label} {size:g}" for label, size in sizes if size is not None)])

    @property
    def baselines(self) -> list[str]:
        """What speed-ups are given over: the variants that are not torchaccel, or the first of all without them."""
        timed = list(dict.fromkeys(row.variant for row in self.rows if row.ran and mapping(row.record, "speedup")))
        others = [variant for variant in timed if not variant.startswith(PREFIX)]
        return others or timed[:1]

    def number(self, *path: str) -> float | None:
        return number(self.record, *path)

    def same_model(self, other: Document) -> bool:
        """Whether both measured the same model in the same dtype."""
        fields = ("name", "params", "dtype")
        return all(find(self.record, "model", f) == find(other.record, "model", f) for f in fields)

    def speedup(self, row: Row, baseline: str) -> float | None:
        """How many times faster ``row`` is than ``baseline``."""
        if row.variant == baseline:
            return 1.0
        ratio = row.number("speedup", baseline)
        return ratio if ratio is not None and ratio > 0 else None


def read_documents(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The documents in files; raises ``ValueError`` that names the first file which holds none."""
    found = []
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            parse([record])
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is no results document ({reason}); give a file that --json FILE wrote") from error
        found.append(record)
    return found


def parse(records: Sequence[Mapping[str, Any]]) -> list[Document]:
    """The documents behind ``records``; raises ``ValueError`` for what has no results with a variant each."""
    return [_parse_one(index, _printable(record)) for index, record in enumerate(records, start=1)]


def _parse_one(index: int, record: Any) -> Document:
    results = find(record, "results")
    if not isinstance(results, list):
        raise ValueError('it is not an object with a list "results"')
    if not all(isinstance(find(result, "variant"), str) for result in results):
        raise ValueError('one of its results has no "variant"')
    return Document(index, record, tuple(Row(result) for result in results))


def _printable(value: Any) -> Any:
    """``value`` with the characters replaced that no page can show."""
    if isinstance(value, str):
        return UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {_printable(key): _printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_printable(item) for item in value]
    return value


def find(record: Any, *path: str) -> Any:
    """What stands at ``path`` in nested objects, or None."""
    for name in path:
        record = record.get(name) if isinstance(record, Mapping) else None
    return record


def number(record: Any, *path: str) -> float | None:
    """The number at ``path``; None where there is none, or none that a plot can show."""
    value = find(record, *path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < LARGEST else None


def text(record: Any, *path: str) -> str | None:
    """The string at ``path``, or None."""
    value = find(record, *path)
    return value if isinstance(value, str) and value else None


def mapping(record: Any, *path: str) -> Mapping[str, Any]:
    """The object at ``path``, or an empty one."""
    value = find(record, *path)
    return value if isinstance(value, Mapping) else {}


def sequence(record: Any, *path: str) -> list[Any]:
    """The list at ``path``, or an empty one."""
    value = find(record, *path)
    return value if isinstance(value, list) else []
