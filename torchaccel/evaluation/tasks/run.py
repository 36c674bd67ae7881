"""What is evaluated, and what all tasks share while it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..arms import Arm
from ..ledger import Ledger
from ..session import Session

READING = ("perplexity", "agreement", "sensitivity")
LANGUAGE = (*READING, "recall", "ruler")
ENCODER = ("similarity",)


@dataclass(frozen=True)
class EvaluateCase:
    """What is evaluated: ``windows`` of ``window`` tokens, the first ``prompt`` of each read at once, ``batch`` a time.

    ``tasks``: of LANGUAGE for a language model, of ENCODER for an encoder; none stands for the usual ones of the model.
    ``new_tokens`` are generated for the greedy prefix and the timing. ``lengths`` and ``questions``: of the retrieval
    tasks. ``text``: what the texts are called in the document.
    """

    tasks: tuple[str, ...] = ()
    window: int = 1024
    prompt: int = 256
    windows: int = 16
    batch: int = 4
    new_tokens: int = 32
    lengths: tuple[int, ...] = (256, 512, 1024)
    questions: int = 4
    text: str = "excerpt"

    def __post_init__(self) -> None:
        known = (*LANGUAGE, *ENCODER)
        unknown = [name for name in self.tasks if name not in known]
        if unknown:
            raise ValueError(f"unknown task {unknown[0]!r}; the tasks are {', '.join(known)}")
        if not 0 < self.prompt < self.window:
            raise ValueError(f"a prompt of {self.prompt} tokens must be shorter than the window of {self.window}")

    def for_model(self, *, encoder: bool) -> EvaluateCase:
        """The case with the tasks of its kind of model; raises ``ValueError`` for a task of the other kind."""
        usual, allowed = (ENCODER, ENCODER) if encoder else (("perplexity", "agreement", "recall"), LANGUAGE)
        wrong = [name for name in self.tasks if name not in allowed]
        if wrong:
            kind = "an encoder" if encoder else "a language model"
            raise ValueError(f"task {wrong[0]!r} is not for {kind}, whose tasks are {', '.join(allowed)}")
        return replace(self, tasks=self.tasks or usual)

    def to_dict(self) -> dict[str, Any]:
        """The case as the results document names it."""
        found = asdict(self) | {"kind": "evaluate", "context": self.window}
        return found | {"tasks": list(self.tasks), "lengths": list(self.lengths)}

    @property
    def reads_text(self) -> bool:
        """Whether a task scores windows of the text."""
        return any(name in self.tasks for name in READING)


@dataclass
class Run:
    """An evaluation in progress: the session, its texts cut into windows, the float32 model, what was finished."""

    session: Session
    case: EvaluateCase
    ledger: Ledger
    truth: Any
    texts: Sequence[str]
    windows: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    bytes_per_token: float = 1.0
    # Labels of the variants that did work in this process, not all of it remembered from an earlier one.
    ran: set[str] = field(default_factory=set)

    def pieces(self, arms: Mapping[str, Arm], work: Callable[[Arm], Any], doing: str) -> dict[str, Any]:
        """``work`` of every arm by label; an arm whose work raises is recorded as failed and left out."""
        found: dict[str, Any] = {}
        for label, arm in arms.items():
            if arm.result.status == "failed":
                continue
            self.session.progress.advance(f"{label}: {doing}")
            try:
                found[label] = work(arm)
            except Exception as error:  # recorded: the document names the variant and the reason
                arm.result.fail(error)
        return found

    @property
    def batch_count(self) -> int:
        """Number of batches of windows."""
        return -(-len(self.windows) // self.case.batch)

    def batches(self) -> Iterator[tuple[Tensor, int]]:
        """The windows ``[batch, S]`` a batch at a time, and how many count.

        The last batch is filled up with windows that do not, since another batch size would be compiled anew.
        """
        count = len(self.windows)
        for start in range(0, count, self.case.batch):
            chosen = [index % count for index in range(start, start + self.case.batch)]
            yield self.windows[chosen], min(self.case.batch, count - start)

    def remember(self, arm: Arm, task: str, compute: Callable[[], Any], **piece: Any) -> Any:
        """What ``compute`` gives for one piece of a variant's work, from the ledger where it was finished before."""
        described = {"options": arm.variant.options, "kind": arm.variant.kind, "task": task, **piece}

        def work() -> Any:
            self.ran.add(arm.variant.label)
            return compute()

        return self.ledger.work(described, work)
