"""What one benchmark measures, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PHASES = ("decode", "prefill")


@dataclass(frozen=True)
class Case:
    """One benchmark: ``context`` tokens of prompt or cache, ``batch`` rows, ``rounds`` timed samples per variant.

    ``phase`` is that of the attention benchmark, "decode" or "prefill"; the other kinds are named after theirs. Raises
    ``ValueError`` for a phase that is neither.
    """

    kind: str
    context: int
    batch: int = 1
    new_tokens: int | None = None
    rounds: int = 20
    warmup: int = 3
    fidelity: bool = True
    recall_questions: int = 0
    phase: str | None = None

    def __post_init__(self) -> None:
        if self.kind == "attention" and self.phase not in PHASES:
            raise ValueError(f"unknown phase {self.phase!r} of attention; the phases are {', '.join(PHASES)}")

    def to_dict(self) -> dict[str, Any]:
        """The case as the results document names it."""
        phase = {} if self.phase is None else {"phase": self.phase}
        return {
            "kind": self.kind,
            **phase,
            "batch": self.batch,
            "context": self.context,
            "new_tokens": self.new_tokens,
            "rounds": self.rounds,
            "warmup": self.warmup,
        }
