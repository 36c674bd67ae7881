"""Whether a candidate computes what the reference computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from torchaccel.kernels import candidates, problem
from torchaccel.kernels.candidates import Candidate, Spec
from torchaccel.kernels.spec import AttentionSpec

# The reference keeps every score in float32, several times; shapes are cut down until they fit.
SCORE_BYTES = 2**27
MIN_TOKENS = 256
MIN_ROWS = 2


class WrongResultError(Exception):
    """A candidate's result is not that of the reference."""


def check(spec: Spec, run: Callable[..., Any], shape: Mapping[str, int], device: torch.device, seed: int) -> float:
    """Compare ``run`` with the reference on fresh inputs; returns the largest error of a result over its tolerance.

    Memory that the candidate allocates is NaN at first. Raises ``WrongResultError`` for a result that is off, and
    whatever ``run`` raises.
    """
    shape = checked_shape(spec, shape)
    args = problem.make(spec, shape, device, seed)
    theirs = problem.copied(args)
    expected = problem.results(spec, candidates.build(spec, Candidate("reference"))(*theirs), theirs)
    with _poisoned_memory():
        returned = run(*args)
    found = problem.results(spec, returned, args)
    if len(found) != len(expected):
        raise WrongResultError(f"{len(expected)} results are due; found {len(found)}")
    errors = [
        _error(got, due, tolerance, f"result {i}")
        for i, (got, due, tolerance) in enumerate(zip(found, expected, problem.tolerances(spec, device), strict=True))
    ]
    return max(errors)


def checked_shape(spec: Spec, shape: Mapping[str, int]) -> dict[str, int]:
    """``shape``, or where the reference would need too much memory one of fewer rows, then of fewer tokens."""
    cut = dict(shape)
    if not isinstance(spec, AttentionSpec):
        return cut

    def scores() -> int:
        queries = cut["S"] if spec.phase == "prefill" else cut["Q"]
        # Decode reads the cache back as float32 beside the scores.
        width = spec.group * queries + (spec.head_dim if spec.phase == "decode" else 0)
        return 4 * cut["B"] * cut["H_kv"] * width * cut["S"]

    while scores() > SCORE_BYTES and cut["B"] > MIN_ROWS:
        cut["B"] = max(MIN_ROWS, cut["B"] // 2)
    while scores() > SCORE_BYTES and cut["S"] > max(MIN_TOKENS, cut.get("Q", 1)):
        cut["S"] //= 2
    return cut


def _error(got: Tensor, due: Tensor, tolerance: float, name: str) -> float:
    if got.shape != due.shape or got.dtype != due.dtype:
        raise WrongResultError(f"{name} must be {due.dtype} {list(due.shape)}; found {got.dtype} {list(got.shape)}")
    a, b = got.double(), due.double()
    special = ~b.isfinite()
    if not torch.equal(torch.where(special, a, 0.0), torch.where(special, b, 0.0)):
        raise WrongResultError(f"{name} must be {_first(b, special)} in places; found {_first(a, special)}")
    a, b = a.masked_fill(special, 0.0), b.masked_fill(special, 0.0)
    if not a.isfinite().all():
        raise WrongResultError(f"{name} has {int((~a.isfinite()).sum())} values that are not finite")
    if not b.numel():
        return 0.0
    error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
    if error > tolerance:
        raise WrongResultError(f"{name} is off by {error:.2g} of its largest value; {tolerance:.2g} is allowed")
    return error


def _first(values: Tensor, where: Tensor) -> float:
    return float(values[where][0]) if where.any() else 0.0


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New tensors begin as NaN (integers as their largest value), so that what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
