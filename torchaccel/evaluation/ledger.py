"""Finished pieces of a long evaluation, appended to a file as they come, so that an interrupted run can go on."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Ledger:
    """Results by the JSON that describes how they came about; kept in a JSON-lines file, or in memory for None.

    A piece counts as done only if everything that describes it, ``context`` included, is the same. A line that was cut
    off by an interruption is skipped. Raises ``ValueError`` for a folder there is not; a disk that fills up later costs
    the file, with a warning, not the work.
    """

    def __init__(self, path: Path | None, context: Mapping[str, Any]) -> None:
        self.path = path
        self._context = dict(context)
        self._done: dict[str, Any] = {}
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written, there is no folder {path.parent}; make it first")
        if path is not None and path.exists():
            self._read(path)

    def work(self, piece: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The result of ``piece`` as JSON values: remembered, or computed now and written down."""
        key = self._key(piece)
        if key not in self._done:
            self._done[key] = compute()
            self._append({"key": key, "piece": dict(piece), "result": self._done[key]})
        return self._done[key]

    def close(self) -> None:
        """Everything is done and delivered elsewhere: remove the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _append(self, row: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            warnings.warn(f"{self.path} keeps no more finished pieces ({error}); the evaluation goes on", stacklevel=2)
            self.path = None

    def _key(self, piece: Mapping[str, Any]) -> str:
        text = json.dumps([self._context, dict(piece)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            try:
                row = json.loads(line)
                self._done[row["key"]] = row["result"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
