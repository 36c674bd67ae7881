"""Cases of gathering the same tokens of several tensors, against the reference: not a bit may differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchaccel.kernels import gather_reference
from torchaccel.kernels.gather_spec import GatherSpec
from torchaccel.kernels.triton.gather_tokens import gather_tokens

from tests.kernels.gather_cases import SPEC, gather_case


@dataclass(frozen=True)
class GatherCase:
    """``kept`` of ``tokens`` tokens in each of ``batch`` rows; hidden states of ``width``."""

    name: str
    batch: int = 1
    tokens: int = 1
    kept: int = 1
    width: int = 33

    def spec(self) -> GatherSpec:
        """The spec of all cases."""
        return SPEC


# The interpreter takes 20 ms for a row.
GATHER_CASES = [
    GatherCase("gather_one_row", 1, 6, 3),
    GatherCase("gather_three_rows", 3, 7, 4),
    GatherCase("gather_wide", 2, 5, 2, width=1500),
    GatherCase("gather_one_token", 2, 1, 1),
    GatherCase("gather_nothing", 2, 5, 0),
]


def run_gather_case(case: GatherCase, device: torch.device) -> str | None:
    """Run ``case`` on ``device`` against the reference: None when it agrees, else what differs."""
    inputs, index = gather_case(case.batch, case.tokens, case.kept, case.width)
    expected = gather_reference.gather_tokens(SPEC, inputs, index)
    got = gather_tokens(SPEC)([x.to(device) for x in inputs], index.to(device))
    for number, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        if ours.shape != theirs.shape or not torch.equal(ours.cpu(), theirs):
            return f"result {number}: {ours} instead of {theirs}"
    return None
