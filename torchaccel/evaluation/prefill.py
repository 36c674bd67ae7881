"""A whole prompt at once: time to the logits of its last token."""

from __future__ import annotations

from collections.abc import Sequence
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

    def start(arm: Arm) -> None:
        logits: list[Tensor] = []
        arm.run(lambda: logits.append(prefill(arm.model, prompt).logits[:, -1]))
        if truth is not None:
            arm.result.fidelity = compare_logits(logits[0], truth, eager)
        for _ in range(case.warmup):
            arm.run(lambda: prefill(arm.model, prompt))

    results, arms = session.prepare(variants, start)
    calls = {label: partial(arm.run, partial(prefill, arm.model, prompt)) for label, arm in arms.items()}
    samples = session.race(arms, calls)
    session.finish(arms, samples, lambda arm: _finish(session, arm, prompt))
    return results


@torch.no_grad()
def prefill(model: torch.nn.Module, prompt: Tensor) -> Any:
    """Run ``prompt`` ``[B, S]`` through ``model`` with an empty cache; its output holds logits ``[B, 1, V]``."""
    return model(prompt, use_cache=True, logits_to_keep=1)


def _finish(session: Session, arm: Arm, prompt: Tensor) -> None:
    import torchaccel

    case, result = session.case, arm.result
    assert result.ms is not None  # race() filled it in
    arm.describe(result.ms.median, phases=1)
    if session.work is not None:
        result.bound_ms = prefill_floor(
            session.work, arm.applied, session.machine, batch=case.batch, context=case.context
        )
    result.density = density(case.context, arm.applied, decode=False)
    caches: list[Any] = []
    transient = transient_peak(lambda: caches.append(prefill(arm.model, prompt).past_key_values), session.device)
    result.kv_bytes = torchaccel.kv_bytes(caches[0])
    # The cache is made within the call, so its bytes are part of the peak already.
    result.peak_bytes = session.facts.weight_bytes + transient
