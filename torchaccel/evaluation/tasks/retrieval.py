"""Recall by depth and length: the same seeded questions for every variant, answered through ``model.generate``."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch

from ..arms import Arm
from ..recall import TASKS, Question, Task, make_question
from .continuation import continuation
from .ruler import RULER_TASKS, RulerQuestion, RulerTask, make_ruler_question
from .run import EvaluateCase, Run


@dataclass(frozen=True)
class Grid:
    """Where the facts that are asked for stand: every depth (0 to 1) at every length of prompt, in tokens."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    questions: int = 4

    def to_details(self, scores: Sequence[Sequence[float]]) -> dict[str, Any]:
        """A heat map as the results document holds it; ``scores`` by length, then depth."""
        return {
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "scores": [list(row) for row in scores],
            "questions": self.questions,
        }


def retrieval_score(
    model: Any, tokenizer: Any, task: Task | RulerTask, length: int, depth: float, questions: int
) -> float:
    """Mean score, 0 to 1, of ``questions`` seeded questions of one task, asked as one batch of ``length`` tokens."""
    rng = random.Random(f"{task.name}/{length}/{depth}")
    asked = [_ask(tokenizer, task, length, rng, depth) for _ in range(questions)]
    prompts = torch.tensor([question.tokens for question in asked], device=next(model.parameters()).device)
    answers = continuation(model, prompts, max(question.new_tokens for question in asked)).tolist()
    return mean(question.score(tokenizer, answer) for question, answer in zip(asked, answers, strict=True))


def _ask(
    tokenizer: Any, task: Task | RulerTask, length: int, rng: random.Random, depth: float
) -> Question | RulerQuestion:
    if isinstance(task, Task):
        return make_question(tokenizer, task, length, rng, depth)
    return make_ruler_question(tokenizer, task, length, rng, depth)


def retrieval_tasks(case: EvaluateCase) -> list[Task | RulerTask]:
    """The retrieval tasks among those of ``case``."""
    return [*(TASKS if "recall" in case.tasks else ()), *(RULER_TASKS if "ruler" in case.tasks else ())]


def check_lengths(case: EvaluateCase, tokenizer: Any) -> None:
    """Raise ``ValueError`` for a length that leaves a task of ``case`` no room, before anything is measured."""
    for task in retrieval_tasks(case):
        _ask(tokenizer, task, min(case.lengths), random.Random(0), 0.0)


def measure_retrieval(run: Run, arms: Mapping[str, Arm], task: Task | RulerTask) -> None:
    """Ask every arm the questions of one task, cell by cell of its grid."""
    grid = Grid(run.case.lengths, questions=run.case.questions)
    tokenizer = run.session.loaded.tokenizer

    def answer(arm: Arm) -> list[list[float]]:
        def cell(length: int, depth: float) -> float:
            return run.remember(
                arm,
                task.name,
                lambda: retrieval_score(arm.model, tokenizer, task, length, depth, grid.questions),
                length=length,
                depth=depth,
            )

        return [[cell(length, depth) for depth in grid.depths] for length in grid.lengths]

    for label, scores in run.pieces(arms, answer, f"answering {task.name}").items():
        result = arms[label].result
        assert result.details is not None
        result.details["recall"] = (result.details["recall"] or {}) | {task.name: grid.to_details(scores)}
        overall = mean(value for row in scores for value in row)
        result.fidelity.recall = (result.fidelity.recall or {}) | {task.name: overall}
