"""The fewest lines that cover a part of what sampled rows attend to, found greedily (LoopServe)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import registry
from ..row_reference import last_rows
from ..spec import AttentionSpec
from .base import EXPECTED, PromptSelector, expected_share


@dataclass(frozen=True)
class CoveringLines(PromptSelector):
    """Block columns and block diagonals that hold ``alpha`` of the attention of sampled rows.

    The rows are the last ``recent`` and ``sampled`` earlier ones, one at a random place in each of as many equal parts
    of the prompt before; ``seed`` fixes the places. expected: the share of the causal
    pairs that the lists are thought to hold. See ``line_cover`` for the choice. LoopServe (arXiv:2507.13681).
    """

    alpha: float = 0.955
    recent: int = 32
    sampled: int = 32
    seed: int = 0
    expected: float = EXPECTED

    def select(self, spec: AttentionSpec, q: Tensor, k: Tensor, first: Tensor | None) -> Tensor:
        rows = self.rows(q.shape[2], q.shape[0], q.device, first)
        device = q.device.type
        weights = registry.block_weights(spec, device).run(q, k, rows, first, self.block)
        columns, diagonals = registry.line_cover(device)(weights, rows // self.block, self.alpha)
        lists: Tensor = registry.block_lists(device)(columns, diagonals, None, first, self.block)
        return lists

    def rows(self, tokens: int, batch: int, device: torch.device, first: Tensor | None) -> Tensor:
        """Positions of the sampled rows: int64 ``[B, R]``."""
        last = last_rows(tokens, self.recent, batch, device)
        if tokens <= self.recent:
            return last
        places = torch.rand(self.sampled, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        parts = ((torch.arange(self.sampled) + places) / max(self.sampled, 1)).to(device)
        begin = torch.zeros(batch, dtype=torch.int64, device=device) if first is None else first
        room = (tokens - self.recent - begin).clamp(min=0)
        return torch.cat([begin[:, None] + (parts * room[:, None]).long(), last], 1)

    def share(self, tokens: int) -> float:
        return expected_share(tokens, self.alpha, self.block, self.expected)

    def effort(self, tokens: int) -> float:
        # 0.008 at 16,384 tokens, 12 and 4 heads of 64 in bfloat16: CPU time of one thread of an EPYC core, other work
        # beside it.
        return min(1.0, 2 * (self.recent + self.sampled) / max(tokens, 1))
