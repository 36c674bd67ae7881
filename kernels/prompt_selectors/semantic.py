"""As many blocks for every KV head, by what windows of keys receive from all of its queries (InfLLM v2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import registry
from ..semantic_blocks import semantic_blocks
from ..spec import AttentionSpec
from .base import PromptSelector, banded_share


@dataclass(frozen=True)
class SemanticBlocks(PromptSelector):
    """The ``width`` best blocks of every block of queries by ``semantic_blocks``; prompts before ``dense`` read all.

    Windows of 2 * ``stride`` keys stand for their mean. A query sees those that end before it, or with it, and gives
    them a softmax; the query heads of a KV head and the queries of a block add theirs up. The published kernels choose
    for every query alone, and estimate the softmax's denominator from longer windows. InfLLM v2 (arXiv:2509.24663).
    """

    width: int = 96
    local: int = 32
    sinks: int = 1
    stride: int = 16
    dense: int = 8192

    def select(self, spec: AttentionSpec, q: Tensor, k: Tensor, first: Tensor | None) -> Tensor:
        batch, _, tokens, _ = q.shape
        blocks, device = -(-tokens // self.block), q.device
        begin = torch.zeros(batch, dtype=torch.int64, device=device) if first is None else first
        places = torch.arange(blocks * self.block, device=device).view(1, blocks, self.block).expand(batch, -1, -1)
        seen = ((places + 1) // self.stride - 1).clamp(min=0).where(places < tokens, 0)
        of_heads = registry.set_weights(spec, device.type).run(
            q, self._windows(k), places.clamp(max=tokens - 1), seen, -(-begin // self.stride)
        )
        weights = of_heads.unflatten(1, (-1, spec.group)).sum(2)
        own, ratio = torch.arange(blocks, device=device), self.block // self.stride
        lists = semantic_blocks(weights, own, begin // self.block, ratio, self.width, self.sinks, self.local)
        return lists.repeat_interleave(spec.group, 1)

    def _windows(self, k: Tensor) -> Tensor:
        """Means of all windows that are full: ``[B, H_kv, N, D]`` in the dtype of k."""
        halves = k[:, :, : k.shape[2] // self.stride * self.stride].unflatten(2, (-1, self.stride))
        means = halves.mean(3, dtype=torch.float32)
        return ((means[:, :, 1:] + means[:, :, :-1]) / 2).to(k.dtype)

    def share(self, tokens: int) -> float:
        return 1.0 if tokens < self.dense else banded_share(tokens, self.width * self.block)

    def effort(self, tokens: int) -> float:
        # 0.082 at 16,384 tokens, 12 and 4 heads of 64 in bfloat16: CPU time of one thread of an EPYC core, other work
        # beside it. Of the products that attention needs, 1 / (2 * stride) are made, each with a softmax.
        return 1.3 / self.stride
