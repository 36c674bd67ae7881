"""Cases of merging partial attentions: random parts, some of them empty, against the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchaccel.kernels import reference
from torchaccel.kernels.spec import DTYPES
from torchaccel.kernels.triton.merge import merge

from .decode_cases import TOLERANCE, difference


@dataclass(frozen=True)
class MergeCase:
    """So many parts of ``[batch, heads, queries, head_dim]``; a third of the rows of each have seen no key."""

    name: str
    parts: int
    dtype: str = "float32"
    head_dim: int = 64
    queries: int = 3


MERGE_CASES = [
    MergeCase("merge_one", 1),
    MergeCase("merge_two", 2, dtype="bfloat16", head_dim=80, queries=1),
    MergeCase("merge_three", 3, dtype="float16", head_dim=42),
    MergeCase("merge_in_rounds", 37, dtype="bfloat16", head_dim=128),
]


def run_merge_case(case: MergeCase, device: torch.device) -> str | None:
    """Run ``case`` on ``device`` against the reference: None when it agrees, else what differs."""
    generator = torch.Generator().manual_seed(0)
    parts: list[tuple[Tensor, Tensor]] = []
    for _ in range(case.parts):
        # Not contiguous: heads behind the queries.
        out = torch.randn(2, case.queries, 3, case.head_dim, generator=generator).transpose(1, 2)
        lse = 5 * torch.randn(2, case.queries, 3, generator=generator).transpose(1, 2)
        empty = torch.rand(lse.shape, generator=generator) < 0.3
        # One row has no key in any part.
        empty[1, 2, -1] = True
        out, lse = out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)
        parts.append((out.to(DTYPES[case.dtype]), lse))
    got = merge([(out.to(device), lse.to(device)) for out, lse in parts])
    for name, x, y in zip(("out", "lse"), got, reference.merge(parts), strict=True):
        if found := difference(name, x.cpu(), y, TOLERANCE[case.dtype]):
            return found
    return None
