"""Which candidate runs a spec at which length, and whether a lossy site is worth it at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

from ..kernels.candidates import Candidate, candidates
from ..kernels.plan import Plan
from ..kernels.spec import AttentionSpec
from .calibration import Calibration
from .facts import DeviceFacts
from .roofline import INFEASIBLE, predict_ms
from .shape import AttentionShape

LONGEST = 2**20
# A switch has to pay: the model cannot tell apart what is closer, and every switch compiles one more kernel.
GAIN = 1.05


class Tuned(Protocol):
    """What was measured on this machine, such as ``torchaccel.tuning`` keeps it."""

    def __call__(self, spec: AttentionSpec, shape: AttentionShape, candidate: Candidate) -> float | None:
        """Milliseconds of a call; None where nothing was measured."""

    def failure(self, spec: AttentionSpec, shape: AttentionShape, candidate: Candidate) -> object | None:
        """How a candidate failed, in which case it is never chosen; None when it did not."""


@dataclass(frozen=True)
class Verdict:
    """Whether a site that was asked for pays.

    predicted_ms, exact_ms: one call of the asked and of the exact site. switch_tokens: the least number of stored
    tokens from which the asked site is faster; None where it never is. text: all of this in one line.
    """

    ok: bool
    predicted_ms: float
    exact_ms: float
    switch_tokens: int | None
    text: str


def choose(
    spec: AttentionSpec,
    choices: Sequence[Candidate],
    shape: AttentionShape,
    facts: DeviceFacts,
    tuned: Tuned | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """The fastest of ``choices`` for every number of stored tokens, with the lengths where it changes.

    ``shape.tokens`` is ignored: all lengths up to ``LONGEST`` are covered, and the last pick goes on beyond. What
    ``tuned`` measured counts instead of a prediction; candidates that failed or do not fit the device are not taken.
    Raises ``ValueError`` where none remains.
    """

    def cost(candidate: Candidate, tokens: int) -> float:
        return candidate_ms(spec, candidate, shape.at(tokens), facts, tuned, calibration)

    def best(tokens: int) -> Candidate:
        costs = [cost(candidate, tokens) for candidate in choices]
        if min(costs, default=INFEASIBLE) == INFEASIBLE:
            names = ", ".join(candidate.key() for candidate in choices) or "none"
            raise ValueError(
                f"no candidate runs {spec.key()} on {facts.name}; tried {names}: add the reference to them"
            )
        # The first that is as good as the best: the candidates' order is their makers' preference.
        return next(candidate for candidate, ms in zip(choices, costs, strict=True) if ms <= min(costs) * GAIN)

    lengths = _lengths(shape.queries if spec.phase == "decode" else 1)
    current = best(lengths[0])
    picks: list[tuple[int | None, Candidate]] = []
    for shorter, longer in pairwise(lengths):
        winner = best(longer)

        def pays(tokens: int, old: Candidate = current, new: Candidate = winner) -> bool:
            return cost(new, tokens) * GAIN < cost(old, tokens)

        if winner != current and pays(longer):
            picks.append((first_true(pays, shorter, longer) - 1, current))
            current = winner
    # What is decided before the first length holds for no tokens at all.
    return Plan(spec, (*((limit, old) for limit, old in picks if limit), (None, current)))


def candidate_ms(
    spec: AttentionSpec,
    candidate: Candidate,
    shape: AttentionShape,
    facts: DeviceFacts,
    tuned: Tuned | None = None,
    calibration: Calibration | None = None,
) -> float:
    """Milliseconds of a candidate: measured where ``tuned`` knows it, else predicted; infinite where it cannot run."""
    if tuned is not None:
        if tuned.failure(spec, shape, candidate) is not None:
            return INFEASIBLE
        measured = tuned(spec, shape, candidate)
        if measured is not None:
            return measured
    return predict_ms(spec, candidate, shape, facts, calibration)


def gate(
    asked: AttentionSpec,
    exact: AttentionSpec,
    shape: AttentionShape,
    facts: DeviceFacts,
    tuned: Tuned | None = None,
    calibration: Calibration | None = None,
    choices: Callable[[AttentionSpec, str], Sequence[Candidate]] = candidates,
    density: Callable[[int], float] | None = None,
) -> Verdict:
    """Whether a sparse or quantised site is faster than the exact one at ``shape``, each with its best candidate.

    ``shape.density`` belongs to the asked site, ``density`` gives it by the number of tokens; the exact one reads
    everything that its mask lets it see. A site is refused only where it is slower by more than the model's error,
    ``GAIN``.
    """
    of_asked, of_exact = choices(asked, facts.kind), choices(exact, facts.kind)
    whole = AttentionShape(shape.batch, shape.kv_heads, shape.queries, shape.tokens, None, shape.sites)

    def both(tokens: int) -> tuple[float, float]:
        ours, theirs = shape.at(tokens), whole.at(tokens)
        if density is not None:
            ours = replace(ours, density=density(tokens))
        if asked.phase == "prefill":
            ours, theirs = replace(ours, queries=tokens), replace(theirs, queries=tokens)
        costs = (
            min(candidate_ms(spec, c, sizes, facts, tuned, calibration) for c in found)
            for spec, found, sizes in ((asked, of_asked, ours), (exact, of_exact, theirs))
        )
        return next(costs), next(costs)

    def pays(tokens: int) -> bool:
        ours, theirs = both(tokens)
        return ours < theirs

    predicted, reference = both(shape.tokens)
    lengths = _lengths(shape.queries if asked.phase == "decode" else 1)
    switch = None
    # From the top: the length from which on it pays at every longer one.
    for shorter, longer in reversed([(0, lengths[0]), *pairwise(lengths)]):
        if not pays(longer):
            break
        switch = first_true(pays, shorter, longer)
    ok = predicted <= reference * GAIN
    turn = "it pays at no length" if switch is None else f"it pays from {switch} tokens on"
    text = (
        f"{_describe(asked)} over {shape.tokens} tokens: {predicted:.4g} ms predicted on {facts.name}, "
        f"exact {reference:.4g} ms; {turn}"
    )
    return Verdict(ok, predicted, reference, switch, text)


def _describe(spec: AttentionSpec) -> str:
    kinds = sorted({fmt.kind for fmt in (spec.key_format, spec.value_format)} - {"dense"})
    parts = [*kinds, *([f"window {spec.sinks} + {spec.window}"] if spec.window is not None else [])]
    parts += [f"lists of {spec.index}"] if spec.index != "contiguous" else []
    return f"{' and '.join(parts) or 'dense'} {spec.phase} attention"


def _lengths(shortest: int) -> list[int]:
    """Two lengths in every octave: kernels change their behaviour where a cache overflows or a tile is full."""
    steps = [n for k in range(LONGEST.bit_length()) for n in (2**k, 3 * 2**k // 2)]
    return [n for n in sorted(set(steps)) if shortest <= n <= LONGEST]


def first_true(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The least number in ``low + 1 .. high`` from which ``holds`` is true, by bisection; it is true at ``high``."""
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high
