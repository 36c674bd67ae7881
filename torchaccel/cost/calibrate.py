"""Fits the few coefficients of each implementation to timed samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from ..kernels.candidates import Candidate, Spec
from .calibration import UNMEASURED, Calibration, Coefficients, calibration_key
from .facts import DeviceFacts
from .roofline import Terms, terms
from .shape import Shape

Sample = tuple[Spec, Shape, Candidate, float]

# Errors of logarithms beyond this count linearly: a sample that a stranger's process slowed down must not bend the fit.
ROBUST = 0.2
# How strongly coefficients are held at their start where the samples say little about them.
PRIOR = 3e-4
# The search multiplies or divides one coefficient at a time by e ** step.
FIRST_STEP, LAST_STEP = 1.0, 0.02
# Where the search begins for coefficients whose default is 0.
START = {"row_ns": 0.1, "code_ns": 0.02, "piece_us": 0.1, "call_us": 1.0}
LEAST_SAMPLES = 4


def calibrate(samples: Iterable[Sample], facts: DeviceFacts, source: str = "") -> Calibration:
    """Fit coefficients for every implementation, kernel and format in ``samples``: (spec, shape, candidate, ms).

    Relative errors are what counts when candidates are ranked, so the fit is of logarithms: it makes the sum of
    Huber losses of log(predicted / measured) small, by a pattern search over the logarithms of the coefficients. The
    prediction takes a maximum, so it has no closed solution; with eight unknowns the search takes milliseconds. Groups
    of fewer than ``LEAST_SAMPLES`` samples are left out.
    """
    groups: defaultdict[str, list[tuple[Terms, float]]] = defaultdict(list)
    for spec, shape, candidate, ms in samples:
        found = terms(spec, candidate, shape, facts)
        if found.feasible:
            groups[calibration_key(spec, candidate, facts.kind)].append((found, ms))
    large = {key: group for key, group in groups.items() if len(group) >= LEAST_SAMPLES}
    return Calibration({key: fit(group, UNMEASURED[facts.kind]) for key, group in large.items()}, source)


def fit(group: Sequence[tuple[Terms, float]], begin: Coefficients) -> Coefficients:
    """The coefficients under which ``Terms`` come closest to their measured milliseconds."""
    columns = ("memory", "cache", "flops", "rows", "codes", "launches", "pieces")
    rows = [[getattr(found, name) for name in columns] + [1e-3] for found, _ in group]
    matrix = torch.tensor(rows, dtype=torch.float64)
    target = torch.tensor([ms for _, ms in group], dtype=torch.float64).log()
    names = [field.name for field in fields(Coefficients)]
    start = torch.tensor([getattr(begin, name) or START.get(name, 1.0) for name in names], dtype=torch.float64).log()
    used = [i for i in range(len(names)) if bool((matrix[:, i] > 0).any())]
    best, least, step = start.clone(), _loss(matrix, target, start, start), FIRST_STEP
    while step > LAST_STEP:
        moved = False
        for i in used:
            for change in (step, -step):
                tried = best.clone()
                tried[i] += change
                loss = _loss(matrix, target, tried, start)
                if loss < least - 1e-9:
                    best, least, moved = tried, loss, True
        step = step if moved else step / 2
    found = dict(zip(names, best.exp().tolist(), strict=True))
    return Coefficients(**{name: found[name] if i in used else getattr(begin, name) for i, name in enumerate(names)})


def _loss(matrix: Tensor, target: Tensor, logs: Tensor, start: Tensor) -> float:
    # The same sum as Terms.milliseconds, for all samples at once.
    parts = matrix * logs.exp()
    predicted = torch.maximum(parts[:, :2].sum(1), parts[:, 2:5].sum(1)) + parts[:, 5:].sum(1)
    errors = torch.nn.functional.huber_loss(predicted.log(), target, delta=ROBUST)
    return float(errors + PRIOR * (logs - start).square().mean())
