"""Greedy ``model.generate`` on a real prompt: time to the first token and time per token after it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .arms import Arm
from .fidelity import greedy_prefix
from .memory import transient_peak
from .recall import TASKS, recall_score
from .results import Result
from .session import Session
from .timing import Spread
from .variants import Variant


class TokenClock:
    """A streamer for ``generate`` that notes when tokens arrive; the prompt arrives first."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._arrivals: list[float] = []

    def put(self, _tokens: Tensor) -> None:
        """Called by ``generate`` with the prompt, then with every new token, already on the CPU."""
        self._arrivals.append(time.perf_counter())

    def end(self) -> None:
        """Called by ``generate`` at the end."""

    @property
    def ttft_ms(self) -> float:
        """Milliseconds from the call to the first new token."""
        return (self._arrivals[1] - self._started) * 1e3

    @property
    def tpot_ms(self) -> float:
        """Mean milliseconds of each token after the first."""
        return (self._arrivals[-1] - self._arrivals[1]) * 1e3 / max(1, len(self._arrivals) - 2)


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
    tokens: dict[str, Tensor] = {}
    clocks: dict[str, list[TokenClock]] = {}

    def once(arm: Arm) -> float:
        clock = TokenClock()
        found: list[Any] = []
        spent = arm.run(lambda: found.append(_generate(session, arm, prompt, clock)))
        tokens[arm.variant.label] = found[0].sequences[:, prompt.shape[1] :]
        clocks.setdefault(arm.variant.label, []).append(clock)
        return spent

    def start(arm: Arm) -> None:
        for _ in range(1 + case.warmup):
            once(arm)
        arm.result.fidelity.greedy_prefix = greedy_prefix(tokens[arm.variant.label], reference)
        clocks[arm.variant.label].clear()

    results, arms = session.prepare(variants, start)
    samples = session.race(arms, {label: partial(once, arm) for label, arm in arms.items()})
    session.finish(arms, samples, lambda arm: _finish(session, arm, prompt, clocks[arm.variant.label], recall))
    return Generated(results, {label: tokens[label] for label in samples}, reference)


@torch.no_grad()
def generate(
    model: Any, prompt: Tensor, new_tokens: int, clock: TokenClock | None = None, *, static: bool = False
) -> Any:
    """Exactly ``new_tokens`` greedy tokens after ``prompt``; the output has ``sequences`` and ``past_key_values``.

    ``static`` asks for a StaticCache instead of the default DynamicCache.
    """
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        return_dict_in_generate=True,
        **({"cache_implementation": "static"} if static else {}),
    )


def _generate(session: Session, arm: Arm, prompt: Tensor, clock: TokenClock | None = None) -> Any:
    return generate(arm.model, prompt, session.new_tokens, clock, static=arm.variant.kind == "static")


def _finish(session: Session, arm: Arm, prompt: Tensor, clocks: Sequence[TokenClock], recall: bool) -> None:
    import torchaccel

    case, result = session.case, arm.result
    assert result.ms is not None  # race() filled it in
    arm.describe(result.ms.median, phases=2)
    result.ms = None
    result.ttft_ms = Spread.of([clock.ttft_ms for clock in clocks])
    result.tpot_ms = Spread.of([clock.tpot_ms for clock in clocks])
    outputs: list[Any] = []
    transient = transient_peak(lambda: outputs.append(_generate(session, arm, prompt)), session.device)
    result.kv_bytes = torchaccel.kv_bytes(outputs[0].past_key_values)
    result.peak_bytes = session.facts.weight_bytes + transient
    if recall:
        session.progress.advance(f"{result.variant}: answering recall questions")
        result.fidelity.recall = {
            task.name: recall_score(arm.model, session.loaded.tokenizer, task, prompt.shape[1], case.recall_questions)
            for task in TASKS
        }
