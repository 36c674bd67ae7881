"""A pattern for every head: lines by the last rows' attention, a fixed band, or blocks by their means (MInference)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import registry
from ..spec import AttentionSpec
from .base import PromptSelector, banded_share
from .estimated import EstimatedBlocks
from .lines import diagonal_blocks, live_tokens, marked, top

# Heads without a plan, and what is always part of it: MInference's published code.
ROWS, SINKS, NEAREST = 64, 30, 100

Pattern = tuple[str, int, int]


@dataclass(frozen=True)
class HeadPatterns(PromptSelector):
    """``heads``: a pattern for every query head, or one for all.

    ("vertical_and_slash", c, d): the c columns and the d diagonals that the last 64 queries attend to most; the first
    30 columns and the nearest 100 diagonals are always among them (MInference, arXiv:2407.02490). ("a_shape", n, m):
    the first n tokens and the nearest m, the query's own included. ("block_sparse", n, 0): the n best blocks by the
    product of their means. Columns and diagonals are rounded up to blocks.
    """

    heads: tuple[Pattern, ...] = ()

    def select(self, spec: AttentionSpec, q: Tensor, k: Tensor, first: Tensor | None) -> Tensor:
        heads, tokens = q.shape[1], q.shape[2]
        patterns = self.heads * heads if len(self.heads) == 1 else self.heads
        if len(patterns) != heads:
            raise ValueError(f"a pattern for each of {heads} heads, or one for all, is needed; found {len(patterns)}")
        device, count = q.device, -(-tokens // self.block)

        def sizes(of: str, field: int) -> Tensor:
            """A number of every head's pattern, 0 for heads of other patterns: int64 ``[H]``."""
            return torch.tensor([pattern[field] if pattern[0] == of else 0 for pattern in patterns])

        columns, diagonals = self._band(sizes("a_shape", 1).to(device), sizes("a_shape", 2).to(device), first, count)
        if any(kind == "vertical_and_slash" for kind, _, _ in patterns):
            vertical, slash = sizes("vertical_and_slash", 1), sizes("vertical_and_slash", 2)
            found = self._lines(spec, q, k, first, vertical, slash)
            here = torch.tensor([kind == "vertical_and_slash" for kind, _, _ in patterns], device=device)[:, None]
            columns, diagonals = columns | (found[0] & here), diagonals | (found[1] & here)
        flags = [x.expand(q.shape[0], -1, -1) for x in (columns, diagonals)]
        lists: Tensor = registry.block_lists(device.type)(*flags, None, first, self.block)
        for best in sorted({n for kind, n, _ in patterns if kind == "block_sparse"}):
            by_means = EstimatedBlocks(self.block, "mean", self.block, best, sinks=0)
            chosen = by_means.select(spec, q, k, first)
            chosen = torch.nn.functional.pad(chosen, (0, count - best), value=-1)  # or cut, what is beyond is empty
            here = (sizes("block_sparse", 1) == best).to(device)
            lists = torch.where(here[:, None, None], chosen, lists)
        return lists

    def _band(self, sinks: Tensor, near: Tensor, first: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        """Block columns of the first ``sinks`` ``[H]``, block diagonals of the ``near``: bool ``[B | 1, H, N]``."""
        block = torch.arange(count, device=sinks.device)
        end = sinks[:, None] + (0 if first is None else first[:, None, None])
        columns = ((block * self.block < end) & (sinks > 0)[:, None]).view(-1, len(sinks), count)
        diagonals = (block * self.block < near[:, None] + self.block - 1) & (near > 0)[:, None]
        return columns, diagonals[None]

    def _lines(
        self, spec: AttentionSpec, q: Tensor, k: Tensor, first: Tensor | None, vertical: Tensor, slash: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, tokens = q.shape[0], q.shape[2]
        count = -(-tokens // self.block)
        columns, diagonals = registry.line_scores(spec, q.device.type).run(q, k, ROWS, first)
        live = live_tokens(tokens, first, batch, q.device)
        begin = 0 if first is None else first[:, None]
        places = torch.arange(tokens, device=q.device)
        columns = columns.masked_fill((live & (places < begin + SINKS))[:, None], torch.inf)
        columns = columns.masked_fill(~live[:, None], -torch.inf)
        # Of a prompt that begins later, diagonals are as much shorter.
        diagonals = diagonals.masked_fill(places < NEAREST, torch.inf)
        diagonals = diagonals.masked_fill(~live.flip(-1)[:, None], -torch.inf)
        best, chosen = top(columns, vertical.clamp(min=SINKS))
        offsets, kept = top(diagonals, slash.clamp(min=NEAREST))
        return marked(best // self.block, chosen, count), diagonal_blocks(offsets, kept, self.block, count)

    def share(self, tokens: int) -> float:
        return sum(banded_share(tokens, self._seen(p)) for p in self.heads) / len(self.heads)

    def _seen(self, pattern: Pattern) -> int:
        """Keys that a late query is expected to read: as if lines lay side by side."""
        kind, many, near = pattern
        if kind == "block_sparse":
            return many * self.block
        return max(many, SINKS) + max(near, NEAREST) if kind == "vertical_and_slash" else many + near

    def effort(self, tokens: int) -> float:
        # 0.012 at 16,384 tokens, 12 and 4 heads of 64 in bfloat16: CPU time of one thread of an EPYC core, other work
        # beside it.
        return min(1.0, 3.1 * ROWS / max(tokens, 1))
