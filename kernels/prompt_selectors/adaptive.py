"""As many lines, or blocks, as hold a part of the attention, by a test of each head (FlexPrefill)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import registry
from ..row_reference import pooled
from ..selection_spec import PromptSelectionSpec
from ..spec import AttentionSpec
from .base import EXPECTED, PromptSelector, expected_share
from .lines import live_tokens, marked


@dataclass(frozen=True)
class AdaptiveLines(PromptSelector):
    """Block columns and block diagonals that hold ``gamma`` of what the last ``block`` queries attend to.

    A head whose mean query and mean keys predict these queries' attention (square root of the Jensen-Shannon
    divergence below ``tau``) is query-aware: the best pairs of blocks by their means, over the whole prompt, and the
    least lines. least, most: tokens' worth of either kind of lines; most 0 is no limit. expected: the share of the
    causal pairs that the lists are thought to hold. FlexPrefill (arXiv:2502.20766).
    Unlike in its code, diagonals are pooled from the nearest one on, whatever the length, and blocks of any size count
    by their own size.
    """

    gamma: float = 0.9
    tau: float = 0.1
    least: int = 1024
    most: int = 0
    expected: float = EXPECTED

    def select(self, spec: AttentionSpec, q: Tensor, k: Tensor, first: Tensor | None) -> Tensor:
        batch, _, tokens, _ = q.shape
        blocks = -(-tokens // self.block)
        rows = torch.full((batch,), min(self.block, tokens), device=q.device)
        if first is not None:
            rows = torch.minimum(rows, tokens - first)
        # Every live row's weights add up to 1.
        found = registry.line_scores(spec, q.device.type).run(q, k, self.block, first)
        scores = [x / rows[:, None, None] for x in found]
        budgets = [self._budget(x, blocks) for x in scores]
        columns, diagonals = (pooled(x, self.block) for x in scores)
        pairs = None
        if self.tau > 0:
            aware = self._divergence(spec, q, k, first, columns) < self.tau
            least = self._blocks(self.least, blocks)
            budgets = [x.masked_fill(aware, least) for x in budgets]
            if aware.any():
                pairs = self._pairs(spec, q, k, first) & aware[..., None, None]
        block = torch.arange(blocks, device=q.device)
        begin = block.new_zeros(batch) if first is None else first // self.block
        live = block >= begin[:, None]
        columns = columns.masked_fill((block == begin[:, None])[:, None], torch.inf).masked_fill(
            ~live[:, None], -torch.inf
        )
        diagonals = diagonals.masked_fill(block == 0, torch.inf).masked_fill(~live.flip(-1)[:, None], -torch.inf)
        flags = [self._best(x, budget) for x, budget in zip((columns, diagonals), budgets, strict=True)]
        lists: Tensor = registry.block_lists(q.device.type)(*flags, pairs, first, self.block)
        return lists

    def _blocks(self, tokens: int, blocks: int) -> int:
        return min(-(-tokens // self.block), blocks)

    def _budget(self, scores: Tensor, blocks: int) -> Tensor:
        """Blocks as large as the fewest lines ``[B, H, S]`` that hold gamma: int64 ``[B, H]``."""
        wanted = covering(scores, self.gamma) // self.block + 1
        most = self._blocks(self.most, blocks) if self.most else blocks
        return wanted.clamp(min=self._blocks(self.least, blocks)).clamp(max=most)

    def _best(self, scores: Tensor, budget: Tensor) -> Tensor:
        """The ``budget`` ``[B, H]`` largest of scores ``[B, H, N]``: bool ``[B, H, N]``."""
        order = scores.sort(-1, descending=True)
        chosen = torch.arange(scores.shape[-1], device=scores.device) < budget[..., None]
        return marked(order.indices, chosen & (order.values > -torch.inf), scores.shape[-1])

    def _divergence(self, spec: AttentionSpec, q: Tensor, k: Tensor, first: Tensor | None, seen: Tensor) -> Tensor:
        """Distance between what means predict of the last queries and ``seen`` ``[B, H, N]``: float32 ``[B, H]``."""
        batch, _, tokens, _ = q.shape
        live = live_tokens(tokens, first, batch, q.device)
        if first is not None:
            k = k.masked_fill(~live[:, None, :, None], 0)
        blocks = torch.nn.functional.pad(k, (0, 0, 0, -tokens % self.block)).unflatten(2, (-1, self.block))
        count = pooled(live.float(), self.block)[:, None, None]
        mean = blocks.sum(3, dtype=torch.float32).transpose(2, 3) / count.clamp(min=1)
        mean = mean.repeat_interleave(spec.group, 1)  # [B, H, D, N]
        last, its = q[:, :, -self.block :].float(), live[:, -self.block :]
        asking = last.masked_fill(~its[:, None, :, None], 0).sum(2) / its.sum(1)[:, None, None]
        scores = (asking[:, :, None] @ mean)[:, :, 0] * spec.scale
        if spec.softcap is not None:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        predicted = scores.masked_fill(count[:, 0] == 0, -torch.inf).softmax(-1)
        return distance(predicted, seen)

    def _pairs(self, spec: AttentionSpec, q: Tensor, k: Tensor, first: Tensor | None) -> Tensor:
        """The best pairs of blocks by their means, as many as hold gamma of all rows: bool ``[B, H, N, N]``."""
        means = PromptSelectionSpec(
            "mean", spec.head_dim, spec.group, spec.dtype, spec.scale, 0, self.block, self.block, softcap=spec.softcap
        )
        scores = registry.prompt_scores(means, q.device.type).run(q, k, first) * spec.scale
        weights = scores.softmax(-1).nan_to_num(0)  # rows of padding are minus infinity throughout
        bound = bound_of_cover(weights.flatten(2), self.gamma * weights.sum((2, 3)))
        return (weights >= bound[..., None, None]) & (weights > 0)

    def share(self, tokens: int) -> float:
        if tokens <= max(2 * self.block, self.least):
            return 1.0
        return expected_share(tokens, self.gamma, 0, self.expected)

    def effort(self, tokens: int) -> float:
        # 0.033 without and 0.040 with the test of heads at 16,384 tokens, 12 and 4 heads of 64 in bfloat16: CPU time of
        # one thread of an EPYC core, other work beside it.
        return min(1.0, (5.2 if self.tau > 0 else 4.2) * self.block / max(tokens, 1))


def covering(scores: Tensor, part: float) -> Tensor:
    """How many of the largest scores ``[..., N]`` it takes until they add up to ``part``: int64 ``[...]``."""
    bound = bound_of_cover(scores, scores.new_full(scores.shape[:-1], part))
    above = scores > bound[..., None]
    missing = part - scores.where(above, 0).sum(-1)
    return above.sum(-1) + (missing / bound.clamp(min=1e-30)).ceil().clamp(max=scores.shape[-1]).long()


def bound_of_cover(scores: Tensor, part: Tensor) -> Tensor:
    """The greatest bound so that scores ``[..., N]``, of 0 or more, from it on add up to ``part`` ``[...]``; else 0.

    By halving the range of their bits: 3 ms where sorting takes 13, of 12 times 16,384 on one EPYC core.
    """
    low, high = (torch.full_like(part, x, dtype=torch.int32) for x in (0, 0x7F800000))
    for _ in range(31):
        middle = low + (high - low) // 2
        held = scores.where(scores >= middle.view(torch.float32)[..., None], 0).sum(-1) >= part
        low, high = torch.where(held, middle, low), torch.where(held, high, middle)
    return low.view(torch.float32)


def distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of distributions ``[..., N]``, in nats: float32 ``[...]``."""
    middle = (p + q) / 2
    parts = [(torch.special.xlogy(x, x) - torch.special.xlogy(x, middle)).sum(-1) for x in (p, q)]
    return ((parts[0] + parts[1]) / 2).clamp(min=0).sqrt()
