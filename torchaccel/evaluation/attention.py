"""The attention operator alone: milliseconds per call on a model's geometry, with nothing of it left in the caches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from .arms import Arm
from .memory import transient_peak
from .operators.problem import Problem
from .results import Fidelity, Result
from .roofline import attention_floor, density
from .session import Session
from .variants import Variant


def run_attention(session: Session, variants: Sequence[Variant]) -> list[Result]:
    """Measure ``variants`` on one layer's attention in ``case.phase``, over ``case.context`` tokens of random content.

    Errors are distances to dense float32 attention on the same content, so a method that leaves keys out shows what
    that costs on content without any structure.
    """
    case, model = session.case, session.loaded.model
    session.progress.begin(len(variants) + case.rounds + 1)
    session.progress.advance("float32 reference")
    problem = Problem.draw(model, session.facts, str(case.phase), case.batch, case.context)
    truth = problem.truth()

    def start(arm: Arm) -> None:
        results: list[Tensor] = []
        arm.run(lambda: results.append(arm.model()))
        arm.result.fidelity = Fidelity(max_abs_err_vs_fp32=problem.error(results[0], truth))
        for _ in range(case.warmup):
            arm.run(arm.model)

    results, arms = session.prepare(variants, start, problem)
    stock = arms["sdpa"].result.fidelity.max_abs_err_vs_fp32 if "sdpa" in arms else None
    for arm in arms.values():
        arm.result.fidelity.eager_max_abs_err_vs_fp32 = stock
    measured = session.race(arms, {label: partial(arm.run, arm.model) for label, arm in arms.items()})
    session.finish(arms, measured, lambda arm: _finish(session, arm))
    session.compile_again(arms, measured, lambda arm: arm.run(arm.model))
    return results


def _finish(session: Session, arm: Arm) -> None:
    case, result = session.case, arm.result
    assert result.ms is not None  # race() filled it in
    arm.describe(result.ms.median, phases=1)
    if arm.applied is not None:
        decode = case.phase == "decode"
        result.density = density(case.context, arm.applied, decode=decode)
        result.bound_ms = attention_floor(
            session.facts, arm.applied, session.machine, batch=case.batch, context=case.context, decode=decode
        )
    result.kv_bytes = arm.model.kv_bytes
    result.peak_bytes = result.kv_bytes + transient_peak(arm.model, session.device)
