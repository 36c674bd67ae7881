"""The evaluation behind ``torchaccel evaluate``: fidelity, bytes and speed of every variant, in one document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .arms import Arm
from .bench import session_document
from .digests import text_digest, weights_digest
from .fidelity import truth_of
from .ledger import Ledger
from .machine import versions
from .models import is_encoder
from .results import Result
from .session import Session, fresh_compilers
from .tasks.continuation import TIMED_CALLS, measure_continuation
from .tasks.likelihood import measure_likelihood
from .tasks.retrieval import check_lengths, measure_retrieval, retrieval_tasks
from .tasks.run import EvaluateCase, Run
from .tasks.sensitivity import measure_sensitivity
from .tasks.similarity import measure_similarity
from .texts import byte_count, cut_windows
from .variants import Variant

DETAILS = ("perplexity", "agreement", "recall", "sensitivity", "similarity")


def run_evaluate(
    case: EvaluateCase,
    texts: Sequence[str],
    variants: Sequence[Variant],
    session: Session,
    command: Sequence[str] = (),
    journal: Path | None = None,
    save: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Evaluate ``variants`` of the session's model on ``texts`` and return the results document.

    ``journal`` keeps finished pieces, so that the same call after an interruption goes on where it was; it is removed
    once ``save`` has taken the document. Raises ``ValueError`` for what cannot be evaluated: too little text, a model
    without a tokenizer, a task for another kind of model.
    """
    loaded = session.loaded
    if loaded.tokenizer is None:
        raise ValueError(f"model {loaded.name!r} has no tokenizer, and evaluation reads text")
    encoder = is_encoder(loaded.model)
    case = case.for_model(encoder=encoder)
    context = {"case": case.to_dict(), "text": text_digest(texts), "model": session.facts.to_dict()}
    context |= {"weights": weights_digest(loaded.model), "versions": versions()}
    run = Run(session, case, Ledger(journal, context), truth_of(loaded.model), texts)
    with fresh_compilers(cold=False):
        results = _evaluate_encoder(run, variants) if encoder else _evaluate_lm(run, variants)
    document = session_document(session, results, command) | {"case": case.to_dict()}
    save(document)
    run.ledger.close()
    return document


def _evaluate_lm(run: Run, variants: Sequence[Variant]) -> list[Result]:
    case, session = run.case, run.session
    if case.reads_text:
        _cut(run)
    retrieval = retrieval_tasks(case)
    check_lengths(case, session.loaded.tokenizer)
    treated = [v for v in variants if v.kind == "torchaccel" and v.options] if "sensitivity" in case.tasks else []
    session.progress.begin(
        len(variants) * (1 + run.batch_count + len(retrieval) + 2 * ("agreement" in case.tasks))
        + TIMED_CALLS
        + len(treated) * session.facts.layers
    )
    results, arms = session.prepare(variants, lambda arm: None)
    for result in results:
        result.details = dict.fromkeys(DETAILS)
    if any(name in case.tasks for name in ("perplexity", "agreement")):
        measure_likelihood(run, arms)
    if "agreement" in case.tasks:
        measure_continuation(run, arms)
    for task in retrieval:
        measure_retrieval(run, arms, task)
    single = {variant.label: arms[variant.label] for variant in treated if variant.label in arms}
    run.pieces(single, lambda arm: measure_sensitivity(run, arm), "layer by layer")
    # Whose work was all done before an interruption compiles again, so that it can be described.
    idle = {label: arm for label, arm in arms.items() if label not in run.ran}
    prompt = torch.ones(case.batch, case.prompt, dtype=torch.long, device=session.device)
    run.pieces(idle, lambda arm: arm.generate(prompt, 2), "compiling")
    for arm in arms.values():
        _describe(arm)
    return results


def _cut(run: Run) -> None:
    case, tokenizer = run.case, run.session.loaded.tokenizer
    tokens = cut_windows(run.texts, tokenizer, case.window, case.windows)
    scored = tokens[:, case.prompt :]
    run.bytes_per_token = byte_count(tokenizer, scored) / scored.numel()
    run.windows = tokens.to(run.session.device)


def _evaluate_encoder(run: Run, variants: Sequence[Variant]) -> list[Result]:
    run.session.progress.begin(2 * len(variants))
    results, arms = run.session.prepare(variants, lambda arm: None)
    for result in results:
        result.details = dict.fromkeys(DETAILS)
    measure_similarity(run, arms)
    for arm in arms.values():
        _describe(arm)
    return results


def _describe(arm: Arm) -> None:
    """What was compiled; compile times are not measured here."""
    if arm.result.status != "failed":
        arm.describe(0.0, phases=2)
        arm.result.compile_s = {"cold": None, "warm": None}
