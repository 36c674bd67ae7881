"""One new token at a time after a long cache: every variant steps in its turn on the same cache content."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from .arms import Arm
from .fidelity import compare_logits, float32_copy
from .memory import transient_peak
from .models import ModelFacts, require_transformers, text_config
from .results import Result
from .roofline import decode_floor, density
from .runner import Content
from .session import Session
from .variants import Variant

FIDELITY_STEPS = 2
# Steps of a turn. The first one, which is not timed, finds the processor's caches full of what other variants read.
TURN = 5
# Inductor compiles the first step for one length and the second for every length; the third is a usual one.
COMPILING_STEPS = 3


def run_decode(session: Session, variants: Sequence[Variant]) -> list[Result]:
    """Measure ``variants`` on decode steps after ``case.context`` cached tokens of random content.

    The first steps of every variant are compared with the float32 eager model on the same content; the timed steps
    follow, in turns of ``TURN`` steps, as a decoder makes one after another. A sample is the mean of a turn's steps but
    the first. The cache holds plain tensors that are shared by all variants until each one's first step.
    """
    case = session.case
    content = random_content(session.facts, case.batch, case.context, session.device)
    # Two steps for the memory profile come after the timed ones.
    steps = FIDELITY_STEPS + case.warmup + case.rounds * TURN + 2
    tokens = _tokens(session, steps)
    truth = eager = None
    session.progress.begin(len(variants) + case.rounds + 2)
    if case.fidelity:
        session.progress.advance("float32 reference")
        truth = _first_logits(float32_copy(session.loaded.model), content, tokens)
        eager = _first_logits(session.loaded.model, content, tokens)
    decoders: dict[str, Decoder] = {}

    def start(arm: Arm) -> None:
        decoder = Decoder(arm, arm.runner.filled_cache(arm.model, content, case.context + steps), tokens)
        logits = torch.cat([decoder.step() for _ in range(FIDELITY_STEPS)])
        if truth is not None:
            arm.result.fidelity = compare_logits(logits, truth, eager)
        for _ in range(case.warmup):
            decoder.step()
        decoders[arm.variant.label] = decoder

    results, arms = session.prepare(variants, start)
    content.clear()
    samples = session.race(arms, {label: decoders[label].timed_turn for label in arms})
    session.finish(arms, samples, lambda arm: _finish(session, arm, decoders[arm.variant.label]))
    decoders.clear()

    def again(arm: Arm) -> None:
        content = random_content(session.facts, case.batch, case.context, session.device)
        cache = arm.runner.filled_cache(arm.model, content, case.context + steps)
        decoder = Decoder(arm, cache, tokens)
        for _ in range(COMPILING_STEPS):
            decoder.step()

    session.compile_again(arms, samples, again)
    return results


class Decoder:
    """A model with its cache and the tokens it is fed, ``[steps, B, 1]``."""

    def __init__(self, arm: Arm, cache: Any, tokens: Tensor) -> None:
        self.arm = arm
        self.cache = cache
        self._tokens = iter(tokens)
        self._last_ms = 0.0

    @torch.no_grad()
    def step(self) -> Tensor:
        """Feed the next token; the logits ``[B, V]`` it gives."""
        token = next(self._tokens)
        logits: list[Tensor] = []

        def call() -> None:
            out = self.arm.model(token, past_key_values=self.cache, use_cache=True)
            self.cache = out.past_key_values
            logits.append(out.logits)

        self._last_ms = self.arm.run(call)
        # A copy: the next replay of a CUDA graph writes its result to the same place.
        return logits[0][:, -1].clone()

    def timed_turn(self) -> float:
        """Feed the next ``TURN`` tokens; the milliseconds that one took, the mean of all but the first."""
        took = []
        for _ in range(TURN):
            self.step()
            took.append(self._last_ms)
        return mean(took[1:])


def random_content(facts: ModelFacts, batch: int, context: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Seeded normal keys and values ``[B, H_kv, context, D]`` in the model's dtype for every layer."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, facts.kv_heads, context, facts.head_dim)
    dtype = getattr(torch, facts.dtype)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return [(draw(), draw()) for _ in range(facts.layers)]


def _tokens(session: Session, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    vocabulary = text_config(session.loaded.model).vocab_size
    shape = (steps, session.case.batch, 1)
    return torch.randint(2, vocabulary, shape, generator=generator).to(session.device)


@torch.no_grad()
def _first_logits(model: torch.nn.Module, content: Content, tokens: Tensor) -> Tensor:
    """Logits ``[FIDELITY_STEPS * B, V]`` of an eager ``model`` on ``content`` in its own dtype."""
    dtype = next(model.parameters()).dtype
    cache = require_transformers().DynamicCache(
        [(keys.to(dtype), values.to(dtype)) for keys, values in content], config=text_config(model)
    )
    rows = [model(token, past_key_values=cache, use_cache=True).logits[:, -1] for token in tokens[:FIDELITY_STEPS]]
    return torch.cat(rows)


def _finish(session: Session, arm: Arm, decoder: Decoder) -> None:
    case, result = session.case, arm.result
    assert result.ms is not None  # race() filled it in
    arm.describe(result.ms.median, phases=1)
    predicted = session.predicted(arm)
    result.predicted_ms = None if predicted is None else round(predicted.decode_ms, 4)
    if arm.applied is not None:
        result.density = density(case.context, arm.applied, decode=True)
        if session.work is not None:
            result.bound_ms = decode_floor(
                session.work, arm.applied, session.machine, batch=case.batch, context=case.context
            )
    transient = transient_peak(decoder.step, session.device)
    result.kv_bytes = arm.runner.kv_bytes(decoder.cache)
    result.peak_bytes = session.facts.weight_bytes + result.kv_bytes + transient
