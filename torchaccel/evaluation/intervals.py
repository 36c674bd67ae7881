"""Ratios of paired measurements with a confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

import torch

RESAMPLES = 10_000


def paired_ratio(log_ratios: Sequence[float]) -> tuple[float, list[float] | None]:
    """exp of the mean of ``log_ratios``, one of each pair, and its 95 % interval.

    The interval is the percentile bootstrap over pairs, seeded; None for a single pair.
    """
    values = torch.tensor(log_ratios, dtype=torch.float64)
    ratio = exp(values.mean().item())
    if len(values) < 2:
        return ratio, None
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    means = values[drawn].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).exp().tolist()
    return ratio, [low, high]
