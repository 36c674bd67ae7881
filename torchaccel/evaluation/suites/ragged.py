"""One long row in a batch of short ones, against the same tokens spread evenly: what the split strategy is worth."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels.candidates import Candidate, build, candidates
from .contender import Contender, Goal, Scenario
from .geometry import Geometry

ROWS, SHORT = 16, 512


def scenario(g: Geometry) -> Scenario:
    """Rows are padded on the left, and their masks say where they begin."""
    lengths = [g.decode] + [SHORT] * (ROWS - 1)
    even = [-(-sum(lengths) // ROWS)] * ROWS
    spec = g.spec("decode", mask="bool")
    seed = g.candidate(spec)
    found = [_contender(g, "torchaccel:even", even, build(spec, seed))]
    found.append(_contender(g, "torchaccel:stream", lengths, build(spec, seed)))
    for candidate in candidates(spec, g.device.type):
        if candidate != seed and _is_other_split(candidate):
            label = f"torchaccel:{dict(candidate.config)['split']}"
            found.append(_contender(g, label, lengths, build(spec, candidate)))
    goal = Goal(
        "torchaccel:stream",
        "of the ideal time's speed",
        1 / 1.1,
        lambda ms: ms["torchaccel:even"] / ms["torchaccel:stream"],
    )
    return Scenario(f"ragged {g.decode} + {ROWS - 1} x {SHORT}", found, lambda _: [goal], 15)


def _is_other_split(candidate: Candidate) -> bool:
    config = dict(candidate.config)
    return candidate.implementation == "cpp" and config.get("split") in ("kv", "single")


def _contender(g: Geometry, label: str, lengths: list[int], run: Any) -> Contender:
    longest = max(lengths)
    q = g.normal(ROWS, g.heads, 1)
    k, v = (g.normal(ROWS, g.kv_heads, longest + 1) for _ in range(2))
    mask = torch.zeros(ROWS, 1, 1, longest + 1, dtype=torch.bool, device=g.device)
    for row, length in zip(mask, lengths, strict=True):
        row[..., longest - length :] = True
    new = g.normal(ROWS, g.kv_heads, 1)
    lens = torch.tensor([0, longest, longest])
    call: Any = partial(run, q, new, new, k, v, lens, mask, None)
    return Contender(label, [call], *_work(g, lengths, q))


def _work(g: Geometry, lengths: list[int], q: Tensor) -> tuple[float, float]:
    tokens = sum(lengths) + len(lengths)
    return 2.0 * g.kv_heads * tokens * g.head_dim * q.itemsize, 4.0 * g.heads * tokens * g.head_dim
