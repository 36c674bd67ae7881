"""The commands that measure again: the whole document, and each of its variants."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .documents import Document, Row

# The options that choose variants, and those whose file a shorter run must not touch.
SELECTION = ("--options", "--baselines")
FILES = ("--json", "--html", "--journal")


@dataclass(frozen=True)
class Command:
    """A shell command and what it measures."""

    what: str
    line: str


def commands(document: Document) -> list[Command]:
    """The command of ``document`` as it ran; then, where its variants can be chosen, one for each of them."""
    argv = document.command
    if not argv:
        return []
    select = {"bench": _bench, "evaluate": _evaluate}.get(argv[1] if len(argv) > 1 else "")
    alone = (
        [] if select is None else [Command(r.variant, shlex.join([*_common(argv), *select(r)])) for r in document.rows]
    )
    return [Command("the whole document", shlex.join(argv)), *alone]


def _bench(row: Row) -> list[str]:
    """``bench`` always runs torchaccel exact, and baselines only when they are named."""
    if not row.ours:
        return ["--baselines", row.variant]
    return ["--baselines", "", *(["--options", json.dumps(row.options)] if row.options else [])]


def _evaluate(row: Row) -> list[str]:
    """``evaluate`` always runs eager, and of torchaccel what ``--options`` names."""
    return ["--options", json.dumps(row.options)] if row.ours else []


def _common(argv: Sequence[str]) -> Iterator[str]:
    """``argv`` without the options that choose variants or name files, and without their values."""
    skip = False
    for part in argv:
        name = part.partition("=")[0]
        if skip:
            skip = False
        elif name in (*SELECTION, *FILES):
            skip = part == name
        else:
            yield part
