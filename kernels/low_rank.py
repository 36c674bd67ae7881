"""Low-rank approximation by power iteration, with the same result on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 3
# A column of which orthogonalisation leaves less than this share holds nothing but rounding.
VANISHED = 1e-6
# The start's entries are the fractions of this times the squares of 1, 2, ...: spread evenly, and without a generator.
GOLDEN = 0.6180339887498949


def factors(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors whose product ``a.mT @ b`` approximates matrices ``x`` ``[..., T, D]``, by ``ROUNDS`` of power iteration.

    Returns a ``[..., rank, T]`` with orthonormal rows (zero rows where ``x`` has less rank) and b ``[..., rank, D]``,
    both float64, so that another order of summation is not seen in the float16 factors that are stored. The algorithm
    is that of GEAR (arXiv 2403.05527), but for its random start.
    """
    x = x.double()
    # Made on the CPU: a GPU may round the products differently.
    numbers = torch.arange(1, x.shape[-1] * rank + 1, dtype=torch.float64)
    start = (numbers * numbers * GOLDEN).frac().view(rank, x.shape[-1])
    b = start.to(x.device).expand(*x.shape[:-2], -1, -1)
    a = b
    for _ in range(ROUNDS):
        a = orthonormal(orthonormal(b) @ x.mT)
        b = a @ x
    return a, b


def orthonormal(rows: Tensor) -> Tensor:
    """Modified Gram-Schmidt of the rows of ``[..., r, n]``; rows that depend on those before become zero."""
    done: list[Tensor] = []
    for row in rows.unbind(-2):
        size = row.norm(dim=-1, keepdim=True)
        for other in done:
            row = row - (row * other).sum(-1, keepdim=True) * other
        left = row.norm(dim=-1, keepdim=True)
        done.append(torch.where(left > VANISHED * size, row / left, torch.zeros_like(row)))
    return torch.stack(done, -2)
