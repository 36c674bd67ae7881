"""Regions of an image by a graph between their means (BiFormer's bi-level routing attention)."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from ..region_layout import RegionLayout
from .base import BlockSelector

# Tokens that are no patches: a class token, one of distillation, registers. More of them are thought to be a mistake.
MOST_OTHERS = 16
# Keys that attention reads in the time that the order of regions and their means take: 5 to 8 ms for 4,096 tokens of 12
# heads of 64, while attention to everything takes 110 (bfloat16) to 260 ms (float32, two threads of an AVX-512 CPU).
COPIES = 128


@dataclass(frozen=True)
class RoutedRegions(BlockSelector):
    """The ``topk`` regions whose mean key has the greatest product with a region's mean query, over all heads together.

    A region is a square of ``block`` patches and need not read itself. Tokens that are no patches read everything and
    are read by all. prefix: how many of them come before the patches, None for all of them. grid: rows and columns of
    patches, None where they are not known yet; they are thought to be a square then.
    """

    topk: int = 8
    prefix: int | None = None
    grid: tuple[int, int] | None = None

    causal = False

    @property
    def side(self) -> int:
        """Patches along a side of a region."""
        return isqrt(self.block)

    def layout(self, tokens: int) -> RegionLayout | None:
        """How ``tokens`` tokens of the grid are arranged; None where they cannot be of it."""
        assert self.grid is not None
        others = tokens - self.grid[0] * self.grid[1]
        if others < (self.prefix or 0) or (self.prefix is None and others > MOST_OTHERS):
            return None
        return RegionLayout(*self.grid, self.side, tokens, others if self.prefix is None else self.prefix)

    def route(self, layout: RegionLayout, q: Tensor, k: Tensor) -> Tensor:
        """The lists of all heads, int32 ``[B, H, blocks, N]``, ascending and without repeats, then -1.

        q: ``[B, H, slots, D]``. k: ``[B, H_kv, slots, D]``. Both in the order of ``layout``, zeros where no token is.
        """
        batch, heads, regions, blocks = q.shape[0], q.shape[1], layout.regions, layout.blocks
        sizes = layout.sizes(q.device)[:regions, None]
        queries, keys = (
            x[:, :, : regions * self.block].unflatten(2, (regions, self.block)).sum(3, dtype=torch.float32) / sizes
            for x in (q, k)
        )
        # A KV head meets the sum of its query heads.
        queries = queries.unflatten(1, (k.shape[1], -1)).sum(2)
        affinity = torch.einsum("bhid,bhjd->bij", queries, keys)
        chosen = affinity.topk(self.topk, -1).indices.sort(-1).values
        others = torch.arange(regions, blocks, device=q.device)
        lists = torch.cat([chosen, others.expand(batch, regions, -1)], -1)
        if blocks > regions:
            lists = torch.nn.functional.pad(lists, (0, blocks - lists.shape[2]), value=-1)
            everything = torch.arange(blocks, device=q.device).expand(batch, blocks - regions, -1)
            lists = torch.cat([lists, everything], 1)
        return lists.int()[:, None].expand(-1, heads, -1, -1)

    def share(self, tokens: int) -> float:
        patches, regions = self._sizes(tokens)
        return 1.0 if self.topk >= regions else 1 - (1 - self.topk / regions) * (patches / tokens) ** 2

    def effort(self, tokens: int) -> float:
        # Regions that the grid does not fill are as much work as others, and so is the block of tokens that are no
        # patches, which all read and which reads all.
        patches, regions = self._sizes(tokens)
        padding = min(self.topk, regions) * (regions * self.block**2 - patches**2 / regions)
        return (padding + 2 * regions * self.block**2) / tokens**2 + COPIES / tokens

    def _sizes(self, tokens: int) -> tuple[int, int]:
        """Patches of ``tokens`` tokens, and regions."""
        patches = max(tokens - (self.prefix or 0), 1) if self.grid is None else self.grid[0] * self.grid[1]
        rows, columns = self.grid or (isqrt(patches), isqrt(patches))
        return patches, -(-rows // self.side) * -(-columns // self.side)
