"""The child process that builds, checks and times candidates: JSON lines in, JSON lines out, one at a time.

Requests are objects with ``do``: "task" (kernel, spec, shape, device: what the next ones are about), "check"
(candidate, seed) and "time" (candidates, rounds, enough). Answers are objects; one with ``failure`` says what a
candidate did wrong. A request that takes longer than its ``seconds`` kills the process, in native code too, so that
nothing stays behind when whoever asked is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

Build = Callable[[Any, Any], Callable[..., Any]]
# After the limit of whoever asks, who then knows that it was a hang.
GRACE_SECONDS = 5


def main() -> None:
    """Serve with the project's own candidates."""
    from torchaccel.kernels import candidates

    serve(candidates.build)


def serve(build: Build) -> None:
    """Answer requests until the input ends; ``build(spec, candidate)`` makes the callable of a candidate."""
    # Whatever else prints, native code included, goes to stderr: stdout is for answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from .workbench import Workbench

    bench = Workbench(build)
    _send(answers, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        _limit(request.get("seconds", 0))
        _send(answers, bench.answer(request))
        _limit(0)


def _limit(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_SECONDS if seconds else 0)


def _send(stream: Any, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
