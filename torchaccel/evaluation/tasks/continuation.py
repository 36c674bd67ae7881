"""Greedy continuations of real prompts: how long they stay equal to the float32 model's, and how long they take."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import mean
from typing import Any

from torch import Tensor

from ..arms import Arm
from ..fidelity import prefixes
from ..generate import Sample, generate
from ..timing import Spread
from .run import Run

TIMED_CALLS = 3


def continuation(model: Any, prompts: Tensor, new_tokens: int) -> Tensor:
    """The ``new_tokens`` greedy tokens ``[B, new_tokens]`` after ``prompts`` ``[B, S]``."""
    return generate(model, prompts, new_tokens).sequences[:, prompts.shape[1] :]


def summarise_prefixes(lengths: list[int], new_tokens: int) -> dict[str, Any]:
    """Mean and smallest of the common prefixes of all prompts, in tokens of ``new_tokens``."""
    return {"mean": mean(lengths), "min": min(lengths), "of": new_tokens, "prompts": len(lengths)}


def measure_continuation(run: Run, arms: Mapping[str, Arm]) -> None:
    """Continue the prompts of all windows with every arm, and time one batch of them."""
    case, session = run.case, run.session
    prompts = [(tokens[:, : case.prompt], rows) for tokens, rows in run.batches()]
    reference: list[Tensor] = []

    def compare(arm: Arm) -> list[int]:
        def compute() -> list[int]:
            if not reference:
                reference.extend(continuation(run.truth, prompt, case.new_tokens) for prompt, _ in prompts)
            lengths: list[int] = []
            for (prompt, rows), truth in zip(prompts, reference, strict=True):
                lengths += prefixes(continuation(arm.model, prompt, case.new_tokens), truth)[:rows]
            return lengths

        return run.remember(arm, "greedy", compute)

    for label, lengths in run.pieces(arms, compare, "continuing the prompts").items():
        result = arms[label].result
        found = summarise_prefixes(lengths, case.new_tokens)
        assert result.details is not None
        result.details["agreement"] = (result.details["agreement"] or {}) | {"greedy_prefix": found}
        result.fidelity.greedy_prefix = found["min"]
    _time(run, arms, prompts[0][0])
    session.progress.advance("timed")


def _time(run: Run, arms: Mapping[str, Arm], prompts: Tensor) -> None:
    """Whole ``generate`` calls on one batch of prompts, interleaved: time to the first token and per token after it."""
    samples: dict[str, list[Sample]] = {label: [] for label in arms}

    def once(arm: Arm) -> float:
        found = arm.generate(prompts, run.case.new_tokens)
        samples[arm.variant.label].append(found)
        return found.ms

    warm = run.pieces(arms, once, "warming up for the timing")
    alive = {label: arms[label] for label in warm}
    for label, arm in alive.items():
        samples[label].clear()
        arm.warm = True
    run.session.race(alive, {label: partial(once, arm) for label, arm in alive.items()})
    for label, arm in alive.items():
        if arm.result.status != "failed":
            arm.result.ms = None
            arm.result.ttft_ms = Spread.of([sample.ttft_ms for sample in samples[label]])
            arm.result.tpot_ms = Spread.of([sample.tpot_ms for sample in samples[label]])
