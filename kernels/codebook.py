"""The table of numbers that codes of normally distributed values stand for."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .spec import KVFormat

MAX_ROUNDS = 10000


@lru_cache(maxsize=8)
def gaussian(bits: int) -> tuple[float, ...]:
    """The ``2**bits`` ascending numbers that normal values are best rounded to, in mean square (Lloyd 1982, Max 1960).

    Each is the mean of what is nearest to it: iterated from an even start until nothing moves.
    """
    count = 2**bits
    points = [(2 * i + 1 - count) * 4.0 / count for i in range(count)]
    for _ in range(MAX_ROUNDS):
        edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(points)), math.inf]
        moved = [(_density(a) - _density(b)) / (_below(b) - _below(a)) for a, b in pairwise(edges)]
        # Symmetric as the distribution is, whatever rounding did.
        moved = [(a - b) / 2 for a, b in zip(moved, reversed(moved), strict=True)]
        if max(abs(a - b) for a, b in zip(points, moved, strict=True)) < 1e-14:
            break
        points = moved
    return tuple(points)


def table(fmt: KVFormat) -> tuple[float, ...]:
    """What the codes of ``fmt`` stand for where the scale, the norm of a group, is 1."""
    return tuple(point / math.sqrt(fmt.group_size) for point in gaussian(fmt.bits))


def encode(fmt: KVFormat, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8, shape of x) and scales (float16 ``[..., 1]``) of groups ``[..., group]``, for ``decode``.

    A group is divided by its norm, each number rounded to the nearest of the table, and the scale is what gives the
    result the norm of the group: without that, scores would shrink by the variance which rounding to means takes away.
    """
    x = x.double()
    norm = x.norm(dim=-1, keepdim=True)
    points = torch.tensor(gaussian(fmt.bits), dtype=torch.float64, device=x.device)
    y = x / torch.where(norm > 0, norm, torch.ones_like(norm)) * math.sqrt(x.shape[-1])
    codes = torch.bucketize(y.contiguous(), (points[1:] + points[:-1]) / 2)
    rounded = points[codes].norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
    return codes.to(torch.uint8), (norm / rounded).half()


def decode(fmt: KVFormat, codes: Tensor, scales: Tensor) -> Tensor:
    """``table[code] * scale`` in float32, shape of ``codes``."""
    return torch.tensor(table(fmt), device=codes.device)[codes.long()] * scales.float()


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _below(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2
