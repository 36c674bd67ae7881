"""What the ``torch_dynamo_backends`` entry point names; looked up by torch, never imported by users."""

from __future__ import annotations

import atexit
import sys
from functools import lru_cache
from typing import Any

from torchaccel.backend import Backend
from torchaccel.reporting import Journal


@lru_cache(maxsize=1)
def journal() -> Journal:
    """The journal of this process's compilations (made on first use)."""
    return Journal()


@lru_cache(maxsize=1)
def lookup() -> Backend:
    """The backend torch uses, made when it is first looked up; says so at exit if it never received a graph."""
    found = Backend(journal())
    atexit.register(_explain_silence, found)
    return found


def _explain_silence(backend: Backend) -> None:
    if backend.graphs_received == 0:
        print(
            "torchaccel: the backend was looked up but never received a graph. torch.compile(model) does not reach "
            "model.generate(): use model.compile(backend='torchaccel') and call the model",
            file=sys.stderr,
        )


def __getattr__(name: str) -> Any:
    # The entry point loads torchaccel.entry_point:backend; the backend is made at that moment, not at import.
    if name == "backend":
        return lookup()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
