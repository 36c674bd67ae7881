"""A whole prompt at once: time to the logits of its last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .arms import Arm
from .fidelity import compare_logits, float32_copy
from .memory import transient_peak
from .prompts import prompt_tokens
from .results import Result
from .roofline import density, prefill_floor
from .session import Session
from .variants import Variant


def run_prefill(session: Session, variants: Sequence[Variant]) -> list[Result]:
    """Measure ``variants`` on prompts of ``case.context`` tokens, only the last token's logits kept.

    The same prompt is used for all: text of the demo excerpt where the model has a tokenizer, else random tokens.
    """
    case = session.case
    prompt = prompt_tokens(session.loaded, case.batch, case.context, session.device)
    session.progress.begin(len(variants) + case.rounds + 2)
    truth = eager = None
    if case.fidelity:
        session.progress.advance("float32 reference")
        truth = prefill(float32_copy(session.loaded.model), prompt).logits[:, -1]
        eager = prefill(session.loaded.model, prompt).logits[:, -1]

    def once(arm: Arm) -> Any:
        return prefill(arm.model, prompt, arm.runner.new_cache(arm.model, prompt.shape[1]))

    def start(arm: Arm) -> None:
        logits: list[Tensor] = []
        arm.run(lambda: logits.append(once(arm).logits[:, -1]))
        if truth is not None:
            arm.result.fidelity = compare_logits(logits[0], truth, eager)
        for _ in range(case.warmup):
            arm.run(lambda: once(arm))

    results, arms = session.prepare(variants, start)
    samples = session.race(arms, {label: partial(arm.run, partial(once, arm)) for label, arm in arms.items()})
    session.finish(arms, samples, lambda arm: _finish(session, arm, partial(once, arm)))
    session.compile_again(arms, samples, lambda arm: arm.run(lambda: once(arm)))
    return results


@torch.no_grad()
def prefill(model: torch.nn.Module, prompt: Tensor, cache: Any = None) -> Any:
    """Run ``prompt`` ``[B, S]`` through ``model``; its output holds logits ``[B, 1, V]`` and the filled cache.

    ``cache`` is an empty one, or None for the one the model makes.
    """
    return model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _finish(session: Session, arm: Arm, once: Callable[[], Any]) -> None:
    case, result = session.case, arm.result
    assert result.ms is not None  # race() filled it in
    arm.describe(result.ms.median, phases=1)
    predicted = session.predicted(arm)
    result.predicted_ms = None if predicted is None else round(predicted.prefill_ms, 4)
    if arm.applied is not None:
        if result.density is None:
            result.density = density(case.context, arm.applied, decode=False)
        if session.work is not None:
            result.bound_ms = prefill_floor(
                session.work, arm.applied, session.machine, batch=case.batch, context=case.context
            )
    caches: list[Any] = []
    transient = transient_peak(lambda: caches.append(once().past_key_values), session.device)
    result.kv_bytes = arm.runner.kv_bytes(caches[0])
    # The cache is made within the call, so its bytes are part of the peak already.
    result.peak_bytes = session.facts.weight_bytes + transient
