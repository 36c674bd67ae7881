"""A SQLite file that many processes share and that never costs more than what it remembered."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from torchaccel.errors import CacheWarning

# A file is only moved aside by the process that holds its lock exclusively; Windows, without flock, moves nothing.
try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
# How long a process waits for the others, which hold the file for a millisecond at a time.
BUSY_SECONDS = 30.0
Result = TypeVar("Result")


class FormatError(Exception):
    """The file is of another format than this version reads."""

    def __init__(self, found: int) -> None:
        super().__init__(f"it has format {found}, this version of torchaccel knows format {FORMAT}")
        self.found = found


class ForeignError(Exception):
    """The file is a SQLite database, but not one of ours."""


class Database:
    """Runs work on a SQLite file in WAL mode; whatever is wrong with the file is a warning, once, and no result.

    A connection lives for one piece of work, so that a corrupt file can be moved aside, under a lock, while nobody has
    it open: it is kept beside the new one under a name that ends with ``.corrupt-<time>`` (``.format-<n>`` when it was
    written by an older version). Nothing is created for reading.
    """

    def __init__(self, path: Path, schema: Sequence[str]) -> None:
        """path: the file. schema: the statements that make its tables, beside ``meta``, which holds the format."""
        self.path = path
        self._schema = schema
        self._warned: set[str] = set()

    def read(self, work: Callable[[sqlite3.Connection], Result], nothing: Result) -> Result:
        """What ``work`` returns, or ``nothing`` when there is no file or it cannot be read."""

        def attempt() -> Result:
            return self._reading(work, nothing) if self.path.exists() else nothing

        return self._attempt(attempt, nothing, "nothing is looked up in it")

    def write(self, work: Callable[[sqlite3.Connection], object]) -> bool:
        """Do ``work`` as one transaction; whether it is stored now."""

        def attempt() -> bool:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(), self._connection("rwc") as connection:
                self._prepare(connection)
                connection.execute("BEGIN IMMEDIATE")
                work(connection)
                connection.execute("COMMIT")
            return True

        return self._attempt(attempt, False, "nothing new is remembered", moves_older=True)

    def _attempt(
        self, act: Callable[[], Result], otherwise: Result, consequence: str, *, moves_older: bool = False
    ) -> Result:
        for last in (False, True):
            identity = self._identity()
            try:
                return act()
            except FormatError as error:
                if last or not moves_older or error.found > FORMAT:
                    return self._give_up(str(error), consequence, otherwise)
                if not self._move_aside(identity, f"format-{error.found}", str(error)):
                    return otherwise
            except ForeignError as error:
                return self._give_up(str(error), consequence, otherwise)
            except (sqlite3.OperationalError, OSError) as error:
                # Full, read-only, locked for too long, no such folder: the file itself may be fine.
                return self._give_up(str(error), consequence, otherwise)
            except sqlite3.DatabaseError as error:
                if last or not self._move_aside(identity, f"corrupt-{time.time_ns()}", str(error)):
                    return self._give_up(str(error), consequence, otherwise)
        return otherwise

    def _reading(self, work: Callable[[sqlite3.Connection], Result], nothing: Result) -> Result:
        # WAL needs a writable index beside the file even for reading; where there is none, the file alone is read.
        with self._locked():
            for mode in ("rw", "ro", "immutable"):
                try:
                    with self._connection(mode) as connection:
                        return work(connection) if self._check_format(connection) else nothing
                except sqlite3.OperationalError:
                    if mode == "immutable":
                        raise
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def _connection(self, mode: str) -> Iterator[sqlite3.Connection]:
        query = "mode=ro&immutable=1" if mode == "immutable" else f"mode={mode}"
        uri = f"{self.path.absolute().as_uri()}?{query}"
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        # Text that a flipped bit made invalid is for the reader's checks to find, not for the decoder.
        connection.text_factory = lambda text: text.decode(errors="replace")
        try:
            yield connection
        finally:
            connection.close()

    def _prepare(self, connection: sqlite3.Connection) -> None:
        if self._check_format(connection):
            return
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
        for statement in self._schema:
            connection.execute(statement)
        connection.execute("INSERT OR IGNORE INTO meta VALUES ('format', ?)", (str(FORMAT),))
        connection.execute("COMMIT")

    def _check_format(self, connection: sqlite3.Connection) -> bool:
        """Whether the tables are there; raises for a file of another format or of somebody else."""
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        if not tables:
            return False
        if "meta" not in tables:
            raise ForeignError("it is a database of another program")
        rows = connection.execute("SELECT value FROM meta WHERE name = 'format'").fetchall()
        found = int(rows[0][0]) if rows and str(rows[0][0]).isdecimal() else 0
        if found != FORMAT:
            raise FormatError(found)
        return True

    @contextlib.contextmanager
    def _locked(self, *, exclusive: bool = False) -> Iterator[None]:
        """Hold the lock beside the file: shared for work, exclusive to move the file; none where none can be made."""
        try:
            lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT, 0o666) if fcntl else None
        except OSError:
            lock = None
        try:
            if lock is not None:
                fcntl.flock(lock, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield
        finally:
            if lock is not None:
                os.close(lock)

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _move_aside(self, identity: tuple[int, int] | None, suffix: str, why: str) -> bool:
        """Rename the file, unless another process did already; whether the path is free, or has a new file, now."""
        with self._locked(exclusive=True):
            if self._identity() != identity:
                return True
            target = f"{self.path}.{suffix}"
            try:
                os.replace(self.path, target)
            except OSError:
                return False
            for side in ("-wal", "-shm"):
                with contextlib.suppress(OSError):
                    os.replace(f"{self.path}{side}", f"{target}{side}")
        self._warn(f"{self.path} cannot be used ({why}); it was moved to {target}, and a new one is begun")
        return True

    def _give_up(self, why: str, consequence: str, otherwise: Result) -> Result:
        self._warn(f"{self.path} cannot be used ({why}); {consequence}")
        return otherwise

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, CacheWarning, stacklevel=2)
