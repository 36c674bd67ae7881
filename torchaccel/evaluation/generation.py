"""Greedy ``model.generate`` on a real prompt: time to the first token and time per token after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from .arms import Arm
from .fidelity import greedy_prefix
from .generate import Sample, generate
from .recall import TASKS, recall_score
from .results import Result
from .roofline import decode_floor
from .session import Session
from .timing import Spread
from .variants import Variant


@dataclass(frozen=True)
class Generated:
    """Records of all variants, the new tokens ``[B, n]`` of each that ran, and those of plain eager."""

    results: list[Result]
    tokens: dict[str, Tensor]
    reference: Tensor


def run_generate(session: Session, variants: Sequence[Variant], prompt: Tensor) -> Generated:
    """Measure ``variants`` generating ``case.new_tokens`` tokens after ``prompt`` ``[B, S]``.

    ``speedup`` compares whole calls. With ``case.recall_questions`` every variant also answers that many questions of
    each recall task, in prompts of the same length.
    """
    case = session.case
    recall = bool(case.recall_questions and session.loaded.tokenizer is not None)
    session.progress.begin(len(variants) * (2 if recall else 1) + case.rounds + 1)
    session.progress.advance("eager reference")
    reference = generate(session.loaded.model, prompt, session.new_tokens).sequences[:, prompt.shape[1] :]
    samples: dict[str, list[Sample]] = {}

    def once(arm: Arm) -> float:
        found = arm.generate(prompt, session.new_tokens)
        samples[arm.variant.label].append(found)
        return found.ms

    def start(arm: Arm) -> None:
        samples[arm.variant.label] = []
        for _ in range(1 + case.warmup):
            once(arm)
        last = samples[arm.variant.label].pop()
        arm.result.fidelity.greedy_prefix = greedy_prefix(last.tokens, reference)
        arm.result.kv_bytes = last.kv_bytes
        samples[arm.variant.label].clear()

    results, arms = session.prepare(variants, start)
    measured = session.race(arms, {label: partial(once, arm) for label, arm in arms.items()})
    session.finish(arms, measured, lambda arm: _finish(session, arm, prompt, samples[arm.variant.label], recall))
    session.compile_again(arms, measured, once)
    return Generated(results, {label: samples[label][-1].tokens for label in measured}, reference)


def _finish(session: Session, arm: Arm, prompt: Tensor, samples: Sequence[Sample], recall: bool) -> None:
    case, result = session.case, arm.result
    assert result.ms is not None  # race() filled it in
    arm.describe(result.ms.median, phases=2)
    result.ms = None
    result.ttft_ms = Spread.of([found.ttft_ms for found in samples])
    result.tpot_ms = Spread.of([found.tpot_ms for found in samples])
    result.bound_ms = _token_floor(session, arm, prompt)
    result.kv_bytes = samples[-1].kv_bytes
    result.peak_bytes = session.facts.weight_bytes + arm.generate_peak(prompt, session.new_tokens)
    if recall:
        session.progress.advance(f"{result.variant}: answering recall questions")
        result.fidelity.recall = {
            task.name: recall_score(arm.model, session.loaded.tokenizer, task, prompt.shape[1], case.recall_questions)
            for task in TASKS
        }


def _token_floor(session: Session, arm: Arm, prompt: Tensor) -> float | None:
    """The floor of a decode step half-way through the new tokens; None where it is not known how many are left."""
    applied = arm.applied
    if session.work is None or applied is None or "token_pruning" in applied:
        return None
    batch, length = prompt.shape
    middle = length + session.new_tokens // 2
    return decode_floor(session.work, applied, session.machine, batch=batch, context=middle)
