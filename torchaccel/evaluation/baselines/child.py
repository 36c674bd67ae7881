"""A child process that answers requests: one JSON object a line on its standard input, one a line on its output."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from ...errors import PeerError

GRACE_SECONDS = 5.0


class Child:
    """A process that stays alive between requests; it is ended when this object goes away.

    What it prints on stderr is kept and named when it dies. Whoever hangs, dies or answers anything but a JSON object
    is ended and raises ``PeerError`` from then on.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start ``command``; ``environment`` is added to this process's own."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **(environment or {})},
        )
        self._unread = b""
        self.close = weakref.finalize(self, _end, self._process, self._errors)

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to ``request``, within ``seconds``.

        Raises ``PeerError`` when there is none, and when the answer is ``{"error": text}``: then with that text, and
        the child lives on.
        """
        try:
            answer = self._exchange(json.dumps(request).encode() + b"\n", seconds)
        except PeerError:
            self.close()
            raise
        if "error" in answer:
            raise PeerError(str(answer["error"]))
        return answer

    def _exchange(self, line: bytes, seconds: float) -> dict[str, Any]:
        if not self.close.alive:
            raise PeerError("the peer's process was ended after an earlier failure")
        assert self._process.stdin is not None
        deadline = time.monotonic() + seconds
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError:
            raise PeerError(self._obituary()) from None
        answer = self._read_line(deadline, seconds)
        try:
            found = json.loads(answer)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            shown = answer[:80].decode(errors="replace")
            raise PeerError(f"the peer's process answered {shown!r}, which is no JSON object")
        return found

    def _read_line(self, deadline: float, seconds: float) -> bytes:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise PeerError(f"the peer's process did not answer within {seconds:.0f} s")
            part = os.read(pipe, 2**16)
            if not part:
                raise PeerError(self._obituary())
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _obituary(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_SECONDS)
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        last = f": {said[-1]}" if said else " without a word on stderr"
        return f"the peer's process ended with exit code {self._process.poll()}{last}"


def serve(answer: Any, requests: IO[str], answers: IO[str]) -> None:
    """The other side: write what ``answer(request)`` returns, or ``{"error": text}`` when it raises, until the end."""
    for request in _requests(requests):
        try:
            found = answer(request)
        except Exception as error:  # told to whoever asked, who records it
            lines = str(error).strip().splitlines()
            found = {"error": f"{type(error).__name__}: {lines[0] if lines else 'no message'}"}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _requests(stream: IO[str]) -> Iterator[dict[str, Any]]:
    for line in stream:
        yield json.loads(line)


def _end(process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    """A child that serves ends with its input; one that does not is killed."""
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    try:
        process.wait(GRACE_SECONDS if process.poll() is None else 0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
    errors.close()
