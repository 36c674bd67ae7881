"""The tuner's end of the process that measures: asks, waits so long and no longer, and knows what went wrong."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import IO, Any

from .record import MAX_MESSAGE

START_SECONDS = 120.0


class Hung(Exception):
    """There was no answer in time; the process was killed."""


class Crashed(Exception):
    """The process died, or answered nonsense and was killed; says how, and its last words."""


class Child:
    """A process that answers one JSON object a line; it ends with this object, or with the tuner.

    Raises ``Crashed`` or ``Hung`` when it does not start.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        """arguments: of the Python interpreter, such as ``("-m", "torchaccel.tuning.worker")``."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        # A session of its own: Ctrl-C is for the tuner, which then ends the child.
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        self._unread = b""
        self.close = weakref.finalize(self, _end, self._process, self._errors)
        self._answer(START_SECONDS)

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self.close.alive

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to ``request``; raises ``Hung`` after ``seconds`` without one, ``Crashed`` if the process died."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({**request, "seconds": seconds}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it is dead, and reading says how it died
        return self._answer(seconds)

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._line(time.monotonic() + seconds, seconds)
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise Crashed(f"it answered {line[:80]!r}")
        except BaseException:
            self._process.kill()
            self.close()
            raise
        return found

    def _line(self, deadline: float, seconds: float) -> bytes:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Hung(f"no answer within {seconds:g} s")
            part = os.read(pipe, 2**16)
            if not part:
                raise Crashed(self._last_words())
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _last_words(self) -> str:
        code = self._process.wait()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{name}{': ' + said[-1] if said else ''}"[:MAX_MESSAGE]


def _end(process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            # Closing flushes, into a pipe nobody reads.
            with contextlib.suppress(OSError):
                stream.close()
    errors.close()
